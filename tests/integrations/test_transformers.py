"""transformers: the real Llama, Qwen2 and Qwen3 classes with attn_implementation="fastdllm" against
sdpa.
"""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

import transformers  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from fastdllm.integrations.transformers import UNSUPPORTED, attend, register  # noqa: E402

SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=50,
    max_position_embeddings=64,
)
CLASSES = {
    "llama": (LlamaModel, LlamaConfig, dict(num_key_value_heads=4)),
    "llama, grouped": (LlamaModel, LlamaConfig, dict(num_key_value_heads=2)),
    "qwen2": (Qwen2Model, Qwen2Config, dict(num_key_value_heads=1)),
    "qwen3": (Qwen3Model, Qwen3Config, dict(num_key_value_heads=2, head_dim=16)),
}
PADDINGS = {
    "none": [(0, 12)] * 3,
    "right": [(0, 12), (0, 5), (0, 1)],
    "left": [(0, 12), (7, 12), (11, 12)],
    "both": [(2, 12), (0, 7), (3, 9)],
}
NEWER = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 0)


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()
    register()
    with torch.no_grad():
        yield


@pytest.fixture(params=CLASSES)
def model(request):
    cls, config, more = CLASSES[request.param]
    torch.manual_seed(0)
    return cls._from_config(config(**SIZES, **more), attn_implementation="fastdllm").eval()


def ids_and_mask(spans, width=12):
    at = torch.arange(width)
    mask = torch.stack([(first <= at) & (at < last) for first, last in spans])
    return torch.randint(0, 50, mask.shape, generator=torch.Generator().manual_seed(1)), mask


def full(mask, queries=None, dtype=torch.float32):
    """The 4-D mask that says the same to sdpa and to eager: every query sees every key that is no
    padding.
    """
    visible = mask[:, None, None].expand(-1, 1, queries or mask.shape[1], -1)
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def choose(model, name):
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(name)
    else:  # before transformers 4.54
        model.config._attn_implementation = name


def expected(model, ids, mask, **options):
    choose(model, "sdpa")
    hidden = model(
        ids, attention_mask=full(mask, ids.shape[1], model.dtype), **options
    ).last_hidden_state
    choose(model, "fastdllm")
    return hidden


@pytest.mark.parametrize("padding", PADDINGS)
def test_full_attention_equals_sdpa_where_there_is_no_padding(model, padding):
    ids, mask = ids_and_mask(PADDINGS[padding])
    hidden = model(ids, attention_mask=mask.long(), is_causal=False).last_hidden_state
    torch.testing.assert_close(hidden[mask], expected(model, ids, mask)[mask], rtol=1e-4, atol=1e-5)
    assert hidden.isfinite().all()
    if padding != "none":
        unpadded = model(ids, is_causal=False).last_hidden_state
        assert not torch.allclose(hidden[mask], unpadded[mask], atol=1e-3), (
            "the padding made no difference"
        )


def test_what_the_padding_holds_makes_no_difference(model):
    ids, mask = ids_and_mask(PADDINGS["both"])
    other = torch.where(mask, ids, (ids + 1) % 50)
    a, b = (
        model(tokens, attention_mask=mask, is_causal=False).last_hidden_state
        for tokens in (ids, other)
    )
    assert torch.equal(a[mask], b[mask])


