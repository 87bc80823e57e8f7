"""Products of few rows with what surrounds them: linear, linear_swiglu, linear_rms_norm.

linear           y = x W^T + bias
linear_swiglu    silu(x Wg^T) * (x Wu^T) for W = [Wg; Wu], or for the two apart: the products are
                 not written
linear_rms_norm  rms_norm(residual + x W^T): the product is split over its columns, and the norm
                 adds the parts up

A cached step of one or two sequences has 32 or 64 rows: each product reads its weight once and does
little else. cuBLAS reaches 0.56 to 0.95 of the memory's speed there; what is lost is the ramp of
every launch, and what stands around a product needs none of its own here. With more rows, in fp32,
on a CPU, under torch.compile or where a gradient is wanted these are the library's product and the
ops of pointwise.py. fp16, bf16, fp32, and float64 by the library; sums in fp32. A weight may be an
Fp8Weight (fp8.py).
"""

import torch
from torch import Tensor
from torch.nn import functional

from . import backend, checks, fp8
from .fp8 import Fp8Weight, quantize_rows, quantize_rows_reference
from .pointwise import rms_norm, rms_norm_reference, swiglu, swiglu_reference

# With more, and in fp32, cuBLAS is as fast or faster: 144 us a layer for 159 at 128 rows, H200.
MOST_ROWS = 64


def linear_reference(x: Tensor, weight: Tensor | Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """See `linear`."""
    if not isinstance(weight, Fp8Weight):
        return functional.linear(x, weight, bias)
    data, scale = quantize_rows_reference(x)
    y = functional.linear(data.float(), weight.data.float()) * (weight.scale * scale[..., None])
    return (y if bias is None else y + bias.float()).to(x.dtype)


def linear_swiglu_reference(
    x: Tensor, weight: Tensor | Fp8Weight, up: Tensor | None = None
) -> Tensor:
    """See `linear_swiglu`."""
    if up is None:
        return swiglu_reference(linear_reference(x, weight))
    return functional.silu(linear_reference(x, weight)) * linear_reference(x, up)


def linear_rms_norm_reference(
    x: Tensor, weight: Tensor | Fp8Weight, residual: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `linear_rms_norm`."""
    return rms_norm_reference(linear_reference(x, weight), norm_weight, eps, residual)


def library_product(x: Tensor, weight: Tensor | Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """The library's product; with an Fp8Weight that is torch._scaled_mm, and where this does not
    run the reference.
    """
    if not isinstance(weight, Fp8Weight):
        return functional.linear(x, weight, bias)
    fits = x.is_cuda and x.dtype != torch.float32 and x.numel() and weight.shape[0] % 16 == 0
    if not fits or fp8.obstacle(x) or backend.forced() == "reference":
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


def _use_kernel(op, x, weight, *others):
    """Whether `op` runs as a kernel: where it was seen to be faster than the library, or forced."""
    rows = x.numel() // max(1, x.shape[-1])
    if not rows or 0 in weight.shape:
        return False
    is_fp8 = isinstance(weight, Fp8Weight)
    contiguous = (weight.data if is_fp8 else weight).is_contiguous()
    preferred = rows <= MOST_ROWS and x.dtype != torch.float32 and contiguous
    if not preferred and backend.forced() != "triton":
        return False
    unsupported = None if contiguous else "the weight is not contiguous"
    if not is_fp8:
        return backend.use_kernel(op, x, weight, *others, unsupported=unsupported)
    unsupported = unsupported or fp8.obstacle(x)
    dtypes = (torch.float8_e4m3fn,)
    return backend.use_kernel(op, x, *others, unsupported=unsupported, dtypes=dtypes)


def linear(x: Tensor, weight: Tensor | Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., in] weight [out, in]^T + bias [out] (or None) -> [..., out].

    weight, here and below: a tensor of x's dtype, or an Fp8Weight. Raises TypeError for what is no
    tensor and for dtypes, ValueError for shapes and devices that do not agree.
    """
    _check_product(x, weight)
    if bias is not None:
        _check_beside("bias", bias, weight.shape[:1], x)
    if _use_kernel("linear", x, weight, bias):
        from .linear_triton import launch_linear

        return launch_linear(x, weight, bias)
    return library_product(x, weight, bias)


def linear_swiglu(x: Tensor, weight: Tensor | Fp8Weight, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up of the product x [..., in] by weight [2 I, in] = [gate; up] -> [..., I].

    up: a tensor [I, in] where weight, a tensor too, is the gate's [I, in] alone. Raises as `linear`
    does, and ValueError for an odd number of outputs.
    """
    _check_product(x, weight)
    if up is None:
        if weight.shape[0] % 2:
            raise ValueError(
                f"weight: expected an even number of rows [gate; up], got {tuple(weight.shape)}"
            )
        if _use_kernel("linear_swiglu", x, weight):
            from .linear_triton import launch_linear_swiglu

            return launch_linear_swiglu(x, weight)
        return swiglu(library_product(x, weight))
    if isinstance(weight, Fp8Weight):
        raise ValueError("up: expected None beside an Fp8Weight, which holds [gate; up]")
    _check_beside("up", up, weight.shape, x)
    if up.is_contiguous() and _use_kernel("linear_swiglu", x, weight, up):
        from .linear_triton import launch_linear_swiglu

        return launch_linear_swiglu(x, weight, up)
    return functional.silu(library_product(x, weight)) * library_product(x, up)


def linear_rms_norm(
    x: Tensor, weight: Tensor | Fp8Weight, residual: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The product x [..., in] by weight [out, in], added to the residual [..., out], and its
    RMSNorm by norm_weight [out] and eps, a finite number above 0.

    Returns (normalised [..., out], residual + product [..., out]), as `rms_norm` does. Raises as
    `linear` does.
    """
    _check_product(x, weight)
    _check_beside("residual", residual, (*x.shape[:-1], weight.shape[0]), x)
    checks.tensor("norm_weight", norm_weight, checks.REALS, weight.shape[:1], x.device)
    checks.number("eps", eps, above=0)
    if _use_kernel("linear_rms_norm", x, weight, residual, norm_weight):
        from .linear_triton import launch_linear_rms_norm

        return launch_linear_rms_norm(x, weight, residual, norm_weight, eps)
    return rms_norm(library_product(x, weight), norm_weight, eps, residual)


def _check_product(x, weight):
    """That x [..., in] can be multiplied by weight [out, in], a tensor or an Fp8Weight."""
    checks.tensor("x", x, checks.REALS)
    data = weight
    if isinstance(weight, Fp8Weight):
        data, scale = weight
        checks.tensor("weight", data, (torch.float8_e4m3fn,))
        checks.tensor("weight", scale, (torch.float32,), data.shape[:1], x.device)
    else:
        checks.tensor("weight", data, checks.REALS)
        _check_dtype("weight", data, x)
    if not x.ndim or data.ndim != 2 or data.shape[1] != x.shape[-1] or data.device != x.device:
        width = x.shape[-1] if x.ndim else "in"
        raise ValueError(
            f"weight: expected [out, {width}] on {x.device} for x {tuple(x.shape)}, "
            f"got {tuple(data.shape)} on {data.device}"
        )


def _check_beside(name, value, shape, x):
    """That a tensor has this shape, and x's device and dtype."""
    checks.tensor(name, value, checks.REALS, shape, x.device)
    _check_dtype(name, value, x)


def _check_dtype(name, value, x):
    # Under autocast the library casts what it multiplies.
    if value.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name}: expected a tensor of {x.dtype}, as x, got {value.dtype}")
