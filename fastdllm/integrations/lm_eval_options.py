"""The arguments of the model "fastdllm" in lm-eval.

`read_options` turns --model_args into Options, by this project's names or by those of the published
LLaDA and Dream scripts. `Options.asked` adds what a single request says.
"""

import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import fastdllm
from fastdllm_kernels import SCORES
from fastdllm_kernels.rules import LARGEST_COUNT, score_of

from .. import arguments
from ..arguments import CACHES
from ..options import (
    COUNT,
    ENTROPY_THRESHOLD,
    NUMBERS,
    RULES,
    Number,
    UsageError,
    choose_rule,
    named,
    read_device,
    read_dtype,
    read_rule,
    read_word,
)

log = logging.getLogger(__name__)

# Published name -> ours.
ALIASES = {
    "model_path": "pretrained",
    "max_new_tokens": "gen_length",
    "diffusion_steps": "steps",
    "remasking": "score",
    "alg": "score",
    "save_dir": "resume",
}
# Dream's `alg` -> our score. "confidence_threshold" chooses the rule too.
ALGS = {
    "confidence_threshold": "confidence",
    "entropy": "entropy",
    "maskgit_plus": "confidence",
    "topk_margin": "margin",
}
SCORE_WORDS = {score: score for score in SCORES} | {"low_confidence": "confidence"} | ALGS
# One of these brings the published scripts' defaults.
PUBLISHED = {
    "model_path",
    "max_new_tokens",
    "diffusion_steps",
    "remasking",
    "alg",
    "use_cache",
    "dual_cache",
}
# Taken where the value changes nothing here. Code that comes with a checkpoint is never run.
INERT = {
    "trust_remote_code": (True, False),
    "max_batch_size": None,
    "parallelize": (False,),
    "nll_type": ("mc",),
    "log_type": ("ftb",),
    "cfg": (0,),
    "alg_temp": (0, None),
}
# What decides nothing of an answer: a run resumed with another value finds its answers.
NOT_IN_TEXT = (
    "batch_size",
    "device",
    "resume",
    "show_speed",
    "mc_num",
    "sampling_eps",
    "is_check_greedy",
    "mask_id",
)
# How a request may name the number of tokens to generate, the first that is there counting.
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
GEN_LENGTH = 256
OTHER_RULES = {*RULES, "rule"} - {"steps"}


