"""Triton kernels behind pointwise.py: one launch each, every tensor read and written once.

Results are rounded where the references round: rms_norm casts x * scale before the weight, swiglu
casts silu(gate) before the product, rope_to_cache rounds to the tables' dtype after every
operation. What these kernels cost is memory traffic and the ramp of a launch, so a program takes
one row, or a few heads of one position, and a thread moves 16 bytes at a time.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import compiling
from .backend import Chip, ceil_div, chip_of, dense, on_device, pdl, power_of_2, rows_of

# A row of up to this many values is held in registers (32 fp32 a thread); a wider one is read
# twice.
WIDEST_ROW = 16384


@dataclass(frozen=True)
class RowConfig:
    """TILE values of a row at a time. overlap: the launch may begin before what runs ahead of it
    ends.
    """

    TILE: int
    num_warps: int
    overlap: bool = False


@dataclass(frozen=True)
class RopeConfig:
    """TILE_H heads of one position in a program."""

    TILE_H: int
    num_warps: int


def rms_norm_config(width: int, chip: Chip) -> RowConfig:
    """The whole row if it fits; 8 values a thread, so that every operand is one 16-byte load in
    flight.
    """
    tile = power_of_2(width) if width <= WIDEST_ROW else 4096
    return RowConfig(tile, min(16, max(1, tile // 256)), chip.overlap)


def swiglu_config(width: int, chip: Chip) -> RowConfig:
    """1024 values: 32 rows of LLaDA's 12288 are 384 programs, enough to keep every multiprocessor
    loading.
    """
    tile = min(1024, power_of_2(width))
    return RowConfig(tile, max(1, tile // 256), chip.overlap)


def rope_to_cache_config(heads: int, kv_heads: int, half: int) -> RopeConfig:
    """16 heads (4 warps at D 128) where there are as many key heads; fewer where grouping leaves
    few, so lanes do not idle.
    """
    tile_h = min(16, power_of_2(kv_heads)) if kv_heads > 4 else min(4, power_of_2(heads))
    return RopeConfig(tile_h, min(8, max(1, tile_h * power_of_2(half) // 256)))


@triton.jit
def _sum_at(x, residual, column, inside, x_part, PARTS: tl.constexpr):
    """x (+ residual, rounded to its dtype) at these columns of a row; x may lie in fp32 PARTS,
    rounded once added up.
    """
    value = tl.load(x + column, mask=inside, other=0)
    for part in tl.static_range(1, PARTS):
        value += tl.load(x + part * x_part + column, mask=inside, other=0)
    if residual is not None:
        added = tl.load(residual + column, mask=inside, other=0)
        value = (value.to(added.dtype).to(tl.float32) + added.to(tl.float32)).to(added.dtype)
    return value


@triton.jit
def _scale_and_store(value, scale, weight, y, total, column, inside):
    """y = value * scale, rounded, times the weight; and total = value where it is wanted."""
    w = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    normed = (value.to(tl.float32) * scale).to(value.dtype)
    tl.store(y + column, (normed.to(tl.float32) * w).to(value.dtype), mask=inside)
    if total is not None:
        tl.store(total + column, value, mask=inside)


@triton.jit
def rms_norm_kernel(
    x,
    residual,
    weight,
    y,
    total,
    x_stride,
    residual_stride,
    x_part,
    width,
    eps,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row a program. ONE_TILE: it is held in registers; otherwise it is read twice, TILE values
    at a time. PARTS > 1: x is [PARTS, rows, width] fp32, x_part apart.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    y += row * width
    if residual is not None:
        residual += row * residual_stride
        total += row * width
    column = tl.arange(0, TILE)
    if ONE_TILE:
        inside = column < width
        value = _sum_at(x, residual, column, inside, x_part, PARTS)
        as_float = value.to(tl.float32)
        scale = tl.rsqrt(tl.sum(as_float * as_float) / width + eps)
        _scale_and_store(value, scale, weight, y, total, column, inside)
    else:
        squares = tl.zeros([TILE], tl.float32)
        for first in range(0, width, TILE):
            inside = first + column < width
            as_float = _sum_at(x, residual, first + column, inside, x_part, PARTS).to(tl.float32)
            squares += as_float * as_float
        scale = tl.rsqrt(tl.sum(squares) / width + eps)
        for first in range(0, width, TILE):
            inside = first + column < width
            value = _sum_at(x, residual, first + column, inside, x_part, PARTS)
            _scale_and_store(value, scale, weight, y, total, first + column, inside)


@triton.jit
def swiglu_kernel(gate_up, y, stride, width, tiles, TILE: tl.constexpr, OVERLAP: tl.constexpr):
    """TILE values of a row [gate | up] of 2 * width a program, `tiles` programs a row."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    column = (program % tiles) * TILE + tl.arange(0, TILE)
    inside = column < width
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0)
    up = tl.load(gate_up + row * stride + width + column, mask=inside, other=0).to(tl.float32)
    z = gate.to(tl.float32)
    silu = (z / (1 + tl.exp(-z))).to(gate.dtype)
    tl.store(y + row * width + column, (silu.to(tl.float32) * up).to(gate.dtype), mask=inside)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """x rounded to dtype, as fp32."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def _rotated(x, offset, cos, sin, inside, HALF: tl.constexpr):
    """Both halves of the heads at `offset`, rotated in cos.dtype and returned in x's."""
    table: tl.constexpr = cos.dtype
    first = tl.load(x + offset, mask=inside, other=0)
    second = tl.load(x + offset + HALF, mask=inside, other=0)
    a, b = _rounded(first, table), _rounded(second, table)
    c, s = cos.to(tl.float32), sin.to(tl.float32)
    low = (_rounded(a * c, table) - _rounded(b * s, table)).to(table)
    high = (_rounded(b * c, table) + _rounded(a * s, table)).to(table)
    return low.to(first.dtype), high.to(first.dtype)


