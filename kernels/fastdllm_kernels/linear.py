"""Products of few rows with what surrounds them: linear, linear_swiglu, linear_rms_norm.

linear           y = x W^T + bias
linear_swiglu    silu(x Wg^T) * (x Wu^T) for W = [Wg; Wu], or for the two apart: the products are not written
linear_rms_norm  rms_norm(residual + x W^T): the product is split over its columns, and the norm adds the parts up

A cached step of one or two sequences has 32 or 64 rows: each product reads its weight once and does
little else. cuBLAS reaches 0.56 to 0.95 of the memory's speed there; what is lost is the ramp of
every launch, and what stands around a product needs none of its own here. With more rows, in fp32,
on a CPU, under torch.compile or where a gradient is wanted these are the library's product and the
ops of pointwise.py. fp16, bf16, fp32; sums in fp32.

A weight may be an Fp8Weight, half the bytes: then the rows of x are quantised as well, each by its
largest magnitude, and e4m3 is multiplied by e4m3. About 4% of a product's size is lost, and there
is no gradient.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch.nn import functional

from . import backend
from .pointwise import rms_norm, rms_norm_reference, swiglu, swiglu_reference, use_kernel

# with more, and in fp32, cuBLAS is as fast or faster: 144 us a layer for 159 at 128 rows on an H200
MOST_ROWS = 64
LARGEST, SMALLEST = 448.0, 1e-30  # e4m3's largest number; what a row of zeros is divided by
ROWS_AT_ONCE = 4096  # of a weight that is quantised: in fp32 they lie beside it for a moment


class Fp8Weight(NamedTuple):
    """The weight data.float() * scale[:, None]: data [out, in] float8_e4m3fn, scale [out] fp32."""

    data: torch.Tensor
    scale: torch.Tensor

    @property
    def shape(self):
        return self.data.shape

    @property
    def ndim(self):
        return self.data.ndim

    def split(self, rows):
        """Views of so many rows each, as Tensor.split gives them."""
        return [
            Fp8Weight(*part)
            for part in zip(self.data.split(rows), self.scale.split(rows), strict=True)
        ]

    def copy_(self, weight):
        """Quantise `weight` [out, in], of any dtype and device, into this one; a row's scale is
        finite if the row is.
        """
        for part, rows in zip(self.split(ROWS_AT_ONCE), weight.split(ROWS_AT_ONCE), strict=True):
            for mine, new in zip(
                part, quantize_rows_reference(rows.to(part.data.device)), strict=True
            ):
                mine.copy_(new)
        return self


def quantize_weight(weight) -> Fp8Weight:
    """weight [out, in] in e4m3, each row with the scale that makes its largest magnitude 448.
    ValueError for another shape.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight: expected [out, in], got {tuple(weight.shape)}")
    data = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    return Fp8Weight(
        data, torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    ).copy_(weight)


@torch.no_grad()
def quantize_rows_reference(x):
    """See `quantize_rows`."""
    largest = x.abs().amax(-1).float().clamp(min=SMALLEST)
    return (x.float() * (LARGEST / largest)[..., None]).to(torch.float8_e4m3fn), largest * (
        1 / LARGEST
    )


def linear_reference(x, weight, bias=None):
    """See `linear`."""
    if not isinstance(weight, Fp8Weight):
        return functional.linear(x, weight, bias)
    data, scale = quantize_rows_reference(x)
    y = functional.linear(data.float(), weight.data.float()) * (weight.scale * scale[..., None])
    return (y if bias is None else y + bias.float()).to(x.dtype)


def linear_swiglu_reference(x, weight, up=None):
    """See `linear_swiglu`."""
    if up is None:
        return swiglu_reference(linear_reference(x, weight))
    return functional.silu(linear_reference(x, weight)) * linear_reference(x, up)


def linear_rms_norm_reference(x, weight, residual, norm_weight, eps):
    """See `linear_rms_norm`."""
    return rms_norm_reference(linear_reference(x, weight), norm_weight, eps, residual)


@cache
def _multiplies_fp8(device):
    return (
        device.type != "cuda"
        or bool(torch.version.cuda)
        and torch.cuda.get_device_capability(device) >= (8, 9)
    )


