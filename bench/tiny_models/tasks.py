"""The kinds of problems that the small models are trained and tested on, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tiny_models import chains, problems


@dataclass(frozen=True)
class Task:
    """`make(index, split)` is a problem; `canvases` are the static lengths that prompt, answer and
    end-of-text fill in training; `gen_length` holds every answer.
    """

    make: Callable[[int, str], problems.Problem]
    canvases: tuple[int, ...]
    gen_length: int
    about: str


# One story to three chains, for models that are to know both.
STORY_EVERY = 4


def make_either(index: int, split: str) -> problems.Problem:
    """Problem number `index` of both kinds in turn; every one is also in its own task."""
    if index % STORY_EVERY == 0:
        return problems.make_problem(index // STORY_EVERY, split)
    return chains.make_problem(index, split)


TASKS = {
    # Prompts of 34 to 55 tokens leave 113 to 150, around gen_length 128.
    "stories": Task(
        problems.make_problem, (168, 184), 128, "arithmetic word problems (problems.py)"
    ),
    # Prompts of 60 to 140 tokens: the shorter canvas is for the shorter chains.
    "chains": Task(chains.make_problem, (336, 400), 256, "chains of 8 to 20 results (chains.py)"),
    "both": Task(make_either, (184, 336, 400), 256, "word problems and chains, one to three"),
}
