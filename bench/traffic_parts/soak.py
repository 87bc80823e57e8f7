"""Many small requests of every kind through one engine on a CPU, from several threads at once:
nothing is lost or doubled, and neither memory nor threads become more.
"""

from __future__ import annotations

import gc
import random
import resource
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from race.shapes import MODELS, TINY
from race.subject import random_model

from fastdllm import (
    Engine,
    Factor,
    Generation,
    QueueFull,
    Quota,
    RequestCancelled,
    Threshold,
    generate,
)

from .answering import PATIENCE

ROWS, POSITIONS, BLOCK_LENGTH, QUEUE = 8, 64, 8, 24
THREADS = 4
WINDOW = 12  # requests of a thread that are under way; all together are more than rows and queue
THIRDS = 3
KINDS = 40  # different requests, each asked again and again
# Of so many requests one is cancelled, one has its tokens read as they come.
CANCELLED, READ = 17, 5
# From the first third to the last: Python's objects, and resident memory.
MOST_OBJECTS, MOST_GROWTH = 500, 0.03


class OfItsOwn(Exception):
    """What a request fails with whose rule is to fail."""


@dataclass(frozen=True)
class Kind:
    """One of the requests: what is asked, and what it gives alone (None: it fails)."""

    prompt: list[int]
    options: dict = field(repr=False)
    expected: Generation | None = field(repr=False)


