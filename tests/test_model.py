"""model.py against plain statements of the two architectures, and the published numbers."""

from pathlib import Path

import oracle_models
import pytest
import tiny
import torch

import fastdllm
import fastdllm.model
from fastdllm.cache import KVCache
from fastdllm.families import FAMILIES
from fastdllm.model import DiffusionTransformer

VARIANTS = {
    "llada": tiny.LLADA,
    "llada grouped heads": {**tiny.LLADA, "n_kv_heads": 2},
    "llada biases": {**tiny.LLADA, "include_qkv_bias": True},
    "llada tied": {**tiny.LLADA, "weight_tying": True},
    "llada padded embedding": {**tiny.LLADA, "embedding_size": 48},
    "llada other base and eps": {**tiny.LLADA, "rope_theta": 100.0, "rms_norm_eps": 0.5},
    "dream": tiny.DREAM,
    "dream one kv head": {**tiny.DREAM, "num_key_value_heads": 1},
    "dream group of seven": {
        **tiny.DREAM,
        "hidden_size": 56,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
    },
    "dream tied": {**tiny.DREAM, "tie_word_embeddings": True},
    "dream other base and eps": {**tiny.DREAM, "rope_theta": 100.0, "rms_norm_eps": 0.5},
}


def check_logits(model, state, config, shapes=((2, 11), (1, 1), (3, 2), (1, 64))):
    generator = torch.Generator().manual_seed(5)
    for shape in shapes:
        tokens = torch.randint(
            0, oracle_models.shape_of(config)["vocab"], shape, generator=generator
        )
        logits = model.logits(tokens)
        assert logits.shape == (*shape, oracle_models.shape_of(config)["vocab"])
        wanted = oracle_models.logits(state, config, tokens)
        # Relative to the largest logit: a small logit is a sum of large terms and cannot be better
        # than they are.
        assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_the_plain_statement(tmp_path, name):
    config = VARIANTS[name]
    model, state = tiny.build(tmp_path, config, seed=len(name))
    assert model.dtype == torch.float32 and model.device.type == "cpu"
    check_logits(model, state, config)


def test_a_missing_number_of_kv_heads_means_one_for_every_head(tmp_path):
    state = oracle_models.random_state(tiny.LLADA, 1)
    config = {key: value for key, value in tiny.LLADA.items() if key != "n_kv_heads"}
    model = fastdllm.load(tiny.write(tmp_path, config, state), device="cpu")
    assert model.config.num_kv_heads == model.config.num_heads == 4
    check_logits(model, state, tiny.LLADA)


def test_the_oracle_itself_notices_every_weight(tmp_path):
    """A plain statement that ignored a weight would prove nothing."""
    for config in (VARIANTS["llada biases"], tiny.DREAM):
        state = oracle_models.random_state(config, 3)
        tokens = torch.tensor([[5, 1, 9, 30, 2]])
        before = oracle_models.logits(state, config, tokens)
        for name in state:
            changed = {
                **state,
                name: state[name] + torch.linspace(-1, 1, state[name].numel()).view_as(state[name]),
            }
            after = oracle_models.logits(changed, config, tokens)
            if name.endswith("k_proj.bias"):
                # only the rotation makes a key bias matter: too little to see in a fixed bound
                continue
            assert (after - before).abs().max() > 1e-3, name


def test_dreams_logits_are_shifted_by_one(tmp_path):
    model, state = tiny.build(tmp_path, tiny.DREAM)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    outputs, _ = oracle_models.forward_row(state, tiny.DREAM, tokens[0])
    logits = model.logits(tokens)[0]
    torch.testing.assert_close(logits[1:], outputs[:-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[0], outputs[0], rtol=1e-5, atol=1e-5)


def test_rows_do_not_see_each_other(tmp_path):
    model, _ = tiny.build(tmp_path, tiny.LLADA)
    tokens = torch.randint(0, 37, (3, 9), generator=torch.Generator().manual_seed(0))
    together = model.logits(tokens)
    for row in range(3):
        torch.testing.assert_close(
            model.logits(tokens[row : row + 1]), together[row : row + 1], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_position_sees_every_other(tmp_path, family):
    model, _ = tiny.build(tmp_path, tiny.FAMILIES[family])
    tokens = torch.arange(6)[None]
    changed = tokens.clone()
    changed[0, 5] = 20
    assert ((model.logits(tokens) - model.logits(changed))[0].abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near_the_plain_statement(tmp_path, family, dtype):
    config = tiny.FAMILIES[family]
    model, state = tiny.build(tmp_path, config, dtype=dtype)
    tokens = torch.randint(0, 37, (1, 12), generator=torch.Generator().manual_seed(0))
    logits = model.logits(tokens)
    assert logits.dtype == dtype
    rounded = {name: tensor.to(dtype).float() for name, tensor in state.items()}
    wanted = oracle_models.logits(rounded, config, tokens)
    error = (logits.float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert error < 8 * torch.finfo(dtype).eps


def test_logits_are_differentiable_for_training(tmp_path):
    config = FAMILIES["Dream"].config(tiny.DREAM)
    model = fastdllm.model.initialize(DiffusionTransformer(config), 7)
    model.logits(torch.tensor([[1, 2, 3]])).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_initialize_is_reproducible_and_has_the_stated_spread():
    config = FAMILIES["llada"].config({**tiny.LLADA, "d_model": 64, "embedding_size": 512})
    one, two, other = (
        fastdllm.model.initialize(DiffusionTransformer(config), seed) for seed in (1, 1, 2)
    )
    for (name, a), b, c in zip(
        one.named_parameters(), two.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        if a.ndim > 1:
            assert not torch.equal(a, c), name
            assert 0.015 < a.std() < 0.025, name
        else:
            assert (a == (0 if name.endswith("bias") else 1)).all(), name


@pytest.mark.parametrize(
    "family, raw, billions, kib",
    [("llada", oracle_models.LLADA_8B, 8.016, 512), ("Dream", oracle_models.DREAM_7B, 7.616, 56)],
)
def test_the_published_shapes(family, raw, billions, kib):
    config = FAMILIES[family].config(raw)
    with torch.device("meta"):
        model = DiffusionTransformer(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e9, 3) == billions
    assert count == sum(
        torch.Size(shape).numel() for shape in oracle_models.key_shapes(raw).values()
    )
    cache = KVCache(config, 1, 3, device="meta", dtype=torch.bfloat16)
    assert cache.bytes == 3 * kib * 1024


def test_the_published_configs_are_read_as_they_are():
    llada = FAMILIES["llada"].config(oracle_models.LLADA_8B)
    assert (llada.mask_id, llada.stop_ids, llada.logit_shift, llada.rope_in_fp32) == (
        126336,
        (126081,),
        0,
        True,
    )
    assert (llada.rope_theta, llada.rms_norm_eps, llada.max_positions, llada.head_dim) == (
        500000,
        1e-5,
        4096,
        128,
    )
    assert not llada.qkv_bias and not llada.tie_embeddings
    dream = FAMILIES["Dream"].config(oracle_models.DREAM_7B)
    assert (dream.mask_id, dream.stop_ids, dream.logit_shift, dream.rope_in_fp32) == (
        151666,
        (151643,),
        1,
        False,
    )
    assert (dream.rope_theta, dream.rms_norm_eps, dream.max_positions, dream.head_dim) == (
        1e6,
        1e-6,
        131072,
        128,
    )
    assert dream.qkv_bias and not dream.tie_embeddings


def test_the_model_file_stays_short():
    assert len(Path(fastdllm.model.__file__).read_text().splitlines()) < 200
