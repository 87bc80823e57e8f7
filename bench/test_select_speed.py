"""confidence_select: from the logits of blocks to proposals, scores and commits. Only ours applies
a rule and commits.
"""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from timing import DEVICE, ON_GPU, Competitor, Contest

from fastdllm_kernels import (
    Threshold,
    confidence_select,
    confidence_select_reference,
    token_confidence,
)

NAMES = ["ours", "token_confidence", "published, float64", "float32 softmax", "reference"] + [
    "torch.compile"
] * ON_GPU
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
MASK_ID = 5
WIDTH = 32


@dataclass(frozen=True)
class Case:
    vocab: int
    positions: int
    reach: float | None = None

    def __str__(self):
        return f"V {self.vocab}, {self.positions} rows"


REAL = [
    Case(126464, 32, 8),
    Case(126464, 256, 25),
    Case(126464, 1024, 75),
    Case(152064, 32, 8),
    Case(152064, 256),
    Case(152064, 1024, 90),
]
CASES = REAL if ON_GPU else [Case(257, 32), Case(4096, 64)]


def inputs(case: Case, index: int):
    generator = torch.Generator(DEVICE).manual_seed(index)
    logits = torch.empty(case.positions, case.vocab, dtype=DTYPE, device=DEVICE).normal_(
        std=3, generator=generator
    )
    logits[
        :, MASK_ID
    ] = -10  # never the largest, so that those who know no mask id propose the same
    shape = case.positions // WIDTH, WIDTH
    tokens = torch.full(shape, MASK_ID, device=DEVICE)
    # Named candidates: the tokens are committed in place, and the next replay must find as much to
    # do.
    return logits, tokens, torch.ones(shape, dtype=torch.bool, device=DEVICE)


def select(op):
    def call(buffer):
        logits, tokens, candidates = buffer
        blocks = logits.view(*tokens.shape, -1)
        result = op(blocks, tokens, mask_id=MASK_ID, rule=Threshold(0.9), candidates=candidates)
        return result.token_ids.flatten(), result.score.flatten()

    return call


def published(buffer):
    """The selection as the published samplers have it, without their loops in Python."""
    probabilities = torch.softmax(buffer[0].to(torch.float64), dim=-1)
    token_ids = buffer[0].argmax(-1)
    return token_ids, probabilities.gather(-1, token_ids[:, None])[:, 0]


def float32_softmax(logits):
    score, token_ids = torch.softmax(logits.float(), dim=-1).max(-1)
    return token_ids, score


@cache
def compiled():
    return torch.compile(float32_softmax, dynamic=False)


def check(result, buffer):
    """The proposal's logit is the row's largest, and its score the softmax there."""
    token_ids, score = result
    logits = buffer[0]
    chosen = logits.gather(-1, token_ids[:, None])[:, 0]
    assert torch.equal(chosen, logits.amax(-1)), "a proposal is not the largest logit"
    expected = torch.exp(chosen.double() - torch.logsumexp(logits.double(), -1))
    torch.testing.assert_close(score.double(), expected, rtol=1e-4, atol=0)


def build(case: Case) -> Contest:
    competitors = {
        "ours": Competitor(select(confidence_select), theirs=False),
        "token_confidence": Competitor(
            lambda b: token_confidence(b[0], mask_id=MASK_ID)[:2], theirs=False
        ),
        "reference": Competitor(select(confidence_select_reference)),
        "published, float64": Competitor(published),
        "float32 softmax": Competitor(lambda b: float32_softmax(b[0])),
    }
    if ON_GPU:
        competitors["torch.compile"] = Competitor(lambda b: compiled()(b[0]))
    moved = case.positions * case.vocab * DTYPE.itemsize
    return Contest(
        "confidence_select",
        str(case),
        competitors,
        lambda i: inputs(case, i),
        check,
        moved,
        reach=case.reach,
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_select(case, name, compete):
    compete(build, case, name)
