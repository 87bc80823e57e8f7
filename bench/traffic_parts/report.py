"""What the results file of bench/traffic.py says: tables, and a verdict on each target."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, median

import tables
from race.figures import ON_A_CPU
from tables import NONE, number, share, times

from . import plots
from .asked import LOADS, WAYS
from .figures import (
    OWN_BEST,
    host_part,
    one,
    over_alone,
    over_static,
    own_best,
    percentile,
    rate,
)
from .measuring import made_in_traffic
from .options import later_times, of_the_paper
from .rules import over_fused

TARGETS = {  # on an H200, at LLaDA-8B's shape
    ("warm_up", "empty"): 20.0,
    ("warm_up", "warm"): 4.0,
    ("first request", "empty"): 8.0,
    ("first request", "warm"): 0.8,
    "worst of own best": 1.2,
    "equal": 0.95,
    "mixed": 1.5,
    "half load": 1.5,
    "second time": 1.1,
    "host": 0.05,
}

HOW = """\
LLaDA-8B's shape, random weights in bf16, dual cache, blocks of 32, no text ends early; a scripted
rule makes 8 forwards a block. *engine*: `Engine` with 16 rows of 2,048 positions, after `warm_up`.
*static*: `generate` in batches of at most 16 in order of arrival; a batch generates as much as its
longest request and ends as a whole, and only tokens that were asked for count. *one by one*:
`generate` with one request at a time. All on the same weights, in one process, by wall clock."""
COLD = """\
Each line is a process of its own; the clock starts when model and engine are there. Loaded: kernels
that an earlier process had compiled. Seconds of captures hold what is compiled for them."""
OPEN = """\
Requests come at random (Poisson, the same for all) for {seconds:g} s, at a share of the tokens a
second that static batches reach on mixed lengths, whether or not those before them are done. Times
count from when a request came. First: until its first token is final; static batches could tell of
it then, though they return at their end. One by one is computed, from what each request took alone.
With so few requests p99 is the slowest, or nearly."""
HOST = """\
A turn of cached steps, all rows at one block length, and its captured forward replayed on the GPU
by itself. The selection, which the forward does not hold, counts for the host here."""
OPTIONS = """\
One request, prompt 1,024 and 1,024 tokens generated, again and again with `generate` under each
option; nothing was warmed up. At 128 forwards; ~ is the paper's number, 32 refreshes and 108 cached
steps, between 128 and 160 forwards, the medians from the second time on."""
RULES = """\
A turn of one row's cached step, one token a step, by wall clock: captured forward, selection, and
the way of its result to the host. Medians of rounds in which the rules take turns."""
SOAK = """\
Small requests of many kinds (rules with and without a kernel, filters, seeds, stop ids; one whose
rule raises) from several threads, on a CPU, a tiny model: more at once than rows and line hold.
Some are cancelled, of some the tokens are read as they come. A result is compared with what
`generate` gives for that request alone, tokens and forwards."""


def write_report(path: Path, readme: Path | None = None) -> None:
    """Write the tables and the plot beside the JSON file; with a readme, put the short table
    between its marks "traffic", that of the soak between its marks "soak".
    """
    nothing: dict = {part: [] for part, _, _ in SECTIONS}
    results = nothing | json.loads(path.read_text())
    target = path.with_suffix(".md")
    target.write_text(markdown(results))
    print(target)
    if readme and results["saturated"]:
        tables.insert(readme, "traffic", short_table(results, path.stem))
    if readme and results["soak"]:
        tables.insert(readme, "soak", soak_table(results["soak"]))
    if results["saturated"] and results["open"]:
        plots.traffic(results, path.with_suffix(".png"))


def markdown(results: dict) -> str:
    """The whole report."""
    gpus = [facts["gpu"] for facts in results["environments"] if facts["gpu"]]
    measured = any(
        results[part]
        for part in ("cold", "options", "rules", "stream", "saturated", "open", "host")
    )
    parts = [f"# Traffic on {gpus[0] if gpus else 'a CPU'}"]
    if measured:
        parts.append(HOW if gpus else ON_A_CPU)
    parts.append(tables.runs(results["environments"]))
    if measured:
        parts += ["## In short", "\n".join(verdicts(results))]
    for part, title, told in SECTIONS:
        if results[part]:
            parts += [f"## {title}", told(results)]
    return "\n\n".join(parts) + "\n"


def verdicts(results: dict) -> list[str]:
    """A line for the check, and one for each target that something was measured for."""
    lines = [check_verdict(check) for check in results["check"]]
    lines += cold_verdicts(results["cold"])
    if results["options"]:
        worst = max(map(later_times, results["options"]))
        what = f"under every option a request's second time takes at most {times(worst)} its best"
        lines.append(f"{what} (target: at most {TARGETS['second time']:g})")
    lines += [rule_verdict(results["rules"], row) for row in results["rules"] if row["most"]]
    if results["stream"]:
        lines += stream_verdicts(results["stream"][0], results["stream_requests"])
    for lengths in ("equal", "mixed"):
        found = over_static(results["saturated"], lengths)
        if found:
            what = f"saturated, {lengths} lengths: {times(found)} static batches"
            lines.append(f"{what} (target: at least {TARGETS[lengths]:g})")
    half = one(results["open"], way="engine", load=LOADS[0])
    if half:
        what = f"at half load a request takes {times(over_alone(half))} what it takes alone"
        lines.append(f"{what} (median; target: at most {TARGETS['half load']:g})")
    for row in results["host"]:
        found = host_part(row)
        if found is not None:
            what = f"the host's share of a turn at {row['rows']} rows: {found:.1%}"
            lines.append(f"{what} (target: at most {TARGETS['host']:.0%})")
    return [f"- {line}" for line in lines]


def check_verdict(check: dict) -> str:
    asked = f"{check['requests']} requests at once in the engine and alone through `generate`"
    same = f"{check['same_tokens']} of {check['tokens']} tokens the same"
    return f"check: {asked}: as many forwards, no mask left, {same}"


def cold_verdicts(rows: list[dict]) -> list[str]:
    lines = []
    for row in rows:
        target = TARGETS.get((row["kind"], row["cache"]))
        if target:
            what = f"{row['kind']}, compile cache {row['cache']}: {number(row['seconds'])} s"
            lines.append(f"{what} (target: at most {target:g})")
    return lines


def stream_verdicts(during: dict, requests: list[dict]) -> list[str]:
    made = made_in_traffic(during)
    what = f"FAILED: {made}" if made else "nothing compiled, loaded or captured"
    within, worst = own_best(requests)
    return [
        f"the stream after `warm_up`: {what} (target: nothing)",
        f"its requests over their own best of {during['passes']}: {share(within)} of them within "
        f"{OWN_BEST}, worst {times(worst)} (target: all, worst {TARGETS['worst of own best']})",
    ]


def cold_table(results: dict) -> str:
    heads = [
        "begins with",
        "compile cache",
        "s",
        "next request, s",
        "compiled",
        "s",
        "loaded",
        "s",
        "captured",
        "s",
        "engine made in, s",
    ]
    lines = [
        [
            row["kind"],
            row["cache"],
            number(row["seconds"]),
            number(row["next_request_seconds"]),
            *made(row),
            number(row["engine_seconds"]),
        ]
        for row in results["cold"]
    ]
    return COLD + "\n\n" + tables.table(heads, lines, "ll" + "r" * (len(heads) - 2))


def options_table(results: dict) -> str:
    heads = ["option", "first s", "second", "third", "best", "~ s", "second over best"]
    lines = [
        [
            row["option"],
            *map(number, row["fewer"][:3]),
            number(min(row["fewer"])),
            number(of_the_paper(row)),
            times(later_times(row)),
        ]
        for row in results["options"]
    ]
    return OPTIONS + "\n\n" + tables.table(heads, lines, "lrrrrrr")


def rule_verdict(rows: list[dict], row: dict) -> str:
    what = f"a cached step with {row['rule']}: {over_fused(rows, row):+.2f} ms over a fused rule"
    return f"{what} (target: at most {row['most']:g})"


def rules_table(results: dict) -> str:
    rows = results["rules"]
    heads = ["rule", "ms a turn", "rounds", "over the fused one"]
    lines = [
        [
            row["rule"],
            number(median(row["ms"])),
            ", ".join(map(number, row["ms"])),
            f"{over_fused(rows, row):+.2f}",
        ]
        for row in rows
    ]
    return RULES + "\n\n" + tables.table(heads, lines, "lrrr")


def made(row: dict) -> list:
    """Cells of what was compiled, loaded and captured, each with its seconds."""
    cells = []
    for count, seconds in (
        ("compiled", "compile_seconds"),
        ("loaded", "load_seconds"),
        ("captured", "capture_seconds"),
    ):
        cells += [NONE if row[count] is None else row[count], number(row[seconds])]
    return cells


def stream_table(results: dict) -> str:
    """The stream's means, and what was made before and during it."""
    requests, during = results["stream_requests"], results["stream"][0]
    first = during["first"]
    passes = list(zip(*(row["seconds"] for row in requests), strict=True))
    heads = [
        "pass",
        f"first {first}, mean s",
        f"last {len(requests) - first}, mean s",
        "median s",
        "worst s",
    ]
    lines = [
        [
            index,
            number(mean(seconds[:first])),
            number(mean(seconds[first:])),
            number(median(seconds)),
            number(max(seconds)),
        ]
        for index, seconds in enumerate(passes, 1)
    ]
    heads_made = ["", "compiled", "s", "loaded", "s", "captured", "s"]
    lines_made = [
        [f"`warm_up`, {number(results['warm_up'][0]['seconds'])} s", *made(results["warm_up"][0])],
        ["the stream", *made(during)],
    ]
    prompts = [row["prompt"] for row in requests]
    told = (
        f"{len(requests)} requests one after another, prompts of {min(prompts)} to {max(prompts)} "
        f"tokens, {requests[0]['gen_length']} generated; the same {len(passes)} times."
    )
    made_table = tables.table(heads_made, lines_made)
    return "\n\n".join([told, tables.table(heads, lines, "r" * len(heads)), made_table])


