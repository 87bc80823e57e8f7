"""block_attention in Triton: a flash pass over the keys that a row sees, split over keys where
heads cannot fill the GPU.

A program owns TILE_ROWS of the T * G query rows of one key head (G = H / HK query heads share it:
keys are read once per tile, not once per head) and one of `splits` shares of the row's visible
keys. Visible keys are numbered without gaps,

    0 .. prefix - 1         cached slot kv_start + i
    prefix .. cached - 1    cached slot block_start + n + (i - prefix)
    cached .. cached + n    the block's own key i - cached, rotated on the way in

so that the share of a split is arithmetic on device values (short rows stay balanced) and the one
loop over the cache knows no prefix, suffix or gap. A share's own keys come first, while the sums
are empty: rotating them takes registers. With one split the kernel writes the result; with more it
writes fp32 parts and their log-sum-exp, and `merge_kernel` adds them up in a fixed order: equal
inputs give equal bits, launch after launch.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import compiling
from .backend import ceil_div, chip_of, dense, on_device, pdl, power_of_2
from .pointwise import rope_to_cache

LOG2E = 1.4426950408889634
# Left alone, the assembler spills a few bytes to fit a third program on a multiprocessor, which
# shared memory forbids.
REGISTERS = {"maxnreg": 255} if torch.version.hip is None else {}


@dataclass(frozen=True)
class Config:
    """How one call runs: TILE_ROWS query rows by TILE_KEYS keys a program, keys in `splits` shares.

    rotate_first: q and k are rotated by a launch of their own. overlap: launches may begin before
    what runs ahead of them ends, and wait on the device.
    """

    TILE_ROWS: int
    TILE_KEYS: int
    num_warps: int
    num_stages: int
    splits: int = 1
    rotate_first: bool = False
    overlap: bool = False


class _Tiles(NamedTuple):
    """Query rows and keys of a program's tiles, its warps, and the stages of its loads."""

    rows: int
    keys: int
    warps: int
    stages: int


