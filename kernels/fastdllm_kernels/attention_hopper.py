"""block_attention on Hopper, in Triton's Gluon: one warp streams keys and values, two more rotate
the block's own keys, and one or two consumers of 64 query rows each fold them; or two of the same
64 rows, half of the keys each.

A program owns 64 or 128 of the T * G query rows of one key head and one split of the row's visible
keys, numbered as in attention_triton.py; where there are many such items it is persistent and takes
several. The producer copies tiles of keys and values into a ring in shared memory (TMA) from the
moment it knows the spans, the next item's too; meanwhile the consumers load and rotate their
queries. The block's own keys are the ring's last steps: nothing waits for them. A consumer issues
the products of a tile's scores before those of the last tile's values, so that its exponentials run
beside them: the ring's step i holds the keys of tile i and the values of tile i - 1, which are
wanted and free again at the same time. Two consumers are two partitions of warps, so that one may
multiply while the other is at its exponentials (ping-pong).

What comes before the first product and after the last runs once an item, and its length was seen to
be time: when two consumers wrote the own keys themselves, the kernel was 163 KB of instructions and
rotation cost 9 us an item.

A tile may run past what its row sees, into slots that hold anything: tiles that are not full come
first, their scores are masked, and their values past the end are overwritten by zeros in shared
memory. The parts of several splits are added up by attention_triton's `merge_kernel`: equal inputs
give equal bits, launch after launch.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import attention_triton, compiling
from .attention_triton import launch_passes, out_strides_of, scale_of, spans_of
from .backend import ceil_div, chip_of, pdl

# Names that changed between Triton 3.6 and 3.9.
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
# One meaning for both kernels: the same source, compiled as Gluon.
_product = gluon.jit(attention_triton._product.fn)
_spans = gluon.jit(attention_triton._spans.fn)
_recast = (
    getattr(gl.shared_memory_descriptor, "reinterpret", None)
    or gl.shared_memory_descriptor._reinterpret
)
_gdc_wait, _gdc_launch_dependents = tl.extra.cuda.gdc_wait, tl.extra.cuda.gdc_launch_dependents

MANY = 2**31 - 1
# Of what a descriptor copies; made once, since it takes as long as the rest of a descriptor.
BOX_LAYOUT = gl.NVMMASharedLayout(128, 16, 4)


class _Form(NamedTuple):
    """What the kernel is compiled for, handed to every partition of warps as one constant."""

    HK: int  # key heads
    G: int  # query heads that share a key head
    D: int  # the head dimension
    TILE_KEYS: int  # keys of a tile, which is what a slot of the ring holds
    STAGES: int  # slots of the ring
    CONSUMERS: int  # consumer warpgroups: two of them ping-pong
    HALVE_KEYS: bool  # split-KV inside a program: both consumers have the same rows, half the keys
    TILE_ROWS: int  # query rows that a program owns at a time
    LOAD_ROWS: int  # query rows that a consumer loads and rotates
    NEGATIVE: bool  # the scale is negative, and its sign goes into the queries
    OVERLAP: bool  # PDL: wait on the device for the launch ahead, trigger the one behind
    SPLIT_KV: bool  # axis 1 of the grid splits a row's keys
    PERSISTENT: bool  # a program takes one item after another
    ZERO_FILL: bool  # values past what a row sees may be anything, and are overwritten
    HELPER_REGISTERS: int  # registers of a thread of the warps that are no consumers


@dataclass(frozen=True)
class Config:
    """How one call runs: `CONSUMERS` times 64 query rows and a ring of `num_stages` (3 or more)
    tiles of TILE_KEYS keys a program.

    splits, rotate_first, overlap: as in attention_triton.Config. programs: how many there are at
    most; where there are more tiles each takes several, and asks for the next one's keys while it
    ends one. halve_keys: both consumers have the same 64 rows, half of the keys each and a ring
    each, of 64 keys a tile or more; they add up what they have at the end.
    """

    CONSUMERS: int
    TILE_KEYS: int
    num_stages: int
    splits: int = 1
    rotate_first: bool = False
    overlap: bool = True
    programs: int = MANY
    halve_keys: bool = False


@lru_cache(maxsize=4096)
def config(B, T, H, HK, D, capacity, itemsize, chip) -> Config:
    """The configuration for q [B, T, H, D], k [B, T, HK, D] and `capacity` cached slots a row,
    `itemsize` bytes an element.

    Pure, as attention_triton.config is. Times below: microseconds on an H100 or an H200, each pair
    on one of them; more of them in bench/results/notes.md.
    """
    rows, keys, places = T * (H // HK), max(capacity, T), chip.multiprocessors
    rotate_first = T > 128
    if rows >= 512 and ceil_div(rows, 128) * B * HK >= places:
        # Keys are read once for 128 queries (2,048 queries and keys: 112, one consumer 126).
        return Config(2, 128, 3, 1, True, chip.overlap, places)
    programs = ceil_div(rows, 64) * B * HK
    # A long block fills the GPU without splits; of few keys a few tiles more take less time than a
    # second launch.
    splits = _splits(programs, keys, places) if keys > 256 and T <= 128 else 1
    if programs * splits > places:
        # Two programs take turns: one starts and ends while the other multiplies. Where tiles are
        # full they are persistent (28 over 4 heads, batch 32, 1,024 keys: 39.9 for 41.5); what
        # waits for memory gains nothing by it.
        most = 2 * places if rows >= 64 else MANY
        return Config(1, 64, 3, 1, rotate_first, chip.overlap, most)
    if splits == 1 and rows > 128 and keys >= 896:
        # Three tiles and more share the keys, so that memory does not limit a multiprocessor: it
        # multiplies for one half of them while the other takes exponentials (28 over 4 heads, batch
        # 8, 2,048 keys: 20.7 for 23.3).
        return Config(2, 64, 3, 1, rotate_first, chip.overlap, halve_keys=True)
    # Alone on its multiprocessor nothing else covers the latency of a program's loads, and the ring
    # may be twice as long (28 over 4 heads, batch 8, 1,024 keys: 14.5 for 15.4).
    if rows <= 32 and keys <= 2048:
        # Half of a tile's rows are empty: it waits for memory, and begins sooner with shorter tiles
        # (32 heads, 2,048 keys: 14.0 for 15.0).
        return Config(1, 32, 6, splits, rotate_first, chip.overlap)
    return Config(1, 64, 6, splits, rotate_first, chip.overlap)


def _splits(programs, keys, places):
    """Shares of the keys: no more than give every multiprocessor one program, none under 80 keys,
    and few, since they take time to merge.
    """
    if keys > 2048:
        # 28 over 4 heads, 4,096 keys: 12.1 with 8, 13.1 with 6.
        return max(1, min(places // programs, keys // 80, 8))
    # 28 over 4 heads, 2,048 keys: 10.4 with 6, 11.5 with 8.
    splits = max(1, min(places // programs, keys // 80, 6))
    if splits > 2:
        # Not shorter for the last quarter of the GPU (32 heads, 512 keys: 8.0 with 3, 8.6 with 4).
        splits = min(splits, places * 3 // 4 // programs)
    return splits


@gluon.jit
def _items(items, FORM: gl.constexpr):
    """The range of this program's items: first, end, step."""
    first = gl.program_id(0)
    if FORM.PERSISTENT:
        return first, items, gl.num_programs(0)
    else:
        return first, first + 1, 1


