"""Top-p and top-k in Triton, without a sort: for each row the last token that they keep.

Let z be a row's logits without the mask's, T its temperature (1 where that is 0) and

    above(u) = sum exp((z_i - max z) / T) over z_i > u        higher(u) = how many z_i > u

The filters keep the z_i > cut, and of those equal to it the lowest ids up to `last`, where cut is
the smallest u with above(u) <= top_p * above(-inf) and higher(u) < top_k. Both sides only grow as u
falls. So the cut is searched among the bit patterns of the logits' dtype, ordered as the numbers
are (keys): each pass over the logits, which lie in L2 by now, adds up both sides at 15 thresholds
at once and leaves one of 16 bins of the interval. Four passes tell the 2^16 keys of 16 bits apart,
eight those of 32 bits. A token of less than (1 - top_p) / V of the largest probability is never
kept, so that at a low temperature the search starts close to the maximum and two passes do.

peak_kernel     one program for each (row, part of the vocabulary): the part's largest logit
narrow_kernel   the same programs: from the sums of the pass before the interval that is left, and
                its own part's sums at the thresholds inside it
cut_kernel      one program for each row: the cut, and the last id kept of those equal to it

Each program adds up in a fixed order, so equal inputs give equal bits. Programs whose row is no
candidate, or is not filtered, return at once, and so does a pass that has nothing left to narrow.
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
BINS = 16  # a pass leaves one of so many bins
STEPS: tl.constexpr = tl.constexpr(BINS)


@dataclass(frozen=True)
class Config:
    """How a pass is cut: `parts` programs to a row, each `tiles` tiles of tile_vocab logits.

    resident: the programs that an SM is to hold at once. overlap: a launch may begin while the one
    before it drains, and waits on the device.
    """

    tile_vocab: int
    tiles: int
    parts: int
    passes: int
    resident: int = 4
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
    # Bound by arithmetic, three instructions for each logit and threshold: as many programs of four
    # warps as all SMs hold at once, which is four where a thread takes 128 registers. Masses and
    # counts together spill then. No more than 16 parts: every program of the next pass merges them.
    resident = 3 if both else 4
    parts = min(count, 16, max(1, resident * chip.multiprocessors // rows))
    tiles = ceil_div(count, parts)
    passes = 4 if itemsize == 2 else 8
    return Config(tile, tiles, ceil_div(count, tiles), passes, resident, overlap=chip.overlap)


def _registers(chosen: Config) -> dict:
    """The launch option that bounds a thread's registers, so that `resident` programs fit."""
    most = 65536 // (32 * chosen.num_warps * chosen.resident) // 8 * 8
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
def _maximum(maxima, row, parts, PARTS: tl.constexpr):
    """The row's largest logit, from its parts'."""
    part = tl.arange(0, PARTS)
    return tl.max(tl.load(maxima + row * parts + part, mask=part < parts, other=-INFINITY))


@triton.jit
def _power(z, maximum, scale):
    """exp((z - maximum) / T): the mass of a logit, 1 for the largest."""
    shift = tl.where(maximum == -INFINITY, 0.0, maximum)
    return tl.exp2((z - shift) * (scale * LOG2E))


@triton.jit
def _first_interval(maximum, scale, share, vocab, DTYPE: tl.constexpr):
    """(low, width): the keys that the cut may have before any pass."""
    # All tokens with less than (1 - share) / vocab of the largest one's probability have less than
    # 1 - share together: the cut lies above them. A hundredth more, for rounding.
    far = (tl.log(vocab / tl.maximum(1.0 - share, 1e-9)) * 1.01 + 0.01) / scale
    lowest = tl.where(share < 1, maximum - far, -INFINITY)
    low = _key(lowest.to(DTYPE)).to(tl.int64)
    return low, _key(maximum.to(DTYPE)) - low + 1


