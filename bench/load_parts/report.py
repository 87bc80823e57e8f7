"""What the results file of bench/load.py says: tables, and a verdict on each target."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import tables
from tables import number, share
from traffic_parts.figures import percentile

from .soak import growth

TARGET = 0.95  # of the engine's own tokens a second, at 16 rows of LLaDA-8B's shape
SOAK = """\
{clients} clients at once, on a CPU with tiny-llada: completions of token ids, half of them streams,
with all rules, seeds, temperatures and stop strings. Of ten clients one goes away, at once or after
a stream's first part, and one asks for what is refused. An answer is compared with what `generate`
gives for that request alone: the text, and where no stop string ends it the forwards. Memory, open
files and threads are the server's, with nobody connected."""
SPEED = """\
Requests of one length, all there from the beginning: submitted to the engine in its own process,
and over HTTP by clients in another process, who read whole answers or streams. The same engine, in
turns; medians. First: seconds until a stream's first final token, with as many clients as rows."""

REPLICAS = """\
The same requests at once, through Ray Serve and its door, to one replica and to two, a GPU each;
medians. Target on two GPUs: 1.9 times."""


def write_report(path: Path) -> None:
    """Write the tables beside the JSON file."""
    target = path.with_suffix(".md")
    target.write_text(markdown(json.loads(path.read_text())))
    print(target)


def markdown(results: dict) -> str:
    """The whole report."""
    gpus = [facts["gpu"] for facts in results["environments"] if facts["gpu"]]
    parts = [f"# The server under load on {gpus[0] if gpus else 'a CPU'}"]
    parts.append(tables.runs(results["environments"]))
    if results["soak"]:
        rows = results["soak"]
        parts += ["## Soak", SOAK.format(clients=rows[-1]["clients"]), soak_verdict(rows)]
        parts.append(soak_table(rows))
    if results["speed"]:
        parts += ["## Speed", SPEED, speed_verdict(results["speed"]), speed_table(results["speed"])]
    if results["replicas"]:
        parts += ["## Replicas", REPLICAS, replicas_table(results["replicas"])]
    return "\n\n".join(parts) + "\n"


def replicas_table(rows: list[dict]) -> str:
    one = rate(rows[0])
    cells = [[row["replicas"], f"{rate(row):,.0f}", share(rate(row) / one)] for row in rows]
    return tables.table(["replicas", "tokens/s", "of one's"], cells, "rrr")


def soak_verdict(rows: list[dict]) -> str:
    last = rows[-1]
    if last["wrong"]:
        return "\n".join(f"- wrong: {what}" for what in last["wrong"])
    grown = growth(rows)
    memory = "" if grown is None else f"; memory {grown:+.1%} from the first third to the last"
    rate = last["requests"] / last["seconds"]
    return f"Every answer was as expected{memory}; {rate:.0f} requests a second."


def soak_table(rows: list[dict]) -> str:
    heads = ["requests", "s", "answered", "left", "refused", "resident MB", "open files", "threads"]
    cells = []
    for row in rows:
        counts = [row["outcomes"].get(what, 0) for what in ("answered", "left", "refused")]
        memory = row["resident_bytes"]
        resident = tables.NONE if memory is None else f"{memory / 1e6:.1f}"
        files = tables.NONE if row["files"] is None else row["files"]
        counted = [f"{count:,}" for count in counts]
        seconds = f"{row['seconds']:.0f}"
        cells.append([f"{row['requests']:,}", seconds, *counted, resident, files, row["threads"]])
    return tables.table(heads, cells, "r" * len(heads))


def rate(row: dict) -> float:
    """Tokens a second."""
    return row["tokens"] / median(row["seconds"])


def speed_verdict(rows: list[dict]) -> str:
    own, *ways = rows
    lines = [
        f"- {way['way']}: {rate(way) / rate(own):.2f} of the engine's own tokens a second "
        f"(target at 16 rows of LLaDA-8B's shape: at least {TARGET:g})"
        for way in ways
    ]
    return "\n".join(lines)


def speed_table(rows: list[dict]) -> str:
    own = rate(rows[0])
    heads = ["", "tokens/s", "of the engine's", "first, p50 s", "first, p99 s", "whole, p50 s"]
    cells = []
    for row in rows:
        times = [
            number(percentile(row[name], part)) if name in row else tables.NONE
            for name, part in (("first", 50), ("first", 99), ("whole", 50))
        ]
        cells.append([row["way"], f"{rate(row):,.0f}", share(rate(row) / own), *times])
    return tables.table(heads, cells)
