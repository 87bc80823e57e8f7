"""confidence_select: from the logits of a block to its committed tokens.

For every candidate position: a proposal (argmax, or a draw by Gumbel-max), its score, then the rule
over the block and the commit, in place. With z the logits of a row over V entries, p = softmax(z):

    confidence  p[proposal]
    margin      the difference of the two largest p among what may be proposed
    entropy     sum p ln p
    random      uniform in [0, 1)

The mask id is never proposed and stays in every softmax sum. Ties go to the lowest id. Draws are
those of noise.py.

What it saves: the logits are read once, in their own dtype, and nothing of size V is written. A
softmax in float64 over [32, 126464] alone moves 40 times the bytes.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from . import backend, checks
from .noise import gumbel_noise, inverse_of_rows, uniform
from .rules import branch_of, check_rule, commit_of, flatten, memory_of, score_of, unflatten

MOST_IDS = 2**31 - 1  # kernels count columns in int32
SCORES = ("confidence", "margin", "entropy", "random")
FINITE, TINY = torch.finfo(torch.float32).max, torch.finfo(torch.float32).smallest_normal


class Selection(NamedTuple):
    """What one step decided.

    token_ids [B, T] int64, score [B, T] fp32: the proposals and their scores. A position that is no
    candidate has the token it holds and -inf.
    committed [B, T] bool: the positions that the rule committed.
    remaining [B] int32: the candidates left in each row. -(1 + t) says that the logits of candidate
    t hold a NaN, the row's first such: it was not committed, its score is NaN and its entry of
    token_ids means nothing.
    """

    token_ids: torch.Tensor
    score: torch.Tensor
    committed: torch.Tensor
    remaining: torch.Tensor


class Confidence(NamedTuple):
    """What token_confidence says of N rows: token_ids [N] int64, score [N] fp32; on request
    logsumexp, entropy and margin [N] fp32.
    """

    token_ids: torch.Tensor
    score: torch.Tensor
    logsumexp: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    margin: torch.Tensor | None = None


class Partials(NamedTuple):
    """What a part of the vocabulary says of N rows; each field [N], fp32 unless said otherwise.

    With z the part's logits: maximum, the largest z. total, sum exp(z - maximum). weighted, sum
    exp(z - maximum)(z - maximum). best, what was compared of the proposal: z, or z / T + noise.
    logit, the proposal's z. top, second: the two largest z among what may be proposed. token_ids
    (int64), the proposal's id in the whole vocabulary. has_nan (bool).
    """

    maximum: torch.Tensor
    total: torch.Tensor
    weighted: torch.Tensor
    best: torch.Tensor
    logit: torch.Tensor
    top: torch.Tensor
    second: torch.Tensor
    token_ids: torch.Tensor
    has_nan: torch.Tensor


class Scoring(NamedTuple):
    """What rows of logits are to be asked: the first arguments of both torch ops, in their order.

    logits [B, T, V] or [N, V]. mask_id: never proposed; None where there is none. vocab_size: the
    entries that count. score: one of SCORES; None asks token_confidence for Partials.

    What may differ between rows comes as a number and a tensor, which counts where it is not None:
    temperature and temperatures [B] or [N] fp32, 0 takes the argmax; top_p and top_ps fp32, 1 keeps
    all; top_k and top_ks int32, 0 keeps all; seed_number and seed int64. filtered_score: the score
    is that of the distribution that proposals are drawn from, not of the clean softmax.
    """

    logits: torch.Tensor
    mask_id: int | None
    vocab_size: int
    score: str | None
    temperature: float
    temperatures: torch.Tensor | None
    top_p: float
    top_ps: torch.Tensor | None
    top_k: int
    top_ks: torch.Tensor | None
    filtered_score: bool
    seed_number: int
    seed: torch.Tensor | None

    @property
    def draws(self) -> bool:
        """Whether some row may draw."""
        return self.temperatures is not None or self.temperature > 0

    @property
    def by_mass(self) -> bool:
        """Whether some row may filter by top_p."""
        return self.top_ps is not None or self.top_p < 1

    @property
    def by_count(self) -> bool:
        """Whether some row may filter by top_k."""
        return self.top_ks is not None or self.top_k > 0

    @property
    def filters(self) -> bool:
        """Whether a filter may change a result: the argmax and its clean score none can."""
        return (self.by_mass or self.by_count) and (self.draws or self.filtered_score)


class Commit(NamedTuple):
    """What confidence_select does with the proposals: the rest of its torch op's arguments.

    tokens [B, T] int64, updated. candidates [B, T] bool, None for the masks. step [B], None for 0.
    rule, tensors, numbers, fixed: a rules.FlatRule. token_ids, value, committed, remaining: the
    Selection to fill.
    """

    tokens: torch.Tensor
    candidates: torch.Tensor | None
    step: torch.Tensor | None
    rule: str
    tensors: list[torch.Tensor | None]
    numbers: list[float]
    fixed: str
    token_ids: torch.Tensor
    value: torch.Tensor
    committed: torch.Tensor
    remaining: torch.Tensor


class Rows(NamedTuple):
    """Which rows token_confidence is asked about, and what for: the rest of its op's arguments.

    position [N] int64: what a row's draws are counted by, None for its index. vocab_start: the id
    of the logits' first column. entropy, margin: whether they are wanted beside the score.
    """

    position: torch.Tensor | None
    vocab_start: int
    entropy: bool
    margin: bool


def token_confidence_reference(
    logits,
    *,
    mask_id=None,
    score="confidence",
    temperature=0.0,
    top_p=None,
    top_k=None,
    filtered_score=False,
    seed=None,
    position=None,
    vocab_size=None,
    return_logsumexp=False,
    return_entropy=False,
    return_margin=False,
):
    """See `token_confidence`."""
    z = logits[:, :vocab_size].float()
    barred = z.shape[1] if mask_id is None else mask_id
    inverse = inverse_of_rows(temperature, z)
    scale = torch.where(inverse > 0, inverse, 1)[:, None]
    kept = None
    if top_p is not None or top_k is not None:
        kept = kept_tokens(_offered(z, barred), scale, top_p, top_k)
    if filtered_score:
        z = z * scale
        inverse = (inverse > 0).float()
        if kept is not None:
            # The mask's logit stays in the sum, and a NaN is not hidden.
            is_mask = torch.arange(z.shape[1], device=z.device) == barred
            z = z.masked_fill(~(kept | is_mask | z.isnan()), -math.inf)
    drawn_by = seed if _draws(temperature) else None
    partials = _partials(z, kept, barred, inverse, drawn_by, position)
    return merge_confidence_partials(
        [partials],
        score=score,
        seed=seed,
        position=position,
        return_logsumexp=return_logsumexp,
        return_entropy=return_entropy,
        return_margin=return_margin,
    )


def kept_tokens(offered, scale, top_p, top_k):
    """Which entries of `offered` [N, V] fp32 top-p and top-k keep, by definition: bool [N, V].

    Of the tokens in descending order of softmax(offered * scale), equals by id, top_p keeps those
    before which there is no more mass than top_p, the first always; of these top_k keeps the k
    largest, and what equals the last of them. top_p: None, a number, or [N]; 1 keeps all. top_k:
    None, a number, or [N]; 0 keeps all. Masses are added up in float64.
    """
    rows, vocab = offered.shape
    ordered, order = offered.sort(dim=-1, descending=True, stable=True)
    power = torch.exp(((ordered - ordered[:, :1]) * scale).double())
    power = power.masked_fill(ordered == -math.inf, 0)
    keep = torch.ones_like(offered, dtype=torch.bool)
    if top_p is not None:
        # As fp32 holds it: the same as a number and as a tensor.
        share = torch.as_tensor(top_p, dtype=torch.float32, device=offered.device).double()
        share = share.expand(rows)[:, None]
        before = power.cumsum(-1) - power
        keep = (before <= share * power.sum(-1, keepdim=True)) | (share >= 1)
        keep[:, 0] = True
    if top_k is not None:
        most = torch.as_tensor(top_k, device=offered.device).to(torch.int64).expand(rows)[:, None]
        left = keep.sum(-1, keepdim=True)
        least = ordered.gather(1, torch.where(most > 0, torch.minimum(most, left), left) - 1)
        keep &= ordered >= least
    return torch.zeros_like(keep).scatter(1, order, keep)


def token_confidence_partials_reference(
    logits,
    *,
    vocab_start=0,
    mask_id=None,
    temperature=0.0,
    seed=None,
    position=None,
    vocab_size=None,
):
    """See `token_confidence_partials`."""
    z = logits[:, :vocab_size].float()
    barred = z.shape[1] if mask_id is None else mask_id - vocab_start
    inverse = inverse_of_rows(temperature, z)
    drawn_by = seed if _draws(temperature) else None
    return _partials(z, None, barred, inverse, drawn_by, position, vocab_start)


def _draws(temperature) -> bool:
    """Whether some row may draw."""
    return isinstance(temperature, torch.Tensor) or temperature > 0


def _offered(z, barred):
    """The logits z [N, V] without the mask's, which may lie outside of this part."""
    offered = z.clone()
    if 0 <= barred < z.shape[1]:
        offered[:, barred] = -math.inf
    return offered


