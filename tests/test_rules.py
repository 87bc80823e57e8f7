"""The reference meaning of the rules, on [B, T] tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_decode import choose, even_plan

from fastdllm_kernels import Factor, Quota, Threshold

CHECKED = settings(derandomize=True, deadline=None, max_examples=80)


def commit(rule, scores, candidates=None, step=0):
    """The committed positions of one row."""
    scores = torch.tensor([scores], dtype=torch.float32)
    mask = (
        torch.ones_like(scores, dtype=torch.bool)
        if candidates is None
        else torch.tensor([candidates])
    )
    return rule.commit(scores, mask, torch.tensor([step])).nonzero()[:, 1].tolist()


@pytest.mark.parametrize(
    "scores, f, committed",
    [
        ([0.99, 0.99, 0.3], 1.0, [0, 1]),
        ([0.3, 0.3], 1.0, [0]),
        ([0.3], 1.0, [0]),
        ([0.5], 1.0, [0]),
        ([0.5, 0.9], 1.0, [1]),
        (
            [0.75, 0.75, 0.75],
            1.0,
            [0, 1, 2],
        ),  # (3 + 1)(1 - 3/4) is exactly 1: the bound itself passes
        ([0.75, 0.75, 0.75, 0.75], 1.0, [0, 1, 2]),
        ([0.99, 0.3, 0.99], 1.0, [0, 2]),
        ([1.0] * 8, 1.0, list(range(8))),
        ([0.875] * 8, 0.5, [0, 1, 2]),
        ([0.3, 0.3], 10.0, [0, 1]),
        ([0.99, 0.99], 1e-6, [0]),
    ],
)
def test_factor_table(scores, f, committed):
    assert commit(Factor(f), scores) == committed


def test_the_factor_is_one_unless_told_otherwise_and_the_threshold_nine_tenths():
    assert Factor().f == 1 and Threshold().tau == 0.9


@pytest.mark.parametrize(
    "scores, tau, committed",
    [
        ([0.95, 0.5, 0.9, 0.2], 0.9, [0, 2]),  # fp32 0.9 is not below the threshold 0.9
        ([0.1, 0.5, 0.3], 0.9, [1]),
        ([0.1, 0.5, 0.5], 0.9, [1]),
        ([0.2, 0.2, 0.2], 0.2, [0, 1, 2]),
        ([1.0, 1.0, 1.0], 1.5, [0]),
        ([0.2, 1.0, 1.0], 1.5, [1]),
        ([-3.0, -0.5, -2.0], -1.0, [1]),
        ([-3.0, -0.5, -2.0], -2.5, [1, 2]),
    ],
)
def test_threshold_commits_what_reaches_it_and_always_the_best(scores, tau, committed):
    assert commit(Threshold(tau), scores) == committed


@pytest.mark.parametrize("rule", [Threshold(2.0), Factor(1e-9), Quota(4)])
def test_a_tie_goes_to_the_lower_position(rule):
    assert commit(rule, [0.1, 0.7, 0.7, 0.7]) == [1]
    assert commit(rule, [0.7, 0.7, 0.7, 0.7], [False, False, True, True]) == [2]


@pytest.mark.parametrize(
    "rule", [Threshold(0.5), Factor(1.0), Quota(1), Quota(1, schedule="dream")]
)
def test_a_position_that_is_no_candidate_is_never_committed(rule):
    assert commit(rule, [1.0, 0.9, 1.0, 0.95], [False, True, False, True]) == [1, 3]
    assert commit(rule, [1.0, 0.9], [False, False]) == []


def test_candidates_that_score_minus_infinity_are_still_candidates():
    low = -torch.inf
    assert commit(Threshold(0.9), [0.5, low, low], [False, True, True]) == [1]
    assert commit(Quota(1), [0.5, low, low], [False, True, True]) == [1, 2]
    assert commit(Quota(2), [low, low, 0.1]) == [0, 2]


def run_quota(quota, masks, width=None):
    """How many each step commits, from `masks` masked positions to none."""
    width = width or masks
    candidates = torch.zeros(1, width, dtype=torch.bool)
    candidates[0, width - masks :] = True
    scores = torch.rand(1, width, generator=torch.Generator().manual_seed(masks))
    counts = []
    while candidates.any():
        committed = quota.commit(scores, candidates, torch.tensor([len(counts)]))
        assert not (committed & ~candidates).any()
        counts.append(int(committed.sum()))
        candidates &= ~committed
        assert len(counts) < 400
    return counts


@pytest.mark.parametrize(
    "masks, steps, counts",
    [
        (10, 4, [3, 3, 2, 2]),
        (32, 32, [1] * 32),
        (32, 16, [2] * 16),
        (7, 3, [3, 2, 2]),
        (5, 1, [5]),
        (3, 8, [1, 1, 1]),
        (1, 1, [1]),
    ],
)
def test_an_even_quota_gives_the_remainder_to_the_first_steps(masks, steps, counts):
    assert run_quota(Quota(steps), masks) == counts
    assert run_quota(Quota(steps), masks, width=masks + 3) == counts


@pytest.mark.parametrize("tokens", [2, 3, 8, 32, 100, 256])
def test_dreams_schedule_with_a_step_per_token_starts_empty_and_ends_with_two(tokens):
    assert run_quota(Quota(tokens, schedule="dream"), tokens) == [0] + [1] * (tokens - 2) + [2]


def published_dream_counts(masks, steps):
    times = torch.linspace(1, 0.001, steps + 1)
    counts = []
    for step in range(steps):
        count = int(masks * (1 - times[step + 1] / times[step])) if step < steps - 1 else masks
        counts.append(count)
        masks -= count
    return counts


@pytest.mark.parametrize(
    "masks, steps", [(32, 8), (32, 16), (32, 5), (64, 48), (20, 30), (31, 7), (9, 1), (128, 100)]
)
def test_dreams_schedule_is_the_published_one(masks, steps):
    wanted = published_dream_counts(masks, steps)
    counts = run_quota(Quota(steps, schedule="dream"), masks)
    assert counts + [0] * (steps - len(counts)) == wanted


@pytest.mark.parametrize("schedule", ["even", "dream"])
def test_a_step_past_the_last_commits_everything_left(schedule):
    assert commit(Quota(4, schedule=schedule), [0.1, 0.2, 0.3], step=3) == [0, 1, 2]
    assert commit(Quota(4, schedule=schedule), [0.1, 0.2, 0.3], step=9) == [0, 1, 2]


@pytest.mark.parametrize(
    "rule, alone",
    [
        (
            Threshold(torch.tensor([0.9, 0.5, 2.0])),
            [Threshold(0.9), Threshold(0.5), Threshold(2.0)],
        ),
        (Factor(torch.tensor([1.0, 0.3, 9.0])), [Factor(1.0), Factor(0.3), Factor(9.0)]),
        (Quota(torch.tensor([1, 3, 7])), [Quota(1), Quota(3), Quota(7)]),
        (
            Quota(torch.tensor([1, 3, 7]), schedule="dream"),
            [Quota(s, schedule="dream") for s in (1, 3, 7)],
        ),
    ],
)
def test_each_row_may_have_its_own_parameter(rule, alone):
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(3, 12, generator=generator)
    candidates = torch.rand(3, 12, generator=generator) < 0.8
    step = torch.tensor([0, 1, 2])
    together = rule.commit(scores, candidates, step)
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(
            together[one], alone[row].commit(scores[one], candidates[one], step[one])
        )


rules = st.one_of(
    st.floats(0, 1.5, width=32).map(lambda tau: (("threshold", tau), Threshold(tau))),
    st.floats(0.015625, 4, width=32).map(lambda f: (("factor", f), Factor(f))),
    st.integers(1, 12).map(lambda steps: (("quota", steps), Quota(steps))),
    st.integers(1, 12).map(lambda steps: (("dream", steps), Quota(steps, schedule="dream"))),
)


@CHECKED
@given(
    rules,
    # Multiples of 1/16: every product in a rule is exact, so ties and bounds fall on the same side
    # in any precision.
    st.lists(st.tuples(st.integers(0, 16), st.booleans()), min_size=1, max_size=12),
    st.integers(0, 14),
)
def test_rules_commit_what_their_statement_says(rule, row, step):
    stated, product = rule
    scores = [score / 16 for score, _ in row]
    candidates = [is_candidate for _, is_candidate in row]
    if stated[0] == "quota":  # the plan of a block that still has as many masks as the row shows
        left = max(1, stated[1] - step)
        plan = [0] * (stated[1] - left) + even_plan(sum(candidates), left)
        wanted_step = min(step, stated[1] - 1)
    else:
        plan, wanted_step = None, step
    committed = commit(product, scores, candidates, step)
    if not any(candidates):
        assert committed == []
        return
    alone = {position: scores[position] for position in range(len(row)) if candidates[position]}
    wanted, slack = choose(stated, alone, wanted_step, plan)
    if stated[0] == "dream" and slack < 1e-4 and step < stated[1] - 1:
        # the truncation of the published float32 arithmetic decides: compared above, against its
        # own statement
        return
    assert committed == sorted(wanted)
    assert all(candidates[position] for position in committed)
    assert committed or stated[0] == "dream"
