"""confidence_select: from the logits of a block to its committed tokens.

For every candidate position: a proposal (argmax, or a draw by Gumbel-max), its score, then the rule over the block and the
commit, in place. With z the logits of a row over V entries, p = softmax(z):

    confidence  p[proposal]      margin  the two largest p among what may be proposed, their difference
    entropy     sum p ln p       random  uniform in [0, 1)

The mask id is never proposed and stays in every softmax sum. Ties go to the lowest id. A draw at temperature T is
argmax_v(z_v / T - ln E_v) with E_v exponential: exact for softmax(z / T). E_v comes from Philox4x32-10, keyed by the row's seed
and counted by (column pair, position), as the logarithm of a 64-bit uniform that keeps full relative precision where E is
small: a 32-bit uniform cuts that tail off and distorts rare tokens (arXiv 2409.02908).

What it saves: the logits are read once, in their own dtype, and nothing of size V is written. A softmax in float64 over
[32, 126464] alone moves 40 times the bytes.
"""

import math
from typing import NamedTuple

import torch

from .rules import Factor, Quota, Threshold

SCORES = ("confidence", "margin", "entropy", "random")


class Selection(NamedTuple):
    """What one step decided: token_ids [B, T] int64, score [B, T] fp32, committed [B, T] bool, remaining [B] int32.

    Where a position is no candidate, token_ids is the token it holds and score is -inf. remaining counts a row's candidates
    left; -(1 + t) says that the logits of candidate t (the row's first such) hold a NaN, and was not committed.
    """

    token_ids: torch.Tensor
    score: torch.Tensor
    committed: torch.Tensor
    remaining: torch.Tensor


class Confidence(NamedTuple):
    """token_confidence's result: token_ids [N] int64, score [N] fp32, and on request logsumexp, entropy, margin [N] fp32."""

    token_ids: torch.Tensor
    score: torch.Tensor
    logsumexp: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    margin: torch.Tensor | None = None


_M0, _M1, _W0, _W1, _U32 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def philox(seed, x0, x1):
    """Philox4x32-10 (Salmon et al., SC 2011) of counters (x0, x1, 0, 0) under 64-bit keys: four int64 tensors of 32 bits.

    seed, x0, x1: int64 tensors that broadcast; the counters lie in [0, 2^32).
    """
    k0, k1 = seed & _U32, (seed >> 32) & _U32
    x0, x1, k0, k1 = torch.broadcast_tensors(x0, x1, k0, k1)
    x2, x3 = torch.zeros_like(x0), torch.zeros_like(x0)
    for _ in range(10):
        high0, low0 = _multiply(x0, _M0)
        high1, low1 = _multiply(x2, _M1)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _U32, (k1 + _W1) & _U32
    return x0, x1, x2, x3


