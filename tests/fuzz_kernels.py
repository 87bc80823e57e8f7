"""Random calls of the public ops: the kernel against an oracle or against its reference.

A call is a value whose repr is the Python that makes it again; `check(call)` runs it. Every operand
lies in a guarded buffer at strides of its own, what an op allocates does so too and starts as NaN:
after the call nothing outside the results may have changed (guarded.py). An error may be twice what
PyTorch's own op loses in the same dtype, plus a few units in the last place; what is exact by
definition is compared so. On a CPU the kernels run in Triton's interpreter, on a GPU compiled.
"""

import math
import traceback
from collections import Counter
from dataclasses import dataclass
from random import Random

import guarded
import torch
from fuzz_decodes import Outcome, Wrong, backend, require
from torch.nn import functional

import fastdllm_kernels as ops

# The interpreter's bf16 is wrong by orders of magnitude: only a compiler is asked for it.
DTYPES = {"cpu": ("float32", "float16"), "cuda": ("float32", "float16", "bfloat16")}
EPS = 1e-5


@dataclass(frozen=True)
class Call:
    """One call of an op: what is not in `sizes` is drawn from the seed."""

    op: str
    dtype: str
    seed: int
    sizes: dict


def random_call(seed: int, index: int, device: str = "cpu") -> Call:
    """Call number `index` of a seed: the same one in every process on this kind of device."""
    random = Random(f"{seed} kernel {index}")
    op = random.choice([name for name, (_, _, weight) in OPS.items() for _ in range(weight)])
    sizes = OPS[op][0](random)
    return Call(op, random.choice(DTYPES[device]), random.randrange(2**31), sizes)


def check(call: Call, device: str = "cpu") -> Outcome:
    """Run the call and what it is compared with."""
    outcome = Outcome(checks=Counter([call.op]))
    try:
        with torch.no_grad():
            OPS[call.op][1](Operands(call, device), outcome, **call.sizes)
    except Exception as error:
        text = str(error) if isinstance(error, Wrong) else traceback.format_exc()
        outcome.failures.append((call.op, text))
    return outcome


def options_of(call: Call):
    """The call's options in a few words, to be counted."""
    return {"op": call.op, "dtype": call.dtype}


class Operands:
    """The tensors of one call by name: `views` in guarded buffers for the kernel, and plain copies,
    `values`, for what it is compared with.
    """

    def __init__(self, call, device):
        self.device, self.dtype = torch.device(device), getattr(torch, call.dtype)
        self.random = Random(call.seed)
        self.generator = torch.Generator().manual_seed(call.seed)
        self.guards, self.views, self.values = {}, {}, {}

    def normal(self, *shape, dtype=None):
        values = torch.randn(shape, generator=self.generator)
        return values.to(self.device, dtype or self.dtype)

    def add(self, name, values, layout=None):
        """An operand of these values; None stays None. layout: as in `guarded.place`."""
        if values is None:
            self.views[name] = self.values[name] = None
            return
        layout = layout or self.random.choice(["dense", "any"])
        guard = guarded.place(values.to(self.device), self.random, layout)
        self.guards[name], self.views[name] = guard, guard.view
        self.values[name] = guard.view.clone()

    def add_ints(self, name, values, dtype=torch.int32):
        """An operand of integers, at times every second element of a vector."""
        layout = self.random.choice(["dense", "last apart"])
        self.add(name, None if values is None else torch.tensor(values, dtype=dtype), layout)

    def run(self, op, written=(), **options):
        """op(**views, **options) by its kernel; every guard is checked after it."""
        with backend("triton"), guarded.guarded_allocations() as made:
            results = op(**self.views, **options)
        for guard in made:
            shape = tuple(guard.view.shape)
            require(guard.guards_hold(), f"written beside a tensor {shape} that the op allocated")
        for name, guard in self.guards.items():
            require(guard.guards_hold(), f"written beside {name}")
            require(name in written or guard.unchanged(), f"{name} was changed")
        return results


