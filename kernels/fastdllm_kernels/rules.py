"""Rules: which proposals of an active block to commit.

A rule is an instance of a frozen dataclass with a method

    commit(scores [B, T] fp32, candidates [B, T] bool, step [B] int64) -> mask [B, T] bool

or a plain function of the same arguments. scores: higher is surer. candidates: the positions that
may be committed. step: how many steps each row has made in its block. A rule never sees a model or
a cache. It commits at least one candidate of each row that has any, and no other position; of equal
scores the rules here take the lower position first.

The class says the rest itself, once, in its body:

    tau: float | torch.Tensor = per_row(0.9)   a field that may be a [B] tensor, one entry a row
    schedule: str = "even"                     any other field is fixed for a whole launch
    branch: ClassVar[str] = "threshold"        the rule's branch in the select kernel, if any
    score: ClassVar[str] = "entropy"           the one score that it reads, where not any will do
    memory: ClassVar = {"run": Kept(torch.int64, 0)}    what it keeps of a block from step to step

A rule with a memory is also given the proposals and, by their names, the tensors [B, T] that it
keeps; whoever calls it carries them, and sets them back when a block is done:

    commit(scores, candidates, step, token_ids [B, T] int64, memory) -> (mask, memory)

Without a branch, as with a memory, `commit` runs after the scoring, in PyTorch, and the mask it
returns is checked. With one the kernel decides (`select_triton._chosen`) and `commit` is its
reference. A subclass does not inherit the branch: its `commit` may differ.

Source: Fast-dLLM (arXiv 2505.22618), sections 3.3 and 4 (threshold, factor); LLaDA's and Dream's
own samplers (quota); the others name theirs.
"""

import ast
import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

FLOAT32 = torch.finfo(torch.float32)
SMALLEST_FLOAT32 = 2.0**-149
LARGEST_COUNT = 2**24  # float32 holds every integer up to here
FAR = 2**30  # from any position further than a count says


def per_row(default: Any = dataclasses.MISSING, dtype: torch.dtype = torch.float32) -> Any:
    """A dataclass field that may be a number or a [B] tensor with one entry for each row.

    dtype is what the rule's commit and its kernel compare it in: torch.float32 or torch.int64.
    """
    return dataclasses.field(default=default, metadata={"per_row": dtype})


class Kept(NamedTuple):
    """What a rule keeps of each position: a number of that dtype, `start` when its block begins."""

    dtype: torch.dtype
    start: float


@dataclass(frozen=True, eq=False)
class Threshold:
    """Commit every candidate with score >= tau, and always the best one.

    tau: a number, or a [B] tensor with one per row; above 1 it means one token a step in order of
    confidence. Scores other than the confidence have other ranges: the negative entropy wants a
    tau below 0. Infinity commits the best one alone.
    """

    tau: float | torch.Tensor = per_row(0.9)
    branch: ClassVar[str] = "threshold"

    def __post_init__(self):
        _check_number("Threshold.tau", self.tau, at_most=torch.inf)

    def commit(self, scores, candidates, step):
        """The commit mask [B, T] for scores [B, T], candidates [B, T] and step [B]."""
        sure = scores >= _column(self.tau, scores)
        best = _ranks(scores, candidates) == 0
        return candidates & (sure | best)


@dataclass(frozen=True, eq=False)
class Factor:
    """Commit the best max(1, n) candidates, n the largest with (n + 1)(1 - c(n)) <= f.

    c(1) >= c(2) >= ... are the scores. f: a number > 0, or a [B] tensor. f = 1 is the bound of the
    paper's theorem, below which greedy parallel decoding equals greedy sequential decoding.
    """

    f: float | torch.Tensor = per_row(1.0)
    branch: ClassVar[str] = "factor"

    def __post_init__(self):
        _check_number("Factor.f", self.f, above=0)

    def commit(self, scores, candidates, step):
        """The commit mask [B, T] for scores [B, T], candidates [B, T] and step [B]."""
        ranks = _ranks(scores, candidates)
        # The left side rises with the rank, so those that pass are exactly the leading ones.
        passes = (ranks + 2) * (1 - scores) <= _column(self.f, scores)
        return candidates & (passes | (ranks == 0))


