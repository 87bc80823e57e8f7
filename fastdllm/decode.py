"""generate(): block-wise diffusion decoding (Fast-dLLM, arXiv 2505.22618). One loop; the cache mode and the rule are data.

Each row walks through its own blocks at its own pace. In every turn of the loop the rows at a block's start get one refresh
together, the rows in the middle of a block one cached step together, and the host reads one small tensor: what is left.
"""

import functools
import math
import time
from dataclasses import dataclass, replace

import torch

from fastdllm_kernels import SCORES, Selection, Threshold, commit_proposals, confidence_select, token_confidence

from . import arguments
from .cache import KVCache, Span
from .families import FAMILIES

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # spreads consecutive seeds over the 64-bit keys; as a signed number
BEST_ONE = Threshold(math.inf)


@dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    tokens: one 1-D int64 CPU tensor for each row, prompt + gen_length, filled with the stop id after a stop. prompt_lengths:
    list of int. refreshes, cached_steps, nfe (their sum): int64 [B] CPU tensors of forwards. seconds: wall time.
    """

    tokens: list[torch.Tensor]
    prompt_lengths: list[int]
    refreshes: torch.Tensor
    cached_steps: torch.Tensor
    nfe: torch.Tensor
    seconds: float


@dataclass(frozen=True)
class StepEvent:
    """What one forward committed: `rows`, canvas `positions`, `token_ids`, `scores` are parallel 1-D CPU tensors.

    step counts the forwards of the call from 0; kind is "refresh" (over the whole canvas) or "cached".
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
    filtered_score: bool  # the family scores after temperature and filters (Dream), not by the clean softmax (LLaDA)


@torch.no_grad()
def generate(
    model, prompts, *, gen_length=256, block_length=32, cache="dual", rule=Threshold(0.9), score="confidence",  # noqa: B008
    temperature=0.0, top_p=None, top_k=None, seed=None, stop_ids=None, on_step=None,
) -> Generation:
    """Fill gen_length masks after each prompt, block by block.

    model: what `fastdllm.load` or `fastdllm.replace_attention` returns. prompts: a list of 1-D id sequences of any lengths, or
    a [B, P] tensor; a row gets the tokens it would get alone. cache: "none" (a full forward every step), "prefix" or "dual".
    rule: Threshold, Factor, Quota (a parameter may be a [B] tensor), or a function (scores [B, T] fp32, candidates [B, T]
    bool, step [B] int64) -> commit [B, T] bool, called with the rows of one forward. score: "confidence", "margin", "entropy"
    or "random". temperature 0 is greedy; top_p in (0, 1] and top_k >= 1 filter the proposals. seed: row b draws as a single
    row with seed + b would; None takes one from torch's global generator. stop_ids: None for the model's end-of-text ids, () to
    never stop. on_step(StepEvent) is called after every forward.

    Raises TypeError and ValueError, naming the argument, before any work is done; ValueError naming row and position when
    the logits of a candidate hold a NaN.
    """
    model = getattr(model, "fastdllm_adapter", model)  # what replace_attention leaves on somebody else's model
    if not all(hasattr(model, name) for name in ("config", "hidden_states", "head", "attach")):
        raise TypeError(f"model: expected what fastdllm.load or replace_attention returns, got {type(model).__name__}")
    config = model.config
    prompts = arguments.prompt_ids(prompts, config.vocab_size)
    arguments.integer("gen_length", gen_length, 1)
    arguments.integer("block_length", block_length, 1)
    longest = max(map(len, prompts)) + gen_length
    if longest > config.max_positions:
        raise ValueError(f"gen_length: prompt and generation need {longest} positions, the model has {config.max_positions}")
    arguments.choice("cache", cache, arguments.CACHES)
    arguments.choice("score", score, SCORES)
    arguments.check_rule(rule, len(prompts))
    stops = arguments.stop_tokens(stop_ids, config)
    if on_step is not None and not callable(on_step):
        raise TypeError(f"on_step: expected a function or None, got {type(on_step).__name__}")
    sampling = _sampling(config, score, temperature, top_p, top_k, seed)
    decoder = Decoder(model, prompts, gen_length, block_length, cache, rule, sampling, stops, on_step)
    return decoder.run()


def _sampling(config, score, temperature, top_p, top_k, seed) -> Sampling:
    arguments.number("temperature", temperature, at_least=0)
    if top_p is not None:
        arguments.number("top_p", top_p, above=0, at_most=1)
    if top_k is not None:
        arguments.integer("top_k", top_k, 1)
    if seed is not None:
        arguments.integer("seed", seed, -math.inf)
    elif temperature > 0 or score == "random":
        seed = int(torch.randint(2**62, ()))
    filtered = FAMILIES[config.family].filtered_score
    return Sampling(score, temperature, top_p, top_k, seed, filtered)


