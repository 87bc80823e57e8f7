"""One table of wrong calls: each raises the stated error, whose message names the argument."""

import json
import re
from dataclasses import dataclass

import numpy
import oracle_models
import pytest
import tiny
import torch

import fastdllm
from fastdllm import (
    CachePolicy,
    EntropyBound,
    Factor,
    Frechet,
    Neighbours,
    ProgressThreshold,
    Quota,
    Stability,
    Threshold,
)
from fastdllm import options as written
from fastdllm import text as texts
from fastdllm.integrations.lm_eval_options import read_options
from fastdllm_kernels import (
    Fp8Weight,
    Partials,
    block_attention,
    commit_proposals,
    confidence_select,
    linear,
    linear_rms_norm,
    linear_swiglu,
    merge_confidence_partials,
    new_memory,
    per_row,
    quantize_weight,
    rms_norm,
    rope_to_cache,
    swiglu,
    token_confidence,
    token_confidence_partials,
)

NAN, INF = float("nan"), float("inf")
MASK = 9
FILTERED = {"temperature": 1.0, "top_p": 0.9, "seed": 0}


def model_in(folder, family="llada"):
    return tiny.build(folder / family, tiny.FAMILIES[family])[0]


def generate(folder, prompts=((1, 2, 3),), family="llada", **options):
    if isinstance(prompts, tuple):
        prompts = [torch.tensor(prompt) for prompt in prompts]
    settings = {"gen_length": 4, "block_length": 4, **options}
    return fastdllm.generate(model_in(folder, family), prompts, **settings)


def wait(folder, timeout):
    """An engine's answer, waited for so long."""
    with fastdllm.Engine(model_in(folder), rows=1, positions=16, block_length=4) as engine:
        return engine.submit([1], gen_length=2).result(timeout)


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


def caches(pages, slots):
    """The caches of `attend` as `pages` of so many slots."""
    return {name: torch.zeros(pages, slots, 2, 64) for name in ("k_cache", "v_cache")}


def select(logits=None, tokens=None, **changes):
    """confidence_select on B 2, T 4, V 10, with changes."""
    logits = torch.zeros(2, 4, 10) if logits is None else logits
    tokens = torch.full((2, 4), MASK) if tokens is None else tokens
    return confidence_select(logits, tokens, **{"mask_id": MASK, "rule": Threshold(0.9), **changes})


def part(rows=3, **options):
    """Partials of so many rows, V 4."""
    return token_confidence_partials(torch.zeros(rows, 4), **options)


def changed_part(**fields):
    """Partials of 3 rows with other fields."""
    return part()._replace(**fields)


def propose(**changes):
    """commit_proposals on B 2, T 4, with changes."""
    call = {
        "commit": Threshold(0.5).commit,
        "token_ids": torch.ones(8, dtype=torch.int64),
        "score": torch.ones(8),
        "tokens": torch.full((2, 4), MASK),
        "candidates": torch.ones(2, 4, dtype=torch.bool),
        "step": torch.zeros(2, dtype=torch.int64),
    }
    return commit_proposals(**{**call, **changes})


def merge(partials, **options):
    return merge_confidence_partials(partials, **options)


def rotate(**changes):
    """rope_to_cache on B 1, T 2, H 2, HK 2, D 8, S 4, with changes."""
    cache = torch.zeros(1, 4, 2, 8)
    call = {name: torch.zeros(1, 2, 2, 8) for name in "qkv"}
    call |= {"cos": torch.zeros(4, 4), "sin": torch.zeros(4, 4), "start": ints(0)}
    return rope_to_cache(**{**call, "k_cache": cache, "v_cache": cache.clone(), **changes})


def normalise(**changes):
    """rms_norm on [2, 8], with changes."""
    return rms_norm(**{"x": torch.zeros(2, 8), "weight": torch.ones(8), "eps": 1e-5, **changes})


def product(op=linear, **changes):
    """A product of [3, 4] by [8, 4], with changes."""
    return op(**{"x": torch.zeros(3, 4), "weight": torch.zeros(8, 4), **changes})


def product_norm(**changes):
    """linear_rms_norm of [3, 4] by [8, 4], with changes."""
    more = {"residual": torch.zeros(3, 8), "norm_weight": torch.ones(8), "eps": 1e-5}
    return product(linear_rms_norm, **{**more, **changes})


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


@dataclass(frozen=True)
class Above:
    """A rule without a kernel."""

    tau: torch.Tensor = per_row(0.5)

    def commit(self, scores, candidates, step):
        return candidates


def spoiled(model, value):
    """The model with one number of its last norm set."""
    model.norm.weight[0] = value
    return model


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


META = torch.device("meta")
DENSE = "expected a dense tensor, got a torch.sparse_coo one"