def _fp8_obstacle(x):
    """Why rows of x [..., in] are not multiplied in fp8, or None."""
    if not _multiplies_fp8(x.device):
        return "fp8 needs an NVIDIA GPU of compute capability 8.9 or above"
    return (
        f"fp8 needs an input width that is a multiple of 16, not {x.shape[-1]}"
        if x.shape[-1] % 16
        else None
    )


def quantize_rows(x):
    """(data [rows, in] float8_e4m3fn, scale [rows] fp32) of x [rows, in]: each row's largest
    magnitude becomes 448.
    """
    if x.numel() and use_kernel("quantize_rows", x, unsupported=_fp8_obstacle(x)):
        from . import linear_triton

        return linear_triton.quantize_rows(x)
    return quantize_rows_reference(x)


def _library(x, weight, bias=None):
    """The library's product; with an Fp8Weight that is torch._scaled_mm, and where this does not
    run the reference.
    """
    if not isinstance(weight, Fp8Weight):
        return functional.linear(x, weight, bias)
    fits = x.is_cuda and x.dtype != torch.float32 and x.numel() and weight.shape[0] % 16 == 0
    if not fits or _fp8_obstacle(x) or backend.forced() == "reference":
        return linear_reference(x, weight, bias)
    data, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
    y = torch._scaled_mm(
        data,
        weight.data.t(),
        scale[:, None],
        weight.scale[None],
        out_dtype=x.dtype,
        use_fast_accum=True,
    )
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


def _use_triton(op, x, weight, *others):
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight: expected [out, {x.shape[-1]}] for x {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    rows = x.numel() // max(1, x.shape[-1])
    fp8 = isinstance(weight, Fp8Weight)
    contiguous = (weight.data if fp8 else weight).is_contiguous()
    preferred = rows <= MOST_ROWS and x.dtype != torch.float32 and contiguous
    if not rows or 0 in weight.shape or not (preferred or backend.forced() == "triton"):
        return False
    unsupported = (
        "the weight is not contiguous" if not contiguous else _fp8_obstacle(x) if fp8 else None
    )
    return use_kernel(op, x, *(others if fp8 else (weight, *others)), unsupported=unsupported)


def linear(x, weight, bias=None):
    """x [..., in] weight [out, in]^T + bias [out] (or None) -> [..., out]. ValueError for shapes
    that do not agree.

    weight, here and below: a tensor of x's dtype, or an Fp8Weight.
    """
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if _use_triton("linear", x, weight, bias):
        from . import linear_triton

        return linear_triton.linear(x, weight, bias)
    return _library(x, weight, bias)


def linear_swiglu(x, weight, up=None):
    """silu(gate) * up of the product x [..., in] by weight [2 I, in] = [gate; up] -> [..., I].

    up: a tensor [I, in] where weight, a tensor too, is the gate's [I, in] alone. ValueError for
    shapes that do not agree, or an odd number of outputs.
    """
    if up is None and weight.shape[0] % 2:
        raise ValueError(
            f"weight: expected an even number of rows [gate; up], got {tuple(weight.shape)}"
        )
    if up is not None and (isinstance(weight, Fp8Weight) or up.shape != weight.shape):
        raise ValueError(
            f"up: expected a tensor of weight's shape {tuple(weight.shape)}, got {tuple(up.shape)}"
        )
    if (up is None or up.is_contiguous()) and _use_triton(
        "linear_swiglu", x, weight, *(() if up is None else (up,))
    ):
        from . import linear_triton

        return linear_triton.linear_swiglu(x, weight, up)
    if up is None:
        return swiglu(_library(x, weight))
    return functional.silu(_library(x, weight)) * _library(x, up)


def linear_rms_norm(x, weight, residual, norm_weight, eps):
    """The product x [..., in] by weight [out, in], added to the residual [..., out], and its
    RMSNorm.

    Returns (normalised [..., out], residual + product [..., out]), as `rms_norm` does. ValueError
    for shapes that do not agree.
    """
    shape = (*x.shape[:-1], weight.shape[0])
    if residual.shape != shape or norm_weight.shape != shape[-1:]:
        got = f"{tuple(residual.shape)} and {tuple(norm_weight.shape)}"
        raise ValueError(f"residual, norm_weight: expected {shape} and {shape[-1:]}, got {got}")
    if _use_triton("linear_rms_norm", x, weight, residual, norm_weight):
        from . import linear_triton

        return linear_triton.linear_rms_norm(x, weight, residual, norm_weight, eps)
    return rms_norm(_library(x, weight), norm_weight, eps, residual)
