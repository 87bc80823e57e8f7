"""generate(): block-wise diffusion decoding (Fast-dLLM, arXiv 2505.22618). One loop; the cache mode
and the rule are data.

Each row walks through its own blocks at its own pace. In every turn of the loop the rows at a
block's start get one refresh together (those that keep their prompt's keys another), the rows in
the middle of a block one cached step together, and the host reads one small tensor of each: what is
left. A forward is a function of a plan, one small tensor of integers; of those that come often
graph.py makes CUDA graphs.
"""

import functools
import itertools
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from fastdllm_kernels import (
    SCORES,
    Quota,
    Selection,
    Threshold,
    commit_proposals,
    confidence_select,
    token_confidence,
)
from fastdllm_kernels.backend import forced

from . import arguments
from .cache import CachePolicy, KVCache, Packing, Span
from .families import FAMILIES
from .graph import workspace

GOLDEN = (
    0x9E3779B97F4A7C15 - 2**64
)  # spreads consecutive seeds over the 64-bit keys; as a signed number
# Tokens of a refresh or of a prefix cache's step, by kind of device, up to which it may wait for
# its launches: 20 to 37 ms of them for an 8B model. It is then padded to a multiple of LENGTHS, so
# that few graphs serve all lengths, and captured when it has come PATIENCE times: a capture takes
# as long as three such forwards, and saves a part of each that follows.
LAUNCH_BOUND = {"cuda": 2048}
LENGTHS, PATIENCE = 64, 4
# of the padded tokens at most: laying rows together and apart again moves as much as two norms do
WORTH_PACKING = 0.9
# the canvas's length goes up in these steps, so that one captured step serves many requests
CAPACITY = 256


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


@dataclass(frozen=True)
class Sampling:
    """How a proposal is drawn and scored."""

    score: str
    temperature: float
    top_p: float | None
    top_k: int | None
    seed: int | None
    # the family scores after temperature and filters (Dream), not by the clean softmax (LLaDA)
    filtered_score: bool


@torch.inference_mode(
    False
)  # what a Workspace keeps must be writable in the next call, whatever mode that is in
@torch.no_grad()
def generate(
    model,
    prompts,
    *,
    gen_length=256,
    block_length=32,
    cache="dual",
    policy=CachePolicy(),  # noqa: B008
    rule=Threshold(0.9),  # noqa: B008
    score="confidence",
    temperature=0.0,
    top_p=None,
    top_k=None,
    seed=None,
    stop_ids=None,
    on_step=None,
    graph=True,
) -> Generation:
    """Fill gen_length masks after each prompt, block by block.

    model: what `fastdllm.load` or `fastdllm.replace_attention` returns. prompts: a list of 1-D id
    sequences of any lengths, or a [B, P] tensor; a row gets the tokens it would get alone (in 16
    bits but for near ties, since products of more rows round otherwise). cache: "none" (a full
    forward every step), "prefix" or "dual". policy: a CachePolicy, what the refreshes leave out; by
    default nothing. rule: Threshold, Factor, Quota (a parameter may be a [B] tensor), or a function
    (scores [B, T] fp32, candidates [B, T] bool, step [B] int64) -> commit [B, T] bool, called with
    the rows of one forward. score: "confidence", "margin", "entropy" or "random". temperature 0 is
    greedy; top_p in (0, 1] and top_k >= 1 filter the proposals. seed: row b draws as a single row
    with seed + b would; None takes one from torch's global generator. stop_ids: None for the
    model's end-of-text ids, () to never stop. on_step(StepEvent) is called after every forward; it
    and a rule that is a function may use the model, and so may other threads. graph: on a GPU,
    capture a cached step in a CUDA graph when it is first needed (a short refresh, or a step over
    more than the block, once the length has come a few times) and replay it after; the model then
    keeps its cache allocated between calls (`fastdllm.graph.clear(model)` frees it). A rule that is
    a function, top_p and top_k run uncaptured, and so does a model that cannot be captured: logged.

    Raises TypeError and ValueError, naming the argument, before any work is done; ValueError naming
    row and position when the logits of a candidate hold a NaN.
    """
    model = getattr(
        model, "fastdllm_adapter", model
    )  # what replace_attention leaves on somebody else's model
    if not all(hasattr(model, name) for name in ("config", "hidden_states", "head", "attach")):
        raise TypeError(
            f"model: expected what fastdllm.load or replace_attention returns, got {type(model).__name__}"
        )
    config = model.config
    prompts = arguments.prompt_ids(prompts, config.vocab_size)
    arguments.integer("gen_length", gen_length, 1)
    arguments.integer("block_length", block_length, 1)
    longest = max(map(len, prompts)) + gen_length
    if longest > config.max_positions:
        raise ValueError(
            f"gen_length: prompt and generation need {longest} positions, the model has {config.max_positions}"
        )
    arguments.choice("cache", cache, arguments.CACHES)
    arguments.check_policy(policy, cache)
    arguments.choice("score", score, SCORES)
    arguments.check_rule(rule, len(prompts))
    stops = arguments.stop_tokens(stop_ids, config)
    if on_step is not None and not callable(on_step):
        raise TypeError(f"on_step: expected a function or None, got {type(on_step).__name__}")
    if not isinstance(graph, bool):
        raise TypeError(f"graph: expected a bool, got {type(graph).__name__}")
    sampling = _sampling(config, score, temperature, top_p, top_k, seed)
    with workspace(model, _obstacle(model, graph, rule, sampling)) as space:
        return Decoder(
            model,
            prompts,
            gen_length,
            block_length,
            cache,
            policy,
            rule,
            sampling,
            stops,
            on_step,
            space,
        ).run()


