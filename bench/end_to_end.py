"""Whole requests at the real shapes of LLaDA-8B and Dream-7B: our decoding beside what the
published implementation does.

    python bench/end_to_end.py [--headline] [--grid] [--accuracy] [--only llada] [--canvas 2048]
                               [--rows 1,8] [--minutes 9]
    python bench/end_to_end.py --host replaced [--grid] [--interface] [--only llada]
    python bench/end_to_end.py --report FILE [--readme FILE]
    python bench/end_to_end.py --merge FILE ... --out FILE

The first line measures native models, the second models after `replace_attention`, the third makes
tables and two plots of a results file, the last puts several files together.

Without a choice everything is measured. Results go to bench/results/end-to-end-<gpu>.json, those of
replaced models to replaced-models-<gpu>.json (or --out FILE) after every cell; cells that are there
already are skipped (--again measures them anew), so that several short runs add up.

Weights are drawn at random, and random weights have no confidence: a scripted rule, `Quota`,
commits a fixed number of positions a step. A *cell* is one request shape: model, canvas, rows. Its
*ways* of decoding take turns within one run. With `--host replaced` the ways are three models on
the same weights, eager and captured, with the dual cache: the native one, transformers' class and
the published module structure, these after `replace_attention`.

checked       Two blocks at the end of the canvas are decoded first: no mask left, forwards as
              scripted, captured the same tokens as eager, steps really captured, logits near the
              native model's. A way that fails is not timed, and the exit status is 1. The peak
              memory is that of this run.
timed         A few blocks of the same canvas at two commit rates: wall time, the GPU idle before
              and after. Dual decodes the last ones, since all cost alike; prefix those in the
              middle, since its steps get cheaper from block to block. Least squares over the
              medians of all runs give the time of a refresh and of a cached step.
whole         For the headline the dual ways also decode the whole request, at 128 and 160 forwards
              for 1024 positions.
extrapolated  The time of a request that was not decoded whole comes from the fit, and is marked so.
interface     attn_implementation="fastdllm" on small Llama, Qwen2 and Qwen3 models in bf16, batches
              padded on either side: its largest error against fp32 is at most twice that of sdpa.
kernels       Of replaced models, how many kernels a cached step launches, by torch.profiler: last,
              for profiling slows down what comes after it.

On a machine without a GPU the same commands run tiny models: a smoke test.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import tables
import timing
import torch
from end_to_end_accuracy import accuracy
from race import replaced_report, report
from race.interface import interface_checks
from race.measure import kernels_a_step, measure_cell
from race.results import cell_of, empty, host_of, merged
from race.shapes import MODELS, REAL, REPLACED_WAYS, SMOKE, Cell, ways_of
from race.subject import Subject, tidy

HOSTS = ("native", "replaced")
PARTS = {"native": ("headline", "grid", "accuracy"), "replaced": ("grid", "interface")}
FILES = {"native": "end-to-end", "replaced": "replaced-models"}


class Task(NamedTuple):
    """One cell to be measured: its model's key, and whether it is the headline."""

    key: str
    cell: Cell
    headline: bool