@dataclass(frozen=True, eq=False)
class Quota:
    """Commit a block's masks over a fixed number of steps, the best scores of each step.

    steps: an integer in [1, 2^24], or a [B] integer tensor. schedule "even": as evenly as possible,
    the first steps taking the remainder. "dream": Dream's published schedule, int(m (1 - t[i+1] /
    t[i])) of the m masks left with t = linspace(1, 0.001, steps + 1), the last step all of them.
    Where more steps are asked for than a block has masks every step commits one at least, so that
    the block takes at most as many forwards as it has masks; elsewhere the first may commit none.
    """

    steps: int | torch.Tensor = per_row(dtype=torch.int64)
    schedule: str = "even"
    branch: ClassVar[str] = "quota"

    def __post_init__(self):
        _check_count("Quota.steps", self.steps)
        if self.schedule not in ("even", "dream"):
            raise ValueError(f"Quota.schedule: expected 'even' or 'dream', got {self.schedule!r}")

    def commit(self, scores, candidates, step):
        """The commit mask [B, T] for scores [B, T], candidates [B, T] and step [B]."""
        masks = candidates.sum(1)
        steps = _column_of(torch.int64, self.steps, scores.device)[:, 0]
        count = quota_count(masks, steps, step.to(torch.int64), self.schedule)
        return candidates & (_ranks(scores, candidates) < count[:, None])


def quota_count(masks, steps, step, schedule):
    """How many of `masks` [B] a quota of `steps` commits at `step` [B] (from 0); int64 [B]."""
    left = (steps - step).clamp(min=1)
    if schedule == "even":
        return (masks + left - 1) // left
    now, then = _dream_time(step, steps), _dream_time(step + 1, steps)
    share = (masks.to(torch.float32) * (1 - then / now)).to(torch.int64)
    # With more steps than masks most shares round to 0, forwards that would change nothing.
    may_be_empty = (masks == 0) | (steps <= masks + step)
    share = torch.where(may_be_empty, share, share.clamp(min=1))
    return torch.where(left == 1, masks, share)


def _dream_time(i, steps):
    """torch.linspace(1, 0.001, steps + 1)[i] in float32, in the order of linspace's own arithmetic.

    The truncations fall as published, but for some 17 in a million where linspace's fused
    multiply-adds round otherwise.
    """
    stride = torch.full((), 0.001 - 1, dtype=torch.float32, device=i.device) / steps
    return torch.where(2 * i < steps + 1, 1 + stride * i, 0.001 - stride * (steps - i))


@dataclass(frozen=True, eq=False)
class Frechet:
    """Commit the best max(1, n) candidates, n the largest with G(n) > delta.

    G(n) = c(1) + .. + c(n) - (n - 1) - (1 - c(n)) of the scores c(1) >= c(2) >= ...: Frechet's
    bound on the probability that n tokens are right together, less the doubt about the last. Where
    all are equal it is `Factor(1 - delta)`; beside surer ones a token passes that `Factor` bars.

    delta: a number in [0, 1], or a [B] tensor; .02 to .30 by task, as published. Scores are those
    of which 1 is certain: not the entropy. Source: Fast-dLLM++, arXiv 2606.02955.
    """

    delta: float | torch.Tensor = per_row(0.25)
    branch: ClassVar[str] = "frechet"

    def __post_init__(self):
        _check_number("Frechet.delta", self.delta, at_least=0, at_most=1)

    def commit(self, scores, candidates, step):
        """The commit mask [B, T] for scores [B, T], candidates [B, T] and step [B]."""
        ranks = _ranks(scores, candidates)
        # Of scores in [0, 1] fp32 holds these, and their sums below 1, without rounding; a sum of 1
        # or more fails, however it is rounded. So the order of the additions changes nothing.
        doubt = (1 - scores).clamp(min=0).nan_to_num(nan=torch.inf, posinf=torch.inf)
        passes = 1 - (_sums_ahead(doubt, ranks) + 2 * doubt) > _column(self.delta, scores)
        return candidates & (passes | (ranks == 0))