def _partials(z, kept, barred, inverse, seed, position, vocab_start=0) -> Partials:
    """Partials of the logits z [N, V] fp32, drawn where inverse [N], 1 / temperature, is above 0.

    kept [N, V]: what may be proposed, None for all but the mask. seed: None where no row draws.
    """
    vocab = z.shape[1]
    rows = torch.arange(len(z), device=z.device)
    position = rows if position is None else position.to(torch.int64)
    offered = _offered(z, barred)
    compared = offered if kept is None else offered.masked_fill(~kept & ~z.isnan(), -math.inf)
    if seed is not None:
        noise = gumbel_noise(_seeds(seed, position), position, vocab, vocab_start)
        drawn = compared * inverse[:, None] + noise
        draws = (inverse > 0)[:, None] & (compared != -math.inf)
        compared = torch.where(draws, drawn, compared)
    # The lowest id of the largest; of a row of -inf the lowest that is not the mask.
    spare = int(barred == 0 and vocab > 1)
    token_ids = torch.where((compared == -math.inf).all(-1), spare, compared.argmax(-1))
    maximum = z.amax(-1)
    away = z - torch.where(maximum == -math.inf, 0, maximum)[:, None]
    power = torch.exp(away)
    top = offered.topk(min(2, vocab), dim=-1).values
    second = top[:, 1] if vocab > 1 else torch.full_like(maximum, -math.inf)
    return Partials(
        maximum,
        power.sum(-1),
        # Clamped: 0 times -inf would be NaN, in a gradient behind torch.where as well.
        (power * away.clamp(min=torch.finfo(torch.float32).min)).sum(-1),
        compared[rows, token_ids],
        offered[rows, token_ids],
        top[:, 0],
        second,
        token_ids + vocab_start,
        z.isnan().any(-1),
    )


