"""Random decodes and kernel calls against oracles, outside of the tests: `make fuzz`, or

python tests/fuzz.py --decodes 10000 --kernel-calls 1000 --seed 0 --out bench/results/fuzz.json
python tests/fuzz.py --seed 0 --only decode:123        one case, in this process

fuzz_decodes.py and fuzz_kernels.py say what is drawn and what must hold. Cases are numbered and
follow from the seed. They run in processes of their own, so that one that crashes or hangs is a
failure like another. A failure prints the case as Python, made smaller where it fails alike, and
the run goes on; the exit status is 1 if there was any. With --device cuda the kernels are compiled,
and captured forwards are compared with eager ones.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections import Counter, deque
from contextlib import suppress
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path

MODULES = {"decode": "fuzz_decodes", "kernel": "fuzz_kernels"}
# Cases that a process gets at once: as many decodes as share a model.
CHUNK = {"decode": 25, "kernel": 5}
SHRINKING_SECONDS = 20


def parser():
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--decodes", type=int, default=10000)
    parse.add_argument("--kernel-calls", type=int, default=1000)
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parse.add_argument("--processes", type=int, help="default: one a core, at most 8 on a GPU")
    parse.add_argument("--limit", type=float, default=300, help="seconds that one case may take")
    parse.add_argument("--only", metavar="KIND:NUMBER", help="one case: decode:123 or kernel:45")
    parse.add_argument("--out", type=Path, help="where the result goes, as JSON")
    return parse


def prepare(device):
    """What must be so before triton is imported, here and in the processes to come."""
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ.pop("FASTDLLM_BACKEND", None)
    # The interpreter's arithmetic of infinities and NaN.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::RuntimeWarning")


def draw(kind, seed, number, device):
    """(the module that knows the kind, the case of that number)."""
    module = __import__(MODULES[kind])
    if kind == "decode":
        return module, module.random_case(seed, number)
    return module, module.random_call(seed, number, device)


def run_case(kind, seed, number, device):
    """One case: (its options, what `check` found, how a failure is made again)."""
    module, case = draw(kind, seed, number, device)
    outcome = module.check(case, device)
    failures = []
    if outcome.failures:
        small = smaller(module, case, outcome, device)
        failures = [describe(kind, seed, number, device, small, *f) for f in outcome.failures]
    return module.options_of(case), outcome, failures


def describe(kind, seed, number, device, case, oracle, text):
    again = f"python tests/fuzz.py --seed {seed} --device {device} --only {kind}:{number}"
    code = f"from {MODULES[kind]} import *; print(check({case!r}, {device!r}))"
    return {
        "kind": kind,
        "number": number,
        "oracle": oracle,
        "text": text,
        "again": again,
        "case": code,
    }


def smaller(module, case, outcome, device, until=None):
    """The smallest case found in a while in which the same oracle disagrees."""
    oracles = {name for name, _ in outcome.failures}
    until = until or time.monotonic() + SHRINKING_SECONDS
    steps = module.simpler(case) if hasattr(module, "simpler") else ()
    for other in steps:
        if time.monotonic() > until:
            return case
        if oracles & {name for name, _ in module.check(other, device).failures}:
            return smaller(module, other, outcome, device, until)
    return case


def work(pipe, seed, device):
    """A process: chunks of cases come, what was found goes back case by case."""
    prepare(device)
    import torch

    torch.set_num_threads(1)
    with suppress(EOFError):  # the other end is gone
        while True:
            kind, numbers = pipe.recv()
            for number in numbers:
                pipe.send((kind, number, *run_case(kind, seed, number, device)))


class Worker:
    """One process at work on a chunk of cases; it may die or hang."""

    def __init__(self, seed, device):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, seed, device), daemon=True)
        self.process.start()
        theirs.close()
        self.kind, self.numbers, self.began = None, deque(), time.monotonic()

    def give(self, kind, numbers):
        self.kind, self.numbers = kind, deque(numbers)
        self.began = time.monotonic()
        with suppress(BrokenPipeError):  # it has just died: `receive` will say so
            self.pipe.send((kind, list(numbers)))

    def receive(self):
        """What it found in the case at hand; None where the process has ended."""
        try:
            found = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            return None
        self.numbers.popleft()
        self.began = time.monotonic()
        return found

    def stop(self):
        self.process.terminate()
        self.process.join()
        self.pipe.close()


class Tally:
    """What the run found so far."""

    def __init__(self):
        self.done, self.options, self.checks = Counter(), {}, Counter()
        self.near_ties, self.failures = 0, []

    def add(self, kind, options, outcome, failures):
        self.done[kind] += 1
        self.checks.update(outcome.checks)
        self.near_ties += outcome.near_ties
        for name, value in options.items():
            counts = self.options.setdefault(f"{kind} {name}", Counter())
            counts[value] += 1
        for failure in failures:
            self.fail(failure)

    def fail(self, failure):
        self.failures.append(failure)
        for name in ("kind", "number", "oracle", "text", "again", "case"):
            print(f"  {name:8}{failure[name]}", file=sys.stderr)
        print(file=sys.stderr, flush=True)


def chunks(counts):
    """Every case in chunks, the kinds spread evenly over the run so that its end can be told."""
    spread = []
    for kind, count in counts.items():
        for start in range(0, count, CHUNK[kind]):
            numbers = range(start, min(start + CHUNK[kind], count))
            spread.append((start / count, kind, numbers))
    return deque((kind, numbers) for _, kind, numbers in sorted(spread, key=lambda part: part[:2]))


def run(counts, seed, device, processes, limit):
    """All cases over so many processes; returns a Tally."""
    waiting, tally = chunks(counts), Tally()
    progress = Progress(counts, tally)
    workers = []
    try:
        while waiting or workers:
            while waiting and len(workers) < processes:
                workers.append(Worker(seed, device))
                workers[-1].give(*waiting.popleft())
            ready = wait([worker.pipe for worker in workers], timeout=5)
            for worker in list(workers):
                if not serve(worker, worker.pipe in ready, waiting, tally, seed, device, limit):
                    worker.stop()
                    workers.remove(worker)
            progress.show()
    finally:
        for worker in workers:
            worker.stop()
    return tally


def serve(worker, ready, waiting, tally, seed, device, limit):
    """Take what a worker found and give it more. False where it goes: it died, hung or is done."""
    cause, found = None, None
    if ready:
        found = worker.receive()
        if found is None:
            worker.process.join()
            cause = f"the process ended with {worker.process.exitcode}"
    elif time.monotonic() - worker.began > limit:
        cause = f"no answer after {limit:g} seconds"
    if cause:
        number = worker.numbers.popleft()
        _, case = draw(worker.kind, seed, number, device)
        tally.done[worker.kind] += 1
        tally.fail(describe(worker.kind, seed, number, device, case, "process", cause))
        if worker.numbers:
            waiting.appendleft((worker.kind, list(worker.numbers)))
        return False
    if found:
        kind, _, *rest = found
        tally.add(kind, *rest)
        if not worker.numbers:
            if not waiting:
                return False
            worker.give(*waiting.popleft())
    return True


class Progress:
    """A line every ten seconds: what is done, what failed, how long it will take."""

    def __init__(self, counts, tally):
        self.counts, self.tally = counts, tally
        self.began = self.shown = time.monotonic()

    def show(self):
        now, done = time.monotonic(), self.tally.done
        if now - self.shown < 10 or not sum(done.values()):
            return
        self.shown = now
        share = sum(done.values()) / sum(self.counts.values())
        left = (now - self.began) * (1 - share) / share
        parts = [f"{kind}s {done[kind]}/{count}" for kind, count in self.counts.items()]
        parts += [f"failures {len(self.tally.failures)}", f"near ties {self.tally.near_ties}"]
        minutes, seconds = divmod(round(left), 60)
        parts.append(f"{minutes}:{seconds:02} left")
        print(", ".join(parts), file=sys.stderr, flush=True)


def result(options, tally, seconds):
    """What goes into the file."""
    versions = {name: version(name) for name in ("torch", "triton", "numpy")}
    versions |= {"python": platform.python_version(), "machine": platform.machine()}
    if options.device == "cuda":
        import torch

        versions["gpu"] = torch.cuda.get_device_name()
    return {
        "command": f"python tests/fuzz.py --decodes {options.decodes} "
        f"--kernel-calls {options.kernel_calls} --seed {options.seed} --device {options.device}",
        "seed": options.seed,
        "versions": versions,
        "kernels": "interpreted" if options.device == "cpu" else "compiled",
        "seconds": round(seconds),
        "done": dict(tally.done),
        "checks": dict(sorted(tally.checks.items())),
        "options": {name: dict(sorted(c.items())) for name, c in sorted(tally.options.items())},
        "near_ties": tally.near_ties,
        "failures": tally.failures,
    }


def only(text, seed, device):
    """One case in this process; returns the exit status."""
    kind, _, number = text.partition(":")
    if kind not in MODULES or not number.isdigit():
        raise SystemExit(f"--only: expected decode:NUMBER or kernel:NUMBER, got {text!r}")
    tally = Tally()
    tally.add(kind, *run_case(kind, seed, int(number), device))
    print(f"checks {dict(tally.checks)}, near ties {tally.near_ties}")
    return 1 if tally.failures else 0


def main(arguments=None):
    options = parser().parse_args(arguments)
    prepare(options.device)
    if options.only:
        return only(options.only, options.seed, options.device)
    cores = len(os.sched_getaffinity(0))
    processes = options.processes or (cores if options.device == "cpu" else min(cores, 8))
    counts = {"decode": options.decodes, "kernel": options.kernel_calls}
    began = time.monotonic()
    tally = run(counts, options.seed, options.device, processes, options.limit)
    report = result(options, tally, time.monotonic() - began)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    summary = {name: report[name] for name in ("done", "checks", "near_ties", "seconds")}
    print(json.dumps(summary), f"failures {len(tally.failures)}", flush=True)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