@dataclass(frozen=True, eq=False)
class EntropyBound:
    """Commit the longest leading run of candidates, in ascending order of their entropies, whose
    sum less its largest is <= gamma: what the tokens can still tell about one another.

    gamma: a number >= 0, or a [B] tensor, in nats; .001 to .1 as published, 0 commits one token a
    step but for those that are certain. The score is the negative entropy. Source: EB-sampler,
    arXiv 2505.24857.
    """

    gamma: float | torch.Tensor = per_row(0.01)
    branch: ClassVar[str] = "entropy_bound"
    score: ClassVar[str] = "entropy"

    def __post_init__(self):
        _check_number("EntropyBound.gamma", self.gamma, at_least=0)

    def commit(self, scores, candidates, step):
        """The commit mask [B, T] for scores [B, T], candidates [B, T] and step [B]."""
        ranks = _ranks(scores, candidates)
        entropy = (-scores).clamp(min=0).nan_to_num(nan=torch.inf, posinf=torch.inf)
        gamma = _column_of(torch.float32, self.gamma, scores.device)
        # Rounded to what gamma is counted in, at most 2^-23 of it: fp32 then adds without rounding
        # until a sum is past gamma and fails, so the order of the additions changes nothing.
        entropy = (entropy + gamma) - gamma
        # The run's largest is its last. Sums rise, so those that pass are exactly the leading ones.
        return candidates & (_sums_ahead(entropy, ranks) <= gamma)


@dataclass(frozen=True, eq=False)
class ProgressThreshold:
    """`Threshold(tau (1 - alpha (1 - r)))`, r the share of the block that is still masked; 1 in a
    block's first forward.

    tau >= 0 and alpha in [0, 1]: numbers, or [B] tensors; as published .9 and .3, on GSM8K .4 to
    .6. r counts the candidates of T positions: a block that had fewer masks from the start, as a
    canvas's last may, is taken for one on its way. Source: Streaming-dLLM, arXiv 2601.17917.
    """

    tau: float | torch.Tensor = per_row(0.9)
    alpha: float | torch.Tensor = per_row(0.3)
    branch: ClassVar[str] = "progress"

    def __post_init__(self):
        _check_number("ProgressThreshold.tau", self.tau, at_least=0)
        _check_number("ProgressThreshold.alpha", self.alpha, at_least=0, at_most=1)

    def commit(self, scores, candidates, step):
        """The commit mask [B, T] for scores [B, T], candidates [B, T] and step [B]."""
        masks = candidates.sum(1, keepdim=True).to(torch.float32)
        # By a tensor: a division by a number may be a product with its inverse.
        share = masks / torch.full_like(masks, scores.shape[1])
        share = torch.where(step[:, None] == 0, 1, share)
        tau = _column_of(torch.float32, self.tau, scores.device)
        alpha = _column_of(torch.float32, self.alpha, scores.device)
        sure = scores >= tau * (1 - alpha * (1 - share))
        return candidates & (sure | (_ranks(scores, candidates) == 0))


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Commit every anchor, a candidate with score >= `anchor`; every candidate at most `distance`
    positions from one whose score is >= `near`; and always the best one.

    anchor, near: numbers, infinity included, or [B] tensors. distance: an integer in [0, 2^24], or
    a [B] integer tensor. The defaults are the published ones. Source: LocalLeap, arXiv 2510.07081.
    """

    anchor: float | torch.Tensor = per_row(0.9)
    near: float | torch.Tensor = per_row(0.75)
    distance: int | torch.Tensor = per_row(4, dtype=torch.int64)
    branch: ClassVar[str] = "neighbours"

    def __post_init__(self):
        _check_number("Neighbours.anchor", self.anchor, at_most=torch.inf)
        _check_number("Neighbours.near", self.near, at_most=torch.inf)
        _check_count("Neighbours.distance", self.distance, at_least=0)

    def commit(self, scores, candidates, step):
        """The commit mask [B, T] for scores [B, T], candidates [B, T] and step [B]."""
        anchors = candidates & (scores >= _column(self.anchor, scores))
        position = torch.arange(scores.shape[1], device=scores.device)
        # The nearest anchor on either side, or a place that is near none.
        before = torch.where(anchors, position, -FAR).cummax(1).values
        after = torch.where(anchors, position, FAR).flip(1).cummin(1).values.flip(1)
        away = torch.minimum(position - before, after - position)
        distance = _column_of(torch.int64, self.distance, scores.device)
        helped = (away <= distance) & (scores >= _column(self.near, scores))
        return candidates & (anchors | helped | (_ranks(scores, candidates) == 0))


@dataclass(frozen=True, eq=False)
class Stability:
    """Commit every candidate with score >= tau whose proposal has been the same for `steps` steps
    running, this one included, and always the best one.

    tau: a number, or a [B] tensor; .6 to .8 as published. steps: an integer in [1, 2^24], or a [B]
    integer tensor. It has a memory and no branch in the kernel. Source: R2-dLLM, arXiv 2604.18995;
    KLASS, arXiv 2511.05664, compares distributions where this compares proposals.
    """

    tau: float | torch.Tensor = per_row(0.7)
    steps: int | torch.Tensor = per_row(3, dtype=torch.int64)
    memory: ClassVar[Mapping[str, Kept]] = {
        "token_ids": Kept(torch.int64, -1),
        "run": Kept(torch.int64, 0),
    }

    def __post_init__(self):
        _check_number("Stability.tau", self.tau, at_most=torch.inf)
        _check_count("Stability.steps", self.steps)

    def commit(self, scores, candidates, step, token_ids, memory):
        """The commit mask [B, T] and the new memory; see the head of this file."""
        run = torch.where(token_ids == memory["token_ids"], memory["run"] + 1, 1)
        lasted = run >= _column_of(torch.int64, self.steps, scores.device)
        stable = lasted & (scores >= _column(self.tau, scores))
        best = _ranks(scores, candidates) == 0
        return candidates & (stable | best), {"token_ids": token_ids, "run": run}


def _ranks(scores, candidates):
    """Each candidate's place [B, T] in descending score, 0 the best, ties to the lower position.

    Positions that are no candidates come last.
    """
    order = torch.where(candidates, scores, -torch.inf).nan_to_num(nan=-torch.inf)
    order = order.masked_fill(~candidates, -torch.inf)
    # Candidates with a score of -inf still come before positions that are none.
    by_score = torch.argsort(order, dim=1, descending=True, stable=True)
    is_candidate = candidates.gather(1, by_score)
    first = torch.argsort(is_candidate.to(torch.int8), dim=1, descending=True, stable=True)
    return torch.argsort(by_score.gather(1, first), dim=1)


def _sums_ahead(amounts, ranks):
    """For each position the sum of the amounts [B, T] of those that rank before it."""
    in_order = torch.zeros_like(amounts).scatter(1, ranks, amounts)
    before = torch.nn.functional.pad(in_order.cumsum(1)[:, :-1], (1, 0))
    return before.gather(1, ranks)


def _column(value, scores):
    """A rule's parameter as something that broadcasts over [B, T]."""
    if isinstance(value, torch.Tensor):
        return value.to(scores)[:, None]
    return value