@lru_cache(maxsize=4096)
def config(B, T, H, HK, D, capacity, itemsize, chip) -> Config:
    """The configuration for q [B, T, H, D], k [B, T, HK, D] and `capacity` cached slots a row,
    `itemsize` bytes an element.

    Pure: it sees host constants only, so a captured graph replays whatever the spans on the device
    say.
    """
    rows, groups = T * (H // HK), B * HK
    keys, tile_d = max(capacity, T), _tile_d(D)
    if itemsize == 2 and tile_d <= 128:
        tiles, splits = _tiles_of_64(rows, groups, keys, chip.multiprocessors, wide=tile_d > 64)
    else:
        tiles = _small_tiles(itemsize, chip)
        splits = _splits(ceil_div(rows, tiles.rows) * groups, keys, 2 * chip.multiprocessors)
    tiles = _fitted(tiles, tile_d, itemsize, chip.shared)
    # Every row tile rotates the block's keys again, off the pipelined path: past a few tiles one
    # more launch is cheaper.
    rotate_first = splits == 1 and T > 256
    return Config(
        tiles.rows,
        tiles.keys,
        tiles.warps,
        tiles.stages,
        splits,
        rotate_first,
        chip.overlap,
    )


def _tiles_of_64(rows, groups, keys, multiprocessors, *, wide):
    """(tiles of 64 rows, splits) for `rows` rows of each of `groups` key heads; wide: D above 64.

    64 rows even where there are fewer: below that Hopper's tensor cores take their slow path (4
    queries over 2,048 keys took 20.4 us in tiles of 16 rows, and 15.7). Not 128: two programs of 64
    on a multiprocessor take turns, one at its products while the other is at its exponentials.
    """
    programs = ceil_div(rows, 64) * groups
    alone = _splits(programs, keys, multiprocessors)
    if wide and 2 * programs <= multiprocessors and keys // alone <= 192:
        # Bound by latency: one program on a multiprocessor at most, with more warps; more than six
        # parts take long to merge.
        return _Tiles(64, 64, 8, 3), min(alone, 6)
    splits = _splits(programs, keys, 2 * multiprocessors)  # two programs on each
    if wide and rows >= 64:
        return _Tiles(64, 64, 4, 3), splits
    # Tiles half full wait for memory: fewer keys in more stages keep more loads in flight. Where D
    # is 64, too, 64 keys would make the assembler serialise the products.
    return _Tiles(64, 32, 4, 4), splits


def _small_tiles(itemsize, chip):
    """Tiles where registers are scarce: in fp32, or with D above 128."""
    if itemsize == 4:
        # Exact products run outside the tensor cores, from operands held in registers.
        return _Tiles(16, 16, 8, 2)
    # The sums of 64 rows fill the registers of 8 warps; older chips keep copies of the operands
    # there as well.
    return _Tiles(64 if chip.shared > 200000 else 32, 32, 8, 3)


def _tile_d(D):
    return max(16, power_of_2(D))


def _fitted(tiles, tile_d, itemsize, shared):
    """The tiles, made smaller until their buffers fit: fewer keys first (the stages hide latency),
    then stages, then rows.
    """
    rows, keys, warps, stages = tiles
    while (rows + 2 * stages * keys) * tile_d * itemsize + 2048 > shared:
        if keys > 32:
            keys //= 2
        elif stages > 2:
            stages -= 1
        elif rows > 16:
            rows //= 2
        elif keys > 16:
            keys //= 2
        else:
            break
    return _Tiles(rows, keys, warps, stages)


def _splits(programs, keys, places):
    """Shares of the keys: as many as fill the GPU's `places` for programs, none under 64 keys."""
    if keys <= 256:
        return 1  # reading a few tiles more takes less time than a second launch
    return max(1, min(places // programs, keys // 64, 32))


@triton.jit
def _columns(D: tl.constexpr, TILE_D: tl.constexpr, PAIRED: tl.constexpr):
    """Offsets of a tile's columns, and which exist. PAIRED: each half of D in its half of the tile,
    as rotation leaves it.
    """
    column = tl.arange(0, TILE_D)
    if PAIRED and D < TILE_D:
        within = column % (TILE_D // 2)
        return column // (TILE_D // 2) * (D // 2) + within, within < D // 2
    else:
        return column, column < D


@triton.jit
def _load(pointers, inside, MASKED: tl.constexpr):
    """A [rows, columns] tile, 0 wherever `inside` says no: what lies there may be NaN."""
    if MASKED:
        return tl.load(pointers, mask=inside, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _rotated(x_ptr, offset, seen, position, tables, D: tl.constexpr, TILE_D: tl.constexpr):
    """Rows at `offset` rotated to `position`, with every operation rounded to the tables' dtype, as
    PyTorch does it.
    """
    cos_ptr, sin_ptr, cos_at, sin_at = tables
    HALF: tl.constexpr = D // 2
    rows: tl.constexpr = offset.shape[0]
    column = tl.arange(0, TILE_D // 2)[None, :]
    mask = seen[:, None] & (column < HALF)
    x, angle = x_ptr + offset[:, None] + column, position.to(tl.int64)[:, None]
    first = tl.load(x, mask=mask, other=0.0)
    second = tl.load(x + HALF, mask=mask, other=0.0)
    cos = tl.load(cos_ptr + angle * cos_at + column, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle * sin_at + column, mask=mask, other=0.0)
    left = _product(first, cos) - _product(second, sin)
    right = _product(second, cos) + _product(first, sin)
    pair = tl.join(left.to(cos.dtype).to(first.dtype), right.to(cos.dtype).to(first.dtype))
    return tl.reshape(tl.permute(pair, (0, 2, 1)), (rows, TILE_D))


@triton.jit
def _product(x, table):
    """x * table rounded to the table's dtype, as fp32, which no fused multiply-add may skip."""
    return (x.to(table.dtype).to(tl.float32) * table.to(tl.float32)).to(table.dtype).to(tl.float32)


@triton.jit
def _queries(
    q_ptr,
    offset,
    asked,
    position,
    tables,
    D: tl.constexpr,
    TILE_D: tl.constexpr,
    NEGATIVE: tl.constexpr,
):
    """The tile's queries, rotated where there are tables, with the sign of the scale; rows not
    `asked` are 0.
    """
    if tables[0] is not None:
        q = _rotated(q_ptr, offset, asked, position, tables, D, TILE_D)
    else:
        column, inside = _columns(D, TILE_D, False)
        q = _load(q_ptr + offset[:, None] + column[None, :], asked[:, None] & inside[None, :], True)
    if NEGATIVE:
        q = -q
    return q


@triton.jit
def _fold(q, k, v, at, end, top, total, acc, scale):
    """Fold a tile, keys at .. and not from `end` on, into the running maximum, sum and weighted
    values (in powers of two).
    """
    if q.dtype == tl.float32:
        # Exact products hold their operands in registers: 16 columns of D at a time, spread over
        # the warps, or they spill.
        PARTS: tl.constexpr = q.shape[1] // 16
        left = tl.permute(tl.reshape(q, (q.shape[0], PARTS, 16)), (1, 0, 2))
        right = tl.permute(tl.reshape(k, (k.shape[0], PARTS, 16)), (1, 2, 0))
        scores = tl.sum(tl.dot(left, right, input_precision="ieee"), 0)
    else:
        scores = tl.dot(q, tl.trans(k))
    if at + k.shape[0] > end:
        scores = tl.where((at + tl.arange(0, k.shape[0]) < end)[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit
def _page(pointer, last_page):
    """What a page table says, held inside the cache."""
    return tl.minimum(tl.maximum(tl.load(pointer), 0), last_page).to(tl.int64)


@triton.jit
def _fold_stored(
    q,
    sums,
    stored,
    begin,
    end,
    place,
    pages,
    scale,
    D: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    PAIRED: tl.constexpr,
    PAGE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Fold keys begin .. end - 1, read as they are, into the running maximum, sum and weighted
    values.

    stored: pointers to keys and values, and how far apart their slots are. place: (prefix, first,
    jump): key i lies in slot first + i below `prefix`, and in jump + i from there. pages: with
    PAGE slots each, (the row's page table, how far apart pages of keys and of values are, the last
    page).

    A last tile that is not full repeats the last key, so that no load of a row needs a mask, and
    only its scores get one.
    """
    top, total, acc = sums
    k_ptr, v_ptr, k_at, v_at = stored
    prefix, first, jump = place
    page_ptr, k_page, v_page, last_page = pages
    k_column, k_inside = _columns(D, TILE_D, PAIRED)
    v_column, v_inside = _columns(D, TILE_D, False)
    for at in tl.range(begin, end, TILE_KEYS, num_stages=STAGES):
        key = tl.minimum(at + tl.arange(0, TILE_KEYS), end - 1)
        if PAGE > 0:
            slot = key + tl.where(key < prefix, first, jump)
            page = _page(page_ptr + slot // PAGE, last_page)
            slot = (slot % PAGE).to(tl.int64)
            k_row, v_row = page * k_page + slot * k_at, page * v_page + slot * v_at
        else:
            slot = (key + tl.where(key < prefix, first, jump)).to(tl.int64)
            k_row, v_row = slot * k_at, slot * v_at
        k = _load(k_ptr + k_row[:, None] + k_column[None, :], k_inside[None, :], D < TILE_D)
        v = _load(v_ptr + v_row[:, None] + v_column[None, :], v_inside[None, :], D < TILE_D)
        top, total, acc = _fold(q, k, v, at, end, top, total, acc, scale)
    return top, total, acc


@triton.jit
def _fold_rotated(
    q,
    sums,
    own,
    begin,
    end,
    start,
    positions,
    tables,
    scale,
    D: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """Fold the block's own keys begin .. end - 1, rotated to positions start + key. own: pointers
    to keys and values, and how far apart they are.
    """
    top, total, acc = sums
    k_ptr, v_ptr, k_at, v_at = own
    # A block at once where that was seen to fit.
    TILE_OWN: tl.constexpr = 16 if q.dtype == tl.float32 or D != 128 else 32
    column, inside = _columns(D, TILE_D, False)
    # Two stages though nothing here is pipelined: with one, the assembler serialises every product
    # of the kernel.
    for at in tl.range(begin, end, TILE_OWN, num_stages=2):
        key = at + tl.arange(0, TILE_OWN)
        seen, row = key < end, key.to(tl.int64)
        position = tl.minimum(start + key, positions - 1)
        k = _rotated(k_ptr, row * k_at, seen, position, tables, D, TILE_D)
        v = _load(
            v_ptr + (row * v_at)[:, None] + column[None, :], seen[:, None] & inside[None, :], True
        )
        top, total, acc = _fold(q, k, v, at, end, top, total, acc, scale)
    return top, total, acc


@triton.jit
def _place(index, tiles, HK: tl.constexpr):
    """(row tile, key head, row of the batch) of a program."""
    group = index // tiles
    return index % tiles, (group % HK).to(tl.int64), (group // HK).to(tl.int64)


@triton.jit
def _spans(b, T, spans):
    """What row b sees: (block's start, its length, own keys of it, first cached slot, keys before
    the block, cached keys). spans: pointers to block_start, kv_len, kv_start, block_len.
    """
    block_start_ptr, kv_len_ptr, kv_start_ptr, block_len_ptr = spans
    start, kv_len = tl.load(block_start_ptr + b), tl.load(kv_len_ptr + b)
    first, length = 0, T
    if kv_start_ptr is not None:
        first = tl.load(kv_start_ptr + b)
    if block_len_ptr is not None:
        length = tl.load(block_len_ptr + b)
    own = tl.maximum(tl.minimum(length, T), 0)
    prefix = tl.maximum(start - first, 0)
    return start, length, own, first, prefix, prefix + tl.maximum(kv_len - start - length, 0)


@triton.jit
def _rows(tile, kv_head, own, G: tl.constexpr, TILE_ROWS: tl.constexpr):
    """A tile's rows: (position in the block, query head, whether the row is one of the block's
    `own` positions).
    """
    row = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    return row // G, kv_head * G + row % G, row < own * G


@triton.jit
def _share(keys):
    """Keys begin .. end - 1 of this program's split."""
    share = tl.cdiv(tl.cdiv(keys, tl.num_programs(1)), 16) * 16
    begin = tl.minimum(tl.program_id(1) * share, keys)
    return begin, tl.minimum(begin + share, keys)


@triton.jit
def _store(
    sums,
    own,
    out_ptr,
    lse_ptr,
    tiles,
    T,
    out_strides,
    lse_split,
    HK: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
):
    """Write the tile's result and log-sum-exp, or this split's parts of them."""
    # Here, not outside: a launch compares every global that a kernel reads.
    LN2: tl.constexpr = 0.6931471805599453
    top, total, acc = sums
    # Axis 2 has one program: its 0 makes these new values, where the same from above would hold
    # registers in the loops.
    tile, kv_head, b = _place(tl.program_id(0) + tl.program_id(2), tiles, HK)
    t, head, asked = _rows(tile, kv_head, own, G, acc.shape[0])
    total = tl.where(total == 0, 1.0, total)
    result = tl.where(asked[:, None], acc / total[:, None], 0.0)
    column, inside = _columns(D, acc.shape[1], False)
    split = (tl.program_id(1) + tl.program_id(2)).to(tl.int64)
    out_row, out_at, out_head, out_split = out_strides
    offset = split * out_split + b * out_row + t.to(tl.int64) * out_at + head * out_head
    tl.store(
        out_ptr + offset[:, None] + column[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=(t < T)[:, None] & inside[None, :],
    )
    if lse_ptr is not None:
        lse = tl.where(asked, (top + tl.log2(total)) * LN2, float("-inf"))
        tl.store(lse_ptr + split * lse_split + (b * T + t) * (HK * G) + head, lse, mask=t < T)


@triton.jit(do_not_specialize=["tiles", "T", "lse_split", "positions", "last_page"])
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    lse_ptr,
    spans,
    page_table_ptr,
    tables,
    scale,
    tiles,
    T,
    positions,
    q_strides,
    k_strides,
    v_strides,
    k_cache_strides,
    v_cache_strides,
    out_strides,
    lse_split,
    page_row,
    last_page,
    table_strides,
    HK: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    TILE_D: tl.constexpr,
    PAGE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    NEGATIVE: tl.constexpr,
    OVERLAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row tile of one key head (program axis 0, tiles fastest so that they share keys in L2)
    and one split (axis 1).

    spans: pointers to block_start, kv_len, kv_start, block_len. tables: cos and sin, or None twice.
    Strides: of a row, a position and a head; of out also a split's; of values None where they are
    the keys'.
    """
    if v_strides is None:
        v_strides = k_strides
    if v_cache_strides is None:
        v_cache_strides = k_cache_strides
    ROTATE: tl.constexpr = tables[0] is not None
    tables = (tables[0], tables[1], table_strides[0], table_strides[1])
    tile, kv_head, b = _place(tl.program_id(0), tiles, HK)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    nowhere, no_pages = (0, 0, 0), (0, 0, 0, 0)
    pages = no_pages
    k_base = k_cache_ptr + kv_head * k_cache_strides[2]
    v_base = v_cache_ptr + kv_head * v_cache_strides[2]
    if PAGE > 0:
        table = page_table_ptr + b * page_row
        pages = (table, k_cache_strides[0], v_cache_strides[0], last_page)
    else:
        row = b
        if page_table_ptr is not None:  # one page a row: where it lies is asked once
            row = _page(page_table_ptr + b * page_row, last_page)
        k_base, v_base = k_base + row * k_cache_strides[0], v_base + row * v_cache_strides[0]
    start, length, own, first, prefix, cached = _spans(b, T, spans)
    # A tile past the row's block has nothing to compute; its zeros are written all the same.
    busy = tile * TILE_ROWS < own * G
    begin, end = _share(tl.where(busy, cached + own, 0))

    t, head, asked = _rows(tile, kv_head, own, G, TILE_ROWS)
    q_offset = b * q_strides[0] + t.to(tl.int64) * q_strides[1] + head * q_strides[2]
    position = tl.minimum(start + t, positions - 1)
    q = _queries(q_ptr, q_offset, asked, position, tables, D, TILE_D, NEGATIVE)
    top = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_ROWS,), tl.float32)
    sums = (top, total, tl.zeros((TILE_ROWS, TILE_D), tl.float32))

    at, to = tl.maximum(begin - cached, 0), tl.maximum(end - cached, 0)
    k_own = k_ptr + b * k_strides[0] + kv_head * k_strides[2]
    v_own = v_ptr + b * v_strides[0] + kv_head * v_strides[2]
    fresh = (k_own, v_own, k_strides[1], v_strides[1])
    if ROTATE:
        sums = _fold_rotated(q, sums, fresh, at, to, start, positions, tables, scale, D, TILE_D)
    else:
        sums = _fold_stored(
            q, sums, fresh, at, to, nowhere, no_pages, scale, D, TILE_D, TILE_KEYS, False, 0, STAGES
        )
    at, to = tl.minimum(begin, cached), tl.minimum(end, cached)
    stored = (k_base, v_base, k_cache_strides[1], v_cache_strides[1])
    place = (prefix, first, start + length - prefix)
    sums = _fold_stored(
        q, sums, stored, at, to, place, pages, scale, D, TILE_D, TILE_KEYS, ROTATE, PAGE, STAGES
    )
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    _store(sums, own, out_ptr, lse_ptr, tiles, T, out_strides, lse_split, HK, G, D)


@triton.jit(do_not_specialize=["rows", "T"])
def merge_kernel(
    part_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    rows,
    T,
    out_strides,
    H: tl.constexpr,
    D: tl.constexpr,
    TILE_D: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out = sum_s exp(lse_s - lse) part_s for TILE_ROWS of the B * T * H rows; part [SPLITS, rows,
    D] fp32.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column, split = tl.arange(0, TILE_D), tl.arange(0, TILE_SPLITS)
    real = row < rows
    inside = real[:, None] & (column < D)[None, :]
    index = row.to(tl.int64)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    part_lse = tl.load(
        part_lse_ptr + split.to(tl.int64)[:, None] * rows + index[None, :],
        mask=(split < SPLITS)[:, None] & real[None, :],
        other=float("-inf"),
    )
    top = tl.max(part_lse, 0)
    level = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2((part_lse - level[None, :]) * LOG2E), 0)
    total = tl.where(total == 0, 1.0, total)
    result = tl.zeros([TILE_ROWS, TILE_D], tl.float32)
    # Unrolled: no load of a part waits for another's, nor for the reduction above.
    for s in tl.static_range(SPLITS):
        at = s * tl.cast(rows, tl.int64) + index
        part = tl.load(part_ptr + at[:, None] * D + column[None, :], mask=inside, other=0.0)
        weight = tl.exp2(
            (tl.load(part_lse_ptr + at, mask=real, other=float("-inf")) - level) * LOG2E
        )
        result += part * weight[:, None]
    out_row, out_at, out_head = out_strides
    offset = (
        (row // (H * T)).to(tl.int64) * out_row
        + (row // H % T).to(tl.int64) * out_at
        + (row % H) * out_head
    )
    tl.store(
        out_ptr + offset[:, None] + column[None, :],
        (result / total[:, None]).to(out_ptr.dtype.element_ty),
        mask=inside,
    )
    if lse_ptr is not None:
        tl.store(lse_ptr + index, top + tl.log2(total) * LN2, mask=real)


def supports(x) -> bool:
    """Whether this kernel takes x, an attention.Operands: whatever a kernel can take at all."""
    return True


def launch(x, chosen=None):
    """Run the kernel on x, an attention.Operands, into x.out and x.lse; `chosen`, a Config,
    replaces the one that `config` picks.
    """
    B, T, H, D = x.q.shape
    columns = 1 if x.page_table is None else x.page_table.shape[1]
    capacity = x.k_cache.shape[1] * columns
    chosen = chosen or config(
        B, T, H, x.k.shape[2], D, capacity, x.q.element_size(), chip_of(x.q.device)
    )
    launch_passes(_launch_attention, x, chosen)


def launch_passes(launch_attention, x, chosen):
    """What `chosen` says around one launch of a chip's kernel: the rotation before it, and the
    merge of its parts after it.

    launch_attention: called with x, what it writes, which are x.out and x.lse or fp32 parts of them
    [splits, ...], and chosen.
    """
    with on_device(x.q):
        if chosen.rotate_first and x.cos is not None:
            q, k = rope_to_cache(x.q, x.k, x.v, x.cos, x.sin, x.block_start)
            x = x._replace(q=q, k=k, cos=None, sin=None)
        if chosen.splits == 1:
            launch_attention(x, x.out, x.lse, chosen)
            return
        # From PyTorch's allocator, which keeps what a stream or a captured graph still uses apart:
        # reuse is safe.
        shape, device = (chosen.splits, *x.q.shape), x.q.device
        part = torch.empty(shape, dtype=torch.float32, device=device)
        part_lse = torch.empty(shape[:-1], dtype=torch.float32, device=device)
        launch_attention(x, part, part_lse, chosen)
        _launch_merge(part, part_lse, x.out, x.lse, chosen)


def scale_of(scale):
    """A scale in powers of two, without its sign: that goes into q, so that the largest product is
    the largest score; 0 becomes too small to matter.
    """
    return max(abs(scale) * LOG2E, 1e-37)


def spans_of(x):
    """The spans as kernels take them: block_start, kv_len, kv_start, block_len."""
    return dense(x.block_start), dense(x.kv_len), dense(x.kv_start), dense(x.block_len)


def out_strides_of(out):
    """A row's, a position's and a head's stride of out [B, T, H, D] or of parts [splits, B, T, H,
    D], and a split's.
    """
    return (*out.stride()[-4:-1], out.stride(0) if out.ndim == 5 else 0)


def _launch_attention(x, out, lse, chosen):
    B, T, H, D = x.q.shape
    HK = x.k.shape[2]
    tiles = ceil_div(T * (H // HK), chosen.TILE_ROWS)
    # A table of one column names whole rows: no slot needs to be looked up.
    page = 0 if x.page_table is None or x.page_table.shape[1] == 1 else x.k_cache.shape[1]
    compiling.launch(
        attention_kernel,
        (tiles * B * HK, chosen.splits),
        x.q,
        x.k,
        x.v,
        x.k_cache,
        x.v_cache,
        out,
        lse,
        spans_of(x),
        x.page_table,
        (x.cos, x.sin),
        scale_of(x.scale),
        tiles,
        T,
        0 if x.cos is None else x.cos.shape[0],
        x.q.stride()[:3],
        *_two_strides(x.k, x.v),
        *_two_strides(x.k_cache, x.v_cache),
        out_strides_of(out),
        B * T * H,
        0 if x.page_table is None else x.page_table.stride(0),
        None if x.page_table is None else x.k_cache.shape[0] - 1,
        (0, 0) if x.cos is None else (x.cos.stride(0), x.sin.stride(0)),
        HK=HK,
        G=H // HK,
        D=D,
        TILE_D=_tile_d(D),
        PAGE=page,
        TILE_ROWS=chosen.TILE_ROWS,
        TILE_KEYS=chosen.TILE_KEYS,
        NEGATIVE=x.scale < 0,
        OVERLAP=chosen.overlap,
        STAGES=chosen.num_stages,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        enable_fp_fusion=True,
        **pdl(chosen.overlap),
        **REGISTERS,
    )


def _two_strides(k, v):
    """The first three strides of k, and of v or None where they are equal: one address then serves
    both.
    """
    return k.stride()[:3], None if k.stride() == v.stride() else v.stride()[:3]


def _launch_merge(part, part_lse, out, lse, chosen):
    splits, B, T, H, D = part.shape
    tile_splits, tile_d = power_of_2(splits), _tile_d(D)
    tile_rows = max(1, 512 // tile_d)
    compiling.launch(
        merge_kernel,
        (ceil_div(B * T * H, tile_rows),),
        part,
        part_lse,
        out,
        lse,
        B * T * H,
        T,
        out.stride()[:3],
        H=H,
        D=D,
        TILE_D=tile_d,
        SPLITS=splits,
        TILE_SPLITS=tile_splits,
        TILE_ROWS=tile_rows,
        OVERLAP=chosen.overlap,
        num_warps=4,
        enable_fp_fusion=True,
        **pdl(chosen.overlap),
    )
