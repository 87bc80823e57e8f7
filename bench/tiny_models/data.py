"""What the models learn from: a pool of problems, made ahead by worker processes and kept on the
device, and how they are masked there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context

import numpy as np
import torch

from tiny_models.tasks import TASKS
from tiny_models.tokenizer import EOS_ID, MASK_ID, encode_problem

# Problems that a worker makes at a time.
CHUNK = 4000
# A canvas leaves this much after the shortest tail of end-of-text, where another would do.
TAIL = 16
BLOCK_LENGTHS = (8, 16, 32)
# The loss's weight of a token after the first end-of-text: half the canvas, and trivial.
TAIL_WEIGHT = 0.05
# The weight of a token in a block after the active one: no proposal is asked of it yet, and in a
# chain most of them cannot be known.
LATER_WEIGHT = 0.1
# (tokens [rows, canvas], prompt lengths [rows], answer lengths [rows])
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_rows(task: str, first: int, count: int, split: str) -> dict[int, list[np.ndarray]]:
    """Problems first ... first + count - 1 of a split, by canvas: [tokens [rows, canvas], prompt
    lengths [rows], answer lengths [rows]], all int16.

    A canvas is prompt, answer, and end-of-text up to its end. Problems that fit several canvases
    take turns.
    """
    longest = max(TASKS[task].canvases)
    rows = defaultdict(list)
    for index in range(first, first + count):
        prompt, answer = encode_problem(TASKS[task].make(index, split))
        length = len(prompt) + len(answer)
        fitting = [size for size in TASKS[task].canvases if length + TAIL <= size] or [longest]
        canvas = fitting[index % len(fitting)]
        text = prompt + answer + [EOS_ID] * (canvas - length)
        rows[canvas].append((text, len(prompt), len(answer)))
    return {
        canvas: [np.array(column, dtype=np.int16) for column in zip(*made, strict=True)]
        for canvas, made in rows.items()
    }


def made_by(workers: int, task: str, problems: int, split: str) -> Iterable[dict]:
    """`make_rows` of problems 0 ... problems - 1 in chunks, in order."""
    firsts = range(0, problems, CHUNK)
    counts = [min(CHUNK, problems - first) for first in firsts]
    if not workers:
        yield from map(make_rows, repeat(task), firsts, counts, repeat(split))
        return
    # Not forked: the device may be in use already.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
        yield from executor.map(make_rows, repeat(task), firsts, counts, repeat(split))


class Pool:
    """Problems 0 ... problems - 1 of a split on the device, as batches of `rows` of one canvas,
    shuffled anew in every pass. Batch `number` is the same in every process.
    """

    def __init__(self, task, problems, rows, *, split="train", workers=0, device="cpu", seed=0):
        chunks: dict[int, list] = defaultdict(list)
        for made in made_by(workers, task, problems, split):
            for canvas, columns in made.items():
                chunks[canvas].append(columns)
        self.parts: dict[int, Batch] = {
            canvas: tuple(
                torch.from_numpy(np.concatenate(column)).to(device)
                for column in zip(*chunks[canvas], strict=True)
            )
            for canvas in sorted(chunks)
        }
        self.rows, self.seed, self.current = rows, seed, -1
        self.places = [
            (canvas, start)
            for canvas, (tokens, _, _) in self.parts.items()
            for start in range(0, len(tokens) - rows + 1, rows)
        ]
        if not self.places:
            raise ValueError(f"problems: expected enough for a batch of {rows}, got {problems}")

    def batch(self, number: int) -> Batch:
        """Batch `number` (0, 1, ...), int64."""
        turn, place = divmod(number, len(self.places))
        if turn != self.current:
            self._shuffle(turn)
        canvas, start = self.places[self.order[place]]
        chosen = self.permutations[canvas][start : start + self.rows]
        tokens, prompt, answer = (part[chosen].long() for part in self.parts[canvas])
        return tokens, prompt, answer

    def _shuffle(self, turn: int) -> None:
        generator = torch.Generator().manual_seed(1000 * self.seed + turn)
        self.current = turn
        self.order = torch.randperm(len(self.places), generator=generator).tolist()
        self.permutations = {
            canvas: torch.randperm(len(tokens), generator=generator).to(tokens.device)
            for canvas, (tokens, _, _) in self.parts.items()
        }


def corrupt(tokens, prompt, answer, generator=None):
    """Mask canvases as decoding meets them: tokens [B, L] int64, lengths [B] -> (noisy tokens, fp32
    weights [B, L]).

    Even rows: every generated token with one probability t ~ U(0, 1). Odd rows: an active block of
    8, 16 or 32 with such a t, everything before it clean, everything after it masked. The prompt is
    never masked, at least one token always is, and the weight is above 0 exactly at masked tokens.
    """
    rows, canvas = tokens.shape
    device = tokens.device
    random = torch.rand(rows, canvas + 2, device=device, generator=generator)
    rate, place, noise = random.split([1, 1, canvas], dim=1)
    row = torch.arange(rows, device=device)[:, None]
    # 0 is the first generated token.
    position = torch.arange(canvas, device=device) - prompt[:, None]
    answer = answer[:, None].long()
    length = torch.tensor(BLOCK_LENGTHS, device=device)[row // 2 % len(BLOCK_LENGTHS)]
    blocks = answer // length + 1  # up to the one that holds the end-of-text
    start = (place * blocks).long() * length
    blockwise = row % 2 == 1
    in_block = (position >= start) & (position < start + length)
    active = (position >= 0) & (~blockwise | in_block)
    later = blockwise & (position >= start + length)
    surest = noise.masked_fill(~active, 2.0).argmin(1, keepdim=True)
    masked = (active & (noise < rate)).scatter(1, surest, True) | later
    tail_factor = 1.0 - (1 - TAIL_WEIGHT) * (position > answer)
    later_factor = 1.0 - (1 - LATER_WEIGHT) * later
    return tokens.masked_fill(masked, MASK_ID), masked * tail_factor * later_factor
