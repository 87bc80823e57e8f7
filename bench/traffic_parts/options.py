"""One request again and again under each option that trades accuracy for time: from the second
time on it is to take what it takes later.
"""

from __future__ import annotations

import copy
import gc
import time
from dataclasses import dataclass
from statistics import median

import torch
from race.figures import PAPER
from race.shapes import BLOCK
from race.subject import synchronize

from fastdllm import CachePolicy, Quota, generate, graph
from fastdllm.quantize import quantize

from .answering import shaped_model
from .asked import Size

TIMES = 6
# Forwards a block: the paper's headline run lies between, at 32 refreshes and 108 cached steps.
FEWER, MORE = 4, 5


@dataclass(frozen=True)
class Option:
    """fp8: weights. policy: what refreshes leave out."""

    name: str
    fp8: bool = False
    policy: CachePolicy = CachePolicy()


OPTIONS = (
    Option("none"),
    Option("prompt kept", policy=CachePolicy(prompt_refreshes=0)),
    Option("prompt kept, no suffix", policy=CachePolicy(prompt_refreshes=0, suffix_blocks=0)),
    Option("fp8", fp8=True),
    Option("fp8, prompt kept", fp8=True, policy=CachePolicy(prompt_refreshes=0)),
    Option(
        "fp8, prompt kept, 4 blocks ahead",
        fp8=True,
        policy=CachePolicy(prompt_refreshes=0, suffix_blocks=4),
    ),
)


def options(size: Size, device: torch.device) -> list[dict]:
    """For each option the seconds of one request, TIMES times at each of two numbers of forwards.
    Nothing is warmed up: the first time is the first.
    """
    model = shaped_model(size, device)
    rows = []
    for fp8 in (False, True):
        if fp8:
            model = quantize(model)
            gc.collect()
        for option in OPTIONS:
            if option.fp8 == fp8:
                rows.append({"option": option.name, **timed(copy.copy(model), option, size)})
    return rows


def timed(model, option: Option, size: Size) -> dict:
    """The seconds of each time, fewer forwards first."""
    prompt_length, gen_length = size.headline
    generator = torch.Generator().manual_seed(4)
    ordinary = min(model.config.mask_id, *model.config.stop_ids)
    prompt = torch.randint(ordinary, (prompt_length,), generator=generator)
    seconds: dict[str, list[float]] = {"fewer": [], "more": []}
    for name, steps in (("fewer", FEWER), ("more", MORE)):
        for _ in range(TIMES):
            synchronize()
            began = time.perf_counter()
            generate(
                model,
                [prompt],
                gen_length=gen_length,
                block_length=BLOCK,
                policy=option.policy,
                rule=Quota(steps),
                stop_ids=(),
            )
            seconds[name].append(round(time.perf_counter() - began, 4))
    graph.clear(model)
    return seconds


def of_the_paper(row: dict) -> float:
    """Seconds of the request at the paper's number of forwards, without each first time."""
    fewer, more = (median(row[name][1:]) for name in ("fewer", "more"))
    return fewer + (1 + PAPER - FEWER) / (MORE - FEWER) * (more - fewer)


def later_times(row: dict) -> float:
    """The second time over the best."""
    return row["fewer"][1] / min(row["fewer"][1:])
