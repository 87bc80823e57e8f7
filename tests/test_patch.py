"""replace_attention on somebody else's models: the published module structures, restated in
bench/published.py, and transformers' own classes.
"""

import copy
import inspect
import sys
from collections import Counter
from pathlib import Path

import oracle_models
import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

import fastdllm
from fastdllm import replaced
from fastdllm.families import FAMILIES, MODELING_FILES, ModelingFile

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from published import (  # noqa: E402
    DreamConfig,
    DreamModel,
    LLaDAConfig,
    LLaDALlamaBlock,
    LLaDAModelLM,
    Norm,
)

# Dream's published config sets the older name, and so does the one restated there.
pytestmark = pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated")

CACHES = ("none", "prefix", "dual")
RULES = (fastdllm.Threshold(0.2), fastdllm.Factor(3.0))


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


def as_transformers(build, config_type, raw, state, **options):
    """transformers' own class with a published checkpoint of either family; biases that it lacks
    are 0.
    """
    shape = oracle_models.shape_of(raw)
    config = config_type(
        hidden_size=shape["width"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        intermediate_size=shape["mlp"],
        vocab_size=shape["vocab"],
        rms_norm_eps=shape["eps"],
        max_position_embeddings=96,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=raw["eos_token_id"],
        **options,
        rope_theta=shape["theta"],  # transformers 4's name, and 5's
        rope_parameters={"rope_type": "default", "rope_theta": shape["theta"]},
    )
    model = build(config).eval()
    theirs, names = shape["names"], oracle_models.DREAM_NAMES
    renamed = {}
    for name, value in state.items():
        if name in theirs.values():
            renamed[names[next(part for part in theirs if theirs[part] == name)]] = value
            continue
        prefix, layer = next(
            (theirs["layer"].format(i), i)
            for i in range(shape["layers"])
            if name.startswith(theirs["layer"].format(i))
        )
        stem, _, kind = name.removeprefix(prefix).rpartition(".")
        part = next(
            part
            for part in theirs
            if part != "layer" and theirs[part].removesuffix(".weight") == stem
        )
        renamed[names["layer"].format(layer) + names[part].removesuffix(".weight") + "." + kind] = (
            value
        )
    blank = {
        name: torch.zeros_like(value)
        for name, value in model.state_dict().items()
        if name.endswith(".bias")
    }
    model.load_state_dict({**blank, **renamed})
    return model


def build(kind, native_folder, seed=0):
    """(somebody else's model, the keywords it needs, the native model with the same weights)."""
    raw = (
        tiny.DREAM
        if "dream" in kind.lower()
        else {**tiny.LLADA, "n_kv_heads": 2, "weight_tying": "tied" in kind}
    )
    native, state = tiny.build(native_folder, raw, seed)
    ids = {"mask_id": raw["mask_token_id"]}
    if kind == "Dream":
        model = DreamModel(DreamConfig(**without(raw, "model_type")))
        model.load_state_dict(state)
        return model.eval(), {}, native
    if kind.startswith("LLaDA"):
        model = LLaDAModelLM(LLaDAConfig(**without(raw, "model_type")))
        model.load_state_dict(state)
        return model.eval(), {}, native
    if kind == "Llama, llada":
        return as_transformers(LlamaForCausalLM, LlamaConfig, raw, state), ids, native
    if kind == "Llama, dream":
        options = {**ids, "family": "Dream"}
        return (
            as_transformers(LlamaForCausalLM, LlamaConfig, raw, state, attention_bias=True),
            options,
            native,
        )
    if kind == "Qwen2, dream":
        return as_transformers(Qwen2ForCausalLM, Qwen2Config, raw, state), ids, native
    return (
        as_transformers(Qwen2ForCausalLM, Qwen2Config, raw, state),
        {**ids, "family": "llada"},
        native,
    )


KINDS = (
    "LLaDA",
    "LLaDA tied",
    "Dream",
    "Llama, llada",
    "Llama, dream",
    "Qwen2, llada",
    "Qwen2, dream",
)
PUBLISHED = ("LLaDA", "Dream")


@pytest.fixture(params=KINDS)
def case(request, tmp_path):
    return build(request.param, tmp_path)


@pytest.fixture(params=PUBLISHED)
def published(request, tmp_path):
    return build(request.param, tmp_path)


def some_tokens(vocab, rows=2, length=13):
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(3))


def forward(model, tokens, **options):
    with torch.no_grad():
        return model(tokens, use_cache=False, **options).logits


def decode(model, **options):
    generator = torch.Generator().manual_seed(11)
    prompts = [torch.randint(0, 36, (length,), generator=generator) for length in (5, 9, 1)]
    options = {"gen_length": 20, "block_length": 8, "stop_ids": (), **options}
    return fastdllm.generate(model, prompts, **options)


def assert_same(ours, native):
    assert [row.tolist() for row in ours.tokens] == [row.tolist() for row in native.tokens]
    assert torch.equal(ours.refreshes, native.refreshes) and torch.equal(
        ours.cached_steps, native.cached_steps
    )


def test_tokens_and_forwards_equal_the_native_models(case):
    model, options, native = case
    assert fastdllm.replace_attention(model, **options) is model
    for cache in CACHES:
        for rule in RULES:
            wanted = decode(native, cache=cache, rule=rule)
            assert wanted.nfe.min() < 20, "a rule that commits one token a step proves little"
            assert_same(decode(model, cache=cache, rule=rule), wanted)


