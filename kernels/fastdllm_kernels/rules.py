"""Rules: which proposals of an active block to commit, as frozen dataclasses and their reference
meaning.

Source: Fast-dLLM (arXiv 2505.22618), sections 3.3 and 4 (threshold, factor); LLaDA's and Dream's
own samplers (quota). A rule sees scores [B, T] fp32 (higher is surer), candidates [B, T] bool and
each row's step in its block [B], never a model or a cache, and returns the commit mask [B, T] bool.
Equal scores: the lower position first.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Threshold:
    """Commit every candidate with score >= tau, and always the best one.

    tau: a number >= 0, or a [B] tensor with one per row; above 1 it means one token a step in order
    of confidence. Scores other than the confidence have other ranges: the negative entropy wants a
    tau below 0, so any finite number is taken.
    """

    tau: float | torch.Tensor = 0.9

    def __post_init__(self):
        _check_number("Threshold.tau", self.tau)

    def commit(self, scores, candidates, step):
        """The commit mask [B, T] for scores [B, T], candidates [B, T] and step [B]."""
        return candidates & (
            (scores >= _column(self.tau, scores)) | (_ranks(scores, candidates) == 0)
        )


@dataclass(frozen=True, eq=False)
class Factor:
    """Commit the best max(1, n), n the largest with (n + 1)(1 - c(n)) <= f for the scores c(1) >=
    c(2) >= ...

    f: a number > 0, or a [B] tensor. f = 1 is the bound of the paper's theorem, below which greedy
    parallel decoding equals greedy sequential decoding.
    """

    f: float | torch.Tensor = 1.0

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

    steps: an integer >= 1, or a [B] integer tensor. schedule "even": as evenly as possible, the
    first steps taking the remainder; "dream": Dream's published schedule, int(m (1 - t[i+1] /
    t[i])) of the m masks left with t = linspace(1, 0.001, steps + 1), the last step all of them (a
    step of it may commit nothing).
    """

    steps: int | torch.Tensor
    schedule: str = "even"

    def __post_init__(self):
        if isinstance(self.steps, torch.Tensor):
            if self.steps.is_floating_point() or self.steps.dtype == torch.bool:
                raise TypeError(f"Quota.steps: expected an integer tensor, got {self.steps.dtype}")
            if self.steps.device.type == "cpu" and (self.steps < 1).any():
                raise ValueError(
                    f"Quota.steps: expected every entry >= 1, got {self.steps.tolist()}"
                )
        elif isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise TypeError(
                f"Quota.steps: expected an int or an integer tensor, got {type(self.steps).__name__}"
            )
        elif self.steps < 1:
            raise ValueError(f"Quota.steps: expected at least 1, got {self.steps}")
        if self.schedule not in ("even", "dream"):
            raise ValueError(f"Quota.schedule: expected 'even' or 'dream', got {self.schedule!r}")

    def commit(self, scores, candidates, step):
        """The commit mask [B, T] for scores [B, T], candidates [B, T] and step [B]."""
        masks = candidates.sum(1)
        steps = torch.as_tensor(self.steps, device=scores.device).to(torch.int64)
        count = quota_count(masks, steps, step.to(torch.int64), self.schedule)
        return candidates & (_ranks(scores, candidates) < count[:, None])


def quota_count(masks, steps, step, schedule):
    """How many of `masks` [B] a quota of `steps` commits at `step` [B] (counted from 0); int64 [B]."""
    left = (steps - step).clamp(min=1)
    if schedule == "even":
        return (masks + left - 1) // left
    now, then = _dream_time(step, steps), _dream_time(step + 1, steps)
    return torch.where(
        left == 1, masks, (masks.to(torch.float32) * (1 - then / now)).to(torch.int64)
    )


def _dream_time(i, steps):
    """torch.linspace(1, 0.001, steps + 1)[i] in float32, in the order of linspace's own arithmetic:
    the truncations fall as published, but for some 17 in a million where its fused multiply-adds
    round otherwise.
    """
    stride = torch.tensor(0.001 - 1, dtype=torch.float32, device=i.device) / steps
    return torch.where(2 * i < steps + 1, 1 + stride * i, 0.001 - stride * (steps - i))


def _ranks(scores, candidates):
    """Each candidate's place [B, T] in descending score, 0 the best, ties to the lower position;
    others come last.
    """
    order = torch.where(candidates, scores, -torch.inf).nan_to_num(nan=-torch.inf)
    order = order.masked_fill(~candidates, -torch.inf)
    # Candidates with a score of -inf still come before positions that are none.
    by_score = torch.argsort(order, dim=1, descending=True, stable=True)
    is_candidate = candidates.gather(1, by_score)
    by_score = by_score.gather(
        1, torch.argsort(is_candidate.to(torch.int8), dim=1, descending=True, stable=True)
    )
    return torch.argsort(by_score, dim=1)


def _column(value, scores):
    """A rule's parameter as something that broadcasts over [B, T]."""
    if isinstance(value, torch.Tensor):
        return value.to(scores)[:, None]
    return value


def _check_number(name, value, above=None):
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
        wrong = value.isnan() if above is None else ~(value > above)
        if value.device.type == "cpu" and wrong.any():
            raise ValueError(
                f"{name}: expected numbers{'' if above is None else f' > {above}'}, got {value.tolist()}"
            )
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number or a tensor, got {type(value).__name__}")
    elif value != value or (above is not None and not value > above):
        raise ValueError(
            f"{name}: expected a number{'' if above is None else f' > {above}'}, got {value}"
        )
