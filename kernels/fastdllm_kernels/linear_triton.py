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

from .backend import ceil_div, chip_of, dense, on_device, pdl, power_of_2
from .linear import LARGEST, SMALLEST, Fp8Weight
from .pointwise_triton import rms_norm, rows_of


@dataclass(frozen=True)
class LinearConfig:
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
def linear_config(rows, width_in, width_out, gated, splittable, itemsize, chip) -> LinearConfig:
    """The configuration for x [rows, width_in] and width_out outputs, itemsize bytes an element of
    the weight. Pure.

    gated: two rows of the weight for each output. splittable: what follows can add up parts.
    """
    tile_rows = min(128, max(16, power_of_2(rows)))
    tiles = ceil_div(width_out, 64)
    if itemsize == 4:  # outside the tensor cores, from registers; only where somebody forces it
        return LinearConfig(min(tile_rows, 32), 32, 16, 4, 2, 1, chip.overlap)
    # 64 KB or more of weights in flight on each multiprocessor; with many rows or two tiles of
    # weights half the columns fit.
    tile_in, stages = (64, 4) if gated or tile_rows > 64 else (128, 3)
    fp8 = itemsize == 1
    tile_in, warps = (
        (2 * tile_in, 8 if gated and tile_rows > 64 else 4) if fp8 else (tile_in, 4)
    )  # 8: with 4 sums spill
    if splittable:
        # Two programs a multiprocessor: with fewer the memory idles, with more the parts cost more
        # than they hide.
        splits = max(1, min(2 * chip.multiprocessors // tiles, width_in // (4 * tile_in)))
        return LinearConfig(tile_rows, 64, tile_in, warps, stages, splits, chip.overlap)
    narrow = tiles < chip.multiprocessors and not fp8
    if narrow and not gated and tile_rows <= 64 and chip.shared > 200000:
        return LinearConfig(
            tile_rows, 64, tile_in, warps, 5, 1, chip.overlap
        )  # fewer programs, more of each in flight
    # Elsewhere smaller tiles, so that every multiprocessor has one; but fp8 tensor cores want 64
    # rows.
    return LinearConfig(tile_rows, 32 if narrow else 64, tile_in, warps, stages, 1, chip.overlap)


@triton.jit
def _plus_product(acc, w, inputs):
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
        if EVEN:
            w, inputs = tl.load(w_base + here), tl.load(x_base + here)
        else:
            inside = here < end
            w, inputs = (
                tl.load(w_base + here, mask=inside, other=0.0),
                tl.load(x_base + here, mask=inside, other=0.0),
            )
        acc = _plus_product(acc, w, inputs)
        if GATED:
            up = (
                tl.load(up_base + here)
                if EVEN
                else tl.load(up_base + here, mask=here < end, other=0.0)
            )
            acc_up = _plus_product(acc_up, up, inputs)
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


def _width_out(weight, gated, up):
    return weight.shape[0] // 2 if gated and up is None else weight.shape[0]


def launch_linear(x, weight, bias, gated, config, up=None):
    """x [rows, in] by weight [out, in]: y [rows, out] in x's dtype, or fp32 parts [splits, rows,
    out] where splits > 1.
    """
    (rows, width_in), width_out = x.shape, _width_out(weight, gated, up)
    shape = (rows, width_out) if config.splits == 1 else (config.splits, rows, width_out)
    y = torch.empty(shape, dtype=x.dtype if config.splits == 1 else torch.float32, device=x.device)
    grid = ceil_div(width_out, config.TILE_OUT), config.splits, ceil_div(rows, config.TILE_ROWS)
    x_scale = w_scale = None
    if isinstance(weight, Fp8Weight):
        (x, x_scale), (weight, w_scale) = quantize_rows(x), weight
    with on_device(x):
        linear_kernel[grid](
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
            TILE_ROWS=config.TILE_ROWS,
            TILE_OUT=config.TILE_OUT,
            TILE_IN=config.TILE_IN,
            GATED=gated,
            EVEN=width_in % (config.TILE_IN * config.splits) == 0,
            OVERLAP=config.overlap,
            STAGES=config.num_stages,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
            **pdl(config.overlap),
        )
    return y


@triton.jit
def quantize_rows_kernel(
    x,
    data,
    scale,
    x_stride,
    width,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    inside = column < width
    value = tl.load(x + row * x_stride + column, mask=inside, other=0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(value)), SMALLEST)
    # Divided as IEEE divides, by a tensor; PyTorch multiplies by what a number divides by: every
    # bit is the reference's.
    value *= tl.div_rn(LARGEST, largest)
    tl.store(data + row * width + column, value.to(data.dtype.element_ty), mask=inside)
    tl.store(scale + row, largest * (1 / LARGEST))


def quantize_rows(x):
    """Launches `quantize_rows_kernel` on x [rows, in]; see linear.quantize_rows. 8 values a thread
    where 4096 are enough.
    """
    x, (rows, width), overlap = rows_of(x), x.shape, chip_of(x.device).overlap
    data = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    tile = power_of_2(width)
    with on_device(x):
        quantize_rows_kernel[(rows,)](
            x,
            data,
            scale,
            x.stride(0),
            width,
            LARGEST=LARGEST,
            SMALLEST=SMALLEST,
            TILE=tile,
            OVERLAP=overlap,
            num_warps=min(16, max(1, tile // 256)),
            **pdl(overlap),
        )
    return data, scale


def _launch(x, weight, bias=None, gated=False, splittable=False, up=None):
    x, width_out = rows_of(x), _width_out(weight, gated, up)
    itemsize = 1 if isinstance(weight, Fp8Weight) else x.element_size()
    config = linear_config(*x.shape, width_out, gated, splittable, itemsize, chip_of(x.device))
    return launch_linear(x, weight, bias, gated, config, up)


def linear(x, weight, bias):
    """See linear.linear."""
    return _launch(x, weight, dense(bias)).view(*x.shape[:-1], -1)


def linear_swiglu(x, weight, up):
    """See linear.linear_swiglu."""
    return _launch(x, weight, gated=True, up=up).view(*x.shape[:-1], -1)


def linear_rms_norm(x, weight, residual, norm_weight, eps):
    """See linear.linear_rms_norm."""
    y = _launch(x, weight, splittable=True)
    return rms_norm(y, norm_weight, eps, residual, parts=y.shape[0] if y.ndim == 3 else 1)
