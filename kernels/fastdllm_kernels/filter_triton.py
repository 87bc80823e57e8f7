"""Top-p and top-k in Triton, without a sort: for each row the last token that they keep.

Let z be a row's logits without the mask's, T its temperature (1 where that is 0) and

    above(u) = sum exp((z_i - max z) / T) over z_i > u        higher(u) = how many z_i > u

The filters keep the z_i > cut, and of those equal to it the lowest ids up to `last`, where cut is
the smallest u with above(u) <= top_p * above(-inf) and higher(u) < top_k. Both sides only grow as u
falls. So the cut is searched for: one pass over the logits adds up both sides at 7 thresholds and
leaves one of 8 bins; the next copies the logits of that bin, a few percent of all, and bisection of
the copy does the rest. It halves the bit patterns of the logits' dtype, ordered as the numbers are
(keys), so that 16 steps tell all numbers of 16 bits apart, 32 those of 32.

A token of less than (1 - top_p) / V of the largest probability is never kept: at a low temperature
the bins start close to the maximum. Elsewhere they start at the least of many small groups' largest
logits, below which only a cut in the bulk of the vocabulary lies. They are of equal width as
numbers, as of equal width in keys one would hold half of all logits: those between 0 and 1.

peak_kernel     one program for each (row, part of the vocabulary): the part's largest logit, and
                the least of its groups' largest
narrow_kernel   the same programs: the bins, and the part's sums at the thresholds between them
gather_kernel   the same programs: from the sums of all parts the bin that holds the cut, and a list
                of the part's logits inside
cut_kernel      one program for each row: bisects the lists, then finds in the one part where it
                lies the last id kept of those equal to the cut

A list holds a quarter of its part. Where one does not suffice (a cut in the bulk of a flat row, or
most logits equal), the same bisection reads the row itself: right as well, some 10 us a step.

Each program adds up in a fixed order, so equal inputs give equal bits. Programs whose row is no
candidate, or is not filtered, return at once.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import compiling
from .backend import Chip, ceil_div, chip_of, dense, pdl, power_of_2
from .noise import inverse

NOTHING, INFINITY, LOG2E = map(tl.constexpr, (2**31 - 1, float("inf"), 1.4426950408889634))
# The first pass costs three instructions for each logit and threshold; with 16 bins instead of 8 it
# takes twice as long, and halves lists that are short anyway.
BINS = 8
STEPS: tl.constexpr = tl.constexpr(BINS)
# The logits of a group whose largest says where the bulk begins: the least of 30,000 groups of four
# normal logits lies 1.4 deviations below their mean; of groups of 32 it would lie above it.
GROUPED: tl.constexpr = tl.constexpr(4)
# How far below the maximum the bins start at most: further down lie only logits that were put there
# to be dropped.
DEPTH: tl.constexpr = tl.constexpr(60.0)


@dataclass(frozen=True)
class Config:
    """How a pass is cut: `parts` programs to a row, each `tiles` tiles of tile_vocab logits.

    capacity: the logits that a part's list holds. resident: the programs that an SM is to hold at
    once. overlap: a launch may begin while the one before it drains, and waits on the device.
    """

    tile_vocab: int
    tiles: int
    parts: int
    capacity: int
    resident: int = 8
    num_warps: int = 4
    overlap: bool = False


@lru_cache(maxsize=4096)
def config(rows: int, vocab: int, itemsize: int, chip: Chip, both: bool = False) -> Config:
    """The cut for `rows` rows of `vocab` logits of `itemsize` bytes; both: by top_p and by top_k.
    Pure.
    """
    # One load of 16 bytes for each thread of four warps, so that it holds one sum a threshold.
    tile = min(2048 // itemsize, max(64, power_of_2(vocab)))
    count = ceil_div(vocab, tile)
    # Bound by arithmetic: as many programs of four warps as all SMs hold at once, which is eight
    # where a thread takes 64 registers. Masses and counts together spill then. No more than 32
    # parts: every program that gathers merges them.
    resident = 5 if both else 8
    parts = min(count, 32, max(1, resident * chip.multiprocessors // rows))
    tiles = ceil_div(count, parts)
    capacity = 16 * ceil_div(tile * tiles, 64)
    return Config(tile, tiles, ceil_div(count, tiles), capacity, resident, overlap=chip.overlap)


def _registers(num_warps: int, resident: int = 1) -> dict:
    """The launch option that bounds a thread's registers, so that `resident` programs fit on an SM.
    Left alone, the assembler may spill a few bytes so that more do.
    """
    most = min(255, 65536 // (32 * num_warps * resident) // 8 * 8)
    return {"maxnreg": most} if torch.version.hip is None else {}


@triton.jit
def is_candidate(tokens, candidates, row, b, t, mask_id, token_b, token_t):
    """Whether position t of row b is to be decided."""
    if candidates is None:
        return tl.load(tokens + b * token_b + t * token_t) == mask_id
    else:
        return tl.load(candidates + row) != 0


@triton.jit
def inverse_of_row(temperatures, inverse_temperature, b):
    """1 / temperature of row b, 0 where it takes the argmax: `noise.inverse_of_rows`."""
    inverse = inverse_temperature
    if temperatures is not None:
        temperature = tl.load(temperatures + b)
        hot = temperature > 0
        inverse = tl.div_rn(tl.full([], 1.0, tl.float32), tl.where(hot, temperature, 1.0))
        inverse = tl.where(hot, tl.minimum(inverse, 1e30), 0.0)
    return inverse


@triton.jit
def _key(z):
    """The bits of z as int32 that are ordered as the numbers are."""
    BITS: tl.constexpr = z.dtype.primitive_bitwidth
    LOWEST: tl.constexpr = -(2 ** (BITS - 1))
    if BITS == 16:
        bits = z.to(tl.int16, bitcast=True).to(tl.int32)
    else:
        bits = z.to(tl.int32, bitcast=True)
    bits = tl.where(bits == LOWEST, 0, bits)  # -0 equals 0
    return bits ^ ((bits >> 31) & -(LOWEST + 1))


@triton.jit
def _number(key, DTYPE: tl.constexpr):
    """The number of a key, as fp32."""
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    bits = key ^ ((key >> 31) & (2 ** (BITS - 1) - 1))
    if BITS == 16:
        bits = bits.to(tl.int16)
    return bits.to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _largest_number(key, DTYPE: tl.constexpr):
    """The largest number whose key is `key` or less: that of -1 would be -0, which equals 0."""
    return _number(tl.where(key == -1, -2, key), DTYPE)


@triton.jit
def _limits(top_ps, top_p, top_ks, top_k, b, TOP_P: tl.constexpr, TOP_K: tl.constexpr):
    """(share, most) of row b: its top_p, 1 where that is off, and its top_k, NOTHING where off."""
    share = tl.full([], 1.0, tl.float32)
    most = tl.full([], NOTHING, tl.int32)
    if TOP_P:
        share = tl.cast(top_p, tl.float32) if top_ps is None else tl.load(top_ps + b)
    if TOP_K:
        asked = tl.cast(top_k, tl.int32) if top_ks is None else tl.load(top_ks + b)
        most = tl.where(asked > 0, asked, most)
    return share, most


@triton.jit
def _power(z, maximum, scale):
    """exp((z - maximum) / T): the mass of a logit, 1 for the largest."""
    shift = tl.where(maximum == -INFINITY, 0.0, maximum)
    return tl.exp2((z - shift) * (scale * LOG2E))


@triton.jit
def _offered(source, first, end, barred, TILE: tl.constexpr):
    """The logits first .. first + TILE - 1 as fp32, -inf for the mask's and from `end` on."""
    lane = tl.arange(0, TILE)
    z = tl.load(source + first + lane, mask=lane < end - first, other=-INFINITY)
    return tl.where(first + lane == barred, -INFINITY, z.to(tl.float32))


