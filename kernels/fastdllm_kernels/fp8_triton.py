"""The Triton kernel of fp8.py: rows quantised to e4m3, read once and written once.

A program takes one row. The result is the reference's, bit for bit.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import compiling
from .backend import chip_of, on_device, pdl, power_of_2, rows_of


@dataclass(frozen=True)
class Config:
    """A row in one TILE. overlap: the launch may begin before what runs ahead of it ends."""

    TILE: int
    num_warps: int
    overlap: bool = False


def config(width: int, chip) -> Config:
    """The configuration for rows of `width`: 8 values a thread where 4096 are enough. Pure."""
    tile = power_of_2(width)
    return Config(tile, min(16, max(1, tile // 256)), chip.overlap)


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
    """One row of x [rows, width] a program: data = x * LARGEST / m and scale = m / LARGEST for its
    largest magnitude m, or SMALLEST if that is larger.
    """
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


def launch(x, largest, smallest):
    """Run the kernel on x [rows, in]; see fp8.quantize_rows, whose numbers largest and smallest
    are.
    """
    x, (rows, width) = rows_of(x), x.shape
    chosen = config(width, chip_of(x.device))
    data = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    with on_device(x):
        compiling.launch(
            quantize_rows_kernel,
            (rows,),
            x,
            data,
            scale,
            x.stride(0),
            width,
            LARGEST=largest,
            SMALLEST=smallest,
            TILE=chosen.TILE,
            OVERLAP=chosen.overlap,
            num_warps=chosen.num_warps,
            **pdl(chosen.overlap),
        )
    return data, scale
