"""generate() and infill(): block-wise diffusion decoding (Fast-dLLM, arXiv 2505.22618).

There is one loop, `Decoder`. Each row walks through its own blocks at its own pace (schedule.py).
In every turn of the loop the rows in the middle of a block get one cached step together and the
rows at a block's start a refresh (forward.py), each forward's logits become committed tokens
(sampling.py), and the host reads one small tensor of each forward: what the blocks hold now.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch

from fastdllm_kernels import Threshold, confidence_select
from fastdllm_kernels.backend import forced
from fastdllm_kernels.checks import FLOATS
from fastdllm_kernels.compiling import side_by_side
from fastdllm_kernels.rules import branch_of, check_rule, fault_error

from . import arguments
from .arguments import Ids, Padding, Prompts
from .cache import CachePolicy
from .commit import Committer, Launched, sampling_of_work
from .config import ModelConfig
from .forward import Forward, Model
from .graph import Workspace, unwrapped, workspace
from .parallel import agreed_seed
from .sampling import RowSampling, Rule, sampling_of, sampling_of_rows
from .schedule import Row, Schedule, Work

# The canvas's length goes up in these steps, so that one captured step serves many requests.
CAPACITY = 256
# What has been decoded in this process, as far as kernels tell it apart: its kernels are there.
_compiled_ahead: set = set()


@dataclass(frozen=True, eq=False)
class Generation:
    """What `generate` returns.

    tokens: one 1-D int64 CPU tensor for each row, prompt + gen_length, filled with the stop id
    after a stop. prompt_lengths: list of int. refreshes, cached_steps, nfe (their sum): int64 [B]
    CPU tensors of forwards. seconds: wall time.
    """

    tokens: list[torch.Tensor]
    prompt_lengths: list[int]
    refreshes: torch.Tensor
    cached_steps: torch.Tensor
    nfe: torch.Tensor
    seconds: float


@dataclass(frozen=True, eq=False)
class StepEvent:
    """What one forward committed: `rows`, canvas `positions`, `token_ids`, `scores` are parallel
    1-D CPU tensors.

    step counts the forwards of the call from 0; kind is "refresh" (a block's first; without a
    cache, all) or "cached".
    """

    step: int
    kind: str
    rows: torch.Tensor
    positions: torch.Tensor
    token_ids: torch.Tensor
    scores: torch.Tensor


@dataclass(eq=False)
class Listener:
    """A function that is told of every forward of a call, and how many there were."""

    tell: Callable[[StepEvent], object]
    forwards: int = 0


@dataclass(frozen=True, eq=False)
class RowOptions:
    """What the loop keeps with a Row: how it is sampled, its number in its call, who listens."""

    sampling: RowSampling
    number: int = 0
    listener: Listener | None = None


class Decoder:
    """The decoding loop: rows come with `admit`, every `turn` gives each its next forward, and
    they go with `release`.

    forward: the canvas and the cache; a row occupies one of its slots. schedule: what a row's next
    forward computes.
    """

    def __init__(self, forward: Forward, schedule: Schedule):
        self.forward = forward
        self.schedule = schedule
        self.committer = Committer(forward, schedule.mask_id)
        self.rows: list[Row] = []
        self.free = list(reversed(range(len(forward.canvas))))
        self.forwards: Counter = Counter()  # launched, of each kind
        self._turn = 0
        self._began = time.perf_counter()

    def compile_ahead(self) -> None:
        """Before rows' first turn: compile, side by side, the kernels that their first forward and
        the one after it would compile one by one, where such rows are the first of this process.
        Nothing is decided, and no rule of a user's own is called.
        """
        rows = [row for row in self.rows if not row.done]
        model, schedule = self.forward.model, self.schedule
        kernels = model.config, model.dtype, schedule.cache, schedule.block_length, len(rows) > 1
        begun = any(row.forwards for row in self.rows)
        if model.device.type != "cuda" or begun or kernels in _compiled_ahead:
            return
        _compiled_ahead.add(kernels)
        with side_by_side() as compiles_only:
            if not compiles_only or forced() == "reference":
                return
            for step in (0, 1):
                ahead = [replace(row, step=step) for row in rows]
                works = [self.schedule.work(row) for row in ahead]
                for where in self.forward.parts(works):
                    self._compile(ahead[where], works[where])
        for row in rows:  # what did not only compile may have left something in the canvas
            self._lay_out(row)

    def _compile(self, rows, works):
        with self.forward.space.uncaptured():
            logits = self.forward.run([row.slot for row in rows], works)
        # A rule in PyTorch and a part of a vocabulary are decided by what kernels would leave.
        decided_by_kernels = branch_of(rows[0].options.sampling.sampling.rule)
        if decided_by_kernels and self.committer.decide is confidence_select:
            self.committer.launch(rows, works, logits[: len(rows)])

    def admit(self, row: Row) -> None:
        """Give a row a free slot and lay its text into the canvas. IndexError where none is free,
        and nothing changes where that fails.
        """
        row.slot = self.free[-1]
        self._lay_out(row)
        self.free.pop()
        self.schedule.begin(row)
        row.turn = self._turn
        self.rows.append(row)

    def _lay_out(self, row):
        self.forward.write(row.slot, torch.tensor(row.text, dtype=torch.int64, device="cpu"))
        self.committer.forget(row.slot)

    def release(self, row: Row) -> None:
        """Take a row out, finished or not; its slot is free at once."""
        self.rows.remove(row)
        self.free.append(row.slot)

    def turn(self, refresh_tokens: int | None = None) -> bool:
        """One forward for every row that is not done, and its commit; whether such rows are left.

        refresh_tokens: of the rows that are due for a refresh, only those that have waited longest
        get it, one row at least and no more tokens than that; None: all. A row whose logits hold a
        NaN, or whose rule or listener raises, is done and has a `failure`; the others go on.
        """
        self._turn += 1
        launched = [
            part
            for rows, works in self._groups(refresh_tokens)
            for where in self.forward.parts(works)
            for part in self._launch(rows[where], works[where])
        ]
        self.forward.space.wait()
        reports = [None if part.report is None else part.report.tolist() for part in launched]
        for part, report in zip(launched, reports, strict=True):
            self._finish(part, report)
        return any(not row.done for row in self.rows)

    def run(self) -> Generation:
        """Turn until every row is done. The first failure of a row is raised."""
        while self.turn():
            self._raise()
        self._raise()
        return self.result()

    def result(self) -> Generation:
        """What the rows hold, in the order in which they came."""
        return generation_of(self.rows, time.perf_counter() - self._began)

    def _raise(self):
        for row in self.rows:
            if row.failure is not None:
                raise row.failure

    def _groups(self, refresh_tokens) -> list[tuple[list[Row], list[Work]]]:
        """The rows that may share a forward, and their works: cached steps, then refreshes that
        keep the prompt's keys, then whole refreshes.
        """
        steps, kept, whole = [], [], []
        for row in self.rows:
            if row.done:
                continue
            work = self.schedule.work(row)
            if not work.refresh:
                steps.append((row, work))
            elif work.origin:
                kept.append((row, work))
            else:
                whole.append((row, work))
        if refresh_tokens is not None:
            kept, whole = _first_in_line(kept, whole, refresh_tokens)
        groups = [
            ([row for row, _ in group], [work for _, work in group])
            for group in (steps, kept, whole)
            if group
        ]
        for rows, _ in groups:
            for row in rows:
                row.turn = self._turn
        return groups

    def _launch(self, rows, works):
        """Launch one forward, and for the rows of each kind of sampling what commits its tokens."""
        order = _by_kind(rows, works)
        rows = [rows[index] for _, indices in order for index in indices]
        works = [works[index] for _, indices in order for index in indices]
        logits = self.forward.run([row.slot for row in rows], works)
        self.forwards["refresh" if works[0].refresh else "cached"] += 1
        if len(order) == 1:
            yield self.committer.launch(rows, works, logits)
            return
        first = 0
        for _, indices in order:
            part = slice(first, first + len(indices))
            yield self.committer.launch(rows[part], works[part], logits[part])
            first = part.stop

    def _finish(self, launched: Launched, report: list[list[int]] | None):
        """Move rows on whose forward has been computed, and tell their listeners."""
        if report is None:  # its rule has failed
            for row in launched.rows:
                _fail(row, launched.failure)
            return
        faults = launched.faults(report)
        for row, (left, *_), fault in zip(launched.rows, report, faults, strict=True):
            number = row.options.number
            if left < 0:
                position = row.start - 1 - left
                error = f"logits: NaN or infinity in row {number} at position {position}"
                _fail(row, ValueError(error))
            elif fault:
                _fail(row, fault_error(number, fault))
        self._tell(launched)
        for row, work, (_, *tokens) in zip(launched.rows, launched.works, report, strict=True):
            if not row.done:
                committed = tokens[: work.last - work.start]
                held = row.text[work.last : row.end]
                self.schedule.advance(row, committed + held)

    def _tell(self, launched):
        """Tell each listener of what was committed in its rows."""
        listeners = {row.options.listener: None for row in launched.rows if not row.done}
        for listener in listeners:
            if listener is None:
                continue
            rows = [row for row in launched.rows if row.options.listener is listener]
            event = _event(launched, listener)
            listener.forwards += 1
            try:
                listener.tell(event)
            except Exception as error:
                for row in rows:
                    _fail(row, error)


def _first_in_line(kept, whole, most):
    """Of two groups of (row, work), one: that of the row which has waited longest, its rows in that
    order, up to `most` tokens and one row at least.
    """
    group = min((kept, whole), key=lambda group: min((row.turn for row, _ in group), default=inf))
    taken, tokens = [], 0
    for row, work in sorted(group, key=lambda member: member[0].turn):
        if taken and tokens + work.length > most:
            break
        taken.append((row, work))
        tokens += work.length
    return (taken, []) if group is kept else ([], taken)


def generation_of(rows: Sequence[Row], seconds: float) -> Generation:
    """The Generation of rows that are done."""
    counts = torch.tensor(
        [[row.refreshes, row.cached_steps] for row in rows], dtype=torch.int64, device="cpu"
    )
    refreshes, cached_steps = counts.unbind(1)
    return Generation(
        [torch.tensor(row.text, dtype=torch.int64, device="cpu") for row in rows],
        [row.prompt_length for row in rows],
        refreshes,
        cached_steps,
        counts.sum(1),
        seconds,
    )


def _by_kind(rows, works):
    """[(kind of sampling, indices of its rows)]: each kind is one launch of the selection."""
    first = rows[0].options.sampling.sampling
    if all(row.options.sampling.sampling is first for row in rows):
        return [(None, list(range(len(rows))))]
    kinds: dict = {}
    for index, (row, work) in enumerate(zip(rows, works, strict=True)):
        kinds.setdefault(sampling_of_work(row, work).sampling.kind(), []).append(index)
    return list(kinds.items())


def _fail(row, error):
    row.done = True
    row.failure = error


def _event(launched, listener):
    """The StepEvent of the rows of one listener."""
    mine = torch.tensor([row.options.listener is listener for row in launched.rows], device="cpu")
    selection = launched.selection
    committed = selection.committed.cpu() & mine[:, None]
    row, offset = committed.nonzero().unbind(1)
    numbers = torch.tensor([row.options.number for row in launched.rows], device="cpu")
    starts = torch.tensor([work.start for work in launched.works], device="cpu")
    return StepEvent(
        listener.forwards,
        "refresh" if launched.works[0].refresh else "cached",
        numbers[row],
        starts[row] + offset,
        selection.token_ids.cpu()[committed],
        selection.score.cpu()[committed],
    )


@contextmanager
def decoding(
    model: Model | torch.nn.Module,
    prompts: Prompts,
    *,
    attention_mask: Padding = None,
    gen_length: int = 256,
    **options: Any,
) -> Iterator[Decoder]:
    """The Decoder that `generate` runs, to be turned by hand: takes what `generate` takes.

        with decoding(model, prompts, gen_length=64) as decoder:
            while decoder.turn():
                ...
            done = decoder.result()

    Leaving the block early keeps what was captured. Raises what `generate` raises, but for what
    goes wrong in a turn: that is the row's `failure`.
    """
    model = checked_model(model)
    config = model.config
    ids = arguments.prompt_ids(prompts, config.vocab_size, attention_mask)
    arguments.integer("gen_length", gen_length, 1)
    rows = [_row_of_ids(of_row, gen_length, config) for of_row in ids]
    with _opened(model, rows, gen_length, **options) as decoder:
        yield decoder


def row_of_prompt(prompt: Ids, gen_length: int, config: ModelConfig) -> Row:
    """The Row of one prompt, a 1-D sequence of ids. TypeError and ValueError name the argument."""
    (ids,) = arguments.prompt_ids([prompt], config.vocab_size, name="prompt")
    arguments.integer("gen_length", gen_length, 1)
    return _row_of_ids(ids, gen_length, config)


def _row_of_ids(ids, gen_length, config):
    total = len(ids) + gen_length
    if total > config.max_positions:
        raise ValueError(
            f"gen_length: prompt and generation need {total} positions, "
            f"the model has {config.max_positions}"
        )
    return Row(ids.tolist() + [config.mask_id] * gen_length, prompt_length=len(ids))


@contextmanager
def _opened(
    model: Model,
    rows: list[Row],
    longest_block: int,
    *,
    block_length=32,
    cache="dual",
    policy=CachePolicy(),  # noqa: B008
    rule=Threshold(0.9),  # noqa: B008
    score=None,
    temperature=0.0,
    top_p=None,
    top_k=None,
    seed=None,
    stop_ids=None,
    on_step=None,
    graph=True,
) -> Iterator[Decoder]:
    """A Decoder with these rows in it; the other arguments are those of `generate`."""
    config = model.config
    schedule = schedule_of(config, cache, policy, block_length, longest_block)
    check_rule(rule, len(rows))
    stops = frozenset(arguments.stop_tokens(stop_ids, config))
    arguments.function("on_step", on_step)
    arguments.flag("graph", graph)
    sampling = sampling_of(config, rule, score, temperature, top_p, top_k)
    texts = [(row.text, row.prompt_length) for row in rows]
    asked = texts, schedule, sorted(stops), graph, on_step is None
    seed = agreed_seed(model, sampling, seed, *asked)
    samplings = sampling_of_rows(sampling, len(rows), seed)
    listener = None if on_step is None else Listener(on_step)
    for number, (row, of_row) in enumerate(zip(rows, samplings, strict=True)):
        row.stops = stops
        row.options = RowOptions(of_row, number, listener)
    # What a Workspace keeps must be writable in the next call, whatever mode that is in.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        workspace(model, capture_obstacle(model, graph)) as space,
    ):
        longest = max(row.total for row in rows)
        forward = forward_of(model, len(rows), longest, schedule, space)
        decoder = Decoder(forward, schedule)
        for row in rows:
            decoder.admit(row)
        decoder.compile_ahead()
        yield decoder


def schedule_of(
    config: ModelConfig,
    cache: str,
    policy: CachePolicy,
    block_length: int,
    longest: int | None = None,
) -> Schedule:
    """The Schedule that these arguments of `generate` ask for, blocks no longer than `longest`.
    TypeError and ValueError, naming the argument.
    """
    arguments.integer("block_length", block_length, 1)
    arguments.choice("cache", cache, arguments.CACHES)
    arguments.check_policy(policy, cache)
    if longest is not None:
        block_length = min(block_length, longest)
    return Schedule(cache, policy, block_length, config.logit_shift, config.mask_id)


def forward_of(
    model: Model, rows: int, positions: int, schedule: Schedule, space: Workspace
) -> Forward:
    """The canvas and cache for so many rows of up to so many positions, in this Workspace."""
    slots, capacity = space.layout(rows, -(-positions // CAPACITY) * CAPACITY)
    return Forward(
        model,
        slots,
        capacity,
        block_length=schedule.block_length,
        cached=schedule.cache != "none",
        space=space,
    )


def checked_model(model: Any) -> Model:
    """What decoding works on: the model, or what `replace_attention` left on it."""
    model = unwrapped(model)
    wanted = ("config", "hidden_states", "head", "attach")
    if not all(hasattr(model, name) for name in wanted):
        raise TypeError(
            "model: expected what fastdllm.load or replace_attention returns, "
            f"got {type(model).__name__}"
        )
    if model.dtype not in FLOATS or model.device.type == "meta":
        raise ValueError(
            "model: expected weights of float16, bfloat16 or float32 on a device, "
            f"got {model.dtype} on {model.device}"
        )
    if hasattr(model, "check_layers"):
        model.check_layers()
    return model


def capture_obstacle(model: Model, graph: bool) -> str | None:
    """Why the forwards of a call cannot be captured, or None."""
    if not graph:
        return "graph=False"
    if model.device.type != "cuda":
        return f"the model is on {model.device}, not on a GPU"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on"  # its casts of the weights do not outlive the capture
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "a module has forward hooks, which a replay would not run"
    return None


def generate(
    model: Model | torch.nn.Module,
    prompts: Prompts,
    *,
    attention_mask: Padding = None,
    gen_length: int = 256,
    block_length: int = 32,
    cache: str = "dual",
    policy: CachePolicy = CachePolicy(),  # noqa: B008
    rule: Rule = Threshold(0.9),  # noqa: B008
    score: str | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    stop_ids: Iterable[int] | None = None,
    on_step: Callable[[StepEvent], object] | None = None,
    graph: bool = True,
) -> Generation:
    """Fill gen_length masks after each prompt, block by block.

    model: what `fastdllm.load` or `fastdllm.replace_attention` returns. prompts: a list of 1-D id
    sequences of any lengths, a [B, P] tensor, or what a tokenizer returns. attention_mask: for a
    [B, P] tensor with padding on either side, 1 at a row's own tokens and 0 at padding. A row gets
    the tokens it would get alone (in 16 bits but for near ties, since products of more rows round
    otherwise).

    cache: "none" (a full forward every step), "prefix" or "dual". policy: a CachePolicy, what the
    refreshes leave out; by default nothing.

    rule: a frozen dataclass such as Threshold, Factor or Quota (whose parameters may be [B]
    tensors), or a function (scores [B, T] fp32, candidates [B, T] bool, step [B] int64) -> commit
    [B, T] bool, called with the rows of one forward. score: "confidence", "margin", "entropy" or
    "random"; None: the one that the rule reads, or else the confidence.

    temperature: 0 is greedy. top_p in (0, 1] and top_k filter the proposals; None, and for top_k 0
    and -1, are off. seed: row b draws as a single row with seed + b would; None takes one from
    torch's global generator.

    stop_ids: None for the model's end-of-text ids, () to never stop. on_step(StepEvent) is called
    after every forward; it and a rule that is a function may use the model, and so may other
    threads.

    graph: on a GPU, capture a cached step in a CUDA graph when it is first needed (a short refresh,
    or a step over more than the block, once its length has come again) and replay it after; the
    model then keeps its cache allocated between calls (`fastdllm.graph.clear(model)` frees it). A
    model that cannot be captured runs uncaptured: logged.

    Raises TypeError and ValueError, naming the argument, before any work is done; ValueError naming
    row and position when the logits of a candidate hold a NaN.
    """
    with decoding(
        model,
        prompts,
        attention_mask=attention_mask,
        gen_length=gen_length,
        block_length=block_length,
        cache=cache,
        policy=policy,
        rule=rule,
        score=score,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop_ids=stop_ids,
        on_step=on_step,
        graph=graph,
    ) as decoder:
        return decoder.run()


def infill(
    model: Model | torch.nn.Module,
    sequences: Prompts,
    *,
    stop_ids: Iterable[int] | None = (),
    **options: Any,
) -> Generation:
    """Fill every mask id inside given sequences; real text stands on both sides.

    sequences: a list of 1-D id sequences that hold the model's mask id (config.mask_id) where
    something is to be written, or a [B, L] tensor. Blocks of block_length positions are decoded
    from left to right, each beginning at the first mask that is left; what stands before and after
    is seen through the cached prefix and suffix. The other options are those of `generate`. With
    stop_ids a text ends at a stop id that was written, and the masks after it become that id.

    Returns a Generation: `tokens` are the sequences without masks, `prompt_lengths` what stands
    before each one's first mask.
    """
    model = checked_model(model)
    config = model.config
    attention_mask = options.pop("attention_mask", None)
    sequences = arguments.prompt_ids(sequences, config.vocab_size, attention_mask, name="sequences")
    longest = max(map(len, sequences))
    if longest > config.max_positions:
        raise ValueError(
            f"sequences: the longest has {longest} positions, the model has {config.max_positions}"
        )
    rows = [_row_with_holes(sequence.tolist(), config.mask_id) for sequence in sequences]
    with _opened(model, rows, longest, stop_ids=stop_ids, **options) as decoder:
        return decoder.run()


def _row_with_holes(text, mask_id):
    first = text.index(mask_id) if mask_id in text else len(text)
    given = [position for position in range(first, len(text)) if text[position] != mask_id]
    return Row(text, prompt_length=first, given=frozenset(given))
