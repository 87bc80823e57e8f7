"""Two plots of an end-to-end benchmark: throughput over batch sizes, and where a request's time
goes.
"""

from __future__ import annotations

import tables

from race.figures import PAPER, RATES, floor, seconds
from race.shapes import BLOCK

COLORS = {
    "vanilla": "black",
    "vanilla, our selection": "grey",
    "plain prefix": "C3",
    "plain dual": "C1",
    "prefix eager": "C9",
    "prefix captured": "C0",
    "dual eager": "C8",
    "dual captured": "C2",
    "dual captured, fp8": "C4",
}


def throughput(cells, path) -> None:
    """Draw tokens a second against rows, a panel for each model and canvas."""
    pyplot = tables.pyplot()
    models = list(dict.fromkeys(rows[0]["model"] for rows in cells))
    canvases = sorted({rows[0]["canvas"] for rows in cells})
    size = 3.6 * len(canvases) + 2.2, 3.2 * len(models) + 0.4
    figure, panels = pyplot.subplots(
        len(models), len(canvases), figsize=size, squeeze=False, layout="constrained"
    )
    for model, line in zip(models, panels, strict=True):
        for canvas, axes in zip(canvases, line, strict=True):
            place = model, canvas
            here = [rows for rows in cells if (rows[0]["model"], rows[0]["canvas"]) == place]
            _throughput_panel(axes, here, f"{model}, canvas {canvas}")
    handles = {}
    for axes in panels.flat:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles[name] = handle
    title = f"{RATES[0]} tokens a step"
    figure.legend(
        handles.values(), handles.keys(), loc="outside right", fontsize="small", title=title
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _throughput_panel(axes, cells, title) -> None:
    """One line a way over the cells' numbers of rows."""
    for way, color in COLORS.items():
        points = []
        for row in (row for rows in cells for row in rows if row["way"] == way):
            tokens = row["rows"] * row["gen_length"]
            points.append((row["rows"], tokens / seconds(row, RATES[0]).seconds))
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", ms=4, color=color, label=way)
    axes.set(yscale="log", xlabel="rows", ylabel="tokens/s", title=title)
    tables.log_ticks(axes, sorted({rows[0]["rows"] for rows in cells}))
    axes.grid(alpha=0.3)


def request_time(cells, path) -> None:
    """Draw where a request's time goes, refreshes and cached steps stacked, at the paper's rate:
    the longest canvas, the fewest rows. Nothing is drawn where no way has a cache.
    """
    pyplot = tables.pyplot()
    cells = [[row for row in rows if row["cache"] != "none"] for rows in cells]
    cells = [rows for rows in cells if rows]
    if not cells:
        return
    fewest = min(rows[0]["rows"] for rows in cells)
    longest = max(rows[0]["canvas"] for rows in cells if rows[0]["rows"] == fewest)
    place = longest, fewest
    chosen = [rows for rows in cells if (rows[0]["canvas"], rows[0]["rows"]) == place]
    size = 5.5 * len(chosen) + 1, 4
    figure, panels = pyplot.subplots(
        1, len(chosen), figsize=size, squeeze=False, layout="constrained"
    )
    for axes, rows in zip(panels[0], chosen, strict=True):
        _time_panel(axes, rows)
        axes.set_title(f"{rows[0]['model']}, canvas {longest}, B {fewest}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _time_panel(axes, rows) -> None:
    """One bar a way, with its floor and its seconds."""
    blocks = rows[0]["gen_length"] // BLOCK
    names = [row["way"] for row in rows]
    refreshes = [blocks * row["ms_refresh"] / 1e3 for row in rows]
    steps = [PAPER * blocks * row["ms_step"] / 1e3 for row in rows]
    axes.barh(names, refreshes, color="C0", label=f"{blocks} refreshes")
    label = f"{round(PAPER * blocks)} cached steps"
    axes.barh(names, steps, left=refreshes, color="C1", label=label)
    floors = [(floor(row, PAPER), row["way"]) for row in rows if floor(row, PAPER)]
    if floors:
        axes.plot(*zip(*floors, strict=True), "k|", ms=16, label="floor")
    for name, refresh, step in zip(names, refreshes, steps, strict=True):
        total = refresh + step
        axes.text(total, name, f" {tables.number(total)} s", va="center", fontsize=8)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a request")
    axes.legend(fontsize="small")