class Benchmark:
    """One run of the benchmark: what it was asked for, and the results that it adds to."""

    def __init__(self, args, scale, device, results):
        self.args, self.scale = args, scale
        self.device, self.results = device, results
        self.parts = {part for part in PARTS[args.host] if getattr(args, part)}
        if not self.parts:
            self.parts = set(PARTS[args.host])
        self.began = time.perf_counter()
        self.fine = True
        # This run's environment and the GPU's ceilings, found out when something is missing.
        self.here = None
        self.limits = None

    def run(self) -> bool:
        """Measure what was asked for and is missing, writing the results after every cell; False
        where something was wrong.
        """
        tasks = self.missing_cells()
        grades = "accuracy" in self.parts and self.lacks("accuracy")
        checks = "interface" in self.parts and self.lacks("checks")
        counted = self.models_to_count()
        if not tasks and not grades and not checks and not counted:
            print("everything asked for is there already")
            return True
        self.add_environment()
        self.measure_cells(tasks)
        if grades:
            self.measure_accuracy()
        if checks:
            self.measure_interface()
        for key in counted:
            self.count_kernels(key)
        return self.fine

    def lacks(self, name) -> bool:
        return self.args.again or not self.results[name]

    def cells_asked_for(self) -> list[Task]:
        """The cells in the order in which they are measured."""
        args, scale = self.args, self.scale
        keys = args.only or list(MODELS)
        tasks = []
        if "headline" in self.parts:
            for key in keys if args.only else ["llada"]:
                tasks.append(Task(key, self.cell(key, scale.headline, 1), True))
        if "grid" not in self.parts:
            return tasks
        for key in keys:
            shapes = [
                (canvas, rows)
                for rows in args.rows or scale.rows
                for canvas in args.canvas or reversed(scale.canvases)
            ]
            if args.host == "replaced" and not args.rows and not args.canvas:
                shapes = scale.replaced
            tasks += [Task(key, self.cell(key, *shape), False) for shape in shapes]
        return tasks

    def cell(self, key, canvas, rows) -> Cell:
        return Cell(self.scale.names[key], canvas, self.scale.canvases[canvas], rows)

    def missing_cells(self) -> list[Task]:
        """Of the cells asked for, those that the results do not hold yet; the headline's, decoded
        whole, counts for the grid too.
        """
        there = set()
        if not self.args.again:
            for row in self.results["rows"]:
                there |= {(cell_of(row), False), (cell_of(row), row.get("headline", False))}
        tasks = []
        for task in self.cells_asked_for():
            cell = cell_of(asdict(task.cell))
            if (cell, task.headline) not in there:
                tasks.append(task)
                there |= {(cell, False), (cell, task.headline)}
        return tasks

    def add_environment(self) -> None:
        facts = tables.environment(self.device) | {"command": tables.command("end_to_end.py")}
        if self.args.host == "replaced":
            facts["transformers"] = tables.installed("transformers")
        if timing.ON_GPU:
            facts["ceilings"] = self.limits = timing.ceilings()
        self.here = len(self.results["environments"])
        self.results["environments"].append(facts)

    def measure_cells(self, tasks) -> None:
        """Measure the cells, model by model, while there is time."""
        subject, loaded, longest = None, None, 0.0
        for task in tasks:
            started = time.perf_counter()
            if started - self.began + longest > 60 * self.args.minutes:
                print(f"out of time before {task.cell}: run the same command again", flush=True)
                break
            if task.key != loaded:
                subject = None  # freed before the next one is made
                tidy()
                subject, loaded = Subject(task.key, self.scale, self.device), task.key
            self.measure(subject, task)
            took = time.perf_counter() - started
            longest = max(longest, took)
            print(f"{took:.0f} s\n", flush=True)
        subject = None
        tidy()

    def measure(self, subject, task) -> None:
        """Measure one cell, in place of its rows so far."""
        ways = [
            way
            for way in ways_of(self.args.host, task.headline)
            if any(text in way.name for text in self.args.ways)
        ]
        rows = measure_cell(subject, task.cell, ways, self.limits, task.headline)
        for row in rows:
            row["environment"] = self.here
        cell = cell_of(asdict(task.cell))
        others = [row for row in self.results["rows"] if cell_of(row) != cell]
        self.results["rows"] = others + rows
        self.fine &= not any("wrong" in row for row in rows)
        self.write()
        replaced = self.args.host == "replaced"
        cell_table = replaced_report.cell_table if replaced else report.cell_table
        print(cell_table(rows), flush=True)

    def measure_accuracy(self) -> None:
        found = accuracy(str(self.device), self.args.problems, reference=self.args.reference)
        self.results["accuracy"] = {"environment": self.here, "results": found}
        self.write()

    def measure_interface(self) -> None:
        checks = interface_checks(self.device)
        self.results["checks"] = [check | {"environment": self.here} for check in checks]
        self.fine &= all(check["passed"] for check in checks)
        self.write()

    def models_to_count(self) -> list[str]:
        """The keys of the replaced models whose kernels are not counted yet."""
        if not timing.ON_GPU or self.args.host != "replaced" or "grid" not in self.parts:
            return []
        there = set()
        if not self.args.again:
            there = {count["model"] for count in self.results["kernels"]}
        keys = self.args.only or list(MODELS)
        return [key for key in keys if self.scale.names[key] not in there]

    def count_kernels(self, key) -> None:
        """Count the kernels of a cached step of one model's hosts; eager and captured launch the
        same.
        """
        subject = Subject(key, self.scale, self.device)
        cell = self.cell(key, *self.scale.replaced[0])
        counts = [count for count in self.results["kernels"] if count["model"] != subject.name]
        for way in REPLACED_WAYS:
            if way.captured:
                continue
            kernels = kernels_a_step(subject, way, cell)
            counted = {"model": subject.name, "host": way.host, "kernels": kernels}
            counts.append(counted | {"environment": self.here})
        self.results["kernels"] = counts
        self.write()
        subject = None
        tidy()

    def write(self) -> None:
        tables.write_json(self.args.out, self.results)


