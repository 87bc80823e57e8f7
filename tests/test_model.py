"""model.py against plain statements of the two architectures, and the published numbers."""

import copy
import warnings

import oracle_models
import pytest
import tiny
import torch
from torch import nn

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


# What somebody puts around the parts of a loaded model: it is called, by every way into the model.

TOKENS = torch.tensor([[5, 1, 9, 30, 2], [37, 3, 37, 37, 8]])


def everything(model, tokens=TOKENS):
    """The logits of a full forward, and the tokens that generate makes of the first three."""
    made = fastdllm.generate(model, tokens[:, :3], gen_length=8, block_length=4, stop_ids=())
    return model.logits(tokens), torch.stack(made.tokens)


def folded(model, changes):
    """A copy of the model with every named weight changed in place; changes: name -> tensor."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, change in changes.items():
            twin.get_parameter(name).add_(change)
    return twin


TARGETS = {
    "the fused ones": ["qkv", "gate_up", "down"],
    "every product": ["qkv", "out", "gate_up", "down", "lm_head"],
    "one": ["out"],
}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_low_rank_adapter_moves_the_logits_as_its_product_does(tmp_path, family, targets):
    peft = pytest.importorskip("peft")
    model, _ = tiny.build(tmp_path, tiny.FAMILIES[family])
    plain = copy.deepcopy(model)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[targets])
    adapted = peft.get_peft_model(model, config).eval()
    changes = {}
    for name, module in adapted.get_base_model().named_modules():
        if hasattr(module, "lora_B"):
            nn.init.normal_(module.lora_B["default"].weight, std=0.3)
            changes[name + ".weight"] = module.get_delta_weight("default").detach()
    wanted = folded(plain, changes)
    assert len(changes) == sum(
        name.removesuffix(".weight").split(".")[-1] in TARGETS[targets]
        for name, _ in plain.named_parameters()
    )
    logits, made = everything(adapted)
    assert (logits - plain.logits(TOKENS)).abs().max() > 1
    torch.testing.assert_close(logits, wanted.logits(TOKENS), rtol=1e-4, atol=1e-4)
    assert torch.equal(made, everything(wanted)[1])
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted.logits(TOKENS), plain.logits(TOKENS))
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged.logits(TOKENS), logits.detach(), rtol=1e-4, atol=1e-4)


def callable_modules(model):
    """Every module inside the model that has a forward."""
    return {
        name: module
        for name, module in model.named_modules()
        if name and not isinstance(module, nn.ModuleList)
    }


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_hooks_of_every_module_run(tmp_path, family):
    model, _ = tiny.build(tmp_path, tiny.FAMILIES[family])
    plain, made = everything(model)
    seen = []
    for name, module in callable_modules(model).items():
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(("before", name)))
        module.register_forward_hook(lambda *_, name=name: seen.append(("after", name)))
    logits, again = everything(model)
    names = callable_modules(model).keys()
    assert {("before", name) for name in names} | {("after", name) for name in names} == set(seen)
    torch.testing.assert_close(logits, plain)
    assert torch.equal(again, made)


@pytest.mark.parametrize(
    "name", ["attention", "attention.qkv", "attention.out", "mlp_norm", "down"]
)
def test_what_a_hook_returns_counts(tmp_path, name):
    model, _ = tiny.build(tmp_path, tiny.LLADA)
    plain = model.logits(TOKENS)
    for layer in model.layers:
        layer.get_submodule(name).register_forward_hook(lambda m, x, y: 2 * y)
    doubled = model.logits(TOKENS)
    assert (doubled - plain).abs().max() > 0.1
    by_weight, _ = tiny.build(tmp_path, tiny.LLADA)
    weights = "attention.out" if name == "attention" else name
    with torch.no_grad():
        for layer in by_weight.layers:
            layer.get_submodule(weights).weight.mul_(2)
    torch.testing.assert_close(doubled, by_weight.logits(TOKENS), rtol=1e-4, atol=1e-4)


def test_global_hooks_run(tmp_path):
    model, _ = tiny.build(tmp_path, tiny.LLADA)
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.add(m))
    try:
        model.logits(TOKENS)
    finally:
        handle.remove()
    assert seen == set(callable_modules(model).values())


def test_backward_hooks_run(tmp_path):
    model, _ = tiny.build(tmp_path, tiny.LLADA)
    model.requires_grad_(True)
    seen = set()
    for name in ("layers.0.attention.qkv", "layers.0.gate_up", "layers.1.down", "norm"):
        model.get_submodule(name).register_full_backward_hook(lambda *_, name=name: seen.add(name))
    model.logits(TOKENS).sum().backward()
    assert len(seen) == 4


class Doubled(nn.Module):
    """A wrapper that knows nothing of what it holds."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


