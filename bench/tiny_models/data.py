"""What the models learn from: batches of fresh problems, made by worker processes, and how they are
masked on the device.
"""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tiny_models.problems import make_problem
from tiny_models.tokenizer import EOS_ID, MASK_ID, encode_problem

# Two static lengths: prompts of 34 to 55 tokens leave 113 to 150, around gen_length 128.
CANVASES = (168, 184)
BLOCK_LENGTHS = (8, 16, 32)
# The loss's weight of a token after the first end-of-text: half the canvas, and trivial.
TAIL_WEIGHT = 0.05
# The weight of a token in a block after the active one: no proposal is asked of it yet.
LATER_WEIGHT = 0.25


def make_batch(
    number: int, rows: int, split: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make batch `number` of a split: (tokens [rows, canvas], prompt lengths [rows], answer lengths
    [rows]), all int16.

    A canvas is prompt, answer, and end-of-text up to its end. Every batch has problems of its own.
    """
    canvas = CANVASES[number % len(CANVASES)]
    tokens, prompt_lengths, answer_lengths = [], [], []
    for index in range(number * rows, (number + 1) * rows):
        prompt, answer = encode_problem(make_problem(index, split))
        text = prompt + answer
        tokens.append(text + [EOS_ID] * (canvas - len(text)))
        prompt_lengths.append(len(prompt))
        answer_lengths.append(len(answer))
    return (
        torch.tensor(tokens, dtype=torch.int16),
        torch.tensor(prompt_lengths, dtype=torch.int16),
        torch.tensor(answer_lengths, dtype=torch.int16),
    )


class Batches(IterableDataset):
    """Yields the train batches first, first + 1, ... without end; a DataLoader's workers take turns
    and keep the order.
    """

    def __init__(self, first: int, rows: int):
        self.first, self.rows = first, rows

    def __iter__(self):
        worker = get_worker_info()
        number, stride = self.first, 1
        if worker:
            number, stride = self.first + worker.id, worker.num_workers
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
