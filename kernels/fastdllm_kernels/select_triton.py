"""The Triton kernels of select.py: a scan of the logits, then a merge that scores, applies the rule
and commits.

scan_kernel     one program for each (row, part of the vocabulary): reads its logits once and leaves
                one record
commit_kernel   one program for each batch row: merges the records of its positions, scores them,
                asks the rule and commits in place
merge_kernel    the same merge without a rule, for token_confidence and its partials

A record is FIELDS fp32 numbers and two int32, in a workspace [fields, rows, parts]: nothing of size
V is written. What a program decides depends on no order of execution, so equal inputs give equal
bits. Only candidates are read.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from . import compiling, filter_triton
from .backend import Chip, ceil_div, chip_of, dense, on_device, pdl, power_of_2
from .filter_triton import INFINITY, LOG2E, NOTHING, inverse_of_row, is_candidate
from .noise import inverse
from .rules import constants

# The fields of a record, in natural units: largest logit m, sum exp(z - m), sum exp(z - m)(z - m),
# what was compared of the proposal (its logit, or logit / T + noise), its logit, and the two
# largest logits among what may be proposed.
FIELDS = 7
MAXIMUM, TOTAL, WEIGHTED, BEST, LOGIT, TOP, SECOND = map(tl.constexpr, range(FIELDS))
# Then two as int32: the proposal's id (NOTHING when no logit is above -inf), and 1 where a logit is
# NaN.
INTEGERS = 2
TOKEN, NAN = map(tl.constexpr, range(FIELDS, FIELDS + INTEGERS))

# Left alone, the assembler spills a few bytes of a scan with filters or mixed temperatures to fit
# more programs on an SM.
REGISTERS = {"maxnreg": 128} if torch.version.hip is None else {}
# More than the largest noise there is: -ln E of the smallest E, 2^-65, is 45.06.
NOISE_BOUND = tl.constexpr(45.25)
FAR = tl.constexpr(2**30)  # further than a rule can look


@dataclass(frozen=True)
class Config:
    """How the scan is cut: `parts` programs to a row, each `tiles` tiles of tile_vocab logits.

    overlap: the scan is launched while what comes before it drains, the merge while the scan runs;
    each waits on the device for what it reads (Hopper and later).
    """

    tile_vocab: int
    tiles: int
    parts: int
    num_warps: int = 4
    overlap: bool = False


@lru_cache(maxsize=4096)
def config(rows: int, vocab: int, chip: Chip, draw: bool = False) -> Config:
    """The cut for `rows` rows of `vocab` logits; draw: the temperature is above 0. Pure."""
    tile = min(1024 if draw else 4096, max(16, power_of_2(vocab)))
    # Few rows: four programs an SM, all of one size and there at once, read as fast as eight and
    # leave half the records to merge (H200, V 126464, 32 rows: 8.2 us with 16 parts of two tiles,
    # 10.2 with 31 of one).
    few = rows * ceil_div(vocab, tile) <= 16 * chip.multiprocessors
    # Draws keep ten values alive for each logit, and are bound by arithmetic: two waves of eight
    # programs.
    programs, warps = (16, 4) if draw else (4, 4) if few else (21, 2)
    if not draw and not few and rows < 1024:
        # More rows: of programs of two warps so many fit that one reads while another is at its end
        # (256 rows: 23.8 us with 6 parts of 11 tiles, with four warps and tiles twice as long
        # 27.5). From 1024 on two waves and a half of them, so that a short last one costs little.
        tile, programs = min(2048, tile), 11
    count = ceil_div(vocab, tile)
    tiles = max(1, round(rows * count / (programs * chip.multiprocessors)))
    if few and not draw and 16 * rows >= 2 * chip.multiprocessors:
        # Records are merged by powers of two: 16 of them where that many still fill the GPU (H100,
        # V 152064, 32 rows: 9.5 us with 13 parts of three tiles, 11.2 with 19 of two).
        tiles = max(tiles, ceil_div(count, 16))
    tiles = min(count, tiles)
    parts = ceil_div(count, tiles)
    return Config(tile, ceil_div(count, parts), parts, warps, overlap=chip.overlap)


@triton.jit
def _log_exponential(high, low):
    """`noise.log_exponential`: ln E for E = -ln U of the 64-bit uniform U, counted from its nearer
    end.
    """
    near_one = high >= 0x80000000
    high = tl.where(near_one, ~high, high).to(tl.float32)
    low = tl.where(near_one, ~low, low).to(tl.float32)
    value = (high + (low + 0.5) * 2.0**-32) * 2.0**-32
    # -log1p(-v) = 2 atanh(v / (2 - v)), v <= 1/2: the series' first term left out is below 2^-26 of
    # the sum. No log1p here, and a logarithm near 1 that is accurate only in absolute terms would
    # lose the tail.
    s = value / (2.0 - value)
    q = s * s
    series = 1 / 9 + q * (1 / 11 + q * (1 / 13))
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * series)))
    return tl.log(tl.where(near_one, 2.0 * s * series, -tl.log(value)))


@triton.jit
def _gumbel(column, position, seed, TILE: tl.constexpr):
    """Standard Gumbel variates of columns `column` (even) to column + TILE - 1: two columns share
    one Philox call.
    """
    pair = (column // 2 + tl.arange(0, TILE // 2)).to(tl.uint32)
    zero = tl.zeros([TILE // 2], tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, pair, zero + position, zero, zero)
    return -tl.interleave(_log_exponential(w0, w1), _log_exponential(w2, w3))


@triton.jit
def _uniform(position, seed):
    """The variate of the score "random": from a counter that no column pair uses."""
    zero = position * 0
    word, _, _, _ = tl.philox(seed, zero + 0xFFFFFFFF, position, zero, zero)
    return (word >> 8).to(tl.float32) * 2.0**-24


@triton.jit
def _barred(mask_id, vocab_start):
    """The mask's column; NOTHING where this part of the vocabulary has none."""
    return tl.where(mask_id >= vocab_start, mask_id - vocab_start, NOTHING)