def test_the_families_own_sampling_holds(case):
    """The shift, the scores after filtering and the stop ids come with the family."""
    model, options, native = case
    fastdllm.replace_attention(model, **options)
    sampled = {"temperature": 0.7, "top_p": 0.9, "seed": 5, "stop_ids": None}
    assert_same(decode(model, **sampled), decode(native, **sampled))
    adapter = model.fastdllm_adapter
    for name in (
        "family",
        "logit_shift",
        "rope_in_fp32",
        "mask_id",
        "stop_ids",
        "num_layers",
        "num_kv_heads",
        "head_dim",
    ):
        assert getattr(adapter.config, name) == getattr(native.config, name), name
    assert (adapter.device, adapter.dtype) == (native.device, native.dtype)


def test_a_plain_forward_is_full_attention(case):
    model, options, native = case
    tokens = some_tokens(native.config.vocab_size)
    fastdllm.replace_attention(model, **options)
    decode(model)  # leaves no cache behind
    with torch.no_grad():
        wanted = native.head(native.hidden_states(tokens))
    torch.testing.assert_close(forward(model, tokens), wanted, rtol=1e-4, atol=1e-4)


def test_a_listener_may_call_the_model(case):
    model, options, native = case
    fastdllm.replace_attention(model, **options)
    tokens, calls = some_tokens(native.config.vocab_size), []
    plain, wanted = forward(model, tokens), decode(model)

    def listener(_):
        calls.append(forward(model, tokens))

    assert_same(decode(model, on_step=listener), wanted)
    assert calls and all(torch.equal(logits, plain) for logits in calls)


def test_a_published_models_forward_stays_what_it_was(published):
    model, _, _ = published
    tokens = some_tokens(40)
    wanted = forward(model, tokens)
    fastdllm.replace_attention(model)
    torch.testing.assert_close(forward(model, tokens), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        forward(model, tokens, attention_mask=None), wanted, rtol=1e-4, atol=1e-4
    )


def test_restore_is_bit_identical_and_leaves_nothing(case):
    model, options, native = case
    tokens = some_tokens(native.config.vocab_size)
    before, keys = forward(model, tokens), list(model.state_dict())
    own = {name: set(module.__dict__) for name, module in model.named_modules()}
    config = dict(vars(model.config))
    fastdllm.replace_attention(model, **options)
    assert list(model.state_dict()) == keys
    assert not torch.equal(forward(model, tokens), before) or not isinstance(
        model, (LlamaForCausalLM, Qwen2ForCausalLM)
    )
    decode(model)
    assert fastdllm.restore_attention(model) is model
    assert torch.equal(forward(model, tokens), before)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == own
    assert vars(model.config) == config
    with pytest.raises(TypeError, match="replace_attention"):
        decode(model)
    assert fastdllm.restore_attention(model) is model


def test_only_the_instance_is_replaced(tmp_path):
    for kind in ("LLaDA", "Dream", "Llama, llada"):
        model, options, native = build(kind, tmp_path / kind)
        other = copy.deepcopy(model)
        tokens = some_tokens(native.config.vocab_size)
        before = forward(other, tokens)
        fastdllm.replace_attention(model, **options)
        assert torch.equal(forward(other, tokens), before)
        assert not hasattr(other, "fastdllm_adapter")


def test_replacing_twice_is_replacing_once(published):
    model, _, native = published
    tokens = some_tokens(40)
    before = forward(model, tokens)
    adapter = fastdllm.replace_attention(model).fastdllm_adapter
    assert fastdllm.replace_attention(model).fastdllm_adapter is adapter
    fastdllm.replace_attention(model, mask_id=1)
    assert model.fastdllm_adapter.config.mask_id == 1
    fastdllm.replace_attention(model, mask_id=native.config.mask_id)
    assert_same(decode(model), decode(native))
    fastdllm.restore_attention(model)
    assert torch.equal(forward(model, tokens), before)


def test_a_copy_of_a_replaced_model_stands_alone(published):
    model, _, native = published
    wanted = decode(native)
    twin = copy.deepcopy(fastdllm.replace_attention(model))
    fastdllm.restore_attention(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(decode(twin), wanted)


def test_dreams_uninitialised_rope_table_is_never_read(tmp_path):
    model, _, native = build("Dream", tmp_path)
    model.model.rotary_emb.inv_freq.fill_(torch.nan)
    fastdllm.replace_attention(model)
    assert forward(model, some_tokens(40)).isfinite().all()
    assert_same(decode(model), decode(native))


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if "tied" not in kind]
)  # that one has no head module to watch
def test_the_head_runs_on_the_blocks_rows_only(kind, tmp_path):
    model, options, native = build(kind, tmp_path)
    fastdllm.replace_attention(model, **options)
    widths = []
    head = model.model.transformer.ff_out if kind == "LLaDA" else model.lm_head
    head.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    for cache in CACHES:
        decode(model, cache=cache)
    assert widths and max(widths) <= 8


class LowRank(nn.Module):
    """What an adapter library puts around a projection."""

    def __init__(self, base):
        super().__init__()
        self.base, self.calls = base, 0
        generator = torch.Generator().manual_seed(1)
        self.down = nn.Parameter(0.2 * torch.randn(2, base.in_features, generator=generator))
        self.up = nn.Parameter(0.2 * torch.randn(base.out_features, 2, generator=generator))

    def forward(self, x):
        self.calls += 1
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("after", [False, True], ids=["wrapped before", "wrapped after"])
@pytest.mark.parametrize("kind", PUBLISHED)
def test_wrapped_projections_are_called(kind, after, tmp_path):
    model, _, native = build(kind, tmp_path)
    if after:
        fastdllm.replace_attention(model)
    layers = (
        model.model.transformer.blocks
        if kind == "LLaDA"
        else [layer.self_attn for layer in model.model.layers]
    )
    out = "attn_out" if kind == "LLaDA" else "o_proj"
    for name in ("q_proj", out):
        setattr(layers[0], name, LowRank(getattr(layers[0], name)))
    fastdllm.replace_attention(model)
    ours = decode(model)
    # One native forward for each of theirs, with the same low-rank weights folded in.
    q, o = layers[0].q_proj, getattr(layers[0], out)
    first = native.layers[0].attention
    with torch.no_grad():
        first.qkv.weight[: q.up.shape[0]] += q.up @ q.down
        first.out.weight += o.up @ o.down
    assert_same(ours, decode(native))
    assert q.calls == o.calls > 0