@triton.jit
def _next_interval(
    bounds,
    sums,
    masses,
    counts,
    level,
    row,
    rows,
    parts,
    share,
    most,
    TOP_P: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """(low, width, above, total) that pass `level` leaves of a row.

    The cut's key is one of low .. low + width - 1; above is the mass over all of these, total the
    whole. What pass i has read and written lies in half i % 2 of each array.
    """
    half = level % 2
    at = half * 2 * rows + row
    low, width = tl.load(bounds + at), tl.load(bounds + at + rows)
    above, total = tl.load(sums + at), tl.load(sums + at + rows)
    if (width > 1) | ((level == 0) & (width == 1)):
        step = (width + (STEPS - 1)) // STEPS
        high = low + width - 1
        bin, part = tl.arange(0, STEPS), tl.arange(0, PARTS)[:, None]
        slot = ((half * rows + row) * parts + part) * STEPS + bin[None, :]
        # Whether the cut may lie at the last key of a bin, or below.
        holds = tl.full([STEPS], 1, tl.int1)
        mass = tl.zeros([STEPS], tl.float32)
        if TOP_P:
            mass = tl.sum(tl.load(masses + slot, mask=part < parts, other=0.0), 0)
            if level == 0:
                total = tl.sum(tl.where(bin == STEPS - 1, mass, 0.0))
            holds = tl.where(share < 1, mass <= share * total, holds)
        if TOP_K:
            holds &= tl.sum(tl.load(counts + slot, mask=part < parts, other=0), 0) < most
        holds |= bin == STEPS - 1
        chosen = STEPS - tl.sum(holds.to(tl.int32))
        if chosen < STEPS - 1:
            above = tl.sum(tl.where(bin == chosen, mass, 0.0))
        low = tl.minimum(low + chosen * step, high)
        width = tl.minimum(step, high - low + 1)
    return low, width, above, total


@triton.jit
def _thresholds(low, width):
    """The first keys above each bin but the last of the interval, as int32."""
    step = (width + (STEPS - 1)) // STEPS
    keys = ()
    for j in tl.static_range(STEPS - 1):
        keys = keys + (tl.minimum(low + (j + 1) * step, low + width).to(tl.int32),)
    return keys


@triton.jit
def _sums_of_part(
    source,
    first,
    end,
    barred,
    low,
    width,
    maximum,
    scale,
    FIRST: tl.constexpr,
    TOP_P: tl.constexpr,
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
):
    """(masses, counts, total) of the logits first .. end - 1 of the row at source.

    masses, counts: for each threshold what lies at or over it, a lane's sums. total: the whole
    mass, in the first pass.
    """
    GROUP: tl.constexpr = 128 // source.dtype.element_ty.primitive_bitwidth
    thresholds = _thresholds(low, width)
    nothing = tl.zeros([TILE // GROUP], tl.float32)
    total = nothing
    masses = (nothing,) * (STEPS - 1)
    counts = (nothing.to(tl.int32),) * (STEPS - 1)
    lane = tl.arange(0, TILE)
    for start in range(first, end, TILE):
        z = tl.load(source + start + lane, mask=lane < end - start, other=-INFINITY)
        z = tl.where(start + lane == barred, -INFINITY, z)
        key = _key(z)
        if TOP_P and FIRST:
            power = _power(z.to(tl.float32), maximum, scale)
            total += tl.sum(tl.reshape(power, [TILE // GROUP, GROUP]), 1)
        if tl.max(key) >= low:  # else the tile adds to no threshold
            power = _power(z.to(tl.float32), maximum, scale)
            more_masses, more_counts = (), ()
            for j in tl.static_range(STEPS - 1):
                over = tl.reshape(key, [TILE // GROUP, GROUP]) >= thresholds[j]
                mass, count = masses[j], counts[j]
                if TOP_P:
                    mass += tl.sum(
                        tl.where(over, tl.reshape(power, [TILE // GROUP, GROUP]), 0.0), 1
                    )
                if TOP_K:
                    count += tl.sum(over.to(tl.int32), 1)
                more_masses, more_counts = more_masses + (mass,), more_counts + (count,)
            masses, counts = more_masses, more_counts
    return masses, counts, total


@triton.jit(do_not_specialize=["mask_id", "width", "token_b", "token_t"])
def peak_kernel(
    logits,
    tokens,
    candidates,
    maxima,
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
    """The largest logit of one part of one row, the mask's aside. Grid (rows, parts)."""
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
    lane = tl.arange(0, TILE_VOCAB)
    largest = tl.full([TILE_VOCAB], -INFINITY, tl.float32)
    for start in range(first, end, TILE_VOCAB):
        z = tl.load(source + start + lane, mask=lane < end - start, other=-INFINITY)
        z = tl.where(start + lane == mask_id, -INFINITY, z.to(tl.float32))
        largest = tl.maximum(largest, z)
    tl.store(maxima + row.to(tl.int64) * tl.num_programs(1) + part, tl.max(largest))


@triton.jit(do_not_specialize=["level", "mask_id", "top_k", "width", "token_b", "token_t"])
def narrow_kernel(
    logits,
    tokens,
    candidates,
    temperatures,
    top_ps,
    top_ks,
    maxima,
    bounds,
    sums,
    masses,
    counts,
    level,
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
    FIRST: tl.constexpr,
    TOP_P: tl.constexpr,
    TOP_K: tl.constexpr,
    FILTERED_SCORE: tl.constexpr,
    TILE_VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Pass `level` of one row over one part of the vocabulary. Grid (rows, parts)."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    rows, parts = tl.num_programs(0).to(tl.int64), tl.num_programs(1)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, t = row // width, row % width
    if tokens is not None:
        if not is_candidate(tokens, candidates, row, b, t, mask_id, token_b, token_t):
            return
    inverse = inverse_of_row(temperatures, inverse_temperature, b)
    scale = tl.where(inverse > 0, inverse, 1.0)
    share, most = _limits(top_ps, top_p, top_ks, top_k, b, TOP_P, TOP_K)
    maximum = _maximum(maxima, row, parts, PARTS)
    if FIRST:
        low, keys = _first_interval(maximum, scale, share, vocab, logits.dtype.element_ty)
        above, total = 0.0, 0.0
        unused = (inverse == 0) & (not FILTERED_SCORE)  # the largest logit stays, and its score
        if ((share >= 1) & (most >= vocab)) | unused:
            keys = tl.zeros_like(keys)
    else:
        low, keys, above, total = _next_interval(
            bounds,
            sums,
            masses,
            counts,
            level - 1,
            row,
            rows,
            parts,
            share,
            most,
            TOP_P,
            TOP_K,
            PARTS,
        )
    half = level % 2
    if part == 0:
        at = half * 2 * rows + row
        tl.store(bounds + at, low)
        tl.store(bounds + at + rows, keys)
        tl.store(sums + at, above)
        tl.store(sums + at + rows, total)
    if keys < (1 if FIRST else 2):
        return
    source = logits + b * stride_b + t * stride_t
    first = part * (TILES * TILE_VOCAB)
    end = tl.minimum(first + TILES * TILE_VOCAB, vocab)
    mass, count, whole = _sums_of_part(
        source, first, end, mask_id, low, keys, maximum, scale, FIRST, TOP_P, TOP_K, TILE_VOCAB
    )
    at = ((half * rows + row) * parts + part) * STEPS
    for j in tl.static_range(STEPS - 1):
        if TOP_P:
            tl.store(masses + at + j, tl.sum(mass[j]))
        if TOP_K:
            tl.store(counts + at + j, tl.sum(count[j]))
    if TOP_P:
        tl.store(masses + at + STEPS - 1, tl.sum(whole))


@triton.jit(do_not_specialize=["level", "mask_id", "top_k", "width", "token_b", "token_t", "parts"])
def cut_kernel(
    logits,
    tokens,
    candidates,
    temperatures,
    top_ps,
    top_ks,
    maxima,
    bounds,
    sums,
    masses,
    counts,
    cuts,
    lasts,
    level,
    parts,
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
    TILE_VOCAB: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """What pass `level`, the last, leaves of one row: its cut, and the last id kept of those equal
    to it, NOTHING for all. Grid (rows,).
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    rows, row = tl.num_programs(0).to(tl.int64), tl.program_id(0).to(tl.int64)
    b, t = row // width, row % width
    if tokens is not None:
        if not is_candidate(tokens, candidates, row, b, t, mask_id, token_b, token_t):
            return
    share, most = _limits(top_ps, top_p, top_ks, top_k, b, TOP_P, TOP_K)
    low, keys, above, total = _next_interval(
        bounds, sums, masses, counts, level, row, rows, parts, share, most, TOP_P, TOP_K, PARTS
    )
    key = low.to(tl.int32)
    cut = _number(key, logits.dtype.element_ty)
    last = tl.full([], NOTHING, tl.int32)
    if keys == 0:  # not filtered
        cut = tl.full([], -INFINITY, tl.float32)
    elif share < 1:
        inverse = inverse_of_row(temperatures, inverse_temperature, b)
        scale = tl.where(inverse > 0, inverse, 1.0)
        power = _power(cut, _maximum(maxima, row, parts, PARTS), scale)
        # So many of the equal ones fit as have no more than the share before them.
        fit = (share * total - above) / power
        wanted = tl.where(fit > 0, tl.minimum(fit, vocab), 0.0).to(tl.int32) + 1
        source = logits + b * stride_b + t * stride_t
        last = _id_of_equal(source, key, wanted, mask_id, vocab, TILE_VOCAB)
    tl.store(cuts + row, cut)
    tl.store(lasts + row, last)


@triton.jit
def _id_of_equal(source, key, wanted, barred, vocab, TILE: tl.constexpr):
    """The id of the wanted-th logit (from 1) that has this key; NOTHING where there are fewer."""
    found = tl.full([], NOTHING, tl.int32)
    seen = tl.full([], 0, tl.int32)
    lane = tl.arange(0, TILE)
    for start in range(0, vocab, TILE):
        if seen < wanted:
            ids = start + lane
            z = tl.load(source + ids, mask=ids < vocab, other=-INFINITY)
            equal = ((_key(z) == key) & (ids < vocab) & (ids != barred)).to(tl.int32)
            count = tl.sum(equal)
            if seen + count >= wanted:
                place = seen + tl.cumsum(equal, 0)
                found = tl.min(tl.where((equal > 0) & (place == wanted), ids, NOTHING))
            seen += count
    return found


def launch(scoring, strides, tokens=None, candidates=None, chosen=None):
    """Run the search for the rows of a `select.Scoring`; returns (cuts [rows] fp32, lasts int32).

    strides: of the logits' rows, (batch, position). tokens [B, T] and candidates as in
    confidence_select; without tokens each row of logits [N, V] is filtered. chosen: a Config to run
    in place of the one that `config` picks.
    """
    logits = scoring.logits
    rows, width, token_strides = len(logits), 1, (0, 0)
    if tokens is not None:
        rows, width, token_strides = tokens.numel(), tokens.shape[1], tokens.stride()
    chip = chip_of(logits.device)
    both = scoring.by_mass and scoring.by_count
    chosen = chosen or config(rows, scoring.vocab_size, logits.element_size(), chip, both)
    mask_id = -1 if scoring.mask_id is None else scoring.mask_id
    space = _workspace(scoring, rows, chosen.parts)
    place = (logits, tokens, candidates)
    shape = (*strides, scoring.vocab_size, mask_id, width, *token_strides)
    limits = (dense(scoring.temperatures), dense(scoring.top_ps), dense(scoring.top_ks))
    numbers = (inverse(scoring.temperature), scoring.top_p, scoring.top_k)
    cut = {"TILE_VOCAB": chosen.tile_vocab, "TILES": chosen.tiles, "num_warps": chosen.num_warps}
    flags = {
        "TOP_P": scoring.by_mass,
        "TOP_K": scoring.by_count,
        "PARTS": power_of_2(chosen.parts),
    }
    options = {"OVERLAP": chosen.overlap, "enable_fp_fusion": True, **pdl(chosen.overlap)}
    grid = (rows, chosen.parts)
    compiling.launch(peak_kernel, grid, *place, space.maxima, *shape, **cut, **options)
    for level in range(chosen.passes):
        compiling.launch(
            narrow_kernel,
            grid,
            *place,
            *limits,
            *space,
            level,
            *numbers,
            *shape,
            FIRST=level == 0,
            FILTERED_SCORE=scoring.filtered_score,
            **flags,
            **cut,
            **options,
            **_registers(chosen),
        )
    cuts = torch.empty_like(space.maxima[:, 0], memory_format=torch.contiguous_format)
    lasts = torch.empty_like(cuts, dtype=torch.int32)
    compiling.launch(
        cut_kernel,
        (rows,),
        *place,
        *limits,
        *space,
        cuts,
        lasts,
        chosen.passes - 1,
        chosen.parts,
        *numbers,
        *shape,
        **flags,
        TILE_VOCAB=min(16384, power_of_2(scoring.vocab_size)),
        num_warps=16,
        **options,
    )
    return cuts, lasts


class _Workspace(NamedTuple):
    """What the passes leave each other, of each row.

    maxima [rows, parts] fp32: the parts' largest logits. bounds [2, 2, rows] int64, sums [2, 2,
    rows] fp32: (low, width) and (above, total) of `_next_interval`, of the even passes and the odd.
    masses, counts [2, rows, parts, BINS] fp32 and int32: the parts' sums over each threshold; in
    the last place of the first pass the whole mass. None where nothing is filtered by them.
    """

    maxima: torch.Tensor
    bounds: torch.Tensor
    sums: torch.Tensor
    masses: torch.Tensor | None
    counts: torch.Tensor | None


def _workspace(scoring, rows, parts) -> _Workspace:
    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=scoring.logits.device)

    return _Workspace(
        empty(rows, parts),
        empty(2, 2, rows, dtype=torch.int64),
        empty(2, 2, rows),
        empty(2, rows, parts, BINS) if scoring.by_mass else None,
        empty(2, rows, parts, BINS, dtype=torch.int32) if scoring.by_count else None,
    )
