"""The parts that are measured in one process: rows of the results, as plain dicts."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from statistics import median

import torch
from race.measure import cached_steps, ms_on_gpu
from race.shapes import BLOCK

from fastdllm import Quota, generate
from fastdllm.decode import decoding

from .answering import (
    PATIENCE,
    Answer,
    Answering,
    decoded,
    engine_at,
    engine_seconds,
    one_by_one_at,
    static_at,
    static_seconds,
)
from .asked import LOADS, SCRIPT, Wanted, arrivals, equal, mixed, stream, tokens
from .counting import Captures, Compiles

PASSES = 3  # of the stream: each request's own best is of so many
ROUNDS = 2  # in which engine and static batches take turns
HOST_ROWS = (1, 8)
MOST = 4096  # requests that can come at one load
TOLD = 4  # digits of a second that results keep


def checked(answering: Answering) -> dict:
    """Whether the engine's tokens for some mixed requests, asked at once, are those that `generate`
    gives for each alone. In 16 bits products of more rows round otherwise: there the forwards must
    be as many, no mask be left and the prompt be what it was.
    """
    size, config = answering.size, answering.config
    some = random.Random(5).sample(mixed(config, size, size.saturated), size.checked)
    found = [request.result(PATIENCE) for request in map(answering.submit, some)]
    wrong, same, total = [], 0, 0
    for number, (one, done) in enumerate(zip(some, found, strict=True)):
        options = {"gen_length": one.gen_length, "block_length": BLOCK, **SCRIPT}
        expected = generate(answering.alone, [one.prompt], **options)
        written = slice(len(one.prompt), None)
        ours, theirs = done.tokens[0], expected.tokens[0]
        alike = int((ours[written] == theirs[written]).sum())
        same, total = same + alike, total + one.gen_length
        fault = _fault(one, ours, config.mask_id)
        if not torch.equal(done.nfe, expected.nfe):
            fault = f"{int(done.nfe)} forwards, alone {int(expected.nfe)}"
        elif size.scale.dtype == torch.float32 and alike < one.gen_length:
            fault = f"{one.gen_length - alike} of {one.gen_length} tokens are others than alone"
        if fault:
            wrong.append(f"request {number}: {fault}")
    return {"requests": len(some), "tokens": total, "same_tokens": same, "wrong": wrong}


def _fault(one: Wanted, canvas: torch.Tensor, mask_id: int) -> str | None:
    """What is wrong with a canvas by itself."""
    if len(canvas) != len(one.prompt) + one.gen_length:
        return f"{len(canvas)} tokens of {len(one.prompt)} + {one.gen_length}"
    if (canvas == mask_id).any():
        return "masks were left"
    if not torch.equal(canvas[: len(one.prompt)], one.prompt):
        return "the prompt was changed"
    return None


def warmed(answering: Answering) -> dict:
    """The engine's warm_up: its seconds, and what it made."""
    with Compiles() as compiles, Captures(answering.engine) as captures:
        began = time.perf_counter()
        answering.engine.warm_up(**SCRIPT)
        seconds = time.perf_counter() - began
    return {"seconds": seconds, **compiles.report(), **captures.report()}


def streamed(answering: Answering) -> tuple[dict, list[dict]]:
    """(what was compiled and captured while requests came one after another, the requests with
    their seconds in each pass).
    """
    wanted = stream(answering.config, answering.size)
    seconds: list[list[float]] = [[] for _ in wanted]
    with Compiles() as compiles, Captures(answering.engine) as captures:
        for _ in range(PASSES):
            for one, taken in zip(wanted, seconds, strict=True):
                began = time.perf_counter()
                answering.submit(one).result(PATIENCE)
                taken.append(round(time.perf_counter() - began, TOLD))
    requests = [
        {"prompt": len(one.prompt), "gen_length": one.gen_length, "seconds": taken}
        for one, taken in zip(wanted, seconds, strict=True)
    ]
    during = {"passes": PASSES, "first": answering.size.first}
    return during | compiles.report() | captures.report(), requests


def made_in_traffic(during: dict) -> str | None:
    """What requests had to wait for, in words; None where it was nothing."""
    made = [
        f"{during[name]} {what}"
        for name, what in (
            ("compiled", "kernels compiled"),
            ("loaded", "kernels loaded"),
            ("captured", "forwards captured"),
        )
        if during.get(name)
    ]
    if during.get("capture_seconds") and not during["captured"]:
        made.append(f"{during['capture_seconds']:.2f} s of capturing")
    return ", ".join(made) or None