def test_a_peft_model_is_seen_through(tmp_path):
    model, _, native = build("Dream", tmp_path)

    class Wrapper(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_model = base

        def get_base_model(self):
            return self.base_model

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.base_model, name)

    wrapped = Wrapper(model)
    assert fastdllm.replace_attention(wrapped) is wrapped
    assert_same(decode(wrapped), decode(native))
    fastdllm.restore_attention(wrapped)
    assert not hasattr(wrapped, "fastdllm_adapter")


def test_an_override_that_was_there_comes_back(tmp_path):
    model, _, _ = build("Dream", tmp_path)
    attention = model.model.layers[1].self_attn
    calls = []
    attention.forward = lambda *args, **values: (
        calls.append(1) or type(attention).forward(attention, *args, **values)
    )
    hook = attention.forward
    fastdllm.restore_attention(fastdllm.replace_attention(model))
    assert attention.forward is hook
    forward(model, some_tokens(40))
    assert calls == [1]


def test_a_models_own_override_of_its_forward_is_called_and_comes_back(published):
    model, _, _ = published
    tokens, calls, inner = some_tokens(40), [], model.forward
    model.forward = override = lambda *args, **values: calls.append(1) or inner(*args, **values)
    fastdllm.replace_attention(model)
    forward(model, tokens)
    with pytest.raises(ValueError, match="^attention_mask: "):
        forward(model, tokens, attention_mask=torch.zeros_like(tokens))
    assert calls == [1] and fastdllm.restore_attention(model).forward is override


def test_another_modeling_file_is_one_row(tmp_path, monkeypatch):
    """Mistral's parts lie where Llama's do; nothing but the table knows any of them."""
    row = FAMILIES["Dream"], ModelingFile(config_family="Dream", causal_by_default=True)
    monkeypatch.setitem(MODELING_FILES, "mistral", row)
    options = {"num_key_value_heads": 2, "sliding_window": None}
    model = small(MistralForCausalLM, MistralConfig, **options).eval()
    fastdllm.replace_attention(model, mask_id=39, stop_ids=[])
    assert model.fastdllm_adapter.config.family == "Dream"
    assert all((row != 39).all() for row in decode(model).tokens)


def test_llada_without_use_cache_is_worked_around_and_said(tmp_path, caplog):
    model, _, _ = build("LLaDA", tmp_path)
    lost = not hasattr(model.config, "use_cache")
    if not lost:  # transformers 4 keeps it
        del model.config.use_cache
    with pytest.raises(AttributeError):
        model(some_tokens(40))
    fastdllm.replace_attention(model)
    assert "use_cache" in caplog.text
    assert model(some_tokens(40)).logits.shape == (2, 13, 40)
    fastdllm.restore_attention(model)
    assert not hasattr(model.config, "use_cache")


