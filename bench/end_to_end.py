"""Whole requests at the real shapes of LLaDA-8B and Dream-7B: our decoding beside what the
published implementation does.

    python bench/end_to_end.py [--headline] [--grid] [--accuracy] [--only llada] [--canvas 2048] [--rows 1,8] [--minutes 9]
    python bench/end_to_end.py --report FILE [--readme README.md]     tables and two plots beside FILE
    python bench/end_to_end.py --merge FILE ... --out FILE

Without a choice everything is measured. Results go to bench/results/end-to-end-<gpu>.json (or --out
FILE) after every cell; cells that are there already are skipped (--again measures them anew), so
that several short runs add up.

Weights are drawn at random, and random weights have no confidence: a scripted rule, `Quota`,
commits a fixed number of positions a step. A *cell* is one request shape: model, canvas, rows. Its
*ways* of decoding take turns within one run:

checked       Two blocks at the end of the canvas are decoded first: no mask left, forwards as scripted, captured the same
              tokens as eager, plain's logits near ours. A way that fails is not timed, and the exit status is 1. The peak
              memory is that of this run.
timed         A few blocks of the same canvas at two commit rates: wall time, the GPU idle before and after. Dual decodes the
              last ones, since all cost alike; prefix those in the middle, since its steps get cheaper from block to block.
              Least squares over the medians of all runs give the time of a refresh and of a cached step.
whole         For the headline the dual ways also decode the whole request, at 128 and 160 forwards for 1024 positions.
extrapolated  The time of a request that was not decoded whole comes from the fit, and is marked so.

On a machine without a GPU the same commands run tiny models: a smoke test.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import end_to_end_report as report
import timing
import torch
from end_to_end_accuracy import accuracy
from end_to_end_race import MODELS, OPTIONS, REAL, SMOKE, WAYS, Cell, Subject, measure_cell, tidy
from tables import slug

RESULTS = Path(__file__).parent / "results"


def environment(device):
    """What the numbers were measured with, the command included."""
    facts = {
        "gpu": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": shown_command(),
    }
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        pass
    if timing.ON_GPU:
        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "driver": driver(),
        }
        facts["cudnn"], facts["ceilings"] = torch.backends.cudnn.version(), timing.ceilings()
    return facts


def shown_command():
    return " ".join(
        ["python bench/end_to_end.py", *(Path(a).name if "/" in a else a for a in sys.argv[1:])]
    )


def driver():
    """The driver's version as nvidia-smi says it; None where that is missing."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(
            query, capture_output=True, text=True, timeout=30
        ).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return lines[0].strip() if lines else None


def key_of(row):
    return row["model"], row["canvas"], row["rows"]


def cells_asked_for(args, scale):
    """[(model key, Cell, headline)] in the order in which they are measured."""
    keys = args.only or list(MODELS)
    everything = not (args.headline or args.grid or args.accuracy)
    chosen = []
    if args.headline or everything:
        for key in keys if args.only else ["llada"]:
            canvas = scale.headline
            chosen.append((key, Cell(scale.names[key], canvas, scale.canvases[canvas], 1), True))
    if args.grid or everything:
        for key in keys:
            for rows in args.rows or scale.rows:
                for canvas in args.canvas or reversed(scale.canvases):
                    chosen.append(
                        (key, Cell(scale.names[key], canvas, scale.canvases[canvas], rows), False)
                    )
    return chosen


def missing(args, scale, results):
    """Of the cells asked for, those that the results do not hold yet; decoded whole, the headline's
    counts for the grid too.
    """
    there = (
        set()
        if args.again
        else {(key_of(row), whole) for row in results["rows"] for whole in {False, row["headline"]}}
    )
    chosen = []
    for key, cell, headline in cells_asked_for(args, scale):
        if (key_of(asdict(cell)), headline) not in there:
            chosen.append((key, cell, headline))
            there |= {(key_of(asdict(cell)), False), (key_of(asdict(cell)), headline)}
    return chosen


def measure(args, scale, device, results):
    """Measure what was asked for and is missing, writing the results after every cell; False where
    something was wrong.
    """
    began = time.perf_counter()
    pending = missing(args, scale, results)
    grade = (args.accuracy or not (args.headline or args.grid)) and (
        args.again or not results["accuracy"]
    )
    if not pending and not grade:
        print("everything asked for is there already")
        return True
    here, subject, loaded, longest, fine = len(results["environments"]), None, None, 0.0, True
    results["environments"].append(environment(device))
    limits = results["environments"][-1].get("ceilings")
    for key, cell, headline in pending:
        started = time.perf_counter()
        if started - began + longest > 60 * args.minutes:
            print(f"out of time before {cell}: run the same command again", flush=True)
            break
        if key != loaded:
            subject = None
            tidy()
            subject, loaded = Subject(key, scale, device), key
            error = subject.logits_error()
            if error > 0.2:
                raise SystemExit(
                    f"{subject.name}: the logits of bench/plain.py are off by {error:.2f}: nothing is measured"
                )
        rows = measure_cell(subject, cell, limits, headline, args.ways)
        for row in rows:
            row["environment"] = here
        results["rows"] = [
            row for row in results["rows"] if key_of(row) != key_of(asdict(cell))
        ] + rows
        fine &= not any("wrong" in row for row in rows)
        write(args.out, results)
        longest = max(longest, time.perf_counter() - started)
        print(f"{report.cell_table(rows)}\n{time.perf_counter() - started:.0f} s\n", flush=True)
    subject = None
    tidy()
    if grade:
        results["accuracy"] = {
            "environment": here,
            "results": accuracy(str(device), args.problems, reference=args.reference),
        }
        write(args.out, results)
    return fine


