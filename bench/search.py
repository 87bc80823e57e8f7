"""Search the configurations of block_attention and confidence_select around what their config
functions pick today.

    python bench/search.py [--only TEXT] [--minutes 2.5]

For every shape one field of the configuration is varied at a time, the others held at the best so
far: all values of a field run interleaved with the incumbent, on the same inputs and with the same
checks as the benchmarks. What is printed is the time of today's choice, the best found and its
configuration, to be turned into a branch of the config function. A candidate that gives wrong
results, or needs more than the chip has, is passed over.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import test_attention_speed as attention
import test_select_speed as select
import timing

from fastdllm_kernels import attention_triton, select_triton
from fastdllm_kernels.backend import chip_of

ENOUGH = 0.98  # a challenger must be 2% faster: less is noise
ATTENTION = [
    attention.Case(32, 32, 1, 512),
    attention.Case(32, 32, 1, 1024),
    attention.Case(32, 32, 1, 4096),
    attention.Case(32, 32, 8, 1024),
    attention.Case(32, 32, 32, 1024),
    attention.Case(28, 4, 1, 512),
    attention.Case(28, 4, 1, 1024),
    attention.Case(28, 4, 1, 4096),
    attention.Case(28, 4, 8, 1024),
    attention.Case(28, 4, 8, 2048),
    attention.Case(28, 4, 32, 2048),
    attention.Case(32, 32, 1, 2048, width=2048, turned=True),
]
SELECT = [select.Case(126464, rows) for rows in (32, 256, 1024)] + [select.Case(152064, 32)]


@dataclass(frozen=True)
class Kernel:
    """Where a kernel's configuration comes from, and what else it might be: variants(config, case)
    by field.
    """

    module: object
    function: str
    build: Callable
    variants: Callable


def attention_variants(config, case):
    """Values to try for each field; shares of the keys around today's number."""
    places = chip_of(timing.DEVICE).multiprocessors
    splits = config.splits
    near = {splits - 1, splits + 1, splits // 2, splits * 3 // 2, splits * 2}
    portable = type(config) is attention_triton.Config
    tried = {
        "splits": sorted({1, *near} - {0}),
        "programs": (places, 2 * places, getattr(type(config), "programs", 0)),
        "TILE_KEYS": (32, 64, 128),
        "num_warps": (4, 8),
        "TILE_ROWS": (16, 32, 64, 128),
        "CONSUMERS": (1, 2),
        "num_stages": (2, 3, 4) if portable else (3, 4, 6),
        "rotate_first": (False, True),
        "overlap": (False, True),
        "halve_keys": (False, True),
    }
    return {
        name: [replace(config, **{name: value}) for value in values]
        for name, values in known(config, tried).items()
    }


def select_variants(config, case):
    """The same for the scan; the number of parts follows from the tile and how many of them a
    program takes.
    """

    def cut(**changed):
        new = replace(config, **changed)
        return replace(new, parts=-(-case.vocab // (new.tile_vocab * new.tiles)))

    tried = {
        "tiles": (1, 2, 3, 4, 6, 8),
        "tile_vocab": (2048, 4096, 8192, 16384),
        "num_warps": (2, 4, 8),
        "overlap": (False, True),
    }
    return {
        name: [cut(**{name: value}) for value in values]
        for name, values in known(config, tried).items()
    }


def known(config, tried):
    """Only the fields that the configuration has."""
    names = {field.name for field in fields(config)}
    return {name: values for name, values in tried.items() if name in names}


def attention_module():
    """Where the configuration of the kernel comes from that block_attention runs here: Hopper has
    its own.
    """
    if not (timing.ON_GPU and chip_of(timing.DEVICE).hopper):
        return attention_triton
    from fastdllm_kernels import attention_hopper

    return attention_hopper


KERNELS = {
    "block_attention": Kernel(attention_module(), "config", attention.build, attention_variants),
    "confidence_select": Kernel(select_triton, "config", select.build, select_variants),
}


@contextmanager
def configured(kernel, choose):
    """`choose(today's choice)` stands in for the config function."""
    original = getattr(kernel.module, kernel.function)

    def chosen(*args, **kwargs):
        return choose(original(*args, **kwargs))

    setattr(kernel.module, kernel.function, chosen)
    try:
        yield
    finally:
        setattr(kernel.module, kernel.function, original)


def competitor(kernel, call, config):
    def run(buffer):
        with configured(kernel, lambda today: config):
            return call(buffer)

    return timing.Competitor(run)


def search(kernel, case, deadline):
    """(today's configuration, its microseconds, the best one, its microseconds, how many were
    tried).
    """
    contest = kernel.build(case)
    call = contest.competitors["ours"].call
    first = contest.buffer(0)
    seen = []
    with configured(kernel, lambda today: seen.append(today) or today):
        call(first)
    today = best = seen[0]
    buffers = [first, *(contest.buffer(i) for i in range(1, timing.buffers_needed(contest.bytes)))]
    times, tried = {}, {today}
    for name in kernel.variants(today, case):
        if time.monotonic() > deadline:
            break
        candidates = {best, *kernel.variants(best, case)[name]}
        right = {}
        for config in candidates:
            entry = competitor(kernel, call, config)
            outcome = timing.checked(contest, entry, first)
            if not outcome.absent and not outcome.wrong:
                right[config] = entry
        outcomes = timing.measure(right, buffers)
        times = {config: o.microseconds for config, o in outcomes.items() if o.seconds}
        tried |= set(times)
        challenger = min(times, key=times.get)
        if times[challenger] < ENOUGH * times[best]:
            best = challenger
    pair = {config: competitor(kernel, call, config) for config in (today, best)}
    final = timing.measure(pair, buffers)
    return today, final[today].microseconds, best, final[best].microseconds, len(tried)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="shapes whose description contains this text")
    parser.add_argument("--minutes", type=float, default=2.5, help="time for all shapes together")
    arguments = parser.parse_args()
    if not timing.ON_GPU:
        raise SystemExit("a search needs a GPU: the interpreter's times say nothing")
    jobs = [("block_attention", case) for case in ATTENTION] + [
        ("confidence_select", case) for case in SELECT
    ]
    jobs = [(op, case) for op, case in jobs if arguments.only in f"{op}: {case}"]
    end = time.monotonic() + 60 * arguments.minutes
    for i, (op, case) in enumerate(jobs):
        now = time.monotonic()
        share = (end - now) / (len(jobs) - i)
        today, before, best, after, tried = search(KERNELS[op], case, now + share)
        gain = "nothing better"
        if best != today:
            gain = f"{after:.2f} us, {before / after - 1:.0%} faster, with {best}"
        print(f"{op}: {case}\n  today {before:.2f} us with {today}")
        print(f"  {tried} tried: {gain}", flush=True)


if __name__ == "__main__":
    main()
