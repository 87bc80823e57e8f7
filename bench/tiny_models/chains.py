"""Chains of 8 to 20 dependent results on a counter, told in free words: what a cached step can get
wrong.

A counter shows two digits and goes from 99 on to 00. Everybody in a question changes it once, and
the worked answer has a line a person. A result needs the one before it, so no single forward of a
shallow model knows the last one. Four results of a `check` line stand in one run of fixed length;
which of its two ends applies is a word that can be guessed before the results it hangs on are
written, and is wrong about as often as its confidence says.

Wording is drawn at random. The three openings of a line differ in length, so that nothing behind an
undecided one has a certain place. The three closings of a `check` share their words two by two:
each word of "so it shows" is in two of three closings, the whole is none of them. Any legal wording
is a right answer.

Train and test never overlap: a hash of all that a question states puts it in one split for good, as
in problems.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from tiny_models.problems import NAMES, Draw, Problem, drawing, split_of

RESULTS = (8, 20)
# Units modulo 100: every number on the counter stays as likely as any other.
FACTORS = (3, 7, 9)
OPENINGS = {
    "adds": ("adds {n} to {x}", "counts on {n} from {x}", "goes from {x} up by {n}"),
    "takes": ("takes {n} off {x}", "counts back {n} from {x}", "goes from {x} down by {n}"),
    "times": ("times {x} by {n}", "has {n} rows of {x}", "lays out {n} rows of {x}"),
    "turns": ("turns {x}", "swaps over {x}", "reads {x} from behind"),
}
CLOSINGS = ("so it reads", "so this shows", "now it shows")
CHECK = ": {a}, turned {b}, plus {p}: {c}, {word} {t}, {closing} {y}"
SIMPLE = ": {y}"
ASKED = {
    "adds": "adds {n}",
    "takes": "takes {n}",
    "times": "times {n}",
    "turns": "turns it",
    "check": "times {n}, turns it, adds {p}, and over {t} adds {u}, else takes {v}",
}
QUESTION = "A counter shows {x}. {asked} What does it show?"


@dataclass(frozen=True)
class Step:
    """What one person does. `numbers` has its slots as they are written: `x` before, `y` after, the
    operand `n`, and for a `check` all that lies between.
    """

    name: str
    kind: str
    numbers: dict[str, str]

    def line(self, opening: int, closing: int) -> str:
        """The answer's line in one of its wordings."""
        kind = "times" if self.kind == "check" else self.kind
        form = CHECK if self.kind == "check" else SIMPLE
        text = f"{self.name} {OPENINGS[kind][opening]}{form}"
        return text.format_map(self.numbers | {"closing": CLOSINGS[closing]})

    def lines(self) -> set[str]:
        """Every legal wording."""
        return {self.line(i, j) for i in range(3) for j in range(3)}


@dataclass(frozen=True)
class Chain(Problem):
    """A problem with many right answers: `answer_text` is one of them."""

    steps: tuple[Step, ...]

    def is_right(self, text: str) -> bool:
        """Whether every line is a legal wording with the right numbers."""
        *lines, last = text.strip().split("\n")
        if len(lines) != len(self.steps) or last != f"#### {self.final:02}":
            return False
        return all(line in step.lines() for line, step in zip(lines, self.steps, strict=True))


def apply(kind: str, x: int, n: int) -> int:
    """What the counter shows after one plain change; ValueError for an unknown one."""
    if kind == "adds":
        return (x + n) % 100
    if kind == "takes":
        return (x - n) % 100
    if kind == "times":
        return x * n % 100
    if kind == "turns":
        return x % 10 * 10 + x // 10
    raise ValueError(f"kind: expected one of {tuple(OPENINGS)}, got {kind!r}")


def _simple(draw: Draw, x: int) -> tuple[str, dict[str, int]]:
    kind = tuple(OPENINGS)[draw(0, 3)]
    n = FACTORS[draw(0, 2)] if kind == "times" else draw(11, 89)
    return kind, {"x": x, "n": n, "y": apply(kind, x, n)}


def _check(draw: Draw, x: int) -> tuple[str, dict[str, int]]:
    n, p, t = FACTORS[draw(0, 2)], draw(11, 89), draw(20, 79)
    u, v = draw(11, 89), draw(11, 89)
    a = apply("times", x, n)
    b = apply("turns", a, 0)
    c = apply("adds", b, p)
    t += c == t  # "over" or "under", never equal
    y = apply("adds", c, u) if c > t else apply("takes", c, v)
    numbers = {"x": x, "n": n, "p": p, "t": t, "u": u, "v": v, "a": a, "b": b, "c": c, "y": y}
    return "check", numbers


def _step(name: str, kind: str, numbers: dict[str, int]) -> Step:
    written = {slot: f"{number:02}" for slot, number in numbers.items()}
    if kind in ("times", "check"):
        written["n"] = str(numbers["n"])
    if kind == "check":
        written["word"] = "over" if numbers["c"] > numbers["t"] else "under"
    return Step(name, kind, written)


def draw_steps(draw: Draw) -> tuple[Step, ...]:
    """A chain of 8 to 20 results, a fifth to a twelfth of them, at least one, in `check` lines of
    four.
    """
    results = draw(*RESULTS)
    checks = draw(1, results // 5)
    kinds = [_check] * checks + [_simple] * (results - 4 * checks)
    names, x, steps = list(NAMES), draw(0, 99), []
    while kinds:
        kind, numbers = kinds.pop(draw(0, len(kinds) - 1))(draw, x)
        steps.append(_step(names.pop(draw(0, len(names) - 1)), kind, numbers))
        x = numbers["y"]
    return tuple(steps)


def question_of(steps: tuple[Step, ...]) -> str:
    asked = (f"{step.name} {ASKED[step.kind].format_map(step.numbers)}." for step in steps)
    return QUESTION.format(x=steps[0].numbers["x"], asked=" ".join(asked))


def make_problem(index: int, split: str) -> Chain:
    """Problem number `index` (0, 1, ...) of a split, "train" or "test"; the same one on every
    machine and Python.
    """
    _, draw = drawing(index, split)
    while True:
        steps = draw_steps(draw)
        question = question_of(steps)
        if split_of(question, ()) == split:
            break
    lines = [step.line(draw(0, 2), draw(0, 2)) for step in steps]
    final = steps[-1].numbers["y"]
    return Chain(question, "\n".join([*lines, f"#### {final}"]), int(final), steps)


def texts() -> list[str]:
    """Every phrase that a question or an answer can hold, numbers as slots."""
    phrases = [QUESTION, *ASKED.values(), "0" + CHECK, *CLOSINGS, "over", "under"]
    phrases += [phrase for kind in OPENINGS.values() for phrase in kind]
    return [f" {phrase}" for phrase in phrases]