def write(path, results):
    """As JSON, one line a row, in place of the old file."""

    def lines(items):
        return ",\n".join(f"  {json.dumps(item)}" for item in items)

    text = f'{{\n "environments": [\n{lines(results["environments"])}\n ],\n "rows": [\n{lines(results["rows"])}\n ],\n'
    text += f' "accuracy": {json.dumps(results["accuracy"])}\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)


def merged(paths):
    """One set of results out of several files; of a way of a cell that is in several, the last
    counts.
    """
    results, cells = {"environments": [], "rows": [], "accuracy": None}, {}
    for path in paths:
        part = json.loads(path.read_text())
        shift = len(results["environments"])
        results["environments"] += part["environments"]
        for row in part["rows"]:
            cell = cells.setdefault(key_of(row), {})
            if any(other["headline"] != row["headline"] for other in cell.values()):
                cell.clear()
            cell[row["way"]] = row | {"environment": row["environment"] + shift}
        if part["accuracy"]:
            results["accuracy"] = part["accuracy"] | {
                "environment": part["accuracy"]["environment"] + shift
            }
    order = [way.name for way in WAYS + OPTIONS]
    results["rows"] = [
        row
        for cell in cells.values()
        for row in sorted(cell.values(), key=lambda row: order.index(row["way"]))
    ]
    return with_used_environments(results)


def with_used_environments(results):
    """The results without the environments of which nothing is left."""
    measured = [*results["rows"], *([results["accuracy"]] if results["accuracy"] else [])]
    used = sorted({item["environment"] for item in measured})
    for item in measured:
        item["environment"] = used.index(item["environment"])
    return results | {"environments": [results["environments"][number] for number in used]}


def numbers(text):
    return [int(part) for part in text.split(",")]


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--headline",
        action="store_true",
        help="LLaDA-8B, one row, the longest canvas, decoded whole",
    )
    parser.add_argument(
        "--grid", action="store_true", help="every model, canvas and number of rows"
    )
    parser.add_argument(
        "--accuracy", action="store_true", help="the embedded models, captured and eager"
    )
    parser.add_argument(
        "--only", type=lambda text: text.split(","), metavar="MODELS", help="llada, dream"
    )
    parser.add_argument("--canvas", type=numbers, help="of the grid: 512,1024,1280,2048")
    parser.add_argument("--rows", type=numbers, help="of the grid: 1,4,8,16,32")
    parser.add_argument(
        "--ways",
        type=lambda text: text.split(","),
        default=[""],
        metavar="TEXTS",
        help="of every cell only the ways whose names hold one of these: plain,dual",
    )
    parser.add_argument("--problems", type=int, default=1000, help="of the accuracy part")
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="of the accuracy part: the CPU's answers, made before",
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no cell that would end later"
    )
    parser.add_argument(
        "--again", action="store_true", help="measure anew what the file already holds"
    )
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="measure nothing: tables and plots of FILE"
    )
    parser.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help="with --report: also put the headline between its marks",
    )
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="measure nothing: put files together in --out",
    )
    args = parser.parse_args(argv)
    if args.merge and not args.out:
        parser.error("--merge needs --out")
    for name, known in (("only", MODELS), ("canvas", (REAL if timing.ON_GPU else SMOKE).canvases)):
        unknown = set(getattr(args, name) or ()) - set(known)
        if unknown:
            parser.error(
                f"--{name}: expected some of {', '.join(map(str, known))}, got {', '.join(map(str, unknown))}"
            )
    return args


def main(argv=None) -> int:
    args = parse(argv)
    if args.report:
        report.write_report(args.report, args.readme)
        return 0
    if args.merge:
        write(args.out, merged(args.merge))
        return 0
    device = timing.DEVICE
    gpu = torch.cuda.get_device_name(device) if timing.ON_GPU else None
    args.out = args.out or RESULTS / f"end-to-end-{slug(gpu)}.json"
    results = merged([args.out] if args.out.exists() else [])
    if not timing.ON_GPU:
        torch.set_num_threads(1)  # at these shapes threads cost more than they bring
        print(
            "No GPU: tiny models on the CPU. This says that the benchmark works, and nothing about speed.",
            flush=True,
        )
    fine = measure(args, REAL if timing.ON_GPU else SMOKE, device, results)
    report.write_report(args.out)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
