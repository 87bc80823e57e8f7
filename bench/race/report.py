"""What the rows of an end-to-end benchmark say: seconds of a request, ratios, tables.

Everything here is derived from the JSON file that bench/end_to_end.py writes, so that tables and
plots can be made anew without a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path

import tables
from tables import number, share, times

from race import plots, replaced_report
from race.figures import (
    ON_A_CPU,
    PAPER,
    RATES,
    at_paper_rate,
    floor,
    grouped,
    label_of,
    over,
    peer_of,
    seconds,
    vanilla_of,
    why_not,
)
from race.results import host_of
from race.shapes import BLOCK

TARGETS = {"LLaDA-8B": 2.2}  # seconds of the headline request
# Bytes over weights and cache, by rows: LLaDA-8B, canvas 2048.
MEMORY_TARGETS = {1: 1e9, 16: 4e9}

HOW = """\
Seconds of one batch of requests, wall time, the GPU idle before and after. Random weights and a
scripted rule, which commits a fixed number of positions a step. `~` marks what was not decoded
whole: it comes from the time of a refresh and of a cached step, fitted to timed runs over a few
blocks of the same canvas (bench/README.md). *vanilla* is the published code's decoding without a
cache, one token a step; *plain* is what the published implementation does in a step
(`bench/plain.py`), on the same weights. Share of floor: the least time of the bytes to be moved and
the operations to be done, over the time taken. Peak memory counts the weights; in brackets, what it
is over weights and cache."""
HEADLINE = """\
The paper's run has 32 refreshes and 108 cached steps for 1024 positions: its time (`~`) lies
between those of the two rates that were decoded whole, or comes from the fit where there are none.
tok/s and ratios are those at the paper's rate; vanilla is extrapolated."""


def write_report(path: Path, readme: Path | None = None) -> None:
    """Write the tables, and of native models two plots, beside the JSON file; with a readme, put
    the short table between its marks, "requests" or "replaced".
    """
    results = json.loads(path.read_text())
    replaced = host_of(results) == "replaced"
    text = replaced_report.markdown(results) if replaced else markdown(results)
    target = path.with_suffix(".md")
    target.write_text(text)
    print(target)
    if readme and replaced:
        tables.insert(readme, "replaced", replaced_report.short_table(results))
    elif readme:
        tables.insert(readme, "requests", short_table(results))
    measured = [row for row in results["rows"] if "ms_refresh" in row]
    if measured and not replaced:
        plots.throughput(grouped(measured), path.with_name(f"{path.stem}-throughput.png"))
        plots.request_time(grouped(measured), path.with_name(f"{path.stem}-time.png"))


def markdown(results) -> str:
    """The whole report, of native models."""
    cells = grouped(results["rows"])
    gpus = [facts["gpu"] for facts in results["environments"] if facts["gpu"]]
    gpu = gpus[0] if gpus else "a CPU"
    parts = [f"# Whole requests on {gpu}", HOW if gpus else ON_A_CPU]
    parts.append(tables.runs(results["environments"]))
    for rows in cells:
        if rows[0]["headline"]:
            row = rows[0]
            prompt, generation = row["canvas"] - row["gen_length"], row["gen_length"]
            where = f"prompt {prompt}, generation {generation}, B {row['rows']}"
            title = f"## The headline request: {row['model']}, {where}"
            parts += [title, HEADLINE, headline_table(rows)]
    if cells:
        parts += ["## In short", "\n".join(verdicts(cells, gpu))]
        parts.append(f"## The grid, at {RATES[0]} tokens a step")
        parts += [cell_table(rows) for rows in cells]
    if results["accuracy"]:
        parts.append("## The embedded models, captured and eager")
        parts.append(accuracy_table(results["accuracy"]["results"]))
    return "\n\n".join(parts) + "\n"


def cell_table(rows) -> str:
    """One cell: a line for each way, at RATES[0] tokens a step, and seconds at the other rates."""
    heads = [
        label_of(rows[0]),
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
    ]
    return tables.table(heads, [_cell_line(row, rows) for row in rows])