@triton.jit
def _lowest_at(z, peak, start, barred, TILE: tl.constexpr, GROUP: tl.constexpr):
    """The lowest column but `barred` whose entry equals peak, or NOTHING. A bit mask for each GROUP
    of neighbours, which one thread holds, costs a fraction of the registers that a column number
    for each entry would.
    """
    hit = tl.reshape(z, [TILE // GROUP, GROUP]) == peak
    # Added up as fp32, which is exact: from integers the compiler builds an array of bits in local
    # memory.
    weight = (1 << tl.arange(0, GROUP)).to(tl.float32)[None, :]
    bits = tl.sum(tl.where(hit, weight, 0.0), 1).to(tl.int32)
    first = start + GROUP * tl.arange(0, TILE // GROUP)
    # Elsewhere the mask's distance is past the group, or wraps around: then a bit is cleared that
    # no group has.
    bits &= ~(1 << tl.minimum((barred - first).to(tl.uint32), 31).to(tl.int32))
    # The number of the lowest bit is the exponent of that bit as fp32.
    lowest = ((bits & -bits).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    return tl.min(tl.where(bits != 0, first + lowest, NOTHING))


@triton.jit
def _add_tile(z, largest, maximum, total, weighted, ENTROPY: tl.constexpr):
    """The running maximum and sums, with a tile of logits added."""
    bound = tl.maximum(maximum, largest)
    shift = tl.where(bound == -INFINITY, 0.0, bound)
    away = z - shift
    power = tl.exp2(away * LOG2E)
    rescale = tl.exp2((maximum - shift) * LOG2E)
    if ENTROPY:
        moved = tl.where(maximum == -INFINITY, 0.0, maximum - shift)
        weighted = (weighted + moved * total) * rescale + tl.sum(
            power * tl.where(power > 0, away, 0.0)
        )
    return bound, total * rescale + tl.sum(power), weighted


@triton.jit
def _best_of_tile(z, largest, start, barred, TILE: tl.constexpr, GROUP: tl.constexpr):
    """(logit, column) of the best of a tile that may be proposed."""
    peak = largest
    at = _lowest_at(z, peak, start, barred, TILE, GROUP)
    if at == NOTHING:  # only the mask is that large
        peak = tl.max(tl.where(z < largest, z, -INFINITY))
        at = _lowest_at(z, peak, start, barred, TILE, GROUP)
    return peak, at


@triton.jit
def _top_two(z, ids, start, barred, top, second, TILE: tl.constexpr, GROUP: tl.constexpr):
    """The running two largest logits that may be proposed, with a tile's."""
    offered = tl.where(ids == barred, -INFINITY, z)
    peak = tl.max(offered)
    at = _lowest_at(offered, peak, start, barred, TILE, GROUP)
    next_peak = tl.max(tl.where(ids == at, -INFINITY, offered))
    return tl.maximum(top, peak), tl.maximum(tl.maximum(second, next_peak), tl.minimum(top, peak))


@triton.jit
def _as_integers(records):
    """The records' workspace as int32, for the fields that are."""
    return records.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def _store_fields(records, size, at, mask, fields, TWO: tl.constexpr, ENTROPY: tl.constexpr):
    """The fp32 fields of records (a tuple in their order), at `at` of [FIELDS, size]."""
    maximum, total, weighted, best, logit, top, second = fields
    tl.store(records + MAXIMUM * size + at, maximum, mask=mask)
    tl.store(records + TOTAL * size + at, total, mask=mask)
    tl.store(records + BEST * size + at, best, mask=mask)
    tl.store(records + LOGIT * size + at, logit, mask=mask)
    if ENTROPY:
        tl.store(records + WEIGHTED * size + at, weighted, mask=mask)
    if TWO:
        tl.store(records + TOP * size + at, top, mask=mask)
        tl.store(records + SECOND * size + at, second, mask=mask)


@triton.jit
def _draw_key(seeds, seed_value, positions, row, b, place):
    """A row's seed, and the position its draws are counted by: `place` where none is given."""
    seed = tl.cast(seed_value, tl.int64) if seeds is None else tl.load(seeds + b)
    position = place if positions is None else tl.load(positions + row)
    return seed, position.to(tl.uint32)


@triton.jit
def _drawn(
    z,
    largest,
    start,
    vocab_start,
    barred,
    position,
    seed,
    inverse,
    found,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """found, the running best draw (best, logit, token), with a tile's: its noise is drawn only
    where the largest logit could win.
    """
    best, logit, token = found
    if largest * inverse + NOISE_BOUND > best:
        ids = start + tl.arange(0, TILE)
        noise = _gumbel(vocab_start + start, position, seed, TILE)
        compared = z * inverse + noise
        compared = tl.where((ids == barred) | (z == -INFINITY), -INFINITY, compared)
        peak = tl.max(compared)
        if peak > best:
            best, token = peak, _lowest_at(compared, peak, start, barred, TILE, GROUP)
            logit = tl.max(tl.where(ids == token, z, -INFINITY))
    return best, logit, token


@triton.jit
def _largest(z, largest, start, barred, found, TILE: tl.constexpr, GROUP: tl.constexpr):
    """found, the running best logit (best, logit, token), with a tile's."""
    best, logit, token = found
    if largest > best:
        peak, at = _best_of_tile(z, largest, start, barred, TILE, GROUP)
        if peak > best:
            best, logit, token = peak, peak, at
    return best, logit, token


@triton.jit
def _any_nan(source, first, end, TILE: tl.constexpr):
    """1 where one of the logits first .. end - 1 is NaN, else 0."""
    nan = tl.full([], 0, tl.int32)
    lane = tl.arange(0, TILE)
    for start in range(first, end, TILE):
        z = tl.load(source + start + lane, mask=lane < end - start, other=0.0)
        nan = tl.maximum(nan, tl.max((z != z).to(tl.int32)))
    return nan


@triton.jit
def _scored_and_offered(
    z,
    ids,
    barred,
    scale,
    cut,
    last,
    FILTER: tl.constexpr,
    FILTERED_SCORE: tl.constexpr,
):
    """(logits whose softmax scores, logits that proposals are taken from) of a tile.

    The filters keep what is above the cut, and of what equals it the ids up to last. A NaN is kept.
    """
    offered = z
    if FILTER:
        dropped = (z < cut) | ((z == cut) & (ids > last))
        offered = tl.where(dropped, -INFINITY, z)
    if FILTERED_SCORE:
        # The mask's logit stays in the sum.
        z = tl.where(ids == barred, z, offered) * scale
        offered = z
    return z, offered


@triton.jit
def _read_part(
    source,
    first,
    end,
    vocab,
    vocab_start,
    barred,
    position,
    seed,
    inverse,
    scale,
    cut,
    last,
    DRAW: tl.constexpr,
    MIXED: tl.constexpr,
    FILTER: tl.constexpr,
    FILTERED_SCORE: tl.constexpr,
    TWO: tl.constexpr,
    ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
):
    """(fields, token) of the record of the logits first .. end - 1 of the row at source."""
    GROUP: tl.constexpr = 128 // source.dtype.element_ty.primitive_bitwidth
    maximum = tl.full([], -INFINITY, tl.float32)
    best, logit, top, second = maximum, maximum, maximum, maximum
    total = tl.full([], 0.0, tl.float32)
    weighted = total
    token = tl.full([], NOTHING, tl.int32)
    lane = tl.arange(0, TILE)
    for start in range(first, end, TILE):
        # One moving address and fixed offsets: no 64-bit arithmetic for each load.
        z = tl.load(source + start + lane, mask=lane < vocab - start, other=-INFINITY)
        z, offered = _scored_and_offered(
            z.to(tl.float32), start + lane, barred, scale, cut, last, FILTER, FILTERED_SCORE
        )
        largest = tl.max(z)
        maximum, total, weighted = _add_tile(z, largest, maximum, total, weighted, ENTROPY)
        # From here on, what few tiles reach: those with a logit that can win.
        if TWO:
            if largest > second:
                ids = start + lane
                top, second = _top_two(z, ids, start, barred, top, second, TILE, GROUP)
        if FILTER and not FILTERED_SCORE:
            largest = tl.max(offered)
        found = best, logit, token
        if not DRAW:
            found = _largest(offered, largest, start, barred, found, TILE, GROUP)
        elif MIXED:
            if inverse > 0:
                found = _drawn(
                    offered,
                    largest,
                    start,
                    vocab_start,
                    barred,
                    position,
                    seed,
                    inverse,
                    found,
                    TILE,
                    GROUP,
                )
            else:
                found = _largest(offered, largest, start, barred, found, TILE, GROUP)
        else:
            found = _drawn(
                offered,
                largest,
                start,
                vocab_start,
                barred,
                position,
                seed,
                inverse,
                found,
                TILE,
                GROUP,
            )
        best, logit, token = found
    return (maximum, total, weighted, best, logit, top, second), token


@triton.jit(
    do_not_specialize=["vocab_start", "mask_id", "seed_value", "width", "token_b", "token_t"]
)
def scan_kernel(
    logits,
    tokens,
    candidates,
    seeds,
    positions,
    temperatures,
    cuts,
    lasts,
    records,
    stride_b,
    stride_t,
    vocab,
    vocab_start,
    mask_id,
    seed_value,
    inverse_temperature,
    width,
    token_b,
    token_t,
    DRAW: tl.constexpr,
    FILTERED_SCORE: tl.constexpr,
    TWO: tl.constexpr,
    ENTROPY: tl.constexpr,
    TILE_VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The record of one row's logits in one part of the vocabulary. Grid (rows, parts).

    DRAW: some temperature is above 0. cuts, lasts [rows]: filter_triton's, where a filter is on.
    FILTERED_SCORE: the score is that of the filtered logits / temperature. TWO: the two largest
    logits are wanted. ENTROPY: so is the sum that it takes.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, part = tl.program_id(0), tl.program_id(1)
    b, t = (row // width).to(tl.int64), (row % width).to(tl.int64)
    if tokens is not None:
        if not is_candidate(tokens, candidates, row, b, t, mask_id, token_b, token_t):
            return
    seed, position, cut, last = None, None, None, None
    if DRAW:
        # What a row's draws are counted by: its place in the block, or else its number.
        place = row.to(tl.int64) if tokens is None else t
        seed, position = _draw_key(seeds, seed_value, positions, row, b, place)
    if cuts is not None:
        cut, last = tl.load(cuts + row), tl.load(lasts + row)
    inverse = inverse_of_row(temperatures, inverse_temperature, b)
    scale = tl.where(inverse > 0, inverse, 1.0)
    if FILTERED_SCORE:  # the logits are divided before all else
        inverse = tl.where(inverse > 0, 1.0, 0.0)
    source = logits + b * stride_b + t * stride_t
    first = part * (TILES * TILE_VOCAB)
    end = tl.minimum(first + TILES * TILE_VOCAB, vocab)
    fields, token = _read_part(
        source,
        first,
        end,
        vocab,
        vocab_start,
        _barred(mask_id, vocab_start),
        position,
        seed,
        inverse,
        scale,
        cut,
        last,
        DRAW,
        temperatures is not None,
        cuts is not None,
        FILTERED_SCORE,
        TWO,
        ENTROPY,
        TILE_VOCAB,
    )
    total = fields[1]
    nan = tl.full([], 0, tl.int32)
    if total != total:  # a NaN, or an infinity
        nan = _any_nan(source, first, end, TILE_VOCAB)
    size = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    at = row.to(tl.int64) * tl.num_programs(1) + part
    _store_fields(records, size, at, None, fields, TWO, ENTROPY)
    tl.store(_as_integers(records) + TOKEN * size + at, token)
    tl.store(_as_integers(records) + NAN * size + at, nan)


@triton.jit
def _merge(records, at, mask, size, barred, vocab, TWO: tl.constexpr, ENTROPY: tl.constexpr):
    """A record's fields, token and nan for rows, from their records at [rows, parts]; equal bests:
    the lowest id.
    """
    integers = _as_integers(records)
    maxima = tl.load(records + MAXIMUM * size + at, mask=mask, other=-INFINITY)
    totals = tl.load(records + TOTAL * size + at, mask=mask, other=0.0)
    bests = tl.load(records + BEST * size + at, mask=mask, other=-INFINITY)
    logits = tl.load(records + LOGIT * size + at, mask=mask, other=-INFINITY)
    tokens = tl.load(integers + TOKEN * size + at, mask=mask, other=NOTHING)
    nan = tl.max(tl.load(integers + NAN * size + at, mask=mask, other=0), 1) > 0
    maximum, best = tl.max(maxima, 1), tl.max(bests, 1)
    shift = tl.where(maximum == -INFINITY, 0.0, maximum)
    scale = tl.exp2((maxima - shift[:, None]) * LOG2E)
    total = tl.sum(totals * scale, 1)
    weighted, top, second = tl.zeros_like(total), best, best
    if ENTROPY:
        sums = tl.load(records + WEIGHTED * size + at, mask=mask, other=0.0)
        moved = tl.where(maxima == -INFINITY, 0.0, maxima - shift[:, None])
        weighted = tl.sum((sums + moved * totals) * scale, 1)
    token = tl.min(tl.where(bests == best[:, None], tokens, NOTHING), 1)
    logit = tl.max(tl.where(tokens == token[:, None], logits, -INFINITY), 1)
    # Nothing above -inf: the lowest id that is not the mask.
    token = tl.where(token == NOTHING, tl.where((barred == 0) & (vocab > 1), 1, 0), token)
    if TWO:
        tops = tl.load(records + TOP * size + at, mask=mask, other=-INFINITY)
        seconds = tl.load(records + SECOND * size + at, mask=mask, other=-INFINITY)
        top = tl.max(tops, 1)
        largest_record = tl.min(tl.where(tops == top[:, None], at, 2**62), 1)
        others = tl.where(at == largest_record[:, None], -INFINITY, tops)
        second = tl.max(tl.maximum(others, seconds), 1)
    return maximum, total, weighted, best, logit, top, second, token, nan


@triton.jit
def _probability(logit, maximum, total):
    """exp(logit) over the row's sum; exactly 1 where it is all of the sum, however a division
    rounds.
    """
    shift = tl.where(maximum == -INFINITY, 0.0, maximum)
    power = tl.exp2((logit - shift) * LOG2E)
    return tl.where(power == total, 1.0, power / total)


@triton.jit
def _scores(maximum, total, weighted, logit, top, second, SCORE: tl.constexpr):
    """(score, log-sum-exp, entropy, margin) of rows; what is not used of them is not computed."""
    # Divided by 1 where the sum is 0 (nothing above -inf) or a +inf takes all of it.
    total = tl.where((maximum == INFINITY) | (maximum == -INFINITY), 1.0, total)
    score = _probability(logit, maximum, total)
    margin = _probability(top, maximum, total) - _probability(second, maximum, total)
    entropy = tl.where(maximum == INFINITY, float("nan"), weighted / total - tl.log(total))
    if SCORE == "margin":
        score = margin
    elif SCORE == "entropy":
        score = entropy
    return score, maximum + tl.log(total), entropy, margin


@triton.jit
def _sums_ahead(amounts, order, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """For each place the sum of the amounts >= 0 of those ahead of it in descending order, equals
    to the lower position; None counts them. CHUNK others are compared at a time.
    """
    mine = tl.arange(0, WIDTH)
    grid = tl.reshape(order, [WIDTH // CHUNK, CHUNK])
    line = tl.arange(0, WIDTH // CHUNK)
    sums = tl.zeros([WIDTH], tl.int32 if amounts is None else tl.float32)
    for i in range(WIDTH // CHUNK):
        others = tl.max(tl.where(line[:, None] == i, grid, -INFINITY), 0)[:, None]
        position = i * CHUNK + tl.arange(0, CHUNK)[:, None]
        ahead = (others > order[None, :]) | (
            (others == order[None, :]) & (position < mine[None, :])
        )
        if amounts is None:
            sums += tl.sum(ahead.to(tl.int32), 0)
        else:
            held = tl.reshape(amounts, [WIDTH // CHUNK, CHUNK])
            held = tl.max(tl.where(line[:, None] == i, held, 0.0), 0)[:, None]
            sums += tl.sum(tl.where(ahead, held, 0.0), 0)
    return sums


@triton.jit
def _ranks(order, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Places in descending order [WIDTH], equals to the lower position."""
    return _sums_ahead(None, order, WIDTH, CHUNK)


@triton.jit
def _best(order, able, WIDTH: tl.constexpr):
    """Whether a place is the first in descending order: `_ranks(..) == 0` of what is able."""
    position = tl.arange(0, WIDTH)
    return position == tl.min(tl.where(able & (order == tl.max(order)), position, WIDTH))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _distances(marked, WIDTH: tl.constexpr):
    """How far each place [WIDTH] is from the nearest that is marked; FAR and more without one."""
    position = tl.arange(0, WIDTH)
    before = tl.associative_scan(tl.where(marked, position, -FAR), 0, _larger)
    after = tl.associative_scan(tl.where(marked, -position, -FAR), 0, _larger, reverse=True)
    return tl.minimum(position - before, -after - position)


@triton.jit
def _dream_time(i, steps):
    """`rules._dream_time`: the same fp32 operations (no fused multiply-add), so that the truncation
    falls alike.
    """
    stride = tl.div_rn(tl.full([], 0.001 - 1, tl.float32), steps.to(tl.float32))
    from_start = 1.0 + stride * i.to(tl.float32)
    from_end = 0.001 - stride * (steps - i).to(tl.float32)
    return tl.where(2 * i < steps + 1, from_start, from_end)


@triton.jit
def _quota(masks, steps, step, DREAM: tl.constexpr):
    """`rules.quota_count` of one row."""
    left = tl.minimum(tl.maximum(steps - step, 1), 2**30).to(tl.int32)
    if DREAM:
        kept = tl.div_rn(_dream_time(step + 1, steps), _dream_time(step, steps))
        count = (masks.to(tl.float32) * (1.0 - kept)).to(tl.int32)
        may_be_empty = (masks == 0) | (steps <= masks + step)
        count = tl.where(may_be_empty, count, tl.maximum(count, 1))
        count = tl.where(left == 1, masks, count)
    else:
        count = (masks + left - 1) // left
    return count


@triton.jit
def _of_row(parameters, b):
    """A rule's parameters for row b: a tensor's entry, or the number that serves all rows."""
    values = ()
    for i in tl.static_range(len(parameters)):
        value = parameters[i]
        if value.dtype.is_ptr():
            value = tl.load(value + b)
        values = values + (value,)
    return values


@triton.jit
def _chosen(
    scores,
    able,
    parameters,
    step,
    width,
    RULE: tl.constexpr,
    FIXED: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The commit mask [WIDTH] of one row: the rule's meaning in rules.py.

    scores [WIDTH] fp32; able [WIDTH]: the candidates; step: int64; width: the block's, which WIDTH
    is rounded up from. RULE is the name that the rule's class declares as its `branch`.
    `parameters` holds this row's values of the class's per-row fields in their order, each fp32 or,
    from a tensor, of the field's dtype; FIXED the values of its other fields, constants. A new rule
    adds its branch here, and a line that unpacks its own fields.
    """
    order = tl.where(able, scores, -INFINITY)
    if RULE == "threshold":
        tau = parameters[0]
        chosen = (scores >= tau) | _best(order, able, WIDTH)
    elif RULE == "factor":
        f = parameters[0]
        rank = _ranks(order, WIDTH, CHUNK)
        chosen = ((rank + 2).to(tl.float32) * (1.0 - scores) <= f) | (rank == 0)
    elif RULE == "frechet":
        delta = parameters[0]
        doubt = tl.where(able, tl.maximum(1.0 - scores, 0.0), 0.0)
        passes = 1.0 - (_sums_ahead(doubt, order, WIDTH, CHUNK) + 2.0 * doubt) > delta
        chosen = passes | _best(order, able, WIDTH)
    elif RULE == "entropy_bound":
        gamma = parameters[0]
        entropy = tl.where(able, tl.maximum(-scores, 0.0), 0.0)
        entropy = (entropy + gamma) - gamma  # so that the sums do not round: see rules.py
        chosen = _sums_ahead(entropy, order, WIDTH, CHUNK) <= gamma
    elif RULE == "progress":
        tau, alpha = parameters[0], parameters[1]
        masks = tl.sum(able.to(tl.int32))
        share = tl.div_rn(masks.to(tl.float32), tl.cast(width, tl.float32))
        share = tl.where(step == 0, 1.0, share)
        bound = tau * (1.0 - alpha * (1.0 - share))
        chosen = (scores >= bound) | _best(order, able, WIDTH)
    elif RULE == "neighbours":
        anchor, near = parameters[0], parameters[1]
        distance = tl.cast(parameters[2], tl.int64)
        anchors = able & (scores >= anchor)
        helped = (_distances(anchors, WIDTH) <= distance) & (scores >= near)
        chosen = anchors | helped | _best(order, able, WIDTH)
    else:
        tl.static_assert(RULE == "quota", "no branch of this name")
        steps = tl.cast(parameters[0], tl.int64)
        SCHEDULE: tl.constexpr = FIXED[0]
        rank = _ranks(order, WIDTH, CHUNK)
        masks = tl.sum(able.to(tl.int32))
        chosen = rank < _quota(masks, steps, step, SCHEDULE == "dream")
    return able & chosen


@triton.jit(
    do_not_specialize=[
        "vocab",
        "mask_id",
        "seed_value",
        "width",
        "parts",
        "token_b",
        "token_t",
    ]
)
def commit_kernel(
    tokens,
    candidates,
    seeds,
    steps,
    parameters,
    records,
    token_ids,
    values,
    committed,
    remaining,
    vocab,
    mask_id,
    seed_value,
    width,
    parts,
    token_b,
    token_t,
    RULE: tl.constexpr,
    FIXED: tl.constexpr,
    SCORE: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Score, choose and commit the positions of one batch row. Grid (B,).

    parameters: a tuple, for each per-row field of the rule a tensor [B] or a number. WIDTH and
    PARTS are width and parts rounded up to powers of two.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    t, part = tl.arange(0, WIDTH), tl.arange(0, PARTS)
    inside, row = t < width, b * width + t
    token_at = tokens + b * token_b + t.to(tl.int64) * token_t
    held = tl.load(token_at, mask=inside, other=0)
    candidate = inside & (held == mask_id)
    if candidates is not None:
        candidate = tl.load(candidates + row, mask=inside, other=0) != 0
    at = row[:, None] * parts + part[None, :]
    mask = part[None, :] < tl.where(candidate, parts, 0)[:, None]
    size = tl.num_programs(0).to(tl.int64) * width * parts
    maximum, total, weighted, _, logit, top, second, token, nan = _merge(
        records, at, mask, size, mask_id, vocab, SCORE == "margin", SCORE == "entropy"
    )
    score, _, _, _ = _scores(maximum, total, weighted, logit, top, second, SCORE)
    if SCORE == "random":
        score = _uniform(t.to(tl.uint32), seed_value if seeds is None else tl.load(seeds + b))
    score = tl.where(candidate, tl.where(nan, float("nan"), score), -INFINITY)

    broken = candidate & (score != score)
    step = tl.full([], 0, tl.int64) if steps is None else tl.load(steps + b).to(tl.int64)
    able = candidate & (score == score)
    values_of_row = _of_row(parameters, b)
    commits = _chosen(score, able, values_of_row, step, width, RULE, FIXED, WIDTH, CHUNK)
    proposal = tl.where(candidate, token.to(tl.int64), held)
    tl.store(token_ids + row, proposal, mask=inside)
    tl.store(values + row, score, mask=inside)
    tl.store(committed + row, commits, mask=inside)
    tl.store(token_at, proposal, mask=commits)
    first_broken = tl.min(tl.where(broken, t, WIDTH))
    left = tl.sum((candidate & ~commits).to(tl.int32))
    tl.store(remaining + b, tl.where(first_broken < WIDTH, -1 - first_broken, left))


@triton.jit(do_not_specialize=["rows", "parts", "vocab", "vocab_start", "mask_id", "seed_value"])
def merge_kernel(
    records,
    seeds,
    positions,
    token_ids,
    has_nan,
    values,
    rows,
    parts,
    vocab,
    vocab_start,
    mask_id,
    seed_value,
    SCORE: tl.constexpr,
    TWO: tl.constexpr,
    ENTROPY: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """What a row's records say together. Grid (rows / TILE_ROWS,).

    values [.., rows]: score, log-sum-exp, entropy and margin; where SCORE is None a merged record.
    PARTS is parts rounded up to a power of two.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    part = tl.arange(0, PARTS)
    inside = row < rows
    at = row[:, None] * parts + part[None, :]
    mask = part[None, :] < tl.where(inside, parts, 0)[:, None]
    size = parts * tl.cast(rows, tl.int64)
    barred = _barred(mask_id, vocab_start)
    maximum, total, weighted, best, logit, top, second, token, nan = _merge(
        records, at, mask, size, barred, vocab, TWO, ENTROPY
    )
    tl.store(token_ids + row, token.to(tl.int64) + vocab_start, mask=inside)
    tl.store(has_nan + row, nan, mask=inside)
    if SCORE is None:
        fields = (maximum, total, weighted, best, logit, top, second)
        _store_fields(values, rows, row, inside, fields, TWO, ENTROPY)
    else:
        score, lse, entropy, margin = _scores(maximum, total, weighted, logit, top, second, SCORE)
        if SCORE == "random":
            seed = seed_value if seeds is None else tl.load(seeds + row, mask=inside, other=0)
            position = row if positions is None else tl.load(positions + row, mask=inside, other=0)
            score = _uniform(position.to(tl.uint32), seed)
        lost = float("nan")
        tl.store(values + row, tl.where(nan, lost, score), mask=inside)
        tl.store(values + rows + row, tl.where(nan, lost, lse), mask=inside)
        tl.store(values + 2 * rows + row, tl.where(nan, lost, entropy), mask=inside)
        tl.store(values + 3 * rows + row, tl.where(nan, lost, margin), mask=inside)


def launch_select(scoring, commit, chosen=None, chosen_filter=None):
    """Run confidence_select: `select.Scoring` and `select.Commit`, whose results it fills.

    chosen, chosen_filter: a Config and a filter_triton.Config to run in place of those that their
    `config` picks.
    """
    logits, tokens = scoring.logits, commit.tokens
    rows, width = tokens.shape
    chosen = chosen or _config_for(scoring, rows * width)
    candidates, seed, step = dense(commit.candidates), dense(scoring.seed), dense(commit.step)
    parameters = tuple(
        number if tensor is None else dense(tensor)
        for tensor, number in zip(commit.tensors, commit.numbers, strict=True)
    )
    tile_width = power_of_2(width)
    with on_device(logits):
        records = _launch_scan(
            scoring,
            chosen,
            chosen_filter,
            seed,
            two=scoring.score == "margin",
            entropy=scoring.score == "entropy",
            tokens=tokens,
            candidates=candidates,
        )
        # Fused multiply-adds would round the rules' arithmetic unlike the reference.
        compiling.launch(
            commit_kernel,
            (rows,),
            tokens,
            candidates,
            seed,
            step,
            parameters,
            records,
            commit.token_ids,
            commit.value,
            commit.committed,
            commit.remaining,
            scoring.vocab_size,
            scoring.mask_id,
            scoring.seed_number,
            width,
            chosen.parts,
            *tokens.stride(),
            RULE=commit.rule,
            FIXED=constants(commit.fixed),
            SCORE=scoring.score,
            WIDTH=tile_width,
            PARTS=power_of_2(chosen.parts),
            CHUNK=min(tile_width, max(1, 8192 // tile_width)),
            OVERLAP=chosen.overlap,
            num_warps=4 if tile_width <= 32 else 8 if tile_width <= 256 else 16,
            enable_fp_fusion=False,
            **pdl(chosen.overlap),
        )


def launch_confidence(scoring, rows, chosen=None, chosen_filter=None):
    """Run token_confidence on `select.Scoring` and `select.Rows`.

    Returns (token_ids [N], has_nan [N], values [4, N]), the values score, log-sum-exp, entropy and
    margin; where the score is None, values [FIELDS, N] of merged records. chosen, chosen_filter: as
    in launch_select.
    """
    logits, score = scoring.logits, scoring.score
    count = len(logits)
    entropy = rows.entropy or score in (None, "entropy")
    two = rows.margin or score in (None, "margin")
    chosen = chosen or _config_for(scoring, count)
    token_ids = torch.empty(count, dtype=torch.int64, device=logits.device)
    has_nan = torch.empty(count, dtype=torch.bool, device=logits.device)
    numbers = FIELDS if score is None else 4
    values = torch.empty(numbers, count, dtype=torch.float32, device=logits.device)
    seed, position = dense(scoring.seed), dense(rows.position)
    tile_parts = power_of_2(chosen.parts)
    tile_rows = max(1, min(power_of_2(count), 512 // tile_parts))
    with on_device(logits):
        records = _launch_scan(
            scoring,
            chosen,
            chosen_filter,
            seed,
            two=two,
            entropy=entropy,
            position=position,
            vocab_start=rows.vocab_start,
        )
        compiling.launch(
            merge_kernel,
            (ceil_div(count, tile_rows),),
            records,
            seed,
            position,
            token_ids,
            has_nan,
            values,
            count,
            chosen.parts,
            scoring.vocab_size,
            rows.vocab_start,
            _mask_number(scoring),
            scoring.seed_number,
            SCORE=score,
            TWO=two,
            ENTROPY=entropy,
            TILE_ROWS=tile_rows,
            PARTS=tile_parts,
            OVERLAP=chosen.overlap,
            num_warps=4,
            enable_fp_fusion=False,
            **pdl(chosen.overlap),
        )
    return token_ids, has_nan, values


def _config_for(scoring, rows):
    chip = chip_of(scoring.logits.device)
    return config(rows, scoring.vocab_size, chip, scoring.draws)


def _mask_number(scoring):
    """The mask id, or a number that is no id."""
    return -1 if scoring.mask_id is None else scoring.mask_id


def _launch_scan(
    scoring,
    chosen,
    chosen_filter,
    seed,
    *,
    two,
    entropy,
    tokens=None,
    candidates=None,
    position=None,
    vocab_start=0,
):
    """Launch the search for the filters' cuts, where one is on, and the scan.

    With tokens [B, T] the rows are those of logits [B, T, V], and only candidates are scanned.
    Returns the records [FIELDS + INTEGERS, rows, parts].
    """
    logits = scoring.logits
    if tokens is None:
        rows, width = len(logits), 1
        strides, token_strides = (logits.stride(0), 0), (0, 0)
    else:
        rows, width = tokens.numel(), tokens.shape[1]
        strides, token_strides = logits.stride()[:2], tokens.stride()
    cuts, lasts = None, None
    if scoring.filters:
        cuts, lasts = filter_triton.launch(scoring, strides, tokens, candidates, chosen_filter)
    # From PyTorch's allocator, which keeps apart what streams and captured graphs still use.
    shape = (FIELDS + INTEGERS, rows, chosen.parts)
    records = torch.empty(shape, dtype=torch.float32, device=logits.device)
    filtered_score = scoring.filtered_score and (scoring.draws or scoring.filters)
    many = scoring.filters or filtered_score or scoring.temperatures is not None
    compiling.launch(
        scan_kernel,
        (rows, chosen.parts),
        logits,
        tokens,
        candidates,
        seed,
        position,
        dense(scoring.temperatures),
        cuts,
        lasts,
        records,
        *strides,
        scoring.vocab_size,
        vocab_start,
        _mask_number(scoring),
        scoring.seed_number,
        inverse(scoring.temperature),
        width,
        *token_strides,
        DRAW=scoring.draws,
        FILTERED_SCORE=filtered_score,
        TWO=two,
        ENTROPY=entropy,
        TILE_VOCAB=chosen.tile_vocab,
        TILES=chosen.tiles,
        OVERLAP=chosen.overlap,
        num_warps=chosen.num_warps,
        enable_fp_fusion=True,
        **pdl(chosen.overlap),
        **(REGISTERS if many else {}),
    )
    return records
