"""One table of wrong calls: each raises the stated error, whose message names the argument."""

import json
import re

import oracle_models
import pytest
import tiny
import torch

import fastdllm
from fastdllm import CachePolicy, Factor, Quota, Threshold
from fastdllm_kernels import (
    block_attention,
    confidence_select,
    linear,
    rms_norm,
    rope_to_cache,
    swiglu,
    token_confidence,
)

NAN, INF = float("nan"), float("inf")
MASK = 9


def model_in(folder, family="llada"):
    return tiny.build(folder / family, tiny.FAMILIES[family])[0]


def generate(folder, prompts=((1, 2, 3),), family="llada", **options):
    if isinstance(prompts, tuple):
        prompts = [torch.tensor(prompt) for prompt in prompts]
    settings = {"gen_length": 4, "block_length": 4, **options}
    return fastdllm.generate(model_in(folder, family), prompts, **settings)


def load(folder, change=None, config=tiny.LLADA, state_change=None, **options):
    """Loads a good checkpoint after `change` has had its way with the folder."""
    state = oracle_models.random_state(config, 0)
    if state_change:
        state_change(state)
    tiny.write(folder, config, state)
    if change:
        change(folder)
    return fastdllm.load(folder, **{"device": "cpu", **options})


def attend(**changes):
    """block_attention on B 2, T 4, H 6, HK 2, D 64, S 16, with changes."""
    kv, cache = torch.zeros(2, 4, 2, 64), torch.zeros(2, 16, 2, 64)
    call = {
        "q": torch.zeros(2, 4, 6, 64),
        "k": kv,
        "v": kv,
        "k_cache": cache,
        "v_cache": cache,
        "block_start": torch.tensor([4, 8], dtype=torch.int32),
        "kv_len": torch.tensor([16, 12], dtype=torch.int32),
        **changes,
    }
    first = [
        call.pop(name) for name in ("q", "k", "v", "k_cache", "v_cache", "block_start", "kv_len")
    ]
    return block_attention(*first, **call)


def select(logits=None, tokens=None, **changes):
    """confidence_select on B 2, T 4, V 10, with changes."""
    logits = torch.zeros(2, 4, 10) if logits is None else logits
    tokens = torch.full((2, 4), MASK) if tokens is None else tokens
    return confidence_select(logits, tokens, **{"mask_id": MASK, "rule": Threshold(0.9), **changes})


def rotate(**changes):
    """rope_to_cache on B 1, T 2, H 2, HK 2, D 8, S 4, with changes."""
    cache = torch.zeros(1, 4, 2, 8)
    options = {"start": ints(0), "k_cache": cache, "v_cache": cache.clone(), **changes}
    return rope_to_cache(*[torch.zeros(1, 2, 2, 8)] * 3, *[torch.zeros(4, 4)] * 2, **options)


class Backwards(Threshold):
    """A rule of the user's own whose commit nobody would call."""


def edit(name, content):
    """A change to a folder: a file rewritten (text, bytes) or removed (None)."""

    def change(folder):
        path = folder / name
        if content is None:
            path.unlink()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content)

    return change


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def set_key(key, value):
    return edit("config.json", json.dumps({**tiny.LLADA, key: value}))


def all_at_step_1(scores, candidates, step):
    """A rule that commits the first position, and then every position: the first is no candidate
    any more.
    """
    return (torch.arange(candidates.shape[1]) == 0) | (step > 0)[:, None]


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


META = torch.device("meta")