def _cell_line(row, rows) -> list:
    if "ms_refresh" not in row:
        return [row["way"], why_not(row)]
    rate = RATES[0]
    cached, steps = row["cache"] != "none", BLOCK // rate - 1
    found, least = seconds(row, rate), floor(row, steps)
    peer = seconds(peer_of(row, rows), rate) if cached else None
    line = [
        row["way"],
        duration(found),
        number(row["rows"] * row["gen_length"] / found.seconds),
        row["gen_length"] // BLOCK * (1 + steps) if cached else row["gen_length"],
        number(row["ms_refresh"]),
        number(row["ms_step"]),
        share(least and least / found.seconds),
        share(ratio(row, "floor_ms_refresh", "ms_refresh")),
        share(ratio(row, "floor_ms_step", "ms_step")),
        times(over(seconds(vanilla_of(rows), 1), found)),
        times(over(peer, found)),
        memory(row),
    ]
    if cached:
        line += [duration(seconds(row, other)) for other in RATES[1:]]
    return line


def headline_table(rows) -> str:
    """The request of the paper's headline, at its rate and at the rates that were decoded whole."""
    blocks = rows[0]["gen_length"] // BLOCK
    rates = sorted({run["steps"] for row in rows for run in whole_runs(row)})
    heads = [
        "way",
        f"s at {blocks} + {round(PAPER * blocks)} forwards",
        *(f"s at {blocks} + {blocks * (steps - 1)}" for steps in rates),
        "tok/s",
        "ms/refresh",
        "ms/step",
        "share of floor",
        "x vanilla",
        "x plain",
        "peak GB",
        "runs, fit's error",
    ]
    return tables.table(heads, [_headline_line(row, rows, rates) for row in rows])


def _headline_line(row, rows, rates) -> list:
    if "ms_refresh" not in row:
        return [row["way"], why_not(row)]
    found, least = at_paper_rate(row), floor(row, PAPER)
    peer = at_paper_rate(peer_of(row, rows)) if row["cache"] != "none" else None
    whole = {run["steps"]: number(run["seconds"]) for run in whole_runs(row)}
    samples = "/".join(str(run["samples"]) for run in row["measured"])
    return [
        row["way"],
        duration(found),
        *(whole.get(steps, "") for steps in rates),
        number(row["rows"] * row["gen_length"] / found.seconds),
        number(row["ms_refresh"]),
        number(row["ms_step"]),
        share(least and least / found.seconds),
        times(over(at_paper_rate(vanilla_of(rows)), found)),
        times(over(peer, found)),
        memory(row),
        f"{samples}, {row['fit_error']:.1%}",
    ]


def short_table(results) -> str:
    """The table of the index of results: the headline request, way by way."""
    headlines = [rows for rows in grouped(results["rows"]) if rows[0]["headline"]]
    if not headlines:
        raise ValueError("the results hold no headline request")
    rows = headlines[0]
    heads = [
        "way of decoding",
        "seconds",
        "tokens/s",
        "ms a refresh",
        "ms a cached step",
        "over vanilla",
        "peak GB",
    ]
    lines = []
    for row in rows:
        found = at_paper_rate(row)
        if found is None:
            continue
        peak = row.get("peak_bytes")
        lines.append(
            [
                row["way"],
                f"{found.seconds:.2f}",
                number(row["gen_length"] / found.seconds),
                number(row["ms_refresh"]),
                number(row["ms_step"]),
                times(over(at_paper_rate(vanilla_of(rows)), found)),
                f"{peak / 1e9:.1f}" if peak else tables.NONE,
            ]
        )
    return tables.table(heads, lines)


def accuracy_table(entries) -> str:
    heads = ["model", "cache", "rule", "run", "solved, %", "tokens equal to the CPU's, fp32"]
    lines = []
    for entry in entries:
        for run, solved in entry["solved"].items():
            percent = f"{100 * solved / entry['problems']:.1f}"
            same = f"{entry['same_tokens'][run]} of {entry['problems']}"
            equal = same if "fp32" in run else tables.NONE
            lines.append([entry["model"], entry["cache"], entry["rule"], run, percent, equal])
    return tables.table(heads, lines, align="llllll")


def whole_runs(row) -> list[dict]:
    return [run for run in row.get("measured", ()) if run["blocks"] is None]


def duration(found) -> str:
    """Seconds, marked where they are extrapolated."""
    if found is None:
        return tables.NONE
    mark = "~" if found.extrapolated else ""
    return mark + number(found.seconds)


def ratio(row, name, other) -> float | None:
    """One field over another; None where either is missing."""
    if not row.get(name) or not row.get(other):
        return None
    return row[name] / row[other]