def soak(count: int) -> tuple[list[dict], list[str]]:
    """(a row for each third of the requests and one from before, what is wrong)."""
    model = random_model(replace(MODELS["llada"], **TINY), torch.float32, torch.device("cpu"))
    kinds = drawn_kinds(model, min(KINDS, count // 4))
    options = {"rows": ROWS, "positions": POSITIONS, "block_length": BLOCK_LENGTH}
    outcomes: Counter = Counter()
    with Engine(model, queue=QUEUE, **options) as engine:
        ask(engine, kinds, range(2 * len(kinds)), Counter())  # whatever is made once
        began = time.perf_counter()
        before = engine.stats()["finished"]
        rows = [state(0, outcomes, 0.0)]
        for third in range(THIRDS):
            numbers = range(third * count // THIRDS, (third + 1) * count // THIRDS)
            ask(engine, kinds, numbers, outcomes)
            rows.append(state(numbers.stop, outcomes, time.perf_counter() - began))
        stats = engine.stats()
    rows[-1]["threads_after"] = threading.active_count()
    return rows, faults(rows, stats, before)


def drawn_kinds(model, count: int) -> list[Kind]:
    """So many requests of all lengths, rules and other options, each with what `generate` gives for
    it, and one more that fails.
    """
    draw = random.Random(6)
    kinds = []
    for number in range(count):
        prompt = [draw.randrange(model.config.mask_id) for _ in range(draw.randint(1, 30))]
        options = {
            "gen_length": draw.randint(1, 30),
            "rule": draw.choice([Threshold(0.3), Quota(3), Factor(1.5), a_function]),
            "temperature": draw.choice([0.0, 0.0, 0.8]),
            "top_p": draw.choice([None, None, 0.9]),
            "seed": number,
            "stop_ids": draw.choice([(), tuple(range(10))]),
        }
        done = generate(model, [prompt], block_length=BLOCK_LENGTH, **options)
        kinds.append(Kind(prompt, options, done))
    options = {"gen_length": 20, "rule": failing}
    return [*kinds, Kind([1, 2, 3], options, None)]


def a_function(scores, candidates, step):
    """A rule without a kernel."""
    return Threshold(0.4).commit(scores, candidates, step)


def failing(scores, candidates, step):
    """A rule that fails after its first commit."""
    if int(step.max()):
        raise OfItsOwn
    return Quota(4).commit(scores, candidates, step)


def ask(engine: Engine, kinds: list[Kind], numbers: range, outcomes: Counter) -> None:
    """Ask these requests from several threads, and count what became of each."""
    found: list[Counter] = [Counter() for _ in range(THREADS)]
    threads = [
        threading.Thread(target=client, args=(engine, kinds, numbers[first::THREADS], counted))
        for first, counted in enumerate(found)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for counted in found:
        outcomes.update(counted)


def client(engine, kinds, numbers, counted: Counter) -> None:
    """Keep some requests under way, and look at them in their order."""
    under_way: deque = deque()
    for number in numbers:
        kind = kinds[number % len(kinds)]
        if len(under_way) == WINDOW:
            counted[outcome(*under_way.popleft())] += 1
        request = submitted(engine, kind, counted)
        if number % CANCELLED == 0:
            request.cancel()
        under_way.append((request, kind, number % READ == 0))
    for last in under_way:
        counted[outcome(*last)] += 1


def submitted(engine, kind, counted):
    """A request, once there is room in the line."""
    while True:
        try:
            return engine.submit(kind.prompt, **kind.options)
        except QueueFull:
            counted["line was full"] += 1
            time.sleep(0.005)


def outcome(request, kind: Kind, read: bool) -> str:
    """What became of a request: "done", "cancelled", "failed", or what is wrong with it."""
    try:
        done = request.result(PATIENCE)
    except RequestCancelled:
        return "cancelled"
    except OfItsOwn:
        return "failed" if kind.expected is None else "failed of another's rule"
    except TimeoutError:
        return "lost"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if kind.expected is None:
        return "done in spite of its rule"
    if not torch.equal(done.tokens[0], kind.expected.tokens[0]):
        return "other tokens than alone"
    if not torch.equal(done.nfe, kind.expected.nfe):
        return "more or fewer forwards than alone"
    if read and list(request) != done.tokens[0][len(kind.prompt) :].tolist():
        return "other tokens read than in the result"
    return "done"


def state(requests: int, outcomes: Counter, seconds: float) -> dict:
    """What there is after so many requests."""
    gc.collect()
    return {
        "requests": requests,
        "seconds": round(seconds, 2),
        "outcomes": dict(sorted(outcomes.items())),
        "objects": len(gc.get_objects()),
        "resident_bytes": resident_bytes(),
        "most_resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "threads": threading.active_count(),
    }


def resident_bytes() -> int | None:
    """The memory that this process has now; None where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return None
    return int(pages) * resource.getpagesize()


def faults(rows: list[dict], stats: dict, before: int) -> list[str]:
    """What is wrong with a soak. stats: the engine's at the end. before: requests that it had
    finished when the soak began.
    """
    count, outcomes = rows[-1]["requests"], rows[-1]["outcomes"]
    found = [
        f"{number} requests: {what}"
        for what, number in outcomes.items()
        if what not in ("done", "cancelled", "failed", "line was full")
    ]
    ended = sum(number for what, number in outcomes.items() if what != "line was full")
    if ended != count:
        found.append(f"{ended} of {count} requests ended")
    if stats["finished"] - before != count:
        found.append(f"the engine finished {stats['finished'] - before} of {count} requests")
    if stats["busy"] or stats["waiting"]:
        found.append(f"{stats['busy']} rows are busy and {stats['waiting']} requests wait")
    threads = {row["threads"] for row in rows}
    if len(threads) > 1:
        found.append(f"threads: {sorted(threads)}")
    if rows[-1]["threads_after"] >= rows[0]["threads"]:
        found.append("the engine's thread outlives it")
    _, first, *_, last = rows
    if last["objects"] - first["objects"] > MOST_OBJECTS:
        found.append(f"{last['objects'] - first['objects']} Python objects more")
    if growth(rows) is not None and growth(rows) > MOST_GROWTH:
        found.append(f"resident memory has grown by {growth(rows):.1%}")
    return found


def growth(rows: list[dict]) -> float | None:
    """By what share resident memory has grown from the first third to the last."""
    _, first, *_, last = rows
    if first["resident_bytes"] is None:
        return None
    return last["resident_bytes"] / first["resident_bytes"] - 1
