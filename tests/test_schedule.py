"""Schedule: the table of what a row's forwards compute, without a model."""

import pytest

from fastdllm.cache import CachePolicy
from fastdllm.schedule import Row, Schedule, Work

MASK, STOP = 9, 7


def row_of(prompt=3, masks=10, **fields):
    return Row([1] * prompt + [MASK] * masks, prompt_length=prompt, **fields)


def walked(schedule, row, per_forward=2):
    """Every Work of the row, each committing the first `per_forward` masks that it may."""
    schedule.begin(row)
    works = []
    while not row.done:
        work = schedule.work(row)
        works.append(work)
        masked = [p for p in range(work.start, work.last) if row.text[p] == MASK]
        tokens = list(row.text[row.start : row.end])
        for position in masked[:per_forward]:
            tokens[position - row.start] = 2
        schedule.advance(row, tokens)
    return works


def spans(works):
    return [
        ("refresh" if work.refresh else "cached", work.origin, work.length, work.visible)
        for work in works
    ]


# Prompt 3, 10 masks in blocks of 4, two tokens a forward: canvas 13, blocks at 3, 7 and 11.
TABLE = {
    ("none", 1, None): [("refresh", 0, 13, 13)] * 5,
    ("dual", 1, None): [
        ("refresh", 0, 13, 13),
        ("cached", 3, 4, 13),
        ("refresh", 0, 13, 13),
        ("cached", 7, 4, 13),
        ("refresh", 0, 13, 13),
    ],
    ("prefix", 1, None): [
        ("refresh", 0, 13, 13),
        ("cached", 3, 10, 13),
        ("refresh", 0, 13, 13),
        ("cached", 7, 6, 13),
        ("refresh", 0, 13, 13),
    ],
    ("dual", 0, 0): [
        ("refresh", 0, 7, 7),
        ("cached", 3, 4, 7),
        ("refresh", 3, 8, 11),
        ("cached", 7, 4, 11),
        ("refresh", 3, 10, 13),
    ],
    ("dual", 0, 0, True): [
        ("refresh", 0, 7, 7),
        ("cached", 3, 4, 7),
        ("refresh", 3, 8, 11),
        ("cached", 7, 4, 11),
        ("refresh", 7, 6, 13),
    ],
    ("prefix", 2, None, True): [
        ("refresh", 0, 13, 13),
        ("cached", 3, 10, 13),
        ("refresh", 3, 10, 13),
        ("cached", 7, 6, 13),
        ("refresh", 0, 13, 13),
    ],
    ("prefix", 2, 1): [
        ("refresh", 0, 11, 11),
        ("cached", 3, 8, 11),
        ("refresh", 3, 10, 13),
        ("cached", 7, 6, 13),
        ("refresh", 0, 13, 13),
    ],
}


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_what_each_forward_computes_and_sees(case):
    cache, *fields = case
    policy = CachePolicy(*fields)
    row = row_of()
    works = walked(Schedule(cache, policy, 4, 0, MASK), row)
    assert spans(works) == TABLE[case]
    refreshes = sum(work.refresh for work in works)
    assert (row.refreshes, row.cached_steps) == (refreshes, len(works) - refreshes)
    assert row.forwards == len(works)


def test_with_shifted_outputs_a_refresh_commits_the_first_position_alone():
    works = walked(Schedule("dual", CachePolicy(0), 4, 1, MASK), row_of(masks=4))
    assert works == [
        Work(True, 0, 7, 7, start=3, last=4, alone=True),
        Work(False, 3, 4, 7, start=3, last=7),
        Work(False, 3, 4, 7, start=3, last=7),
    ]
    kept = walked(Schedule("dual", CachePolicy(0), 4, 1, MASK), row_of(masks=8))
    assert [work.origin for work in kept if work.refresh] == [0, 2]  # the prompt's last position
    without = walked(Schedule("none", CachePolicy(), 4, 1, MASK), row_of(masks=4))
    assert not any(work.alone for work in without)


def test_a_stop_ends_the_text_once_nothing_before_it_is_masked():
    schedule = Schedule("dual", CachePolicy(), 4, 0, MASK)
    row = row_of(masks=8, stops=frozenset({STOP}))
    schedule.begin(row)
    schedule.advance(row, [2, MASK, STOP, 2])
    assert not row.done and row.step == 1
    schedule.advance(row, [2, 3, STOP, 2])
    assert row.done and row.text == [1, 1, 1, 2, 3, STOP, STOP, STOP, STOP, STOP, STOP]


def test_holes_between_given_text_are_blocks_of_their_own():
    text = [1, MASK, 4, MASK, 5, 5, 5, 5, MASK, MASK, 6]
    given = frozenset({2, 4, 5, 6, 7, 10})
    schedule = Schedule("dual", CachePolicy(), 3, 0, MASK)
    row = Row(list(text), prompt_length=1, given=given, stops=frozenset({4}))
    works = walked(schedule, row, per_forward=9)
    assert [(work.start, work.last) for work in works] == [(1, 4), (8, 11)]
    assert row.text == [1, 2, 4, 2, 5, 5, 5, 5, 2, 2, 6], "given text stays, a given stop is none"
    nothing = Row([1, 2, 3], prompt_length=3)
    schedule.begin(nothing)
    assert nothing.done and nothing.forwards == 0
