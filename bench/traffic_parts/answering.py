"""Who answers: the engine, `generate` in static batches, `generate` one by one."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from race.shapes import BLOCK, MODELS
from race.subject import random_model

from fastdllm import Engine, warm_up
from fastdllm.decode import decoding

from .asked import SCRIPT, Size, Wanted

PATIENCE = 120.0  # seconds after which a request that does not end is an error


@dataclass(frozen=True)
class Answer:
    """Seconds from when a request came until its first token was final, and until all were."""

    first: float
    whole: float


class Answering:
    """A model of LLaDA's shape with random weights, and all that answers with it.

    engine: on the model. batched, alone: the same weights again, for `generate`; each keeps what it
    has captured apart from the others.
    """

    def __init__(self, size: Size, device: torch.device):
        self.size = size
        self.model = shaped_model(size, device)
        self.batched, self.alone = copy.copy(self.model), copy.copy(self.model)
        self.engine = engine_of(self.model, size)

    @property
    def config(self):
        return self.model.config

    def warm_up_generate(self) -> None:
        """Make what static batches and single requests need."""
        options = {"positions": self.size.positions, "block_length": BLOCK, **SCRIPT}
        warm_up(self.batched, rows=self.size.rows, **options)
        warm_up(self.alone, rows=1, **options)

    def submit(self, one: Wanted):
        return submit(self.engine, one)


def shaped_model(size: Size, device: torch.device):
    """A DiffusionTransformer of LLaDA-8B's shape, made small for a smoke test."""
    config = replace(MODELS["llada"], **size.scale.changes)
    return random_model(config, size.scale.dtype, device)


def engine_of(model, size: Size) -> Engine:
    return Engine(model, rows=size.rows, positions=size.positions, block_length=BLOCK)


def submit(engine: Engine, one: Wanted):
    """The engine's Request."""
    return engine.submit(one.prompt, gen_length=one.gen_length, **SCRIPT)


def decoded(model, wanted: Sequence[Wanted]) -> list[Answer]:
    """Decode requests as one static batch, as `generate` does: all generate as much as the longest
    and end together. When a first token was final is seen after each turn of the loop.
    """
    longest = max(one.gen_length for one in wanted)
    prompts = [one.prompt for one in wanted]
    firsts: dict = {}
    began = time.perf_counter()
    with decoding(model, prompts, gen_length=longest, block_length=BLOCK, **SCRIPT) as decoder:
        rows, mask_id = list(decoder.rows), decoder.schedule.mask_id
        going = True
        while going:
            going = decoder.turn()
            now = time.perf_counter() - began
            for row in rows:
                if row.failure is not None:
                    raise row.failure
                if row not in firsts and row.text[row.prompt_length] != mask_id:
                    firsts[row] = now
        decoder.result()
    whole = time.perf_counter() - began
    return [Answer(firsts[row], whole) for row in rows]


def engine_seconds(engine: Engine, wanted: Sequence[Wanted]) -> float:
    """Until the engine has answered all of them, asked at once."""
    began = time.perf_counter()
    for request in [submit(engine, one) for one in wanted]:
        request.result(PATIENCE)
    return time.perf_counter() - began


def static_seconds(model, wanted: Sequence[Wanted], most: int) -> float:
    """Until static batches, of so many at most in their order, have answered all of them."""
    began = time.perf_counter()
    for first in range(0, len(wanted), most):
        decoded(model, wanted[first : first + most])
    return time.perf_counter() - began


def engine_at(engine: Engine, wanted: Sequence[Wanted], come: Sequence[float]) -> list[Answer]:
    """The engine's answers to requests that come at these seconds, each followed by a thread. Time
    counts from when a request was to come, whether or not it could be submitted then.
    """
    began = time.perf_counter()

    def follow(request, came):
        next(iter(request))
        first = time.perf_counter() - began
        request.result(PATIENCE)
        return Answer(first - came, time.perf_counter() - began - came)

    with ThreadPoolExecutor(len(wanted)) as followers:
        followed = []
        for one, came in zip(wanted, come, strict=True):
            sleep_until(began + came)
            followed.append(followers.submit(follow, submit(engine, one), came))
        return [future.result() for future in followed]


def static_at(model, wanted: Sequence[Wanted], come: Sequence[float], most: int) -> list[Answer]:
    """The answers of static batches: whenever one is done, the next takes up to `most` requests
    that wait, in their order.
    """
    answers: list[Answer] = []
    began = time.perf_counter()
    while len(answers) < len(wanted):
        first = len(answers)
        sleep_until(began + come[first])
        start = max(come[first], time.perf_counter() - began)
        waiting = [came for came in come[first:] if came <= start][:most]
        batch = decoded(model, wanted[first : first + len(waiting)])
        answers += [
            Answer(start - came + answer.first, start - came + answer.whole)
            for came, answer in zip(waiting, batch, strict=True)
        ]
    return answers


def one_by_one_at(alone: Sequence[Answer], come: Sequence[float]) -> list[Answer]:
    """The answers of a queue of one, computed from what each request took alone."""
    answers: list[Answer] = []
    free = 0.0
    for answer, came in zip(alone, come, strict=True):
        start = max(came, free)
        free = start + answer.whole
        answers.append(Answer(start - came + answer.first, free - came))
    return answers


def sleep_until(moment: float) -> None:
    """Until time.perf_counter() says so."""
    time.sleep(max(0.0, moment - time.perf_counter()))
