"""From the logits of an active block to committed tokens: how one request proposes, scores, filters
and commits (arXiv 2505.22618, section 3.3), and which rows share a launch of that.
"""

import math
import struct
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Protocol

import torch

from fastdllm_kernels import SCORES, Selection, Threshold, confidence_select
from fastdllm_kernels.rules import (
    Kept,
    branch_of,
    fixed_values,
    per_row_fields,
    row_values,
    score_of,
    with_row_values,
)

from . import arguments
from .config import ModelConfig
from .families import FAMILIES

# Spreads consecutive seeds over the 64-bit keys; as a signed number.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
BEST_ONE = Threshold(math.inf)
# So that logits divided by a temperature are numbers, and tell one from another.
COLDEST, HOTTEST = 1e-30, 1e30
# float32 holds it, and the largest of any vocabulary passes it alone.
SMALLEST_TOP_P = 1e-30
# The numbers of a Sampling that may differ between rows of a launch, and what the kernel takes.
NUMBERS = {"temperature": torch.float32, "top_p": torch.float32, "top_k": torch.int32}


class Commits(Protocol):
    """A rule that is a frozen dataclass: see fastdllm_kernels.rules."""

    def commit(
        self, scores: torch.Tensor, candidates: torch.Tensor, step: torch.Tensor, /
    ) -> torch.Tensor: ...


class CommitsByMemory(Protocol):
    """The same of a rule with a memory."""

    memory: ClassVar[Mapping[str, Kept]]

    def commit(
        self,
        scores: torch.Tensor,
        candidates: torch.Tensor,
        step: torch.Tensor,
        token_ids: torch.Tensor,
        memory: Mapping[str, torch.Tensor],
        /,
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]: ...


Rule = (
    Commits | CommitsByMemory | Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
)
"""A rule of any kind: a dataclass, with a memory or without, or a function of commit's arguments.
"""


@dataclass(frozen=True, eq=False)
class Sampling:
    """How the rows of one request are proposed, scored and committed.

    rule: what is committed, a rule's dataclass or a function. score: one of SCORES. temperature: 0
    takes the best token. top_p, top_k: filters of the proposals, or None. filtered_score: the
    family scores after temperature and filters (Dream), not by the clean softmax (LLaDA).
    """

    rule: Rule
    score: str = "confidence"
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    filtered_score: bool = False

    @property
    def draws(self) -> bool:
        """Whether chance decides anything, so that a seed is needed."""
        return self.temperature > 0 or self.score == "random"

    def kind(self) -> Hashable:
        """What a launch depends on beside numbers that may differ from row to row."""
        branch = branch_of(self.rule)
        rule = (branch, fixed_values(self.rule)) if branch else id(self.rule)
        filters = self.top_p is not None, self.top_k is not None
        return rule, self.score, self.temperature > 0, filters, self.filtered_score


class RowSampling(NamedTuple):
    """One row's Sampling: its values of the rule's per-row fields, and the seed of its draws."""

    sampling: Sampling
    values: tuple[float, ...]
    seed: int

    def first_alone(self) -> "RowSampling":
        """The same where a forward commits one position, whatever its score."""
        return RowSampling(replace(self.sampling, rule=BEST_ONE), (math.inf,), self.seed)

    def seed_of(self, forwards: int) -> int:
        """The key of the draws in a row's forward number `forwards`, as int64 holds it."""
        return _signed(self.seed * GOLDEN + forwards)


def sampling_of(
    config: ModelConfig,
    rule: Rule,
    score: str | None,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
) -> Sampling:
    """The Sampling that these arguments of `generate` ask for. TypeError and ValueError, naming the
    argument.
    """
    if score is not None:
        arguments.choice("score", score, SCORES)
    score = score_of(rule, score)
    temperature = arguments.number("temperature", temperature, at_least=0)
    if temperature:
        temperature = float(min(max(temperature, COLDEST), HOTTEST))
    if top_p is not None:
        arguments.number("top_p", top_p, above=0, at_most=1)
        top_p = float(max(top_p, SMALLEST_TOP_P))
    top_k = arguments.top_k(top_k)
    if top_k is not None:
        top_k = min(top_k, config.vocab_size)
    return Sampling(
        rule,
        score,
        temperature,
        top_p,
        top_k,
        FAMILIES[config.family].filtered_score,
    )


def sampling_of_rows(sampling: Sampling, rows: int, seed: int | None) -> list[RowSampling]:
    """The RowSampling of each of `rows` rows: row b draws as a single row with seed + b would.

    seed: None takes one from torch's global generator, where chance decides anything.
    """
    if seed is not None:
        arguments.integer("seed", seed, -math.inf)
    elif sampling.draws:
        seed = int(torch.randint(2**62, (), device="cpu"))
    values: Iterable[tuple] = [()] * rows
    if not _is_function(sampling.rule) and per_row_fields(sampling.rule):
        values = zip(*row_values(sampling.rule, rows), strict=True)
    return [
        RowSampling(sampling, tuple(of_row), (seed or 0) + row) for row, of_row in enumerate(values)
    ]


