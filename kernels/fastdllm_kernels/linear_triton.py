"""The Triton kernel of linear.py: a product of few rows, bound by reading the weight once.

A program owns TILE_OUT rows of the weight and one of `splits` shares of its columns, and computes
the transposed tile weight x^T: the weight's 64 rows then fill the tensor cores' fixed side, where
32 rows of x would leave half of it empty. With one split it writes y (a gated product writes
silu(gate) * up); with more it writes fp32 parts [splits, rows, out], which the rms_norm that
follows adds up anyway. It may be launched while its predecessor drains (Hopper and later).

With an Fp8Weight half the bytes are read: x is quantised row by row by a kernel of its own, the
tensor cores multiply e4m3 by e4m3, and both scales come onto the fp32 sums.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from . import compiling, fp8_triton
from .backend import ceil_div, chip_of, dense, on_device, pdl, power_of_2, rows_of
from .fp8 import LARGEST, SMALLEST, Fp8Weight
from .pointwise_triton import launch_rms_norm


@dataclass(frozen=True)
class Config:
    """TILE_OUT rows of the weight by TILE_IN columns at a time, for TILE_ROWS rows of x; columns in
    `splits` shares.

    overlap: the launch may begin before its predecessor ends.
    """

    TILE_ROWS: int
    TILE_OUT: int
    TILE_IN: int
    num_warps: int
    num_stages: int
    splits: int = 1
    overlap: bool = False


@lru_cache(maxsize=4096)
def config(rows, width_in, width_out, gated, splittable, itemsize, chip) -> Config:
    """The configuration for x [rows, width_in] and width_out outputs, itemsize bytes an element of
    the weight. Pure.

    gated: two rows of the weight for each output. splittable: what follows can add up parts.
    """
    tile_rows = min(128, max(16, power_of_2(rows)))
    tiles = ceil_div(width_out, 64)
    if itemsize == 4:  # outside the tensor cores, from registers; only where somebody forces it
        return Config(min(tile_rows, 32), 32, 16, 4, 2, 1, chip.overlap)
    # 64 KB or more of weights in flight on each multiprocessor; with many rows or two tiles of
    # weights half the columns fit.
    tile_in, stages = (64, 4) if gated or tile_rows > 64 else (128, 3)
    fp8 = itemsize == 1
    warps = 4
    if fp8:
        tile_in *= 2
        warps = 8 if gated and tile_rows > 64 else 4  # with 4 sums would spill
    if splittable:
        # Two programs a multiprocessor: with fewer the memory idles, with more the parts cost more
        # than they hide.
        splits = max(1, min(2 * chip.multiprocessors // tiles, width_in // (4 * tile_in)))
        return Config(tile_rows, 64, tile_in, warps, stages, splits, chip.overlap)
    narrow = tiles < chip.multiprocessors and not fp8
    if narrow and not gated and tile_rows <= 64 and chip.shared > 200000:
        # Fewer programs, more of each in flight.
        return Config(tile_rows, 64, tile_in, warps, 5, 1, chip.overlap)
    # Elsewhere smaller tiles, so that every multiprocessor has one; but fp8 tensor cores want 64
    # rows.
    return Config(tile_rows, 32 if narrow else 64, tile_in, warps, stages, 1, chip.overlap)


@triton.jit
def _loaded(base, here, end, EVEN: tl.constexpr):
    """The columns `here` of rows at `base`, 0 from column `end` on; EVEN: all are before it."""
    if EVEN:
        return tl.load(base + here)
    else:
        return tl.load(base + here, mask=here < end, other=0.0)


@triton.jit
def _plus_product(acc, w, inputs):
    """acc + w inputs^T."""
    if w.dtype.is_fp8():
        # Hopper adds fp8 products up in about 14 bits: the sum of every tile moves on into fp32.
        acc += tl.dot(w, tl.trans(inputs))
    else:
        acc = tl.dot(w, tl.trans(inputs), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x,
    weight,
    up_weight,
    x_scale,
    w_scale,
    bias,
    y,
    rows,
    width_in,
    width_out,
    x_stride,
    TILE_ROWS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
    OVERLAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (tiles of outputs, splits, tiles of rows). GATED: the weight is [gate; up], 2 *
    width_out rows, or the gate's beside up_weight.

    x_scale [rows], w_scale: both operands are e4m3, and these undo it (else None).
    """
    split, splits = tl.program_id(1), tl.num_programs(1)
    out = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    row = tl.program_id(2) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    share = tl.cdiv(tl.cdiv(width_in, TILE_IN), splits) * TILE_IN
    begin = tl.minimum(split * share, width_in)
    end = tl.minimum(begin + share, width_in)
    column = tl.arange(0, TILE_IN)
    # Rows that do not exist repeat the last: no load of the loop needs a mask for them.
    w_row = tl.minimum(out, width_out - 1).to(tl.int64)[:, None] * width_in
    w_base = weight + w_row
    up_base = w_base + width_out.to(tl.int64) * width_in
    if up_weight is not None:
        up_base = up_weight + w_row
    x_base = x + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * x_stride
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([TILE_OUT, TILE_ROWS], tl.float32)
    acc_up = acc
    for at in tl.range(begin, end, TILE_IN, num_stages=STAGES):
        here = at + column[None, :]
        w, inputs = _loaded(w_base, here, end, EVEN), _loaded(x_base, here, end, EVEN)
        acc = _plus_product(acc, w, inputs)
        if GATED:
            acc_up = _plus_product(acc_up, _loaded(up_base, here, end, EVEN), inputs)
    if OVERLAP:
        # Not sooner: programs of the next kernel would take the places that are free now, and leave
        # others idle later.
        tl.extra.cuda.gdc_launch_dependents()
    channel = tl.minimum(out, width_out - 1)
    if x_scale is not None:
        of_row = tl.load(x_scale + tl.minimum(row, rows - 1))[None, :]
        acc *= tl.load(w_scale + channel)[:, None] * of_row
        if GATED:
            acc_up *= tl.load(w_scale + width_out + channel)[:, None] * of_row
    if bias is not None:
        acc += tl.load(bias + channel)[:, None].to(tl.float32)
    if GATED:
        # Rounded where separate kernels would round: both products, then silu(gate).
        gate = acc.to(y.dtype.element_ty).to(tl.float32)
        silu = (gate / (1 + tl.exp(-gate))).to(y.dtype.element_ty).to(tl.float32)
        acc = silu * acc_up.to(y.dtype.element_ty).to(tl.float32)
    offset = (split.to(tl.int64) * rows + row.to(tl.int64))[None, :] * width_out + out[:, None]
    tl.store(
        y + offset,
        acc.to(y.dtype.element_ty),
        mask=(out < width_out)[:, None] & (row < rows)[None, :],
    )


