"""The reference meaning of the rules, on [B, T] tensors."""

import dataclasses
import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_decode import choose, even_plan

from fastdllm_kernels import (
    Factor,
    Quota,
    Threshold,
    branch_of,
    check_rule,
    commit_of,
    fault_error,
    fixed_values,
    per_row,
    per_row_fields,
    row_values,
    rules,
    with_row_values,
)

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
    "masks, steps", [(32, 8), (32, 16), (32, 5), (64, 48), (31, 7), (9, 1), (128, 100)]
)
def test_dreams_schedule_is_the_published_one(masks, steps):
    wanted = published_dream_counts(masks, steps)
    counts = run_quota(Quota(steps, schedule="dream"), masks)
    assert counts + [0] * (steps - len(counts)) == wanted


def dream_share(masks, steps, step):
    """The schedule's share as it is published, in the rules' own arithmetic."""
    now, then = rules._dream_time(step, steps), rules._dream_time(step + 1, steps)
    share = (masks.to(torch.float32) * (1 - then / now)).to(torch.int64)
    return torch.where(steps - step <= 1, masks, share)


def test_dreams_shares_are_the_published_ones_where_there_are_masks_for_all_steps():
    for steps in range(1, 65):
        masks = torch.arange(steps, 65)  # a row for every block that has as many masks or more
        each = torch.full_like(masks, steps)
        for step in range(steps):
            at = torch.full_like(masks, step)
            count = rules.quota_count(masks, each, at, "dream")
            assert torch.equal(count, dream_share(masks, each, at))
            masks = masks - count
        assert not masks.any()


@pytest.mark.parametrize("steps", [21, 30, 1000, 20_000, 2**24])
def test_dreams_schedule_takes_no_more_forwards_than_there_are_masks(steps):
    for masks in (1, 2, 5, 20):
        counts = run_quota(Quota(steps, schedule="dream"), masks)
        assert min(counts) >= 1 and len(counts) <= masks


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


stated_rules = st.one_of(
    st.floats(0, 1.5, width=32).map(lambda tau: (("threshold", tau), Threshold(tau))),
    st.floats(0.015625, 4, width=32).map(lambda f: (("factor", f), Factor(f))),
    st.integers(1, 12).map(lambda steps: (("quota", steps), Quota(steps))),
    st.integers(1, 12).map(lambda steps: (("dream", steps), Quota(steps, schedule="dream"))),
)


