"""confidence_select: from the logits of blocks to proposals, scores and commits; and the same with
the sampling that Dream publishes, temperature 0.2 and top_p 0.95. Only ours applies a rule and
commits.
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
from fastdllm_kernels.select import kept_tokens

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


FILTERED_NAMES = ["ours", "greedy", "sorted", "reference"] + ["sorted, torch.compile"] * ON_GPU
FILTERED_CASES = [Case(126464, 32, 108), Case(152064, 32, 110)] if ON_GPU else [Case(257, 32)]
TEMPERATURE, TOP_P = 0.2, 0.95


def select_filtered(op, **sampling):
    def call(buffer):
        logits, tokens, candidates = buffer
        blocks = logits.view(*tokens.shape, -1)
        options = {"mask_id": MASK_ID, "rule": Threshold(0.9), "candidates": candidates}
        result = op(blocks, tokens, seed=1, **options, **sampling)
        return result.token_ids.flatten(), result.score.flatten()

    return call


def sorted_filter(logits):
    """What decoders do: sort, cut, softmax, draw."""
    scaled = logits.float() / TEMPERATURE
    ordered, order = scaled.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    dropped = probabilities.cumsum(-1) - probabilities > TOP_P
    dropped = torch.zeros_like(dropped).scatter(-1, order, dropped)
    probabilities = scaled.masked_fill(dropped, -torch.inf).softmax(-1)
    token_ids = (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)
    return token_ids, probabilities.gather(-1, token_ids[:, None])[:, 0]


@cache
def compiled_filter():
    return torch.compile(sorted_filter, dynamic=False)


def check_filtered(result, buffer):
    """The proposal is one of the nucleus, and its score its probability there."""
    token_ids, score = result
    z = buffer[0].float()
    kept = kept_tokens(z, torch.tensor(1 / TEMPERATURE, device=z.device), TOP_P, None)
    chosen = token_ids[:, None]
    assert kept.gather(-1, chosen).all(), "a proposal lies outside of the nucleus"
    scaled = (z.double() / TEMPERATURE).masked_fill(~kept, -torch.inf)
    expected = scaled.softmax(-1).gather(-1, chosen)[:, 0]
    if score is not None:
        torch.testing.assert_close(score.double(), expected, rtol=1e-3, atol=0)


def build_filtered(case: Case) -> Contest:
    sampling = {"temperature": TEMPERATURE, "top_p": TOP_P, "filtered_score": True}
    greedy = select(confidence_select)
    competitors = {
        "ours": Competitor(select_filtered(confidence_select, **sampling), theirs=False),
        # What the filters and the draw add to: the argmax, whose score is another.
        "greedy": Competitor(lambda b: (greedy(b)[0], None), theirs=False),
        "reference": Competitor(select_filtered(confidence_select_reference, **sampling)),
        "sorted": Competitor(lambda b: sorted_filter(b[0])),
    }
    if ON_GPU:
        competitors["sorted, torch.compile"] = Competitor(lambda b: compiled_filter()(b[0]))
    return Contest(
        "confidence_select, top_p",
        str(case),
        competitors,
        lambda i: inputs(case, i),
        check_filtered,
        case.positions * case.vocab * DTYPE.itemsize,
        reach=case.reach,
    )


@pytest.mark.parametrize("name", FILTERED_NAMES)
@pytest.mark.parametrize("case", FILTERED_CASES, ids=str)
def test_select_filtered(case, name, compete):
    compete(build_filtered, case, name)