def _is_function(rule):
    return not hasattr(rule, "commit")


def _signed(number):
    """A number's low 64 bits, as int64 holds them."""
    return (number + 2**63) % 2**64 - 2**63


@dataclass(frozen=True, eq=False)
class Columns:
    """One number of each row under some names, on their way to the device in one copy.

    table: [names, rows and padding] int64 on the host; columns of floats hold the bits of float64.
    layout: (names, which of them hold floats, the number of rows).
    """

    table: torch.Tensor
    layout: tuple[tuple[str, ...], tuple[bool, ...], int]

    @classmethod
    def of(cls, **columns: list) -> "Columns":
        """Of lists of ints or floats, as long as there are rows."""
        rows = len(next(iter(columns.values())))
        padding = [0] * (rows % 2)  # whole 16 bytes: kernels are compiled for pointers' alignment
        floats = tuple(isinstance(column[0], float) for column in columns.values())
        table = [
            [*(map(_bits, column) if is_float else column), *padding]
            for column, is_float in zip(columns.values(), floats, strict=True)
        ]
        layout = tuple(columns), floats, rows
        return cls(torch.tensor(table, dtype=torch.int64, device="cpu"), layout)

    def on(self, table: torch.Tensor) -> dict[str, torch.Tensor]:
        """The columns [R] of a table of this layout on the device, int64 or float64."""
        names, floats, rows = self.layout
        return {
            name: (column.view(torch.float64) if is_float else column)[:rows]
            for name, is_float, column in zip(names, floats, table, strict=True)
        }


def _bits(number):
    """The bits of a float64, as int64 holds them."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


def row_columns(rows: list[RowSampling], forwards: list[int]) -> dict[str, list]:
    """What `select` wants of rows of one kind on the device: the seeds of their draws, counted by
    the forwards each has made; the numbers of their rule, where that has a branch in the kernel or
    they differ; and temperature and filters, where chance decides or they differ.
    """
    first = rows[0].sampling
    columns = {}
    if first.draws:
        pairs = zip(rows, forwards, strict=True)
        columns["seed"] = [row.seed_of(forward) for row, forward in pairs]
    for name in NUMBERS:
        # None and 0 are off, in all rows or in none.
        if getattr(first, name):
            columns[name] = [getattr(row.sampling, name) for row in rows]
    if branch_of(first.rule) or not _shares_rule(rows):
        for index, of_field in enumerate(zip(*(row.values for row in rows), strict=True)):
            columns[f"rule{index}"] = list(of_field)
    return columns


def select(
    sampling: Sampling,
    columns: dict[str, torch.Tensor],
    logits: torch.Tensor,
    tokens: torch.Tensor,
    candidates: torch.Tensor,
    mask_id: int,
    memory: Mapping[str, torch.Tensor] | None = None,
    faults: torch.Tensor | None = None,
    decide: Callable[..., Selection] = confidence_select,
) -> Selection:
    """Propose, score and commit for rows of one kind: logits [R, T, V]; of tokens [R, T] int64
    those that are candidates [R, T] bool may be committed, in place.

    columns: of `row_columns`, on the device, and "step" [R] int64, the forwards in the row's block.
    memory: what the rule keeps, [R, T] tensors by name, updated; empty for most. faults: as in
    `confidence_select`. decide: that, or what does the same for a part of the vocabulary.
    A rule that is a function is called with these rows; TypeError says what is no mask at all.
    """
    rule = sampling.rule
    values = [column for name, column in columns.items() if name.startswith("rule")]
    if values:
        rule = with_row_values(rule, values)
    numbers = {
        name: columns[name].to(dtype) if name in columns else getattr(sampling, name)
        for name, dtype in NUMBERS.items()
    }
    if "top_p" in columns:  # 0 while the selection is captured
        numbers["top_p"] = numbers["top_p"].clamp(min=SMALLEST_TOP_P)
    return decide(
        logits,
        tokens,
        mask_id=mask_id,
        rule=rule,
        candidates=candidates,
        score=sampling.score,
        filtered_score=sampling.filtered_score,
        seed=columns.get("seed"),
        step=columns["step"],
        memory=memory,
        faults=faults,
        **numbers,
    )


def _shares_rule(rows):
    """Whether one rule, without numbers that differ from row to row, serves all rows."""
    rule = rows[0].sampling.rule
    if any(row.sampling.rule is not rule for row in rows):
        return False
    if _is_function(rule):
        return True
    fields = (getattr(rule, field.name) for field in per_row_fields(rule))
    return not any(isinstance(value, torch.Tensor) for value in fields)