def merge_confidence_partials(
    partials,
    *,
    score="confidence",
    seed=None,
    position=None,
    return_logsumexp=False,
    return_entropy=False,
    return_margin=False,
):
    """The Confidence of N rows from the Partials of the parts of their vocabulary, in any order:
    small tensors, no logits.

    partials: a non-empty list of Partials of equal shape on one device, made with equal mask_id,
    temperature, seed and position. score, seed, position (both for score "random") and the returned
    fields are those of `token_confidence`. Raises TypeError for dtypes and what is no Partials,
    ValueError for shapes and devices that do not fit together.
    """
    _check_partials(partials)
    checks.choice("score", score, SCORES)
    returned = {"logsumexp": return_logsumexp, "entropy": return_entropy, "margin": return_margin}
    for name, want in returned.items():
        checks.flag(f"return_{name}", want)
    like = partials[0].maximum
    _seed(seed, like, score == "random")
    checks.tensor("position", position, (torch.int64,), like.shape, like.device, optional=True)
    part = Partials(*(torch.stack(field) for field in zip(*partials, strict=True)))
    maximum, has_nan = part.maximum.amax(0), part.has_nan.any(0)
    shift = torch.where(maximum == -math.inf, 0, maximum)
    away = part.maximum - shift
    scale = torch.exp(away)
    moved = torch.where(part.maximum == -math.inf, 0, away)
    weighted = ((part.weighted + moved * part.total) * scale).sum(0)
    # 1 where nothing is above -inf, or where +inf takes all.
    total = torch.where(maximum.isinf(), 1, (part.total * scale).sum(0))
    best = part.best.masked_fill(part.has_nan, math.inf)
    token_ids = torch.where(
        best == best.amax(0), part.token_ids, torch.iinfo(torch.int64).max
    ).amin(0)
    logit = torch.where(part.token_ids == token_ids, part.logit, -math.inf).amax(0)
    top, second = torch.cat([part.top, part.second]).topk(2, dim=0).values
    probability, top, second = (torch.exp(z - shift) / total for z in (logit, top, second))
    entropy = torch.where(maximum == math.inf, math.nan, weighted / total - torch.log(total))
    values = {
        "confidence": probability,
        "margin": top - second,
        "entropy": entropy,
        "logsumexp": maximum + torch.log(total),
    }
    if score == "random":
        rows = torch.arange(len(maximum), device=maximum.device)
        values["random"] = uniform(_seeds(seed, rows), rows if position is None else position)
    values = {name: value.masked_fill(has_nan, math.nan) for name, value in values.items()}
    return Confidence(
        token_ids,
        values[score],
        *(values[name] if want else None for name, want in returned.items()),
    )


