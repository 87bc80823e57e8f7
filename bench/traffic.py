"""Requests that come and go: the Engine beside static batches and one by one.

    python bench/traffic.py [--part cold,options,rules,stream,saturated,open,host] [--seconds 10]
    python bench/traffic.py --part soak
    python bench/traffic.py --smoke
    python bench/traffic.py --report FILE [--readme FILE]

LLaDA-8B's shape, weights drawn at random on the GPU, and a scripted rule: 8 forwards a block, no
text ends early. Results go to bench/results/traffic-<gpu>.json (or --out FILE), part by part, with
tables and a plot beside it; what a part measures anew takes the place of what was there.

cold       In fresh processes, with an empty compile cache and with what the process before left in
           it: seconds of the engine's warm_up, and of a first request without it; what was
           compiled, loaded and captured.
options    Without warm_up, one request six times under each option that trades accuracy for time:
           the first time, the second, and later ones.
rules      A cached step at batch 1 under rules with a branch in the kernel, without one, functions,
           and with filters, in turns.
stream     After warm_up, requests one after another, three times over: means, the worst, each over
           its own best. Anything that is compiled, loaded or captured in it is a failure.
check      Before anything is told: requests at once in the engine get the tokens that `generate`
           gives for each alone (in 16 bits as many forwards, and no mask left). Where they do not,
           no time is told, and the exit status is 1.
saturated  Tokens a second with all requests there from the beginning, equal and mixed lengths:
           engine and static batches in turns, and one by one.
open       Requests come at random at half, 0.8 and all of what static batches reach, for --seconds
           at each load: tokens a second, and times of a request and of its first token.
host       What the host adds to a turn: its wall time over that of its captured forward alone.
soak       On a CPU with a tiny model: 10,000 requests, nothing lost or doubled, memory and threads
           flat. Goes to bench/results/traffic-cpu.json.

Without --part all but soak are measured: some nine minutes on an H200. On a machine
without a GPU, or with --smoke, the same parts run at small sizes on a CPU: that says that the
benchmark works, and nothing about speed; the results go to the folder for temporary files.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import tables
import timing
import torch
from traffic_parts import cold, figures, measuring, options, report, rules
from traffic_parts.answering import Answering
from traffic_parts.asked import LARGE, SMALL, mixed
from traffic_parts.soak import soak

TIMED = ("cold", "options", "rules", "stream", "saturated", "open", "host")
PARTS = (*TIMED, "soak")
# Lists of rows in the results file.
LISTS = (
    "warm_up",
    "check",
    "cold",
    "options",
    "rules",
    "stream",
    "stream_requests",
    "saturated",
    "open",
    "host",
    "soak",
)


class Benchmark:
    """One run: what it was asked for, and the results that it adds to."""

    def __init__(self, args, size, device, results):
        self.args, self.size, self.device = args, size, device
        self.results = results
        facts = tables.environment(device) | {"command": tables.command("traffic.py")}
        self.here = len(results["environments"])
        results["environments"].append(facts)
        self.fine = True

    def run(self) -> bool:
        """Measure what was asked for, writing the results after each part; False where something
        was wrong.
        """
        parts = self.args.part
        if "cold" in parts:
            with elapsed("cold"):
                rows = cold.cold(__file__, self.device.type == "cuda", self.args.smoke)
            self.keep(cold=rows)
        if "options" in parts:
            with elapsed("options"):
                rows = options.options(self.size, self.device)
            self.keep(options=rows)
        if "rules" in parts:
            with elapsed("rules"):
                rows = rules.rules(self.size, self.device)
            self.keep(rules=rows)
        if set(parts) - {"cold", "options", "rules", "soak"}:
            self.measure_in_this_process(parts)
        if "soak" in parts:
            with elapsed("soak"):
                rows, wrong = soak(self.size.soaked)
            rows[-1]["wrong"] = wrong
            self.say_if("soak", "; ".join(wrong))
            self.keep(soak=rows)
        return self.fine

    def measure_in_this_process(self, parts) -> None:
        """All but cold and soak. The stream comes first: nothing is compiled yet but by the
        engine's own warm_up. It is told of after the check.
        """
        with elapsed("model and engine"):
            answering = Answering(self.size, self.device)
        with answering.engine:
            with elapsed("warm_up"):
                warm_up = measuring.warmed(answering)
            found = {}
            if "stream" in parts:
                with elapsed("stream"):
                    during, requests = measuring.streamed(answering)
                found = {"warm_up": [warm_up], "stream": [during], "stream_requests": requests}
                made = measuring.made_in_traffic(during)
                self.say_if("stream", made and f"after warm_up: {made}")
            with elapsed("warm_up of generate, check"):
                answering.warm_up_generate()
                check = measuring.checked(answering)
            self.say_if("check", "; ".join(check["wrong"]))
            if check["wrong"]:
                print("no times are told", flush=True)
                return
            self.keep(check=[check], **found)
            self.measure_ways(answering, parts)

    def measure_ways(self, answering, parts) -> None:
        alone = []
        if "saturated" in parts:
            with elapsed("one by one"):
                wanted = mixed(answering.config, self.size, self.size.saturated)
                alone = measuring.answered_alone(answering, wanted)
            with elapsed("saturated"):
                rows = measuring.saturated(answering, alone)
            self.keep(saturated=rows)
        if "open" in parts:
            static = figures.one(self.results["saturated"], lengths="mixed", way="static")
            if not static:
                raise SystemExit("--part open: loads are shares of what --part saturated finds")
            with elapsed("open"):
                rows = measuring.opened(answering, figures.rate(static), alone)
            self.keep(open=rows)
        if "host" in parts:
            with elapsed("host"):
                rows = measuring.host_share(answering)
            self.keep(host=rows)

    def keep(self, **lists) -> None:
        """Put these lists of rows in place of what the results hold of them, and write all."""
        for name, rows in lists.items():
            self.results[name] = [row | {"environment": self.here} for row in rows]
        tables.write_json(self.args.out, with_used_environments(self.results))

    def say_if(self, part: str, wrong: str | None) -> None:
        if wrong:
            self.fine = False
            print(f"FAILED: {part}: {wrong}", flush=True)


def with_used_environments(results: dict) -> dict:
    """The results without the environments of which nothing is left."""
    used = sorted({row["environment"] for name in LISTS for row in results[name]})
    kept = {"environments": [results["environments"][number] for number in used]}
    for name in LISTS:
        rows = results[name]
        kept[name] = [row | {"environment": used.index(row["environment"])} for row in rows]
    return kept


def loaded(path: Path) -> dict:
    """The results that a file holds, or none."""
    results = json.loads(path.read_text()) if path.exists() else {}
    return {name: results.get(name, []) for name in ("environments", *LISTS)}


@contextmanager
def elapsed(what: str):
    """Print how long a part took."""
    began = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - began:.1f} s", flush=True)


def parts_of(text: str) -> list[str]:
    parts = text.split(",")
    unknown = set(parts) - set(PARTS)
    if unknown:
        expected, got = ", ".join(PARTS), ", ".join(sorted(unknown))
        raise argparse.ArgumentTypeError(f"expected some of {expected}, got {got}")
    return parts


def seconds_of(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return seconds


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", type=parts_of, metavar="PARTS", help=f"some of {', '.join(PARTS)}")
    add("--seconds", type=seconds_of, help="in which requests come, at each load of part open")
    add("--smoke", action="store_true", help="tiny models on the CPU, few requests")
    add("--out", type=Path, metavar="FILE", help="the results file")
    add("--report", type=Path, metavar="FILE", help="measure nothing: tables and plot of a file")
    add("--readme", type=Path, metavar="FILE", help="with --report: fill this page's marks")
    add("--child", choices=cold.KINDS, help=argparse.SUPPRESS)
    return parser


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    if args.report:
        report.write_report(args.report, args.readme)
        return 0
    only_soak = args.part == ["soak"]
    args.smoke |= not timing.ON_GPU and not only_soak
    size = SMALL if args.smoke else LARGE
    device = torch.device("cpu") if args.smoke or only_soak else timing.DEVICE
    if device.type == "cpu":
        torch.set_num_threads(1)  # at these shapes threads cost more than they bring
    if args.child:
        print(json.dumps(cold.begin(args.child, size, device)))
        return 0
    if args.smoke:
        print("Tiny models on the CPU: the benchmark works or not, speed is another matter.")
    args.part = args.part or list(PARTS if args.smoke else TIMED)
    if args.seconds:
        size = replace(size, seconds=args.seconds)
    args.out = args.out or default_file(args.smoke, device)
    benchmark = Benchmark(args, size, device, loaded(args.out))
    with elapsed("all"):
        fine = benchmark.run()
    if args.out.exists():
        report.write_report(args.out)
    return 0 if fine else 1


def default_file(smoke: bool, device: torch.device) -> Path:
    """Where results go: those of a smoke test say nothing and are not kept with the others."""
    if smoke:
        return Path(tempfile.gettempdir()) / "traffic-smoke.json"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return tables.RESULTS / f"traffic-{tables.slug(gpu)}.json"


if __name__ == "__main__":
    sys.exit(main())