class Decoder:
    """The state of one call of `generate`: the canvas on the device, where each row stands on the host."""

    def __init__(self, model, prompts, gen_length, block_length, cache, rule, sampling, stops, on_step):
        self.model, self.block_length, self.mode, self.rule, self.on_step = model, block_length, cache, rule, on_step
        self.sampling, device, config = sampling, model.device, model.config
        self.prompt_length = torch.tensor([len(prompt) for prompt in prompts])
        self.total = self.prompt_length + gen_length
        longest, count = int(self.total.max()), len(prompts)
        # The margin lets a short last block be read and written back at the full block length.
        canvas = torch.full((count, longest + block_length), config.mask_id)
        for row, prompt in enumerate(prompts):
            canvas[row, : len(prompt)] = prompt
        self.canvas = canvas.to(device)
        self.stops = torch.tensor(stops, dtype=torch.int64, device=device)
        self.cache = KVCache(config, count, longest if cache != "none" else 0, device=device, dtype=model.dtype)
        # With shifted outputs and a cache, a cached step cannot see its first position: the refresh commits it, alone.
        self.first_alone = cache != "none" and config.logit_shift > 0
        self.start = self.prompt_length.clone()
        self.end = torch.minimum(self.start + block_length, self.total)
        self.step = torch.zeros(count, dtype=torch.int64)  # in the block
        self.refreshes, self.cached_steps = torch.zeros(2, count, dtype=torch.int64)
        self.active = torch.ones(count, dtype=torch.bool)
        self.report = torch.zeros(count, 2, dtype=torch.int64, device=device)
        self.forwards = 0

    def run(self) -> Generation:
        began = time.perf_counter()
        self.model.attach(self.cache)
        try:
            while self.active.any():
                refreshing = self.active & ((self.step == 0) | (self.mode == "none"))
                stepping = self.active & ~refreshing
                for group, whole in ((refreshing, True), (stepping, False)):
                    if group.any():
                        self._forward(group.nonzero().flatten(), whole)
                self._advance(*self.report.cpu().unbind(1))
        finally:
            self.model.attach(None)
        canvas = self.canvas.cpu()
        tokens = [canvas[row, : int(self.total[row])].clone() for row in range(len(canvas))]
        nfe = self.refreshes + self.cached_steps
        return Generation(
            tokens, self.prompt_length.tolist(), self.refreshes, self.cached_steps, nfe, time.perf_counter() - began
        )

    def _forward(self, rows, whole):
        """One forward of `rows` and what it commits; leaves what remains and where a text stopped in `report`."""
        start, end, total = self.start[rows], self.end[rows], self.total[rows]
        origin = torch.zeros_like(start) if whole else start
        length = (end if self.mode == "dual" and not whole else total) - origin
        last = torch.where(torch.tensor(whole and self.first_alone), start + 1, end)
        width, block = int(length.max()), int((last - start).max())
        ragged = bool((length != width).any())
        plan = torch.stack([rows, start, last, origin, length, total, self.step[rows]]).to(self.canvas.device)
        row, start, last, origin, length, total, step = plan
        everyone = len(rows) == len(self.canvas)
        spans = plan[3:6].to(torch.int32)
        pages = None if everyone else row.to(torch.int32)[:, None]
        self.cache.span = Span(*spans, whole=whole, ragged=ragged, page_table=pages)
        offset = torch.arange(width, device=row.device)
        at = (origin[:, None] + offset).clamp(max=self.canvas.shape[1] - 1)
        hidden = self.model.hidden_states(self.canvas[row[:, None], at])
        in_block = torch.arange(block, device=row.device)
        source = (start - origin)[:, None] + in_block - self.model.config.logit_shift
        source = source.clamp(min=0, max=width - 1)
        logits = self.model.head(hidden[torch.arange(len(row), device=row.device)[:, None], source])
        place = row[:, None], start[:, None] + in_block
        tokens = self.canvas[place]
        candidates = (tokens == self.model.config.mask_id) & (in_block < (last - start)[:, None])
        selection = self._select(logits, tokens, candidates, rows, step, whole)
        self.canvas[place] = tokens
        self.report[row] = torch.stack([selection.remaining, self._stopped_at(tokens, start, last)], dim=1)
        self._count(rows, whole, selection, place)

    def _select(self, logits, tokens, candidates, rows, step, whole) -> Selection:
        """The proposals, their scores and the commit of one forward; `tokens` is updated."""
        sampling, config = self.sampling, self.model.config
        seed = None
        if sampling.seed is not None:
            key = (sampling.seed + 2**63) % 2**64 - 2**63
            nfe = (self.refreshes + self.cached_steps)[rows]
            seed = ((rows + key) * GOLDEN + nfe).to(tokens.device)
        temperature, offered = sampling.temperature, logits
        if sampling.filtered_score and temperature > 0:
            logits = offered = logits.float() / temperature
            temperature = 1.0
        if sampling.top_p is not None or sampling.top_k is not None:
            offered = filter_logits(logits, temperature or 1.0, sampling.top_p, sampling.top_k, config.mask_id)
            logits = offered if sampling.filtered_score else logits
        options = {"mask_id": config.mask_id, "score": sampling.score, "temperature": temperature, "seed": seed}
        rule = BEST_ONE if whole and self.first_alone else _of_rows(self.rule, rows)
        if callable(rule) or offered is not logits:
            return select_in_parts(rule, logits, offered, tokens, candidates, step, **options)
        return confidence_select(logits, tokens, rule=rule, candidates=candidates, step=step, **options)

    def _stopped_at(self, tokens, start, last):
        """[n] where in the block the text ends: the first stop id with nothing masked before it, else -1."""
        if not len(self.stops):
            return torch.full_like(start, -1)
        width = tokens.shape[1]
        in_block = torch.arange(width, device=tokens.device)
        inside = in_block < (last - start)[:, None]
        stop = torch.where(torch.isin(tokens, self.stops) & inside, in_block, width).amin(1)
        mask = torch.where((tokens == self.model.config.mask_id) & inside, in_block, width).amin(1)
        return torch.where(stop < mask, stop, -1)

    def _count(self, rows, whole, selection, place):
        """Count the forward for its rows and tell the listener what was committed."""
        (self.refreshes if whole else self.cached_steps)[rows] += 1
        if self.on_step is not None:
            self._raise_on_nan(rows, selection.remaining.cpu())
            row, position = (index.expand_as(selection.committed)[selection.committed].cpu() for index in place)
            committed = selection.token_ids[selection.committed].cpu(), selection.score[selection.committed].cpu()
            self.on_step(StepEvent(self.forwards, "refresh" if whole else "cached", row, position, *committed))
        self.forwards += 1

    def _advance(self, remaining, stop):
        """Move every active row on, from what its forward left: [B] masks remaining and [B] where its text stopped."""
        rows = self.active.nonzero().flatten()
        self._raise_on_nan(rows, remaining[rows])
        if self.first_alone:  # the refresh saw one candidate of the block
            remaining = torch.where(self.step == 0, self.end - self.start - 1, remaining)
        for row in (self.active & (stop >= 0)).nonzero().flatten().tolist():
            ending = int(self.start[row] + stop[row])
            self.canvas[row, ending + 1 : int(self.total[row])] = self.canvas[row, ending].clone()
        block_done = remaining == 0
        self.active &= (stop < 0) & ~(block_done & (self.end == self.total))
        self.step = torch.where(block_done, 0, self.step + 1)
        self.start = torch.where(block_done, self.end, self.start)
        self.end = torch.where(block_done, torch.minimum(self.end + self.block_length, self.total), self.end)

    def _raise_on_nan(self, rows, remaining):
        for row, left in zip(rows.tolist(), remaining.tolist(), strict=True):
            if left < 0:
                position = int(self.start[row]) - 1 - left
                raise ValueError(f"logits: NaN in row {row} at position {position}")


