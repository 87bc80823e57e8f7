"""Weights in fp8: half the bytes of bf16, e4m3 numbers with a scale for each row.

Where such a weight is multiplied (linear.py), the rows of x are quantised as they come, each by its
largest magnitude. Two operands of 3 bits of mantissa lose about 4% of a product's size, and there
is no gradient.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend, checks

LARGEST, SMALLEST = 448.0, 1e-30  # e4m3's largest number; what a row of zeros is divided by
ROWS_AT_ONCE = 4096  # of a weight that is quantised: in fp32 they lie beside it for a moment


class Fp8Weight(NamedTuple):
    """The weight data.float() * scale[:, None]: data [out, in] float8_e4m3fn, scale [out] fp32."""

    data: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    def split(self, rows) -> "list[Fp8Weight]":
        """Views of so many rows each, as Tensor.split gives them."""
        pairs = zip(self.data.split(rows), self.scale.split(rows), strict=True)
        return [Fp8Weight(*pair) for pair in pairs]

    def copy_(self, weight: Tensor) -> "Fp8Weight":
        """Quantise `weight` [out, in], of any dtype and device, into this one; a row's scale is
        finite if the row is.
        """
        for part, rows in zip(self.split(ROWS_AT_ONCE), weight.split(ROWS_AT_ONCE), strict=True):
            data, scale = quantize_rows_reference(rows.to(part.data.device))
            part.data.copy_(data)
            part.scale.copy_(scale)
        return self


def quantize_weight(weight: Tensor) -> Fp8Weight:
    """weight [out, in] (float16, bfloat16, float32 or float64) in e4m3, each row with the scale
    that makes its largest magnitude 448. TypeError for another dtype, ValueError for another shape.
    """
    checks.tensor("weight", weight, checks.REALS)
    if weight.ndim != 2:
        raise ValueError(f"weight: expected [out, in], got {tuple(weight.shape)}")
    data = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    return Fp8Weight(data, scale).copy_(weight)


@torch.no_grad()
def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `quantize_rows`."""
    largest = x.abs().amax(-1).float().clamp(min=SMALLEST)
    data = (x.float() * (LARGEST / largest)[..., None]).to(torch.float8_e4m3fn)
    return data, largest * (1 / LARGEST)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(data [rows, in] float8_e4m3fn, scale [rows] fp32) of x [rows, in]: each row's largest
    magnitude becomes 448.
    """
    dtypes = (torch.float8_e4m3fn,)
    if x.numel() and backend.use_kernel("quantize_rows", x, unsupported=obstacle(x), dtypes=dtypes):
        from .fp8_triton import launch

        return launch(x, LARGEST, SMALLEST)
    return quantize_rows_reference(x)


def obstacle(x: Tensor) -> str | None:
    """Why rows of x [..., in] are not multiplied in fp8, or None."""
    if not _multiplies_fp8(x.device):
        return "fp8 needs an NVIDIA GPU of compute capability 8.9 or above"
    if x.shape[-1] % 16:
        return f"fp8 needs an input width that is a multiple of 16, not {x.shape[-1]}"
    return None


@cache
def _multiplies_fp8(device):
    if device.type != "cuda":
        return True
    return bool(torch.version.cuda) and torch.cuda.get_device_capability(device) >= (8, 9)