def test_a_row_gives_what_it_gives_alone(model):
    ids, mask = ids_and_mask(PADDINGS["right"])
    hidden = model(ids, attention_mask=mask, is_causal=False).last_hidden_state
    alone = model(ids[1:2, :5], is_causal=False).last_hidden_state
    torch.testing.assert_close(hidden[1:2, :5], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(model, dtype):
    ids, mask = ids_and_mask(PADDINGS["both"])
    exact = expected(model, ids, mask)
    model.to(dtype)
    error = (expected(model, ids, mask)[mask].float() - exact[mask]).abs().max()
    hidden = model(ids, attention_mask=mask, is_causal=False).last_hidden_state
    assert hidden.dtype == dtype and (hidden[mask].float() - exact[mask]).abs().max() <= 2 * error


def test_a_causal_layer_is_refused_unless_the_call_says_otherwise(model):
    ids, mask = ids_and_mask(PADDINGS["left"])
    for options in ({}, {"attention_mask": mask}, {"is_causal": True}, {"use_cache": False}):
        with pytest.raises(ValueError, match="is_causal=False"):
            model(ids, **options)


def test_the_config_may_say_it_instead(model):
    ids, mask = ids_and_mask(PADDINGS["both"])
    said = model(ids, attention_mask=mask, is_causal=False).last_hidden_state
    model.config.is_causal = False
    assert torch.equal(model(ids, attention_mask=mask).last_hidden_state, said)


def test_without_a_cache_and_without_a_mask(model):
    """Here transformers looks for packed sequences, and hands over a mask function of its own."""
    ids, mask = ids_and_mask(PADDINGS["none"])
    hidden = model(ids, use_cache=False, is_causal=False).last_hidden_state
    torch.testing.assert_close(hidden, expected(model, ids, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("padding", PADDINGS)
def test_a_full_mask_of_the_callers_own_needs_no_flag(model, padding, kind):
    ids, mask = ids_and_mask(PADDINGS[padding])
    given = full(mask) if kind == torch.float32 else full(mask) == 0
    hidden = model(ids, attention_mask=given).last_hidden_state
    torch.testing.assert_close(hidden[mask], expected(model, ids, mask)[mask], rtol=1e-4, atol=1e-5)


def test_masks_that_differ_between_queries_are_refused(model):
    ids, mask = ids_and_mask(PADDINGS["none"])
    causal = torch.ones(3, 1, 12, 12, dtype=torch.bool).tril()
    for given in (
        causal,
        torch.zeros(3, 1, 12, 12).masked_fill(~causal, torch.finfo(torch.float32).min),
    ):
        with pytest.raises(ValueError, match="queries differ"):
            model(ids, attention_mask=given)
    with pytest.raises(ValueError, match="bias"):
        model(ids, attention_mask=torch.full((3, 1, 12, 12), -1.0))
    with pytest.raises(ValueError, match="bools or floats.*int64"):
        model(ids, attention_mask=torch.ones(3, 1, 12, 12, dtype=torch.long))


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_computed_is_refused_by_name(name):
    """As the classes hand it on, whichever of them knows the argument."""
    states, module = torch.zeros(1, 2, 3, 16), torch.nn.Module()
    call = {"scaling": 0.25, "is_causal": False, "sliding_window": None}
    assert attend(module, states, states, states, None, **call, **{name: None})[1] is None
    with pytest.raises(ValueError, match=f"^{name}: "):
        attend(module, states, states, states, None, **call, **{name: torch.zeros(2)})


def test_packed_sequences_are_refused_where_transformers_tells_of_them(model):
    """With is_causal=False newer versions ask for a bidirectional mask, and look for packed
    sequences in causal ones only.
    """
    ids, mask = ids_and_mask(PADDINGS["none"])
    options = {
        "position_ids": torch.cat([torch.arange(5), torch.arange(7)]).expand(3, -1),
        "use_cache": False,
    }
    try:
        hidden = model(ids, is_causal=False, **options).last_hidden_state
    except ValueError as error:
        assert "queries differ" in str(error)
    else:
        torch.testing.assert_close(
            hidden, expected(model, ids, mask, **options), rtol=1e-4, atol=1e-5
        )


def test_a_mask_with_a_gap_is_refused(model):
    ids, mask = ids_and_mask(PADDINGS["none"])
    mask[1, 4] = False
    with pytest.raises(ValueError, match="gap"):
        model(ids, attention_mask=mask, is_causal=False)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_new_tokens_see_the_cache_and_each_other(model, padding):
    """A block after a cached prompt: prompts padded on the right leave a gap before the block."""
    ids, mask = ids_and_mask(PADDINGS[padding])
    block = torch.randint(0, 50, (3, 4), generator=torch.Generator().manual_seed(2))
    seen = torch.cat([mask, torch.ones(3, 4, dtype=torch.bool)], 1)
    results = []
    for name in ("sdpa", "fastdllm"):
        choose(model, name)
        options = {"is_causal": False} if name == "fastdllm" else {}
        prompt = model(
            ids, attention_mask=full(mask) if name == "sdpa" else mask, use_cache=True, **options
        )
        given = full(seen, 4) if name == "sdpa" else seen
        done = model(block, attention_mask=given, past_key_values=prompt.past_key_values, **options)
        results.append(done.last_hidden_state)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_sliding_window_counts_only_where_it_is_shorter():
    ids, mask = ids_and_mask(PADDINGS["both"])
    window = dict(
        use_sliding_window=True, max_window_layers=0, layer_types=["sliding_attention"] * 2
    )
    for size in (12, 5):
        torch.manual_seed(0)
        config = Qwen3Config(
            **SIZES, num_key_value_heads=2, head_dim=16, sliding_window=size, **window
        )
        model = Qwen3Model._from_config(config, attn_implementation="fastdllm").eval()
        if size == 12:
            hidden = model(ids, attention_mask=mask, is_causal=False).last_hidden_state
            torch.testing.assert_close(
                hidden[mask], expected(model, ids, mask)[mask], rtol=1e-4, atol=1e-5
            )
        else:
            with pytest.raises(ValueError, match="window"):
                model(ids, attention_mask=mask, is_causal=False)


def test_a_static_cache_is_refused(model):
    """Its empty slots would be seen."""
    from transformers import StaticCache

    ids, mask = ids_and_mask(PADDINGS["none"])
    options = {} if NEWER else {"max_batch_size": 3}
    cache = StaticCache(config=model.config, max_cache_len=20, **options)
    with pytest.raises(ValueError, match="static"):
        model(ids, attention_mask=mask, past_key_values=cache, is_causal=False)
    with pytest.raises(ValueError, match="beside a cache"):
        model(
            ids, attention_mask=full(torch.arange(20).expand(3, -1) < 12, 12), past_key_values=cache
        )


def test_training_is_refused(model):
    ids, _ = ids_and_mask(PADDINGS["none"])
    with torch.enable_grad(), pytest.raises(ValueError, match="no gradient"):
        model(ids, is_causal=False)


@pytest.mark.skipif(
    not NEWER, reason="encoders dispatch through the interface since transformers 5"
)
def test_an_encoder_needs_no_flag():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(**SIZES)
    model = BertModel._from_config(config, attn_implementation="fastdllm").eval()
    ids, mask = ids_and_mask(PADDINGS["both"])
    hidden = model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(hidden[mask], expected(model, ids, mask)[mask], rtol=1e-4, atol=1e-5)


def test_the_file_is_imported_without_transformers():
    code = "import sys, fastdllm.integrations.transformers; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


def test_a_transformers_without_the_mask_interface_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", None)
    with pytest.raises(ImportError, match="4.53"):
        register()