@triton.jit
def _store_halves(out, low, high, inside, HALF: tl.constexpr):
    """Both halves of heads to `out`."""
    tl.store(out, low, mask=inside)
    tl.store(out + HALF, high, mask=inside)


@triton.jit(do_not_specialize=["steps", "positions", "slots", "pages", "page_size"])
def rope_to_cache_kernel(
    q,
    k,
    v,
    cos_table,
    sin_table,
    start,
    k_cache,
    v_cache,
    length,
    page_table,
    q_out,
    k_out,
    steps,
    positions,
    slots,
    pages,
    page_size,
    table_stride,
    q_strides,
    k_strides,
    v_strides,
    k_cache_strides,
    v_cache_strides,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_H: tl.constexpr,
):
    """Programs (position, tile of heads): the first tiles rotate queries, the others keys, whose
    values go with them. Strides: of a row, a position and a head.
    """
    Q_TILES: tl.constexpr = (HEADS + TILE_H - 1) // TILE_H
    TILES: tl.constexpr = Q_TILES + (KV_HEADS + TILE_H - 1) // TILE_H
    tile, position = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    row, step = (position // steps).to(tl.int64), (position % steps).to(tl.int64)
    token = position.to(tl.int64)
    slot = tl.load(start + row).to(tl.int64) + step
    d = tl.arange(0, TILE_D)[None, :]
    # Rows past their length may overrun the tables, and starts may be anything.
    at = tl.minimum(tl.maximum(slot, 0), positions - 1) * HALF + d
    cos = tl.load(cos_table + at, mask=d < HALF, other=0)
    sin = tl.load(sin_table + at, mask=d < HALF, other=0)
    if tile < Q_TILES:
        head = tile * TILE_H + tl.arange(0, TILE_H)[:, None]
        inside = (head < HEADS) & (d < HALF)
        queries = q + row * q_strides[0] + step * q_strides[1]
        low, high = _rotated(queries, head * q_strides[2] + d, cos, sin, inside, HALF)
        _store_halves(q_out + (token * HEADS + head) * (2 * HALF) + d, low, high, inside, HALF)
    else:
        head = (tile - Q_TILES) * TILE_H + tl.arange(0, TILE_H)[:, None]
        inside = (head < KV_HEADS) & (d < HALF)
        keys = k + row * k_strides[0] + step * k_strides[1]
        low, high = _rotated(keys, head * k_strides[2] + d, cos, sin, inside, HALF)
        _store_halves(k_out + (token * KV_HEADS + head) * (2 * HALF) + d, low, high, inside, HALF)
        if k_cache is not None:
            keep = (slot >= 0) & (slot < slots)
            if length is not None:
                keep &= step < tl.load(length + row)
            row_there, slot_there = row, slot
            if page_table is not None:
                page = tl.load(
                    page_table + row * table_stride + slot // page_size, mask=keep, other=0
                )
                keep &= (page >= 0) & (page < pages)
                row_there, slot_there = page.to(tl.int64), slot % page_size
            inside = (head < tl.where(keep, KV_HEADS, 0)) & (d < HALF)
            k_there = row_there * k_cache_strides[0] + slot_there * k_cache_strides[1]
            out = k_cache + k_there + head * k_cache_strides[2] + d
            _store_halves(out, low, high, inside, HALF)
            value = v + row * v_strides[0] + step * v_strides[1] + head * v_strides[2] + d
            v_there = row_there * v_cache_strides[0] + slot_there * v_cache_strides[1]
            out = v_cache + v_there + head * v_cache_strides[2] + d
            tl.store(out, tl.load(value, mask=inside, other=0), mask=inside)
            tl.store(out + HALF, tl.load(value + HALF, mask=inside, other=0), mask=inside)


def launch_rms_norm(x, weight, eps, residual=None, parts=1):
    """See pointwise.rms_norm. parts > 1: x is [parts, rows, C] fp32."""
    width, like = x.shape[-1], x if residual is None else residual
    y = torch.empty(like.shape, dtype=like.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(y)
    if y.numel():
        rows, chosen = rows_of(x), rms_norm_config(width, chip_of(x.device))
        added = None if residual is None else rows_of(residual)
        with on_device(x):
            compiling.launch(
                rms_norm_kernel,
                (y.numel() // width,),
                rows,
                added,
                dense(weight),
                y,
                total,
                rows.stride(0),
                0 if added is None else added.stride(0),
                y.numel(),
                width,
                eps,
                TILE=chosen.TILE,
                ONE_TILE=width <= chosen.TILE,
                PARTS=parts,
                OVERLAP=chosen.overlap,
                num_warps=chosen.num_warps,
                **pdl(chosen.overlap),
            )
    return y if residual is None else (y, total)


def launch_swiglu(gate_up):
    """See pointwise.swiglu."""
    width = gate_up.shape[-1] // 2
    y = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    if y.numel():
        rows, chosen = rows_of(gate_up), swiglu_config(width, chip_of(gate_up.device))
        tiles = ceil_div(width, chosen.TILE)
        with on_device(gate_up):
            compiling.launch(
                swiglu_kernel,
                (rows.shape[0] * tiles,),
                rows,
                y,
                rows.stride(0),
                width,
                tiles,
                TILE=chosen.TILE,
                OVERLAP=chosen.overlap,
                num_warps=chosen.num_warps,
                **pdl(chosen.overlap),
            )
    return y


def launch_rope_to_cache(q, k, v, cos, sin, start, k_cache, v_cache, *, length, page_table):
    """See pointwise.rope_to_cache. The caches' last dimension must be contiguous."""
    (rows, steps, heads), kv_heads, half = q.shape[:3], k.shape[2], q.shape[3] // 2
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    cos, sin, start = cos.contiguous(), sin.contiguous(), start.contiguous()
    chosen = rope_to_cache_config(heads, kv_heads, half)
    slots = pages = page_size = table_stride = 0
    k_cache_strides = v_cache_strides = (0, 0, 0)
    if k_cache is not None:
        slots = k_cache.shape[1]
        k_cache_strides, v_cache_strides = k_cache.stride()[:3], v_cache.stride()[:3]
    if page_table is not None:
        page_table, table_stride = page_table.contiguous(), page_table.shape[1]
        if k_cache is not None:
            pages, page_size, slots = k_cache.shape[0], slots, slots * table_stride
    tiles = ceil_div(heads, chosen.TILE_H) + ceil_div(kv_heads, chosen.TILE_H)
    if rows * steps:
        # Without fused multiply-adds every bit is the reference's; the arithmetic hides behind the
        # loads anyway.
        with on_device(q):
            compiling.launch(
                rope_to_cache_kernel,
                (rows * steps * tiles,),
                q,
                k,
                v,
                cos,
                sin,
                start,
                k_cache,
                v_cache,
                dense(length),
                page_table,
                q_out,
                k_out,
                steps,
                cos.shape[0],
                slots,
                pages,
                page_size,
                table_stride,
                q.stride()[:3],
                k.stride()[:3],
                v.stride()[:3],
                k_cache_strides,
                v_cache_strides,
                HEADS=heads,
                KV_HEADS=kv_heads,
                HALF=half,
                TILE_D=power_of_2(half),
                TILE_H=chosen.TILE_H,
                num_warps=chosen.num_warps,
                enable_fp_fusion=False,
            )
    return q_out, k_out