def _of_rows(rule, rows):
    """The rule for some of the rows: per-row parameters are indexed."""
    if callable(rule):
        return rule
    tensors = {name: value for name, value in vars(rule).items() if isinstance(value, torch.Tensor)}
    return replace(rule, **{name: value[rows.to(value.device)] for name, value in tensors.items()}) if tensors else rule


def select_in_parts(rule, logits, offered, tokens, candidates, step, *, mask_id, score, temperature, seed) -> Selection:
    """confidence_select for what the one operator does not know: a rule of the user's own, and proposals drawn from `offered`
    logits but scored by the clean ones."""
    rows, width, vocab = logits.shape
    options = {"mask_id": mask_id, "score": score, "position": torch.arange(width, device=tokens.device).repeat(rows)}
    options["seed"] = None if seed is None else seed.repeat_interleave(width)
    proposal = token_confidence(offered.reshape(-1, vocab), temperature=temperature, **options)
    value = proposal.score
    if offered is not logits:
        clean = token_confidence(logits.reshape(-1, vocab), return_logsumexp=True, **options)
        chosen = logits.reshape(-1, vocab).gather(1, proposal.token_ids[:, None])[:, 0].float()
        value = torch.exp(chosen - clean.logsumexp) if score == "confidence" else clean.score
    commit = functools.partial(_checked, rule) if callable(rule) else rule.commit
    return commit_proposals(commit, proposal.token_ids, value, tokens, candidates, step)


def _checked(rule, value, candidates, step):
    """What a function of the user's commits, checked: a wrong mask would loop forever or lose tokens."""
    commit = rule(value.nan_to_num(nan=-math.inf), candidates, step)
    if not isinstance(commit, torch.Tensor) or commit.dtype != torch.bool or commit.shape != candidates.shape:
        got = f"{commit.dtype} {tuple(commit.shape)}" if isinstance(commit, torch.Tensor) else type(commit).__name__
        raise TypeError(f"rule: expected the function to return a bool tensor {tuple(candidates.shape)}, got {got}")
    if (commit & ~candidates).any():
        raise ValueError("rule: the function committed a position that is no candidate")
    if (candidates.any(1) & ~commit.any(1)).any():
        raise ValueError("rule: the function committed nothing in a row that has candidates; it must commit at least one")
    return commit


def filter_logits(logits, temperature, top_p, top_k, mask_id):
    """Logits [B, T, V] with -inf outside the top-p nucleus and the top k of softmax(logits / temperature).

    The mask id takes no part: it is never proposed, so it must not use the nucleus up; its own logit stays for the sum.
    Sorts the vocabulary: this is the slow path, taken only when a filter is asked for.
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