GENERATE = [
    ("no prompts", lambda f: generate(f, []), ValueError, "prompts"),
    (
        "a tokenizer's output without ids",
        lambda f: generate(f, {"attention_mask": [[1]]}),
        TypeError,
        "prompts.*input_ids",
    ),
    (
        "a mask of another length",
        lambda f: generate(f, torch.ones(2, 3, dtype=torch.int64), attention_mask=[[1, 1, 1]]),
        ValueError,
        "attention_mask.*2 prompts",
    ),
    (
        "a mask row of another length",
        lambda f: generate(f, [[1, 2, 3]], attention_mask=[[1, 1]]),
        ValueError,
        r"attention_mask\[0\].*3 entries",
    ),
    (
        "padding inside a text",
        lambda f: generate(f, [[1, 2, 3]], attention_mask=[[1, 0, 1]]),
        ValueError,
        r"attention_mask\[0\].*either side",
    ),
    (
        "a row of padding alone",
        lambda f: generate(f, [[1, 2], [1, 2]], attention_mask=[[1, 1], [0, 0]]),
        ValueError,
        r"attention_mask\[1\].*at least one",
    ),
    (
        "a mask of other numbers",
        lambda f: generate(f, [[1, 2]], attention_mask=[[1, 2]]),
        ValueError,
        r"attention_mask\[0\].*0 at padding",
    ),
    ("a mask that is a number", lambda f: generate(f, attention_mask=1), ValueError, "attention"),
    (
        "a mask of no dimension",
        lambda f: generate(f, attention_mask=torch.tensor(1)),
        ValueError,
        "^attention_mask: expected one row",
    ),
    (
        "a mask of text",
        lambda f: generate(f, attention_mask="1"),
        ValueError,
        "^attention_mask: expected one row.*got 1",
    ),
    (
        "a mask row of text",
        lambda f: generate(f, attention_mask=["111"]),
        TypeError,
        r"^attention_mask\[0\]: expected a sequence of 0 and 1, got str",
    ),
    (
        "a mask row past 64 bits",
        lambda f: generate(f, attention_mask=[[1, 1, 2**70]]),
        TypeError,
        r"^attention_mask\[0\]",
    ),
    (
        "a mask row on meta",
        lambda f: generate(f, attention_mask=[torch.ones(3, device=META)]),
        TypeError,
        r"^attention_mask\[0\]: expected a sequence.*Tensor",
    ),
    (
        "a nested tensor of prompts",
        lambda f: generate(f, torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
        TypeError,
        "^prompts: expected a list",
    ),
    (
        "a prompt on meta",
        lambda f: generate(f, [torch.ones(3, dtype=torch.int64, device=META)]),
        TypeError,
        r"^prompts\[0\]",
    ),
    ("an id past 64 bits", lambda f: generate(f, [[1, 2**70]]), ValueError, r"prompts\[0\]"),
    (
        "a sparse prompt",
        lambda f: generate(f, [torch.ones(3, dtype=torch.int64).to_sparse()]),
        TypeError,
        r"prompts\[0\].*dense",
    ),
    (
        "a model in float64",
        lambda f: fastdllm.generate(model_in(f, "llada").double(), [[1]]),
        ValueError,
        "model.*float64",
    ),
    (
        "a model without weights",
        lambda f: fastdllm.generate(model_in(f, "llada").to("meta"), [[1]]),
        ValueError,
        "model.*meta",
    ),
    (
        "an unknown option of infill",
        lambda f: fastdllm.infill(model_in(f, "llada"), [[1]], gen_length=3),
        TypeError,
        "gen_length",
    ),
    ("a sequence of none", lambda f: fastdllm.infill(model_in(f, "llada"), []), ValueError, "seq"),
    (
        "an id outside the vocabulary in a sequence",
        lambda f: fastdllm.infill(model_in(f, "llada"), [[1], [99]]),
        ValueError,
        r"sequences\[1\]",
    ),
    (
        "no rows to warm up",
        lambda f: fastdllm.warm_up(model_in(f, "llada"), rows=0),
        ValueError,
        "rows",
    ),
    (
        "more positions to warm up than the model has",
        lambda f: fastdllm.warm_up(model_in(f, "llada"), positions=10**6),
        ValueError,
        "positions",
    ),
    (
        "a block longer than what is warmed up",
        lambda f: fastdllm.warm_up(model_in(f, "llada"), positions=32, block_length=32),
        ValueError,
        "positions",
    ),
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
        "keep_finished a number",
        lambda f: CachePolicy(0, keep_finished=1),
        TypeError,
        "CachePolicy.keep_finished: expected a bool, got int",
    ),
    (
        "keep_finished where every refresh computes all",
        lambda f: CachePolicy(keep_finished=True),
        ValueError,
        "CachePolicy.keep_finished: expected prompt_refreshes other than 1",
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
        "a user's rule that commits nothing of filtered proposals",
        lambda f: generate(f, rule=lambda s, c, step: c & False, **FILTERED),
        ValueError,
        "^rule: row 0 commits nothing",
    ),
    (
        "a user's rule past the candidates of filtered proposals",
        lambda f: generate(f, rule=all_at_step_1, **FILTERED),
        ValueError,
        "^rule: row 0 commits position 0",
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
    ("top_k -2", lambda f: generate(f, top_k=-2, temperature=1.0, seed=0), ValueError, "top_k"),
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
    (
        "a stop id of no dimension",
        lambda f: generate(f, stop_ids=torch.tensor(3)),
        TypeError,
        "^stop_ids: expected None or a sequence.*Tensor",
    ),
    (
        "progress that cannot be called",
        lambda f: fastdllm.warm_up(model_in(f), positions=40, progress=3),
        TypeError,
        "^progress: expected a function or None, got int",
    ),
    (
        "rows to warm up past 64 bits",
        lambda f: fastdllm.warm_up(model_in(f), positions=40, rows=2**70),
        ValueError,
        "^rows:",
    ),
    (
        "a block to warm up past 64 bits",
        lambda f: fastdllm.warm_up(model_in(f), positions=40, block_length=2**70),
        ValueError,
        "^positions: expected more than the block_length",
    ),
    ("a wait of text", lambda f: wait(f, "1"), TypeError, "^timeout: expected a number, got str"),
    ("a wait of NaN", lambda f: wait(f, NAN), ValueError, "^timeout:"),
    ("a wait without an end", lambda f: wait(f, INF), ValueError, "^timeout: .*inf"),
    ("a wait past every clock", lambda f: wait(f, 10**400), ValueError, "^timeout:"),
    ("restoring what is no model", lambda f: fastdllm.restore_attention(3), TypeError, "^model:"),
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
    (
        "an id past the vocabulary",
        lambda f: model_in(f).logits(torch.tensor([[1, 40]])),
        ValueError,
        r"tokens.*\[0, 40\).*40",
    ),
    (
        "a negative id",
        lambda f: model_in(f).logits(torch.tensor([[1, -1]])),
        ValueError,
        "tokens.*-1",
    ),
    ("a list of ids", lambda f: model_in(f).logits([[1, 2]]), TypeError, "tokens.*list"),
    (
        "sparse ids",
        lambda f: model_in(f).logits(torch.ones(1, 2, dtype=torch.int64).to_sparse()),
        TypeError,
        "^tokens: expected a dense tensor.*sparse",
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
    ("dtype a text", lambda f: load(f, dtype="float17"), ValueError, "dtype.*float16.*float17"),
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
    ("dtype float64", lambda f: load(f, dtype=torch.float64), ValueError, "dtype.*auto.*float64"),
    ("dtype a number", lambda f: load(f, dtype=16), ValueError, "dtype.*bf16.*16"),
    ("a negative device", lambda f: load(f, device=-1), ValueError, "^device.*-1"),
    ("a device with a fraction", lambda f: load(f, device=0.5), TypeError, "^device.*0.5"),
    ("a device that is a bool", lambda f: load(f, device=True), TypeError, "^device.*True"),
    ("a device that holds nothing", lambda f: load(f, device="meta"), ValueError, "^device.*meta"),
    (
        "an end of text that is the mask",
        lambda f: load(f, set_key("eos_token_id", 37)),
        ValueError,
        "config.json.*stop_ids.*37",
    ),
    (
        "more layers than tensors",
        lambda f: load(f, set_key("n_layers", 10**9)),
        ValueError,
        "n_layers=1000000000.*tensors",
    ),
    (
        "an infinite rope base",
        lambda f: load(f, set_key("rope_theta", INF)),
        ValueError,
        "rope_theta.*inf",
    ),
    (
        "a flag that is a text",
        lambda f: load(f, set_key("weight_tying", "false")),
        ValueError,
        "tie_embeddings.*'false'",
    ),
    (
        "scaled rope by its newer name",
        lambda f: load(f, set_key("rope_parameters", {"rope_type": "yarn", "factor": 4.0})),
        ValueError,
        "rope_parameters.*rope_type='yarn'",
    ),
    (
        "two bases of rope",
        lambda f: load(f, set_key("rope_parameters", {"rope_theta": 3.0})),
        ValueError,
        "rope_theta=500000.*rope_theta=3.0",
    ),
    (
        "weights outside the folder",
        lambda f: load(f, set_key("fastdllm_weights", "../model.safetensors")),
        ValueError,
        "config.json.*inside the folder.*'../model.safetensors'",
    ),
    (
        "an index that leaves the folder",
        lambda f: load(f, edit("model.safetensors.index.json", '{"weight_map": {"a": "/a"}}')),
        ValueError,
        "index.json.*inside the folder.*'/a'",
    ),
    (
        "an index of other keys",
        lambda f: load(
            f,
            edit("model.safetensors.index.json", '{"weight_map": {"a": "model.safetensors"}}'),
        ),
        ValueError,
        "index.json.*a is not in model.safetensors.*is not in the index",
    ),
    (
        "a key of the config twice",
        lambda f: load(f, edit("config.json", '{"d_model": 1, "d_model": 2}')),
        ValueError,
        "config.json.*'d_model' comes twice",
    ),
    (
        "NaN in weights to be saved",
        lambda f: fastdllm.checkpoint.save(spoiled(load(f), NAN), f / "copy"),
        ValueError,
        "model.*norm.weight.*NaN",
    ),
    (
        "float64 to be saved",
        lambda f: fastdllm.checkpoint.save(load(f).double(), f / "copy"),
        ValueError,
        "model.*float64",
    ),
    (
        "a number for the folder to save in",
        lambda f: fastdllm.checkpoint.save(load(f), 3),
        TypeError,
        "folder.*int",
    ),
    (
        "another module to be saved",
        lambda f: fastdllm.checkpoint.save(torch.nn.Linear(2, 2), f / "copy"),
        TypeError,
        "model.*Linear",
    ),
]

ATTENTION = [
    ("q a list", lambda f: attend(q=[1]), TypeError, "^q: expected a tensor, got list$"),
    (
        "q of numpy",
        lambda f: attend(q=numpy.zeros((2, 4, 6, 64), numpy.float32)),
        TypeError,
        "^q: expected a tensor, got ndarray$",
    ),
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
    ("sparse queries", lambda f: attend(q=torch.zeros(2, 4, 6, 64).to_sparse()), TypeError, DENSE),
    ("sparse starts", lambda f: attend(block_start=ints(4, 8).to_sparse()), TypeError, DENSE),
    (
        "return_lse a text",
        lambda f: attend(return_lse="no"),
        TypeError,
        "^return_lse: expected a bool, got str",
    ),
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
    (
        "out whose heads are one",
        lambda f: attend(out=torch.zeros(2, 4, 1, 64).expand(2, 4, 6, 64)),
        ValueError,
        r"^out: .*lie apart.*\(2, 4, 6, 64\) with strides \(256, 64, 0, 1\)",
    ),
    (
        "out whose rows overlap",
        lambda f: attend(out=torch.zeros(4000).as_strided((2, 4, 6, 64), (1, 384, 64, 1))),
        ValueError,
        "^out: .*lie apart",
    ),
    (
        "out whose heads overlap by one number",
        lambda f: attend(out=torch.zeros(4000).as_strided((2, 4, 6, 64), (1536, 384, 63, 1))),
        ValueError,
        "^out: .*lie apart",
    ),
    (
        "out that a gradient is wanted of",
        lambda f: attend(out=torch.zeros(2, 4, 6, 64, requires_grad=True)),
        ValueError,
        "^out: .*leaf with a gradient",
    ),
    (
        "tables of no position",
        lambda f: attend(cos=torch.zeros(0, 32), sin=torch.zeros(0, 32)),
        ValueError,
        r"^cos: expected a position or more, got \(0, 32\)",
    ),
    (
        "page_table without a column",
        lambda f: attend(page_table=torch.zeros(2, 0, dtype=torch.int32)),
        ValueError,
        r"^page_table: .*a page or more.*\(2, 0\)",
    ),
    (
        "a cache of no page",
        lambda f: attend(page_table=torch.zeros(2, 1).int(), **caches(0, 16)),
        ValueError,
        r"^k_cache: .*a page of a slot or more, got \(0, 16",
    ),
    (
        "pages of no slot",
        lambda f: attend(page_table=torch.zeros(2, 1).int(), **caches(3, 0)),
        ValueError,
        r"^k_cache: .*a page of a slot or more, got \(3, 0",
    ),
]

SELECT = [
    ("logits a list", lambda f: select(logits=[0.0]), TypeError, "^logits:"),
    (
        "logits of numpy",
        lambda f: select(logits=numpy.zeros((2, 4, 10), numpy.float32)),
        TypeError,
        "^logits: expected a tensor, got ndarray$",
    ),
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
    ("sparse logits", lambda f: select(logits=torch.zeros(2, 4, 10).to_sparse()), TypeError, DENSE),
    (
        "nested logits",
        lambda f: select(logits=torch.nested.nested_tensor([torch.zeros(4, 10)] * 2)),
        TypeError,
        "^logits: expected a dense tensor, got a nested one",
    ),
    (
        "token_confidence's flag a number",
        lambda f: token_confidence(torch.zeros(4, 10), return_entropy=1),
        TypeError,
        "^return_entropy: expected a bool, got int",
    ),
    (
        "token_confidence's flag a text",
        lambda f: token_confidence(torch.zeros(4, 10), return_logsumexp="no"),
        TypeError,
        "^return_logsumexp: .*str",
    ),
    (
        "a part that begins past 32 bits",
        lambda f: part(vocab_start=2**70),
        ValueError,
        "^vocab_start: .*1180591620717411303424",
    ),
    ("a part's mask past 32 bits", lambda f: part(mask_id=2**70), ValueError, "^mask_id:"),
    ("a part's mask negative", lambda f: part(mask_id=-1), ValueError, "^mask_id:.*-1"),
    (
        "tokens whose rows are one",
        lambda f: select(tokens=torch.full((1, 4), MASK).expand(2, 4)),
        ValueError,
        r"^tokens: .*lie apart.*\(2, 4\) with strides \(0, 1\)",
    ),
    (
        "tokens whose rows overlap",
        lambda f: select(tokens=torch.full((8,), MASK).unfold(0, 4, 2)[:2]),
        ValueError,
        "^tokens: .*lie apart",
    ),
    (
        "tokens that overlap, and a rule without a kernel",
        lambda f: select(
            tokens=torch.full((2, 1), MASK).expand(2, 4), rule=lambda scores, c, step: c
        ),
        ValueError,
        "^tokens: .*lie apart",
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
        "token_confidence of the mask alone",
        lambda f: token_confidence(torch.zeros(4, 1), mask_id=0),
        ValueError,
        "^vocab_size: .*>= 2, got 1",
    ),
    (
        "token_confidence of the mask and padding",
        lambda f: token_confidence(torch.zeros(4, 10), mask_id=0, vocab_size=1),
        ValueError,
        "^vocab_size: .*>= 2, got 1",
    ),
    (
        "a part of the mask alone",
        lambda f: part(vocab_start=6, mask_id=6, vocab_size=1),
        ValueError,
        "^vocab_size: .*>= 2, got 1",
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

MERGE = [
    ("partials that are none", lambda f: merge(None), TypeError, "^partials: .*NoneType"),
    ("no partials", lambda f: merge([]), ValueError, "^partials: .*at least one"),
    ("one Partials", lambda f: merge(part()), TypeError, "^partials: .*list of Partials.*Partials"),
    (
        "partials by a generator",
        lambda f: merge(part() for _ in range(2)),
        TypeError,
        "^partials: .*generator",
    ),
    (
        "a plain tuple among partials",
        lambda f: merge([part(), tuple(part())]),
        TypeError,
        r"^partials\[1\]: expected Partials, got tuple",
    ),
    (
        "a list among partials",
        lambda f: merge([changed_part(maximum=[0.0] * 3)]),
        TypeError,
        r"^partials\[0\].maximum: expected a tensor, got list",
    ),
    (
        "partials of half precision",
        lambda f: merge([part(), changed_part(total=torch.ones(3).half())]),
        TypeError,
        r"^partials\[1\].total: .*float32.*float16",
    ),
    (
        "partials whose ids are int32",
        lambda f: merge([changed_part(token_ids=ints(1, 2, 3))]),
        TypeError,
        r"^partials\[0\].token_ids: .*int64.*int32",
    ),
    (
        "partials whose NaNs are numbers",
        lambda f: merge([changed_part(has_nan=torch.zeros(3))]),
        TypeError,
        r"^partials\[0\].has_nan: .*bool.*float32",
    ),
    (
        "partials of other rows",
        lambda f: merge([part(), part(4)]),
        ValueError,
        r"^partials\[1\].maximum: expected \(3,\) on cpu.*\(4,\)",
    ),
    (
        "a field of one row",
        lambda f: merge([part(), changed_part(logit=torch.zeros(1))]),
        ValueError,
        r"^partials\[1\].logit: .*\(1,\)",
    ),
    (
        "partials of two dimensions",
        lambda f: merge([Partials(*(field[None] for field in part()))]),
        ValueError,
        r"^partials\[0\].maximum: expected \[N\], got \(1, 3\)",
    ),
    (
        "partials elsewhere",
        lambda f: merge([part(), Partials(*(field.to(META) for field in part()))]),
        ValueError,
        r"^partials\[1\].maximum: expected .* on cpu.*meta",
    ),
    (
        "merging with a flag of None",
        lambda f: merge([part()], return_margin=None),
        TypeError,
        "^return_margin: .*NoneType",
    ),
    ("merging by an unknown score", lambda f: merge([part()], score="x"), ValueError, "^score:"),
    ("merging at random", lambda f: merge([part()], score="random"), ValueError, "^seed:"),
    (
        "merging with seeds of other rows",
        lambda f: merge([part()], score="random", seed=torch.zeros(2).long()),
        ValueError,
        "^seed:",
    ),
    (
        "merging at positions of int32",
        lambda f: merge([part()], score="random", seed=1, position=ints(0, 1, 2)),
        TypeError,
        "^position:",
    ),
]

COMMIT = [
    ("a rule for its commit", lambda f: propose(commit=Threshold(0.5)), TypeError, "^commit:.*Thr"),
    (
        "proposals of int32",
        lambda f: propose(token_ids=torch.ones(8).int()),
        TypeError,
        "^token_ids:.*int64.*int32",
    ),
    ("fewer proposals", lambda f: propose(token_ids=torch.ones(4).long()), ValueError, "^token_id"),
    ("scores of integers", lambda f: propose(score=torch.ones(8).long()), TypeError, "^score:"),
    ("scores in float64", lambda f: propose(score=torch.ones(8).double()), TypeError, "^score:"),
    ("more scores", lambda f: propose(score=torch.ones(2, 8)), ValueError, r"^score:.*\(2, 8\)"),
    ("scores elsewhere", lambda f: propose(score=torch.ones(8, device=META)), ValueError, "^score"),
    (
        "tokens of floats to commit into",
        lambda f: propose(tokens=torch.full((2, 4), 9.0)),
        TypeError,
        "^tokens:.*float32",
    ),
    ("a row of tokens", lambda f: propose(tokens=torch.full((8,), MASK)), ValueError, "^tokens:"),
    (
        "tokens that overlap to commit into",
        lambda f: propose(tokens=torch.full((2, 1), MASK).expand(2, 4)),
        ValueError,
        "^tokens:.*lie apart",
    ),
    ("candidates of integers", lambda f: propose(candidates=ints(1)), TypeError, "^candidates:"),
    (
        "one candidate for all",
        lambda f: propose(candidates=torch.tensor(True)),
        ValueError,
        r"^candidates:.*\(2, 4\).*\(\)",
    ),
    ("no step", lambda f: propose(step=None), TypeError, "^step:.*NoneType"),
    ("a step of floats", lambda f: propose(step=torch.zeros(2)), TypeError, "^step:"),
    ("a step of one row", lambda f: propose(step=ints(0)), ValueError, "^step:"),
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
    (
        "thresholds on meta",
        lambda f: Threshold(torch.empty(3, device=META)),
        ValueError,
        "^Threshold.tau: expected a tensor that holds numbers, got one on meta",
    ),
    (
        "steps on meta",
        lambda f: Quota(torch.empty(3, dtype=torch.int64, device=META)),
        ValueError,
        "^Quota.steps: .*meta",
    ),
    (
        "a rule of the caller's own with a field on meta",
        lambda f: generate(f, rule=Above(torch.empty(1, device=META))),
        ValueError,
        "^rule: Above.tau: .*meta",
    ),
    (
        "the same, of confidence_select",
        lambda f: select(rule=Above(torch.empty(2, device=META))),
        ValueError,
        "^rule: Above.tau: .*meta",
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
    ("a delta below 0", lambda f: Frechet(-0.1), ValueError, r"delta: .*\[0, 1\].*got -0.1"),
    ("a delta above 1", lambda f: Frechet(1.5), ValueError, "delta.*got 1.5"),
    ("a delta of NaN", lambda f: Frechet(NAN), ValueError, "delta.*nan"),
    ("a delta of text", lambda f: Frechet("0.2"), TypeError, "delta.*str"),
    ("a delta that vanishes", lambda f: Frechet(1e-60), ValueError, "delta.*1e-60"),
    (
        "a tensor with a delta above 1",
        lambda f: Frechet(torch.tensor([0.2, 1.5])),
        ValueError,
        "delta.*got 1.5",
    ),
    ("a gamma below 0", lambda f: EntropyBound(-0.1), ValueError, "gamma: .*>= 0.*got -0.1"),
    ("an infinite gamma", lambda f: EntropyBound(INF), ValueError, "gamma.*got inf"),
    ("a gamma of None", lambda f: EntropyBound(None), TypeError, "gamma.*NoneType"),
    ("a tensor of whole gammas", lambda f: EntropyBound(ints(1)), TypeError, "gamma.*int32"),
    (
        "an entropy bound of confidences",
        lambda f: generate(f, rule=EntropyBound(), score="confidence"),
        ValueError,
        "^score: expected 'entropy', the one that EntropyBound reads, got 'confidence'",
    ),
    (
        "the same, of confidence_select",
        lambda f: select(rule=EntropyBound()),
        ValueError,
        "^score: expected 'entropy'.*got 'confidence'",
    ),
    ("a tau below 0", lambda f: ProgressThreshold(-0.5), ValueError, "tau.*>= 0.*got -0.5"),
    ("an infinite tau", lambda f: ProgressThreshold(INF), ValueError, "tau.*got inf"),
    ("an alpha above 1", lambda f: ProgressThreshold(0.9, 1.1), ValueError, "alpha.*got 1.1"),
    ("an alpha of a bool", lambda f: ProgressThreshold(0.9, True), TypeError, "alpha.*bool"),
    ("an anchor of NaN", lambda f: Neighbours(NAN), ValueError, "anchor.*nan"),
    ("a near of -infinity", lambda f: Neighbours(0.9, -INF), ValueError, "near.*-inf"),
    ("a distance below 0", lambda f: Neighbours(distance=-1), ValueError, "distance.*got -1"),
    ("a distance of 1.5", lambda f: Neighbours(distance=1.5), TypeError, "distance.*float"),
    (
        "a distance past 2^24",
        lambda f: Neighbours(distance=2**24 + 1),
        ValueError,
        "distance.*16777217",
    ),
    ("a stability of NaN", lambda f: Stability(NAN), ValueError, "Stability.tau.*nan"),
    ("a stability of 0 steps", lambda f: Stability(0.7, 0), ValueError, "steps.*got 0"),
    (
        "a rule without its memory",
        lambda f: select(rule=Stability()),
        ValueError,
        "^memory: expected what Stability keeps, token_ids, run, got nothing",
    ),
    (
        "a memory of a rule that has none",
        lambda f: select(memory={"run": ints(1)}),
        ValueError,
        "^memory: expected what Threshold keeps, nothing, got run",
    ),
    (
        "a memory that is a tensor",
        lambda f: select(rule=Stability(), memory=ints(1)),
        TypeError,
        "^memory: expected tensors by name, got Tensor",
    ),
    (
        "a memory of one row",
        lambda f: select(
            rule=Stability(), memory=new_memory(Stability(), 1, 4, torch.device("cpu"))
        ),
        ValueError,
        r"^memory\['token_ids'\]: expected shape",
    ),
    (
        "distances for other rows",
        lambda f: generate(f, rule=Neighbours(distance=ints(1, 2, 3))),
        ValueError,
        "^rule: expected Neighbours.distance with one entry",
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
    (
        "a key cache whose slots are one",
        lambda f: rotate(k_cache=torch.zeros(1, 1, 2, 8).expand(1, 4, 2, 8)),
        ValueError,
        "^k_cache: .*lie apart",
    ),
    (
        "a value cache whose heads are one",
        lambda f: rotate(v_cache=torch.zeros(1, 4, 1, 8).expand(1, 4, 2, 8)),
        ValueError,
        "^v_cache: .*lie apart",
    ),
    (
        "one tensor for both caches",
        lambda f: rotate(**dict.fromkeys(("k_cache", "v_cache"), torch.zeros(1, 4, 2, 8))),
        ValueError,
        "^v_cache: .*of its own",
    ),
    (
        "pages that overlap",
        lambda f: rotate(
            k_cache=torch.zeros(160).as_strided((3, 4, 2, 8), (16, 16, 8, 1)),
            v_cache=torch.zeros(3, 4, 2, 8),
            page_table=torch.zeros(1, 1).int(),
        ),
        ValueError,
        "^k_cache: .*lie apart",
    ),
    (
        "a key cache that a gradient is wanted of",
        lambda f: rotate(k_cache=torch.zeros(1, 4, 2, 8, requires_grad=True)),
        ValueError,
        "^k_cache: .*leaf with a gradient",
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
    (
        "an RMSNorm of integers",
        lambda f: normalise(x=torch.ones(2, 8, dtype=torch.int64)),
        TypeError,
        "^x: expected .*float16.*int64",
    ),
    ("an RMSNorm of a list", lambda f: normalise(x=[1.0]), TypeError, "^x:.*list"),
    (
        "an RMSNorm of a number",
        lambda f: normalise(x=torch.tensor(1.0), weight=torch.tensor(1.0)),
        ValueError,
        r"^x: expected \[\.\.\., C\]",
    ),
    (
        "an RMSNorm weight of integers",
        lambda f: normalise(weight=torch.ones(8, dtype=torch.int32)),
        TypeError,
        "^weight:.*int32",
    ),
    (
        "an RMSNorm weight elsewhere",
        lambda f: normalise(weight=torch.ones(8, device=META)),
        ValueError,
        "^weight:.*cpu.*meta",
    ),
    (
        "a residual of booleans",
        lambda f: normalise(residual=torch.ones(2, 8, dtype=torch.bool)),
        TypeError,
        "^residual:.*bool",
    ),
    (
        "an RMSNorm weight of numpy",
        lambda f: normalise(weight=numpy.ones(8, numpy.float32)),
        TypeError,
        "^weight: expected a tensor, got ndarray$",
    ),
    ("eps of 0", lambda f: normalise(eps=0.0), ValueError, "^eps:.*above 0.*0.0"),
    ("eps negative", lambda f: normalise(eps=-1e-5), ValueError, "^eps:"),
    ("eps of NaN", lambda f: normalise(eps=NAN), ValueError, "^eps:"),
    ("eps infinite", lambda f: normalise(eps=INF), ValueError, "^eps:"),
    ("eps of text", lambda f: normalise(eps="1e-5"), TypeError, "^eps:.*str"),
    (
        "a sparse weight",
        lambda f: product(weight=torch.zeros(8, 4).to_sparse()),
        TypeError,
        f"^weight: {DENSE}",
    ),
    (
        "a weight without a column to quantise",
        lambda f: quantize_weight(torch.zeros(8, 0)),
        ValueError,
        r"^weight: .*an input or more, got \(8, 0\)",
    ),
    ("eps of None", lambda f: normalise(eps=None), TypeError, "^eps:"),
    (
        "gate and up of integers",
        lambda f: swiglu(torch.ones(2, 8, dtype=torch.int64)),
        TypeError,
        "^gate_up:.*int64",
    ),
    ("gate and up a number", lambda f: swiglu(torch.tensor(1.0)), ValueError, "^gate_up:"),
    ("gate and up a list", lambda f: swiglu([1.0, 2.0]), TypeError, "^gate_up:.*list"),
    (
        "a product of integers",
        lambda f: product(x=torch.ones(3, 4, dtype=torch.int64)),
        TypeError,
        "^x:.*int64",
    ),
    ("a product of a number", lambda f: product(x=torch.tensor(1.0)), ValueError, "^weight:"),
    (
        "a weight of integers",
        lambda f: product(weight=torch.ones(8, 4, dtype=torch.int8)),
        TypeError,
        "^weight:.*int8",
    ),
    (
        "a weight of another dtype",
        lambda f: product(weight=torch.zeros(8, 4).half()),
        TypeError,
        "^weight:.*float32.*float16",
    ),
    ("a weight of one row", lambda f: product(weight=torch.zeros(4)), ValueError, "^weight:"),
    (
        "a weight of another width",
        lambda f: product(weight=torch.zeros(8, 5)),
        ValueError,
        r"^weight: expected \[out, 4\].*\(8, 5\)",
    ),
    (
        "a weight elsewhere",
        lambda f: product(weight=torch.zeros(8, 4, device=META)),
        ValueError,
        "^weight:.*meta",
    ),
    ("a weight of None", lambda f: product(weight=None), TypeError, "^weight:.*NoneType"),
    (
        "an fp8 weight of bytes",
        lambda f: product(weight=Fp8Weight(torch.zeros(8, 4).byte(), torch.ones(8))),
        TypeError,
        "^weight:.*float8_e4m3fn.*uint8",
    ),
    (
        "an fp8 weight of one scale",
        lambda f: product(weight=quantize_weight(torch.ones(8, 4))._replace(scale=torch.ones(1))),
        ValueError,
        "^weight:",
    ),
    (
        "a bias of integers",
        lambda f: product(bias=torch.ones(8, dtype=torch.int64)),
        TypeError,
        "^bias:.*int64",
    ),
    (
        "a bias elsewhere",
        lambda f: product(bias=torch.ones(8, device=META)),
        ValueError,
        "^bias:.*meta",
    ),
    (
        "gate and up of an odd number of rows",
        lambda f: product(linear_swiglu, weight=torch.zeros(7, 4)),
        ValueError,
        "^weight:.*even",
    ),
    (
        "an up of another shape",
        lambda f: product(linear_swiglu, up=torch.zeros(7, 4)),
        ValueError,
        "^up:",
    ),
    (
        "an up beside fp8",
        lambda f: product(
            linear_swiglu, weight=quantize_weight(torch.ones(8, 4)), up=torch.zeros(8, 4)
        ),
        ValueError,
        "^up:.*Fp8Weight",
    ),
    (
        "a product's residual of another shape",
        lambda f: product_norm(residual=torch.zeros(3, 7)),
        ValueError,
        "^residual:",
    ),
    (
        "a product's norm of integers",
        lambda f: product_norm(norm_weight=torch.ones(8, dtype=torch.int64)),
        TypeError,
        "^norm_weight:",
    ),
    ("a product's eps of 0", lambda f: product_norm(eps=0), ValueError, "^eps:"),
    (
        "an int8 weight to quantise",
        lambda f: quantize_weight(torch.ones(8, 16, dtype=torch.int8)),
        TypeError,
        "^weight:.*int8",
    ),
    ("a row to quantise", lambda f: quantize_weight(torch.ones(16)), ValueError, "^weight:"),
    ("a list to quantise", lambda f: quantize_weight([1.0]), TypeError, "^weight:.*list"),
    (
        "queries of integers",
        lambda f: rotate(q=torch.ones(1, 2, 2, 8, dtype=torch.int64)),
        TypeError,
        "^q:.*int64",
    ),
    (
        "queries of three dimensions",
        lambda f: rotate(q=torch.zeros(1, 2, 8)),
        ValueError,
        "^q:",
    ),
    ("keys of another dtype", lambda f: rotate(k=torch.zeros(1, 2, 2, 8).half()), TypeError, "^k:"),
    ("keys of more positions", lambda f: rotate(k=torch.zeros(1, 3, 2, 8)), ValueError, "^k:"),
    ("keys of no head", lambda f: rotate(k=torch.zeros(1, 2, 0, 8)), ValueError, "^k:"),
    ("values of another shape", lambda f: rotate(v=torch.zeros(1, 2, 1, 8)), ValueError, "^v:"),
    (
        "values elsewhere",
        lambda f: rotate(v=torch.zeros(1, 2, 2, 8, device=META)),
        ValueError,
        "^v:",
    ),
    (
        "rotation tables of integers",
        lambda f: rotate(cos=torch.zeros(4, 4).int(), sin=torch.zeros(4, 4).int()),
        TypeError,
        "^cos:.*int32",
    ),
    (
        "rotation tables of no position",
        lambda f: rotate(cos=torch.zeros(0, 4), sin=torch.zeros(0, 4)),
        ValueError,
        r"^cos: expected a position or more, got \(0, 4\)",
    ),
    ("a rotation without sines", lambda f: rotate(sin=None), TypeError, "^sin:.*NoneType"),
    ("a key cache that is a list", lambda f: rotate(k_cache=[]), TypeError, "^k_cache:.*list"),
    (
        "a page table without a column",
        lambda f: rotate(page_table=torch.zeros(1, 0).int()),
        ValueError,
        "^page_table:.*a page or more",
    ),
    (
        "a page table of one dimension",
        lambda f: rotate(page_table=ints(0)),
        ValueError,
        "^page_table:",
    ),
    (
        "pages to write that have no slot",
        lambda f: rotate(
            k_cache=torch.zeros(3, 0, 2, 8),
            v_cache=torch.zeros(3, 0, 2, 8),
            page_table=torch.zeros(1, 1).int(),
        ),
        ValueError,
        "^k_cache:.*a page of a slot or more",
    ),
    (
        "no page to write",
        lambda f: rotate(
            k_cache=torch.zeros(0, 4, 2, 8),
            v_cache=torch.zeros(0, 4, 2, 8),
            page_table=torch.zeros(1, 1).int(),
        ),
        ValueError,
        "^k_cache:.*a page of a slot or more",
    ),
]


def evaluated(**given):
    """lm-eval's arguments of a model, read."""
    return read_options({"pretrained": "x", **given})


def read(name, value):
    """An option of the command line, read from its text."""
    return written.named(name, written.NUMBERS[name].read, value)


OPTIONS = [
    ("lm-eval: max_length 1", lambda f: evaluated(max_length=1), ValueError, "^max_length:.* 1$"),
    ("lm-eval: max_length -5", lambda f: evaluated(max_length=-5), ValueError, "^max_length:"),
    ("lm-eval: steps 0", lambda f: evaluated(steps=0), ValueError, "^steps:.*got 0"),
    ("lm-eval: steps -4", lambda f: evaluated(steps=-4), ValueError, "^steps:.*got -4"),
    ("lm-eval: steps 2.5", lambda f: evaluated(steps=2.5), ValueError, "^steps:.*got 2.5"),
    ("lm-eval: gen_length 0", lambda f: evaluated(gen_length=0), ValueError, "^gen_length:"),
    ("lm-eval: block_length 0", lambda f: evaluated(block_length=0), ValueError, "^block_length:"),
    ("lm-eval: top_p 0", lambda f: evaluated(top_p=0), ValueError, "^top_p:.*got 0"),
    ("lm-eval: top_k -2", lambda f: evaluated(top_k=-2), ValueError, "^top_k:.*got -2"),
    ("lm-eval: mc_num 0", lambda f: evaluated(mc_num=0), ValueError, "^mc_num:"),
    ("lm-eval: a bool for a number", lambda f: evaluated(seed=True), ValueError, "^seed:.*True"),
    ("lm-eval: dtype int8", lambda f: evaluated(dtype="int8"), ValueError, "^dtype:.*bfloat16"),
    ("lm-eval: a dtype of bits", lambda f: evaluated(dtype=16), ValueError, "^dtype:.*got 16"),
    ("lm-eval: a device unknown", lambda f: evaluated(device="tpu"), ValueError, "^device:"),
    ("lm-eval: a flag of words", lambda f: evaluated(stop_early="no"), ValueError, "^stop_early:"),
    ("lm-eval: a cache unknown", lambda f: evaluated(cache="full"), ValueError, "^cache:.*prefix"),
    (
        "lm-eval: two rules",
        lambda f: evaluated(threshold=0.9, factor=1.0),
        ValueError,
        "^factor: expected one rule.*threshold",
    ),
    (
        "lm-eval: a schedule without steps",
        lambda f: evaluated(schedule="dream"),
        ValueError,
        "^schedule: expected steps",
    ),
    (
        "lm-eval: a request's limit of 0",
        lambda f: evaluated().asked({"max_gen_toks": 0}),
        ValueError,
        "max_gen_toks:.*got 0",
    ),
    ("threshold 1e400", lambda f: read("threshold", "1e400"), ValueError, "^threshold:.*'1e400'"),
    ("factor 1e-60", lambda f: read("factor", "1e-60"), ValueError, "^factor:.*'1e-60'"),
    ("steps past 64 bits", lambda f: read("steps", "9" * 20), ValueError, "^steps:.*'9{20}'"),
    ("steps past Python's digits", lambda f: read("steps", "9" * 5000), ValueError, "^steps:"),
    (
        "a rule that is no call",
        lambda f: written.read_rule("Quota(4) + 1"),
        ValueError,
        "expected a rule such as",
    ),
    (
        "a rule of calls",
        lambda f: written.read_rule("Quota(int(4))"),
        ValueError,
        "expected numbers and texts",
    ),
    ("a rule unknown", lambda f: written.read_rule("Best(4)"), ValueError, "Threshold.*Best"),
    ("a byte in a text", lambda f: texts.check_text("PROMPT", "a\udcff"), ValueError, "byte 0xff"),
    ("half a pair", lambda f: texts.check_text("PROMPT", "\ud83d"), ValueError, "^PROMPT:.*d83d"),
]

TABLE = [
    pytest.param(*row[1:], id=f"{group}: {row[0]}")
    for group, rows in (
        ("generate", GENERATE),
        ("logits", LOGITS),
        ("load", LOAD),
        ("block_attention", ATTENTION),
        ("select", SELECT),
        ("merge", MERGE),
        ("commit", COMMIT),
        ("rules", RULES),
        ("pointwise", POINTWISE),
        ("options", OPTIONS),
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
    """Only row 1's prompt holds a token whose embedding is broken: row 0 must not be blamed."""
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
