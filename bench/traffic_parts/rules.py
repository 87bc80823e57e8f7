"""What a cached step takes under rules of every kind and with filters, one token a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

import torch
from race.shapes import BLOCK

from fastdllm import Quota

from .answering import shaped_model
from .asked import Size, equal
from .measuring import turns

ROUNDS = 3  # in which the kinds take turns
FUSED = "a branch of the kernel, Quota"


@dataclass(frozen=True, eq=False)
class Best:
    """The best of a block, as a rule without a branch in the kernel."""

    def commit(self, scores, candidates, step):
        best = scores.masked_fill(~candidates, -torch.inf).argmax(1, keepdim=True)
        return torch.zeros_like(candidates).scatter(1, best, True) & candidates


def leftmost(scores, candidates, step):
    """The first mask, as a function."""
    return candidates & (candidates.cumsum(1) == 1)


@dataclass(frozen=True)
class Kind:
    """A rule and how its tokens are drawn. most: milliseconds over FUSED that are aimed at."""

    name: str
    rule: object
    most: float | None = None
    sampling: dict = field(default_factory=dict)


DRAWN = {"temperature": 0.2, "seed": 1}
KINDS = (
    Kind(FUSED, Quota(BLOCK)),
    Kind("a function, the first mask", leftmost, 0.5),
    Kind("a dataclass, the best mask", Best(), 0.5),
    # Its reference in PyTorch, which sorts three times.
    Kind("a function, Quota by three sorts", Quota(BLOCK).commit, 0.5),
    Kind("Quota, temperature 0.2", Quota(BLOCK), 0.1, DRAWN),
    Kind("Quota, temperature 0.2, top_p 0.95", Quota(BLOCK), 0.1, DRAWN | {"top_p": 0.95}),
    Kind("Quota, top_k 50", Quota(BLOCK), 0.1, {"top_k": 50}),
)


def rules(size: Size, device: torch.device) -> list[dict]:
    """For each kind the median milliseconds of a turn of one row, in each round."""
    model = shaped_model(size, device)
    (one,) = equal(model.config, size, 1)
    rows = [{"rule": kind.name, "most": kind.most, "ms": []} for kind in KINDS]
    for _ in range(1 + ROUNDS):  # the first makes what is made once
        for row, kind in zip(rows, KINDS, strict=True):
            taken = turns(model, [one.prompt], size.turns, rule=kind.rule, **kind.sampling)
            row["ms"].append(round(median(taken), 4))
    return [row | {"ms": row["ms"][1:]} for row in rows]


def over_fused(rows: list[dict], row: dict) -> float:
    """The row's milliseconds over those of a fused rule."""
    (fused,) = (other for other in rows if other["rule"] == FUSED)
    return median(row["ms"]) - median(fused["ms"])
