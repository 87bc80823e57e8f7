"""The rules of later papers: `commit` against plain statements of them, and their branches of the
select kernel against `commit`, to the bit.
"""

import math

import pytest
import tiny
import torch
from test_select import assert_same, random_logits, run_both

import fastdllm
from fastdllm_kernels import (
    EntropyBound,
    Factor,
    Frechet,
    Neighbours,
    ProgressThreshold,
    Threshold,
    branch_of,
    confidence_select,
    per_row_fields,
    score_of,
)

triton = pytest.importorskip("triton")
from triton import language as tl  # noqa: E402

from fastdllm_kernels import select_triton  # noqa: E402

INF, NAN = math.inf, math.nan
KINDS = (Frechet, EntropyBound, ProgressThreshold, Neighbours)
BLOCKS, WIDTH = 10_000, 16


# A statement: (candidates' positions best first, their scores likewise, step, width, *parameters)
# -> how many of the best are committed, or which positions.


def frechet(order, scores, step, width, delta):
    def bound(n):
        return math.fsum(scores[:n]) - (n - 1) - (1 - scores[n - 1])

    return max((n for n in range(1, len(order) + 1) if bound(n) > delta), default=1)


def entropy_bound(order, scores, step, width, gamma):
    def dependence(n):
        return math.fsum(sorted(-score for score in scores[:n])[:-1])

    return max(n for n in range(1, len(order) + 1) if dependence(n) <= gamma)


def progress_threshold(order, scores, step, width, tau, alpha):
    left = len(order) / width if step else 1
    return max(1, sum(score >= tau * (1 - alpha * (1 - left)) for score in scores))


def neighbours(order, scores, step, width, anchor, near, distance):
    anchors = [at for at, score in zip(order, scores, strict=True) if score >= anchor]
    helped = {
        at
        for at, score in zip(order, scores, strict=True)
        if score >= near and any(abs(at - other) <= distance for other in anchors)
    }
    return {order[0], *anchors, *helped}


STATED = dict(zip(KINDS, (frechet, entropy_bound, progress_threshold, neighbours), strict=True))


def stated(rule, scores, candidates, step):
    """The mask [B, T] by the rule's statement, in Python's float64. A NaN is worse than any."""
    columns = [getattr(rule, field.name) for field in per_row_fields(rule)]
    columns = [
        column.tolist()
        if isinstance(column, torch.Tensor)
        else [torch.tensor(column, dtype=torch.float32).item()] * len(scores)
        for column in columns
    ]
    mask = torch.zeros_like(candidates)
    rows = zip(scores.tolist(), candidates.tolist(), step.tolist(), *columns, strict=True)
    chosen = []
    for b, (of_row, able, at_step, *parameters) in enumerate(rows):
        keys = {
            at: (1, 0, at) if math.isnan(of_row[at]) else (0, -of_row[at], at)
            for at in range(len(of_row))
            if able[at]
        }
        order = sorted(keys, key=keys.get)
        if not order:
            continue
        in_order = [-INF if math.isnan(of_row[at]) else of_row[at] for at in order]
        found = STATED[type(rule)](order, in_order, at_step, len(of_row), *parameters)
        chosen += [(b, at) for at in (order[:found] if isinstance(found, int) else found)]
    mask[tuple(torch.tensor(chosen).T)] = True
    return mask