@dataclass
class Options:
    """What --model_args may hold. None: what the model, the request or `generate` takes by itself.

    device, dtype: words as `text.load` takes them; dtype "auto" is the stored one.
    threshold, factor, steps or rule choose the rule (default: threshold 0.9); steps are those of
    the whole generation, rule is written as a call, see `options.read_rule`. resume: a folder that
    keeps every answer, so that the same run started again goes on. escape_until: do not cut answers
    at the task's stop strings. stop_early: stop a row at its end of text. max_length: positions for
    prompt and answer together. mc_num: draws of the log-likelihood's estimate; is_check_greedy:
    also whether greedy decoding gives the target. show_speed: report tokens and forwards on
    standard error, counting tokens before the first end of text.
    """

    pretrained: str
    device: str | None = None
    dtype: str | None = None
    batch_size: int = 1
    gen_length: int | None = None
    block_length: int | None = 32
    cache: str = "dual"
    threshold: float | None = None
    factor: float | None = None
    steps: int | None = None
    schedule: str = "even"
    rule: str | None = None
    score: str = "confidence"
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    max_length: int | None = None
    add_bos_token: bool = False
    escape_until: bool = False
    stop_early: bool = True
    mc_num: int = 128
    sampling_eps: float | None = None
    is_check_greedy: bool = True
    mask_id: int | None = None
    show_speed: bool = False
    resume: str | None = None

    def commit_rule(self, gen_length: int, block_length: int) -> Any:
        """The rule for a generation of this length in blocks of that one."""
        if self.steps is None:
            return choose_rule(vars(self)).rule
        if self.steps >= gen_length:  # one token a step
            return fastdllm.Quota(min(block_length, gen_length), self.schedule)
        blocks = -(-gen_length // block_length)
        steps = max(1, self.steps // blocks)
        if steps * blocks != self.steps:
            _warn_of_uneven_steps(self.steps, blocks, steps)
        return fastdllm.Quota(steps, self.schedule)

    def asked(self, request: Mapping[str, Any]) -> "Asked":
        """What one request's generation_kwargs and these options ask for; the options go first."""
        gen_length = self.gen_length
        if gen_length is None:
            gen_length = _limit(request)
        sampling = request if request.get("do_sample") else {}
        temperature = _first("temperature", self.temperature, sampling)
        return Asked(
            gen_length=gen_length,
            block_length=gen_length if self.block_length is None else self.block_length,
            temperature=0.0 if temperature is None else temperature,
            top_p=_first("top_p", self.top_p, sampling),
            top_k=arguments.top_k(_first("top_k", self.top_k, sampling)),
            until=() if self.escape_until else _stop_strings(request.get("until")),
        )


@dataclass(frozen=True)
class Asked:
    """How the answer to one request is made. until: strings that end it."""

    gen_length: int
    block_length: int
    temperature: float
    top_p: float | None
    top_k: int | None
    until: tuple[str, ...]


@functools.cache  # once, not once a batch
def _warn_of_uneven_steps(wanted, blocks, steps):
    log.warning(
        "steps: %s do not spread evenly over %s blocks; %s in each are made", wanted, blocks, steps
    )


def _limit(request):
    name = next((name for name in LIMITS if request.get(name) is not None), None)
    if name is None:
        return GEN_LENGTH
    return named(f"generation_kwargs: {name}", COUNT.read, request[name])


def _first(name, option, request):
    """The option where there is one, else what the request says, else None."""
    if option is not None or request.get(name) is None:
        return option
    return named(f"generation_kwargs: {name}", NUMBERS[name].read, request[name])


def _stop_strings(until):
    if isinstance(until, str):
        until = [until]
    return tuple(text for text in until or () if text)


def _read_flag(value: Any) -> bool:
    """A flag: true or false, as lm-eval's parser or a quoted text gives it, or 1 or 0."""
    words = {"true": True, "1": True, "false": False, "0": False}
    word = str(value).lower()
    if word not in words:
        raise UsageError(f"expected true or false, got {value!r}")
    return words[word]


def _read_name(value: Any) -> str:
    """A path or an id; lm-eval's parser makes a number of a folder called 42."""
    names = str | int | float | os.PathLike
    if isinstance(value, bool) or not isinstance(value, names) or value == "":
        raise UsageError(f"expected a name, got {value!r}")
    return str(value)


def _read_rule_text(value: Any) -> str:
    read_rule(value)
    return value


READERS: dict[str, Callable[[Any], Any]] = {
    **{name: number.read for name, number in NUMBERS.items()},
    "threshold": ENTROPY_THRESHOLD.read,  # of other scores it is at least 0: see `read_options`
    "batch_size": COUNT.read,
    "max_length": Number(
        int, "an integer >= 3, for a prompt, an answer and its end", lambda number: number >= 3
    ).read,
    "mc_num": COUNT.read,
    "sampling_eps": Number(float, "a number in [0, 1)", lambda number: 0 <= number < 1).read,
    "mask_id": Number(int, "an integer >= 0", lambda number: number >= 0).read,
    "device": read_device,
    "dtype": read_dtype,
    "cache": read_word(CACHES),
    "schedule": read_word(("even", "dream")),
    "score": lambda value: SCORE_WORDS[read_word(SCORE_WORDS)(value)],
    "alg": lambda value: ALGS[read_word(ALGS)(value)],
    "rule": _read_rule_text,
    "pretrained": _read_name,
    "resume": _read_name,
    "add_bos_token": _read_flag,
    "escape_until": _read_flag,
    "stop_early": _read_flag,
    "is_check_greedy": _read_flag,
    "show_speed": _read_flag,
    "use_cache": _read_flag,
    "dual_cache": _read_flag,
}


def read_options(given: Mapping[str, Any]) -> Options:
    """The Options that these arguments mean, by our names or the published ones.

    UsageError, a ValueError, names an argument that is not known, a value that is not taken, and
    arguments that contradict each other.
    """
    given = {name: value for name, value in given.items() if value is not None}
    _check_names(given)
    options = _read_values(given)
    if PUBLISHED & given.keys():
        _follow_published(options, given)
    elif "schedule" in options and "steps" not in options:
        raise UsageError(f"schedule: expected steps beside it, got {options['schedule']!r} alone")
    if "threshold" in options and options.get("score") != "entropy":
        named("threshold", NUMBERS["threshold"].read, options["threshold"])
    rule = choose_rule(options).rule  # one at most
    try:
        options["score"] = score_of(rule, options.get("score"))
    except ValueError as error:
        raise UsageError(str(error)) from None
    return Options(**options)


def _check_names(given):
    known = {field.name for field in fields(Options)} | ALIASES.keys() | INERT.keys() | PUBLISHED
    if given.keys() <= known and {"pretrained", "model_path"} & given.keys():
        return
    raise UsageError(
        f"model_args: expected pretrained and any of {', '.join(sorted(known))}; "
        f"got {', '.join(map(str, given)) or 'none'}"
    )


def _read_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our name -> the value, read; use_cache and dual_cache among them."""
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name in INERT:
            _check_inert(name, value)
            continue
        ours = ALIASES.get(name, name)
        if ours in options:
            raise UsageError(f"{name}: {ours} is given twice, under two names")
        options[ours] = named(name, READERS.get(name) or READERS[ours], value)
    return options


def _check_inert(name, value):
    allowed = INERT[name]
    if allowed is not None and value not in allowed:
        raise UsageError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {value!r}")


def _follow_published(options, given):
    """Fill in the published scripts' defaults: no cache, one token a step, one block without cache.

    There `steps` is given beside every rule and gives way to it, and Dream's `alg` takes a
    threshold only where it is confidence_threshold.
    """
    use_cache, dual_cache = options.pop("use_cache", None), options.pop("dual_cache", None)
    if "cache" in options and (use_cache, dual_cache) != (None, None):
        raise UsageError("use_cache: cache says it already, none, prefix or dual")
    reuse = "dual" if dual_cache else "prefix"
    options.setdefault("cache", reuse if use_cache else "none")
    options.setdefault("block_length", 32 if use_cache else None)  # None: one block
    dream = bool({"alg", "diffusion_steps"} & given.keys())
    options.setdefault("schedule", "dream" if dream else "even")
    if dream:
        _follow_alg(options, given.get("alg", "entropy"))
    if OTHER_RULES & options.keys():
        options.pop("steps", None)
    else:
        options.setdefault("steps", LARGEST_COUNT)  # as many as tokens


def _follow_alg(options, alg):
    options.setdefault("score", ALGS[alg])
    if alg != "confidence_threshold":
        if options.pop("threshold", None) is not None:
            log.warning("threshold: not used, as in the published script, where alg is %s", alg)
    elif not OTHER_RULES & options.keys():
        options["threshold"] = 0.9