def saturated_table(results: dict) -> str:
    heads = ["lengths", "requests", "tokens", "way", "tokens/s", "over static", "seconds"]
    lines = []
    for row in results["saturated"]:
        static = one(results["saturated"], lengths=row["lengths"], way="static")
        lines.append(
            [
                row["lengths"],
                row["requests"],
                row["tokens"],
                row["way"],
                number(rate(row)),
                times(rate(row) / rate(static)),
                ", ".join(map(number, row["seconds"])),
            ]
        )
    told = "All requests are there from the beginning; engine and static batches take turns."
    for row in results["saturated"]:
        met = made_in_traffic(row) if row["way"] == "static" else None
        if met:
            told += f" First batch of {row['lengths']} lengths, not timed: after `warm_up` {met}."
    return told + "\n\n" + tables.table(heads, lines, "lrrlrrr")


def open_table(results: dict) -> str:
    heads = [
        "load",
        "requests",
        "way",
        "tokens/s",
        "first, p50 s",
        "p99",
        "whole, p50 s",
        "p99",
        "over alone, p50",
    ]
    lines = [
        [
            row["load"],
            row["requests"],
            row["way"],
            number(row["tokens"] / row["seconds"]),
            *(number(percentile(row["first"], part)) for part in (50, 99)),
            *(number(percentile(row["whole"], part)) for part in (50, 99)),
            times(over_alone(row)),
        ]
        for row in results["open"]
    ]
    told = OPEN.format(seconds=results["open"][0]["come_seconds"])
    return told + "\n\n" + tables.table(heads, lines, "rrlrrrrrr")