@CHECKED
@given(
    stated_rules,
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


# What the rest of the project asks of a rule.


@dataclasses.dataclass(frozen=True, eq=False)
class Band:
    """Two parameters and no branch: commit what scores in [low, high], and the first candidate."""

    low: float | torch.Tensor = per_row(0.25)
    limit: int | torch.Tensor = per_row(dtype=torch.int64, default=3)
    name: str = "band"

    def commit(self, scores, candidates, step):
        first = candidates & (candidates.cumsum(1) == 1)
        return first | (candidates & (scores >= rules._column(self.low, scores)))


class Cautious(Threshold):
    """A subclass with another meaning."""

    def commit(self, scores, candidates, step):
        return Quota(2).commit(scores, candidates, step)


def first_candidate(scores, candidates, step):
    return candidates & (candidates.cumsum(1) == 1)


def test_a_rule_says_its_own_fields():
    assert [field.name for field in per_row_fields(Quota(3))] == ["steps"]
    assert fixed_values(Quota(3, "dream")) == (("schedule", "dream"),)
    assert [field.name for field in per_row_fields(Band())] == ["low", "limit"]
    assert fixed_values(Band(name="x")) == (("name", "x"),)
    assert per_row_fields(first_candidate) == () == fixed_values(first_candidate)
    assert [branch_of(rule) for rule in (Threshold(), Factor(), Quota(1))] == [
        "threshold",
        "factor",
        "quota",
    ]
    assert branch_of(first_candidate) is None and branch_of(Band()) is None


def test_a_subclass_does_not_inherit_the_branch():
    assert branch_of(Cautious()) is None


def test_a_field_named_branch_is_a_field():
    @dataclasses.dataclass(frozen=True)
    class Tree:
        branch: str = "threshold"

        def commit(self, scores, candidates, step):
            return candidates

    assert branch_of(Tree()) is None and fixed_values(Tree()) == (("branch", "threshold"),)


def test_two_classes_cannot_have_one_branch_but_a_class_may_be_defined_again():
    def define(qualname):
        @dataclasses.dataclass(frozen=True)
        class Again:
            __qualname__ = qualname
            branch: ClassVar[str] = "defined again"
            share: float = per_row(0.5)

            def commit(self, scores, candidates, step):
                return candidates

        return Again

    first, second, other = define("Again"), define("Again"), define("Other")
    flat = [rules.flatten(kind(), torch.device("cpu")) for kind in (first, second)]
    assert type(rules.unflatten(*flat[0])) is second
    with pytest.raises(ValueError, match="declares the branch 'defined again'"):
        branch_of(other())


@pytest.mark.parametrize(
    "rule",
    [
        Threshold(0.3),
        Threshold(math.inf),
        Factor(torch.tensor([0.1, 1, 3], dtype=torch.float64)),
        Quota(7, "dream"),
        Quota(torch.tensor([1, 2**24, 5], dtype=torch.int32)),
        Band(torch.tensor([0.1, 0.2, 0.3]), 2),
    ],
)
def test_row_values_and_back(rule):
    """As the loop does it: float64 bits in a plan of integers, then tensors on the device."""
    rows = row_values(rule, 3)
    columns = [torch.tensor(row, dtype=torch.float64).view(torch.int64) for row in rows]
    again = with_row_values(rule, [column.view(torch.float64) for column in columns])
    assert type(again) is type(rule) and fixed_values(again) == fixed_values(rule)
    for field in per_row_fields(rule):
        value, dtype = getattr(again, field.name), field.metadata["per_row"]
        assert value.dtype == dtype
        wanted = torch.as_tensor(getattr(rule, field.name)).to(dtype).expand(3)
        assert torch.equal(value, wanted)


def test_row_values_does_not_run_the_classs_own_checks():
    @dataclasses.dataclass(frozen=True)
    class Checked:
        share: float = per_row(0.5)

        def __post_init__(self):
            assert not isinstance(self.share, torch.Tensor)

        def commit(self, scores, candidates, step):
            return candidates

    changed = with_row_values(Checked(), [torch.tensor([0.25, 0.5], dtype=torch.float64)])
    assert changed.share.dtype == torch.float32


@pytest.mark.parametrize(
    "rule",
    [
        Threshold(0.3),
        Threshold(torch.tensor([0.25, 0.5])),
        Factor(2.5),
        Quota(3, "dream"),
        Quota(torch.tensor([1, 3])),
    ],
)
def test_a_rule_survives_the_operators_flat_arguments(rule):
    again = rules.unflatten(*rules.flatten(rule, torch.device("cpu")))
    assert type(again) is type(rule) and fixed_values(again) == fixed_values(rule)
    for field in per_row_fields(rule):
        value, wanted = getattr(again, field.name), getattr(rule, field.name)
        assert type(value) is type(wanted)
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(wanted))


def not_frozen():
    @dataclasses.dataclass
    class Loose:
        def commit(self, scores, candidates, step):
            return candidates

    return Loose()


@dataclasses.dataclass(frozen=True)
class NoCommit:
    share: float = 0.5


class NoDataclass:
    def commit(self, scores, candidates, step):
        return candidates


@pytest.mark.parametrize(
    "rule, error, message",
    [
        (Threshold, TypeError, "rule: expected an instance.*Threshold"),
        (None, TypeError, "rule: expected a frozen dataclass.*None"),
        (0.9, TypeError, "rule: expected a frozen dataclass.*0.9"),
        ("threshold", TypeError, "rule: expected a frozen dataclass"),
        (not_frozen(), TypeError, "rule: expected a frozen dataclass.*Loose"),
        (NoCommit(), TypeError, "rule: expected a frozen dataclass.*NoCommit"),
        (NoDataclass(), TypeError, "rule: expected a frozen dataclass.*NoDataclass"),
        (Threshold(torch.zeros(3)), ValueError, r"Threshold.tau.*each of 2 rows.*\(3,\)"),
        (Quota(torch.ones(1, 2).long()), ValueError, r"Quota.steps.*\(1, 2\)"),
        (Band(0.5, torch.ones(4).long()), ValueError, r"Band.limit.*\(4,\)"),
    ],
)
def test_what_is_no_rule_is_named(rule, error, message):
    with pytest.raises(error, match=message):
        check_rule(rule, 2)