def _obstacle(model, graph, rule, sampling) -> str | None:
    """Why the forwards of a call cannot be captured, or None."""
    obstacles = {
        "graph=False": not graph,
        f"the model is on {model.device}, not on a GPU": model.device.type != "cuda",
        "the rule is a function": callable(rule),
        "top_p and top_k sort the vocabulary": sampling.top_p is not None
        or sampling.top_k is not None,
        "autocast is on": torch.is_autocast_enabled(
            "cuda"
        ),  # its casts of the weights do not outlive the capture
    }
    return next((cause for cause, holds in obstacles.items() if holds), None)


def _sampling(config, score, temperature, top_p, top_k, seed) -> Sampling:
    arguments.number("temperature", temperature, at_least=0)
    if top_p is not None:
        arguments.number("top_p", top_p, above=0, at_most=1)
    if top_k is not None:
        arguments.integer("top_k", top_k, 1)
    if seed is not None:
        arguments.integer("seed", seed, -math.inf)
    elif temperature > 0 or score == "random":
        seed = int(torch.randint(2**62, (), device="cpu"))
    if temperature:  # so that logits divided by it are numbers, and tell one from another
        temperature = min(max(temperature, 1e-30), 1e30)
    return Sampling(score, temperature, top_p, top_k, seed, FAMILIES[config.family].filtered_score)


@contextmanager
def _attached(model, cache):
    """For one forward the model's layers see this cache: what a listener or a rule computes with
    the same model does not.
    """
    model.attach(cache)
    try:
        yield
    finally:
        model.attach(None)


def _bits(rule, rows):
    """The rule's parameter for each row, as integers that hold the bits of float64: a plan is one
    integer tensor.
    """
    value = torch.as_tensor(next(iter(vars(rule).values())), dtype=torch.float64, device="cpu")
    return value.expand(rows).contiguous().view(torch.int64).tolist()


BEST_ONE = Threshold(math.inf)
(BEST_ONE_BITS,) = _bits(BEST_ONE, 1)


@dataclass(frozen=True)
class Shape:
    """What the launches of a forward depend on, beside its plan and the decoder: one captured graph
    serves all of a shape.

    width: the positions that a row is given; ragged: some row has fewer. refresh: keys and values
    are stored; whole: from position 0 on. alone: only the block's first position may be committed.
    shared: where all rows take part in a refresh and see the same number of keys, that number; else
    0. packed: the tokens of all rows together where they follow each other without padding; else 0.
    """

    width: int
    refresh: bool
    whole: bool
    ragged: bool
    alone: bool
    shared: int
    packed: int