GENERATE = [
    ("no prompts", lambda f: generate(f, []), ValueError, "prompts"),
    (
        "an empty prompt",
        lambda f: generate(f, [torch.tensor([1]), torch.tensor([], dtype=torch.int64)]),
        ValueError,
        "prompt.*1",
    ),
    (
        "a prompt tensor of width 0",
        lambda f: generate(f, torch.zeros(2, 0, dtype=torch.int64)),
        ValueError,
        "prompts",
    ),
    (
        "a prompt tensor of no rows",
        lambda f: generate(f, torch.zeros(0, 3, dtype=torch.int64)),
        ValueError,
        "prompts",
    ),
    (
        "a prompt tensor of one dimension",
        lambda f: generate(f, torch.tensor([1, 2])),
        ValueError,
        "prompts",
    ),
    (
        "a prompt of two dimensions",
        lambda f: generate(f, [torch.tensor([[1, 2]])]),
        ValueError,
        "prompt",
    ),
    ("a text for prompts", lambda f: generate(f, "hello"), TypeError, "prompt"),
    ("a list of texts", lambda f: generate(f, ["hello"]), TypeError, "prompt"),
    ("None for prompts", lambda f: generate(f, None), TypeError, "prompts"),
    ("an int for prompts", lambda f: generate(f, 3), TypeError, "prompts"),
    ("float prompts", lambda f: generate(f, [torch.tensor([1.0, 2.0])]), TypeError, "prompt"),
    ("a float prompt tensor", lambda f: generate(f, torch.ones(1, 3)), TypeError, "prompts"),
    ("bool prompts", lambda f: generate(f, [torch.tensor([True, False])]), TypeError, "prompt"),
    ("floats in a list", lambda f: generate(f, [[1.5, 2.0]]), TypeError, "prompt"),
    ("an id past the vocabulary", lambda f: generate(f, [[1], [40]]), ValueError, r"prompt.*40"),
    ("a negative id", lambda f: generate(f, [[1, -1]]), ValueError, r"prompt.*-1"),
    ("gen_length 0", lambda f: generate(f, gen_length=0), ValueError, "gen_length.*0"),
    ("gen_length negative", lambda f: generate(f, gen_length=-4), ValueError, "gen_length"),
    ("gen_length a float", lambda f: generate(f, gen_length=4.0), TypeError, "gen_length"),
    ("gen_length a bool", lambda f: generate(f, gen_length=True), TypeError, "gen_length"),
    ("block_length 0", lambda f: generate(f, block_length=0), ValueError, "block_length.*0"),
    ("block_length a text", lambda f: generate(f, block_length="4"), TypeError, "block_length"),
    (
        "a canvas past max_positions",
        lambda f: generate(f, gen_length=94),
        ValueError,
        "(?s)gen_length.*96|96.*gen_length",
    ),
    ("an unknown cache", lambda f: generate(f, cache="both"), ValueError, "cache.*dual.*both"),
    ("a cache of None", lambda f: generate(f, cache=None), (ValueError, TypeError), "cache"),
    (
        "a policy of None",
        lambda f: generate(f, policy=None),
        TypeError,
        "policy.*CachePolicy.*None",
    ),
    ("a policy that is a class", lambda f: generate(f, policy=CachePolicy), TypeError, "policy"),
    ("a policy that is a number", lambda f: generate(f, policy=2), TypeError, "policy.*2"),
    (
        "negative prompt_refreshes",
        lambda f: CachePolicy(prompt_refreshes=-1),
        ValueError,
        "prompt_refreshes.*-1",
    ),
    (
        "prompt_refreshes of None",
        lambda f: CachePolicy(prompt_refreshes=None),
        TypeError,
        "prompt_refreshes.*None",
    ),
    (
        "prompt_refreshes a bool",
        lambda f: CachePolicy(prompt_refreshes=True),
        TypeError,
        "prompt_refreshes.*bool",
    ),
    (
        "negative suffix_blocks",
        lambda f: CachePolicy(suffix_blocks=-1),
        ValueError,
        "suffix_blocks.*-1",
    ),
    (
        "suffix_blocks a float",
        lambda f: CachePolicy(suffix_blocks=1.0),
        TypeError,
        "suffix_blocks.*float",
    ),
    (
        "a kept prompt without a cache",
        lambda f: generate(f, cache="none", policy=CachePolicy(prompt_refreshes=0)),
        ValueError,
        "policy.*prompt_refreshes.*none",
    ),
    (
        "an unknown score",
        lambda f: generate(f, score="surprise"),
        ValueError,
        "score.*confidence.*surprise",
    ),
    ("a rule that is a number", lambda f: generate(f, rule=0.9), TypeError, "rule"),
    ("a rule that is a class", lambda f: generate(f, rule=Threshold), TypeError, "rule"),
    ("a rule that is a name", lambda f: generate(f, rule="threshold"), TypeError, "rule"),
    (
        "a rule that is a subclass of ours",
        lambda f: generate(f, rule=Backwards()),
        TypeError,
        "rule",
    ),
    (
        "a temperature too large for a float",
        lambda f: generate(f, temperature=10**400),
        ValueError,
        "temperature",
    ),
    ("a rule of None", lambda f: generate(f, rule=None), TypeError, "rule"),
    (
        "a per-row rule of another length",
        lambda f: generate(f, rule=Threshold(torch.tensor([0.9, 0.8]))),
        ValueError,
        "rule",
    ),
    (
        "a user's rule that returns no mask",
        lambda f: generate(f, rule=lambda s, c, step: None),
        TypeError,
        "rule",
    ),
    (
        "a user's rule that returns floats",
        lambda f: generate(f, rule=lambda s, c, step: s),
        TypeError,
        "rule",
    ),
    (
        "a user's rule of another shape",
        lambda f: generate(f, rule=lambda s, c, step: c[:, :2]),
        (TypeError, ValueError),
        "rule",
    ),
    (
        "a user's rule past the candidates",
        lambda f: generate(f, rule=all_at_step_1),
        ValueError,
        "rule",
    ),
    (
        "a user's rule that commits nothing",
        lambda f: generate(f, rule=lambda s, c, step: c & False),
        ValueError,
        "rule",
    ),
    (
        "a negative temperature",
        lambda f: generate(f, temperature=-0.5, seed=0),
        ValueError,
        "temperature",
    ),
    (
        "a temperature of NaN",
        lambda f: generate(f, temperature=NAN, seed=0),
        ValueError,
        "temperature",
    ),
    (
        "an infinite temperature",
        lambda f: generate(f, temperature=INF, seed=0),
        ValueError,
        "temperature",
    ),
    (
        "a temperature of text",
        lambda f: generate(f, temperature="hot", seed=0),
        TypeError,
        "temperature",
    ),
    ("top_p 0", lambda f: generate(f, top_p=0.0, temperature=1.0, seed=0), ValueError, "top_p"),
    (
        "top_p above 1",
        lambda f: generate(f, top_p=1.5, temperature=1.0, seed=0),
        ValueError,
        "top_p",
    ),
    (
        "top_p of NaN",
        lambda f: generate(f, top_p=NAN, temperature=1.0, seed=0),
        ValueError,
        "top_p",
    ),
    (
        "top_p of text",
        lambda f: generate(f, top_p="0.9", temperature=1.0, seed=0),
        TypeError,
        "top_p",
    ),
    ("top_k 0", lambda f: generate(f, top_k=0, temperature=1.0, seed=0), ValueError, "top_k"),
    (
        "top_k a float",
        lambda f: generate(f, top_k=2.5, temperature=1.0, seed=0),
        TypeError,
        "top_k",
    ),
    ("a seed of text", lambda f: generate(f, seed="seed", temperature=1.0), TypeError, "seed"),
    ("a seed that is a float", lambda f: generate(f, seed=1.5, temperature=1.0), TypeError, "seed"),
    (
        "a stop id past the vocabulary",
        lambda f: generate(f, stop_ids=(40,)),
        ValueError,
        "stop_ids.*40",
    ),
    ("a negative stop id", lambda f: generate(f, stop_ids=[-1]), ValueError, "stop_ids"),
    (
        "a stop id that is the mask",
        lambda f: generate(f, stop_ids=[37]),
        ValueError,
        "stop_ids.*37|stop_ids.*mask",
    ),
    ("stop_ids of text", lambda f: generate(f, stop_ids="eos"), TypeError, "stop_ids"),
    ("stop ids that are floats", lambda f: generate(f, stop_ids=[1.0]), TypeError, "stop_ids"),
    ("on_step that cannot be called", lambda f: generate(f, on_step=[]), TypeError, "on_step"),
    ("graph that is no bool", lambda f: generate(f, graph=1), TypeError, "graph.*bool.*int"),
    ("an option by another name", lambda f: generate(f, threshold=0.9), TypeError, "threshold"),
    (
        "a model that is none",
        lambda f: fastdllm.generate(torch.nn.Linear(2, 2), [[1]]),
        TypeError,
        "model",
    ),
]