def launch(
    x, weight, bias=None, up=None, *, gated=False, splittable=False, chosen: Config | None = None
):
    """Run the kernel on x [rows, in] and weight [out, in], or [gate; up] where gated, or the gate's
    beside `up`: y [rows, out] in x's dtype, or fp32 parts [splits, rows, out] where splits > 1.

    chosen: replaces what `config` picks, which splits only where what follows can add up parts.
    """
    rows, width_in = x.shape
    width_out = weight.shape[0] // 2 if gated and up is None else weight.shape[0]
    fp8 = isinstance(weight, Fp8Weight)
    itemsize = 1 if fp8 else x.element_size()
    chosen = chosen or config(
        rows, width_in, width_out, gated, splittable, itemsize, chip_of(x.device)
    )
    shape: tuple[int, ...] = (rows, width_out)
    dtype = x.dtype
    if chosen.splits > 1:
        shape, dtype = (chosen.splits, *shape), torch.float32
    y = torch.empty(shape, dtype=dtype, device=x.device)
    grid = ceil_div(width_out, chosen.TILE_OUT), chosen.splits, ceil_div(rows, chosen.TILE_ROWS)
    x_scale = w_scale = None
    if fp8:
        x, x_scale = fp8_triton.launch(x, LARGEST, SMALLEST)
        weight, w_scale = weight
    with on_device(x):
        compiling.launch(
            linear_kernel,
            grid,
            x,
            weight,
            up,
            x_scale,
            w_scale,
            bias,
            y,
            rows,
            width_in,
            width_out,
            x.stride(0),
            TILE_ROWS=chosen.TILE_ROWS,
            TILE_OUT=chosen.TILE_OUT,
            TILE_IN=chosen.TILE_IN,
            GATED=gated,
            EVEN=width_in % (chosen.TILE_IN * chosen.splits) == 0,
            OVERLAP=chosen.overlap,
            STAGES=chosen.num_stages,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
            enable_fp_fusion=True,
            **pdl(chosen.overlap),
        )
    return y


def launch_linear(x, weight, bias=None):
    """See linear.linear."""
    return launch(rows_of(x), weight, dense(bias)).view(*x.shape[:-1], -1)


def launch_linear_swiglu(x, weight, up=None):
    """See linear.linear_swiglu."""
    return launch(rows_of(x), weight, up=up, gated=True).view(*x.shape[:-1], -1)


def launch_linear_rms_norm(x, weight, residual, norm_weight, eps):
    """See linear.linear_rms_norm."""
    y = launch(rows_of(x), weight, splittable=True)
    parts = y.shape[0] if y.ndim == 3 else 1
    return launch_rms_norm(y, norm_weight, eps, residual, parts)