def _check_partials(partials):
    """That these are Partials of the same rows."""
    if not isinstance(partials, (list, tuple)) or isinstance(partials, Partials):
        raise TypeError(f"partials: expected a list of Partials, got {type(partials).__name__}")
    if not partials:
        raise ValueError("partials: expected at least one Partials, got none")
    dtypes = {"token_ids": torch.int64, "has_nan": torch.bool}
    for index, part in enumerate(partials):
        if not isinstance(part, Partials):
            raise TypeError(f"partials[{index}]: expected Partials, got {type(part).__name__}")
        for field, value in part._asdict().items():
            name = f"partials[{index}].{field}"
            checks.tensor(name, value, (dtypes.get(field, torch.float32),))
            like = partials[0].maximum
            if value.ndim != 1:
                raise ValueError(f"{name}: expected [N], got {tuple(value.shape)}")
            if value.shape != like.shape or value.device != like.device:
                raise ValueError(
                    f"{name}: expected {tuple(like.shape)} on {like.device}, as that of "
                    f"partials[0], got {tuple(value.shape)} on {value.device}"
                )


def confidence_select_reference(
    logits,
    tokens,
    *,
    mask_id,
    rule,
    candidates=None,
    score="confidence",
    temperature=0.0,
    top_p=None,
    top_k=None,
    filtered_score=False,
    seed=None,
    vocab_size=None,
    step=None,
    memory=None,
    faults=None,
):
    """See `confidence_select`."""
    return select_with(
        token_confidence_reference,
        logits,
        tokens,
        rule,
        candidates,
        step,
        memory,
        faults,
        mask_id=mask_id,
        score=score,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        filtered_score=filtered_score,
        seed=seed,
        vocab_size=vocab_size,
    )


def select_with(
    propose, logits, tokens, rule, candidates, step, memory, faults, agreed=None, **options
) -> Selection:
    """confidence_select in two parts: `propose` (token_confidence or its reference), then the rule
    in PyTorch.

    agreed: of several processes that decide the same rows, what makes one of each one's mask and
    faults; None where there is nobody else.
    """
    rows, width, vocab = logits.shape
    candidates = tokens == options["mask_id"] if candidates is None else candidates
    step = torch.zeros(rows, dtype=torch.int64, device=tokens.device) if step is None else step
    for name in ("temperature", "top_p", "top_k", "seed"):
        if isinstance(options[name], torch.Tensor):
            options[name] = options[name].repeat_interleave(width)
    position = torch.arange(width, device=tokens.device).repeat(rows)
    best = propose(logits.reshape(-1, vocab), position=position, **options)
    commit = commit_of(rule, best.token_ids.reshape(tokens.shape), memory, faults)

    def commit_alike(*inputs):
        mask = agreed(commit(*inputs))
        if faults is not None:
            faults.copy_(agreed(faults))
        return mask

    decide = commit if agreed is None else commit_alike
    return commit_proposals(decide, best.token_ids, best.score, tokens, candidates, step)


def commit_proposals(commit, token_ids, score, tokens, candidates, step) -> Selection:
    """What follows scoring, in plain PyTorch: ask the rule, commit into `tokens` in place, count
    what remains.

    commit: (scores [B, T], candidates [B, T], step [B]) -> mask [B, T]: `rules.commit_of(rule)`.
    token_ids (int64), score (fp32): B * T proposals and their scores, NaN where the logits hold
    one. tokens, candidates [B, T] int64 and bool, step [B] int64 or int32. Raises TypeError for
    dtypes, ValueError for shapes, devices and tokens that overlap.
    """
    _check_proposals(commit, token_ids, score, tokens, candidates, step)
    token_ids = torch.where(candidates, token_ids.reshape(tokens.shape), tokens)
    value = score.reshape(tokens.shape).masked_fill(~candidates, -math.inf)
    broken = candidates & value.isnan()
    committed = commit(value, candidates & ~broken, step)
    tokens.copy_(torch.where(committed, token_ids, tokens))
    remaining = (candidates & ~committed).sum(1)
    remaining = torch.where(broken.any(1), -1 - broken.to(torch.int8).argmax(1), remaining).to(
        torch.int32
    )
    return Selection(token_ids, value, committed, remaining)


def _check_proposals(commit, token_ids, score, tokens, candidates, step):
    if not callable(commit):
        raise TypeError(f"commit: expected a function, got {type(commit).__name__}")
    checks.tensor("tokens", tokens, (torch.int64,))
    if tokens.ndim != 2 or not tokens.numel():
        raise ValueError(f"tokens: expected a non-empty [B, T], got {tuple(tokens.shape)}")
    checks.written("tokens", tokens)
    for name, value, dtype in (
        ("token_ids", token_ids, torch.int64),
        ("score", score, torch.float32),
    ):
        checks.tensor(name, value, (dtype,))
        if value.numel() != tokens.numel() or value.device != tokens.device:
            raise ValueError(
                f"{name}: expected {tokens.numel()} numbers on {tokens.device}, "
                f"got {tuple(value.shape)} on {value.device}"
            )
    checks.tensor("candidates", candidates, (torch.bool,), tokens.shape, tokens.device)
    checks.tensor("step", step, (torch.int64, torch.int32), tokens.shape[:1], tokens.device)