def saturated(answering: Answering, alone: Sequence[Answer]) -> list[dict]:
    """Tokens a second where all requests are there from the beginning: the engine and static
    batches in turns, and one by one.

    alone: the answers to mixed requests, one by one, at least so many as are asked here.
    """
    size, config = answering.size, answering.config
    rows = []
    for lengths, draw in (("equal", equal), ("mixed", mixed)):
        wanted = draw(config, size, size.saturated)
        met = _met_before(answering, wanted)
        taken: dict[str, list[float]] = {"engine": [], "static": []}
        for _ in range(ROUNDS):
            taken["engine"].append(engine_seconds(answering.engine, wanted))
            taken["static"].append(static_seconds(answering.batched, wanted, size.rows))
        asked = {"lengths": lengths, "requests": len(wanted), "tokens": tokens(wanted)}
        rows += [{**asked, "way": way, "seconds": seconds} for way, seconds in taken.items()]
        rows[-1] |= met
        if lengths == "mixed":
            seconds = sum(answer.whole for answer in alone[: len(wanted)])
            rows.append({**asked, "way": "one by one", "seconds": [seconds]})
    return rows


def _met_before(answering, wanted) -> dict:
    """Let static batches meet what they need at these lengths and warm_up did not make: what a
    batch of one block compiles.
    """
    some = [Wanted(one.prompt, BLOCK) for one in wanted[: answering.size.rows]]
    with Compiles() as compiles:
        decoded(answering.batched, some)
    return compiles.report()


def answered_alone(answering: Answering, wanted: Sequence[Wanted]) -> list[Answer]:
    """The answers to requests one by one, with nobody beside them."""
    return [answer for one in wanted for answer in decoded(answering.alone, [one])]


def opened(answering: Answering, reached: float, alone: list[Answer]) -> list[dict]:
    """Answers to requests that come whether or not those before them are done.

    reached: tokens a second of static batches on mixed lengths; loads are shares of it. alone: to
    mixed requests in their order; what is missing of them is measured.
    """
    size = answering.size
    many = mixed(answering.config, size, MOST)
    rate = reached * len(many) / tokens(many)  # requests a second at full load
    most = len(arrivals(max(LOADS) * rate, size.seconds))
    alone = alone + answered_alone(answering, many[len(alone) : most])
    rows = []
    for load in LOADS:
        come = arrivals(load * rate, size.seconds)
        wanted, own = many[: len(come)], alone[: len(come)]
        ways = {
            "engine": engine_at(answering.engine, wanted, come),
            "static": static_at(answering.batched, wanted, come, size.rows),
            "one by one": one_by_one_at(own, come),
        }
        for way, answers in ways.items():
            ended = max(at + answer.whole for at, answer in zip(come, answers, strict=True))
            rows.append(
                {
                    "load": load,
                    "come_seconds": size.seconds,
                    "way": way,
                    "requests": len(wanted),
                    "tokens": tokens(wanted),
                    "seconds": round(ended, TOLD),
                    "first": [round(answer.first, TOLD) for answer in answers],
                    "whole": [round(answer.whole, TOLD) for answer in answers],
                    "alone": [round(answer.whole, TOLD) for answer in own],
                }
            )
    return rows


def host_share(answering: Answering) -> list[dict]:
    """Milliseconds of a turn of cached steps, and of its captured forward replayed on the GPU by
    itself (None without a GPU).

    What the forward does not hold, the selection and the way of its result to the host, counts for
    the host here.
    """
    size = answering.size
    (one,) = equal(answering.config, size, 1)
    rows = []
    for count in HOST_ROWS:
        model = answering.alone if count == 1 else answering.batched
        count = min(count, size.rows)
        taken = turns(model, [one.prompt] * count, size.turns)
        replay = ms_on_gpu(cached_steps(model)[-1]) if model.device.type == "cuda" else None
        rows.append(
            {"rows": count, "turns": len(taken), "ms_turn": median(taken), "ms_replay": replay}
        )
    return rows


def turns(model, prompts, count, rule=Quota(BLOCK), **sampling) -> list[float]:  # noqa: B008
    """Milliseconds of turns in which every row gets a cached step and nothing is captured.

    rule: of one token a forward; after a block's refresh come as many cached steps as it can have.
    """
    taken: list[float] = []
    blocks = 2 + count // (BLOCK - 1)
    options = {"gen_length": blocks * BLOCK, "block_length": BLOCK, "stop_ids": ()}
    with decoding(model, prompts, rule=rule, **options, **sampling) as decoder:
        first = decoder.rows[0]
        while len(taken) < count:
            step = first.step
            began = time.perf_counter()
            decoder.turn()
            milliseconds = 1e3 * (time.perf_counter() - began)
            if step and first.start >= prompts[0].numel() + BLOCK:
                taken.append(milliseconds)
    return taken
