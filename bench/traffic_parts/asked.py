"""What is asked: requests of drawn lengths, when they come, and how many of them a machine gets."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from race.shapes import REAL, SMOKE, Scale

from fastdllm import Quota

# Random weights have no confidence: so many forwards a block are scripted, and no text ends early.
SCRIPT = {"rule": Quota(8), "stop_ids": ()}
WAYS = ("engine", "static", "one by one")  # who answers
LOADS = (0.5, 0.8, 1.0)  # of the tokens a second that static batches reach


@dataclass(frozen=True)
class Size:
    """How much is asked of one kind of machine.

    rows, positions: of the engine; rows are also the most requests of a static batch. prompts,
    generations: (shortest, longest) of mixed requests. equal: (prompt, generation) of equal ones
    and of the first request of a process; headline: of the request that options are timed with.
    streamed: requests of the stream, each generating
    equal[1] tokens, first: how many of them its first mean is of. saturated: requests of one
    saturated run. checked: requests whose tokens are compared. seconds: in which requests come at
    each load. turns: timed cached steps of a batch. soaked: requests of the soak.
    """

    scale: Scale
    rows: int
    positions: int
    prompts: tuple[int, int]
    generations: tuple[int, int]
    equal: tuple[int, int]
    headline: tuple[int, int]
    streamed: int
    first: int
    saturated: int
    checked: int
    seconds: float
    turns: int
    soaked: int


LARGE = Size(
    scale=REAL,
    rows=16,
    positions=2048,
    prompts=(60, 1500),
    generations=(64, 512),
    equal=(512, 256),
    headline=(1024, 1024),
    streamed=60,
    first=20,
    saturated=48,
    checked=8,
    seconds=10.0,
    turns=90,
    soaked=10_000,
)
SMALL = Size(
    scale=SMOKE,
    rows=4,
    positions=160,
    prompts=(6, 96),
    generations=(16, 64),
    equal=(48, 32),
    headline=(48, 64),
    streamed=6,
    first=2,
    saturated=8,
    checked=8,
    seconds=0.3,
    turns=20,
    soaked=60,
)


@dataclass(frozen=True)
class Wanted:
    """One request: its prompt [P] int64 on the CPU, and how many tokens are to be generated."""

    prompt: torch.Tensor = field(repr=False)
    gen_length: int


def equal(config, size: Size, count: int) -> list[Wanted]:
    """Requests of one length."""
    prompt, generation = size.equal
    return _drawn(config, [(prompt, generation)] * count, seed=1)


def stream(config, size: Size) -> list[Wanted]:
    """Requests with prompts of all lengths and one number of tokens to generate."""
    draw = random.Random(2)
    _, generation = size.equal
    lengths = [(draw.randint(*size.prompts), generation) for _ in range(size.streamed)]
    return _drawn(config, lengths, seed=2)


def mixed(config, size: Size, count: int) -> list[Wanted]:
    """Requests of all lengths. More of them begin with the same ones."""
    draw = random.Random(3)
    lengths = []
    for _ in range(count):
        prompt = draw.randint(*size.prompts)
        lengths.append((prompt, draw.randint(*size.generations)))
    return _drawn(config, lengths, seed=3)


def arrivals(rate: float, seconds: float) -> list[float]:
    """When requests come in so many seconds, at a rate a second, the same in every run: a Poisson
    process of which it is known how many come (the number expected, one at least).
    """
    draw = random.Random(4)
    count = max(1, round(rate * seconds))
    return sorted(draw.uniform(0, seconds) for _ in range(count))


def tokens(wanted: list[Wanted]) -> int:
    """How many tokens are to be generated in all."""
    return sum(one.gen_length for one in wanted)


def _drawn(config, lengths, seed):
    """Requests of these (prompt, generation) lengths, of ordinary ids."""
    generator = torch.Generator().manual_seed(seed)
    ordinary = min(config.mask_id, *config.stop_ids)
    return [
        Wanted(torch.randint(ordinary, (prompt,), generator=generator), generation)
        for prompt, generation in lengths
    ]