def test_outputs_keep_their_form(tmp_path):
    llada, _, _ = build("LLaDA", tmp_path / "llada")
    tokens = some_tokens(40)
    wanted = llada(tokens, use_cache=True).past_key_values
    fastdllm.replace_attention(llada)
    present = llada(tokens, use_cache=True).past_key_values
    for ours, theirs in zip(present, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    dream, _, _ = build("Dream", tmp_path / "dream")
    attention = dream.model.layers[0].self_attn
    fastdllm.replace_attention(dream)
    output, weights, past = attention(hidden_states=torch.randn(2, 5, 48))
    assert output.shape == (2, 5, 48) and weights is past is None


# What a forward is called with, where it asks for more than full attention from position 0 on.

FOUR = ("LLaDA", "Dream", "Llama, llada", "Qwen2, dream")
WIDTH = 13


@pytest.fixture(params=FOUR)
def guarded(request, tmp_path):
    """(a replaced model of one of the four modeling files, its kind, tokens)."""
    model, options, _ = build(request.param, tmp_path)
    fastdllm.replace_attention(model, **options)
    return model, request.param, some_tokens(40, length=WIDTH)


def entries(model, tokens):
    """Every way into a model that takes a mask: name -> a call with options."""
    adapter = model.fastdllm_adapter
    layer = adapter._part("layers")[1]
    x = adapter._part("embedding")(tokens)
    return {
        "model": lambda **options: model(tokens, **options),
        "the model inside": lambda **options: model.model(tokens, **options),
        "its forward": lambda **options: model.forward(tokens, **options),
        "a layer": lambda **options: layer(x, **options),
    }


def filled_cache():
    cache = DynamicCache()
    cache.update(torch.zeros(2, 2, 4, 8), torch.zeros(2, 2, 4, 8), 0)
    return cache


def window(width=4):
    at = torch.arange(WIDTH)
    return ((at[:, None] - at).abs() < width).expand(2, 1, WIDTH, WIDTH)


def padded(dtype, *hidden):
    mask = torch.ones(2, WIDTH, dtype=dtype)
    mask[1, list(hidden)] = 0
    return mask


def as_bias(visible, dtype=torch.float32):
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


CAUSAL = torch.ones(2, 1, WIDTH, WIDTH, dtype=torch.bool).tril()
HOLED = torch.ones(2, 1, WIDTH, WIDTH, dtype=torch.bool)
HOLED[0, :, :, :2] = False
LAST_ROW_FULL = CAUSAL.clone()
LAST_ROW_FULL[..., 3, 1] = False
ARANGE = torch.arange(WIDTH)[None]
# (the argument, what is given for it). Masks and positions, then whatever else nothing is made of.
UNHONOURED = {
    "padding on the left": ("attention_mask", padded(torch.long, 0)),
    "padding on the right": ("attention_mask", padded(torch.long, 11, 12)),
    "padding of bools": ("attention_mask", padded(torch.bool, 0)),
    "padding of floats": ("attention_mask", padded(torch.float32, 12)),
    "all padding, of floats": ("attention_mask", torch.zeros(2, WIDTH)),
    "a window of bools": ("attention_mask", window()),
    "a window of floats": ("attention_mask", as_bias(window())),
    "a window of half floats": ("attention_mask", as_bias(window(), torch.float16)),
    "a hole in all rows": ("attention_mask", HOLED),
    "a hole in one row": ("attention_mask", LAST_ROW_FULL),
    "padding of one row of queries": ("attention_mask", HOLED[:, :, :1]),
    "a mask by kind of layer": ("attention_mask", {"full_attention": HOLED}),
    "a mask that is a word": ("attention_mask", "causal"),
    "a mask that is an object": ("attention_mask", object()),
    "a bias": ("attention_bias", as_bias(window())),
    "a bias of a slope": ("attention_bias", -torch.arange(WIDTH).float().expand(2, 1, 1, WIDTH)),
    "positions further on": ("position_ids", ARANGE + 4),
    "positions of padded rows": ("position_ids", (ARANGE - 2).clamp(min=0)),
    "packed positions": ("position_ids", ARANGE % 5),
    "a place in a cache": ("cache_position", ARANGE[0] + 4),
    "a past": ("past_key_values", filled_cache()),
    "a past that was never filled": ("past_key_values", DynamicCache()),
    "a past of tensors": ("past_key_values", ((torch.zeros(2, 2, 4, 8),) * 2,) * 2),
    "a past by its newer name": ("cache", DynamicCache()),
    "a past by its older name": ("past_key_value", DynamicCache()),
    "a layer's past": ("layer_past", (torch.zeros(2, 2, 4, 8),) * 2),
    "attention weights": ("output_attentions", True),
    "a mask of heads": ("head_mask", torch.ones(2, 4)),
    "a layer's mask of heads": ("layer_head_mask", torch.ones(4)),
    "packed sequences": ("cu_seq_lens_q", torch.tensor([0, 5, 13])),
    "a causal order": ("is_causal", True),
    "a block of a cache": ("replace_position", torch.ones(2, WIDTH, dtype=torch.bool)),
    "a word nobody knows": ("dual_cache", True),
}


@pytest.mark.parametrize("name", UNHONOURED)
def test_what_a_forward_cannot_honour_is_refused_by_name(guarded, name):
    model, _, tokens = guarded
    argument, value = UNHONOURED[name]
    calls = entries(model, tokens)
    layer = calls.pop("a layer")
    for entry, call in calls.items():
        with pytest.raises(ValueError, match=f"^{argument}: ") as raised:
            call(**{argument: value})
        assert "replaced" in str(raised.value), entry
    # Below, the modeling file may not know the argument, or by another name.
    names = {argument, "past_key_values", "cache"} if "past" in name else {argument}
    expected = f"^({'|'.join(names)}): |unexpected keyword"
    with pytest.raises((ValueError, TypeError), match=expected):
        layer(**{argument: value})
    assert forward(model, tokens).isfinite().all()


def test_a_causal_mask_of_the_callers_own_is_refused(guarded):
    """A layer of transformers' classes gets one of its own making, where the caller gives none."""
    model, kind, tokens = guarded
    plain = forward(model, tokens)
    for mask in (CAUSAL, as_bias(CAUSAL)):
        for entry, call in entries(model, tokens).items():
            if entry == "a layer" and kind not in ("LLaDA", "Dream"):
                call(attention_mask=mask)
                continue
            name = "attention_bias" if (entry, kind) == ("a layer", "LLaDA") else "attention_mask"
            with pytest.raises(ValueError, match=f"^{name}: "):
                call(**{name: mask})
    if hasattr(model, "set_attn_implementation"):
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            assert torch.equal(forward(model, tokens), plain)


@pytest.mark.parametrize("asked", [{}, {"use_cache": True}], ids=["by config", "by argument"])
def test_a_past_that_was_never_filled_does_not_pass_for_one(guarded, asked):
    """A prompt, and then what follows it: the first forward's past, asked for by the config or by
    the caller, holds nothing that the second could go on from.
    """
    model, _, tokens = guarded
    model.config.use_cache = True
    with pytest.raises(ValueError, match="^(past_key_values|use_cache): "):
        past = model(tokens[:, :9], **asked).past_key_values
        assert past is not None
        model(tokens[:, 9:], past_key_values=past)


def test_use_cache_is_refused_where_no_past_comes_of_it(guarded):
    model, kind, tokens = guarded
    if kind == "LLaDA":
        assert model(tokens, use_cache=True).past_key_values[0][0].shape == (2, 2, WIDTH, 8)
        return
    for call in entries(model, tokens).values():
        with pytest.raises(ValueError, match="^use_cache: .*use_cache=False"):
            call(use_cache=True)


EVERYTHING = torch.ones(2, 1, WIDTH, WIDTH, dtype=torch.bool)
# What changes nothing, by the modeling files whose forward takes it.
TAKEN = {
    "no mask": (FOUR, {"attention_mask": None}),
    "a mask of ones": (FOUR, {"attention_mask": torch.ones(2, WIDTH, dtype=torch.long)}),
    "a mask of ones as floats": (FOUR, {"attention_mask": torch.ones(2, WIDTH)}),
    "no past": (FOUR, {"past_key_values": None}),
    "labels": (FOUR[:1] + FOUR[2:], {"labels": torch.zeros(2, WIDTH, dtype=torch.long)}),
    "a bias of zeros": (FOUR[:1], {"attention_bias": as_bias(EVERYTHING)}),
    "positions from 0": (FOUR[1:], {"position_ids": ARANGE}),
    "positions of each row": (FOUR[1:], {"position_ids": ARANGE.expand(2, -1)}),
    "the start of a cache": (FOUR[1:], {"cache_position": ARANGE[0]}),
    "no weights": (FOUR[1:], {"output_attentions": False}),
    "a full mask": (FOUR[1:], {"attention_mask": EVERYTHING}),
    "a full mask of floats": (FOUR[1:], {"attention_mask": as_bias(EVERYTHING)}),
    "Dream's word": (FOUR[1:2], {"attention_mask": "full"}),
    "hidden states": (FOUR[2:], {"output_hidden_states": True}),
    "all logits": (FOUR[2:], {"logits_to_keep": 0}),
    "a trainer's count": (FOUR[2:], {"num_items_in_batch": torch.tensor(26)}),
    "masks by kind of layer": (FOUR[3:], {"attention_mask": {"full_attention": None}}),
}


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
def test_what_changes_nothing_is_taken(guarded):
    model, kind, tokens = guarded
    with torch.no_grad():
        plain = model(tokens).logits  # whatever config.use_cache says
    for name, (kinds, options) in TAKEN.items():
        if kind in kinds:
            logits = forward(model, tokens, **options)
            torch.testing.assert_close(logits, plain, msg=lambda text, name=name: name + text)
    embedding = model.fastdllm_adapter._part("embedding")
    with torch.no_grad():
        logits = model(inputs_embeds=embedding(tokens), use_cache=False).logits
    torch.testing.assert_close(logits, plain)


def test_an_adapter_librarys_wrapper_refuses_as_well(tmp_path):
    peft = pytest.importorskip("peft")
    model, options, _ = build("Qwen2, dream", tmp_path)
    fastdllm.replace_attention(model, **options)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    tokens = some_tokens(40)
    assert forward(wrapped, tokens, attention_mask=torch.ones_like(tokens)).shape == (2, WIDTH, 43)
    for name, value in (("attention_mask", padded(torch.long, 0)), ("use_cache", True)):
        with pytest.raises(ValueError, match=f"^{name}: "):
            wrapped(tokens, **{name: value})


def test_arguments_by_position_are_looked_at_as_well(guarded):
    model, kind, tokens = guarded
    layer = model.model.transformer.blocks[0] if kind == "LLaDA" else None
    with pytest.raises(ValueError, match="^attention_mask: "):
        if kind == "LLaDA":
            model(tokens, None, padded(torch.long, 0))
        else:
            model(tokens, padded(torch.long, 0))
    if kind != "LLaDA":
        with pytest.raises(ValueError, match="^position_ids: "):
            model(tokens, None, ARANGE + 1)
        return
    q, k, v = torch.randn(2, WIDTH, 32), torch.randn(2, WIDTH, 16), torch.randn(2, WIDTH, 16)
    past = (torch.zeros(2, 2, 4, 8),) * 2
    for argument, args in {
        "attention_bias": (q, k, v, as_bias(window())),
        "layer_past": (q, k, v, None, past),
    }.items():
        with pytest.raises(ValueError, match=f"^{argument}: "):
            layer.attention(*args)
    assert layer.attention(q, k, v, None, None, True)[1][0].shape == (2, 2, WIDTH, 8)
    with pytest.raises(TypeError, match="at most 6 positional arguments, got 7"):
        layer.attention(q, k, v, None, None, False, None)


class OtherOrder(LLaDALlamaBlock):
    """A fork whose method has one argument more, before the others."""

    def attention(self, q, k, v, mask, attention_bias=None, layer_past=None, use_cache=False):
        return super().attention(q, k, v, attention_bias, layer_past, use_cache)

    def forward(self, x, attention_bias=None, layer_past=None, use_cache=False, mask=None):
        normed = self.attn_norm(x)
        q, k, v = self.q_proj(normed), self.k_proj(normed), self.v_proj(normed)
        out, present = self.attention(q, k, v, mask, attention_bias, layer_past, use_cache)
        x = x + out
        normed = self.ff_norm(x)
        return x + self.ff_out(self.act(self.ff_proj(normed)) * self.up_proj(normed)), present


def test_a_fork_with_another_order_of_arguments(tmp_path):
    model, _, native = build("LLaDA", tmp_path)
    for block in model.model.transformer.blocks:
        block.__class__ = OtherOrder
    tokens = some_tokens(40)
    wanted = model(tokens, use_cache=True)
    fastdllm.replace_attention(model)
    ours = model(tokens, use_cache=True)
    torch.testing.assert_close(ours.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    assert_same(decode(model), decode(native))
    block, x = model.model.transformer.blocks[0], torch.randn(2, WIDTH, 32)
    for argument in ("mask", "attention_bias"):
        with pytest.raises(ValueError, match=f"^{argument}: "):
            block(x, **{argument: as_bias(window())})


def test_settings_that_ask_for_more_are_refused_too(tmp_path):
    model, options, _ = build("Qwen2, dream", tmp_path)
    tokens = some_tokens(40)
    fastdllm.replace_attention(model, **options)
    plain = forward(model, tokens)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="^output_attentions: "):
        model(tokens)
    model.config.output_attentions = False
    model.config.attention_dropout = 0.5
    with pytest.raises(ValueError, match="^attention_dropout: .*0.5"):
        model.train()(tokens)
    assert torch.equal(forward(model.eval(), tokens), plain)


def test_a_forward_with_checkpointed_gradients_runs(tmp_path):
    """The layers run anew in the backward pass, outside the model's forward."""
    for implementation in ("eager", "sdpa"):
        model, options, _ = build("Llama, llada", tmp_path / implementation)
        fastdllm.replace_attention(model, **options)
        model.set_attn_implementation(implementation)
        tokens, gradients = some_tokens(40), []
        for _ in range(2):
            model.zero_grad()
            model.train()(tokens, labels=tokens).loss.backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
            model.gradient_checkpointing_enable()
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)