def test_a_rule_that_is_asked_as_it_is_lies_where_the_scores_do():
    device = torch.device("cuda")
    check_rule(Threshold(torch.ones(2)), 2, device)  # its branch takes a copy
    check_rule(Band(0.5), 2, device)
    with pytest.raises(ValueError, match="rule: expected Band.low on cuda, got a tensor on cpu"):
        check_rule(Band(torch.ones(2)), 2, device)


def test_what_is_a_rule_passes():
    ours = Threshold(0.9), Factor(torch.ones(2)), Quota(3)
    for rule in (*ours, Band(), Cautious(), first_candidate):
        check_rule(rule, 2)


@pytest.mark.parametrize(
    "mask, error, message",
    [
        (lambda c: None, TypeError, "rule: expected commit to return a tensor, got NoneType"),
        (lambda c: c.float(), TypeError, r"rule: .*bool \(2, 3\), got torch.float32 \(2, 3\)"),
        (lambda c: c[:, :2], TypeError, r"rule: .*got torch.bool \(2, 2\)"),
        (lambda c: c.to("meta"), TypeError, "rule: .*on cpu, got meta"),
        (lambda c: ~c, ValueError, "rule: row 0 commits position 0, which is no candidate"),
        (lambda c: c & False, ValueError, "rule: row 0 commits nothing"),
    ],
)
def test_a_wrong_mask_of_a_users_rule_is_named(mask, error, message):
    candidates = torch.tensor([[False, True, True], [False, False, False]])
    commit = commit_of(lambda scores, candidates, step: mask(candidates))
    with pytest.raises(error, match=message):
        commit(torch.rand(2, 3), candidates, torch.zeros(2).long())


def test_a_users_rule_sees_no_nan_and_cannot_change_the_candidates():
    def commit(scores, candidates, step):
        assert not scores.isnan().any()
        mask = candidates.clone()
        candidates.fill_(False)
        return mask

    candidates = torch.tensor([[True, False]])
    scores = torch.tensor([[math.nan, 0.5]])
    assert commit_of(commit)(scores, candidates, torch.zeros(1)).tolist() == [[True, False]]
    assert candidates.tolist() == [[True, False]]


def test_a_value_that_no_kernel_can_be_compiled_for_is_named():
    @dataclasses.dataclass(frozen=True)
    class Odd:
        branch: ClassVar[str] = "odd"
        weights: tuple = (1.0, 2.0)

        def commit(self, scores, candidates, step):
            return candidates

    with pytest.raises(TypeError, match="rule: expected Odd.weights .*tuple"):
        rules.flatten(Odd(), torch.device("cpu"))


@pytest.mark.parametrize("number", [0.0, 2.0**-149, -3.0, 3.4e38, -3.4e38, math.inf, 2**100])
def test_a_threshold_that_float32_holds(number):
    assert Threshold(number).tau == number
    assert not Threshold(torch.tensor([number], dtype=torch.float64)).tau.float().isnan()


def test_what_is_wrong_with_a_mask_may_be_told_on_the_device(device):
    """Of each row; only candidates are committed then."""
    candidates = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]]).bool()
    mask = torch.tensor([[0, 1, 0], [0, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]).bool()
    mask[2, 0] = True
    candidates, mask = candidates.to(device), mask.to(device)
    faults = torch.full((5,), 7, dtype=torch.int32, device=device)
    commit = commit_of(lambda scores, candidates, step: mask, faults=faults)
    scores, step = torch.rand(5, 3, device=device), torch.zeros(5, device=device).long()
    assert torch.equal(commit(scores, candidates, step), mask & candidates)
    assert faults.tolist() == [0, 2, 1, -1, -1]
    said = [str(fault_error(row, fault)) for row, fault in enumerate(faults.tolist()) if fault]
    assert said == [
        "rule: row 1 commits position 1, which is no candidate",
        "rule: row 2 commits position 0, which is no candidate",
        "rule: row 3 commits nothing, and must commit at least one of its candidates",
        "rule: row 4 commits nothing, and must commit at least one of its candidates",
    ]
