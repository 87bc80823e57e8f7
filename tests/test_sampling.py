"""Which rows share a launch of the selection, and that each commits what sorting the vocabulary
would, whatever rows stand beside it.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastdllm import Quota, Threshold, sampling
from fastdllm.families import FAMILIES
from fastdllm_kernels.noise import gumbel_noise

T, V, MASK = 3, 40, 39
DRAWS = [
    {"temperature": 0.2, "top_p": 0.95},
    {"temperature": 1.3, "top_p": 0.5},
    {"temperature": 1, "top_p": 1},  # whole numbers
    {"temperature": 0.7, "top_p": 1e-60},
    {"temperature": 2.0, "top_p": 0.999},
]
LARGEST = [{"temperature": 0.9, "top_k": k} for k in (1, 5, V, 10**30)]
BOTH = [
    {"temperature": 0.9, "top_p": 0.8, "top_k": 3},
    {"temperature": 1.7, "top_p": 0.9, "top_k": 30},
]
GREEDY = [{"top_p": 0.9, "top_k": 5}, {"top_p": 0.2, "top_k": 1}]
MIXES = [DRAWS, LARGEST, BOTH, GREEDY]


def row_of(family, rule, seed=0, score="confidence", temperature=0.0, top_p=None, top_k=None):
    config = SimpleNamespace(family=family, vocab_size=V)
    of_request = sampling.sampling_of(config, rule, score, temperature, top_p, top_k)
    (row,) = sampling.sampling_of_rows(of_request, 1, seed)
    return row


def selected(rows, logits, forwards=0):
    """(Selection, tokens) of rows that share a launch."""
    assert len({row.sampling.kind() for row in rows}) == 1
    tokens = torch.full((len(rows), T), MASK, device=logits.device)
    of_rows = sampling.row_columns(rows, [forwards] * len(rows))
    columns = sampling.Columns.of(step=[0] * len(rows), **of_rows)
    on_device = columns.on(columns.table.to(logits.device))
    candidates = torch.ones_like(tokens, dtype=torch.bool)
    selection = sampling.select(rows[0].sampling, on_device, logits, tokens, candidates, MASK)
    return selection, tokens


def random_logits(device, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(rows, T, V, generator=generator)
    z[:, 0] = z[:, 0].round()  # ties
    z[:, 1, MASK] = z[:, 1].amax(-1) + 1  # the mask would take the nucleus
    return z.to(device)


def by_sorting(logits, row, temperature=0.0, top_p=None, top_k=None):
    """(token_ids [T], scores [T]) of one row: filters by the sorted vocabulary, in float64."""
    heat = float(temperature) or 1.0
    offered = logits.double().cpu() / heat
    offered[:, MASK] = -math.inf
    ordered, order = offered.sort(dim=-1, descending=True, stable=True)
    p = ordered.softmax(-1)
    keep = p.cumsum(-1) - p <= (1 if top_p is None else top_p)
    keep[:, 0] = True
    if top_k is not None:
        keep &= ordered >= ordered.masked_fill(~keep, -math.inf)[:, : min(top_k, V)].amin(-1, True)
    keep = torch.zeros_like(keep).scatter(1, order, keep)
    drawn = offered.masked_fill(~keep, -math.inf)
    if temperature:
        seed = torch.tensor([row.seed_of(0)]).expand(T)
        drawn = drawn + gumbel_noise(seed, torch.arange(T), V)
    token_ids = drawn.argmax(-1)
    scored = logits.double().cpu()
    if row.sampling.filtered_score:
        keep[:, MASK] = True
        scored = (scored / heat).masked_fill(~keep, -math.inf)
    return token_ids, scored.softmax(-1).gather(1, token_ids[:, None])[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", MIXES)
def test_rows_of_one_launch_commit_what_sorting_would(either_backend, device, family, options):
    rows = [row_of(family, Threshold(0.3), seed, **one) for seed, one in enumerate(options)]
    logits = random_logits(device, len(rows))
    selection, tokens = selected(rows, logits)
    for index, (row, one) in enumerate(zip(rows, options, strict=True)):
        token_ids, scores = by_sorting(logits[index], row, **one)
        assert torch.equal(selection.token_ids[index].cpu(), token_ids), one
        torch.testing.assert_close(
            selection.score[index].double().cpu(), scores, rtol=1e-5, atol=1e-7
        )
        sure = (scores >= 0.3) | (torch.arange(T) == scores.argmax())
        assert tokens[index].tolist() == torch.where(sure, token_ids, MASK).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_alone_what_it_is_among_others(either_backend, device, family):
    rows = [row_of(family, Threshold(0.3), seed, **one) for seed, one in enumerate(DRAWS)]
    logits = random_logits(device, len(rows), seed=1)
    together, tokens = selected(rows, logits)
    for index, row in enumerate(rows):
        alone, own = selected([row], logits[index : index + 1])
        assert torch.equal(alone.token_ids[0], together.token_ids[index])
        assert torch.equal(own[0], tokens[index])
        torch.testing.assert_close(alone.score[0], together.score[index], rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rule_that_is_a_function_follows_the_filters(either_backend, device, family):
    def surest(scores, candidates, step):
        return candidates & (scores == scores.amax(1, keepdim=True))

    logits = random_logits(device, len(BOTH), seed=2)
    got, tokens = selected([row_of(family, surest, 3, **one) for one in BOTH], logits)
    fused, wanted = selected([row_of(family, Quota(T), 3, **one) for one in BOTH], logits)
    assert torch.equal(got.token_ids, fused.token_ids) and torch.equal(tokens, wanted)
    torch.testing.assert_close(got.score, fused.score, rtol=1e-6, atol=0)


def test_what_differs_in_numbers_shares_a_launch():
    base = row_of("Dream", Threshold(0.9), temperature=0.2, top_p=0.95).sampling
    for change in ({"temperature": 1.0}, {"top_p": 0.5}, {"rule": Threshold(0.1)}):
        assert replace(base, **change).kind() == base.kind()
    unlike = [
        {"temperature": 0.0},
        {"top_p": None},
        {"top_k": 5},
        {"score": "margin"},
        {"rule": Quota(2)},
        {"rule": Quota(2, "dream")},
        {"filtered_score": False},
    ]
    kinds = {base.kind(), *(replace(base, **change).kind() for change in unlike)}
    assert len(kinds) == 1 + len(unlike)
