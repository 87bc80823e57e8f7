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
from typing import NamedTuple

import torch

from . import backend, checks
from .noise import gumbel_noise, inverse, uniform
from .rules import branch_of, check_rule, commit_of, flatten, unflatten

MOST_IDS = 2**31 - 1  # kernels count columns in int32
SCORES = ("confidence", "margin", "entropy", "random")


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
    entries that count. score: one of SCORES; None asks token_confidence for Partials. temperature:
    0 takes the argmax. seed: a tensor [B] or [N] int64, or None where seed_number serves all rows.
    """

    logits: torch.Tensor
    mask_id: int | None
    vocab_size: int
    score: str | None
    temperature: float
    seed: torch.Tensor | None
    seed_number: int


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
    seed=None,
    position=None,
    vocab_size=None,
    return_logsumexp=False,
    return_entropy=False,
    return_margin=False,
):
    """See `token_confidence`."""
    draw = dict(seed=seed, position=position)
    returned = dict(
        return_logsumexp=return_logsumexp,
        return_entropy=return_entropy,
        return_margin=return_margin,
    )
    part = dict(mask_id=mask_id, temperature=temperature, vocab_size=vocab_size, **draw)
    return merge_confidence_partials(
        [token_confidence_partials_reference(logits, **part)], score=score, **draw, **returned
    )


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
    vocab = z.shape[1]
    rows = torch.arange(len(z), device=z.device)
    position = rows if position is None else position.to(torch.int64)
    barred = vocab if mask_id is None else mask_id - vocab_start
    offered = z.clone()
    if 0 <= barred < vocab:
        offered[:, barred] = -math.inf
    compared = offered
    if temperature > 0:
        noise = gumbel_noise(_seeds(seed, position), position, vocab, vocab_start)
        compared = torch.where(
            offered == -math.inf, offered, offered * inverse(temperature) + noise
        )
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
    _seed_arguments(seed, like, score == "random")
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
    seed=None,
    vocab_size=None,
    step=None,
):
    """See `confidence_select`."""
    return _select_with(
        token_confidence_reference,
        logits,
        tokens,
        rule,
        candidates,
        seed,
        step,
        mask_id=mask_id,
        score=score,
        temperature=temperature,
        vocab_size=vocab_size,
    )


def _select_with(propose, logits, tokens, rule, candidates, seed, step, **options) -> Selection:
    """confidence_select in two parts: `propose` (token_confidence or its reference), then the rule
    in PyTorch.
    """
    rows, width, vocab = logits.shape
    candidates = tokens == options["mask_id"] if candidates is None else candidates
    step = torch.zeros(rows, dtype=torch.int64, device=tokens.device) if step is None else step
    position = torch.arange(width, device=tokens.device).repeat(rows)
    seeds = None if seed is None else _seeds(seed, tokens[:, 0]).repeat_interleave(width)
    best = propose(logits.reshape(-1, vocab), seed=seeds, position=position, **options)
    return commit_proposals(commit_of(rule), best.token_ids, best.score, tokens, candidates, step)


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
SCORING = (
    "Tensor logits, int? mask_id, int vocab_size, str? score, float temperature, "
    "Tensor? seed, int seed_number"
)
LIBRARY.define(
    f"confidence_select({SCORING}, Tensor(a!) tokens, Tensor? candidates, Tensor? step, "
    "str rule, Tensor?[] tensors, float[] numbers, str fixed, Tensor(b!) token_ids, "
    "Tensor(c!) value, Tensor(d!) committed, Tensor(e!) remaining) -> ()"
)
LIBRARY.define(
    f"token_confidence({SCORING}, Tensor? position, int vocab_start, bool entropy, bool margin) "
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
    scoring = Scoring(*arguments[: len(Scoring._fields)])
    commit = Commit(*arguments[len(Scoring._fields) :])
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
        temperature=scoring.temperature,
        seed=_seed_of(scoring),
        vocab_size=scoring.vocab_size,
        step=commit.step,
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
    scoring = Scoring(*arguments[: len(Scoring._fields)])
    rows = Rows(*arguments[len(Scoring._fields) :])
    if backend.use_triton("token_confidence", scoring.logits, _unsupported(scoring.logits)):
        from .select_triton import launch_confidence

        return launch_confidence(scoring, rows)
    draw = {"seed": _seed_of(scoring), "position": rows.position}
    partials = token_confidence_partials_reference(
        scoring.logits,
        vocab_start=rows.vocab_start,
        mask_id=scoring.mask_id,
        temperature=scoring.temperature,
        vocab_size=scoring.vocab_size,
        **draw,
    )
    *values, token_ids, has_nan = partials
    if scoring.score is not None:
        token_ids, *values = merge_confidence_partials(
            [partials],
            score=scoring.score,
            **draw,
            return_logsumexp=True,
            return_entropy=True,
            return_margin=True,
        )
    return token_ids, has_nan, torch.stack(values)


def _seed_of(scoring):
    return scoring.seed_number if scoring.seed is None else scoring.seed


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
    seed=None,
    vocab_size=None,
    step=None,
):
    """Propose, score, choose and commit the tokens of an active block (Fast-dLLM, arXiv 2505.22618,
    3.3; spec of the rules).

    logits [B, T, V] (float16, bfloat16 or float32; rows at any stride, V contiguous): row t
    predicts position t of the block. tokens [B, T] int64, updated in place where committed. mask_id
    is never proposed. rule: a frozen dataclass with `commit`, or a function like it (see rules.py);
    parameters may be [B] tensors. A rule without a branch in the kernel commits in PyTorch, after
    the kernels that propose and score, and its mask is checked. candidates [B, T] bool: default
    tokens == mask_id. score: "confidence", "margin", "entropy" or "random". temperature 0 proposes
    the argmax, above 0 draws from softmax(logits / temperature); the score is that of the clean
    softmax. seed: an int, or [B] int64, the key of a row's draws; needed with a temperature or
    "random". vocab_size: entries past it are padding. step [B] int64 or int32: the row's step in
    its block, from 0, which Quota counts by (default 0).

    Returns a Selection. Nothing is read back to the host, but to check a mask. Raises TypeError for
    dtypes, ValueError for shapes and values.
    """
    vocab_size = _check_logits(logits, 3, mask_id, score, temperature, vocab_size)
    checks.tensor("tokens", tokens, (torch.int64,), logits.shape[:2], logits.device)
    checks.written("tokens", tokens)
    check_rule(rule, len(tokens), tokens.device)
    checks.tensor(
        "candidates", candidates, (torch.bool,), tokens.shape, tokens.device, optional=True
    )
    key, seed_number = _seed_arguments(seed, tokens, temperature > 0 or score == "random")
    checks.tensor(
        "step", step, (torch.int64, torch.int32), tokens.shape[:1], tokens.device, optional=True
    )
    if branch_of(rule) is None or backend.wants_derivative("confidence_select", logits):
        return _select_with(
            token_confidence,
            logits,
            tokens,
            rule,
            candidates,
            seed,
            step,
            mask_id=mask_id,
            score=score,
            temperature=temperature,
            vocab_size=vocab_size,
        )
    selection = _empty_selection(tokens)
    scoring = Scoring(logits, mask_id, vocab_size, score, float(temperature), key, seed_number)
    flat_rule = flatten(rule, tokens.device)
    commit = Commit(tokens, candidates, step, *flat_rule, *selection)
    torch.ops.fastdllm.confidence_select(*scoring, *commit)
    return selection


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
    seed=None,
    position=None,
    vocab_size=None,
    return_logsumexp=False,
    return_entropy=False,
    return_margin=False,
):
    """The proposal and score of each row of logits [N, V], without a rule: for engines that bring
    their own.

    mask_id (optional) is never proposed; score, temperature and vocab_size as in
    `confidence_select`; seed an int or [N] int64, position [N] int64 what a row's draws are counted
    by (default its index). Returns a Confidence: token_ids [N] int64, score [N] fp32 (NaN where the
    row holds a NaN), and on request the log-sum-exp, the negative entropy and the top-2 margin.

    Where nothing but the mask is above -inf the lowest other id is proposed, with confidence and
    margin 0; where nothing is, the log-sum-exp is -inf and the entropy 0 as well. ValueError for a
    vocabulary of the mask alone.
    """
    vocab_size = _check_logits(logits, 2, mask_id, score, temperature, vocab_size)
    checks.flag("return_logsumexp", return_logsumexp)
    checks.flag("return_entropy", return_entropy)
    checks.flag("return_margin", return_margin)
    seed, seed_number = _seed_arguments(seed, logits, temperature > 0 or score == "random")
    checks.tensor(
        "position", position, (torch.int64,), logits.shape[:1], logits.device, optional=True
    )
    if backend.wants_derivative("token_confidence", logits):
        return token_confidence_reference(
            logits,
            mask_id=mask_id,
            score=score,
            temperature=temperature,
            seed=seed_number if seed is None else seed,
            position=position,
            vocab_size=vocab_size,
            return_logsumexp=return_logsumexp,
            return_entropy=return_entropy,
            return_margin=return_margin,
        )
    scoring = Scoring(logits, mask_id, vocab_size, score, float(temperature), seed, seed_number)
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
    is even, as two columns share a draw. mask_id is an id of the whole vocabulary; seed and
    position must be those of the other parts: then the merged proposals and draws are those of
    `token_confidence` on the whole. vocab_size: this part's entries past it are padding. Returns
    Partials. Raises as `token_confidence` does.
    """
    vocab_size = _check_logits(logits, 2, None, "confidence", temperature, vocab_size)
    if checks.integer("vocab_start", vocab_start, 0, MOST_IDS - logits.shape[1]) % 2:
        raise ValueError(f"vocab_start: expected an even number, got {vocab_start}")
    if mask_id is not None:
        checks.integer("mask_id", mask_id, 0, MOST_IDS - 1)
        if mask_id == vocab_start:  # as in the whole, another must be there to propose
            checks.integer("vocab_size", vocab_size, 2)
    seed, seed_number = _seed_arguments(seed, logits, temperature > 0)
    checks.tensor(
        "position", position, (torch.int64,), logits.shape[:1], logits.device, optional=True
    )
    if backend.wants_derivative("token_confidence_partials", logits):
        return token_confidence_partials_reference(
            logits,
            vocab_start=vocab_start,
            mask_id=mask_id,
            temperature=temperature,
            seed=seed_number if seed is None else seed,
            position=position,
            vocab_size=vocab_size,
        )
    scoring = Scoring(logits, mask_id, vocab_size, None, float(temperature), seed, seed_number)
    rows = Rows(position, vocab_start, entropy=True, margin=True)
    token_ids, has_nan, values = torch.ops.fastdllm.token_confidence(*scoring, *rows)
    return Partials(*values, token_ids, has_nan)


def _check_logits(logits, ndim, mask_id, score, temperature, vocab_size):
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
    checks.number("temperature", temperature, at_least=0)
    return vocab_size


def _seed_arguments(seed, rows, needed):
    """(tensor or None, number): the seed as the ops take it. The number stands where there is no
    tensor.
    """
    if seed is None:
        if needed:
            raise ValueError(
                "seed: expected an int or a tensor where temperature > 0 or score is 'random', "
                "got None"
            )
        return None, 0
    if isinstance(seed, torch.Tensor):
        return checks.tensor("seed", seed, (torch.int64,), rows.shape[:1], rows.device), 0
    return None, checks.integer("seed", seed, -(2**63), 2**63 - 1)
