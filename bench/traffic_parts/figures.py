"""Figures that follow from the rows of a traffic benchmark: rates, ratios, percentiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

OWN_BEST = 1.1  # over its own best a request of the stream is to take at most this


def rate(row: dict) -> float:
    """Tokens a second."""
    return row["tokens"] / median(row["seconds"])


def one(rows: list[dict], **what) -> dict | None:
    """The row that has these values."""
    found = (row for row in rows if all(row[name] == value for name, value in what.items()))
    return next(found, None)


def over_static(rows: list[dict], lengths: str) -> float | None:
    """The engine's tokens a second over those of static batches."""
    engine, static = (one(rows, lengths=lengths, way=way) for way in ("engine", "static"))
    return rate(engine) / rate(static) if engine and static else None


def percentile(values: Sequence[float], part: float) -> float:
    """The least value that so many per cent of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part / 100 * len(ordered)) - 1)]


def over_alone(row: dict) -> float:
    """The median of a request's time over what the same request takes alone."""
    return median(whole / own for whole, own in zip(row["whole"], row["alone"], strict=True))


def own_best(requests: list[dict]) -> tuple[float, float]:
    """(the share of requests that never take longer than OWN_BEST over their own best, the largest
    ratio).
    """
    ratios = [max(row["seconds"]) / min(row["seconds"]) for row in requests]
    within = sum(ratio <= OWN_BEST for ratio in ratios)
    return within / len(ratios), max(ratios)


def host_part(row: dict) -> float | None:
    """The share of a turn in which its captured forward does not run; None where none was."""
    return None if row["ms_replay"] is None else 1 - row["ms_replay"] / row["ms_turn"]