LOGITS = [
    (
        "tokens of one dimension",
        lambda f: model_in(f).logits(torch.tensor([1, 2])),
        ValueError,
        "tokens",
    ),
    (
        "float tokens",
        lambda f: model_in(f).logits(torch.ones(1, 2)),
        (TypeError, ValueError),
        "tokens",
    ),
    (
        "no tokens",
        lambda f: model_in(f).logits(torch.zeros(1, 0, dtype=torch.int64)),
        ValueError,
        "tokens",
    ),
    (
        "more tokens than positions",
        lambda f: model_in(f).logits(torch.ones(1, 97, dtype=torch.int64)),
        ValueError,
        "tokens.*96",
    ),
]

LOAD = [
    ("a number for a path", lambda f: fastdllm.load(3), TypeError, "path_or_id"),
    ("None for a path", lambda f: fastdllm.load(None), TypeError, "path_or_id"),
    (
        "a folder that is not there",
        lambda f: fastdllm.load(f / "missing"),
        FileNotFoundError,
        "path_or_id.*missing",
    ),
    (
        "a name that is no hub id",
        lambda f: fastdllm.load("no-such-model"),
        FileNotFoundError,
        "path_or_id.*no-such-model",
    ),
    ("an empty folder", lambda f: fastdllm.load(f), FileNotFoundError, "config.json"),
    (
        "a file",
        lambda f: load(f) and fastdllm.load(f / "config.json"),
        ValueError,
        "path_or_id.*config.json",
    ),
    (
        "no weights",
        lambda f: load(f, edit("model.safetensors", None)),
        FileNotFoundError,
        "model.safetensors",
    ),
    (
        "a config that is no JSON",
        lambda f: load(f, edit("config.json", "{")),
        ValueError,
        "config.json",
    ),
    (
        "a config that is a list",
        lambda f: load(f, edit("config.json", "[]")),
        ValueError,
        "config.json",
    ),
    (
        "a config that is no text",
        lambda f: load(f, edit("config.json", b"\xff\xfe\x00")),
        ValueError,
        "config.json",
    ),
    ("no mask id", lambda f: load(f, set_key("mask_token_id", None)), ValueError, "mask_token_id"),
    (
        "a mask id past the vocabulary",
        lambda f: load(f, set_key("mask_token_id", 40)),
        ValueError,
        "mask_(token_)?id.*40",
    ),
    (
        "a mask id of text",
        lambda f: load(f, set_key("mask_token_id", "37")),
        ValueError,
        "mask_(token_)?id",
    ),
    (
        "an end of text past the vocabulary",
        lambda f: load(f, set_key("eos_token_id", 99)),
        ValueError,
        "stop_ids|eos_token_id",
    ),
    ("no layers", lambda f: load(f, set_key("n_layers", 0)), ValueError, "n_layers|num_layers"),
    (
        "a negative eps",
        lambda f: load(f, set_key("rms_norm_eps", -1.0)),
        ValueError,
        "rms_norm_eps",
    ),
    ("a rope base of 0", lambda f: load(f, set_key("rope_theta", 0)), ValueError, "rope_theta"),
    (
        "heads that do not divide the width",
        lambda f: load(f, set_key("n_heads", 5)),
        ValueError,
        "heads",
    ),
    (
        "kv heads that do not divide the heads",
        lambda f: load(f, set_key("n_kv_heads", 3)),
        ValueError,
        "kv_heads",
    ),
    (
        "a width of text",
        lambda f: load(f, set_key("d_model", "wide")),
        ValueError,
        "d_model|width|hidden_size",
    ),
    (
        "an unknown family",
        lambda f: load(f, set_key("model_type", "gpt2")),
        ValueError,
        "model_type.*gpt2",
    ),
    ("alibi", lambda f: load(f, set_key("alibi", True)), ValueError, "alibi"),
    ("truncated weights", lambda f: load(f, truncate), ValueError, "model.safetensors"),
    (
        "weights that are no weights",
        lambda f: load(f, edit("model.safetensors", b"hello")),
        ValueError,
        "model.safetensors",
    ),
    (
        "NaN in the weights",
        lambda f: load(f, state_change=lambda s: s["model.transformer.ln_f.weight"].fill_(NAN)),
        ValueError,
        "ln_f.*NaN",
    ),
    (
        "a weight missing",
        lambda f: load(f, state_change=lambda s: s.pop("model.transformer.ln_f.weight")),
        ValueError,
        "ln_f",
    ),
    ("dtype int8", lambda f: load(f, dtype=torch.int8), ValueError, "dtype"),
    ("dtype a text", lambda f: load(f, dtype="float16"), (TypeError, ValueError), "dtype"),
    (
        "a device that is none",
        lambda f: load(f, device="abacus"),
        (ValueError, RuntimeError),
        "device",
    ),
    ("unknown weights", lambda f: load(f, weights="int4"), ValueError, "weights.*fp8.*int4"),
    ("weights a dtype", lambda f: load(f, weights=torch.float8_e4m3fn), ValueError, "weights.*fp8"),
    (
        "NaN in weights that are quantised",
        lambda f: load(
            f,
            state_change=lambda s: s["model.transformer.ff_out.weight"][3].fill_(NAN),
            weights="fp8",
        ),
        ValueError,
        "transformer.ff_out.*NaN",
    ),
    (
        "fp8 weights to be saved",
        lambda f: fastdllm.checkpoint.save(load(f, weights="fp8"), f / "copy"),
        ValueError,
        "model.*fp8",
    ),
]

