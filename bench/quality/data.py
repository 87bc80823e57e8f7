"""What the models learn from: batches of fresh problems from worker processes, and their corruption
on the device.
"""

from __future__ import annotations

import torch
from problems import make_problem
from tokenizer import EOS_ID, MASK_ID, encode_problem
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

CANVASES = (
    168,
    184,
)  # two static shapes: prompts of 34 to 55 tokens leave 113 to 150, around gen_length 128
BLOCK_LENGTHS = (8, 16, 32)
TAIL_WEIGHT = 0.05  # of a token after the first end-of-text: half the canvas, and trivial
LATER_WEIGHT = 0.25  # of a token in a block after the active one: no proposal is asked of it yet


def make_batch(
    number: int, rows: int, split: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Batch `number` of a split: (tokens [rows, canvas], prompt lengths [rows], answer lengths
    [rows]), all int16.

    A canvas is prompt, answer, and end-of-text up to its end. Every batch has problems of its own.
    """
    canvas = CANVASES[number % len(CANVASES)]
    pairs = [
        encode_problem(make_problem(index, split))
        for index in range(number * rows, (number + 1) * rows)
    ]
    lines = [
        prompt + answer + [EOS_ID] * (canvas - len(prompt) - len(answer))
        for prompt, answer in pairs
    ]
    lengths = torch.tensor(
        [[len(prompt), len(answer)] for prompt, answer in pairs], dtype=torch.int16
    )
    return torch.tensor(lines, dtype=torch.int16), lengths[:, 0], lengths[:, 1]


class Batches(IterableDataset):
    """The endless train batches first, first + 1, ...; a DataLoader's workers take turns and keep
    the order.
    """

    def __init__(self, first: int, rows: int):
        self.first, self.rows = first, rows

    def __iter__(self):
        worker = get_worker_info()
        number, stride = (self.first + worker.id, worker.num_workers) if worker else (self.first, 1)
        while True:
            yield make_batch(number, self.rows, "train")
            number += stride


def loader(first: int, rows: int, workers: int, device: torch.device) -> DataLoader:
    """Batches from `workers` processes, made ahead, pinned where they go to a GPU."""
    ahead = {"prefetch_factor": 8} if workers else {}
    return DataLoader(
        Batches(first, rows),
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        **ahead,
    )


def corrupt(tokens, prompt, answer, generator=None):
    """Mask canvases as decoding meets them: tokens [B, L] int64, lengths [B] -> (noisy tokens, fp32
    weights [B, L]).

    Even rows: every generated token with one probability t ~ U(0, 1). Odd rows: an active block of
    8, 16 or 32 with such a t, everything before it clean, everything after it masked. The prompt is
    never masked, at least one token always is, and the weight is above 0 exactly at masked tokens.
    """
    rows, canvas = tokens.shape
    device = tokens.device
    rate, place, noise = torch.rand(rows, canvas + 2, device=device, generator=generator).split(
        [1, 1, canvas], dim=1
    )
    row = torch.arange(rows, device=device)[:, None]
    position = (
        torch.arange(canvas, device=device) - prompt[:, None]
    )  # 0 is the first generated token
    answer = answer[:, None].long()
    length = torch.tensor(BLOCK_LENGTHS, device=device)[row // 2 % len(BLOCK_LENGTHS)]
    start = (
        place * (answer // length + 1)
    ).long() * length  # answer // length: the block that holds the end-of-text
    blockwise = row % 2 == 1
    active = (position >= 0) & (~blockwise | ((position >= start) & (position < start + length)))
    later = blockwise & (position >= start + length)
    surest = noise.masked_fill(~active, 2.0).argmin(1, keepdim=True)
    masked = (active & (noise < rate)).scatter(1, surest, True) | later
    weights = (
        masked
        * (1.0 - (1 - TAIL_WEIGHT) * (position > answer))
        * (1.0 - (1 - LATER_WEIGHT) * later)
    )
    return tokens.masked_fill(masked, MASK_ID), weights