def _seeds(seed, like):
    """One 64-bit seed for each row of `like`."""
    return seed.expand_as(like) if isinstance(seed, torch.Tensor) else torch.full_like(like, seed)


LIBRARY = torch.library.Library("fastdllm", "FRAGMENT")
# The fields of Scoring, then those of Commit or of Rows.
_SCORING_FIELDS = len(Scoring._fields)
_SCORING = (
    "Tensor logits, int? mask_id, int vocab_size, str? score, float temperature, "
    "Tensor? temperatures, float top_p, Tensor? top_ps, int top_k, Tensor? top_ks, "
    "bool filtered_score, int seed_number, Tensor? seed"
)
LIBRARY.define(
    f"confidence_select({_SCORING}, Tensor(a!) tokens, Tensor? candidates, Tensor? step, "
    "str rule, Tensor?[] tensors, float[] numbers, str fixed, Tensor(b!) token_ids, "
    "Tensor(c!) value, Tensor(d!) committed, Tensor(e!) remaining) -> ()"
)
LIBRARY.define(
    f"token_confidence({_SCORING}, Tensor? position, int vocab_start, bool entropy, bool margin) "
    "-> (Tensor token_ids, Tensor has_nan, Tensor values)"
)
# One program ranks a row's block, its work growing with the square of the length; past this the
# reference does it.
WIDEST_KERNEL = 2048