ATTENTION = [
    ("q a list", lambda f: attend(q=[1]), TypeError, "^q:"),
    ("q of three dimensions", lambda f: attend(q=torch.zeros(2, 4, 64)), ValueError, "^q:"),
    (
        "q of integers",
        lambda f: attend(q=torch.zeros(2, 4, 6, 64, dtype=torch.int32)),
        TypeError,
        "^q:",
    ),
    (
        "q of float64",
        lambda f: attend(q=torch.zeros(2, 4, 6, 64, dtype=torch.float64)),
        TypeError,
        "^q:",
    ),
    ("no queries", lambda f: attend(q=torch.zeros(2, 0, 6, 64)), ValueError, "^q:"),
    (
        "k of another dtype than q",
        lambda f: attend(k=torch.zeros(2, 4, 2, 64, dtype=torch.float16)),
        TypeError,
        "^k:",
    ),
    (
        "k on another device",
        lambda f: attend(k=torch.zeros(2, 4, 2, 64, device=META)),
        ValueError,
        "^k:",
    ),
    ("k of another length", lambda f: attend(k=torch.zeros(2, 5, 2, 64)), ValueError, "^k:"),
    ("v of another head count", lambda f: attend(v=torch.zeros(2, 4, 3, 64)), ValueError, "^v:"),
    (
        "k of another head dimension",
        lambda f: attend(k=torch.zeros(2, 4, 2, 32)),
        ValueError,
        "^k:",
    ),
    ("H not a multiple of HK", lambda f: attend(q=torch.zeros(2, 4, 5, 64)), ValueError, "HK"),
    (
        "caches of two shapes",
        lambda f: attend(v_cache=torch.zeros(2, 15, 2, 64)),
        ValueError,
        "^v_cache:",
    ),
    (
        "a cache of another row count",
        lambda f: attend(k_cache=torch.zeros(3, 16, 2, 64), v_cache=torch.zeros(3, 16, 2, 64)),
        ValueError,
        "^k_cache:",
    ),
    (
        "a cache of another dtype",
        lambda f: attend(k_cache=torch.zeros(2, 16, 2, 64, dtype=torch.bfloat16)),
        TypeError,
        "^k_cache:",
    ),
    ("block_start a list", lambda f: attend(block_start=[4, 8]), TypeError, "^block_start:"),
    ("block_start an int", lambda f: attend(block_start=4), TypeError, "^block_start:"),
    (
        "block_start of int64",
        lambda f: attend(block_start=torch.tensor([4, 8])),
        TypeError,
        "^block_start:",
    ),
    (
        "block_start of another length",
        lambda f: attend(block_start=ints(4)),
        ValueError,
        "^block_start:",
    ),
    (
        "block_start elsewhere",
        lambda f: attend(block_start=ints(4, 8).to(META)),
        ValueError,
        "^block_start:",
    ),
    ("no kv_len", lambda f: attend(kv_len=None), TypeError, "^kv_len:"),
    (
        "kv_len of floats",
        lambda f: attend(kv_len=torch.tensor([16.0, 12.0])),
        TypeError,
        "^kv_len:",
    ),
    (
        "kv_start of another length",
        lambda f: attend(kv_start=ints(0, 0, 0)),
        ValueError,
        "^kv_start:",
    ),
    (
        "block_len of int64",
        lambda f: attend(block_len=torch.tensor([4, 4])),
        TypeError,
        "^block_len:",
    ),
    (
        "page_table of one dimension",
        lambda f: attend(page_table=ints(0, 1)),
        ValueError,
        "^page_table:",
    ),
    (
        "page_table of int64",
        lambda f: attend(page_table=torch.zeros(2, 1, dtype=torch.int64)),
        TypeError,
        "^page_table:",
    ),
    (
        "page_table of other rows",
        lambda f: attend(page_table=torch.zeros(3, 1, dtype=torch.int32)),
        ValueError,
        "^page_table:",
    ),
    ("page_table a list", lambda f: attend(page_table=[[0], [1]]), TypeError, "^page_table:"),
    ("cos without sin", lambda f: attend(cos=torch.zeros(16, 32)), ValueError, "cos.*sin"),
    (
        "cos of the whole head dimension",
        lambda f: attend(cos=torch.zeros(16, 64), sin=torch.zeros(16, 64)),
        ValueError,
        "^cos:",
    ),
    (
        "sin of another length",
        lambda f: attend(cos=torch.zeros(16, 32), sin=torch.zeros(15, 32)),
        ValueError,
        "^sin:",
    ),
    (
        "cos of integers",
        lambda f: attend(cos=torch.zeros(16, 32).int(), sin=torch.zeros(16, 32).int()),
        TypeError,
        "^cos:",
    ),
    ("cos a list", lambda f: attend(cos=[1.0], sin=[0.0]), TypeError, "^cos:"),
    ("scale of NaN", lambda f: attend(scale=NAN), ValueError, "^scale:"),
    ("scale too large for a float", lambda f: attend(scale=10**400), ValueError, "^scale:"),
    ("scale of text", lambda f: attend(scale="1"), (TypeError, ValueError), "^scale:"),
    ("out of another shape", lambda f: attend(out=torch.zeros(2, 4, 6, 32)), ValueError, "^out:"),
    (
        "out of another dtype",
        lambda f: attend(out=torch.zeros(2, 4, 6, 64).half()),
        (TypeError, ValueError),
        "^out:",
    ),
    ("out a list", lambda f: attend(out=[]), TypeError, "^out:"),
]