def _column_of(dtype, value, device):
    """The same as a tensor [B or 1, 1] of that dtype, for arithmetic that a kernel repeats."""
    if isinstance(value, torch.Tensor):
        return value.to(device=device, dtype=dtype)[:, None]
    # Filled, not copied: a copy from the host would wait for the forward.
    return torch.full((1, 1), value, dtype=dtype, device=device)


def _check_number(name, value, *, above=-torch.inf, at_least=-torch.inf, at_most=FLOAT32.max):
    """A number in that range, or a tensor of them, that neither overflows nor vanishes in float32;
    infinity where at_most is. Tensors are read where that costs nothing, on the CPU.
    """
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
        _check_held(name, value)
        if not _readable(value):
            return
        values = value.flatten().tolist()
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number or a tensor, got {type(value).__name__}")
    else:
        values = [value]
    for number in values:
        in_range = above < number and at_least <= number <= at_most
        held = number == at_most or abs(number) <= FLOAT32.max
        if not in_range or not held or 0 < abs(number) < SMALLEST_FLOAT32:
            raise ValueError(
                f"{name}: expected numbers{_range_words(above, at_least, at_most)} that float32 "
                f"holds (size {SMALLEST_FLOAT32:.1e} to {FLOAT32.max:.1e}), got {number}"
            )