def numbers(text) -> list[int]:
    return [int(part) for part in text.split(",")]


def names(text) -> list[str]:
    return text.split(",")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--host", choices=HOSTS, default="native", help="whose modeling code runs")
    add("--headline", action="store_true", help="LLaDA-8B, B 1, the longest canvas, decoded whole")
    add("--grid", action="store_true", help="every model, canvas and number of rows")
    add("--accuracy", action="store_true", help="the embedded models, captured and eager")
    add("--interface", action="store_true", help='attn_implementation="fastdllm" against sdpa')
    add("--only", type=names, metavar="MODELS", help="llada, dream")
    add("--canvas", type=numbers, help="of the grid: 512,1024,1280,2048")
    add("--rows", type=numbers, help="of the grid: 1,4,8,16,32")
    add(
        "--ways",
        type=names,
        default=[""],
        metavar="TEXTS",
        help="of every cell only the ways whose names hold one of these: plain,dual",
    )
    add("--problems", type=int, default=1000, help="of the accuracy part")
    add("--minutes", type=float, default=float("inf"), help="begin no cell that would end later")
    add("--again", action="store_true", help="measure anew what the file already holds")
    add_files(add)
    return parser


def add_files(add) -> None:
    """The options that name files."""
    add(
        "--reference",
        type=Path,
        metavar="FILE",
        help="of the accuracy part: the CPU's answers, made before",
    )
    add("--out", type=Path, metavar="FILE", help="the results file, instead of the usual one")
    add(
        "--report",
        type=Path,
        metavar="FILE",
        help="measure nothing: tables and plots of FILE",
    )
    add(
        "--readme",
        type=Path,
        metavar="FILE",
        help="with --report: also put the short table between its marks",
    )
    add(
        "--merge",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="measure nothing: put files together in --out",
    )


def parse(argv) -> argparse.Namespace:
    options = parser()
    args = options.parse_args(argv)
    if args.merge and not args.out:
        options.error("--merge needs --out")
    scale = REAL if timing.ON_GPU else SMOKE
    for name, known in (("only", MODELS), ("canvas", scale.canvases)):
        unknown = set(getattr(args, name) or ()) - set(known)
        if unknown:
            expected, got = ", ".join(map(str, known)), ", ".join(map(str, unknown))
            options.error(f"--{name}: expected some of {expected}, got {got}")
    others = set(PARTS["native"] + PARTS["replaced"]) - set(PARTS[args.host])
    for part in sorted(others):
        if getattr(args, part):
            options.error(f"--{part}: not with --host {args.host}")
    return args


def main(argv=None) -> int:
    args = parse(argv)
    if args.report:
        report.write_report(args.report, args.readme)
        return 0
    if args.merge:
        tables.write_json(args.out, merged(args.merge))
        return 0
    device = timing.DEVICE
    gpu = torch.cuda.get_device_name(device) if timing.ON_GPU else None
    args.out = args.out or tables.RESULTS / f"{FILES[args.host]}-{tables.slug(gpu)}.json"
    results = merged([args.out]) if args.out.exists() else empty(args.host)
    if host_of(results) != args.host:
        raise SystemExit(f"--out: {args.out} holds results of --host {host_of(results)}")
    if not timing.ON_GPU:
        torch.set_num_threads(1)  # at these shapes threads cost more than they bring
        print(
            "No GPU: tiny models on the CPU. This says that the benchmark works, and nothing about "
            "speed.",
            flush=True,
        )
    benchmark = Benchmark(args, REAL if timing.ON_GPU else SMOKE, device, results)
    fine = benchmark.run()
    report.write_report(args.out)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
