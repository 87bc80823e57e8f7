"""Arithmetic word problems with worked answers, any number of them, each a pure function of (split,
index).

A template draws the numbers of a problem so that every step is easy in itself: sums and differences
of at most four digits, products of a two-digit and a one-digit number, exact quotients by one
digit. The worked answer is a function of the question, one sentence and one equation a step, and
ends as GSM8K's do: `#### 144`.

Train and test never overlap: a hash of the template and the numbers that the question states puts a
problem in one split for good (1 in 64 is a test problem), whatever names and things surround them,
and the generator draws again until it meets a problem of the split that was asked for.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

SPLITS = ("train", "test")

NAMES = (
    "Mia Ben Ana Tom Lily Omar Nina Sam Zoe Raj Eva Max Ivy Leo Aisha Dan Kim Paul Rosa Yuki Noah "
    "Emma Carlos Ling"
).split()
THINGS = (
    "apples pears plums lemons books pens coins stickers "
    "marbles shells cards stamps beads buttons toys"
).split()
CONTAINERS = "boxes bags baskets crates jars trays".split()
ITEMS = "bike phone guitar camera desk lamp tent coat".split()

Draw = Callable[[int, int], int]  # draw(low, high): uniform, both ends included


@dataclass(frozen=True)
class Problem:
    """`question`, the worked answer `answer_text` that ends in `#### final`, and the number `final`
    itself.
    """

    question: str
    answer_text: str
    final: int

    def is_right(self, text: str) -> bool:
        """Whether a whole worked answer is right: here, letter for letter."""
        return text.strip() == self.answer_text


@dataclass(frozen=True)
class Template:
    """One kind of problem. `numbers` draws every number of it by its one-letter slot, the final one
    as `f`; `given` are the slots that the question states. `questions` are phrasings of one
    problem, `answer` its steps.
    """

    name: str
    given: str
    numbers: Callable[[Draw], dict[str, int]]
    questions: tuple[str, ...]
    answer: str


def _boxes(draw: Draw) -> dict[str, int]:
    a, b, c = draw(3, 9), draw(12, 99), draw(11, 299)
    p = a * b
    q = p + c
    d = draw(11, q - 10)
    return {"a": a, "b": b, "c": c, "d": d, "p": p, "q": q, "f": q - d}


def _two_products(draw: Draw) -> dict[str, int]:
    a, b, c, d = draw(2, 9), draw(11, 99), draw(2, 9), draw(11, 99)
    return {"a": a, "b": b, "c": c, "d": d, "p": a * b, "q": c * d, "s": a * b + c * d}


def _change(draw: Draw) -> dict[str, int]:
    n = _two_products(draw)
    f = draw(10, 999)
    return n | {"e": n["s"] + f, "f": f}


def _stall(draw: Draw) -> dict[str, int]:
    n = _two_products(draw)
    g = draw(2, 9)
    s = max(n["s"], 11 * g + 10)  # too little to share makes e negative, which draw_numbers refuses
    f = draw(11, min(s - 10, 999) // g)
    return n | {"g": g, "e": n["s"] - g * f, "t": g * f, "f": f}


def _savings(draw: Draw) -> dict[str, int]:
    a, b, c, f = draw(11, 99), draw(2, 9), draw(11, 499), draw(10, 999)
    return {"a": a, "b": b, "c": c, "d": a * b + c + f, "p": a * b, "q": a * b + c, "f": f}


def _share(draw: Draw) -> dict[str, int]:
    d = draw(2, 9)
    f = draw(11, 999 // d)
    t, c = d * f, draw(11, 499)
    a = draw(10, t + c - 10)
    return {"a": a, "b": t + c - a, "c": c, "d": d, "s": t + c, "t": t, "f": f}


def _pay(draw: Draw) -> dict[str, int]:
    a, b, c, d = draw(3, 9), draw(4, 9), draw(5, 9), draw(11, 299)
    h = a * b
    q = h * c + d
    e = draw(11, q - 10)
    return {"a": a, "b": b, "c": c, "d": d, "e": e, "h": h, "p": h * c, "q": q, "f": q - e}


def _times(draw: Draw) -> dict[str, int]:
    a, b = draw(11, 99), draw(2, 9)
    p = a * b
    c = draw(5, p - 5)
    return {"a": a, "b": b, "c": c, "p": p, "q": p - c, "s": a + p, "f": a + p + p - c}


def _harvest(draw: Draw) -> dict[str, int]:
    a, b = draw(11, 499), draw(11, 299)
    q = a + b
    c = draw(10, q - 5)
    return {"a": a, "b": b, "c": c, "q": q, "t": q - c, "s": a + q, "f": a + q + q - c}


def _train(draw: Draw) -> dict[str, int]:
    a = draw(60, 899)
    b, c = draw(11, a - 20), draw(11, 199)
    p = a - b
    q = p + c
    d, e = draw(11, q - 10), draw(11, 199)
    return {"a": a, "b": b, "c": c, "d": d, "e": e, "p": p, "q": q, "s": q - d, "f": q - d + e}


def _bakery(draw: Draw) -> dict[str, int]:
    d, r, e = draw(3, 9), draw(11, 60), draw(2, 9)
    a, b = draw(4, 9), draw(30, 99)
    return {
        "a": a,
        "b": b,
        "c": a * b - d * r,
        "d": d,
        "e": e,
        "p": a * b,
        "q": d * r,
        "r": r,
        "f": r * e,
    }


def _spend(draw: Draw) -> dict[str, int]:
    b, c, f = draw(11, 799), draw(11, 799), draw(10, 2999)
    return {"a": b + c + f, "b": b, "c": c, "s": b + c, "f": f}


TEMPLATES = (
    Template(
        "boxes",
        "abcd",
        _boxes,
        (
            "{n} has {a} {k} of {b} {o} and {c} more {o}. {n} gives {d} {o} to {m}. "
            "How many {o} does {n} have left?",
            "There are {b} {o} in each of {a} {k}. {n} adds {c} {o}, and then {m} takes {d} {o}. "
            "How many {o} are left?",
        ),
        "The {a} {k} hold {a} * {b} = {p} {o}.\nWith {c} more there are {p} + {c} = {q} {o}.\n"
        "After {m} takes {d} there are {q} - {d} = {f} {o} left.",
    ),
    Template(
        "change",
        "abcde",
        _change,
        (
            "{n} buys {a} {o} at ${b} each and {c} {u} at ${d} each. {n} pays ${e}. "
            "How many dollars does {n} get back?",
            "{n} has ${e} and buys {a} {o} for ${b} each and {c} {u} for ${d} each. "
            "How many dollars are left?",
        ),
        "The {o} cost {a} * {b} = {p} dollars.\nThe {u} cost {c} * {d} = {q} dollars.\n"
        "Together that makes {p} + {q} = {s} dollars.\nSo {n} keeps {e} - {s} = {f} dollars.",
    ),
    Template(
        "savings",
        "abcd",
        _savings,
        (
            "{n} has ${c} and saves ${a} a week for {b} weeks. A {i} costs ${d}. "
            "How many dollars does {n} still need?",
            "A {i} costs ${d}. {n} has ${c} and saves ${a} a week. "
            "After {b} weeks, how many dollars does {n} still need?",
        ),
        "In {b} weeks {n} saves {b} * {a} = {p} dollars.\n"
        "With the first {c} that makes {p} + {c} = {q} dollars.\n"
        "For the {i} {n} still needs {d} - {q} = {f} dollars.",
    ),
    Template(
        "share",
        "abcd",
        _share,
        (
            "{n} has {a} {o} and {m} has {b} {o}. They sell {c} of them and put the rest evenly "
            "into {d} {k}. How many {o} are in each of the {k}?",
            "{n} and {m} bring {a} and {b} {o}. They sell {c} {o} and share the rest equally "
            "among {d} {k}. How many {o} does each get?",
        ),
        "Together {n} and {m} have {a} + {b} = {s} {o}.\n"
        "After they sell {c} there are {s} - {c} = {t} {o} left.\n"
        "Each of the {d} {k} gets {t} / {d} = {f} {o}.",
    ),
    Template(
        "reading",
        "abcde",
        _change,
        (
            "{n} reads {b} pages a day for {a} days and then {d} pages a day for {c} days. "
            "The book has {e} pages. How many pages are left?",
            "A book has {e} pages. For {a} days {n} reads {b} pages a day, and for the next {c} "
            "days {d} pages a day. How many pages does {n} still need to read?",
        ),
        "In the first {a} days {n} reads {a} * {b} = {p} pages.\n"
        "In the next {c} days {n} reads {c} * {d} = {q} pages.\n"
        "Together that makes {p} + {q} = {s} pages.\nSo {e} - {s} = {f} pages are left.",
    ),
    Template(
        "pay",
        "abcde",
        _pay,
        (
            "{n} works {a} hours a day for {b} days at ${c} an hour. "
            "{m} adds ${d}, and then {n} pays ${e} for a {i}. How many dollars are left?",
            "At ${c} an hour, {n} works {b} days of {a} hours each. "
            "{n} also gets ${d} from {m} and buys a {i} for ${e}. How many dollars does {n} have "
            "left?",
        ),
        "{n} works {a} * {b} = {h} hours.\nFor this {n} gets {h} * {c} = {p} dollars.\n"
        "With the {d} dollars from {m} that makes {p} + {d} = {q} dollars.\n"
        "After the {i} there are {q} - {e} = {f} dollars left.",
    ),
    Template(
        "times",
        "abc",
        _times,
        (
            "{n} has {a} {o}. {m} has {b} times as many {o} as {n}, and {w} has {c} fewer than "
            "{m}. How many {o} do they have together?",
            "{m} has {b} times as many {o} as {n}. {w} has {c} fewer {o} than {m}. "
            "If {n} has {a} {o}, how many {o} do all of them have?",
        ),
        "{m} has {b} * {a} = {p} {o}.\n{w} has {p} - {c} = {q} {o}.\n"
        "{n} and {m} have {a} + {p} = {s} {o}.\n"
        "With {w} that makes {s} + {q} = {f} {o}.",
    ),
    Template(
        "harvest",
        "abc",
        _harvest,
        (
            "{n} picks {a} {o} on Monday, {b} more on Tuesday than on Monday, and {c} fewer on "
            "Friday than on Tuesday. How many {o} does {n} pick in all?",
            "On Monday {n} finds {a} {o}. On Tuesday {n} finds {b} more than on Monday, and on "
            "Friday {c} fewer than on Tuesday. How many {o} are there in all?",
        ),
        "On Tuesday there are {a} + {b} = {q} {o}.\nOn Friday there are {q} - {c} = {t} {o}.\n"
        "Monday and Tuesday make {a} + {q} = {s} {o}.\nWith Friday that makes {s} + {t} = {f} {o}.",
    ),
    Template(
        "train",
        "abcde",
        _train,
        (
            "A train has {a} people. At the first stop {b} get off and {c} get on. "
            "At the next {d} get off and {e} get on. How many people are on the train now?",
            "There are {a} people on a train. Then {b} leave and {c} get on at the first stop, "
            "and {d} leave and {e} get on at the next stop. How many people does the train have "
            "now?",
        ),
        "At the first stop {a} - {b} = {p} people stay.\nThen there are {p} + {c} = {q} people.\n"
        "At the next stop {q} - {d} = {s} people stay.\n"
        "Now there are {s} + {e} = {f} people on the train.",
    ),
    Template(
        "bakery",
        "abcde",
        _bakery,
        (
            "{n} bakes {a} trays of {b} cookies and keeps {c}. The rest go into bags of {d} "
            "cookies, at ${e} a bag. How many dollars does {n} get for all of the bags?",
            "There are {b} cookies on each of {a} trays. {n} keeps {c} cookies and puts the rest "
            "into bags of {d}. {n} sells the bags at ${e} each. How many dollars does {n} get?",
        ),
        "On the trays there are {a} * {b} = {p} cookies.\n"
        "After {n} keeps {c} there are {p} - {c} = {q} cookies.\n"
        "They go into {q} / {d} = {r} bags.\nFor the bags {n} gets {r} * {e} = {f} dollars.",
    ),
    Template(
        "spend",
        "abc",
        _spend,
        (
            "{n} has ${a} and buys a {i} for ${b} and a {j} for ${c}. "
            "How many dollars does {n} have left?",
            "A {i} costs ${b} and a {j} ${c}. {n} pays for one of each with ${a}. "
            "How many dollars does {n} get back?",
        ),
        "The {i} and the {j} together cost {b} + {c} = {s} dollars.\n"
        "Of the first {a} dollars {n} still keeps {a} - {s} = {f} dollars after that.",
    ),
    Template(
        "stall",
        "abcdeg",
        _stall,
        (
            "{n} sells {a} {o} at ${b} each and {c} {u} at ${d} each. "
            "{n} pays ${e} for the table, and {g} friends share the rest equally. "
            "How many dollars does each get?",
            "{g} friends sell {a} {o} for ${b} each and {c} {u} for ${d} each. "
            "The table costs ${e}, and they share the rest equally. "
            "How many dollars does each get?",
        ),
        "The {o} make {a} * {b} = {p} dollars.\nThe {u} make {c} * {d} = {q} dollars.\n"
        "Together that makes {p} + {q} = {s} dollars.\n"
        "After the table there are {s} - {e} = {t} dollars.\n"
        "Each of the friends gets {t} / {g} = {f} dollars.",
    ),
)


def split_of(template: str, given: tuple[int, ...]) -> str:
    """The split, for good, of every problem of this template that states these numbers."""
    key = zlib.crc32(f"{template} {given}".encode())
    mixed = key * 0x9E3779B1 & 0xFFFFFFFF  # the product breaks CRC's linearity
    return "test" if mixed >> 26 == 0 else "train"


def drawing(index: int, split: str) -> tuple[random.Random, Draw]:
    """The generator of problem `index` of a split, and what draws an integer of low .. high from
    it, the same ones on every machine and Python.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    rng = random.Random(2 * index + (split == "test"))
    uniform = rng.random

    def draw(low: int, high: int) -> int:
        return low + int(uniform() * (high - low + 1))

    return rng, draw


