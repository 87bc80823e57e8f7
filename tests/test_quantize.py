"""fp8 weights in a model: loaded, moved, decoded with; what they cost the logits."""

import copy
from pathlib import Path

import oracle_models
import pytest
import tiny
import torch
from torch import nn

import fastdllm
from fastdllm.checkpoint import save
from fastdllm.quantize import Fp8Linear, quantize
from fastdllm_kernels import quantize_weight

ASSETS = Path(fastdllm.__file__).parent / "assets"
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [37, 37, 5, 3, 5, 8, 37, 7]])
TIED = {"llada": {"weight_tying": True}, "dream": {"tie_word_embeddings": True}}


def both(folder, family, shards=1, changes=None, **options):
    """(the model as published, the same with fp8 weights), on the CPU in fp32."""
    config = {**tiny.FAMILIES[family], **(changes or {})}
    state = oracle_models.random_state(config, 0)
    tiny.write(folder, config, state, shards)
    options = {"device": "cpu", "dtype": torch.float32, **options}
    return fastdllm.load(folder, **options), fastdllm.load(folder, weights="fp8", **options)


def products(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Fp8Linear))
    }


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_product_is_quantised_from_what_is_stored(tmp_path, family, shards):
    published, model = both(tmp_path, family, shards)
    theirs, ours = products(published), products(model)
    assert theirs.keys() == ours.keys() and len(ours) == 4 * model.config.num_layers + 1
    for name, product in ours.items():
        wanted = quantize_weight(theirs[name].weight)
        assert isinstance(product, Fp8Linear)
        assert torch.equal(product.weight.data.float(), wanted.data.float())
        assert torch.equal(product.weight.scale, wanted.scale)
        assert (product.bias is None) == (theirs[name].bias is None)
        assert product.bias is None or torch.equal(product.bias, theirs[name].bias)
    assert torch.equal(model.embedding.weight, published.embedding.weight)
    assert not model.training and not any(
        parameter.requires_grad for parameter in model.parameters()
    )


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream"])
def test_the_logits_of_a_trained_model_stay_close(name):
    """By 4 to 5% of their size after eight layers, on noise that leaves the model unsure: what
    products lose cancels out.
    """
    published, model = (
        fastdllm.load(ASSETS / name, device="cpu", dtype=torch.float32, weights=w)
        for w in (None, "fp8")
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (4, 48), generator=generator)
    masked = torch.rand(4, 48, generator=generator) < 0.5
    tokens[masked] = model.config.mask_id
    exact, logits = published.logits(tokens), model.logits(tokens)
    lost = (logits - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0.01 < lost < 0.07, lost
    assert (logits.argmax(-1) == exact.argmax(-1))[masked].float().mean() > 0.85


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_generate(tmp_path, family, cache):
    _, model = both(tmp_path, family)
    first, again = (
        fastdllm.generate(
            model, [[1, 2, 3], [4, 5, 6, 7, 8]], gen_length=16, block_length=8, cache=cache
        )
        for _ in range(2)
    )
    for one, other in zip(first.tokens, again.tokens, strict=True):
        assert torch.equal(one, other) and model.config.mask_id not in one


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_tied_head_stays_as_it_is(tmp_path, family):
    published, model = both(tmp_path, family, changes=TIED[family])
    assert model.lm_head.weight is model.embedding.weight
    assert torch.equal(model.embedding.weight, published.embedding.weight)
    assert (
        sum(isinstance(product, Fp8Linear) for product in products(model).values())
        == 4 * model.config.num_layers
    )
    assert model.logits(TOKENS).isfinite().all()


def test_a_cast_spares_the_weights(tmp_path):
    _, model = both(tmp_path, "dream")
    before = {name: copy.deepcopy(product.weight) for name, product in products(model).items()}
    for cast in (model.to(torch.bfloat16), model.half(), model.to("cpu"), copy.deepcopy(model)):
        for name, product in products(cast).items():
            assert (
                product.weight.data.dtype == torch.float8_e4m3fn
                and product.weight.scale.dtype == torch.float32
            )
            assert torch.equal(product.weight.data.float(), before[name].data.float())
            assert torch.equal(product.weight.scale, before[name].scale)
        assert cast.layers[0].attention.qkv.bias.dtype == cast.dtype
    assert model.dtype == torch.float16
    assert model.logits(TOKENS).dtype == torch.float16


def test_the_dtype_is_that_of_everything_else(tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        _, model = both(tmp_path, "llada", dtype=dtype)
        assert model.dtype == dtype and model.logits(TOKENS).dtype == dtype


def test_a_model_at_hand_is_quantised_in_place(tmp_path):
    published, model = both(tmp_path, "dream")
    assert quantize(published) is published
    assert torch.equal(published.logits(TOKENS), model.logits(TOKENS))


def test_a_state_dict_brings_the_weights_back(tmp_path):
    _, model = both(tmp_path, "llada")
    other = copy.deepcopy(model)
    for buffer in other.buffers():
        buffer.view(torch.uint8).zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.logits(TOKENS), model.logits(TOKENS))


def test_saving_says_what_to_save(tmp_path):
    _, model = both(tmp_path, "llada")
    with pytest.raises(
        ValueError, match="model: expected weights as they are published, got fp8 weights"
    ):
        save(model, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_captured_steps_give_the_same_tokens(tmp_path, family):
    wide = {
        "llada": {"d_model": 64, "mlp_hidden_size": 96},
        "dream": {"hidden_size": 96, "intermediate_size": 112},
    }
    _, model = both(tmp_path, family, changes=wide[family], device="cuda", dtype=torch.bfloat16)
    # As many positions as the captured refresh is padded to: products of other sizes round
    # otherwise, and an activation in fp8 then moves by a sixteenth.
    for seed in range(3):
        prompt = torch.randint(1, 37, (48,), generator=torch.Generator().manual_seed(seed))
        captured, eager = (
            fastdllm.generate(
                model, [prompt], gen_length=16, block_length=8, cache="dual", graph=graph
            )
            for graph in (True, False)
        )
        assert torch.equal(captured.tokens[0], eager.tokens[0])
