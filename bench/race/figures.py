"""Figures that follow from the rows of an end-to-end benchmark: the seconds of a whole request at a
rate, its floor, ratios.

A row is a dict of the results file: one way of decoding in one cell. A request that was not decoded
whole takes what the fit predicts, so many refreshes and so many cached steps.
"""

from __future__ import annotations

from typing import NamedTuple

from race.shapes import BLOCK

RATES = (8, 4, 2, 1)  # tokens a step; the tables' columns are those of the first
# Cached steps a block of the paper's headline run: 32 refreshes and 108 cached steps for 1024
# positions.
PAPER = 108 / 32
ON_A_CPU = """\
**These are CPU numbers** of tiny models: they say that the benchmark works, and nothing about
speed."""


class Seconds(NamedTuple):
    """Seconds of a request, and whether they come from a fit instead of a clock."""

    seconds: float
    extrapolated: bool


def seconds(row: dict | None, tokens: int) -> Seconds | None:
    """Of the request at so many tokens a step; None where nothing was measured."""
    if row is None or "ms_refresh" not in row:
        return None
    if row["cache"] == "none":
        return Seconds(row["gen_length"] * row["ms_refresh"] / 1e3, True)
    steps = BLOCK // tokens
    for run in row["measured"]:
        if run["blocks"] is None and run["steps"] == steps:
            return Seconds(run["seconds"], False)
    return Seconds(predicted(row, steps - 1), True)


def predicted(row: dict, steps: float) -> float:
    """Seconds of the request by the fit, at so many cached steps a block."""
    return row["gen_length"] // BLOCK * (row["ms_refresh"] + steps * row["ms_step"]) / 1e3


def at_paper_rate(row: dict | None) -> Seconds | None:
    """Of the request at the paper's number of forwards: between the two requests that were decoded
    whole where there are two, else by the fit; without a cache vanilla's, one token a step.
    """
    if row is None or "ms_refresh" not in row:
        return None
    if row["cache"] == "none":
        return seconds(row, 1)
    whole = [run for run in row["measured"] if run["blocks"] is None]
    if len(whole) < 2:
        return Seconds(predicted(row, PAPER), True)
    whole.sort(key=lambda run: run["cached_steps"])
    few, many = whole[0], whole[-1]
    wanted = PAPER * row["gen_length"] / BLOCK
    part = (wanted - few["cached_steps"]) / (many["cached_steps"] - few["cached_steps"])
    return Seconds(few["seconds"] + part * (many["seconds"] - few["seconds"]), True)


def floor(row: dict, steps: float) -> float | None:
    """The least seconds of the request at so many cached steps a block; None without a GPU."""
    if "floor_ms_refresh" not in row:
        return None
    if row["cache"] == "none":
        return row["gen_length"] * row["floor_ms_refresh"] / 1e3
    a_block = row["floor_ms_refresh"] + steps * row["floor_ms_step"]
    return row["gen_length"] // BLOCK * a_block / 1e3


def over(theirs: Seconds | None, ours: Seconds | None) -> float | None:
    """How many times as long the other takes; None where either is missing."""
    if theirs is None or ours is None:
        return None
    return theirs.seconds / ours.seconds


def peer_of(row: dict, rows: list[dict]) -> dict | None:
    """The row of the published code's way with the same cache."""
    if row["cache"] == "none":
        return vanilla_of(rows)
    name = f"plain {row['cache']}"
    return next((other for other in rows if other["way"] == name), None)


def vanilla_of(rows: list[dict]) -> dict | None:
    """The row of the published code's decoding without a cache."""
    return next((row for row in rows if row["way"] == "vanilla"), None)


def label_of(row: dict) -> str:
    """The name of a row's cell."""
    return f"{row['model']}, canvas {row['canvas']}, B {row['rows']}"


def why_not(row: dict) -> str:
    """Why a row has no times."""
    return row.get("absent") or f"WRONG: {row['wrong']}"


def grouped(rows: list[dict]) -> list[list[dict]]:
    """The rows of each cell: LLaDA first, the longest canvas first, the fewest rows first."""
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["canvas"], row["rows"]), []).append(row)

    def order(key):
        model, canvas, batch = key
        return -ord(model[0]), -canvas, batch

    return [cells[key] for key in sorted(cells, key=order)]