def _unsupported(logits):
    """Why the kernel cannot take these logits, or None."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        return "the logits are not contiguous in the vocabulary"
    if logits.ndim == 3 and logits.shape[1] > WIDEST_KERNEL:
        return f"the block length is {logits.shape[1]}, above {WIDEST_KERNEL}"
    return None


def _run_select(*arguments):
    scoring = Scoring(*arguments[:_SCORING_FIELDS])
    commit = Commit(*arguments[_SCORING_FIELDS:])
    if backend.use_triton("confidence_select", scoring.logits, _unsupported(scoring.logits)):
        from .select_triton import launch_select

        launch_select(scoring, commit)
        return
    selection = confidence_select_reference(
        scoring.logits,
        commit.tokens,
        mask_id=scoring.mask_id,
        rule=unflatten(commit.rule, commit.tensors, commit.numbers, commit.fixed),
        candidates=commit.candidates,
        score=scoring.score,
        vocab_size=scoring.vocab_size,
        step=commit.step,
        **_sampling_of(scoring),
    )
    commit.token_ids.copy_(selection.token_ids)
    commit.value.copy_(selection.score)
    commit.committed.copy_(selection.committed)
    commit.remaining.copy_(selection.remaining)


def _run_confidence(*arguments):
    """(token_ids [N], has_nan [N], values [.., N]).

    The values are score, log-sum-exp, entropy and margin; where the score is None they are the
    numbers of Partials.
    """
    scoring = Scoring(*arguments[:_SCORING_FIELDS])
    rows = Rows(*arguments[_SCORING_FIELDS:])
    if backend.use_triton("token_confidence", scoring.logits, _unsupported(scoring.logits)):
        from .select_triton import launch_confidence

        return launch_confidence(scoring, rows)
    sampling = _sampling_of(scoring)
    if scoring.score is None:
        *values, token_ids, has_nan = token_confidence_partials_reference(
            scoring.logits,
            vocab_start=rows.vocab_start,
            mask_id=scoring.mask_id,
            temperature=sampling["temperature"],
            seed=scoring.seed_number if scoring.seed is None else scoring.seed,
            position=rows.position,
            vocab_size=scoring.vocab_size,
        )
        return token_ids, has_nan, torch.stack(values)
    token_ids, *values = token_confidence_reference(
        scoring.logits,
        mask_id=scoring.mask_id,
        score=scoring.score,
        position=rows.position,
        vocab_size=scoring.vocab_size,
        **sampling,
        return_logsumexp=True,
        return_entropy=True,
        return_margin=True,
    )
    # Not the score: it is NaN of an infinity as well.
    has_nan = values[1].isnan()
    return token_ids, has_nan, torch.stack(values)


def _sampling_of(scoring):
    """How a reference is to sample, as keyword arguments."""
    seed = scoring.seed_number if scoring.seed is None else scoring.seed
    top_p = scoring.top_p if scoring.top_ps is None else scoring.top_ps
    top_k = scoring.top_k if scoring.top_ks is None else scoring.top_ks
    return {
        "temperature": scoring.temperature
        if scoring.temperatures is None
        else scoring.temperatures,
        "top_p": top_p if scoring.filters else None,
        "top_k": top_k if scoring.filters else None,
        "filtered_score": scoring.filtered_score,
        "seed": seed if scoring.draws or scoring.score == "random" else None,
    }


def _fake_confidence(logits, mask_id, vocab_size, score, *arguments):
    rows = logits.shape[0]
    numbers = len(Partials._fields) - 2 if score is None else 4
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.bool),
        logits.new_empty((numbers, rows), dtype=torch.float32),
    )


LIBRARY.impl("confidence_select", _run_select, "CompositeExplicitAutograd")
LIBRARY.impl("token_confidence", _run_confidence, "CompositeExplicitAutograd")
torch.library.register_fake("fastdllm::confidence_select", lambda *arguments: None, lib=LIBRARY)
torch.library.register_fake("fastdllm::token_confidence", _fake_confidence, lib=LIBRARY)


def confidence_select(
    logits,
    tokens,
    *,
    mask_id,
    rule,
    candidates=None,
    score="confidence",
    temperature=0.0,
    top_p=None,
    top_k=None,
    filtered_score=False,
    seed=None,
    vocab_size=None,
    step=None,
    memory=None,
    faults=None,
):
    """Propose, score, choose and commit the tokens of an active block (Fast-dLLM, arXiv 2505.22618,
    3.3; spec of the rules).

    logits [B, T, V] (float16, bfloat16 or float32; rows at any stride, V contiguous): row t
    predicts position t of the block. tokens [B, T] int64, updated in place where committed. mask_id
    is never proposed. rule: a frozen dataclass with `commit`, or a function like it (see rules.py);
    parameters may be [B] tensors. A rule without a branch in the kernel commits in PyTorch, after
    the kernels that propose and score, and its mask is checked. candidates [B, T] bool: default
    tokens == mask_id. score: "confidence", "margin", "entropy" or "random"; a rule that reads one
    alone refuses the others. vocab_size: entries past it are padding. step [B] int64 or int32: the
    row's step in its block, from 0, which Quota counts by (default 0). memory: of a rule that has
    one (rules.memory_of), its [B, T] tensors by name, updated in place. faults [B] int32, written
    where the rule has no branch: instead of a ValueError that waits for the device, what is wrong
    with its mask, as rules.fault_error says it; of that mask candidates alone are committed.

    temperature: a number, or [B] float32; 0 proposes the argmax, above 0 draws from softmax(logits
    / temperature). seed: an int, or [B] int64, the key of a row's draws; needed with a temperature
    or "random".

    top_p: a number in (0, 1], or [B] float32; top_k: an int >= 1, or [B] int32 whose 0 keeps all;
    None keeps all. In the order of softmax(logits / temperature), the mask left out and equals by
    id, a token may be proposed if those before it have no more mass than top_p, and then if it is
    one of the top_k largest that are left, or equals the last of them. A temperature of 0 counts as
    1 here.

    filtered_score: False scores by the softmax of the logits as they are (LLaDA); True by that of
    the filtered logits / temperature (Dream), in which a temperature of 0 counts as 1. The mask's
    logit is in either sum.

    Returns a Selection. Nothing is read back to the host, but to check a mask. Raises TypeError for
    dtypes, ValueError for shapes and values.
    """
    vocab_size = _check_logits(logits, 3, mask_id, score, vocab_size)
    checks.tensor("tokens", tokens, (torch.int64,), logits.shape[:2], logits.device)
    checks.written("tokens", tokens)
    check_rule(rule, len(tokens), tokens.device)
    score_of(rule, score)
    memory = _check_memory(rule, memory, tokens)
    checks.tensor(
        "candidates", candidates, (torch.bool,), tokens.shape, tokens.device, optional=True
    )
    sampling = _sampling(logits, score, temperature, top_p, top_k, filtered_score, seed)
    checks.tensor(
        "step", step, (torch.int64, torch.int32), tokens.shape[:1], tokens.device, optional=True
    )
    checks.tensor("faults", faults, (torch.int32,), tokens.shape[:1], tokens.device, optional=True)
    if branch_of(rule) is None or backend.wants_derivative("confidence_select", logits):
        return select_with(
            token_confidence,
            logits,
            tokens,
            rule,
            candidates,
            step,
            memory,
            faults,
            mask_id=mask_id,
            score=score,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            filtered_score=filtered_score,
            seed=seed,
            vocab_size=vocab_size,
        )
    scoring = Scoring(logits, mask_id, vocab_size, score, *sampling)
    selection = _empty_selection(tokens)
    commit = Commit(tokens, candidates, step, *flatten(rule, tokens.device), *selection)
    torch.ops.fastdllm.confidence_select(*scoring, *commit)
    return selection


def _check_memory(rule, memory, tokens):
    """`memory`, {} for None, if it is what the rule keeps of tokens [B, T]."""
    wanted = memory_of(rule)
    memory = {} if memory is None else memory
    if not isinstance(memory, Mapping):
        raise TypeError(f"memory: expected tensors by name, got {type(memory).__name__}")
    if sorted(memory) != sorted(wanted):  # torch.compile does not compare keys()
        names = ", ".join(wanted) or "nothing"
        raise ValueError(
            f"memory: expected what {type(rule).__name__} keeps, {names}, "
            f"got {', '.join(memory) or 'nothing'}"
        )
    for name, kept in wanted.items():
        value = memory[name]
        checks.tensor(f"memory[{name!r}]", value, (kept.dtype,), tokens.shape, tokens.device)
        checks.written(f"memory[{name!r}]", value)
    return memory


def _empty_selection(tokens) -> Selection:
    # empty_like takes a third of new_empty's time on the host.
    dense = {"memory_format": torch.contiguous_format}
    return Selection(
        torch.empty_like(tokens, **dense),
        torch.empty_like(tokens, dtype=torch.float32, **dense),
        torch.empty_like(tokens, dtype=torch.bool, **dense),
        tokens.new_empty(len(tokens), dtype=torch.int32),
    )


def token_confidence(
    logits,
    *,
    mask_id=None,
    score="confidence",
    temperature=0.0,
    top_p=None,
    top_k=None,
    filtered_score=False,
    seed=None,
    position=None,
    vocab_size=None,
    return_logsumexp=False,
    return_entropy=False,
    return_margin=False,
):
    """The proposal and score of each row of logits [N, V], without a rule: for engines that bring
    their own.

    mask_id (optional) is never proposed. score, temperature, top_p, top_k, filtered_score, seed and
    vocab_size as in `confidence_select`, tensors [N]. position [N] int64: what a row's draws are
    counted by (default its index).

    Returns a Confidence: token_ids [N] int64, score [N] fp32 (NaN where the row holds a NaN), and
    on request the log-sum-exp, the negative entropy and the top-2 margin, all of the distribution
    that is scored. Where nothing but the mask is above -inf the lowest other id is proposed, with
    confidence and margin 0; where nothing is, the log-sum-exp is -inf and the entropy 0 as well.
    Raises as `confidence_select` does; ValueError for a vocabulary of the mask alone.
    """
    vocab_size = _check_logits(logits, 2, mask_id, score, vocab_size)
    checks.flag("return_logsumexp", return_logsumexp)
    checks.flag("return_entropy", return_entropy)
    checks.flag("return_margin", return_margin)
    sampling = _sampling(logits, score, temperature, top_p, top_k, filtered_score, seed)
    checks.tensor(
        "position", position, (torch.int64,), logits.shape[:1], logits.device, optional=True
    )
    if backend.wants_derivative("token_confidence", logits):
        return token_confidence_reference(
            logits,
            mask_id=mask_id,
            score=score,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            filtered_score=filtered_score,
            seed=seed,
            position=position,
            vocab_size=vocab_size,
            return_logsumexp=return_logsumexp,
            return_entropy=return_entropy,
            return_margin=return_margin,
        )
    scoring = Scoring(logits, mask_id, vocab_size, score, *sampling)
    rows = Rows(position, 0, return_entropy, return_margin)
    token_ids, _, values = torch.ops.fastdllm.token_confidence(*scoring, *rows)
    return Confidence(
        token_ids,
        values[0],
        values[1] if return_logsumexp else None,
        values[2] if return_entropy else None,
        values[3] if return_margin else None,
    )


def token_confidence_partials(
    logits,
    *,
    vocab_start=0,
    mask_id=None,
    temperature=0.0,
    seed=None,
    position=None,
    vocab_size=None,
):
    """What one part of the vocabulary says of N rows, for `merge_confidence_partials`: nothing of
    size V leaves a device.

    logits [N, V_part]: columns vocab_start .. vocab_start + V_part of the whole matrix; vocab_start
    is even, as two columns share a draw. mask_id is an id of the whole vocabulary; temperature (a
    number, or [N] float32), seed and position must be those of the other parts: then the merged
    proposals and draws are those of `token_confidence` on the whole. vocab_size: this part's
    entries past it are padding. Returns Partials. Raises as `token_confidence` does.
    """
    vocab_size = _check_logits(logits, 2, None, "confidence", vocab_size)
    if checks.integer("vocab_start", vocab_start, 0, MOST_IDS - logits.shape[1]) % 2:
        raise ValueError(f"vocab_start: expected an even number, got {vocab_start}")
    if mask_id is not None:
        checks.integer("mask_id", mask_id, 0, MOST_IDS - 1)
        if mask_id == vocab_start:  # as in the whole, another must be there to propose
            checks.integer("vocab_size", vocab_size, 2)
    sampling = _sampling(logits, "confidence", temperature, None, None, False, seed)
    checks.tensor(
        "position", position, (torch.int64,), logits.shape[:1], logits.device, optional=True
    )
    if backend.wants_derivative("token_confidence_partials", logits):
        return token_confidence_partials_reference(
            logits,
            vocab_start=vocab_start,
            mask_id=mask_id,
            temperature=temperature,
            seed=seed,
            position=position,
            vocab_size=vocab_size,
        )
    scoring = Scoring(logits, mask_id, vocab_size, None, *sampling)
    rows = Rows(position, vocab_start, entropy=True, margin=True)
    token_ids, has_nan, values = torch.ops.fastdllm.token_confidence(*scoring, *rows)
    return Partials(*values, token_ids, has_nan)


def _check_logits(logits, ndim, mask_id, score, vocab_size):
    """Checks that the ops share; returns the vocabulary's size."""
    checks.tensor("logits", logits, checks.FLOATS)
    if logits.ndim != ndim or not logits.numel():
        shape = "[B, T, V]" if ndim == 3 else "[N, V]"
        raise ValueError(f"logits: expected a non-empty {shape}, got {tuple(logits.shape)}")
    vocab = logits.shape[-1]
    vocab_size = vocab if vocab_size is None else checks.integer("vocab_size", vocab_size, 1, vocab)
    if mask_id is not None or ndim == 3:
        checks.integer("mask_id", mask_id, 0, vocab - 1)
        if mask_id >= vocab_size:
            raise ValueError(
                f"mask_id: expected a value below vocab_size = {vocab_size}, got {mask_id}"
            )
        # The mask id, which is never proposed, and another.
        checks.integer("vocab_size", vocab_size, 2)
    checks.choice("score", score, SCORES)
    return vocab_size