def _readable(value):
    """Whether a tensor's numbers may be looked at: on the CPU, and not while a compiler traces."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def _range_words(above, at_least, at_most):
    if above > -torch.inf:
        return f" above {above}"
    if at_least == -torch.inf:
        return ""
    return f" >= {at_least}" if at_most >= FLOAT32.max else f" in [{at_least}, {at_most}]"


def _check_count(name, value, at_least=1):
    """An int in [at_least, LARGEST_COUNT], or an integer tensor of them."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name}: expected an integer tensor, got {value.dtype}")
        _check_held(name, value)
        if not _readable(value):
            return
        values = value.flatten().tolist()
    elif isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int or an integer tensor, got {type(value).__name__}")
    else:
        values = [value]
    for number in values:
        if not at_least <= number <= LARGEST_COUNT:
            raise ValueError(
                f"{name}: expected an int in [{at_least}, {LARGEST_COUNT}], got {number}"
            )


def _check_held(name, value):
    """ValueError for a tensor without numbers."""
    if value.is_meta:
        raise ValueError(f"{name}: expected a tensor that holds numbers, got one on meta")


# What the rest of the project asks of a rule.


class _Layout(NamedTuple):
    """What a frozen dataclass says of its rules: (name, dtype) of the per-row fields, the names of
    the others, the branch, the score, the memory.
    """

    per_row: tuple[tuple[str, torch.dtype], ...]
    fixed: tuple[str, ...]
    branch: str | None
    score: str | None
    memory: tuple[tuple[str, Kept], ...]


_CLASSES: dict[str, type] = {}  # the class of each branch, for `unflatten`


@torch.compiler.assume_constant_result  # torch.compile cannot follow how it is read
def _layout(kind: type) -> _Layout | None:
    """The layout of a class's rules; None for what is no frozen dataclass (a function's class).

    A class that declares a branch enters itself in _CLASSES. ValueError where another is there.
    """
    return _read_layout(kind)


@functools.cache
def _read_layout(kind):
    if not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:
        return None
    fields = {field.name: field.metadata for field in dataclasses.fields(kind)}
    branch, score, memory = (
        None if name in fields else getattr(kind, name, None)
        for name in ("branch", "score", "memory")
    )
    if not isinstance(branch, str) or "branch" not in vars(kind):
        branch = None  # a subclass has none unless it says so
    if not isinstance(score, str):
        score = None
    if not isinstance(memory, Mapping):
        memory = {}
    if memory and branch:
        raise ValueError(f"rule: {kind.__name__} has a memory, which no branch of the kernel sees")
    if branch:
        _register(branch, kind)
    return _Layout(
        tuple((name, data["per_row"]) for name, data in fields.items() if "per_row" in data),
        tuple(name for name, data in fields.items() if "per_row" not in data),
        branch,
        score,
        tuple(memory.items()),
    )