def require_close(what, got, library, oracle, slack=0.0):
    """At most twice what the library loses in this dtype, plus units in the last place of the
    largest element, and `slack` of it.
    """
    require(got.shape == oracle.shape, f"{what}: shape {tuple(got.shape)}")
    if not oracle.numel():
        return
    lost = (library.double() - oracle).abs().max()
    units = 4 * torch.finfo(got.dtype).eps + slack
    allowed = 2 * lost + units * oracle.abs().max()
    error = (got.double() - oracle).abs().max()
    require(error <= allowed, f"{what}: off by {error:.3g}, allowed {allowed:.3g}")


def require_equal(what, got, wanted):
    same = got.shape == wanted.shape and got.dtype == wanted.dtype
    same = same and guarded.bits(got.contiguous()).equal(guarded.bits(wanted.contiguous()))
    require(same, f"{what}: {got.tolist()}, expected {wanted.tolist()}")


# block_attention, against a loop over rows in float64.


def attention_sizes(random):
    rotation = random.choice([None, "float32", "own"])
    dims = [2, 8, 16, 64, 64, 96, 128, 256] + ([] if rotation else [7, 33])
    page = random.choice([0, 0, 1, 3, 5, 16, 32])
    kv_heads = random.randint(1, 3)
    width = random.choice([1, 2, 4, 9, 31, 32, 33, 64, random.randint(1, 40)])
    return dict(
        rows=random.randint(1, 4 if width < 16 else 2),
        width=width,
        heads=kv_heads * random.choice([1, 1, 2, 3, 4, 7, 8]),
        kv_heads=kv_heads,
        dim=random.choice(dims),
        slots=(page or 1) * random.randint(1 if page else 0, max(1, 90 // (page or 1))),
        page=page,
        rotation=rotation,
        sharp=random.random() < 0.2,
    )


def random_span(random, width, slots, whole):
    """(kv_start, block_start, block_len, kv_len) of one row."""
    length = width if whole else random.choice([0, width, random.randint(0, width)])
    start = random.choice([0, slots, max(0, slots - length), random.randint(0, slots)])
    first = random.choice([0, 0, start, random.randint(0, start)])
    end = start + length
    kv_len = random.choice([end, slots, random.randint(end, slots)]) if end <= slots else end
    return first, start, length, kv_len


def attention_check(x, outcome, *, rows, width, heads, kv_heads, dim, slots, page, rotation, sharp):
    random = x.random
    whole = random.random() < 0.5
    spans = [random_span(random, width, slots, whole) for _ in range(rows)]
    if random.random() < 0.5:
        spans = [(0, *span[1:]) for span in spans]
    table, seen = random_pages(random, spans, slots, page)
    scale = random.choice([None, None, 1.0, 0.03])
    x.add("q", x.normal(rows, width, heads, dim) * (12 if sharp else 1))
    for name in ("k", "v"):
        x.add(name, x.normal(rows, width, kv_heads, dim))
    for name in ("k_cache", "v_cache"):
        cache = x.normal(*seen.shape, kv_heads, dim)
        cache[~seen.to(cache.device)] = random.choice([math.nan, math.inf])
        x.add(name, cache)
    for row, (_, _, length, _) in enumerate(spans):
        for name in ("q", "k", "v"):
            x.views[name][row, length:] = x.values[name][row, length:] = math.nan
            x.guards[name].before = x.guards[name].buffer.clone()
    firsts, starts, lengths, ends = zip(*spans, strict=True)
    x.add_ints("block_start", starts)
    x.add_ints("kv_len", ends)
    x.add_ints("kv_start", firsts if any(firsts) or random.random() < 0.3 else None)
    x.add_ints("block_len", None if whole else lengths)
    x.add("page_table", table)
    add_rotation(x, rotation, max(1, *(s + n for s, n in zip(starts, lengths, strict=True))), dim)
    x.add("out", random.choice([None, x.normal(rows, width, heads, dim).fill_(math.nan)]))
    out, lse = x.run(ops.block_attention, written=("out",), scale=scale, return_lse=True)
    judge_attention(x, spans, scale, out, lse, "kernel")
    plain = {name: value for name, value in x.values.items() if name != "out"}
    out, lse = ops.block_attention_reference(**plain, scale=scale, return_lse=True)
    judge_attention(x, spans, scale, out, lse, "reference")


def random_pages(random, spans, slots, page):
    """(page_table or None, which slots [B, S] or [num_pages, page_size] some row sees). Rows may
    share a page; entries behind what a row sees are wild.
    """
    visible = [[*range(first, start), *range(start + n, end)] for first, start, n, end in spans]
    if not page:
        seen = torch.zeros(len(spans), slots, dtype=torch.bool)
        for row, mine in enumerate(visible):
            seen[row, [slot for slot in mine if slot < slots]] = True
        return None, seen
    columns = slots // page
    count = random.choice([columns, len(spans) * columns + 3])
    seen = torch.zeros(count, page, dtype=torch.bool)
    table = torch.full((len(spans), columns + random.randint(0, 2)), 2**30, dtype=torch.int32)
    for row, mine in enumerate(visible):
        mine = [slot for slot in mine if slot < slots]
        table[row, :columns] = torch.tensor(random.sample(range(count), columns))
        for slot in mine:
            seen[table[row, slot // page], slot % page] = True
        table[row, max(mine, default=-1) // page + 1 :] = 2**30
    return table, seen


def add_rotation(x, rotation, positions, dim):
    """cos and sin of so many positions, in fp32 or in the operands' dtype."""
    angles = torch.rand(positions, dim // 2, generator=x.generator) * 100
    dtype = torch.float32 if rotation == "float32" else x.dtype
    for name, values in (("cos", angles.cos()), ("sin", angles.sin())):
        x.add(name, values.to(dtype) if rotation else None)


def rotated(y, cos, sin):
    """Half-split RoPE of y [n, H, D] by cos and sin [n, D/2], in their dtype, cast back."""
    if cos is None:
        return y
    first, second = y.to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(y.dtype)


def judge_attention(x, spans, scale, out, lse, who):
    """out and lse against float64, within twice what PyTorch's attention loses on the same keys."""
    oracle, library, largest = torch.zeros_like(out, dtype=torch.float64), torch.zeros_like(out), 1
    true_lse = torch.full(lse.shape, -math.inf, dtype=torch.float64, device=lse.device)
    for row, span in enumerate(spans):
        length = span[2]
        if not length:
            continue
        exact, scores, given = attend_row(x.values, row, span, scale)
        oracle[row, :length], library[row, :length] = exact, given
        true_lse[row, :length] = torch.logsumexp(scores, -1).T
        largest = max(largest, scores.abs().max().item())
    # A score rounds by its own size in fp32, and its weight by as much of itself.
    slack = 2 * torch.finfo(torch.float32).eps * largest
    require_close(f"{who}'s out", out, library, oracle, slack)
    empty = true_lse == -math.inf
    require((lse == -math.inf).equal(empty), f"{who}'s lse is -inf elsewhere")
    require(not out[empty].any(), f"{who}'s out is not 0 where nothing is seen")
    # It inherits the rounding of rotated queries and keys, in units of the scores.
    eps = torch.finfo(out.dtype if x.values["cos"] is not None else torch.float32).eps
    error = (lse.double() - true_lse)[~empty].abs().max().item() if (~empty).any() else 0
    require(error <= 64 * eps * largest, f"{who}'s lse is off by {error:.3g}")


def attend_row(values, row, span, scale):
    """Of one row: (attention in float64 [n, H, D], the scores [H, n, keys], what SDPA gives)."""
    first, start, length, end = span
    slots = [*range(first, start), *range(start + length, end)]
    q, k, v = (values[name][row, :length] for name in "qkv")
    group = q.shape[1] // k.shape[1]
    cached = [values[name] for name in ("k_cache", "v_cache")]
    table, capacity = values["page_table"], cached[0].shape[1]
    pages = [row if table is None else int(table[row, slot // capacity]) for slot in slots]
    places = [slot if table is None else slot % capacity for slot in slots]
    cached = [cache[pages, places] for cache in cached]
    cos, sin = (
        None if values[name] is None else values[name][start : start + length]
        for name in ("cos", "sin")
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def operands(dtype):
        tables = (None, None) if cos is None else (cos, sin)
        if dtype == torch.float64 and cos is not None:
            tables = cos.double(), sin.double()
        query = rotated(q.to(dtype), *tables)
        keys = torch.cat([cached[0].to(dtype), rotated(k.to(dtype), *tables)])
        everything = torch.cat([cached[1], v]).to(dtype)
        shared = (y.repeat_interleave(group, dim=1) for y in (keys, everything))
        return [y.transpose(0, 1) for y in (query, *shared)]

    query, keys, everything = operands(torch.float64)
    scores = scale * query @ keys.transpose(1, 2)
    exact = (torch.softmax(scores, -1) @ everything).transpose(0, 1)
    batch = [y[None] for y in operands(q.dtype)]
    given = functional.scaled_dot_product_attention(*batch, scale=scale)[0].transpose(0, 1)
    return exact, scores, given


# confidence_select and token_confidence.

RULES = "threshold factor even dream frechet entropy_bound progress neighbours".split()
KINDS_OF_LOGITS = ("normal", "ties", "holes", "flat", "empty", "extreme", "nan", "infinite")


def select_sizes(random):
    vocab = random.choice([2, 3, 17, 100, 257, 300, random.randint(1000, 5000)])
    widths = [1, 2, 4, 7, 8, 9] + ([31, 32, 33] if vocab < 1000 else [])
    return dict(
        rows=random.randint(1, 3),
        width=random.choice(widths),
        vocab=vocab,
        kind=random.choice(["normal", "normal", *KINDS_OF_LOGITS]),
        score=random.choice(ops.SCORES),
        temperature=random.choice([0.0, 0.0, 0.0, 0.7, 1.0, 3.0]),
        rule=random.choice(RULES),
    )


def random_logits(x, kind, *shape):
    """Logits of one kind, the rows of which differ."""
    random, logits = x.random, 4 * x.normal(*shape)
    chosen = torch.rand(shape, generator=x.generator).to(x.device)
    if kind == "ties":
        return (logits / 4).round()
    if kind == "holes":
        return logits.masked_fill(chosen < 0.7, -math.inf)
    if kind == "flat":
        return torch.full_like(logits, random.choice([0.0, -3.0, 11.0]))
    if kind == "extreme":
        return logits.masked_fill(chosen < 0.1, torch.finfo(x.dtype).min) * 8
    if kind == "empty":
        return logits.masked_fill(chosen[..., :1] < 0.4, -math.inf)
    if kind == "nan":
        return logits.masked_fill(chosen < 1 / shape[-1] / 3, math.nan)
    if kind == "infinite":
        return logits.masked_fill(chosen < 1 / shape[-1] / 3, math.inf)
    return logits


def random_rule(x, name, rows, width):
    """A rule each of whose parameters is at times a tensor with one entry for each row."""
    random = x.random
    floats, integers = (torch.float32, torch.float64), (torch.int32, torch.int64)

    def parameter(draw, dtypes=floats):
        if random.random() < 0.5:
            return draw()
        each = [draw() for _ in range(rows)]
        return torch.tensor(each, dtype=random.choice(dtypes), device=x.device)

    def share():
        return random.choice([0.0, 1.0, random.random()])

    def count(lowest):
        return parameter(lambda: random.randint(lowest, width + 2), integers)

    return {
        "threshold": lambda: ops.Threshold(parameter(lambda: random.uniform(-2, 1))),
        "factor": lambda: ops.Factor(parameter(lambda: random.uniform(0.1, width + 2))),
        "frechet": lambda: ops.Frechet(parameter(share)),
        "entropy_bound": lambda: ops.EntropyBound(parameter(lambda: 4 * share())),
        "progress": lambda: ops.ProgressThreshold(parameter(share), parameter(share)),
        "neighbours": lambda: ops.Neighbours(parameter(share), parameter(share), count(0)),
    }.get(name, lambda: ops.Quota(count(1), name))()


def random_seeds(x, count):
    """A seed for all, or one for each."""
    random = x.random
    seeds = [random.randrange(-(2**63), 2**63) for _ in range(count)]
    return random.choice([0, seeds[0], torch.tensor(seeds, device=x.device)])


def padded(x, logits, lowest):
    """The vocabulary's size or None, and the logits with NaN past it."""
    if x.random.random() < 0.6 or lowest == logits.shape[-1]:
        return None, logits
    vocab_size = x.random.randint(lowest, logits.shape[-1])
    logits[..., vocab_size:] = math.nan
    return vocab_size, logits


def select_check(x, outcome, *, rows, width, vocab, kind, score, temperature, rule):
    random, rule = x.random, random_rule(x, rule, rows, width)
    if isinstance(rule, ops.EntropyBound):
        score = ops.score_of(rule)
    mask_id = random.choice([0, vocab - 1, random.randrange(vocab)])
    vocab_size, logits = padded(x, random_logits(x, kind, rows, width, vocab), max(2, mask_id + 1))
    tokens = torch.randint(0, vocab, (rows, width), generator=x.generator)
    masked = torch.rand(rows, width, generator=x.generator) < random.choice([0.3, 0.8, 1])
    x.add("logits", logits)
    x.add("tokens", tokens.masked_fill(masked, mask_id))
    candidates = torch.rand(rows, width, generator=x.generator) < 0.5
    x.add("candidates", random.choice([None, candidates]))
    steps = [random.randint(0, width) for _ in range(rows)]
    kind_of_step = random.choice([torch.int32, torch.int64])
    x.add_ints("step", random.choice([None, steps]), kind_of_step)
    options = dict(mask_id=mask_id, rule=rule, score=score, temperature=temperature)
    options |= dict(seed=random_seeds(x, rows), vocab_size=vocab_size)
    before = x.values["tokens"].clone()
    got = x.run(ops.confidence_select, written=("tokens",), **options)
    wanted = ops.confidence_select_reference(**x.values, **options)
    after = x.views["tokens"]
    candidates = before == mask_id if x.values["candidates"] is None else x.values["candidates"]
    broken = candidates & wanted.score.isnan()
    judge_proposals(x, outcome, got, wanted, candidates & ~broken, options)
    require(got.score.isnan().equal(broken), "a score is NaN elsewhere than in the reference")
    require((got.score[~candidates] == -math.inf).all(), "no candidate, and a score above -inf")
    require(got.token_ids[~candidates].equal(before[~candidates]), "no candidate's token differs")
    # What follows the scores is exact: the reference's rule on the kernel's own scores.
    step = torch.zeros(rows, dtype=torch.int64, device=x.device)
    step = step if x.values["step"] is None else x.values["step"]
    committed = rule.commit(got.score, candidates & ~broken, step)
    require_equal("committed", got.committed, committed)
    require_equal("tokens", after, torch.where(committed, got.token_ids, before))
    remaining = (candidates & ~committed).sum(1)
    reported = torch.where(broken.any(1), -1 - broken.int().argmax(1), remaining).to(torch.int32)
    require_equal("remaining", got.remaining, reported)


def judge_proposals(x, outcome, got, wanted, counts, options):
    """Proposals and scores of the candidates at hand. A drawn proposal may differ where two draws
    tie to a few units in the last place.
    """
    differ = counts & (got.token_ids != wanted.token_ids)
    for place in map(tuple, differ.nonzero().tolist()):
        where = f"{place}: token {got.token_ids[place]}, not {wanted.token_ids[place]}"
        require(drawn_alike(x, got, wanted, place, options), where)
        outcome.near_ties += 1
    same = counts & ~differ
    judge_numbers("score", got.score[same], wanted.score[same])


def drawn_alike(x, got, wanted, place, options):
    """Whether both tokens were compared by nearly the same number, logit / temperature + noise."""
    row, position = place if len(place) == 2 else (place[0], None)
    logits = x.values["logits"][place]
    seed, at, temperature = (options.get(name) for name in ("seed", "position", "temperature"))
    if isinstance(seed, torch.Tensor):
        seed = seed[row : row + 1]
    if isinstance(temperature, torch.Tensor):
        temperature = float(temperature[row])
    if temperature == 0:
        return False
    if position is None:
        position = row if at is None else int(at[row])
    best = []
    for token in (got.token_ids[place], wanted.token_ids[place]):
        alone = torch.full_like(logits, -math.inf)
        alone[token] = logits[token]
        partials = ops.token_confidence_partials_reference(
            alone[None],
            temperature=temperature,
            seed=seed,
            position=torch.tensor([position], device=logits.device),
        )
        best.append(partials.best)
    return torch.allclose(*best, rtol=1e-5, atol=1e-5)


def judge_numbers(what, got, wanted):
    """fp32 sums over a vocabulary in two orders: some units in the last place apart."""
    error = (got - wanted).abs() - 4e-6 * wanted.abs().clamp(min=1)
    wrong = ~(error <= 0) & (got != wanted) & ~(got.isnan() & wanted.isnan())
    require(not wrong.any(), f"{what}: {got[wrong].tolist()}, expected {wanted[wrong].tolist()}")


def confidence_sizes(random):
    sizes = select_sizes(random)
    del sizes["rule"], sizes["width"]
    return {**sizes, "rows": random.choice([1, 2, 5, 17]), "parts": random.choice([0, 0, 1, 2, 3])}


def confidence_check(x, outcome, *, rows, vocab, kind, score, temperature, parts):
    """token_confidence, or its partials over so many parts of the vocabulary, merged."""
    random = x.random
    mask_id = random.choice([None, 0, vocab - 1, random.randrange(vocab)])
    lowest = max(2, (mask_id or 0) + 1)
    vocab_size, logits = padded(x, random_logits(x, kind, rows, vocab), lowest)
    draw = dict(seed=random_seeds(x, rows), position=None)
    if random.random() < 0.3:
        draw["position"] = torch.randint(0, 2**40, (rows,), generator=x.generator).to(x.device)
    options = dict(mask_id=mask_id, temperature=temperature, **draw)
    wanted_fields = dict(return_logsumexp=True, return_entropy=True, return_margin=True)
    x.add("logits", logits)
    if parts:
        x.add("logits", logits[:, :vocab_size])
        parts = sorted({0, *(2 * random.randint(0, vocab // 2) for _ in range(parts))})
        got = merged(x, parts, options, score=score, **draw, **wanted_fields)
    else:
        every = dict(score=score, vocab_size=vocab_size, **wanted_fields)
        got = x.run(ops.token_confidence, **options, **every)
    wanted = ops.token_confidence_reference(
        logits, score=score, vocab_size=vocab_size, **options, **wanted_fields
    )
    counts = ~wanted.logsumexp.isnan()
    judge_proposals(x, outcome, got, wanted, counts, options)
    for name in ("logsumexp", "entropy", "margin"):
        judge_numbers(name, getattr(got, name), getattr(wanted, name))


def merged(x, starts, options, **merging):
    """The Confidence of the partials of the columns between `starts`."""
    width, partials = x.views["logits"].shape[1], []
    starts = [start for start in starts if start < width]
    if options.get("mask_id") == starts[-1] == width - 1:
        starts.pop()  # a part of the mask alone is refused
    for start, end in zip(starts, [*starts[1:], width], strict=True):
        part = x.guards["logits"].view[:, start:end]
        x.views = {"logits": part}
        partials.append(x.run(ops.token_confidence_partials, vocab_start=start, **options))
    return ops.merge_confidence_partials(partials, **merging)


# Top-p, top-k and temperatures of rows, against the sorted vocabulary.


def filter_sizes(random):
    return dict(
        rows=random.choice([1, 2, 5]),
        vocab=random.choice([2, 3, 17, 100, 257, 300]),
        kind=random.choice(["normal", "normal", *KINDS_OF_LOGITS]),
        score=random.choice(ops.SCORES),
    )


def filter_check(x, outcome, *, rows, vocab, kind, score):
    """token_confidence with filters, in the rows where no sum of masses nearly is top_p."""
    random = x.random
    mask_id = random.choice([None, 0, vocab - 1, random.randrange(vocab)])
    vocab_size, logits = padded(x, random_logits(x, kind, rows, vocab), max(2, (mask_id or 0) + 1))
    x.add("logits", logits)
    temperature = of_rows(x, [random.choice([0.0, 0.2, 0.7, 1.0, 3.0]) for _ in range(rows)])
    top_p = of_rows(x, [random.choice([1e-30, 0.3, 0.9, 0.95, 1.0]) for _ in range(rows)])
    top_k = of_rows(x, [random.choice([1, 2, 7, 50, 10**6]) for _ in range(rows)], torch.int32)
    options = dict(
        mask_id=mask_id,
        vocab_size=vocab_size,
        temperature=temperature,
        top_p=random.choice([None, top_p]),
        top_k=random.choice([None, top_k]),
        filtered_score=random.random() < 0.5,
        seed=random_seeds(x, rows),
    )
    asked = dict(score=score, return_logsumexp=True, return_entropy=True, return_margin=True)
    got = x.run(ops.token_confidence, **options, **asked)
    wanted = ops.token_confidence_reference(x.values["logits"], **options, **asked)
    counts = ~wanted.logsumexp.isnan() & ~near_top_p(x.values["logits"], options)
    require((got.score.isnan() | ~wanted.logsumexp.isnan()).all(), "a NaN in a row was not told")
    judge_proposals(x, outcome, got, wanted, counts, options)
    for name in ("logsumexp", "entropy", "margin"):
        judge_numbers(name, getattr(got, name)[counts], getattr(wanted, name)[counts])


def of_rows(x, each, dtype=torch.float32):
    """The numbers of all rows as a tensor, or one of them for all."""
    as_tensor = torch.tensor(each, dtype=dtype, device=x.device)
    return each[0] if x.random.random() < 0.5 else as_tensor


def near_top_p(logits, options):
    """The rows in which the masses before some token are top_p but for the rounding of fp32."""
    offered = logits[:, : options["vocab_size"]].double()
    if options["mask_id"] is not None:
        offered[:, options["mask_id"]] = -math.inf
    temperature, share = (
        torch.as_tensor(options[name] or 1.0, dtype=torch.float64, device=logits.device)
        if not isinstance(options[name], torch.Tensor)
        else options[name].double()[:, None]
        for name in ("temperature", "top_p")
    )
    scaled = offered / torch.where(temperature > 0, temperature, 1)
    p = scaled.sort(dim=-1, descending=True).values.softmax(-1)
    before = p.cumsum(-1) - p
    return ((before - share).abs() < 2e-6).logical_and(before > 0).any(-1)


# rope_to_cache, to the bit.


def rope_sizes(random):
    page, kv_heads = random.choice([0, 0, 1, 3, 16]), random.randint(1, 4)
    return dict(
        rows=random.randint(1, 3),
        width=random.choice([1, 2, 3, 5, 17]),
        heads=kv_heads * random.choice([1, 2, 3, 7]),
        kv_heads=kv_heads,
        dim=random.choice([2, 8, 64, 96, 128]),
        slots=(page or 1) * random.randint(1, 60 // (page or 1)),
        page=page,
        rotation=random.choice(["float32", "own"]),
        cached=random.random() < 0.8,
    )


def rope_check(x, outcome, *, rows, width, heads, kv_heads, dim, slots, page, rotation, cached):
    random = x.random
    layout = random.choice(["any", "any", "last apart"])
    for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        x.add(name, x.normal(rows, width, count, dim), layout)
    starts = [random.randint(0, slots) for _ in range(rows)]
    add_rotation(x, rotation, max(starts) + random.choice([1, width]), dim)
    x.add_ints("start", starts)
    lengths = [random.randint(0, width) for _ in range(rows)]
    x.add_ints("length", random.choice([None, lengths]))
    columns = slots // page if page else 0
    count = rows * columns + random.randint(0, 2) if page else rows
    for name in ("k_cache", "v_cache"):
        shape = count, page or slots, kv_heads, dim
        x.add(name, torch.full(shape, math.nan, dtype=x.dtype) if cached else None)
    pages = torch.tensor(random.sample(range(count), rows * columns), dtype=torch.int32)
    x.add("page_table", pages.view(rows, columns) if page and cached else None)
    got = x.run(ops.rope_to_cache, written=("k_cache", "v_cache"))
    wanted = ops.rope_to_cache_reference(**x.values)
    for name, one, other in zip("qk", got, wanted, strict=True):
        require_equal(f"rotated {name}", one, other)
    for name in ("k_cache", "v_cache") if cached else ():
        one, other = x.views[name], x.values[name]
        same = (one == other) | (one.isnan() & other.isnan())
        require(same.all(), f"{name} differs at {(~same).nonzero()[:4].tolist()}")


# rms_norm, swiglu and the products.


def width_sizes(random):
    rows = random.choice([(), (1,), (3,), (33,), (1, 2), (2, 5), (2, 1, 3)])
    widths = [1, 8, 33, 64, 96, 130, 257, random.randint(1, 300)]
    return dict(
        rows=rows,
        width=random.choice(widths),
        outputs=random.choice(widths),
        second=random.random() < 0.5,
    )


def row_sizes(random):
    """For what works on rows alone: now and then wider than a tile."""
    sizes = width_sizes(random)
    if random.random() < 0.3:
        sizes |= dict(rows=(2,), width=random.choice([1023, 3584, 4097, 12288, 20000]))
    return sizes


def normed(total, weight):
    """RMSNorm in float64."""
    total = total.double()
    return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS) * weight.double()


def rms_norm_check(x, outcome, *, rows, width, outputs, second):
    layout = x.random.choice(["dense", "any", "last apart"])
    x.add("x", x.normal(*rows, width), layout)
    x.add("weight", x.normal(width))
    x.add("residual", x.normal(*rows, width) if second else None, layout)
    got = x.run(ops.rms_norm, eps=EPS)
    wanted = ops.rms_norm_reference(**x.values, eps=EPS)
    total = x.values["x"]
    if second:
        (got, summed), (wanted, total) = got, wanted
        require_equal("x + residual", summed, total)
    require_close("y", got, wanted, normed(total, x.values["weight"]))


def swiglu_check(x, outcome, *, rows, width, outputs, second):
    x.add("gate_up", 4 * x.normal(*rows, 2 * width), x.random.choice(["any", "last apart"]))
    gate, up = x.values["gate_up"].double().chunk(2, dim=-1)
    got, library = x.run(ops.swiglu), ops.swiglu_reference(**x.values)
    require_close("y", got, library, functional.silu(gate) * up)


def weight_of(x, outputs, width):
    return (x.normal(outputs, width) * width**-0.5).to(x.dtype)


def linear_check(x, outcome, *, rows, width, outputs, second):
    x.add("x", x.normal(*rows, width))
    x.add("weight", weight_of(x, outputs, width), "dense")
    x.add("bias", x.normal(outputs) if second else None)
    exact = {name: value if value is None else value.double() for name, value in x.values.items()}
    oracle = ops.linear_reference(exact["x"], exact["weight"], exact["bias"])
    require_close("y", x.run(ops.linear), ops.linear_reference(**x.values), oracle)


def linear_swiglu_check(x, outcome, *, rows, width, outputs, second):
    """second: the gate's weight and the other's apart."""
    x.add("x", x.normal(*rows, width))
    whole = weight_of(x, 2 * outputs, width)
    gate, up = whole.split(outputs)
    x.add("weight", gate if second else whole, "dense")
    x.add("up", up if second else None, "dense")
    products = (functional.linear(x.values["x"].double(), w.double()) for w in (gate, up))
    oracle = functional.silu(next(products)) * next(products)
    got, library = x.run(ops.linear_swiglu), ops.linear_swiglu_reference(**x.values)
    require_close("y", got, library, oracle)


def linear_rms_norm_check(x, outcome, *, rows, width, outputs, second):
    x.add("x", x.normal(*rows, width))
    x.add("weight", weight_of(x, outputs, width), "dense")
    x.add("residual", x.normal(*rows, outputs))
    x.add("norm_weight", x.normal(outputs))
    exact = {name: value.double() for name, value in x.values.items()}
    total = functional.linear(exact["x"], exact["weight"]) + exact["residual"]
    got = x.run(ops.linear_rms_norm, eps=EPS)
    library = ops.linear_rms_norm_reference(**x.values, eps=EPS)
    require_close("y", got[0], library[0], normed(total, exact["norm_weight"]))
    require_close("residual + product", got[1], library[1], total)


# op -> (sizes, check, how often).
OPS = {
    "block_attention": (attention_sizes, attention_check, 4),
    "confidence_select": (select_sizes, select_check, 4),
    "token_confidence": (confidence_sizes, confidence_check, 2),
    "filters": (filter_sizes, filter_check, 2),
    "rope_to_cache": (rope_sizes, rope_check, 2),
    "rms_norm": (row_sizes, rms_norm_check, 1),
    "swiglu": (row_sizes, swiglu_check, 1),
    "linear": (width_sizes, linear_check, 1),
    "linear_swiglu": (width_sizes, linear_swiglu_check, 1),
    "linear_rms_norm": (width_sizes, linear_rms_norm_check, 1),
}