SELECT = [
    ("logits a list", lambda f: select(logits=[0.0]), TypeError, "^logits:"),
    (
        "logits of integers",
        lambda f: select(logits=torch.zeros(2, 4, 10, dtype=torch.int64)),
        TypeError,
        "^logits:",
    ),
    (
        "logits of two dimensions",
        lambda f: select(logits=torch.zeros(4, 10)),
        ValueError,
        "^logits:",
    ),
    (
        "logits without a vocabulary",
        lambda f: select(logits=torch.zeros(2, 4, 0)),
        ValueError,
        "^logits:",
    ),
    (
        "tokens of int32",
        lambda f: select(tokens=torch.full((2, 4), MASK, dtype=torch.int32)),
        TypeError,
        "^tokens:",
    ),
    ("tokens a list", lambda f: select(tokens=[[MASK] * 4] * 2), TypeError, "^tokens:"),
    (
        "tokens of another shape",
        lambda f: select(tokens=torch.full((2, 5), MASK)),
        ValueError,
        "^tokens:",
    ),
    (
        "tokens elsewhere",
        lambda f: select(tokens=torch.full((2, 4), MASK, device=META)),
        ValueError,
        "^tokens:",
    ),
    ("mask_id past the vocabulary", lambda f: select(mask_id=10), ValueError, "^mask_id:.*10"),
    ("mask_id negative", lambda f: select(mask_id=-1), ValueError, "^mask_id:"),
    ("mask_id a float", lambda f: select(mask_id=9.0), TypeError, "^mask_id:"),
    ("mask_id None", lambda f: select(mask_id=None), TypeError, "^mask_id:"),
    (
        "mask_id in the padded tail",
        lambda f: select(vocab_size=9),
        ValueError,
        "mask_id.*vocab_size",
    ),
    ("vocab_size 0", lambda f: select(vocab_size=0), ValueError, "vocab_size"),
    ("vocab_size past the logits", lambda f: select(vocab_size=11), ValueError, "vocab_size.*11"),
    ("vocab_size a float", lambda f: select(vocab_size=10.0), TypeError, "vocab_size"),
    (
        "candidates of integers",
        lambda f: select(candidates=torch.ones(2, 4, dtype=torch.int64)),
        TypeError,
        "^candidates:",
    ),
    ("candidates a list", lambda f: select(candidates=[[True] * 4] * 2), TypeError, "^candidates:"),
    (
        "candidates of another shape",
        lambda f: select(candidates=torch.ones(2, 3, dtype=torch.bool)),
        ValueError,
        "^candidates:",
    ),
    (
        "candidates elsewhere",
        lambda f: select(candidates=torch.ones(2, 4, dtype=torch.bool, device=META)),
        ValueError,
        "^candidates:",
    ),
    ("no rule", lambda f: select(rule=None), TypeError, "^rule:"),
    ("a number for a rule", lambda f: select(rule=0.9), TypeError, "^rule:"),
    (
        "a rule for other rows",
        lambda f: select(rule=Threshold(torch.tensor([0.9]))),
        ValueError,
        "^rule:",
    ),
    ("a rule's class", lambda f: select(rule=Threshold), TypeError, "^rule:.*Threshold"),
    (
        "a function that returns no mask",
        lambda f: select(rule=lambda s, c, step: s),
        TypeError,
        "^rule:.*float32",
    ),
    (
        "a function that commits nothing",
        lambda f: select(rule=lambda s, c, step: c & False),
        ValueError,
        "^rule: row 0 commits nothing",
    ),
    ("an unknown score", lambda f: select(score="best"), ValueError, "^score:.*best"),
    (
        "a negative temperature",
        lambda f: select(temperature=-1.0, seed=0),
        ValueError,
        "^temperature:",
    ),
    (
        "a temperature of NaN",
        lambda f: select(temperature=NAN, seed=0),
        ValueError,
        "^temperature:",
    ),
    (
        "a temperature of None",
        lambda f: select(temperature=None, seed=0),
        TypeError,
        "^temperature:",
    ),
    ("a temperature without a seed", lambda f: select(temperature=1.0), ValueError, "^seed:"),
    ("random scores without a seed", lambda f: select(score="random"), ValueError, "^seed:"),
    ("a seed of text", lambda f: select(temperature=1.0, seed="x"), TypeError, "^seed:"),
    ("a seed past 64 bits", lambda f: select(temperature=1.0, seed=2**70), ValueError, "^seed:"),
    ("seeds of int32", lambda f: select(temperature=1.0, seed=ints(1, 2)), TypeError, "^seed:"),
    (
        "seeds for other rows",
        lambda f: select(temperature=1.0, seed=torch.tensor([1])),
        ValueError,
        "^seed:",
    ),
    (
        "temperatures of float64",
        lambda f: select(temperature=torch.ones(2, dtype=torch.float64), seed=0),
        TypeError,
        "^temperature:.*float64",
    ),
    (
        "temperatures of other rows",
        lambda f: select(temperature=torch.ones(3), seed=0),
        ValueError,
        r"^temperature:.*\(3,\)",
    ),
    (
        "temperatures elsewhere",
        lambda f: select(temperature=torch.ones(2, device=META), seed=0),
        ValueError,
        "^temperature:.*meta",
    ),
    (
        "temperatures with a negative one",
        lambda f: select(temperature=torch.tensor([0.5, -0.5]), seed=0),
        ValueError,
        "^temperature:.*-0.5",
    ),
    (
        "temperatures with a NaN",
        lambda f: select(temperature=torch.tensor([0.5, NAN]), seed=0),
        ValueError,
        "^temperature:.*nan",
    ),
    (
        "infinite temperatures",
        lambda f: select(temperature=torch.tensor([0.5, INF]), seed=0),
        ValueError,
        "^temperature:.*inf",
    ),
    (
        "temperatures without a seed",
        lambda f: select(temperature=torch.zeros(2)),
        ValueError,
        "^seed:",
    ),
    ("top_p 0", lambda f: select(top_p=0.0), ValueError, "^top_p:.*0.0"),
    ("top_p above 1", lambda f: select(top_p=1.5), ValueError, "^top_p:.*1.5"),
    ("top_p of NaN", lambda f: select(top_p=NAN), ValueError, "^top_p:.*nan"),
    ("top_p of text", lambda f: select(top_p="0.9"), TypeError, "^top_p:.*str"),
    ("top_p a bool", lambda f: select(top_p=True), TypeError, "^top_p:.*bool"),
    (
        "top_p of float16",
        lambda f: select(top_p=torch.ones(2).half()),
        TypeError,
        "^top_p:.*float16",
    ),
    ("top_p of other rows", lambda f: select(top_p=torch.ones(1)), ValueError, "^top_p:"),
    (
        "top_p with a 0",
        lambda f: select(top_p=torch.tensor([0.9, 0.0])),
        ValueError,
        "^top_p:.*0.0",
    ),
    (
        "top_p with an entry above 1",
        lambda f: select(top_p=torch.tensor([0.9, 1.5])),
        ValueError,
        "^top_p:.*1.5",
    ),
    ("top_k 0", lambda f: select(top_k=0), ValueError, "^top_k:.*0"),
    ("top_k -1", lambda f: select(top_k=-1), ValueError, "^top_k:.*-1"),
    ("top_k a float", lambda f: select(top_k=2.5), TypeError, "^top_k:.*float"),
    ("top_k a bool", lambda f: select(top_k=True), TypeError, "^top_k:.*bool"),
    (
        "top_k of int64",
        lambda f: select(top_k=torch.ones(2, dtype=torch.int64)),
        TypeError,
        "^top_k:.*int64",
    ),
    ("top_k of other rows", lambda f: select(top_k=ints(1, 2, 3)), ValueError, "^top_k:"),
    ("top_k with a -1", lambda f: select(top_k=ints(5, -1)), ValueError, "^top_k:.*-1"),
    (
        "filtered_score a number",
        lambda f: select(filtered_score=1),
        TypeError,
        "^filtered_score:.*int",
    ),
    ("filtered_score None", lambda f: select(filtered_score=None), TypeError, "^filtered_score:"),
    ("steps of floats", lambda f: select(step=torch.zeros(2)), TypeError, "^step:"),
    (
        "steps for other rows",
        lambda f: select(step=torch.zeros(3, dtype=torch.int64)),
        ValueError,
        "^step:",
    ),
    (
        "a vocabulary of the mask alone",
        lambda f: select(vocab_size=1, mask_id=0),
        ValueError,
        "^vocab_size:",
    ),
    (
        "token_confidence of three dimensions",
        lambda f: token_confidence(torch.zeros(2, 4, 10)),
        ValueError,
        "^logits:",
    ),
    (
        "token_confidence with a temperature for each block",
        lambda f: token_confidence(torch.zeros(4, 10), temperature=torch.ones(2), seed=0),
        ValueError,
        r"^temperature:.*\(2,\)",
    ),
    (
        "token_confidence with a wrong top_p",
        lambda f: token_confidence(torch.zeros(4, 10), top_p=2),
        ValueError,
        "^top_p:.*2",
    ),
    (
        "token_confidence with a wrong top_k",
        lambda f: token_confidence(torch.zeros(4, 10), top_k="5"),
        TypeError,
        "^top_k:.*str",
    ),
    (
        "token_confidence with a wrong filtered_score",
        lambda f: token_confidence(torch.zeros(4, 10), filtered_score="no"),
        TypeError,
        "^filtered_score:.*str",
    ),
    (
        "token_confidence of an unknown score",
        lambda f: token_confidence(torch.zeros(4, 10), score="x"),
        ValueError,
        "^score:",
    ),
]