def _sampling(logits, score, temperature, top_p, top_k, filtered_score, seed):
    """The checked fields of Scoring from the temperature on, for rows of these logits."""
    temperatures = top_ps = top_ks = None
    if isinstance(temperature, torch.Tensor):
        temperatures = _for_rows("temperature", temperature, torch.float32, logits, 0, FINITE)
        temperature = 0.0
    else:
        checks.number("temperature", temperature, at_least=0)
    if isinstance(top_p, torch.Tensor):
        top_ps = _for_rows("top_p", top_p, torch.float32, logits, TINY, 1)
        top_p = None
    elif top_p is not None:
        checks.number("top_p", top_p, above=0, at_most=1)
    if isinstance(top_k, torch.Tensor):
        top_ks = _for_rows("top_k", top_k, torch.int32, logits, 0, 2**31 - 1)
        top_k = None
    elif top_k is not None:
        checks.integer("top_k", top_k, 1)
    checks.flag("filtered_score", filtered_score)
    draws = temperatures is not None or temperature > 0
    seed_number, seed = _seed(seed, logits, draws or score == "random")
    return (
        float(temperature),
        temperatures,
        1.0 if top_p is None else float(top_p),
        top_ps,
        0 if top_k is None or top_k >= logits.shape[-1] else top_k,
        top_ks,
        filtered_score,
        seed_number,
        seed,
    )


def _for_rows(name, value, dtype, logits, low, high):
    """A tensor with an entry for each row, its values checked where reading them is free."""
    checks.tensor(name, value, (dtype,), logits.shape[:1], logits.device)
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(((value >= low) & (value <= high)).all()):
            raise ValueError(f"{name}: expected entries in [{low}, {high}], got {value.tolist()}")
    return value


def _seed(seed, logits, needed):
    """(number, tensor or None): the seed as the ops take it. The number stands where there is no
    tensor.
    """
    if seed is None:
        if needed:
            raise ValueError(
                "seed: expected an int or a tensor where temperature > 0 or score is 'random', "
                "got None"
            )
        return 0, None
    if isinstance(seed, torch.Tensor):
        return 0, checks.tensor("seed", seed, (torch.int64,), logits.shape[:1], logits.device)
    return checks.integer("seed", seed, -(2**63), 2**63 - 1), None