class Squared(nn.Linear):
    def forward(self, x):
        return super().forward(x).square()


PARTS = ["embedding", "norm", "lm_head"] + [
    f"layers.1.{name}"
    for name in (
        "attention",
        "attention.qkv",
        "attention.out",
        "attention_norm",
        "mlp_norm",
        "gate_up",
        "down",
    )
]


@pytest.mark.parametrize("name", PARTS)
def test_a_wrapper_is_called(tmp_path, name):
    model, _ = tiny.build(tmp_path, tiny.LLADA)
    twin = copy.deepcopy(model)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, Doubled(model.get_submodule(name)))
    doubled = name + (".out" if name.endswith("attention") else "") + ".weight"
    with torch.no_grad():
        twin.get_parameter(doubled).mul_(2)
    for ours, wanted in zip(everything(model), everything(twin), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["attention.qkv", "attention.out", "gate_up", "down"])
def test_a_subclass_or_a_forward_of_the_instance_is_called(tmp_path, name):
    model, _ = tiny.build(tmp_path, tiny.LLADA)
    twin, plain = copy.deepcopy(model), model.logits(TOKENS)
    model.layers[0].get_submodule(name).__class__ = Squared
    product = twin.layers[0].get_submodule(name)
    product.forward = lambda x: nn.functional.linear(x, product.weight).square()
    logits = model.logits(TOKENS)
    assert (logits - plain).abs().max() > 0.1 and torch.equal(logits, twin.logits(TOKENS))


def test_a_bias_that_was_put_on_later_is_added(tmp_path):
    model, _ = tiny.build(tmp_path, tiny.LLADA)
    plain = model.logits(TOKENS)
    for name in ("attention.out", "gate_up", "down"):
        product = model.layers[0].get_submodule(name)
        before = model.logits(TOKENS)
        product.bias = nn.Parameter(torch.full((product.out_features,), 0.5))
        assert (model.logits(TOKENS) - before).abs().max() > 0.01, name
        product.bias = None
    assert torch.equal(model.logits(TOKENS), plain)


def test_a_parametrised_weight_is_the_one_that_counts(tmp_path):
    model, _ = tiny.build(tmp_path, tiny.LLADA)
    plain = model.logits(TOKENS)

    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    twin = copy.deepcopy(model)
    nn.utils.parametrize.register_parametrization(model.layers[0].down, "weight", Half())
    with torch.no_grad():
        twin.layers[0].down.weight.div_(2)
    logits = model.logits(TOKENS)
    torch.testing.assert_close(logits, twin.logits(TOKENS))
    assert (logits - plain).abs().max() > 0.01


@pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="no engine for int8"
)
def test_dynamic_quantisation_runs(tmp_path):
    model, _ = tiny.build(tmp_path, tiny.LLADA)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is to move to another package
        small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in small.modules())
    exact, (logits, made) = model.logits(TOKENS), everything(small)
    lost = (logits - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < lost < 0.1 and made.shape == (2, 11)


def test_a_plain_model_calls_no_product(tmp_path, monkeypatch):
    """The fused ops run where nothing stands around a module: they read its weight."""
    model, _ = tiny.build(tmp_path, tiny.DREAM)
    monkeypatch.setattr(nn.Linear, "forward", None)
    model.head = lambda hidden: hidden
    assert model.logits(TOKENS).isfinite().all()


@pytest.mark.parametrize("token", [-1, 40, 2**40])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path, token):
    model, _ = tiny.build(tmp_path, tiny.LLADA)
    with pytest.raises(ValueError, match=rf"tokens: .*\[0, 40\).*{token}"):
        model.logits(torch.tensor([[1, token, 3]]))
    with pytest.raises(TypeError, match="tokens: .*list"):
        model.logits([[1, 2]])