def blocks(kind, generator, count=BLOCKS, width=WIDTH, exact=True):
    """(scores, candidates, step) of random blocks, some scores NaN and -inf.

    exact: scores are multiples of 1/64, many of them equal, so that every sum is exact.
    """
    scores = 1 - torch.empty(count, width).exponential_(generator=generator) / 8
    scores = scores.clamp(min=0)
    if kind is EntropyBound:
        scores = (scores - 1) * torch.rand(count, 1, generator=generator)
    if exact:
        scores = (64 * scores).round() / 64
    odd = torch.rand(count, width, generator=generator)
    scores = scores.masked_fill(odd < 0.03, NAN).masked_fill(odd > 0.97, -INF)
    scores[: count // 50] = scores[: count // 50].masked_fill(odd[: count // 50] < 0.9, -INF)
    share = torch.rand(count, 1, generator=generator) * 1.2
    candidates = torch.rand(count, width, generator=generator) < share
    step = torch.randint(0, 4, (count,), generator=generator)
    return scores, candidates, step


def drawn(kind, generator, count=BLOCKS, dtype=torch.float32):
    """A rule with a parameter for each row, multiples of 1/64 or, of the progress, coarser."""

    def each(highest, parts):
        highest = int(highest * parts)
        return torch.randint(0, highest + 1, (count,), generator=generator).to(dtype) / parts

    if kind is ProgressThreshold:
        return kind(each(1, 16), each(1, 8))
    if kind is Neighbours:
        distance = torch.randint(0, WIDTH, (count,), generator=generator)
        return kind(each(1.1, 64), each(1, 64), distance)
    return kind(each(1, 64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exact", [True, False])
def test_a_rule_commits_what_its_statement_says(kind, exact):
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    scores, candidates, step = blocks(kind, generator, exact=exact)
    for rule in (drawn(kind, generator), kind()):
        got = rule.commit(scores, candidates, step)
        assert torch.equal(got, stated(rule, scores, candidates, step))
        assert torch.equal(got.any(1), candidates.any(1)) and not (got & ~candidates).any()
        # It is no rule that commits one or all.
        counts = got.sum(1)
        assert ((counts > 1) & (counts < candidates.sum(1))).sum() > BLOCKS / 20


@pytest.mark.parametrize(
    "rule, scores, committed",
    [
        (Frechet(0.25), [0.9] * 8, [0, 1, 2, 3, 4, 5]),  # 1 - (n + 1) / 10 > 1/4
        (Frechet(0.5), [0.75, 0.75], [0]),  # G(1) is 1/2, which is not more
        (Frechet(0.49), [0.75, 0.75], [0]),  # G(2) is 1/4
        (Frechet(1.0), [1.0, 1.0], [0]),
        (Frechet(0.0), [0.1, 1.0, 1.0, 0.625], [1, 2, 3]),
        (EntropyBound(0.0), [-0.5, 0.0, -0.25, 0.0], [1, 2, 3]),
        (EntropyBound(0.25), [-0.25, -0.25, -9.0], [0, 1]),
        (EntropyBound(0.5), [-0.25, -0.25, -9.0], [0, 1, 2]),
        (ProgressThreshold(0.5, 0.5), [0.375, 0.25, 0.0, 0.0], [0]),
        (Neighbours(0.9, 0.75, 1), [0.8, 0.95, 0.7, 0.8], [0, 1]),
        (Neighbours(0.9, 0.75, 2), [0.8, 0.95, 0.7, 0.8], [0, 1, 3]),
        (Neighbours(0.9, 0.75, 0), [0.8, 0.95, 0.7, 0.8], [1]),
        (Neighbours(INF, 0.75), [0.8, 0.95], [1]),
    ],
)
def test_a_table(rule, scores, committed):
    scores = torch.tensor([scores])
    everything = torch.ones_like(scores, dtype=torch.bool)
    got = rule.commit(scores, everything, torch.zeros(1, dtype=torch.int64))
    assert got.nonzero()[:, 1].tolist() == committed


def test_a_threshold_falls_with_the_masks():
    scores = torch.full((1, 4), 0.8)
    one_left = torch.tensor([[False, False, True, True]])
    rule = ProgressThreshold(0.9, 0.3)  # .9 (1 - .3 / 2) = .765 at half of the block
    for step, count in ((0, 1), (1, 2)):
        assert rule.commit(scores, one_left, torch.tensor([step])).sum() == count


def test_equal_confidences_make_frechet_the_factor_rule():
    scores = torch.arange(1, 64)[:, None].div(64).expand(-1, WIDTH).contiguous()
    everything = torch.ones_like(scores, dtype=torch.bool)
    step = torch.zeros(len(scores), dtype=torch.int64)
    for delta in (1 / 128, 0.2578125, 0.7421875):  # where neither bound is met exactly
        ours = Frechet(delta).commit(scores, everything, step)
        assert torch.equal(ours, Factor(1 - delta).commit(scores, everything, step))


@triton.jit
def _chosen_kernel(
    scores,
    candidates,
    steps,
    parameters,
    chosen,
    width,
    RULE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < width
    able = tl.load(candidates + b * width + at, mask=inside, other=0) != 0
    score = tl.load(scores + b * width + at, mask=inside, other=float("-inf"))
    able = able & (score == score)
    of_row = select_triton._of_row(parameters, b)
    step = tl.load(steps + b)
    mask = select_triton._chosen(score, able, of_row, step, width, RULE, (), WIDTH, CHUNK)
    tl.store(chosen + b * width + at, mask, mask=inside)


def by_the_branch(rule, scores, candidates, step, device, chunk):
    """The mask [B, T] that the kernel's branch chooses, chunk others compared at a time."""
    rows, width = scores.shape
    values = [getattr(rule, field.name) for field in per_row_fields(rule)]
    parameters = tuple(
        value.to(device) if isinstance(value, torch.Tensor) else float(value) for value in values
    )
    chosen = torch.full((rows, width), True, device=device)
    _chosen_kernel[(rows,)](
        scores.to(device),
        candidates.to(device),
        step.to(device),
        parameters,
        chosen,
        width,
        RULE=branch_of(rule),
        WIDTH=triton.next_power_of_2(width),
        CHUNK=chunk,
        enable_fp_fusion=False,
    )
    return chosen.cpu()


def count_on(device):
    return BLOCKS if device.type == "cuda" else 80


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width, chunk", [(16, 16), (13, 4), (1, 1)])
def test_the_branch_is_the_commit_to_the_bit(device, kind, width, chunk):
    count, generator = count_on(device), torch.Generator().manual_seed(width)
    each = drawn(kind, generator, count)
    for rule, exact in ((each, True), (each, False), (kind(), False)):
        scores, candidates, step = blocks(kind, generator, count, width, exact)
        wanted = rule.commit(scores, candidates & ~scores.isnan(), step)
        got = by_the_branch(rule, scores, candidates, step, device, chunk)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", [Frechet, EntropyBound])
def test_no_order_of_additions_decides(device, kind):
    """Where the bound is a sum of the block itself, as one order of its additions rounds it."""
    count, generator = count_on(device), torch.Generator().manual_seed(1)
    doubt = torch.rand(count, WIDTH, generator=generator) / WIDTH
    scores = -doubt if kind is EntropyBound else 1 - doubt
    sums = doubt.sort(dim=1).values.cumsum(1)[:, WIDTH // 2].contiguous()
    rule = kind(sums if kind is EntropyBound else 1 - sums)
    candidates, step = doubt >= 0, torch.zeros(count, dtype=torch.int64)
    wanted = rule.commit(scores, candidates, step)
    assert torch.equal(by_the_branch(rule, scores, candidates, step, device, 4), wanted)
    assert torch.equal(rule.commit(scores.flip(1), candidates, step).flip(1), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_decides_as_the_reference(triton_backend, device, kind):
    logits = random_logits(device, torch.float32, 3, 13, 40)
    tokens = torch.full((3, 13), 39, device=device)
    tokens[1, ::3] = 0
    options = {"mask_id": 39, "score": score_of(kind()), "step": torch.tensor([0, 1, 5]).to(device)}
    each = drawn(kind, torch.Generator().manual_seed(5), 3, torch.float64)
    columns = [getattr(each, field.name).to(device) for field in per_row_fields(each)]
    for rule in (kind(), kind(*columns)):
        assert_same(*run_both(logits, tokens, rule=rule, **options))


def test_a_rule_that_reads_one_score_is_asked_about_no_other():
    assert [score_of(kind()) for kind in KINDS] == ["confidence", "entropy", *2 * ["confidence"]]
    assert score_of(Threshold(), "margin") == "margin" and score_of(leftmost) == "confidence"
    assert score_of(EntropyBound(), "entropy") == "entropy"
    wanted = "^score: expected 'entropy', the one that EntropyBound reads, got 'margin'"
    tokens = torch.full((1, 2), 9)
    with pytest.raises(ValueError, match=wanted):
        confidence_select(
            torch.zeros(1, 2, 10), tokens, mask_id=9, rule=EntropyBound(), score="margin"
        )
    assert (tokens == 9).all()


def leftmost(scores, candidates, step):
    return candidates & (candidates.cumsum(1) == 1)


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_batch_of_each_is_decoded_as_its_rows_alone(device, tmp_path, cache):
    model, _ = tiny.build(tmp_path / "model", tiny.LLADA, device=device)
    prompts = [[5, 6, 7], [8, 9]]
    options = {"gen_length": 12, "block_length": 8, "cache": cache, "stop_ids": ()}
    low = torch.tensor([0.02, 0.5])
    for rule, alone in (
        (Frechet(low), Frechet),
        (EntropyBound(100 * low), lambda gamma: EntropyBound(100 * gamma)),
        (ProgressThreshold(low), ProgressThreshold),
        (Neighbours(low, low / 2), lambda anchor: Neighbours(anchor, anchor / 2)),
    ):
        done = fastdllm.generate(model, prompts, rule=rule, **options)
        for row, number in enumerate(low.tolist()):
            (tokens,) = (
                one := fastdllm.generate(
                    model, prompts[row : row + 1], rule=alone(number), **options
                )
            ).tokens
            assert torch.equal(tokens, done.tokens[row]) and one.nfe[0] == done.nfe[row]