@triton.jit
def _of_parts(values, row, parts, other, PARTS: tl.constexpr):
    """A row's values [PARTS], of its parts."""
    part = tl.arange(0, PARTS)
    return tl.load(values + row * parts + part, mask=part < parts, other=other)


@triton.jit
def _bins(maximum, least, scale, share, vocab, DTYPE: tl.constexpr):
    """(edges, end): the first keys of the bins, and the first key above them all, as int32.

    least: about where the bulk of the logits begins.
    """
    # All tokens with less than (1 - share) / vocab of the largest one's probability have less than
    # 1 - share together: the cut lies above them. A hundredth more, for rounding.
    far = (tl.log(vocab / tl.maximum(1.0 - share, 1e-9)) * 1.01 + 0.01) / scale
    lowest = tl.where(share < 1, maximum - far, -INFINITY)
    low, high = _key(lowest.to(DTYPE)), _key(maximum.to(DTYPE))
    start = tl.maximum(least, maximum - tl.minimum(far, DEPTH))
    edges = (low,)
    for j in tl.static_range(1, STEPS):
        edge = _key((start + (maximum - start) * (j / STEPS)).to(DTYPE))
        # A number that is none (infinities) may become any edge, as long as they are in order.
        edges = edges + (tl.maximum(tl.minimum(edge, high), low + 1),)
    return edges, high + 1