def memory(row) -> str:
    """Peak GB, and in brackets those over weights and cache."""
    if row.get("peak_bytes") is None:
        return tables.NONE
    return f"{row['peak_bytes'] / 1e9:.1f} ({beyond(row) / 1e9:+.1f})"


def beyond(row) -> int:
    """Peak bytes over weights and cache."""
    return row["peak_bytes"] - row["weight_bytes"] - row["cache_bytes"]


def verdicts(cells, gpu) -> list[str]:
    """What the benchmark is there to show, in lines: rows slower than plain, dual slower than
    prefix, what the host adds, targets.
    """
    lines = [
        f"- Slower than plain: {worst(slower_than_plain(cells))}.",
        f"- Dual slower than prefix: {worst(slower_than_prefix(cells))}.",
    ]
    rows = [row for cell in cells for row in cell]
    same = [row["tokens_as_peer"] for row in rows if "tokens_as_peer" in row]
    if same:
        lines.append(
            "- Tokens of the checked blocks that plain decodes too, its rounding being another: "
            f"{min(same):.1%} to {max(same):.1%}."
        )
    for row in rows:
        if row["way"] == "dual captured" and row.get("ms_step_gpu"):
            alone, step = row["ms_step_gpu"], row["ms_step"]
            lines.append(
                f"- {label_of(row)}: a captured step takes {alone:.3g} ms on the GPU alone, "
                f"{step:.3g} in a request: the host adds {step / alone - 1:.1%}."
            )
    return lines + targets(rows, gpu)


def slower_than_plain(cells) -> dict[str, list]:
    """{way: [(plain's time over its, where), ...]} of what loses against plain's same cache."""
    losses: dict[str, list] = {}
    for rows in cells:
        by_way = {row["way"]: row for row in rows}
        for name, row in by_way.items():
            if row["peer"] or row["cache"] == "none":
                continue
            rival = by_way.get(f"plain {row['cache']}")
            found = losing(row, rival, RATES)
            if found:
                losses.setdefault(name, []).extend(found)
    return losses


def slower_than_prefix(cells) -> dict[str, list]:
    """The same, of dual ways that lose against their prefix twin at the first rate."""
    losses: dict[str, list] = {}
    for rows in cells:
        by_way = {row["way"]: row for row in rows}
        for name, row in by_way.items():
            if row["cache"] != "dual" or row["peer"]:
                continue
            rival = by_way.get(name.replace("dual", "prefix"))
            found = losing(row, rival, RATES[:1])
            if found:
                losses.setdefault(name, []).extend(found)
    return losses


def losing(row, rival, rates) -> list[tuple[float, str]]:
    """[(the rival's time over the row's, where)] at the rates at which the rival is faster."""
    found = []
    for rate in rates:
        factor = over(seconds(rival, rate), seconds(row, rate))
        if factor is not None and factor < 1:
            found.append((factor, f"{label_of(row)}, {rate} a step"))
    return found


def worst(losses) -> str:
    """How often each way lost, and where it lost most."""
    texts = []
    for way, found in losses.items():
        factor, where = min(found)
        texts.append(f"{way} {len(found)} times, at worst {factor:.2f}x ({where})")
    return "; ".join(texts) or "no row, at none of the rates"


def targets(rows, gpu) -> list[str]:
    """The headline's seconds, on the GPU that the target was set for, and the memory over weights
    and cache, against what was to be reached.
    """
    lines = []
    for row in rows:
        if row["way"] != "dual captured":
            continue
        reach, found = TARGETS.get(row["model"]), at_paper_rate(row)
        if tables.TARGETS_OF in gpu and row["headline"] and found and reach:
            verdict = "met" if found.seconds <= reach else "missed"
            lines.append(
                f"- Headline: {found.seconds:.2f} s, to be reached {reach:g} s: {verdict}."
            )
        at_target = row["model"] == "LLaDA-8B" and row["canvas"] == 2048
        reach = MEMORY_TARGETS.get(row["rows"]) if at_target else None
        if reach and row.get("peak_bytes"):
            verdict = "met" if beyond(row) <= reach else "missed"
            lines.append(
                f"- Memory over weights and cache, canvas 2048, B {row['rows']}: "
                f"{beyond(row) / 1e9:.2f} GB, to be reached {reach / 1e9:g} GB: {verdict}."
            )
    return lines