def host_table(results: dict) -> str:
    heads = ["rows", "turns", "ms a turn", "ms of its replay", "host's share"]
    lines = []
    for row in results["host"]:
        found = host_part(row)
        replay = number(row["ms_replay"])
        lines.append(
            [
                row["rows"],
                row["turns"],
                number(row["ms_turn"]),
                replay,
                NONE if found is None else f"{found:.1%}",
            ]
        )
    return HOST + "\n\n" + tables.table(heads, lines, "r" * len(heads))


def soak_section(results: dict) -> str:
    wrong = results["soak"][-1]["wrong"]
    verdict = f"FAILED: {'; '.join(wrong)}." if wrong else "Nothing lost, doubled or other."
    return "\n\n".join([SOAK, verdict, soak_table(results["soak"])])


def soak_table(rows: list[dict]) -> str:
    heads = [
        "requests",
        "s",
        "done",
        "cancelled",
        "failed, as asked",
        "line was full",
        "Python objects",
        "resident MB",
        "threads",
    ]
    lines = []
    for row in rows:
        outcomes = row["outcomes"]
        names = "done", "cancelled", "failed", "line was full"
        resident = row["resident_bytes"]
        lines.append(
            [
                f"{row['requests']:,}",
                number(row["seconds"]),
                *(f"{outcomes.get(name, 0):,}" for name in names),
                f"{row['objects']:,}",
                NONE if resident is None else f"{resident / 1e6:.1f}",
                row["threads"],
            ]
        )
    return tables.table(heads, lines, "r" * len(heads))


SECTIONS = (
    ("cold", "The first seconds of a process", cold_table),
    ("options", "The same request again", options_table),
    ("rules", "Rules of every kind", rules_table),
    ("stream", "A stream", stream_table),
    ("saturated", "Saturated", saturated_table),
    ("open", "Requests that come at random", open_table),
    ("host", "What the host adds to a turn", host_table),
    ("soak", "Soak", soak_section),
)


def short_table(results: dict, stem: str) -> str:
    """For the index: tokens a second of each way, and seconds of a request at the lowest and the
    highest load; links to the report and the plot named `stem`.
    """
    low, high = LOADS[0], LOADS[-1]
    heads = ["way", "tokens/s, equal lengths", "mixed"]
    heads += [f"s a request at load {load}, p50 (p99)" for load in (low, high)]
    lines = []
    for way in WAYS:
        cells = [way]
        for lengths in ("equal", "mixed"):
            row = one(results["saturated"], lengths=lengths, way=way)
            cells.append(number(rate(row)) if row else NONE)
        for load in (low, high):
            row = one(results["open"], load=load, way=way)
            cells.append(_both(row["whole"]) if row else NONE)
        lines.append(cells)
    links = (
        f"[{stem}]({stem}.md) has the rest.\n\n![tokens a second, seconds a request]({stem}.png)"
    )
    return tables.table(heads, lines) + "\n\n" + links


def _both(values):
    return f"{number(percentile(values, 50))} ({number(percentile(values, 99))})"