RULES = [
    ("a threshold of NaN", lambda f: Threshold(NAN), ValueError, "tau"),
    ("a threshold of text", lambda f: Threshold("0.9"), TypeError, "tau"),
    ("a threshold of None", lambda f: Threshold(None), TypeError, "tau"),
    ("a threshold that is a bool", lambda f: Threshold(True), TypeError, "tau"),
    ("a tensor of integer thresholds", lambda f: Threshold(torch.tensor([1, 2])), TypeError, "tau"),
    (
        "a tensor with a NaN threshold",
        lambda f: Threshold(torch.tensor([0.5, NAN])),
        ValueError,
        "tau",
    ),
    ("a factor of 0", lambda f: Factor(0.0), ValueError, r"\bf\b"),
    ("a negative factor", lambda f: Factor(-1.0), ValueError, r"\bf\b"),
    ("a factor of NaN", lambda f: Factor(NAN), ValueError, r"\bf\b"),
    ("a factor of text", lambda f: Factor("1"), TypeError, r"\bf\b"),
    (
        "a tensor with a factor of 0",
        lambda f: Factor(torch.tensor([1.0, 0.0])),
        ValueError,
        r"\bf\b",
    ),
    ("a quota of 0 steps", lambda f: Quota(0), ValueError, "steps.*0"),
    ("a quota of -1 steps", lambda f: Quota(-1), ValueError, "steps"),
    ("a quota of 2.5 steps", lambda f: Quota(2.5), TypeError, "steps"),
    ("a tensor of float steps", lambda f: Quota(torch.tensor([2.0])), TypeError, "steps"),
    ("a tensor with 0 steps", lambda f: Quota(torch.tensor([2, 0])), ValueError, "steps"),
    ("an unknown schedule", lambda f: Quota(4, schedule="cosine"), ValueError, "schedule.*cosine"),
    ("a threshold that vanishes in float32", lambda f: Threshold(1e-60), ValueError, "tau.*1e-60"),
    ("a threshold past float32", lambda f: Threshold(1e39), ValueError, r"tau.*1e\+39"),
    ("a threshold past float64", lambda f: Threshold(10**400), ValueError, "tau.*1000"),
    ("a threshold of -infinity", lambda f: Threshold(-INF), ValueError, "tau.*-inf"),
    (
        "a tensor with a threshold that vanishes",
        lambda f: Threshold(torch.tensor([0.5, 1e-60], dtype=torch.float64)),
        ValueError,
        "tau.*1e-60",
    ),
    ("a factor that vanishes in float32", lambda f: Factor(1e-60), ValueError, r"\bf\b.*1e-60"),
    ("a factor past float32", lambda f: Factor(1e60), ValueError, r"\bf\b.*1e\+60"),
    ("a factor past float64", lambda f: Factor(10**400), ValueError, r"\bf\b.*1000"),
    ("an infinite factor", lambda f: Factor(INF), ValueError, r"\bf\b.*inf"),
    (
        "a tensor with an infinite factor",
        lambda f: Factor(torch.tensor([1.0, INF])),
        ValueError,
        r"\bf\b.*inf",
    ),
    ("a quota of 2^63 steps", lambda f: Quota(2**63), ValueError, "steps.*9223372036854775808"),
    ("a quota past 2^24 steps", lambda f: Quota(2**24 + 1), ValueError, "steps.*16777217"),
    (
        "a tensor of steps past 2^24",
        lambda f: Quota(torch.tensor([1, 2**40])),
        ValueError,
        "steps.*1099511627776",
    ),
    (
        "a tensor of truth values for steps",
        lambda f: Quota(torch.tensor([True])),
        TypeError,
        "steps.*bool",
    ),
]

