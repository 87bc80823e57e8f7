"""The arguments of the model "fastdllm" in lm-eval, and what the published scripts' arguments mean
in them.
"""

import sys
from dataclasses import dataclass, fields

import fastdllm
from fastdllm_kernels.checks import choice

ALIASES = {
    "model_path": "pretrained",
    "max_new_tokens": "gen_length",
    "diffusion_steps": "steps",
    "remasking": "score",
    "alg": "score",
    "save_dir": "resume",
}
ALGS = {
    "confidence_threshold": "confidence",
    "entropy": "entropy",
    "maskgit_plus": "confidence",
    "topk_margin": "margin",
}
SCORES = {"low_confidence": "confidence", **ALGS}
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


@dataclass
class Options:
    """What --model_args may hold. None: what the model, the request or `fastdllm.generate` would
    take by itself.

    threshold, factor or steps choose the rule (default: threshold 0.9). resume: a folder that keeps
    every answer, so that the same run started again goes on. escape_until: do not cut answers at
    the task's stop strings. stop_early: stop a row at its end-of-text. mc_num: draws of the
    log-likelihood's estimate; is_check_greedy: also whether greedy decoding gives the target.
    show_speed: report tokens and forwards on standard error, counting tokens before the first
    end-of-text.
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

    def rule(self, gen_length: int, block_length: int):
        """The commit rule for a generation of this length."""
        if self.threshold is not None:
            return fastdllm.Threshold(self.threshold)
        if self.factor is not None:
            return fastdllm.Factor(self.factor)
        if self.steps is None:
            return fastdllm.Threshold(0.9)
        blocks = -(-gen_length // block_length)
        return fastdllm.Quota(max(1, min(self.steps, gen_length) // blocks), self.schedule)


def read_options(given: dict) -> Options:
    """The Options that these arguments mean, by our names or the published ones. ValueError for
    contradictions.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name in INERT.keys() & given.keys():
        value = given.pop(name)
        if INERT[name] is not None and value not in INERT[name]:
            raise ValueError(
                f"{name}: expected {' or '.join(map(repr, INERT[name]))}, got {value!r}"
            )
    published = bool(PUBLISHED & given.keys())
    dream = bool({"alg", "diffusion_steps"} & given.keys())
    if "cache" in given and {"use_cache", "dual_cache"} & given.keys():
        raise ValueError("use_cache: cache says it already, none, prefix or dual")
    use_cache, dual = given.pop("use_cache", False), given.pop("dual_cache", False)
    if dream:
        if choice("alg", given.setdefault("alg", "entropy"), tuple(ALGS)) == "confidence_threshold":
            given.setdefault("threshold", 0.9)
        else:
            given.pop("threshold", None)
    options = {}
    for name, value in given.items():
        ours = ALIASES.get(name, name)
        if ours in options:
            raise ValueError(f"{name}: {ours} is given twice, under two names")
        options[ours] = SCORES.get(value, value) if ours == "score" else value
    if published:
        options.setdefault("cache", ("dual" if dual else "prefix") if use_cache else "none")
        options.setdefault("block_length", 32 if use_cache else None)  # None: one block
        options.setdefault("schedule", "dream" if dream else "even")
        options.setdefault("steps", sys.maxsize)  # as many as tokens
    known = {field.name for field in fields(Options)}
    if "pretrained" not in options or not options.keys() <= known:
        names = ", ".join(sorted(known | ALIASES.keys() | INERT.keys() | PUBLISHED))
        raise ValueError(
            f"model_args: expected pretrained and any of {names}; got {', '.join(given)}"
        )
    rows = options.get("batch_size", 1)
    if not str(rows).isdigit() or int(rows) < 1:  # lm-eval's flag gives a string
        raise ValueError(f"batch_size: expected a number of rows, got {rows!r}")
    return Options(**options | {"batch_size": int(rows)})