@triton.jit
def _sums_of_part(
    source,
    first,
    end,
    barred,
    edges,
    maximum,
    scale,
    TOP_P: tl.constexpr,
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
):
    """(masses, counts, total) of the logits first .. end - 1 of the row at source.

    masses, counts: of each bin but the last what lies above it, a lane's sums. total: of all.
    """
    DTYPE: tl.constexpr = source.dtype.element_ty
    GROUP: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    thresholds = ()
    for j in tl.static_range(1, STEPS):
        thresholds = thresholds + (_number(edges[j], DTYPE),)
    nothing = tl.zeros([TILE // GROUP], tl.float32)
    total = nothing
    masses = (nothing,) * (STEPS - 1)
    counts = (nothing.to(tl.int32),) * (STEPS - 1)
    for start in range(first, end, TILE):
        z = tl.reshape(_offered(source, start, end, barred, TILE), [TILE // GROUP, GROUP])
        power = _power(z, maximum, scale)
        if TOP_P:
            total += tl.sum(power, 1)
        if tl.max(z) >= thresholds[0]:  # else the tile adds to no threshold
            more_masses, more_counts = (), ()
            for j in tl.static_range(STEPS - 1):
                over = z >= thresholds[j]
                mass, count = masses[j], counts[j]
                if TOP_P:
                    mass += tl.sum(tl.where(over, power, 0.0), 1)
                if TOP_K:
                    count += tl.sum(over.to(tl.int32), 1)
                more_masses, more_counts = more_masses + (mass,), more_counts + (count,)
            masses, counts = more_masses, more_counts
    return masses, counts, total


@triton.jit
def _holds(mass, count, total, share, most, TOP_P: tl.constexpr, TOP_K: tl.constexpr):
    """Whether the cut may lie at a number or below, given the mass and count of what is above."""
    holds = count == count
    if TOP_P:
        holds = tl.where(share < 1, mass <= share * total, holds)
    if TOP_K:
        holds &= count < most
    return holds


@triton.jit
def _bin_of_cut(
    edges,
    masses,
    counts,
    row,
    parts,
    share,
    most,
    TOP_P: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """(low, high, above, higher, total): the first and the last key of the bin that holds the cut,
    the mass and the number of the logits above the bin, and the whole mass.
    """
    bin, part = tl.arange(0, STEPS), tl.arange(0, PARTS)[:, None]
    slot = (row * parts + part) * STEPS + bin[None, :]
    mass, count = tl.zeros([STEPS], tl.float32), tl.zeros([STEPS], tl.int32)
    if TOP_P:
        mass = tl.sum(tl.load(masses + slot, mask=part < parts, other=0.0), 0)
    if TOP_K:
        count = tl.sum(tl.load(counts + slot, mask=part < parts, other=0), 0)
    total = tl.sum(tl.where(bin == STEPS - 1, mass, 0.0))
    is_last = bin == STEPS - 1
    holds = _holds(mass, count, total, share, most, TOP_P, TOP_K) | is_last
    chosen = STEPS - tl.sum(holds.to(tl.int32))
    is_chosen = (bin == chosen) & (chosen < STEPS - 1)
    above = tl.sum(tl.where(is_chosen, mass, 0.0))
    higher = tl.sum(tl.where(is_chosen, count, 0))
    at = edges + row * (STEPS + 1)
    last = tl.load(at + STEPS) - 1
    low = tl.minimum(tl.load(at + chosen), last)
    high = tl.maximum(tl.load(at + chosen + 1) - 1, low)
    return low, tl.minimum(high, last), above, higher, total


@triton.jit
def _largest_of_lanes(largest, source, first, end, barred, TILE: tl.constexpr):
    """largest [TILE] with the logits first .. end - 1, those TILE apart in one lane."""
    for start in range(first, end, TILE):
        largest = tl.maximum(largest, _offered(source, start, end, barred, TILE))
    return largest


@triton.jit(do_not_specialize=["mask_id", "width", "token_b", "token_t"])
def peak_kernel(
    logits,
    tokens,
    candidates,
    maxima,
    leasts,
    stride_b,
    stride_t,
    vocab,
    mask_id,
    width,
    token_b,
    token_t,
    TILE_VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The largest logit of one part of one row, the mask's aside, and the least of the largest of
    its lanes in the first tiles; +inf where none is above -inf. Grid (rows, parts).
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, part = tl.program_id(0), tl.program_id(1)
    b, t = (row // width).to(tl.int64), (row % width).to(tl.int64)
    if tokens is not None:
        if not is_candidate(tokens, candidates, row, b, t, mask_id, token_b, token_t):
            return
    source = logits + b * stride_b + t * stride_t
    first = part * (TILES * TILE_VOCAB)
    end = tl.minimum(first + TILES * TILE_VOCAB, vocab)
    largest = tl.full([TILE_VOCAB], -INFINITY, tl.float32)
    grouped = tl.minimum(first + GROUPED * TILE_VOCAB, end)
    largest = _largest_of_lanes(largest, source, first, grouped, mask_id, TILE_VOCAB)
    at = row.to(tl.int64) * tl.num_programs(1) + part
    tl.store(leasts + at, tl.min(tl.where(largest > -INFINITY, largest, INFINITY)))
    largest = _largest_of_lanes(largest, source, grouped, end, mask_id, TILE_VOCAB)
    tl.store(maxima + at, tl.max(largest))


@triton.jit(do_not_specialize=["mask_id", "top_k", "width", "token_b", "token_t"])
def narrow_kernel(
    logits,
    tokens,
    candidates,
    temperatures,
    top_ps,
    top_ks,
    maxima,
    leasts,
    edges,
    masses,
    counts,
    bounds,
    sums,
    sizes,
    lists,
    inverse_temperature,
    top_p,
    top_k,
    stride_b,
    stride_t,
    vocab,
    mask_id,
    width,
    token_b,
    token_t,
    TOP_P: tl.constexpr,
    TOP_K: tl.constexpr,
    FILTERED_SCORE: tl.constexpr,
    TILE_VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The bins of one row, all empty where it is not filtered, and one part's sums above each.
    Grid (rows, parts).
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    parts, part = tl.num_programs(1), tl.program_id(1)
    row = tl.program_id(0).to(tl.int64)
    b, t = row // width, row % width
    if tokens is not None:
        if not is_candidate(tokens, candidates, row, b, t, mask_id, token_b, token_t):
            return
    inverse = inverse_of_row(temperatures, inverse_temperature, b)
    scale = tl.where(inverse > 0, inverse, 1.0)
    share, most = _limits(top_ps, top_p, top_ks, top_k, b, TOP_P, TOP_K)
    maximum = tl.max(_of_parts(maxima, row, parts, -INFINITY, PARTS))
    least = tl.min(_of_parts(leasts, row, parts, INFINITY, PARTS))
    bins, bins_end = _bins(maximum, least, scale, share, vocab, logits.dtype.element_ty)
    unused = (inverse == 0) & (not FILTERED_SCORE)  # the largest logit stays, and its score
    whole_row = ((share >= 1) & (most >= vocab)) | unused
    if part == 0:
        for j in tl.static_range(STEPS):
            tl.store(edges + row * (STEPS + 1) + j, tl.where(whole_row, bins_end, bins[j]))
        tl.store(edges + row * (STEPS + 1) + STEPS, bins_end)
    if whole_row:
        return
    source = logits + b * stride_b + t * stride_t
    first = part * (TILES * TILE_VOCAB)
    end = tl.minimum(first + TILES * TILE_VOCAB, vocab)
    mass, count, total = _sums_of_part(
        source, first, end, mask_id, bins, maximum, scale, TOP_P, TOP_K, TILE_VOCAB
    )
    at = (row * parts + part) * STEPS
    for j in tl.static_range(STEPS - 1):
        if TOP_P:
            tl.store(masses + at + j, tl.sum(mass[j]))
        if TOP_K:
            tl.store(counts + at + j, tl.sum(count[j]))
    if TOP_P:
        tl.store(masses + at + STEPS - 1, tl.sum(total))
    if TOP_K:
        tl.store(counts + at + STEPS - 1, 0)


@triton.jit
def _inside(z, bottom, top):
    """Whether logits lie between two numbers, both included; -inf never does."""
    return (z >= bottom) & (z <= top) & (z > -INFINITY)


@triton.jit
def _columns(z, LENGTH: tl.constexpr, COUNT: tl.constexpr):
    """The COUNT columns [LENGTH] of z, in some order. Each thread holds one row: stored whole, z
    would first go through shared memory.
    """
    columns = (z,)
    for i in tl.static_range(COUNT.bit_length() - 1):
        halves = ()
        for j in tl.static_range(len(columns)):
            halves += tl.split(tl.reshape(columns[j], [LENGTH, COUNT >> (i + 1), 2]))
        columns = halves
    rows = ()
    for j in tl.static_range(COUNT):
        rows = rows + (tl.reshape(columns[j], [LENGTH]),)
    return rows


@triton.jit
def _gather(
    source,
    first,
    end,
    barred,
    bottom,
    top,
    places,
    capacity,
    TILE: tl.constexpr,
):
    """Copy the logits first .. end - 1 that lie between bottom and top to `places`, in a fixed
    order. Returns how many there are; none is copied where they are more than capacity.
    """
    DTYPE: tl.constexpr = source.dtype.element_ty
    GROUP: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    # A lane's logits follow one another, so that one running sum over lanes serves all tiles.
    sizes = tl.zeros([TILE // GROUP], tl.int32)
    for start in range(first, end, TILE):
        z = tl.reshape(_offered(source, start, end, barred, TILE), [TILE // GROUP, GROUP])
        sizes += tl.sum(_inside(z, bottom, top).to(tl.int32), 1)
    place = tl.cumsum(sizes, 0) - sizes
    size = tl.sum(sizes)
    if (size > 0) & (size <= capacity):
        for start in range(first, end, TILE):
            z = tl.reshape(_offered(source, start, end, barred, TILE), [TILE // GROUP, GROUP])
            columns = _columns(z, TILE // GROUP, GROUP)
            for j in tl.static_range(GROUP):
                inside = _inside(columns[j], bottom, top)
                tl.store(places + place, columns[j].to(DTYPE), mask=inside)
                place += inside.to(tl.int32)
    return size


@triton.jit(do_not_specialize=["mask_id", "top_k", "width", "token_b", "token_t"])
def gather_kernel(
    logits,
    tokens,
    candidates,
    temperatures,
    top_ps,
    top_ks,
    maxima,
    leasts,
    edges,
    masses,
    counts,
    bounds,
    sums,
    sizes,
    lists,
    inverse_temperature,
    top_p,
    top_k,
    stride_b,
    stride_t,
    vocab,
    mask_id,
    width,
    token_b,
    token_t,
    capacity,
    TOP_P: tl.constexpr,
    TOP_K: tl.constexpr,
    TILE_VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The list of one part of one row: its logits in the bin that holds the cut. Grid (rows,
    parts).
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    rows, parts = tl.num_programs(0).to(tl.int64), tl.num_programs(1)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, t = row // width, row % width
    if tokens is not None:
        if not is_candidate(tokens, candidates, row, b, t, mask_id, token_b, token_t):
            return
    DTYPE: tl.constexpr = logits.dtype.element_ty
    if not _is_filtered(edges, row):
        return
    share, most = _limits(top_ps, top_p, top_ks, top_k, b, TOP_P, TOP_K)
    low, high, above, higher, total = _bin_of_cut(
        edges, masses, counts, row, parts, share, most, TOP_P, TOP_K, PARTS
    )
    if part == 0:
        tl.store(bounds + row, low)
        tl.store(bounds + rows + row, high)
        tl.store(bounds + 2 * rows + row, higher)
        tl.store(sums + row, above)
        tl.store(sums + rows + row, total)
    at = row * parts + part
    size = tl.full([], 0, tl.int32)
    bottom = _number(low, DTYPE)
    if tl.load(maxima + at) >= bottom:
        source = logits + b * stride_b + t * stride_t
        first = part * (TILES * TILE_VOCAB)
        end = tl.minimum(first + TILES * TILE_VOCAB, vocab)
        size = _gather(
            source,
            first,
            end,
            mask_id,
            bottom,
            _largest_number(high, DTYPE),
            lists + at * capacity,
            capacity,
            TILE_VOCAB,
        )
    tl.store(sizes + at, size)


@triton.jit
def _is_filtered(edges, row):
    """Whether a row has a bin that is not empty."""
    at = edges + row * (STEPS + 1)
    return tl.load(at) < tl.load(at + STEPS)


@triton.jit
def _column(source, stride, lengths, start, barred, PARTS: tl.constexpr, CHUNK: tl.constexpr):
    """The entries start .. start + CHUNK - 1 of each of PARTS lists as fp32 [PARTS, CHUNK]; -inf
    after a list's length, and for the entry `barred`, counted from source.
    """
    place = start + tl.arange(0, CHUNK)[None, :]
    at = tl.arange(0, PARTS)[:, None] * stride + place
    z = tl.load(source + at, mask=place < lengths[:, None], other=-INFINITY)
    return tl.where(at == barred, -INFINITY, z.to(tl.float32))


@triton.jit
def _bisect(
    source,
    stride,
    lengths,
    barred,
    low,
    high,
    above,
    higher,
    total,
    share,
    most,
    maximum,
    scale,
    TOP_P: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """(cut, above, equal): the cut, one of the keys low .. high, as a number; the mass above it;
    and how many logits of each list equal it [PARTS].

    source, stride, lengths, barred: PARTS lists that hold all logits of these keys, as `_column`
    takes them. above, higher: the mass and the number of all logits above these keys.
    """
    DTYPE: tl.constexpr = source.dtype.element_ty
    longest = tl.max(lengths)
    while low < high:
        middle = low + ((high.to(tl.int64) - low + 1) // 2).to(tl.int32)
        bottom, top = _number(middle, DTYPE), _largest_number(high, DTYPE)
        mass = tl.zeros([PARTS, CHUNK], tl.float32)
        count = tl.zeros([PARTS, CHUNK], tl.int32)
        for start in range(0, longest, CHUNK):
            z = _column(source, stride, lengths, start, barred, PARTS, CHUNK)
            over = (z >= bottom) & (z <= top)
            if TOP_P:
                mass += tl.where(over, _power(z, maximum, scale), 0.0)
            if TOP_K:
                count += over.to(tl.int32)
        more_above, more = above, higher
        if TOP_P:
            more_above += tl.sum(mass)
        if TOP_K:
            more += tl.sum(count)
        if _holds(more_above, more, total, share, most, TOP_P, TOP_K):
            high, above, higher = middle - 1, more_above, more
        else:
            low = middle
    cut, top = _number(low, DTYPE), _largest_number(low, DTYPE)
    equal = tl.zeros([PARTS], tl.int32)
    for start in range(0, longest, CHUNK):
        z = _column(source, stride, lengths, start, barred, PARTS, CHUNK)
        equal += tl.sum(_inside(z, cut, top).to(tl.int32), 1)
    return cut, above, equal


@triton.jit
def _id_of_equal(source, first, end, cut, wanted, barred, TILE: tl.constexpr):
    """The id of the wanted-th (from 1) of the logits first .. end - 1 that equal the cut; NOTHING
    where there are fewer.
    """
    found = tl.full([], NOTHING, tl.int32)
    seen = tl.full([], 0, tl.int32)
    for start in range(first, end, TILE):
        if seen < wanted:
            equal = _inside(_offered(source, start, end, barred, TILE), cut, cut).to(tl.int32)
            count = tl.sum(equal)
            if seen + count >= wanted:
                is_it = (equal > 0) & (seen + tl.cumsum(equal, 0) == wanted)
                found = tl.min(tl.where(is_it, start + tl.arange(0, TILE), NOTHING))
            seen += count
    return found


@triton.jit
def _cut_of_row(
    source,
    lists,
    lengths,
    capacity,
    part_vocab,
    vocab,
    barred,
    low,
    high,
    above,
    higher,
    total,
    share,
    most,
    maximum,
    scale,
    TOP_P: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """`_bisect` of the parts' lists, or of the row itself where a list could not hold its part's
    logits.
    """
    if tl.max(lengths) <= capacity:
        cut, above, equal = _bisect(
            lists,
            capacity,
            lengths,
            -1,
            low,
            high,
            above,
            higher,
            total,
            share,
            most,
            maximum,
            scale,
            TOP_P,
            TOP_K,
            PARTS,
            CHUNK,
        )
    else:
        first = tl.arange(0, PARTS) * part_vocab
        cut, above, equal = _bisect(
            source,
            part_vocab,
            tl.minimum(tl.maximum(vocab - first, 0), part_vocab),
            barred,
            low,
            high,
            above,
            higher,
            total,
            share,
            most,
            maximum,
            scale,
            TOP_P,
            TOP_K,
            PARTS,
            CHUNK,
        )
    return cut, above, equal


@triton.jit(do_not_specialize=["mask_id", "top_k", "width", "token_b", "token_t", "parts"])
def cut_kernel(
    logits,
    tokens,
    candidates,
    temperatures,
    top_ps,
    top_ks,
    maxima,
    leasts,
    edges,
    masses,
    counts,
    bounds,
    sums,
    sizes,
    lists,
    inverse_temperature,
    top_p,
    top_k,
    stride_b,
    stride_t,
    vocab,
    mask_id,
    width,
    token_b,
    token_t,
    cuts,
    lasts,
    parts,
    part_vocab,
    capacity,
    TOP_P: tl.constexpr,
    TOP_K: tl.constexpr,
    TILE_VOCAB: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The cut of one row, and the last id kept of those equal to it, NOTHING for all. Grid (rows,).

    part_vocab: the logits of a part.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    rows, row = tl.num_programs(0).to(tl.int64), tl.program_id(0).to(tl.int64)
    b, t = row // width, row % width
    if tokens is not None:
        if not is_candidate(tokens, candidates, row, b, t, mask_id, token_b, token_t):
            return
    if not _is_filtered(edges, row):
        tl.store(cuts + row, -INFINITY)
        tl.store(lasts + row, NOTHING)
        return
    share, most = _limits(top_ps, top_p, top_ks, top_k, b, TOP_P, TOP_K)
    inverse = inverse_of_row(temperatures, inverse_temperature, b)
    scale = tl.where(inverse > 0, inverse, 1.0)
    maximum = tl.max(_of_parts(maxima, row, parts, -INFINITY, PARTS))
    low, high = tl.load(bounds + row), tl.load(bounds + rows + row)
    higher = tl.load(bounds + 2 * rows + row)
    above, total = tl.load(sums + row), tl.load(sums + rows + row)
    source = logits + b * stride_b + t * stride_t
    lengths = _of_parts(sizes, row, parts, 0, PARTS)
    cut, above, equal = _cut_of_row(
        source,
        lists + row * parts * capacity,
        lengths,
        capacity,
        part_vocab,
        vocab,
        mask_id,
        low,
        high,
        above,
        higher,
        total,
        share,
        most,
        maximum,
        scale,
        TOP_P,
        TOP_K,
        PARTS,
        CHUNK,
    )
    last = tl.full([], NOTHING, tl.int32)
    if share < 1:
        # So many of the equal ones fit as have no more than the share before them.
        fit = (share * total - above) / _power(cut, maximum, scale)
        wanted = tl.where(fit > 0, tl.minimum(fit, vocab), 0.0).to(tl.int32) + 1
        until = tl.cumsum(equal, 0)
        part = tl.sum((until < wanted).to(tl.int32))
        wanted -= tl.max(tl.where(until < wanted, until, 0))
        end = tl.minimum((part + 1) * part_vocab, vocab)
        if part < parts:
            last = _id_of_equal(source, part * part_vocab, end, cut, wanted, mask_id, TILE_VOCAB)
    tl.store(cuts + row, cut)
    tl.store(lasts + row, last)


def launch(scoring, strides, tokens=None, candidates=None, chosen=None):
    """Run the search for the rows of a `select.Scoring`; returns (cuts [rows] fp32, lasts int32).

    strides: of the logits' rows, (batch, position). tokens [B, T] and candidates as in
    confidence_select; without tokens each row of logits [N, V] is filtered. chosen: a Config to run
    in place of the one that `config` picks.
    """
    logits, vocab = scoring.logits, scoring.vocab_size
    rows, width, token_strides = len(logits), 1, (0, 0)
    if tokens is not None:
        rows, width, token_strides = tokens.numel(), tokens.shape[1], tokens.stride()
    both = scoring.by_mass and scoring.by_count
    chosen = chosen or config(rows, vocab, logits.element_size(), chip_of(logits.device), both)
    space = _workspace(scoring, rows, chosen)
    place = (logits, tokens, candidates)
    mask_id = -1 if scoring.mask_id is None else scoring.mask_id
    shape = (*strides, vocab, mask_id, width, *token_strides)
    limits = (dense(scoring.temperatures), dense(scoring.top_ps), dense(scoring.top_ks))
    numbers = (inverse(scoring.temperature), scoring.top_p, scoring.top_k)
    row = (*place, *limits, *space, *numbers, *shape)
    parts = power_of_2(chosen.parts)
    flags = {"TOP_P": scoring.by_mass, "TOP_K": scoring.by_count, "PARTS": parts}
    options = {"OVERLAP": chosen.overlap, "enable_fp_fusion": True, **pdl(chosen.overlap)}
    part = {"TILE_VOCAB": chosen.tile_vocab, "TILES": chosen.tiles, "num_warps": chosen.num_warps}
    part |= options
    grid = (rows, chosen.parts)
    compiling.launch(peak_kernel, grid, *place, space.maxima, space.leasts, *shape, **part)
    score = {
        "FILTERED_SCORE": scoring.filtered_score,
        **_registers(chosen.num_warps, chosen.resident),
    }
    compiling.launch(narrow_kernel, grid, *row, **score, **flags, **part)
    compiling.launch(gather_kernel, grid, *row, chosen.capacity, **flags, **part)
    cuts = torch.empty(rows, dtype=torch.float32, device=logits.device)
    lasts = torch.empty(rows, dtype=torch.int32, device=logits.device)
    compiling.launch(
        cut_kernel,
        (rows,),
        *row,
        cuts,
        lasts,
        chosen.parts,
        chosen.tile_vocab * chosen.tiles,
        chosen.capacity,
        **flags,
        TILE_VOCAB=min(4096, power_of_2(vocab)),
        CHUNK=4096 // parts,
        num_warps=16,
        **_registers(16),
        **options,
    )
    return cuts, lasts


class _Workspace(NamedTuple):
    """What the kernels leave each other, of each row.

    maxima, leasts [rows, parts] fp32: of the parts the largest logit, and the least of their lanes'
    largest. edges [rows, BINS + 1] int32: the keys between the bins. masses, counts [rows, parts,
    BINS] fp32 and int32: the parts' sums above each bin, and in the last place the whole mass; None
    where nothing is filtered by them. bounds [3, rows] int32: the first and the last key of the bin
    with the cut, and the number of logits above it. sums [2, rows] fp32: their mass, and the whole.
    sizes [rows, parts] int32, lists [rows, parts, capacity]: the parts' logits in that bin.
    """

    maxima: torch.Tensor
    leasts: torch.Tensor
    edges: torch.Tensor
    masses: torch.Tensor | None
    counts: torch.Tensor | None
    bounds: torch.Tensor
    sums: torch.Tensor
    sizes: torch.Tensor
    lists: torch.Tensor


def _workspace(scoring, rows, chosen) -> _Workspace:
    parts = chosen.parts

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=scoring.logits.device)

    def integers(*shape):
        return empty(*shape, dtype=torch.int32)

    return _Workspace(
        empty(rows, parts),
        empty(rows, parts),
        integers(rows, BINS + 1),
        empty(rows, parts, BINS) if scoring.by_mass else None,
        integers(rows, parts, BINS) if scoring.by_count else None,
        integers(3, rows),
        empty(2, rows),
        integers(rows, parts),
        empty(rows, parts, chosen.capacity, dtype=scoring.logits.dtype),
    )