def draw_numbers(index: int, split: str) -> tuple[Template, dict[str, int], random.Random]:
    """The template and numbers of problem `index`, and the generator that goes on to draw its names
    and things.
    """
    rng, draw = drawing(index, split)
    while True:
        template = TEMPLATES[draw(0, len(TEMPLATES) - 1)]
        numbers = template.numbers(draw)
        if min(numbers.values()) < 2 or not 10 <= numbers["f"] <= 9999:
            continue
        if split_of(template.name, tuple(numbers[slot] for slot in template.given)) == split:
            return template, numbers, rng


def make_problem(index: int, split: str) -> Problem:
    """Problem number `index` (0, 1, ...) of a split, "train" or "test"; the same one on every
    machine and Python.
    """
    template, slots, rng = draw_numbers(index, split)
    uniform = rng.random

    def others(pool: list[str], first: int, step: int) -> str:
        return pool[(first + step) % len(pool)]

    name = int(uniform() * len(NAMES))
    thing = int(uniform() * len(THINGS))
    item = int(uniform() * len(ITEMS))
    second = 1 + int(uniform() * (len(NAMES) - 2))
    words = {
        "n": NAMES[name],
        "m": others(NAMES, name, second),
        "w": others(NAMES, name, second + 1),
        "o": THINGS[thing],
        "u": others(THINGS, thing, 1 + int(uniform() * (len(THINGS) - 1))),
        "i": ITEMS[item],
        "j": others(ITEMS, item, 1 + int(uniform() * (len(ITEMS) - 1))),
        "k": CONTAINERS[int(uniform() * len(CONTAINERS))],
    }
    words.update(slots)
    question = template.questions[int(uniform() * len(template.questions))].format_map(words)
    return Problem(question, f"{template.answer}\n#### {{f}}".format_map(words), slots["f"])
