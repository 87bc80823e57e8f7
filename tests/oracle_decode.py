"""The decoding of one row, stated plainly and slowly: greedy, no batches, no kernels, lists and
dicts.

A *source* stands for the model: ``source(tokens, positions, store) -> (outputs, store)``, where
``tokens`` are those at the canvas ``positions`` and the store holds whatever keys and values an
earlier call computed for the rest of the canvas. Rules are tuples: ("threshold", tau), ("factor",
f), ("quota", steps), ("dream", steps).
"""

import math
from dataclasses import dataclass, field

import torch
from oracle_models import forward_row


def model_source(state, config):
    """The oracle model of a checkpoint as a source."""

    def source(tokens, positions, store):
        return forward_row(state, config, torch.as_tensor(tokens), positions, store)

    return source


def scripted_source(logits_of):
    """A source whose output at a position is ``logits_of(position)`` [V], whatever the canvas
    holds.
    """

    def source(tokens, positions, store):
        return torch.stack([logits_of(int(position)) for position in positions]), store

    return source


@dataclass
class Row:
    """What came of one row. ``slack`` is the smallest distance at which some decision would have
    gone the other way.
    """

    tokens: list
    steps: list = field(default_factory=list)  # (kind, {position: token}) per forward
    slack: float = math.inf

    @property
    def nfe(self):
        return len(self.steps)

    @property
    def refreshes(self):
        return sum(kind == "refresh" for kind, _ in self.steps)

    @property
    def cached_steps(self):
        return sum(kind == "cached" for kind, _ in self.steps)


def propose(logits, mask_id, score):
    """Logits [V] -> (token, score, slack): the mask is barred from the proposal and stays in the
    softmax sum.
    """
    logits = logits.double()
    probabilities = torch.softmax(logits, dim=-1)
    allowed = [token for token in range(len(logits)) if token != mask_id]
    token = allowed[0]
    for other in allowed:
        if logits[other] > logits[token]:
            token = other
    second = max((logits[other].item() for other in allowed if other != token), default=-math.inf)
    slack = logits[token].item() - second
    if score == "confidence":
        value = probabilities[token].item()
    elif score == "margin":
        value = probabilities[token].item() - max(
            probabilities[other].item() for other in allowed if other != token
        )
    elif score == "entropy":
        value = sum(p * math.log(p) for p in probabilities.tolist() if p > 0)
    else:
        raise ValueError(score)
    return token, value, slack


def ranked(scores):
    """{position: score} -> positions, best first, equal scores by position."""
    return sorted(scores, key=lambda position: (-scores[position], position))


def dream_count(masks, step, steps):
    """How many of the masks left Dream's schedule commits at this step; how far that is from one
    more or fewer.
    """
    if step >= steps - 1:
        return masks, math.inf
    now = 1 + (0.001 - 1) * step / steps
    then = 1 + (0.001 - 1) * (step + 1) / steps
    exact = masks * (1 - then / now)
    if exact < 1 and steps > masks + step:
        return 1, 2 - exact  # empty only where no more steps were asked for than masks
    return int(exact), min(exact - math.floor(exact), math.ceil(exact) - exact)


def even_plan(masks, steps):
    """The masks of a block over the steps, the first steps taking the remainder."""
    base, remainder = divmod(masks, steps)
    return [base + (step < remainder) for step in range(steps)]


def choose(rule, scores, step, plan):
    """({position: score}, step in the block, the even plan) -> (positions to commit, slack)."""
    kind, parameter = rule
    order = ranked(scores)
    if kind == "threshold":
        passing = [position for position in order if scores[position] >= parameter]
        count = max(1, len(passing))
        slack = min(abs(scores[position] - parameter) for position in order)
    elif kind == "factor":
        count, slack = 0, math.inf
        for n in range(1, len(order) + 1):
            bound = (n + 1) * (1 - scores[order[n - 1]])
            slack = min(slack, abs(bound - parameter))
            if bound <= parameter:
                count = n
        count = max(1, count)
    elif kind == "quota":
        count, slack = plan[min(step, len(plan) - 1)], math.inf
    elif kind == "dream":
        count, slack = dream_count(len(order), step, parameter)
    else:
        raise ValueError(kind)
    if 0 < count < len(order):
        slack = min(slack, scores[order[count - 1]] - scores[order[count]])
    return order[:count], slack