@dataclass(eq=False)
class Row:
    """Where a row of the canvas stands: its text's end, its active block [start, end), the steps
    made in it, all forwards.
    """

    index: int
    prompt_length: int
    total: int
    start: int
    end: int
    step: int = 0
    refreshes: int = 0
    cached_steps: int = 0
    done: bool = False


class Decoder:
    """The state of one call of `generate`: the canvas on the device, where each row stands on the
    host.
    """

    def __init__(
        self,
        model,
        prompts,
        gen_length,
        block_length,
        cache,
        policy,
        rule,
        sampling,
        stops,
        on_step,
        space,
    ):
        self.model, self.config, self.mode, self.rule, self.sampling = (
            model,
            model.config,
            cache,
            rule,
            sampling,
        )
        self.ends, self.on_step, self.space, device = (
            {self.config.mask_id, *stops},
            on_step,
            space,
            model.device,
        )
        self.policy = policy
        self.block_length = block = min(block_length, gen_length)
        lengths = [len(prompt) for prompt in prompts]
        self.rows = [Row(i, n, n + gen_length, n, n + block) for i, n in enumerate(lengths)]
        count, capacity = len(prompts), -(-(max(lengths) + gen_length) // CAPACITY) * CAPACITY
        # The margin lets a short last block be read and written back at the full block length.
        canvas = torch.full((count, capacity + block), self.config.mask_id, device="cpu")
        for row, prompt in enumerate(prompts):
            canvas[row, : len(prompt)] = prompt
        self.canvas = space.tensor("canvas", *canvas.shape, dtype=torch.int64, device=device).copy_(
            canvas
        )
        self.positions = space.tensor(
            "positions", canvas.shape[1], dtype=torch.int64, device=device
        )
        torch.arange(len(self.positions), out=self.positions, device=device)
        # What products give keys and values in.
        dtype = (
            torch.get_autocast_dtype(device.type)
            if torch.is_autocast_enabled(device.type)
            else model.dtype
        )
        self.cache = KVCache(
            self.config,
            count,
            capacity if cache != "none" else 0,
            device=device,
            dtype=dtype,
            allocate=functools.partial(space.tensor, "cache"),
        )
        # With shifted outputs and a cache, a cached step cannot see its first position: the refresh
        # commits it, alone.
        self.first_alone = cache != "none" and self.config.logit_shift > 0
        self.parameters = [0] * count if callable(rule) else _bits(rule, count)
        self.forwards = 0
        # What a captured step has baked in beside its plan, its shape and the model.
        kind = type(rule), getattr(rule, "schedule", None)
        self.key = (
            canvas.shape,
            self.cache.data.shape,
            block,
            self.config,
            kind,
            sampling.score,
            sampling.temperature,
            forced(),
        )

    def run(self) -> Generation:
        began = time.perf_counter()
        active = self.rows
        while active:
            # A turn's forwards: cached steps, refreshes that keep the prompt's keys, whole
            # refreshes.
            groups = {(False, True): [], (True, True): [], (True, False): []}
            for row in active:
                origin = self._origin(row)
                groups[origin != row.start, origin > 0].append(row)
            groups = [(rows, refresh) for (refresh, _), rows in groups.items() if rows]
            forwards = [self._forward(rows, refresh) for rows, refresh in groups]
            self.space.wait()
            for (rows, refresh), (report, selection) in zip(groups, forwards, strict=True):
                self._finish(rows, refresh, report.tolist(), selection)
            active = [row for row in active if not row.done]
        canvas, rows = self.canvas.cpu(), self.rows
        counts = torch.tensor([[row.refreshes, row.cached_steps] for row in rows], device="cpu")
        return Generation(
            [canvas[row.index, : row.total].clone() for row in rows],
            [row.prompt_length for row in rows],
            *counts.unbind(1),
            counts.sum(1),
            time.perf_counter() - began,
        )

    def _origin(self, row):
        """Where the row's next forward begins: in a cached step at its block, in a refresh at 0 or
        past the kept prompt.
        """
        if row.step and self.mode != "none":
            return row.start
        every = self.policy.prompt_refreshes
        kept = row.refreshes % every if every else row.refreshes
        return row.prompt_length - self.config.logit_shift if kept else 0

    def _forward(self, rows, refresh):
        """Launch one forward of `rows` and its commit. Returns the report, for each row what
        remains and its block's tokens, and the Selection.
        """
        alone = refresh and self.first_alone
        entries = [self._entry(row, refresh, alone) for row in rows]
        (_, origin, *_), lengths = entries[0], [entry[2] for entry in entries]
        width, ragged, patience = max(lengths), min(lengths) < max(lengths), None
        if (
            not refresh and width <= self.block_length
        ):  # the block's own positions: one shape for all such steps
            width, ragged, patience = self.block_length, True, 0
            entries += self._padding(rows)
        elif len(rows) * width <= LAUNCH_BOUND.get(self.model.device.type, 0):
            width, patience = -(-width // LENGTHS) * LENGTHS, PATIENCE
            ragged = min(lengths) < width
        same = (
            refresh
            and not ragged
            and len({entry[1:4] for entry in entries}) == 1
            and len(rows) == len(self.rows)
        )
        pack = patience is None and sum(lengths) <= WORTH_PACKING * len(rows) * width
        shape = Shape(
            width,
            refresh,
            not origin,
            ragged,
            alone,
            origin + width if same else 0,
            sum(lengths) if pack else 0,
        )
        key = None if patience is None else (self.key, shape, len(entries))
        compute = functools.partial(self._compute, shape)
        report, selection = self.space.run(
            key, compute, torch.tensor(entries, device="cpu").T.contiguous(), patience or 0
        )
        if (
            self.on_step is not None
        ):  # another captured forward of the same turn may use the same memory
            selection = Selection(*(value.clone() for value in selection))
        return report, selection

    def _entry(self, row, refresh, alone):
        """The row's column of a plan: plain numbers, the rule's parameter as bits."""
        origin, suffix = self._origin(row), self.policy.suffix_blocks
        limit = (
            row.total if suffix is None else min(row.total, row.end + suffix * self.block_length)
        )
        length = (row.end if self.mode == "dual" and not refresh else limit) - origin
        seed = _signed(
            (row.index + (self.sampling.seed or 0)) * GOLDEN + row.refreshes + row.cached_steps
        )
        last, parameter = (
            (row.start + 1, BEST_ONE_BITS) if alone else (row.end, self.parameters[row.index])
        )
        return row.index, origin, length, limit, row.start, last, row.step, seed, parameter

    def _padding(self, rows):
        """Columns up to the next power of two, of rows that sit this forward out: they see nothing
        and commit nothing.
        """
        if callable(self.rule):  # which is told of the rows at work alone
            return []
        taken = {row.index for row in rows}
        spare = (row.index for row in self.rows if row.index not in taken)
        wanted = (1 << (len(rows) - 1).bit_length()) - len(rows)
        return [
            (index, *[0] * 7, self.parameters[index]) for index in itertools.islice(spare, wanted)
        ]

    def _compute(self, shape, plan):
        """One forward and what it commits, from device tensors alone; where no row has a candidate
        it changes nothing.
        """
        row, origin, length, _, start, last, step, seed, parameter = plan
        width, block = shape.width, 1 if shape.alone else self.block_length
        page, *span = plan[:4].to(torch.int32)
        pages = None if shape.refresh and len(row) == len(self.rows) else page[:, None]
        packing = Packing.of(length, width, shape.packed) if shape.packed else None
        self.cache.span = Span(
            *span,
            whole=shape.whole,
            ragged=shape.ragged,
            page_table=pages,
            stores=shape.refresh,
            shared=shape.shared,
            packing=packing,
        )
        in_block, shift, mask_id = (
            self.positions[:block],
            self.config.logit_shift,
            self.config.mask_id,
        )
        place = row[:, None], start[:, None] + in_block
        tokens = fed = self.canvas[place]
        if packing:
            fed = self.canvas[row[packing.row], origin[packing.row] + packing.offset][None]
        elif width > block:
            at = (origin[:, None] + self.positions[:width]).clamp(max=self.canvas.shape[1] - 1)
            fed = self.canvas[row[:, None], at]
        source = None
        if width > block or shift:
            first = (
                packing.slot[:, :1]
                if packing
                else width * torch.arange(len(row), device=row.device)[:, None]
            )
            source = first + torch.minimum(
                (start - origin)[:, None] + in_block - shift, length[:, None] - 1
            ).clamp(min=0)
        with _attached(self.model, self.cache):
            hidden = self.model.hidden_states(fed, source)
        candidates = (tokens == mask_id) & (in_block < (last - start)[:, None])
        rule = BEST_ONE if shape.alone else self.rule
        selection = self._select(
            _with(rule, parameter), self.model.head(hidden), tokens, candidates, step, seed
        )
        self.canvas[place] = tokens
        return torch.cat([selection.remaining[:, None], tokens], dim=1), selection

    def _select(self, rule, logits, tokens, candidates, step, seed) -> Selection:
        """The proposals, their scores and the commit of one forward; `tokens` is updated."""
        sampling, mask_id = self.sampling, self.config.mask_id
        temperature, offered = sampling.temperature, logits
        if sampling.filtered_score and temperature > 0:
            logits = offered = logits.float() / temperature
            temperature = 1.0
        if sampling.top_p is not None or sampling.top_k is not None:
            offered = filter_logits(
                logits, temperature or 1.0, sampling.top_p, sampling.top_k, mask_id
            )
            logits = offered if sampling.filtered_score else logits
        options = {
            "mask_id": mask_id,
            "score": sampling.score,
            "temperature": temperature,
            "seed": seed,
        }
        if callable(rule) or offered is not logits:
            return select_in_parts(rule, logits, offered, tokens, candidates, step, **options)
        return confidence_select(
            logits, tokens, rule=rule, candidates=candidates, step=step, **options
        )

    def _finish(self, rows, refresh, report, selection):
        """Count the forward, tell the listener, and move its rows on."""
        for row, (left, *_) in zip(rows, report, strict=False):  # padding may follow
            if left < 0:
                raise ValueError(
                    f"logits: NaN or infinity in row {row.index} at position {row.start - 1 - left}"
                )
        if self.on_step is not None:
            self._tell(rows, refresh, selection)
        self.forwards += 1
        for row, (left, *tokens) in zip(rows, report, strict=False):
            row.refreshes += refresh
            row.cached_steps += not refresh
            # The text ends at its first stop id, once nothing before it is masked.
            stop = next((offset for offset, token in enumerate(tokens) if token in self.ends), None)
            if stop is not None and tokens[stop] != self.config.mask_id:
                row.done = True
                self.canvas[row.index, row.start + stop + 1 : row.total] = tokens[stop]
            elif (row.end - row.start - 1 if refresh and self.first_alone else left) > 0:
                row.step += 1
            else:
                row.done = row.end == row.total
                row.start, row.end, row.step = (
                    row.end,
                    min(row.end + self.block_length, row.total),
                    0,
                )

    def _tell(self, rows, refresh, selection):
        committed = selection.committed[: len(rows)].cpu()
        row, offset = committed.nonzero().unbind(1)
        index, start = torch.tensor([(row.index, row.start) for row in rows], device="cpu").unbind(
            1
        )
        token_ids, scores = (
            value[: len(rows)].cpu()[committed] for value in (selection.token_ids, selection.score)
        )
        kind = "refresh" if refresh else "cached"
        self.on_step(
            StepEvent(self.forwards, kind, index[row], start[row] + offset, token_ids, scores)
        )


def _signed(number):
    """A number's low 64 bits, as int64 holds them."""
    return (number + 2**63) % 2**64 - 2**63


def _with(rule, parameter):
    """The rule with a device tensor of `_bits` for its parameter, so that what is captured serves
    every value.
    """
    if callable(rule):
        return rule
    values = parameter.view(torch.float64)
    return (
        replace(rule, steps=values.to(torch.int64))
        if isinstance(rule, Quota)
        else type(rule)(values.to(torch.float32))
    )


def select_in_parts(
    rule, logits, offered, tokens, candidates, step, *, mask_id, score, temperature, seed
) -> Selection:
    """confidence_select for what the one operator does not know: a rule of the user's own, and
    proposals drawn from `offered` logits but scored by the clean ones.
    """
    rows, width, vocab = logits.shape
    options = {
        "mask_id": mask_id,
        "score": score,
        "position": torch.arange(width, device=tokens.device).repeat(rows),
    }
    options["seed"] = seed.repeat_interleave(width)
    proposal = token_confidence(offered.reshape(-1, vocab), temperature=temperature, **options)
    value = proposal.score
    if offered is not logits:
        clean = token_confidence(logits.reshape(-1, vocab), return_logsumexp=True, **options)
        chosen = logits.reshape(-1, vocab).gather(1, proposal.token_ids[:, None])[:, 0].float()
        value = torch.exp(chosen - clean.logsumexp) if score == "confidence" else clean.score
    commit = functools.partial(_checked, rule) if callable(rule) else rule.commit
    return commit_proposals(commit, proposal.token_ids, value, tokens, candidates, step)


def _checked(rule, value, candidates, step):
    """What a function of the user's commits, checked: a wrong mask would loop forever or lose
    tokens.
    """
    commit = rule(value.nan_to_num(nan=-math.inf), candidates.clone(), step)
    if (
        not isinstance(commit, torch.Tensor)
        or commit.dtype != torch.bool
        or commit.shape != candidates.shape
    ):
        got = (
            f"{commit.dtype} {tuple(commit.shape)}"
            if isinstance(commit, torch.Tensor)
            else type(commit).__name__
        )
        raise TypeError(
            f"rule: expected the function to return a bool tensor {tuple(candidates.shape)}, got {got}"
        )
    if (commit & ~candidates).any():
        raise ValueError("rule: the function committed a position that is no candidate")
    if (candidates.any(1) & ~commit.any(1)).any():
        raise ValueError(
            "rule: the function committed nothing in a row that has candidates; it must commit at least one"
        )
    return commit


def filter_logits(logits, temperature, top_p, top_k, mask_id):
    """Logits [B, T, V] with -inf outside the top-p nucleus and the top k of softmax(logits /
    temperature).

    The mask id takes no part: it is never proposed, so it must not use the nucleus up; its own
    logit stays for the sum. Sorts the vocabulary: this is the slow path, taken only when a filter
    is asked for.
    """
    offered = logits.float() / temperature
    offered[..., mask_id] = -math.inf
    keep = torch.ones_like(offered, dtype=torch.bool)
    if top_p is not None:
        ordered, order = offered.sort(dim=-1, descending=True, stable=True)
        p = ordered.softmax(-1)
        # A token stays if what stands before it has not passed top_p yet: the first always does.
        keep.scatter_(-1, order, p.cumsum(-1) - p <= top_p)
        offered = offered.masked_fill(~keep, -math.inf)
    if top_k is not None and top_k < logits.shape[-1]:
        keep &= offered >= offered.topk(top_k, dim=-1).values[..., -1:]
    keep[..., mask_id] = True
    return logits.masked_fill(~keep & ~logits.isnan(), -math.inf)


# STAND-IN for what bench/ is written against, to be replaced with the loop's public turn.


class _Turns(Decoder):
    def turn(self) -> bool:
        active = [row for row in self.rows if not row.done]
        groups = {(False, True): [], (True, True): [], (True, False): []}
        for row in active:
            origin = self._origin(row)
            groups[origin != row.start, origin > 0].append(row)
        groups = [(rows, refresh) for (refresh, _), rows in groups.items() if rows]
        forwards = [self._forward(rows, refresh) for rows, refresh in groups]
        self.space.wait()
        for (rows, refresh), (report, selection) in zip(groups, forwards, strict=True):
            self._finish(rows, refresh, report.tolist(), selection)
        return any(not row.done for row in self.rows)

    def result(self) -> Generation:
        return self.run()  # nothing is left to do: the canvas and the counts


@contextmanager
def decoding(model, prompts, *, gen_length, block_length, cache, rule, policy, stop_ids, graph):
    model = getattr(model, "fastdllm_adapter", model)
    prompts = arguments.prompt_ids(prompts, model.config.vocab_size)
    sampling = _sampling(model.config, "confidence", 0.0, None, None, None)
    stops = arguments.stop_tokens(stop_ids, model.config)
    with torch.inference_mode(False), torch.no_grad():
        with workspace(model, _obstacle(model, graph, rule, sampling)) as space:
            yield _Turns(
                model,
                prompts,
                gen_length,
                block_length,
                cache,
                policy,
                rule,
                sampling,
                stops,
                None,
                space,
            )