def test_a_compiled_model_refuses_as_well(tmp_path):
    model, options, _ = build("Llama, llada", tmp_path)
    tokens = some_tokens(40)
    fastdllm.replace_attention(model, **options)
    plain, compiled = forward(model, tokens), torch.compile(model, backend="eager")
    torch.testing.assert_close(forward(compiled, tokens), plain)
    with pytest.raises(ValueError, match="^attention_mask: "):
        forward(compiled, tokens, attention_mask=padded(torch.long, 0))


def test_a_replaced_forward_shows_the_signature_it_had(published):
    model, _, _ = published
    modules = [model, model.model]
    before = [list(inspect.signature(module.forward).parameters) for module in modules]
    fastdllm.replace_attention(model)
    assert [list(inspect.signature(module.forward).parameters) for module in modules] == before


def test_transformers_own_generate_needs_no_cache_here(tmp_path):
    model, options, _ = build("Llama, llada", tmp_path)
    fastdllm.replace_attention(model, **options)
    tokens = some_tokens(36)
    asked = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 38}
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(tokens, **asked)
    made = model.generate(tokens, use_cache=False, eos_token_id=None, **asked)
    for _ in range(3):
        best = forward(model, tokens)[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best], dim=1)
    assert torch.equal(made, tokens)


def test_more_positions_than_the_model_has_are_refused(guarded):
    model, _, _ = guarded
    with pytest.raises(ValueError, match="at most 96 positions, got 97"):
        forward(model, some_tokens(40, length=97))


