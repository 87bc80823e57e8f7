"""Tables and plots of what bench/end_to_end.py measured: everything here is derived from its JSON
file.
"""

import json

from tables import TARGETS_OF, insert, number

BLOCK = 32
RATES = (8, 4, 2, 1)  # tokens a step; the tables' columns are those of the first
PAPER = (
    108 / 32
    # cached steps a block of the paper's headline run: 32 refreshes and 108 cached steps for 1024
    # positions
)
TARGETS = {"LLaDA-8B": 2.2}  # seconds of the headline request
MEMORY_TARGETS = {1: 1e9, 16: 4e9}  # rows -> bytes over weights and cache, LLaDA-8B, canvas 2048
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

HOW = """Seconds of one batch of requests, wall time, the GPU idle before and after. Random weights and a scripted rule, which
commits a fixed number of positions a step. `~` marks what was not decoded whole: it comes from the time of a refresh and of a
cached step, fitted to timed runs over a few blocks of the same canvas (bench/README.md). *vanilla* is the published
code's decoding without a cache, one token a step; *plain* is what the published implementation does in a step
(`bench/plain.py`), on the same weights. Share of floor: the least time of the bytes to be moved and the operations to be done,
over the time taken. Peak memory counts the weights; in brackets, what it is over weights and cache."""
ON_A_CPU = "**These are CPU numbers** of tiny models: they say that the benchmark works, and nothing about speed."
HEADLINE = """The paper's run has 32 refreshes and 108 cached steps for 1024 positions: its time (`~`) lies between those of
the two rates that were decoded whole, or comes from the fit where there are none. tok/s and ratios are those at the paper's
rate; vanilla is extrapolated."""


