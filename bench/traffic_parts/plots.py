"""One plot of a traffic benchmark: tokens a second, and seconds over load."""

from __future__ import annotations

from pathlib import Path

import tables

from .asked import LOADS, WAYS
from .figures import one, percentile, rate

COLORS = {"engine": "C2", "static": "C0", "one by one": "grey"}


def traffic(results: dict, path: Path) -> None:
    """Draw tokens a second where all is there at once, and seconds over load: of a whole request
    and until its first token, p50 drawn through and p99 dashed.
    """
    pyplot = tables.pyplot()
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    _bars(panels[0], results["saturated"])
    for axes, what, title in zip(
        panels[1:],
        ("whole", "first"),
        ("a whole request", "until the first final token"),
        strict=True,
    ):
        for way in WAYS:
            rows = [row for row in results["open"] if row["way"] == way]
            loads = [row["load"] for row in rows]
            for part, style in ((50, "-o"), (99, "--o")):
                seconds = [percentile(row[what], part) for row in rows]
                label = f"{way}, p{part}"
                axes.plot(loads, seconds, style, color=COLORS[way], label=label, markersize=4)
        axes.set_title(title)
        axes.set_xticks(LOADS, [f"{load:g}" for load in LOADS])
        axes.set_xlabel("load, of what static batches reach")
        axes.set_ylabel("seconds")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    panels[1].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _bars(axes, rows) -> None:
    width = 0.8 / len(WAYS)
    groups = list(dict.fromkeys(row["lengths"] for row in rows))
    for index, way in enumerate(WAYS):
        for place, lengths in enumerate(groups):
            row = one(rows, lengths=lengths, way=way)
            if row:
                label = way if place == len(groups) - 1 else None
                left = place + (index - 1) * width
                axes.bar(left, rate(row), width, color=COLORS[way], label=label)
    axes.set_xticks(range(len(groups)), [f"{lengths} lengths" for lengths in groups])
    axes.set_ylabel("tokens a second")
    axes.set_title("all there from the beginning")
    axes.legend(fontsize="small")