POINTWISE = [
    (
        "an RMSNorm weight of another width",
        lambda f: rms_norm(torch.zeros(2, 8), torch.ones(7), 1e-5),
        ValueError,
        "weight",
    ),
    (
        "a residual of another shape",
        lambda f: rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-5, torch.zeros(3, 8)),
        ValueError,
        "residual",
    ),
    ("an odd gate and up", lambda f: swiglu(torch.zeros(2, 7)), ValueError, "gate_up"),
    (
        "a rotation of another width",
        lambda f: rope_to_cache(
            *[torch.zeros(1, 2, 2, 8)] * 3, torch.zeros(4, 8), torch.zeros(4, 8), ints(0)
        ),
        ValueError,
        "cos",
    ),
    (
        "a key cache without a value cache",
        lambda f: rope_to_cache(
            *[torch.zeros(1, 2, 2, 8)] * 3,
            torch.zeros(4, 4),
            torch.zeros(4, 4),
            ints(0),
            torch.zeros(1, 4, 2, 8),
        ),
        ValueError,
        "v_cache",
    ),
    (
        "a value cache of fewer slots",
        lambda f: rotate(v_cache=torch.zeros(1, 3, 2, 8)),
        ValueError,
        "^v_cache:",
    ),
    (
        "caches of another dtype",
        lambda f: rotate(k_cache=torch.zeros(1, 4, 2, 8).half()),
        TypeError,
        "^k_cache:",
    ),
    (
        "caches of more rows",
        lambda f: rotate(k_cache=torch.zeros(2, 4, 2, 8)),
        ValueError,
        "^k_cache:",
    ),
    (
        "caches of more heads",
        lambda f: rotate(k_cache=torch.zeros(1, 4, 3, 8)),
        ValueError,
        "^k_cache:",
    ),
    ("starts of other rows", lambda f: rotate(start=ints(0, 1)), ValueError, "^start:"),
    ("starts of floats", lambda f: rotate(start=torch.zeros(1)), TypeError, "^start:"),
    ("lengths of floats", lambda f: rotate(length=torch.zeros(1)), TypeError, "^length:"),
    (
        "a page table of other rows",
        lambda f: rotate(page_table=torch.zeros(2, 1).int()),
        ValueError,
        "^page_table:",
    ),
    (
        "a bias of one number",
        lambda f: linear(torch.zeros(3, 4), torch.zeros(8, 4), torch.zeros(1)),
        ValueError,
        "^bias:",
    ),
]