@gluon.jit
def _place(item, tiles, HK: gl.constexpr):
    """(row tile, key head, row of the batch) of an item. In 32 bits, as all that follows from it:
    see `supports`.
    """
    group = item // tiles
    return item % tiles, group % HK, group // HK


@gluon.jit
def _share(b, tile, T, spans, ROTATE: gl.constexpr, KEY_HALF: gl.constexpr, FORM: gl.constexpr):
    """The keys of row b that this program folds, or the KEY_HALF of them that is not None: (block's
    start, its own positions, (first, how many) of the own keys that `_rotate_own` writes, streams).

    streams: the keys that the producer streams, of the prefix, of the suffix and of the block: of
    each (first slot, how many, lowest, end), where the row sees all from lowest to end. A tile that
    is not full begins early rather than run past that end.
    """
    start, length, own, first, prefix, cached = _spans(b, T, spans)
    # A tile past the row's block has nothing to compute; its zeros are written all the same.
    keys = gl.where(tile * FORM.TILE_ROWS < own * FORM.G, cached + own, 0)
    begin, end = 0, keys
    if FORM.SPLIT_KV:
        share = (keys + 16 * gl.num_programs(1) - 1) // (16 * gl.num_programs(1)) * 16
        begin = gl.minimum(gl.program_id(1) * share, keys)
        end = gl.minimum(begin + share, keys)
    if KEY_HALF is not None:
        half = gl.minimum(begin + (end - begin + 31) // 32 * 16, end)
        half = gl.minimum(half, gl.maximum(begin, cached))  # own keys are the second's
        begin, end = (begin, half) if KEY_HALF == 0 else (half, end)
    in_prefix = gl.minimum(begin, prefix)
    in_suffix = gl.maximum(begin, prefix)
    in_own = gl.maximum(begin, cached)
    jump, own_keys = start + length - prefix, gl.maximum(end - in_own, 0)
    written = own_keys if ROTATE else 0
    of_prefix = (first + in_prefix, gl.minimum(end, prefix) - in_prefix, first, first + prefix)
    of_suffix = (
        jump + in_suffix,
        gl.maximum(gl.minimum(end, cached) - in_suffix, 0),
        jump + prefix,
        jump + cached,
    )
    # Past position T there is nothing to read: the copy itself fills in zeros.
    of_own = (in_own - cached, own_keys - written, 0, gl.where(own == T, 2**30, own))
    return start, own, (in_own - cached, written), (of_prefix, of_suffix, of_own)


@gluon.jit
def _counts(streams, TILE_KEYS: gl.constexpr):
    """(streamed tiles that are not full, all streamed tiles)."""
    REST: gl.constexpr = TILE_KEYS - 1
    prefix, suffix, own = streams[0][1], streams[1][1], streams[2][1]
    count = (prefix + REST) // TILE_KEYS + (suffix + REST) // TILE_KEYS + (own + REST) // TILE_KEYS
    return count - prefix // TILE_KEYS - suffix // TILE_KEYS - own // TILE_KEYS, count


@gluon.jit
def _pick(where, prefix, suffix, own):
    """Of three values the one that `where` (0, 1, 2) names."""
    return gl.where(where == 0, prefix, gl.where(where == 1, suffix, own))


@gluon.jit
def _tile(i, streams, TILE_KEYS: gl.constexpr):
    """Streamed tile i: (0 prefix, 1 suffix, 2 own keys; first slot; rows that count: from, to; rows
    that the row sees).

    Tiles that are not full come first: only they are masked.
    """
    first_prefix, prefix, low_prefix, high_prefix = streams[0]
    first_suffix, suffix, low_suffix, high_suffix = streams[1]
    first_own, own, low_own, high_own = streams[2]
    short, _ = _counts(streams, TILE_KEYS)
    full = i - short
    until_suffix = prefix // TILE_KEYS
    until_own = prefix // TILE_KEYS + suffix // TILE_KEYS
    short_prefix = (prefix % TILE_KEYS > 0).to(gl.int32)
    short_suffix = short_prefix + (suffix % TILE_KEYS > 0).to(gl.int32)
    where = gl.where(
        i < short,
        (i >= short_prefix).to(gl.int32) + (i >= short_suffix).to(gl.int32),
        (full >= until_suffix).to(gl.int32) + (full >= until_own).to(gl.int32),
    )
    first = _pick(where, first_prefix, first_suffix, first_own)
    keys = _pick(where, prefix, suffix, own)
    index = gl.where(i < short, keys // TILE_KEYS, full - _pick(where, 0, until_suffix, until_own))
    end, first = first + keys, first + index * TILE_KEYS
    high = _pick(where, high_prefix, high_suffix, high_own)
    slot = gl.minimum(first, high - TILE_KEYS)
    slot = gl.maximum(slot, _pick(where, low_prefix, low_suffix, low_own))
    return where, slot, first - slot, gl.minimum(end, first + TILE_KEYS) - slot, high - slot


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The ring's slot after `stage`, and the parity of its round."""
    stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    return stage, gl.where(stage == 0, phase ^ 1, phase)


@gluon.jit
def _pass_by(stage, phase, empty, steps, STAGES: gl.constexpr):
    """Leave out steps that another partition fills; waited for all the same: a barrier tells only
    even rounds from odd.
    """
    for left in range(steps):  # noqa: B007
        mbarrier.wait(empty.index(stage), phase)
        stage, phase = _next(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _produce(
    ring, cached, spans, sizes, ROTATE: gl.constexpr, KEY_HALF: gl.constexpr, FORM: gl.constexpr
):
    """The producer warp: stream the share's cached keys and values (and its own, if nothing rotates
    them) into the ring, step after step.
    """
    k_ring, v_ring, ready, empty = ring
    k_cache, v_cache, k, v, page_table_ptr, page_row = cached
    tiles, items, T, _ = sizes
    if FORM.OVERLAP:
        _gdc_wait()
    stage, phase = 0, 1
    first, end, step = _items(items, FORM)
    for item in range(first, end, step):
        tile, head, b = _place(item, tiles, FORM.HK)
        row = b
        if page_table_ptr is not None:  # one page a row: where it lies is asked once
            row = gl.load(page_table_ptr + b * page_row)
            row = gl.minimum(gl.maximum(row, 0), k_cache.shape[0] - 1)
        _, _, written, streams = _share(b, tile, T, spans, ROTATE, KEY_HALF, FORM)
        _, count = _counts(streams, FORM.TILE_KEYS)
        last_where, last_slot = 0, 0
        for i in range(0, gl.where(count > 0, count + 1, 0)):
            where, slot, _, _, _ = _tile(i, streams, FORM.TILE_KEYS)
            mbarrier.wait(empty.index(stage), phase)
            at, last_at = (row, b, where, slot, head), (row, b, last_where, last_slot, head)
            _fetch(i < count, k_cache, k, at, ready.index(stage), k_ring.index(stage), ROTATE)
            _fetch(i > 0, v_cache, v, last_at, ready.index(stage), v_ring.index(stage), ROTATE)
            stage, phase = _next(stage, phase, FORM.STAGES)
            last_where, last_slot = where, slot
        if FORM.PERSISTENT:
            stage, phase = _pass_by(stage, phase, empty, (written[1] + 31) // 32, FORM.STAGES)
    if FORM.OVERLAP:
        _gdc_launch_dependents()


@gluon.jit
def _fetch(real, cache, fresh, at, full, to, ROTATE: gl.constexpr):
    """Begin to copy a `real` tile that starts at `slot` of a row of the cache or, where nothing
    rotates, of the own keys. at: (row of the cache, row of the batch, where, slot, head).
    """
    TILE_KEYS: gl.constexpr = to.shape[0]
    D: gl.constexpr = to.shape[1]
    row, b, where, slot, head = at
    if real:
        mbarrier.expect(full, 2 * TILE_KEYS * D)
        if ROTATE:
            _copy(cache, [row, slot, head, 0], full, to.reshape([1, TILE_KEYS, 1, D]))
        else:
            if where < 2:
                _copy(cache, [row, slot, head, 0], full, to.reshape([1, TILE_KEYS, 1, D]))
            else:
                _copy(fresh, [b, slot, head, 0], full, to.reshape([1, TILE_KEYS, 1, D]))
    else:
        mbarrier.arrive(full, count=1)


@gluon.jit
def _halves(x_ptr, offset, HALF_D: gl.constexpr, LAYOUT: gl.constexpr):
    """Both halves of the rows at `offset`."""
    x = x_ptr + offset[:, None] + gl.arange(0, HALF_D, gl.SliceLayout(0, LAYOUT))[None, :]
    return gl.load(x), gl.load(x + HALF_D)


@gluon.jit
def _angles(tables, position, HALF_D: gl.constexpr, LAYOUT: gl.constexpr):
    """The cosines and sines of rows at `position`."""
    cos_ptr, sin_ptr, cos_at, sin_at = tables
    at, column = position[:, None], gl.arange(0, HALF_D, gl.SliceLayout(0, LAYOUT))[None, :]
    return gl.load(cos_ptr + at * cos_at + column), gl.load(sin_ptr + at * sin_at + column)


@gluon.jit
def _rotated(halves, angles):
    """The rotated rows, with every operation rounded to the tables' dtype, as PyTorch does it."""
    first, second = halves
    cos, sin = angles
    left = _product(first, cos) - _product(second, sin)
    right = _product(second, cos) + _product(first, sin)
    return _from_halves(left.to(cos.dtype).to(first.dtype), right.to(cos.dtype).to(first.dtype))


@gluon.jit
def _from_halves(left, right):
    """Rows of which the halves are given."""
    return gl.reshape(
        gl.permute(gl.join(left, right), (0, 2, 1)), (left.shape[0], 2 * left.shape[1])
    )


@gluon.jit
def _zero_fill(v, rows):
    """Zeros in the rows of v from `rows` on: what lies there may be NaN. The other consumer may
    write the same.
    """
    ALL: gl.constexpr = v.shape[0]
    D: gl.constexpr = v.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    row = gl.arange(0, 16, gl.SliceLayout(1, LAYOUT))[:, None]
    for at in gl.static_range(0, ALL, 16):  # in parts, which need fewer registers
        if rows < at + 16:
            part = v.slice(at, 16, 0)
            part.store(gl.where(row < rows - at, part.load(LAYOUT), 0.0))
    fence_async_shared()
    _barrier()


@gluon.jit
def _weights(s, top, total, scale, low, high, MASKED: gl.constexpr):
    """Fold scores into the running maximum and sums, in powers of two: (weights, new maximum, sums,
    what sums shrink by).

    The four lanes of a row each keep a sum of their own; weights [row, 8 columns, lane, neighbour]
    are for `_packed`.
    """
    COLUMNS: gl.constexpr = s.shape[1]
    LANES: gl.constexpr = total.type.layout
    if MASKED:
        column = gl.arange(0, COLUMNS, gl.SliceLayout(0, s.type.layout))
        s = gl.where(((column >= low) & (column < high))[None, :], s, float("-inf"))
    # Neighbours first, then a lane's others, then lanes: no chain of dependent steps is longer than
    # it must be.
    highest = gl.max(gl.max(gl.max(gl.reshape(s, [64, COLUMNS // 8, 4, 2]), 3), 1), 1)
    new_top = gl.maximum(top, gl.convert_layout(highest, top.type.layout) * scale)
    weights = gl.reshape(gl.exp2(s * scale - new_top[:, None]), [64, COLUMNS // 8, 4, 2])
    shrink = gl.exp2(top - new_top)
    total = total * gl.convert_layout(shrink, gl.SliceLayout(1, LANES))[:, None]
    total += gl.convert_layout(gl.sum(gl.sum(weights, 3), 1), LANES)
    return weights, new_top, total, shrink


@gluon.jit
def _packed(weights, DTYPE: gl.constexpr):
    """Weights of neighbours in pairs, as products read them; carried one by one, a loop takes them
    apart and packs again.
    """
    left, right = gl.split(weights)
    if DTYPE == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [left, right], gl.int32, True, 1
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [left, right], gl.int32, True, 1
        )


@gluon.jit
def _unpacked(pairs, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """Weights [64, keys] of `_packed` pairs."""
    left, right = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs], (gl.int16, gl.int16), True, 1
    )
    left, right = left.to(DTYPE, bitcast=True), right.to(DTYPE, bitcast=True)
    return gl.convert_layout(gl.reshape(gl.join(left, right), [64, 8 * pairs.shape[1]]), LAYOUT)


@gluon.jit
def _fold(
    i,
    stage,
    phase,
    streams,
    q,
    ring,
    pairs,
    acc,
    top,
    total,
    scale,
    ZERO_FILL: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Step i, which is there: scores and weights of tile i beside the product of the weights and
    values of tile i - 1.
    """
    k_ring, v_ring, ready, empty = ring
    STAGES: gl.constexpr = k_ring.shape[0]
    TILE_KEYS: gl.constexpr = k_ring.shape[1]
    DTYPE: gl.constexpr = k_ring.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_KEYS, 16])
    p = _unpacked(pairs, DTYPE, gl.DotOperandLayout(0, acc.type.layout, 2))
    zeros = gl.zeros([64, TILE_KEYS], gl.float32, SCORES)
    s = warpgroup_mma(q, k_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    acc = warpgroup_mma(p, v_ring.index(stage), acc, is_async=True)
    low, high, seen = 0, TILE_KEYS, TILE_KEYS
    if MASKED:
        _, _, low, high, seen = _tile(i, streams, TILE_KEYS)
    s = warpgroup_mma_wait(1, deps=[s])
    weights, top, total, shrink = _weights(s, top, total, scale, low, high, MASKED)
    if TILE_KEYS > 64:  # no registers are left to hold the weights of so many keys for long
        pairs = _packed(weights, DTYPE)
    next_stage, phase = _next(stage, phase, STAGES)
    # Not before: the assembler moves exponentials past a wait for products, but not past this loop.
    mbarrier.wait(ready.index(next_stage), phase)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(stage), count=1)
    if MASKED and ZERO_FILL:
        if seen < TILE_KEYS:
            _zero_fill(v_ring.index(next_stage), seen)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    if TILE_KEYS <= 64:
        pairs = _packed(weights, DTYPE)
    return next_stage, phase, pairs, acc, top, total


@gluon.jit
def _rotate_own(
    ring, fresh, tables, strides, spans, sizes, KEY_HALF: gl.constexpr, FORM: gl.constexpr
):
    """The warps that rotate, where there are tables: fill an item's last steps with own keys,
    rotated, and their values, 32 a step.
    """
    k_ring, v_ring, ready, empty = ring
    tiles, items, T, last_position = sizes
    k_strides, v_strides = strides[1], strides[2]
    D: gl.constexpr = FORM.D
    HALVES: gl.constexpr = gl.BlockedLayout([1, 8], [512 // D, D // 16], [2, 1], [1, 0])
    if tables[0] is not None:
        if FORM.OVERLAP:
            _gdc_wait()
        stage, phase = 0, 1
        first, end, step = _items(items, FORM)
        for item in range(first, end, step):
            tile, kv_head, b = _place(item, tiles, FORM.HK)
            start, own, written, streams = _share(b, tile, T, spans, True, KEY_HALF, FORM)
            streamed = _counts(streams, FORM.TILE_KEYS)[1]
            steps = gl.where(streamed > 0, streamed + 1, 0)
            stage, phase = _pass_by(stage, phase, empty, steps, FORM.STAGES)
            k_from = fresh[0] + b * k_strides[0] + kv_head * k_strides[2]
            v_from = fresh[1] + b * v_strides[0] + kv_head * v_strides[2]
            for at in range(0, written[1], 32):
                mbarrier.wait(empty.index(stage), phase)
                # More than 16 keys at once would not fit this partition's registers.
                for some in gl.static_range(0, 32, 16):
                    # Past the last key the last again: no value may be NaN.
                    key = at + some + gl.arange(0, 16, gl.SliceLayout(1, HALVES))
                    row = written[0] + gl.minimum(key, written[1] - 1)
                    values = _halves(v_from, row * v_strides[1], D // 2, HALVES)
                    values = _from_halves(values[0], values[1])
                    v_ring.index(stage).slice(some, 16, 0).store(values)
                    halves = _halves(k_from, row * k_strides[1], D // 2, HALVES)
                    position = gl.minimum(start + row, last_position)
                    keys = _rotated(halves, _angles(tables, position, D // 2, HALVES))
                    k_ring.index(stage).slice(some, 16, 0).store(keys)
                fence_async_shared()
                _barrier()
                mbarrier.arrive(ready.index(stage), count=2)
                stage, phase = _next(stage, phase, FORM.STAGES)


@gluon.jit
def _fold_own(q, k, v, keys, top, total, acc, scale):
    """Own keys, of which `keys` count, into the running maximum, sums and weighted values; whoever
    reads k and v is done.
    """
    SUMS: gl.constexpr = acc.type.layout
    KEYS: gl.constexpr = k.shape[0]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    zeros = gl.zeros([64, KEYS], gl.float32, SCORES)
    s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    top = gl.convert_layout(top, gl.SliceLayout(1, SCORES))
    weights, top, total, shrink = _weights(s, top, total, scale, 0, keys, True)
    p = _unpacked(_packed(weights, k.dtype), k.dtype, gl.DotOperandLayout(0, SUMS, 2))
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]
    acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(p, v, acc, is_async=True)])
    return gl.convert_layout(top, gl.SliceLayout(1, SUMS)), total, acc


@gluon.jit
def _fold_streamed(q, ring, stage, phase, streams, top, total, acc, scale, ZERO_FILL: gl.constexpr):
    """The queries over an item's streamed steps: the step after them and its parity; running
    maximum, sums, weighted values.
    """
    k_ring, v_ring, ready, empty = ring
    STAGES: gl.constexpr = k_ring.shape[0]
    TILE_KEYS: gl.constexpr = k_ring.shape[1]
    SUMS: gl.constexpr = acc.type.layout
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_KEYS, 16])
    short, count = _counts(streams, TILE_KEYS)
    top = gl.convert_layout(top, gl.SliceLayout(1, SCORES))
    if count > 0:
        mbarrier.wait(ready.index(stage), phase)
        _, _, low, high, seen = _tile(0, streams, TILE_KEYS)
        zeros = gl.zeros([64, TILE_KEYS], gl.float32, SCORES)
        k = k_ring.index(stage).permute((1, 0))
        s = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(empty.index(stage), count=1)
        weights, top, total, shrink = _weights(s, top, total, scale, low, high, True)
        pairs = _packed(weights, k_ring.dtype)
        stage, phase = _next(stage, phase, STAGES)
        mbarrier.wait(ready.index(stage), phase)
        if ZERO_FILL:
            if seen < TILE_KEYS:
                _zero_fill(v_ring.index(stage), seen)
        for i in range(1, short):
            stage, phase, pairs, acc, top, total = _fold(
                i, stage, phase, streams, q, ring, pairs, acc, top, total, scale, ZERO_FILL, True
            )
        for i in range(gl.maximum(short, 1), count):
            stage, phase, pairs, acc, top, total = _fold(
                i, stage, phase, streams, q, ring, pairs, acc, top, total, scale, ZERO_FILL, False
            )
        p = _unpacked(pairs, k_ring.dtype, gl.DotOperandLayout(0, SUMS, 2))
        acc = warpgroup_mma(p, v_ring.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = _next(stage, phase, STAGES)
    return stage, phase, gl.convert_layout(top, gl.SliceLayout(1, SUMS)), total, acc


@gluon.jit
def _load_queries(first_row, place, q_ptr, q, work, KEY_HALF: gl.constexpr, FORM: gl.constexpr):
    """An item's queries, rotated, into q. Returns its own positions, how many own keys it folds,
    and its `_share` in streams.
    """
    tables, strides, _, _, exchange, spans, sizes = work
    tile, kv_head, b = place
    T, last_position = sizes[2], sizes[3]
    D: gl.constexpr = FORM.D
    G: gl.constexpr = FORM.G
    ROTATE: gl.constexpr = tables[0] is not None
    HALVES: gl.constexpr = gl.BlockedLayout([1, 8], [512 // D, D // 16], [4, 1], [1, 0])
    WHOLE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    LAYOUT: gl.constexpr = HALVES if ROTATE else WHOLE
    # Two consumers of the same rows share the work.
    FIRST: gl.constexpr = FORM.LOAD_ROWS if KEY_HALF == 1 else 0
    row = first_row + FIRST + gl.arange(0, FORM.LOAD_ROWS, gl.SliceLayout(1, LAYOUT))
    t = gl.minimum(row // G, T - 1)  # rows past the last read the last again, and are not written
    q_row, q_at, q_head = strides[0]
    q_ptr += b * q_row + kv_head * G * q_head
    offset = t * q_at + row % G * q_head
    # What needs no spans is on its way before they are here.
    if ROTATE:
        halves = _halves(q_ptr, offset, D // 2, HALVES)
    else:
        column = gl.arange(0, D, gl.SliceLayout(0, WHOLE))[None, :]
        queries = gl.load(q_ptr + offset[:, None] + column)
    start, own, written, streams = _share(b, tile, T, spans, ROTATE, KEY_HALF, FORM)
    if ROTATE:
        position = gl.minimum(start + t, last_position)
        queries = _rotated(halves, _angles(tables, position, D // 2, HALVES))
    if FORM.NEGATIVE:
        queries = -queries
    if FORM.PERSISTENT:  # the last item's result was read from there
        _barrier()
    q.slice(FIRST, FORM.LOAD_ROWS, 0).store(queries)
    fence_async_shared()
    _barrier()
    if KEY_HALF is not None:
        queries_are_there = exchange[0].index(0)
        mbarrier.arrive(queries_are_there, count=1)
        mbarrier.wait(queries_are_there, 0)
    return own, written[1], streams


@gluon.jit
def _fold_all(
    q,
    ring,
    stage,
    phase,
    streams,
    own_keys,
    scale,
    SUMS: gl.constexpr,
    ROTATE: gl.constexpr,
    ZERO_FILL: gl.constexpr,
):
    """The queries over an item's steps of the ring: the step after them and its parity; maximum,
    sum and weighted values.
    """
    k_ring, v_ring, ready, empty = ring
    STAGES: gl.constexpr = k_ring.shape[0]
    D: gl.constexpr = k_ring.shape[2]
    # How a row's columns lie on four lanes in scores and sums.
    LANES: gl.constexpr = gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )
    top = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SUMS))
    lanes, acc = gl.zeros([64, 4], gl.float32, LANES), gl.zeros([64, D], gl.float32, SUMS)
    stage, phase, top, lanes, acc = _fold_streamed(
        q, ring, stage, phase, streams, top, lanes, acc, scale, ZERO_FILL
    )
    if ROTATE:
        for at in range(0, own_keys, 32):
            mbarrier.wait(ready.index(stage), phase)
            k_own, v_own = k_ring.index(stage).slice(0, 32, 0), v_ring.index(stage).slice(0, 32, 0)
            top, lanes, acc = _fold_own(q, k_own, v_own, own_keys - at, top, lanes, acc, scale)
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = _next(stage, phase, STAGES)
    total = gl.convert_layout(gl.sum(lanes, 1), gl.SliceLayout(1, SUMS))
    return stage, phase, (top, total, acc)


@gluon.jit
def _consume(
    ring,
    q_ptr,
    q,
    work,
    CONSUMER: gl.constexpr,
    KEY_HALF: gl.constexpr,
    FORM: gl.constexpr,
):
    """A consumer: 64 query rows, the CONSUMER-th of each of the program's items, over the steps of
    the ring.

    work: (tables, strides, (out, lse, stride of a split of lse), scale, what two halves of the keys
    exchange, spans, sizes).
    """
    tables, strides, results, scale, exchange, spans, sizes = work
    tiles, items, T, _ = sizes
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FORM.D, 16])
    ROTATE: gl.constexpr = tables[0] is not None and KEY_HALF != 0
    if FORM.OVERLAP:
        _gdc_wait()
    stage, phase = 0, 0
    first, end, step = _items(items, FORM)
    for item in range(first, end, step):
        place = _place(item, tiles, FORM.HK)
        first_row = place[0] * FORM.TILE_ROWS + CONSUMER * 64
        own, own_keys, streams = _load_queries(first_row, place, q_ptr, q, work, KEY_HALF, FORM)
        stage, phase, sums = _fold_all(
            q, ring, stage, phase, streams, own_keys, scale, SUMS, ROTATE, FORM.ZERO_FILL
        )
        if KEY_HALF == 1:
            _hand_over(sums, exchange)
        else:
            if KEY_HALF == 0:
                sums = _merge_halves(sums, exchange)
            # Axis 2 has one program: its 0 makes these new values, where the same from above would
            # hold registers in the loops.
            place = _place(item + gl.program_id(2), tiles, FORM.HK)
            first_row = place[0] * FORM.TILE_ROWS + CONSUMER * 64
            _store(sums, first_row, place, own, q, results, strides[3], T, FORM)


@gluon.jit
def _hand_over(sums, exchange):
    """The second half's maximum, sum and weighted values to the first's consumer."""
    barriers, values, rows = exchange
    top, total, acc = sums
    values.store(acc)
    rows.index(0).store(top)
    rows.index(1).store(total)
    _barrier()
    mbarrier.arrive(barriers.index(1), count=1)


@gluon.jit
def _merge_halves(sums, exchange):
    """The first half's maximum, sum and weighted values with the second's."""
    barriers, values, rows = exchange
    top, total, acc = sums
    ROW: gl.constexpr = top.type.layout
    mbarrier.wait(barriers.index(1), 0)
    other = rows.index(0).load(ROW)
    high = gl.maximum(gl.maximum(top, other), -1e38)  # of nothing visible remains nothing
    mine, others = gl.exp2(top - high), gl.exp2(other - high)
    acc = acc * mine[:, None] + values.load(acc.type.layout) * others[:, None]
    return gl.maximum(top, other), total * mine + rows.index(1).load(ROW) * others, acc


@gluon.jit
def _store(sums, first_row, place, own, q, results, out_strides, T, FORM: gl.constexpr):
    """An item's result and log-sum-exp; q is free by now."""
    out_ptr, lse_ptr, lse_split = results
    top, total, acc = sums
    _, kv_head, b = place
    # Here, not outside: a launch compares every global that a kernel reads.
    LN2: gl.constexpr = 0.6931471805599453
    D: gl.constexpr = FORM.D
    G: gl.constexpr = FORM.G
    SUMS: gl.constexpr = acc.type.layout
    WHOLE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    split, total = gl.program_id(1), gl.where(total == 0, 1.0, total)
    result = acc * (1.0 / total)[:, None]
    if lse_ptr is not None:
        row = first_row + gl.arange(0, 64, gl.SliceLayout(1, SUMS))
        lse = gl.where(row < own * G, (top + gl.log2(total)) * LN2, float("-inf"))
        lse_ptr += split * lse_split + kv_head * G
        gl.store(lse_ptr + (b * T + row // G) * (FORM.HK * G) + row % G, lse, mask=row // G < T)
    out_row, out_at, out_head, out_split = out_strides
    out_ptr += split * out_split + b * out_row + kv_head * G * out_head
    if FORM.SPLIT_KV:
        _write(result, out_ptr, first_row, own, T, out_at, out_head, G, SUMS)
    else:  # through shared memory, so that a thread writes 16 bytes
        q.store(result.to(q.dtype))
        _barrier()
        _write(q.load(WHOLE), out_ptr, first_row, own, T, out_at, out_head, G, WHOLE)


@gluon.jit
def _write(
    result, out_ptr, first_row, own, T, out_at, out_head, G: gl.constexpr, LAYOUT: gl.constexpr
):
    """64 rows of the result, zeros where they lie past the row's block."""
    D: gl.constexpr = result.shape[1]
    row = first_row + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
    to = out_ptr + (row // G * out_at + row % G * out_head)[:, None] + column
    gl.store(to, result.to(out_ptr.dtype.element_ty), mask=(row < own * G)[:, None] & (column < D))
    if own < gl.minimum(T, (first_row + 63) // G + 1):
        past = ((row >= own * G) & (row < T * G))[:, None] & (column < D)
        gl.store(to, gl.zeros_like(result).to(out_ptr.dtype.element_ty), mask=past)


@gluon.jit
def _ring(DTYPE: gl.constexpr, READERS: gl.constexpr, FORM: gl.constexpr):
    """(keys, values, barriers of steps that are ready, of steps that are empty)."""
    STAGES: gl.constexpr = FORM.STAGES
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    keys = gl.allocate_shared_memory(DTYPE, [STAGES, FORM.TILE_KEYS, FORM.D], LAYOUT)
    values = gl.allocate_shared_memory(DTYPE, [STAGES, FORM.TILE_KEYS, FORM.D], LAYOUT)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=2)  # keys and values
        mbarrier.init(empty.index(stage), count=READERS)
    return keys, values, ready, empty


@gluon.jit
def _exchange(ring, D: gl.constexpr):
    """What the consumers of two halves of the keys tell each other: (barriers, weighted values,
    maxima and sums of rows).

    The values lie where the second half's ring has its first keys, which have been read by then.
    """
    # A thread's sums, four beside each other.
    FOURS: gl.constexpr = [[0, 1], [8, 0], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    REST: gl.constexpr = [[16, 0], [32, 0], [0, 8], [0, 16], [0, 32]]
    LAYOUT: gl.constexpr = gl.SharedLinearLayout(FOURS + REST + ([[0, 64]] if D == 128 else []))
    barriers = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(barriers.index(0), count=2)  # queries are there
    mbarrier.init(barriers.index(1), count=1)  # what the second has is there
    rows = gl.allocate_shared_memory(gl.float32, [2, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return barriers, _recast(ring[0], gl.float32, [64, D], LAYOUT), rows


@gluon.jit(do_not_specialize=["tiles", "items", "T", "last_position", "lse_split"])
def attention_hopper_kernel(
    q,
    k,
    v,
    k_cache,
    v_cache,
    out,
    lse,
    spans,
    page_table,
    tables,
    scale,
    tiles,
    items,
    T,
    last_position,
    page_row,
    lse_split,
    strides,
    FORM: gl.constexpr,
):
    """Row tiles of key heads (axis 0, `items` in all, tiles fastest so that they share keys in L2)
    and one split (axis 1).

    spans: block_start, kv_len, kv_start, block_len. tables: cos, sin and their strides. k, v:
    pointers where there are tables, otherwise descriptors. strides: of q, k, v and out, three each,
    and out's of a split.
    """
    DTYPE: gl.constexpr = q.dtype.element_ty
    ROTATE: gl.constexpr = tables[0] is not None
    ROW_TILES: gl.constexpr = FORM.TILE_ROWS // 64
    HELPERS: gl.constexpr = FORM.HELPER_REGISTERS
    # Registers of a thread of the second consumer: half of what the others leave of the 504 that
    # three warpgroups have.
    SECOND: gl.constexpr = (504 - HELPERS) // 16 * 8
    cached = (k_cache, v_cache, k, v, page_table, page_row)
    results = (out, lse, lse_split)
    sizes = (tiles, items, T, last_position)
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    queries = gl.allocate_shared_memory(DTYPE, [ROW_TILES, 64, FORM.D], LAYOUT)
    first, ring = queries.index(0), _ring(DTYPE, ROW_TILES, FORM)
    if FORM.HALVE_KEYS:
        second_ring = _ring(DTYPE, 1, FORM)
        exchange = _exchange(second_ring, FORM.D)
        work = (tables, strides, results, scale, exchange, spans, sizes)
    else:
        work = (tables, strides, results, scale, None, spans, sizes)
    fence_async_shared()
    if FORM.CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume, (ring, q, first, work, 0, None, FORM)),
                (_produce, (ring, cached, spans, sizes, ROTATE, None, FORM)),
                (_rotate_own, (ring, (k, v), tables, strides, spans, sizes, None, FORM)),
            ],
            [1, 2],
            [HELPERS, HELPERS],
        )
    elif FORM.HALVE_KEYS:
        gl.warp_specialize(
            [
                (_consume, (ring, q, first, work, 0, 0, FORM)),
                (_consume, (second_ring, q, first, work, 0, 1, FORM)),
                (_produce, (ring, cached, spans, sizes, ROTATE, 0, FORM)),
                (_produce, (second_ring, cached, spans, sizes, ROTATE, 1, FORM)),
                (_rotate_own, (second_ring, (k, v), tables, strides, spans, sizes, 1, FORM)),
            ],
            [4, 1, 1, 2],
            [SECOND, HELPERS, HELPERS, HELPERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (ring, q, first, work, 0, None, FORM)),
                (_consume, (ring, q, queries.index(1), work, 1, None, FORM)),
                (_produce, (ring, cached, spans, sizes, ROTATE, None, FORM)),
                (_rotate_own, (ring, (k, v), tables, strides, spans, sizes, None, FORM)),
            ],
            [4, 1, 2],
            [SECOND, HELPERS, HELPERS],
        )


def supports(x) -> bool:
    """Whether this kernel takes x, an attention.Operands: 16-bit, D of 64 or 128, whole cache rows,
    what TMA reads in 16-byte steps, and but for the cache what 32 bits can count.
    """
    if x.q.element_size() != 2 or x.q.shape[-1] not in (64, 128):
        return False
    if x.page_table is not None and x.page_table.shape[1] != 1:
        return False
    streamed = (x.k_cache, x.v_cache, x.k, x.v) if x.cos is None else (x.k_cache, x.v_cache)
    return all(map(_aligned, streamed)) and all(map(_in_32_bits, (x.q, x.k, x.v, x.out)))


def _aligned(x):
    strides = zip(x.stride()[:3], x.shape, strict=False)
    return x.data_ptr() % 16 == 0 and all((s > 0 and s % 8 == 0) or n == 1 for s, n in strides)


def _in_32_bits(x):
    return sum(n * s for n, s in zip(x.shape, x.stride(), strict=True)) < 2**31


def launch(x, chosen=None):
    """Run the kernel on x, an attention.Operands, into x.out and x.lse; `chosen`, a Config,
    replaces the one that `config` picks.
    """
    B, T, H, D = x.q.shape
    chosen = chosen or config(
        B, T, H, x.k.shape[2], D, x.k_cache.shape[1], x.q.element_size(), chip_of(x.q.device)
    )
    launch_passes(_launch_attention, x, chosen)


def _launch_attention(x, out, lse, chosen):
    B, T, H, D = x.q.shape
    HK = x.k.shape[2]
    tile_rows = 64 if chosen.halve_keys else 64 * chosen.CONSUMERS
    tiles = ceil_div(T * (H // HK), tile_rows)
    items = tiles * B * HK
    form, most_registers = _form(x, chosen, tile_rows, items)
    fresh, tables = (x.k, x.v), (None,) * 4
    # No slot of an empty cache is read, but a descriptor must name some memory.
    k_cache, v_cache = (x.k_cache, x.v_cache) if x.k_cache.numel() else fresh
    if x.cos is None:
        fresh = _descriptor(x.k, chosen), _descriptor(x.v, chosen)
    else:
        tables = x.cos, x.sin, x.cos.stride(0), x.sin.stride(0)
    compiling.launch(
        attention_hopper_kernel,
        (chosen.programs if form.PERSISTENT else items, chosen.splits),
        x.q,
        *fresh,
        _descriptor(k_cache, chosen),
        _descriptor(v_cache, chosen),
        out,
        lse,
        spans_of(x),
        x.page_table,
        tables,
        scale_of(x.scale),
        tiles,
        items,
        T,
        0 if x.cos is None else x.cos.shape[0] - 1,
        0 if x.page_table is None else x.page_table.stride(0),
        B * T * H,
        (x.q.stride()[:3], x.k.stride()[:3], x.v.stride()[:3], out_strides_of(out)),
        FORM=form,
        num_warps=4,
        enable_fp_fusion=True,
        **pdl(chosen.overlap),
        **most_registers,
    )


def _form(x, chosen, tile_rows, items):
    """The kernel's constants for `items` tiles of tile_rows rows, and the launch option that bounds
    its registers.
    """
    G = x.q.shape[2] // x.k.shape[2]
    load_rows = 32 if x.q.shape[1] * G <= 32 else 64
    # Without cached keys, and where no row is shorter, all that a tile runs into is the end of k
    # and v, which TMA makes zeros.
    zero_fill = x.k_cache.shape[1] > 0 or x.block_len is not None
    # Two consumers take one item each: filling in zeros for several Triton 3.9 would spill
    # registers, and the barriers between halves of the keys are of one round.
    one_item = chosen.CONSUMERS == 2 and (zero_fill or chosen.halve_keys)
    helper_registers, most_registers = _registers(chosen, x.cos)
    form = _Form(
        HK=x.k.shape[2],
        G=G,
        D=x.q.shape[3],
        TILE_KEYS=chosen.TILE_KEYS,
        STAGES=chosen.num_stages,
        CONSUMERS=chosen.CONSUMERS,
        HALVE_KEYS=chosen.halve_keys,
        TILE_ROWS=tile_rows,
        LOAD_ROWS=load_rows // 2 if chosen.halve_keys else load_rows,
        NEGATIVE=x.scale < 0,
        OVERLAP=chosen.overlap,
        SPLIT_KV=chosen.splits > 1,
        PERSISTENT=items > chosen.programs and not one_item,
        ZERO_FILL=zero_fill,
        HELPER_REGISTERS=helper_registers,
    )
    return form, most_registers


def _registers(chosen, table):
    """(registers of a thread of the warps that are no consumers, launch option that bounds those
    all start with). With others than these Triton 3.9 spills some.
    """
    bound, rotating = {}, 88
    if chosen.CONSUMERS == 1:
        # Two programs of one consumer and a short ring share a multiprocessor.
        two = chosen.num_stages <= 3
        bound = {"maxnreg": 128 if two else 224}
        rotating = 88 if two else 168
    elif chosen.halve_keys and table is not None:
        rotating = 112 if table.element_size() == 4 else 104
    return 24 if table is None else rotating, bound


def _descriptor(x, chosen):
    """A box of TILE_KEYS rows of one head of x [B, S, HK, D]."""
    strides = [s if n > 1 else x.shape[-1] for s, n in zip(x.stride(), x.shape, strict=True)]
    box = [1, chosen.TILE_KEYS, 1, x.shape[-1]]
    return TensorDescriptor(x, list(x.shape), [*strides[:3], 1], box, BOX_LAYOUT)