def _multiply(x, constant):
    """High and low 32 bits of a 32 x 32 bit product held in int64 (by halves: the full product would overflow)."""
    low, high = x * (constant & 0xFFFF), x * (constant >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def log_exponential(high, low):
    """ln E for E = -ln U, U = (high 2^32 + low + 1/2) / 2^64: fp32, accurate to fp32's relative precision in both tails.

    Near U = 1 the direct logarithm loses every digit; there E = -log1p(-(1 - U)) with 1 - U counted from the top.
    """
    scale = 2.0**-32
    u = (high.float() + (low.float() + 0.5) * scale) * scale
    rest = ((_U32 - high).float() + ((_U32 - low).float() + 0.5) * scale) * scale
    return torch.log(torch.where(high < 2**31, -torch.log(u), -torch.log1p(-rest)))


def gumbel_noise(seed, position, vocab):
    """-ln E [.., vocab] fp32 of rows keyed by seed [..] and counted by position [..]: standard Gumbel variates."""
    column = torch.arange((vocab + 1) // 2, device=seed.device)
    words = philox(seed[..., None], column, position[..., None])
    pairs = torch.stack([log_exponential(words[0], words[1]), log_exponential(words[2], words[3])], dim=-1)
    return -pairs.flatten(-2)[..., :vocab]


def uniform(seed, position):
    """The uniform variate in [0, 1) of the score "random": one for each row, from a counter no column pair uses."""
    return (philox(seed, torch.full_like(position, _U32), position)[0] >> 8).float() * 2.0**-24


def token_confidence_reference(
    logits, *, mask_id=None, score="confidence", temperature=0.0, seed=None, position=None, vocab_size=None,
    return_logsumexp=False, return_entropy=False, return_margin=False,
):
    """See `token_confidence`."""
    vocab = logits.shape[-1] if vocab_size is None else vocab_size
    z = logits[:, :vocab].float()
    offered = z.clone()
    if mask_id is not None:
        offered[:, mask_id] = -math.inf
    rows = torch.arange(len(z), device=z.device)
    position = rows if position is None else position.to(torch.int64)
    drawn = offered
    if temperature > 0:
        drawn = offered / temperature + gumbel_noise(_seeds(seed, rows), position, vocab)
        drawn = drawn.masked_fill(offered == -math.inf, -math.inf)
    token_ids = drawn.argmax(-1)
    lse = torch.logsumexp(z, -1)
    # A row without a finite logit has probability 0 everywhere, not NaN.
    shift = torch.where(lse == -math.inf, 0, lse)[:, None]
    p = torch.exp(z - shift)
    entropy = torch.where(p > 0, p * (z - shift), 0 * p).sum(-1)
    top = torch.exp(offered.topk(min(2, vocab), dim=-1).values - shift)
    margin = top[:, 0] - top[:, 1] if vocab > 1 else top[:, 0]
    chosen = {"confidence": p[rows, token_ids], "margin": margin, "entropy": entropy}
    value = uniform(_seeds(seed, rows), position) if score == "random" else chosen[score]
    value = value.masked_fill(z.isnan().any(-1), math.nan)
    return Confidence(token_ids, value, lse if return_logsumexp else None, entropy if return_entropy else None,
                      margin if return_margin else None)


def confidence_select_reference(
    logits, tokens, *, mask_id, rule, candidates=None, score="confidence", temperature=0.0, seed=None, vocab_size=None,
    step=None,
):
    """See `confidence_select`."""
    rows, width, vocab = logits.shape
    candidates = tokens == mask_id if candidates is None else candidates
    step = torch.zeros(rows, dtype=torch.int64, device=tokens.device) if step is None else step
    position = torch.arange(width, device=tokens.device).repeat(rows)
    seeds = None if seed is None else _seeds(seed, torch.zeros_like(tokens[:, 0])).repeat_interleave(width)
    best = token_confidence_reference(
        logits.reshape(-1, vocab), mask_id=mask_id, score=score, temperature=temperature, seed=seeds, position=position,
        vocab_size=vocab_size,
    )
    token_ids = torch.where(candidates, best.token_ids.view(rows, width), tokens)
    value = best.score.view(rows, width).masked_fill(~candidates, -math.inf)
    broken = candidates & value.isnan()
    committed = rule.commit(value, candidates & ~broken, step)
    tokens.copy_(torch.where(committed, token_ids, tokens))
    remaining = (candidates & ~committed).sum(1)
    remaining = torch.where(broken.any(1), -1 - broken.to(torch.int8).argmax(1), remaining).to(torch.int32)
    return Selection(token_ids, value, committed, remaining)


def _seeds(seed, like):
    """One 64-bit seed for each row of `like`."""
    return seed.expand_as(like) if isinstance(seed, torch.Tensor) else torch.full_like(like, seed)


LIBRARY = torch.library.Library("fastdllm", "FRAGMENT")
LIBRARY.define(
    "confidence_select(Tensor logits, Tensor(a!) tokens, Tensor candidates, int mask_id, str rule, Tensor parameter, "
    "str score, float temperature, Tensor? seed, int vocab_size, Tensor? step, Tensor(b!) token_ids, Tensor(c!) value, "
    "Tensor(d!) committed, Tensor(e!) remaining) -> ()"
)
RULES = {
    "threshold": Threshold,
    "factor": Factor,
    "quota": Quota,
    "quota_dream": lambda steps: Quota(steps, schedule="dream"),
}


def _run(logits, tokens, candidates, mask_id, rule, parameter, score, temperature, seed, vocab_size, step, *results):
    selection = confidence_select_reference(
        logits, tokens, mask_id=mask_id, rule=RULES[rule](parameter), candidates=candidates, score=score,
        temperature=temperature, seed=seed, vocab_size=vocab_size, step=step,
    )
    for result, value in zip(results, selection, strict=True):
        result.copy_(value)


LIBRARY.impl("confidence_select", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fastdllm::confidence_select", lambda *arguments: None, lib=LIBRARY)


def confidence_select(
    logits, tokens, *, mask_id, rule, candidates=None, score="confidence", temperature=0.0, seed=None, vocab_size=None,
    step=None,
):
    """Propose, score, choose and commit the tokens of an active block (Fast-dLLM, arXiv 2505.22618, 3.3; spec of the rules).

    logits [B, T, V] (float16, bfloat16 or float32; rows at any stride, V contiguous): row t predicts position t of the block.
    tokens [B, T] int64, updated in place where committed. mask_id is never proposed. rule: Threshold, Factor or Quota, whose
    parameter may be a [B] tensor. candidates [B, T] bool: default tokens == mask_id. score: "confidence", "margin",
    "entropy" or "random". temperature 0 proposes the argmax, above 0 draws from softmax(logits / temperature); the score is that
    of the clean softmax. seed: an int, or [B] int64, the key of a row's draws; needed with a temperature or "random". vocab_size:
    entries past it are padding. step [B] int64: the row's step in its block, from 0, which Quota counts by (default 0).

    Returns a Selection. Nothing is read back to the host. Raises TypeError for dtypes, ValueError for shapes and values.
    """
    vocab_size = _check_logits(logits, 3, mask_id, score, temperature, seed, vocab_size)
    if not isinstance(tokens, torch.Tensor) or tokens.dtype != torch.int64:
        raise TypeError(f"tokens: expected an int64 tensor, got {getattr(tokens, 'dtype', type(tokens).__name__)}")
    if tokens.shape != logits.shape[:2] or tokens.device != logits.device:
        raise ValueError(f"tokens: expected [B, T] = {tuple(logits.shape[:2])} on {logits.device}, "
                         f"got {tuple(tokens.shape)} on {tokens.device}")
    kind, parameter = _rule(rule, tokens)
    if candidates is None:
        candidates = tokens == mask_id
    elif not isinstance(candidates, torch.Tensor) or candidates.dtype != torch.bool:
        raise TypeError(f"candidates: expected a bool tensor, got {getattr(candidates, 'dtype', type(candidates).__name__)}")
    elif candidates.shape != tokens.shape or candidates.device != tokens.device:
        raise ValueError(f"candidates: expected [B, T] = {tuple(tokens.shape)} on {tokens.device}, "
                         f"got {tuple(candidates.shape)} on {candidates.device}")
    seed = _row_tensor("seed", seed, tokens, (torch.int64,))
    if step is not None:
        step = _row_tensor("step", step, tokens, (torch.int64, torch.int32))
    token_ids, value = torch.empty_like(tokens), torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device)
    committed = torch.empty(tokens.shape, dtype=torch.bool, device=tokens.device)
    remaining = torch.empty(tokens.shape[:1], dtype=torch.int32, device=tokens.device)
    torch.ops.fastdllm.confidence_select(
        logits, tokens, candidates, mask_id, kind, parameter, score, float(temperature), seed, vocab_size, step, token_ids,
        value, committed, remaining,
    )
    return Selection(token_ids, value, committed, remaining)


def token_confidence(
    logits, *, mask_id=None, score="confidence", temperature=0.0, seed=None, position=None, vocab_size=None,
    return_logsumexp=False, return_entropy=False, return_margin=False,
):
    """The proposal and score of each row of logits [N, V], without a rule: for engines that bring their own.

    mask_id (optional) is never proposed; score, temperature and vocab_size as in `confidence_select`; seed an int or [N] int64,
    position [N] int64 what a row's draws are counted by (default its index). Returns a Confidence: token_ids [N] int64, score
    [N] fp32 (NaN where the row holds a NaN), and on request the log-sum-exp, the negative entropy and the top-2 margin.
    """
    vocab_size = _check_logits(logits, 2, mask_id, score, temperature, seed, vocab_size)
    if isinstance(seed, torch.Tensor):
        seed = _row_tensor("seed", seed, logits, (torch.int64,))
    if position is not None:
        position = _row_tensor("position", position, logits, (torch.int64,))
    return token_confidence_reference(
        logits, mask_id=mask_id, score=score, temperature=temperature, seed=seed, position=position, vocab_size=vocab_size,
        return_logsumexp=return_logsumexp, return_entropy=return_entropy, return_margin=return_margin,
    )


def _check_logits(logits, ndim, mask_id, score, temperature, seed, vocab_size):
    """Checks shared by both ops; returns the vocabulary size."""
    shape = "[B, T, V]" if ndim == 3 else "[N, V]"
    if not isinstance(logits, torch.Tensor) or logits.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        got = getattr(logits, "dtype", type(logits).__name__)
        raise TypeError(f"logits: expected a float16, bfloat16 or float32 tensor, got {got}")
    if logits.ndim != ndim or not logits.numel():
        raise ValueError(f"logits: expected a non-empty {shape}, got {tuple(logits.shape)}")
    vocab = logits.shape[-1]
    for name, value, low, high in (("vocab_size", vocab_size, 1, vocab + 1), ("mask_id", mask_id, 0, vocab)):
        if value is None and (name == "vocab_size" or ndim == 2):
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if not low <= value < high:
            raise ValueError(f"{name}: expected a value in [{low}, {high}), got {value}")
    if mask_id is not None and vocab_size is not None and mask_id >= vocab_size:
        raise ValueError(f"mask_id: expected a value below vocab_size = {vocab_size}, got {mask_id}")
    if score not in SCORES:
        raise ValueError(f"score: expected one of {', '.join(SCORES)}, got {score!r}")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature: expected a number, got {type(temperature).__name__}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number >= 0, got {temperature}")
    if seed is None and (temperature > 0 or score == "random"):
        raise ValueError("seed: expected an int or a tensor where temperature > 0 or score is 'random', got None")
    if seed is not None and not isinstance(seed, torch.Tensor) and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed: expected an int or an int64 tensor, got {type(seed).__name__}")
    return vocab if vocab_size is None else vocab_size


def _row_tensor(name, value, rows, dtypes):
    """`value` as a tensor with one entry for each row; None stays None."""
    if value is None:
        return None
    if not isinstance(value, torch.Tensor):
        return torch.full(rows.shape[:1], value, dtype=dtypes[0], device=rows.device)
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {value.dtype}")
    if value.shape != rows.shape[:1] or value.device != rows.device:
        raise ValueError(f"{name}: expected shape [{rows.shape[0]}] on {rows.device}, got {tuple(value.shape)} on {value.device}")
    return value


def _rule(rule, tokens):
    """The rule's name in the op and its parameter as a tensor with one entry for each row."""
    if isinstance(rule, Threshold):
        kind, parameter, dtype = "threshold", rule.tau, torch.float32
    elif isinstance(rule, Factor):
        kind, parameter, dtype = "factor", rule.f, torch.float32
    elif isinstance(rule, Quota):
        kind = "quota" if rule.schedule == "even" else "quota_dream"
        parameter, dtype = rule.steps, torch.int64
    else:
        raise TypeError(f"rule: expected Threshold, Factor or Quota, got {type(rule).__name__}")
    if isinstance(parameter, torch.Tensor):
        if parameter.shape != tokens.shape[:1]:
            raise ValueError(f"rule: expected a parameter of shape [{tokens.shape[0]}], got {tuple(parameter.shape)}")
        return kind, parameter.to(device=tokens.device, dtype=dtype)
    return kind, torch.full(tokens.shape[:1], parameter, dtype=dtype, device=tokens.device)
