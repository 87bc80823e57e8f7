"""The server under load, over HTTP on 127.0.0.1.

    python bench/load.py --part soak [--requests 5000] [--clients 64]
    python bench/load.py --part speed
    python bench/load.py --part replicas
    python bench/load.py --smoke
    python bench/load.py --report FILE

soak     On a CPU with tiny-llada: many clients at once, a tenth of whom go away and a tenth of whom
         ask for what is refused; every answer is that of `generate`, memory, threads and file
         descriptors stay as they are. Goes to bench/results/load-cpu.json. Some five minutes.
speed    LLaDA-8B's shape, weights drawn at random on the GPU, and a scripted rule: tokens a second
         through HTTP beside the engine's own at 16 rows, and the time to the first final token.
         Goes to bench/results/load-<gpu>.json. Without a GPU, or with --smoke, a tiny model on a
         CPU: that says that it works, and nothing about speed; it goes to a temporary file.
replicas  The same requests through Ray Serve to one replica and to two, a GPU each. Needs the extra
         `ray`.

Needs the packages of the extra `serve`. The exit status is 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import tables
import timing
import torch
from load_parts import report
from load_parts.soak import soak
from load_parts.speed import LARGE, SMALL, speed

PARTS = ("soak", "speed", "replicas")
CPU = torch.device("cpu")
SMOKE_REQUESTS, SMOKE_CLIENTS = 60, 8


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    if args.report:
        report.write_report(args.report)
        return 0
    smoke = args.smoke or (args.part in ("speed", "replicas") and not timing.ON_GPU)
    device = CPU if smoke or args.part == "soak" else timing.DEVICE
    if device.type == "cpu":
        torch.set_num_threads(1)  # at these shapes threads cost more than they bring
    out = args.out or default_file(smoke, device)
    results = json.loads(out.read_text()) if out.exists() else {}
    results = {name: results.get(name, []) for name in ("environments", *PARTS)}
    facts = tables.environment(device) | {"command": tables.command("load.py")}
    fine = True
    if args.part in (None, "soak"):
        count, clients = args.requests, args.clients
        if smoke:
            count, clients = min(count, SMOKE_REQUESTS), min(clients, SMOKE_CLIENTS)
        rows, wrong = soak(count, clients)
        rows[-1] |= {"wrong": wrong, "clients": clients}
        results["soak"] = rows
        fine = not wrong
        print("\n".join(wrong) or "soak: nothing is wrong", flush=True)
    if args.part in (None, "speed"):
        results["speed"] = speed(SMALL if smoke else LARGE, device)
        print(report.speed_verdict(results["speed"]), flush=True)
    if args.part == "replicas":
        from load_parts.replicas import replicas

        results["replicas"] = replicas(SMALL if smoke else LARGE, on_gpus=not smoke)
    others = [one for one in results["environments"] if one["command"] != facts["command"]]
    results["environments"] = [*others, facts]
    tables.write_json(out, results)
    report.write_report(out)
    return 0 if fine else 1


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", choices=PARTS, help="default: soak and speed")
    add("--requests", type=int, default=5000, help="of the soak (%(default)s)")
    add("--clients", type=int, default=64, help="of the soak, at once (%(default)s)")
    add("--smoke", action="store_true", help="few requests, tiny models on the CPU")
    add("--out", type=Path, metavar="FILE", help="the results file")
    add("--report", type=Path, metavar="FILE", help="measure nothing: the tables of a file")
    return parser


def default_file(smoke: bool, device: torch.device) -> Path:
    """Where results go: those of a smoke test say nothing and are not kept with the others."""
    if smoke:
        return Path(tempfile.gettempdir()) / "load-smoke.json"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return tables.RESULTS / f"load-{tables.slug(gpu)}.json"


if __name__ == "__main__":
    sys.exit(main())