TABLE = [
    pytest.param(*row[1:], id=f"{group}: {row[0]}")
    for group, rows in (
        ("generate", GENERATE),
        ("logits", LOGITS),
        ("load", LOAD),
        ("block_attention", ATTENTION),
        ("select", SELECT),
        ("rules", RULES),
        ("pointwise", POINTWISE),
    )
    for row in rows
]


def test_the_table_is_as_long_as_promised():
    assert len(TABLE) >= 40


@pytest.mark.parametrize("call, error, pattern", TABLE)
def test_a_wrong_call_raises_the_stated_error(tmp_path, call, error, pattern):
    with pytest.raises(error) as raised:
        call(tmp_path)
    assert re.search(pattern, str(raised.value)), str(raised.value)


@pytest.mark.parametrize("mode", ["none", "prefix", "dual"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_nan_logits_name_the_row_and_the_position(tmp_path, family, mode):
    """The prompt of row 1 alone holds a token whose embedding is broken: row 0 must not be blamed."""
    config = tiny.FAMILIES[family]
    model = model_in(tmp_path, family)
    broken = oracle_models.shape_of(config)["vocab"] - 8
    model.embedding.weight[broken] = NAN
    prompts = [torch.tensor([1, 2]), torch.tensor([1, broken, 2])]
    with pytest.raises((ValueError, FloatingPointError, RuntimeError)) as raised:
        fastdllm.generate(model, prompts, gen_length=4, block_length=2, cache=mode)
    message = str(raised.value)
    assert "NaN" in message
    assert re.search(r"row\D*1\b", message), message
    assert re.search(r"position\D*3\b", message), message