def finished_by_stop(canvas, prompt_length, mask_id, stop_ids):
    """The position of the row's first stop id if everything before it is committed, else None."""
    for position in range(prompt_length, len(canvas)):
        if canvas[position] == mask_id:
            return None
        if canvas[position] in stop_ids:
            return position
    return None


def prompt_alone(store, kept, length):
    """A store for a canvas of that length with the first positions of another; NaN where a forward
    must bring its own.
    """
    empty = [
        torch.full((len(keys), length - kept, keys.shape[2]), math.nan, dtype=keys.dtype)
        for keys, _ in store
    ]
    return [
        tuple(torch.cat([held[:, :kept], rest], dim=1) for held in layer)
        for layer, rest in zip(store, empty, strict=True)
    ]


def decode_row(
    source,
    prompt,
    *,
    mask_id,
    gen_length,
    block_length,
    cache,
    rule,
    score="confidence",
    shift=0,
    stop_ids=(),
    prompt_refreshes=1,
    suffix_blocks=None,
    keep_finished=False,
):
    """Decodes one prompt (a list of ids) greedily. shift 1: the logits of position i are output i -
    1.

    prompt_refreshes n: of the refreshes, numbers 0, n, 2n ... run over the canvas (n 0: number 0
    alone), the others from `shift` positions before the prompt's end on, or with keep_finished from
    the block before the active one on. suffix_blocks w: the canvas ends w blocks after the active
    one.
    """
    prompt_length, length = len(prompt), len(prompt) + gen_length
    canvas = list(prompt) + [mask_id] * gen_length
    row, store = Row(canvas), None
    for start in range(prompt_length, length, block_length):
        end = min(start + block_length, length)
        step = 0
        seen = length if suffix_blocks is None else min(length, end + suffix_blocks * block_length)
        plan = even_plan(end - start, rule[1]) if rule[0] == "quota" else None
        while True:
            masked = [position for position in range(start, end) if canvas[position] == mask_id]
            if not masked:
                break
            full = cache == "none" or step == 0
            if not full:
                positions, known = list(range(start, end if cache == "dual" else seen)), store
            elif row.refreshes == 0 or (
                prompt_refreshes > 0 and row.refreshes % prompt_refreshes == 0
            ):
                positions, known = list(range(seen)), None
            else:
                kept = start - block_length if keep_finished else prompt_length - shift
                positions, known = list(range(kept, seen)), prompt_alone(store, kept, seen)
            outputs, new_store = source([canvas[p] for p in positions], positions, known)
            if full:
                store = new_store
            commits = {}
            if shift and cache != "none" and full:
                # A cached step never sees the output before the block: the refresh settles the
                # first position.
                commits[start], _, slack = propose(
                    outputs[positions.index(start - 1)], mask_id, "confidence"
                )
                if rule[0] == "quota":
                    plan = [1, *even_plan(end - start - 1, max(1, rule[1] - 1))]
            else:
                proposals = {
                    p: propose(outputs[positions.index(max(p - shift, 0))], mask_id, score)
                    for p in masked
                }
                chosen, slack = choose(
                    rule, {p: proposal[1] for p, proposal in proposals.items()}, step, plan
                )
                for position in chosen:
                    commits[position] = proposals[position][0]
                    slack = min(slack, proposals[position][2])
            for position, token in commits.items():
                canvas[position] = token
            row.steps.append(("refresh" if full else "cached", commits))
            row.slack = min(row.slack, slack)
            step += 1
            stopped = finished_by_stop(canvas, prompt_length, mask_id, stop_ids)
            if stopped is not None:
                canvas[stopped:] = [canvas[stopped]] * (length - stopped)
                return row
    return row