def seconds(row, tokens):
    """(seconds of the request at so many tokens a step, whether they are extrapolated); None where
    nothing was measured.
    """
    if "ms_refresh" not in row:
        return None
    if row["cache"] == "none":
        return row["gen_length"] * row["ms_refresh"] / 1e3, True
    for run in row["measured"]:
        if run["blocks"] is None and run["steps"] == BLOCK // tokens:
            return run["seconds"], False
    return predicted(row, BLOCK // tokens - 1), True


def predicted(row, steps):
    """Seconds of the request by the fit, at so many cached steps a block."""
    return row["gen_length"] // BLOCK * (row["ms_refresh"] + steps * row["ms_step"]) / 1e3


def floor(row, steps):
    """The least seconds of the request at so many cached steps a block; None without a GPU."""
    if "floor_ms_refresh" not in row:
        return None
    if row["cache"] == "none":
        return row["gen_length"] * row["floor_ms_refresh"] / 1e3
    return (
        row["gen_length"] // BLOCK * (row["floor_ms_refresh"] + steps * row["floor_ms_step"]) / 1e3
    )


def peer_of(row, rows):
    """The row of the published code's way with the same cache."""
    name = "vanilla" if row["cache"] == "none" else f"plain {row['cache']}"
    return next((other for other in rows if other["way"] == name), None)


def times(value):
    return "–" if value is None else f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def over(theirs, ours):
    """How many times as long the other takes; both are (seconds, extrapolated) or None."""
    return None if theirs is None or ours is None else theirs[0] / ours[0]


def duration(found):
    return "–" if found is None else f"{'~' if found[1] else ''}{number(found[0])}"


def memory(row):
    if row.get("peak_bytes") is None:
        return "–"
    beyond = (row["peak_bytes"] - row["weight_bytes"] - row["cache_bytes"]) / 1e9
    return f"{row['peak_bytes'] / 1e9:.1f} ({beyond:+.1f})"


def line(cells):
    return f"| {' | '.join(map(str, cells))} |"


HEADS = (
    "way",
    "s",
    "tok/s",
    "forwards",
    "ms/refresh",
    "ms/step",
    "share of floor",
    "of a refresh",
    "of a step",
    "x vanilla",
    "x plain",
    "peak GB",
    *(f"s at {rate} a step" for rate in RATES[1:]),
)


def cell_table(rows):
    """One cell: a line for each way, at RATES[0] tokens a step."""
    first = f"{rows[0]['model']}, canvas {rows[0]['canvas']}, B {rows[0]['rows']}"
    lines = [line([first, *HEADS[1:]]), line(["---"] + ["---:"] * (len(HEADS) - 1))]
    return "\n".join([*lines, *(way_line(row, rows) for row in rows)])


def way_line(row, rows):
    if "ms_refresh" not in row:
        return line(
            [row["way"], row.get("absent") or f"WRONG: {row['wrong']}", *[""] * (len(HEADS) - 2)]
        )
    found, vanilla, peer = seconds(row, RATES[0]), rows[0], peer_of(row, rows)
    cached, steps = row["cache"] != "none", BLOCK // RATES[0] - 1
    forwards = row["gen_length"] // BLOCK * (1 + steps) if cached else row["gen_length"]
    least = floor(row, steps)
    shares = [
        f"{part:.2f}" if part else "–" for part in (least and least / found[0], *part_shares(row))
    ]
    by_rate = [duration(seconds(row, rate)) if cached else "" for rate in RATES[1:]]
    return line(
        [
            row["way"],
            duration(found),
            number(row["rows"] * row["gen_length"] / found[0]),
            forwards,
            number(row["ms_refresh"]),
            number(row["ms_step"]),
            *shares,
            times(over(seconds(vanilla, 1), found)),
            times(over(seconds(peer, RATES[0]) if cached and peer else None, found)),
            memory(row),
            *by_rate,
        ]
    )


def part_shares(row):
    """Shares of the floor of a refresh and of a cached step."""
    parts = (("floor_ms_refresh", "ms_refresh"), ("floor_ms_step", "ms_step"))
    return [
        row[least] / row[taken] if row.get(least) and row.get(taken) else None
        for least, taken in parts
    ]


def headline(rows):
    """The request of the paper's headline: at its rate, and at the two rates that were decoded
    whole.
    """
    steps = round(PAPER * rows[0]["gen_length"] / BLOCK)
    blocks = rows[0]["gen_length"] // BLOCK
    whole = [run for row in rows for run in row.get("measured", ()) if run["blocks"] is None]
    counts = sorted({run["steps"] for run in whole})
    heads = [
        "way",
        f"s at {blocks} + {steps} forwards",
        *(f"s at {blocks} + {blocks * (n - 1)}" for n in counts),
        "tok/s",
        "ms/refresh",
        "ms/step",
        "share of floor",
        "x vanilla",
        "x plain",
        "peak GB",
        "runs, fit's error",
    ]
    lines = [line(heads), line(["---"] + ["---:"] * (len(heads) - 1))]
    for row in rows:
        if "ms_refresh" not in row:
            lines.append(
                line(
                    [
                        row["way"],
                        row.get("absent") or f"WRONG: {row['wrong']}",
                        *[""] * (len(heads) - 2),
                    ]
                )
            )
            continue
        found, peer = at_paper_rate(row), peer_of(row, rows)
        took = {
            run["steps"]: number(run["seconds"]) for run in row["measured"] if run["blocks"] is None
        }
        ratio = over(at_paper_rate(peer), found) if row["cache"] != "none" and peer else None
        least = floor(row, PAPER)
        runs = "/".join(str(run["samples"]) for run in row["measured"])
        lines.append(
            line(
                [
                    row["way"],
                    duration(found),
                    *(took.get(count, "") for count in counts),
                    number(row["rows"] * row["gen_length"] / found[0]),
                    number(row["ms_refresh"]),
                    number(row["ms_step"]),
                    f"{least / found[0]:.2f}" if least else "–",
                    times(over(at_paper_rate(rows[0]), found)),
                    times(ratio),
                    memory(row),
                    f"{runs}, {row['fit_error']:.1%}",
                ]
            )
        )
    return "\n".join(lines)


def short_table(results):
    """The README's table: the headline request, way by way."""
    rows = next(rows for rows in grouped(results["rows"]) if rows[0]["headline"])
    heads = [
        "way of decoding",
        "seconds",
        "tokens/s",
        "ms a refresh",
        "ms a cached step",
        "over vanilla",
        "peak GB",
    ]
    lines = [line(heads), line(["---"] + ["--:"] * (len(heads) - 1))]
    for row in rows:
        found = at_paper_rate(row)
        if found:
            ratio = times(over(at_paper_rate(rows[0]), found))
            fitted = (number(row[name]) for name in ("ms_refresh", "ms_step"))
            memory = f"{row['peak_bytes'] / 1e9:.1f}" if row.get("peak_bytes") else "–"
            lines.append(
                line(
                    [
                        row["way"],
                        f"{found[0]:.2f}",
                        number(row["gen_length"] / found[0]),
                        *fitted,
                        ratio,
                        memory,
                    ]
                )
            )
    return "\n".join(lines)


def at_paper_rate(row):
    """(seconds, True) at the paper's number of forwards: between the two requests that were decoded
    whole where there are two, else by the fit; vanilla's, one token a step, for what has no cache.
    """
    if "ms_refresh" not in row:
        return None
    if row["cache"] == "none":
        return seconds(row, 1)
    whole = sorted(
        (run["cached_steps"], run["seconds"]) for run in row["measured"] if run["blocks"] is None
    )
    if len(whole) < 2:
        return predicted(row, PAPER), True
    (few, fast), (many, slow) = whole[0], whole[-1]
    wanted = PAPER * row["gen_length"] / BLOCK
    return fast + (wanted - few) / (many - few) * (slow - fast), True


def verdicts(cells, gpu):
    """What the benchmark is there to show, in lines: rows slower than plain, dual slower than
    prefix, targets.
    """
    slower, worse = {}, {}
    for rows in cells:
        by_way = {row["way"]: row for row in rows}
        label = f"{rows[0]['model']}, canvas {rows[0]['canvas']}, B {rows[0]['rows']}"
        for name, row in by_way.items():
            rivals = (
                []
                if row["peer"] or row["cache"] == "none"
                else [(slower, f"plain {row['cache']}", RATES)]
            )
            if row["cache"] == "dual" and not row["peer"]:
                rivals.append((worse, name.replace("dual", "prefix"), RATES[:1]))
            for losses, rival, rates in rivals:
                for rate in rates if rival in by_way else ():
                    ratio = over(seconds(by_way[rival], rate), seconds(row, rate))
                    if ratio is not None and ratio < 1:
                        losses.setdefault(name, []).append((ratio, f"{label}, {rate} a step"))
    lines = [
        f"- Slower than plain: {worst(slower)}.",
        f"- Dual slower than prefix: {worst(worse)}.",
    ]
    same = [row["tokens_as_peer"] for rows in cells for row in rows if "tokens_as_peer" in row]
    if same:
        shared = f"{min(same):.1%} to {max(same):.1%}"
        lines.append(
            f"- Tokens of the checked blocks that plain decodes too, its rounding being another: {shared}."
        )
    for row in (row for rows in cells for row in rows):
        if row["way"] == "dual captured" and row.get("ms_step_gpu"):
            alone, step, label = (
                row["ms_step_gpu"],
                row["ms_step"],
                f"{row['model']}, canvas {row['canvas']}, B {row['rows']}",
            )
            times = (
                f"a captured step takes {alone:.3g} ms on the GPU alone, {step:.3g} in a request"
            )
            lines.append(f"- {label}: {times}: the host adds {step / alone - 1:.1%}.")
    return lines + targets(cells, gpu)


def worst(losses):
    """How often each way lost, and where it lost most."""
    texts = [
        f"{way} {len(found)} times, at worst {min(found)[0]:.2f}x ({min(found)[1]})"
        for way, found in losses.items()
    ]
    return "; ".join(texts) or "no row, at none of the rates"


def targets(cells, gpu):
    """The headline's seconds, on the GPU that the target was set for, and the memory over weights
    and cache against what was to be reached.
    """
    lines = []
    for rows in cells:
        row = next((row for row in rows if row["way"] == "dual captured"), None)
        if row is None:
            continue
        if TARGETS_OF in gpu and row["headline"] and at_paper_rate(row) and row["model"] in TARGETS:
            found, reach = at_paper_rate(row)[0], TARGETS[row["model"]]
            lines.append(
                f"- Headline: {found:.2f} s, to be reached {reach:g} s: {'met' if found <= reach else 'missed'}."
            )
        reach = (
            MEMORY_TARGETS.get(row["rows"])
            if row["model"] == "LLaDA-8B" and row["canvas"] == 2048
            else None
        )
        if reach and row.get("peak_bytes"):
            beyond = row["peak_bytes"] - row["weight_bytes"] - row["cache_bytes"]
            lines.append(
                f"- Memory over weights and cache, canvas 2048, B {row['rows']}: {beyond / 1e9:.2f} GB, "
                f"to be reached {reach / 1e9:g} GB: {'met' if beyond <= reach else 'missed'}."
            )
    return lines


def accuracy_table(accuracy):
    lines = [
        line(["model", "cache", "rule", "run", "solved, %", "tokens equal to the CPU's, fp32"]),
        line(["---"] * 6),
    ]
    for entry in accuracy["results"]:
        for run, solved in entry["solved"].items():
            same = f"{entry['same_tokens'][run]} of {entry['problems']}" if "fp32" in run else "–"
            solved = f"{100 * solved / entry['problems']:.1f}"
            lines.append(line([entry["model"], entry["cache"], entry["rule"], run, solved, same]))
    return "\n".join(lines)


def grouped(rows):
    """The rows of each cell, by model, canvas and batch size."""
    cells = {}
    for row in rows:
        cells.setdefault((row["model"], row["canvas"], row["rows"]), []).append(row)
    order = sorted(cells, key=lambda key: (-ord(key[0][0]), -key[1], key[2]))
    return [cells[key] for key in order]


def environment_line(facts):
    names = ("gpu", "driver", "python", "torch", "triton", "cuda", "cudnn")
    text = ", ".join(f"{name} {facts[name]}" for name in names if facts.get(name))
    if facts.get("ceilings"):
        limits = facts["ceilings"]
        text += (
            f"; ceilings in the same run: copy {limits['bytes_per_second'] / 1e12:.2f} TB/s, bf16 product "
            f"{limits['operations_per_second'] / 1e12:.0f} TFLOP/s"
        )
    return f"- `{facts['command']}`: {text}"


def markdown(results):
    """The whole report."""
    cells, on_gpu = grouped(results["rows"]), any(facts["gpu"] for facts in results["environments"])
    gpu = next((facts["gpu"] for facts in results["environments"] if facts["gpu"]), "a CPU")
    parts = [f"# Whole requests on {gpu}", HOW if on_gpu else ON_A_CPU]
    parts.append(
        "\n".join(dict.fromkeys(environment_line(facts) for facts in results["environments"]))
    )
    for rows in cells:
        if rows[0]["headline"]:
            row = rows[0]
            where = f"prompt {row['canvas'] - row['gen_length']}, generation {row['gen_length']}, B {row['rows']}"
            parts.append(
                f"## The headline request: {row['model']}, {where}\n\n{HEADLINE}\n\n{headline(rows)}"
            )
    if cells:
        parts.append("## In short\n\n" + "\n".join(verdicts(cells, gpu)))
        parts.append(
            f"## The grid, at {RATES[0]} tokens a step\n\n" + "\n\n".join(map(cell_table, cells))
        )
    if results["accuracy"]:
        parts.append(
            f"## The embedded models, captured and eager\n\n{accuracy_table(results['accuracy'])}"
        )
    return "\n\n".join(parts) + "\n"


def write_report(path, readme=None):
    """Write the Markdown and the two plots beside the JSON file, and the short table between the
    marks of `readme`.
    """
    results = json.loads(path.read_text())
    if readme:
        insert(readme, "requests", short_table(results))
    path.with_suffix(".md").write_text(markdown(results))
    print(path.with_suffix(".md"))
    cells = [[row for row in rows if "ms_refresh" in row] for rows in grouped(results["rows"])]
    cells = [rows for rows in cells if rows]
    if cells:
        import matplotlib

        matplotlib.use("Agg")
        plot_throughput(cells, path.with_name(f"{path.stem}-throughput.png"))
        plot_time(cells, path.with_name(f"{path.stem}-time.png"))


def plot_throughput(cells, path):
    """Tokens a second against rows, a panel for each model and canvas."""
    from matplotlib import pyplot

    models = list(dict.fromkeys(rows[0]["model"] for rows in cells))
    canvases = sorted({rows[0]["canvas"] for rows in cells})
    size = 3.6 * len(canvases) + 2.2, 3.2 * len(models) + 0.4
    figure, panels = pyplot.subplots(
        len(models), len(canvases), figsize=size, squeeze=False, layout="constrained"
    )
    for i, model in enumerate(models):
        for j, canvas in enumerate(canvases):
            axes = panels[i][j]
            here = [
                rows for rows in cells if (rows[0]["model"], rows[0]["canvas"]) == (model, canvas)
            ]
            for way, color in COLORS.items():
                found = [
                    (row["rows"], row["rows"] * row["gen_length"] / seconds(row, RATES[0])[0])
                    for rows in here
                    for row in rows
                    if row["way"] == way
                ]
                if found:
                    axes.plot(*zip(*found, strict=True), marker="o", ms=4, color=color, label=way)
            axes.set(
                xscale="log",
                yscale="log",
                xlabel="rows",
                ylabel="tokens/s",
                title=f"{model}, canvas {canvas}",
            )
            ticks = sorted({rows[0]["rows"] for rows in here})
            axes.set_xticks(ticks, map(str, ticks))
            axes.minorticks_off()
            axes.grid(alpha=0.3)
    handles = {}
    for axes in panels.flat:
        handles.update(
            {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
        )
    figure.legend(
        handles.values(),
        handles,
        loc="outside right",
        fontsize="small",
        title=f"{RATES[0]} tokens a step",
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_time(cells, path):
    """Where a request's time goes: refreshes and cached steps, stacked, at the paper's rate; the
    longest canvas, one row.
    """
    from matplotlib import pyplot

    fewest = min(rows[0]["rows"] for rows in cells)
    longest = max(rows[0]["canvas"] for rows in cells if rows[0]["rows"] == fewest)
    chosen = [rows for rows in cells if (rows[0]["canvas"], rows[0]["rows"]) == (longest, fewest)]
    figure, panels = pyplot.subplots(
        1, len(chosen), figsize=(5.5 * len(chosen) + 1, 4), squeeze=False, layout="constrained"
    )
    for axes, rows in zip(panels[0], chosen, strict=True):
        cached = [row for row in rows if row["cache"] != "none"]
        names, blocks = [row["way"] for row in cached], rows[0]["gen_length"] // BLOCK
        refreshes = [blocks * row["ms_refresh"] / 1e3 for row in cached]
        steps = [PAPER * blocks * row["ms_step"] / 1e3 for row in cached]
        axes.barh(names, refreshes, color="C0", label=f"{blocks} refreshes")
        axes.barh(
            names, steps, left=refreshes, color="C1", label=f"{round(PAPER * blocks)} cached steps"
        )
        least = [(least, row["way"]) for row in cached if (least := floor(row, PAPER))]
        if least:
            axes.plot(*zip(*least, strict=True), "k|", ms=16, label="floor")
        for name, total in zip(names, map(sum, zip(refreshes, steps, strict=True)), strict=True):
            axes.text(total, name, f" {number(total)} s", va="center", fontsize=8)
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.set(
            xlabel="seconds of a request", title=f"{rows[0]['model']}, canvas {longest}, B {fewest}"
        )
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