def small(build, config_type, **values):
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "vocab_size": 40,
    }
    return build(config_type(**{**shape, **values}))


def headless(tmp_path):
    model, _, _ = build("LLaDA", tmp_path)
    del model.model.transformer["ff_out"]
    del model.model.transformer.blocks[1].v_proj
    return model


scaled = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}}
REFUSED = {
    "another architecture": (
        lambda _: small(MistralForCausalLM, MistralConfig, num_key_value_heads=4),
        {},
        ValueError,
        r"MistralForCausalLM.*'mistral'.*llada \(model\.transformer\.blocks\)"
        r".*qwen2 \(model\.layers\)",
    ),
    "names that are not there": (
        headless,
        {},
        ValueError,
        r"no model\.transformer\.ff_out, model\.transformer\.blocks\.1\.v_proj",
    ),
    "no config": (lambda _: nn.Linear(2, 2), {}, TypeError, "config.*Linear"),
    "no module": (lambda _: "model", {}, TypeError, "str"),
    "no mask id": (
        lambda _: small(LlamaForCausalLM, LlamaConfig),
        {},
        ValueError,
        "model.config.*mask_token_id.*mask_id=",
    ),
    "no stop id": (
        lambda _: small(Qwen2ForCausalLM, Qwen2Config, num_key_value_heads=4),
        {"mask_id": 3},
        ValueError,
        "eos.*stop_ids=",
    ),
    "a mask id outside": (
        lambda _: small(LlamaForCausalLM, LlamaConfig),
        {"mask_id": 40},
        ValueError,
        "mask_id",
    ),
    "an unknown family": (
        lambda _: small(LlamaForCausalLM, LlamaConfig),
        {"mask_id": 3, "family": "gpt"},
        ValueError,
        "family.*Dream, llada",
    ),
    "a family that is a list": (
        lambda _: small(LlamaForCausalLM, LlamaConfig),
        {"mask_id": 3, "family": ["llada"]},
        ValueError,
        "family.*Dream, llada",
    ),
    "one stop id": (
        lambda _: small(LlamaForCausalLM, LlamaConfig),
        {"mask_id": 3, "stop_ids": 5},
        TypeError,
        "stop_ids.*int",
    ),
    "scaled rope": (
        lambda _: small(LlamaForCausalLM, LlamaConfig, **scaled),
        {"mask_id": 3},
        ValueError,
        "model.config.*rope_parameters.*linear",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_do_is_refused_before_anything_changes(name, tmp_path):
    make, options, error, message = REFUSED[name]
    model = make(tmp_path)
    with pytest.raises(error, match=message):
        fastdllm.replace_attention(model, **options)
    assert not hasattr(model, "fastdllm_adapter")


# What runs by this project's ops once a model is replaced: its plain linears and RMSNorms.


def faster(model):
    """Names of the modules whose forward is one of ours."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(vars(module).get("forward"), replaced.Faster)
    }


def logits_of(model, tokens):
    """By the adapter: the restated models' own forwards run on a CPU only."""
    with torch.no_grad():
        return model.fastdllm_adapter.head(model.fastdllm_adapter.hidden_states(tokens))


def test_plain_linears_and_norms_run_by_our_ops(case, monkeypatch):
    model, options, native = case
    tokens, calls = some_tokens(native.config.vocab_size), Counter()
    for name in ("linear", "rms_norm", "linear_swiglu"):
        op = getattr(replaced, name)
        monkeypatch.setattr(
            replaced, name, lambda *args, name=name, op=op: calls.update([name]) or op(*args)
        )
    fastdllm.replace_attention(model, **options)
    # The head stays: cuBLAS reads its weight at the memory's speed.
    head = model.fastdllm_adapter._part("head")
    linears = {
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head
    }
    norms = {name for name, module in model.named_modules() if "Norm" in type(module).__name__}
    mlps = {
        name for name, module in model.named_modules() if hasattr(module, "gate_proj")
    }  # LLaDA's layer has none
    assert faster(model) == linears | norms | mlps and len(norms) == 5 and len(linears) == 14
    calls.clear()
    forward(model, tokens)
    products = len(linears) - 2 * len(mlps)
    assert calls == Counter(
        {"linear": products, "rms_norm": len(norms), "linear_swiglu": len(mlps)}
    )


@pytest.mark.parametrize("kind", [*PUBLISHED, "Llama, llada", "Qwen2, dream"])
def test_half_precision_loses_no_more_than_the_models_own_modules(kind, dtype, device, tmp_path):
    """26 rows: on a GPU the kernels run. Against the replaced model whose linears and norms are its
    own again.
    """
    model, options, native = build(kind, tmp_path)
    tokens = some_tokens(native.config.vocab_size).to(device)
    exact = logits_of(
        fastdllm.replace_attention(copy.deepcopy(model).double().to(device), **options), tokens
    )
    model.to(device, dtype)
    ours = logits_of(fastdllm.replace_attention(model, **options), tokens).double()
    for one in model.fastdllm_adapter.replaced:
        if isinstance(one, replaced.Faster):
            one.restore()
    own = logits_of(model, tokens).double()
    assert not faster(model)
    ulps = 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (own - exact).abs().max() + ulps


@pytest.mark.parametrize("kind", ["Llama, llada", "Qwen2, dream"])
def test_restore_is_bit_identical_in_half_precision(kind, dtype, device, tmp_path):
    model, options, native = build(kind, tmp_path)
    tokens = some_tokens(native.config.vocab_size).to(device)
    model.to(device, dtype)
    before = forward(model, tokens)
    fastdllm.replace_attention(model, **options)
    forward(model, tokens)
    assert torch.equal(forward(fastdllm.restore_attention(model), tokens), before)
    assert not any("forward" in vars(module) for module in model.modules())


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_is_more_than_a_linear_keeps_its_forward(tmp_path):
    model, _, _ = build("Dream", tmp_path)
    tokens, layers = some_tokens(40), model.model.layers
    layers[0].mlp.up_proj.__class__ = Doubled
    layers[0].self_attn.q_proj = LowRank(layers[0].self_attn.q_proj)
    down = layers[1].mlp.down_proj
    down.forward = own = lambda x: 3 * functional.linear(x, down.weight)
    norm = layers[1].input_layernorm
    norm.forward = own_norm = lambda x: -type(norm).forward(norm, x)
    wanted = forward(model, tokens)
    fastdllm.replace_attention(model)
    torch.testing.assert_close(forward(model, tokens), wanted, rtol=1e-4, atol=1e-4)
    assert down.forward is own and norm.forward is own_norm
    kept = {"layers.0.mlp.up_proj", "layers.0.self_attn.q_proj"}
    assert faster(model.model).isdisjoint(kept) and "layers.0.self_attn.q_proj.base" in faster(
        model.model
    )
    fastdllm.restore_attention(model)
    assert (
        down.forward is own
        and norm.forward is own_norm
        and torch.equal(forward(model, tokens), wanted)
    )


def test_an_mlp_calls_what_is_more_than_a_product(tmp_path, monkeypatch):
    model, _, _ = build("Dream", tmp_path)
    tokens, seen = some_tokens(40), []
    mlps = [layer.mlp for layer in model.model.layers]
    fastdllm.replace_attention(model)
    wanted = forward(model, tokens)
    mlps[0].gate_proj.register_forward_hook(lambda *_: seen.append("gate"))
    mlps[1].up_proj = LowRank(mlps[1].up_proj)
    monkeypatch.setattr(
        replaced, "linear_swiglu", None
    )  # neither MLP may take the fused product now
    changed = forward(model, tokens)
    assert seen == ["gate"] and not torch.equal(changed, wanted)


class TimesThree(torch.Tensor):
    """Stands for a weight that is quantised in place: what it multiplies to, only its own code
    knows.
    """

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs)
        return 3 * out.as_subclass(torch.Tensor) if function is functional.linear else out


def test_the_parameters_are_read_when_they_are_needed(published, monkeypatch):
    model, _, _ = published
    product, tokens = (
        next(module for module in model.modules() if type(module) is nn.Linear),
        some_tokens(40),
    )
    fastdllm.replace_attention(model)
    x = torch.randn(2, product.in_features)
    with torch.no_grad():
        before = product(x)
        product.weight.mul_(2)
        torch.testing.assert_close(
            product(x), 2 * before - (0 if product.bias is None else product.bias)
        )
        product.weight.mul_(0.5)
        weight = product.weight.detach().clone()
        product.weight = nn.Parameter(weight.as_subclass(TimesThree), requires_grad=False)
        monkeypatch.setattr(
            replaced, "linear", None
        )  # whatever is no plain tensor is left to the class
        assert torch.equal(product(x), 3 * before)
        assert torch.equal(product(input=x), 3 * before)
    monkeypatch.undo()
    product.weight = nn.Parameter(weight)
    model(tokens, use_cache=False).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Shifted(Norm):
    """Gemma's: a weight of zeros changes nothing."""

    def forward(self, x):
        wide = x.float()
        return (
            (1 + self.weight.float())
            * wide
            * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        ).to(x.dtype)


class Centred(Norm):
    def forward(self, x):
        return functional.layer_norm(x, self.weight.shape, self.weight, eps=self.eps)


class OtherEps(Norm):
    def forward(self, x):
        return functional.rms_norm(x, self.weight.shape, self.weight, 10 * self.eps)


class Unweighted(Norm):
    """With the weights it starts with, nothing tells it from an RMSNorm."""

    def forward(self, x):
        return functional.rms_norm(x, self.weight.shape, eps=self.eps)


class Gated(Norm):
    def forward(self, x, gate):
        return super().forward(x) * gate


class Tupled(Norm):
    def forward(self, x):
        return super().forward(x), x


class Biased(Norm):
    """As LLaDA's published RMSLayerNorm, whose bias is None where the config has none."""

    def __init__(self, width, eps, bias=False):
        super().__init__(width, eps)
        self.register_parameter("bias", nn.Parameter(torch.zeros(width)) if bias else None)

    def forward(self, x):
        return super().forward(x) if self.bias is None else super().forward(x) + self.bias


DTYPES_OF_NORMS = (torch.float32, torch.bfloat16, torch.float16)
NORMS = {
    "plain": (lambda: Norm(48, 1e-6), True),
    "a bias that is none": (lambda: Biased(48, 1e-5), True),
    "Llama's": (lambda: LlamaRMSNorm(48, 1e-6), True),
    "Qwen2's": (lambda: Qwen2RMSNorm(48, 1e-5), True),
    "PyTorch's, which rounds once": (lambda: nn.RMSNorm(48, eps=1e-5), True),
    "1 + weight": (lambda: Shifted(48, 1e-6), False),
    "LayerNorm without a bias": (lambda: nn.LayerNorm(48, bias=False), False),
    "no mean": (lambda: Centred(48, 1e-6), False),
    "another eps than it says": (lambda: OtherEps(48, 1e-6), False),
    "the weight is not used": (lambda: Unweighted(48, 1e-6), False),
    "two inputs": (lambda: Gated(48, 1e-6), False),
    "two outputs": (lambda: Tupled(48, 1e-6), False),
    "a bias": (lambda: Biased(48, 1e-5, bias=True), False),
    "no eps": (lambda: nn.RMSNorm(48), False),
    "on the meta device": (lambda: Norm(48, 1e-6).to("meta"), False),
    "a matrix": (lambda: nn.Bilinear(2, 2, 2, bias=False), False),
}


@pytest.mark.parametrize("dtype", DTYPES_OF_NORMS, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_told_by_what_it_computes(name, dtype, device):
    make, known = NORMS[name]
    norm = make().to(dtype=dtype)
    norm = norm if name == "on the meta device" else norm.to(device)
    before, generator, calls = list(norm.state_dict().values()), torch.get_rng_state(), []
    norm.register_forward_hook(lambda *_: calls.append(1))
    found = replaced.speed_up(norm, None)
    assert len(found) == known and ("forward" in vars(norm)) == known
    assert torch.equal(torch.get_rng_state(), generator) and not calls
    assert all(
        a is b or torch.equal(a, b)
        for a, b in zip(before, norm.state_dict().values(), strict=True)
        if not a.is_meta
    )
    if known:
        x = (3 * torch.randn(5, 48)).to(device, dtype)
        torch.testing.assert_close(
            norm(x),
            type(norm).forward(norm, x),
            rtol=max(1e-5, 2 * torch.finfo(dtype).eps),
            atol=1e-6,
        )
        assert calls == [1]
        found[0].restore()
        assert "forward" not in vars(norm)


def test_a_wrapper_put_on_later_stays_and_calls_what_was_there(published):
    model, _, _ = published
    tokens = some_tokens(40)
    before = forward(model, tokens)
    fastdllm.replace_attention(model)
    name, product = next((name, m) for name, m in model.named_modules() if type(m) is nn.Linear)
    inner, calls = product.forward, []
    product.forward = wrapper = lambda x: calls.append(1) or inner(x)
    forward(model, tokens)
    fastdllm.replace_attention(model, mask_id=1)  # takes out and puts in again
    assert product.forward is wrapper and name not in faster(model)
    forward(model, tokens)
    fastdllm.restore_attention(model)
    assert product.forward is wrapper and torch.equal(forward(model, tokens), before)
    assert calls == [1] * 3
    del product.forward
    assert torch.equal(forward(model, tokens), before)


def test_a_saved_or_compiled_model_computes_the_same(published, tmp_path):
    model, _, _ = published
    tokens = some_tokens(40)
    wanted = logits_of(fastdllm.replace_attention(model), tokens)
    torch.save(model, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits_of(twin, tokens), wanted)
    assert faster(fastdllm.restore_attention(twin)) == set() != faster(model)
    layer = twin.get_submodule(
        "model.layers.0.mlp"
        if hasattr(twin.model, "layers")
        else "model.transformer.blocks.0.ff_norm"
    )
    x = torch.randn(2, 3, 48 if hasattr(twin.model, "layers") else 32)
    plain = layer(x)
    assert replaced.speed_up(layer)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), plain)
