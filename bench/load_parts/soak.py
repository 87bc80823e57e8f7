"""Requests of every kind over HTTP, many at once, on a CPU with the embedded model: every answer is
that of `generate`, and neither memory nor threads nor file descriptors become more.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections import Counter
from typing import Any

from traffic_parts.soak import resident_bytes

from fastdllm import Factor, Quota, Threshold, generate, text
from fastdllm.serve.service import Service, service_of
from fastdllm.serve.settings import Settings
from fastdllm.serve.writing import cut

from .asking import asked
from .served import serving, wait_until

MODEL = "tiny-llada"
ROWS, POSITIONS = 8, 256
THIRDS = 3
KINDS = 40  # of which each tenth is one whose client leaves, and each tenth one that is wrong
LEAVES, WRONG = 3, 7  # the last digits of their numbers
MOST_GROWTH = 0.03  # of resident memory, from the first third to the last
FINE = {"answered", "left", "refused"}
RULES = {"threshold": Threshold, "factor": Factor, "steps": Quota}
REFUSED = (
    ("presence_penalty", 1),
    ("max_tokens", POSITIONS),
    ("temperature", -1),
    ("min_p", 0.1),
)


def soak(count: int, clients: int) -> tuple[list[dict], list[str]]:
    """(a row for each third of the requests and one from before, what is wrong)."""
    loaded = text.load(MODEL, "cpu")
    settings = Settings(model=MODEL, positions=POSITIONS, gen_length=32)
    kinds = drawn_kinds(loaded)
    service = service_of(loaded, settings, rows=ROWS, cache="dual", queue=4 * clients)
    outcomes: Counter = Counter()
    with serving(service) as port:
        wait_until(lambda: service.ready, 120)
        asked(port, clients, kinds, range(2 * clients))  # whatever is made once
        began, before = time.perf_counter(), service.engine.stats()
        rows = [state(0, outcomes, 0.0, service)]
        for third in range(THIRDS):
            numbers = range(third * count // THIRDS, (third + 1) * count // THIRDS)
            outcomes.update(asked(port, clients, kinds, numbers)["outcomes"])
            rows.append(state(numbers.stop, outcomes, time.perf_counter() - began, service))
        stats = service.engine.stats()
    rows[-1]["tokens"] = stats["tokens"] - before["tokens"]
    return rows, faults(rows)


def drawn_kinds(loaded: text.TextModel) -> list[dict]:
    """What is asked, with what `generate` gives for it."""
    draw = random.Random(6)
    return [_kind(number, draw, loaded) for number in range(KINDS)]


def _kind(number, draw, loaded) -> dict:
    ids = [draw.randrange(2, loaded.model.config.vocab_size) for _ in range(draw.randint(1, 40))]
    rule, value = draw.choice([("threshold", 0.5), ("factor", 1.5), ("steps", 8)])
    body: dict[str, Any] = {
        "prompt": ids,
        "max_tokens": draw.randint(1, 40),
        "temperature": draw.choice([0.0, 0.0, 0.8]),
        "seed": number,
        rule: value,
    }
    if draw.random() < 0.5:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    kind: dict[str, Any] = {"path": "/v1/completions", "body": body}
    if number % 10 == LEAVES:
        body.update(max_tokens=200, steps=32)
        body.pop(rule) if rule != "steps" else None
        kind["leave"] = "after the first part" if body.get("stream") else "at once"
        return kind
    if number % 10 == WRONG:
        name, wrong = REFUSED[number // 10 % len(REFUSED)]
        body[name] = wrong
        return kind | {"param": name}
    stop = draw.choice([None, None, " "])
    options = {"temperature": body["temperature"], "seed": number, "rule": RULES[rule](value)}
    done = generate(loaded.model, [ids], gen_length=body["max_tokens"], **options)
    answer = loaded.decode(loaded.written(done.tokens[0][len(ids) :].tolist()))
    if stop is None:
        return kind | {"text": answer, "forwards": int(done.nfe)}
    body["stop"] = stop
    return kind | {"text": cut(answer, [stop])[0]}


def state(requests: int, outcomes: Counter, seconds: float, service: Service) -> dict:
    """What there is after so many requests, once nobody is connected."""
    stats = service.engine.stats
    wait_until(lambda: not stats()["busy"] and not stats()["waiting"], 60)
    time.sleep(1.0)  # in which connections are closed
    gc.collect()
    return {
        "requests": requests,
        "seconds": round(seconds, 2),
        "outcomes": dict(sorted(outcomes.items())),
        "resident_bytes": resident_bytes(),
        "files": open_files(),
        "threads": threading.active_count(),
    }


def open_files() -> int | None:
    """How many files this process has open; None where the system does not say."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return None


def faults(rows: list[dict]) -> list[str]:
    """What is wrong with a soak."""
    last, count = rows[-1], rows[-1]["requests"]
    found = [
        f"{number} requests: {what}"
        for what, number in last["outcomes"].items()
        if what not in FINE
    ]
    if sum(last["outcomes"].values()) != count:
        found.append(f"{sum(last['outcomes'].values())} of {count} requests ended")
    for name in ("files", "threads"):
        values = [row[name] for row in rows[1:]]
        if len(set(values)) > 1:
            found.append(f"{name}: {values}")
    if growth(rows) is not None and growth(rows) > MOST_GROWTH:
        found.append(f"resident memory has grown by {growth(rows):.1%}")
    return found


def growth(rows: list[dict]) -> float | None:
    """By what share resident memory has grown from the first third to the last."""
    _, first, *_, last = rows
    if first["resident_bytes"] is None:
        return None
    return last["resident_bytes"] / first["resident_bytes"] - 1