def _register(branch, kind):
    """Enter the class of a branch. One that was defined again (a module read anew, a notebook's
    cell) takes the place of the first.
    """
    known = _CLASSES.get(branch, kind)
    if (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(
            f"rule: {kind.__name__} declares the branch {branch!r}, which is {known.__name__}'s"
        )
    _CLASSES[branch] = kind


def check_rule(rule, rows: int, device: torch.device | None = None) -> None:
    """TypeError unless `rule` is one; ValueError where a per-row tensor has not `rows` entries or
    holds no numbers.

    device: where the scores are that the rule is asked about. A rule without a branch is asked as
    it is: ValueError where its tensors are elsewhere.
    """
    if isinstance(rule, type):
        raise TypeError(
            f"rule: expected an instance such as {rule.__name__}(...), got the class itself"
        )
    layout = _layout(type(rule))
    commits = callable(getattr(rule, "commit", None))
    if layout is None or not commits:
        if callable(rule) and not commits:
            return  # a function
        raise TypeError(
            "rule: expected a frozen dataclass with commit(scores, candidates, step), or a function"
            f" of these, got {rule!r}"
        )
    for name, _ in layout.per_row:
        value = getattr(rule, name)
        if not isinstance(value, torch.Tensor):
            continue
        field = f"{type(rule).__name__}.{name}"
        if value.shape != (rows,):
            raise ValueError(
                f"rule: expected {field} with one entry for each of {rows} rows, "
                f"got shape {tuple(value.shape)}"
            )
        _check_held(f"rule: {field}", value)
        if device is not None and layout.branch is None and value.device != device:
            raise ValueError(f"rule: expected {field} on {device}, got a tensor on {value.device}")


def per_row_fields(rule) -> tuple[dataclasses.Field, ...]:
    """The rule's fields that may be [B] tensors, in order; none for a function."""
    fields = dataclasses.fields(rule) if _layout(type(rule)) else ()
    return tuple(field for field in fields if "per_row" in field.metadata)


def fixed_values(rule) -> tuple[tuple[str, Any], ...]:
    """(name, value) of the rule's other fields, in order; none for a function."""
    layout = _layout(type(rule))
    return tuple((name, getattr(rule, name)) for name in layout.fixed) if layout else ()


def branch_of(rule) -> str | None:
    """The name of the rule's branch in the select kernel; None where it has none."""
    layout = _layout(type(rule))
    return layout.branch if layout else None


def score_of(rule, asked: str | None = None) -> str:
    """The score that a rule is asked about: its own, or else the one asked for, by default the
    confidence. ValueError where these differ.
    """
    layout = _layout(type(rule))
    own = layout.score if layout else None
    if own is not None and asked not in (None, own):
        raise ValueError(
            f"score: expected {own!r}, the one that {type(rule).__name__} reads, got {asked!r}"
        )
    return own or asked or "confidence"


def memory_of(rule) -> dict[str, Kept]:
    """What the rule keeps from step to step, by name; empty for most."""
    layout = _layout(type(rule))
    return dict(layout.memory) if layout else {}


def new_memory(rule, rows: int, width: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The rule's memory for blocks that begin: [rows, width] tensors by name."""
    return {
        name: torch.full((rows, width), kept.start, dtype=kept.dtype, device=device)
        for name, kept in memory_of(rule).items()
    }


def row_values(rule, rows: int) -> list[list[float]]:
    """For each per-row field its value for each of `rows` rows, as numbers that float64 holds.

    Reads a device's tensors. ValueError for an integer past 2^53.
    """
    columns = []
    for field in per_row_fields(rule):
        value = getattr(rule, field.name)
        column = value.tolist() if isinstance(value, torch.Tensor) else [value] * rows
        if any(isinstance(number, int) and abs(number) > 2**53 for number in column):
            raise ValueError(
                f"{type(rule).__name__}.{field.name}: expected integers up to 2^53, got {column}"
            )
        columns.append(column)
    return columns


def with_row_values(rule, columns):
    """The rule with the device tensors `columns`, one [B] for each per-row field, in those fields.

    Cast to the fields' dtypes. Neither the class's own checks nor this function read them, so it
    may run while a CUDA graph is captured.
    """
    changed = copy.copy(rule)
    for field, column in zip(per_row_fields(rule), columns, strict=True):
        object.__setattr__(changed, field.name, column.to(field.metadata["per_row"]))
    return changed


def commit_of(
    rule,
    token_ids: torch.Tensor | None = None,
    memory: Mapping[str, torch.Tensor] | None = None,
    faults: torch.Tensor | None = None,
) -> Callable:
    """The rule's commit; where it has no branch, a commit that checks the mask it returns.

    What nobody but its author knows could lose tokens, or commit nothing for ever. The check reads
    the device, but with faults [B] int32: what is wrong with each row's mask then lies there
    (`fault_error` says it), and of the mask only what is a candidate is committed. token_ids [B, T]
    and memory, which is updated: for a rule that has a memory.
    """
    if branch_of(rule) is not None:
        return rule.commit
    commit = rule if _layout(type(rule)) is None else rule.commit
    if memory_of(rule):
        commit = functools.partial(_remembering, commit, token_ids, memory)
    return functools.partial(_checked, commit, faults)


def _remembering(commit, token_ids, memory, scores, candidates, step):
    """commit's mask; what it wants to keep goes into `memory`."""
    mask, kept = commit(scores, candidates, step, token_ids, dict(memory))
    if not isinstance(kept, Mapping) or kept.keys() != memory.keys():
        names = ", ".join(memory)
        raise TypeError(f"rule: expected commit to return a mask and its memory, {names}")
    for name, tensor in memory.items():
        tensor.copy_(kept[name])
    return mask


def _checked(commit, faults, scores, candidates, step):
    """commit's mask, if it is one: TypeError or ValueError naming what came."""
    mask = commit(scores.nan_to_num(nan=-torch.inf), candidates.clone(), step)
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"rule: expected commit to return a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool or mask.shape != candidates.shape:
        raise TypeError(
            f"rule: expected commit to return bool {tuple(candidates.shape)}, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    if mask.device != candidates.device:
        raise TypeError(
            f"rule: expected commit to return a mask on {candidates.device}, got {mask.device}"
        )
    found = _faults(mask, candidates)
    if faults is not None:
        faults.copy_(found)
        return mask & candidates
    for row, fault in enumerate(found.tolist()):  # waits for the device
        if fault:
            raise fault_error(row, fault)
    return mask


def _faults(mask, candidates):
    """What is wrong with each row's mask, [B] int64: 0 nothing, p + 1 that it commits position p,
    which is no candidate, -1 that it commits none of its candidates.
    """
    width = mask.shape[1]
    position = torch.arange(1, width + 1, device=mask.device)
    outside = torch.where(mask & ~candidates, position, width + 1).amin(1)
    empty = candidates.any(1) & ~mask.any(1)
    return torch.where(outside <= width, outside, -empty.to(torch.int64))


def fault_error(row: int, fault: int) -> ValueError:
    """The error that a row's entry of `faults` stands for; fault is not 0."""
    if fault < 0:
        return ValueError(
            f"rule: row {row} commits nothing, and must commit at least one of its candidates"
        )
    return ValueError(f"rule: row {row} commits position {fault - 1}, which is no candidate")


# A rule with a branch as an operator's flat arguments, and back.


class FlatRule(NamedTuple):
    """A rule with a branch, flat.

    For each per-row field: a tensor [B] of the field's dtype in `tensors`, or None and its value in
    `numbers`. fixed: the values of the other fields, as Python writes their list.
    """

    branch: str
    tensors: list[torch.Tensor | None]
    numbers: list[float]
    fixed: str


def flatten(rule, device) -> FlatRule:
    """A rule with a branch, flat, its tensors on `device`.

    ValueError for an integer that float32 does not hold, TypeError for a fixed value that cannot be
    a constant of a kernel.
    """
    kind = type(rule)
    layout = _layout(kind)
    tensors: list[torch.Tensor | None] = []
    numbers = []
    for name, dtype in layout.per_row:
        value = getattr(rule, name)
        if isinstance(value, torch.Tensor):
            tensors.append(value.to(device=device, dtype=dtype))
            numbers.append(0.0)
            continue
        if isinstance(value, int) and abs(value) > LARGEST_COUNT:
            raise ValueError(
                f"rule: expected {kind.__name__}.{name} up to {LARGEST_COUNT}, got {value}"
            )
        tensors.append(None)
        numbers.append(float(value))
    fixed = []
    for name in layout.fixed:
        value = getattr(rule, name)
        if type(value) not in (str, int, bool, type(None)):
            raise TypeError(
                f"rule: expected {kind.__name__}.{name} to be a str, int, bool or None, which a "
                f"kernel can be compiled for, got {type(value).__name__}"
            )
        fixed.append(value)
    return FlatRule(layout.branch, tensors, numbers, repr(fixed))


def unflatten(branch, tensors, numbers, fixed):
    """The rule that `flatten` made these of, its numbers as the fields' dtypes hold them."""
    kind = _CLASSES[branch]
    layout = _layout(kind)
    rule = object.__new__(kind)  # without the class's own checks: they may read the device
    for (name, dtype), tensor, number in zip(layout.per_row, tensors, numbers, strict=True):
        if tensor is None:
            tensor = number if dtype.is_floating_point else int(number)
        object.__setattr__(rule, name, tensor)
    for name, value in zip(layout.fixed, constants(fixed), strict=True):
        object.__setattr__(rule, name, value)
    return rule


@functools.cache
def constants(fixed: str) -> tuple:
    """The values of FlatRule.fixed."""
    return tuple(ast.literal_eval(fixed))
