"""What surrounds attention in a layer: rms_norm (+ residual), swiglu on a fused gate/up,
rope_to_cache.

rms_norm       y = (x * rsqrt(mean(x^2) + eps)) * weight, statistics in fp32; with a residual,
               x + residual first.
swiglu         silu(gate) * up for [gate | up] side by side, as one product writes them.
rope_to_cache  rotates the queries and keys of a refresh and writes keys and values into the cache
               at the rows' spans.

One launch each instead of four to eight; every tensor is read and written once. The references are
differentiable, so inputs that need a gradient take them (training); the kernels have no backward.
Under torch.compile the references run too: its own fusion reaches across them into what stands
around.
"""

from typing import Any

import torch
from torch import Tensor

from . import backend, checks


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split RoPE of x [B, T, H, D] by cos and sin [B, T, D/2]: computed in cos.dtype, returned
    in x.dtype.
    """
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def positions_of(start: Tensor, count: int, table: Tensor) -> Tensor:
    """Positions [B, count] of rows that begin at `start` [B], held inside `table`: rows past their
    length may overrun it.
    """
    at = start.to(torch.int64)[:, None] + torch.arange(count, device=start.device)
    return at.clamp(0, table.shape[0] - 1)


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Any:
    """See `rms_norm`."""
    if residual is not None:
        x = x + residual
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    y = (x.float() * scale).to(x.dtype) * weight
    return y if residual is None else (y, x)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """See `swiglu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def rope_to_cache_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    start: Tensor,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    *,
    length: Tensor | None = None,
    page_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `rope_to_cache`."""
    at = positions_of(start, q.shape[1], cos)
    q, k = rotate(q, cos[at], sin[at]), rotate(k, cos[at], sin[at])
    if k_cache is None or v_cache is None:
        return q, k
    rows, steps = at.shape
    step = torch.arange(steps, device=at.device)
    slot = start.to(torch.int64)[:, None] + step
    row = torch.arange(rows, device=at.device)[:, None].expand_as(slot)
    size = k_cache.shape[1]
    keep = (slot >= 0) & (slot < size * (1 if page_table is None else page_table.shape[1]))
    if length is not None:
        keep &= step < length[:, None]
    if page_table is not None:
        column = (slot // size).clamp(0, page_table.shape[1] - 1)
        row, slot = page_table.to(torch.int64).gather(1, column), slot % size
        keep &= (row >= 0) & (row < k_cache.shape[0])
    k_cache[row[keep], slot[keep]] = k[keep]
    v_cache[row[keep], slot[keep]] = v[keep]
    return q, k


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
    """RMSNorm over the last dimension, statistics in fp32, cast back, then times the weight.

    x [..., C]; weight [C]; residual [..., C] or None; eps: a finite number above 0. float16,
    bfloat16, float32 (float64 and mixed dtypes by the reference). Returns y [..., C], or (y, x +
    residual) with a residual: the sum is what the next residual branch starts from. Raises
    TypeError for dtypes, ValueError for shapes and devices that do not agree.
    """
    checks.tensor("x", x, checks.REALS)
    if not x.ndim:
        raise ValueError("x: expected [..., C], got shape ()")
    checks.tensor("weight", weight, checks.REALS, x.shape[-1:], x.device)
    checks.number("eps", eps, above=0)
    if residual is not None:
        checks.tensor("residual", residual, checks.REALS, x.shape, x.device)
    if backend.use_kernel("rms_norm", x, weight, residual):
        from .pointwise_triton import launch_rms_norm

        return launch_rms_norm(x, weight, eps, residual)
    return rms_norm_reference(x, weight, eps, residual)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up [..., 2 I] = [gate | up]; returns [..., I]. float16, bfloat16,
    float32 (float64 by the reference). TypeError for another dtype, ValueError when the width is
    odd.
    """
    checks.tensor("gate_up", gate_up, checks.REALS)
    if not gate_up.ndim or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: expected an even last dimension, got {tuple(gate_up.shape)}")
    if backend.use_kernel("swiglu", gate_up):
        from .pointwise_triton import launch_swiglu

        return launch_swiglu(gate_up)
    return swiglu_reference(gate_up)


def rope_to_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    start: Tensor,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    *,
    length: Tensor | None = None,
    page_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate q and k, and write the rotated keys and the values into the cache at the rows' spans.

    q [B, T, H, D]; k, v [B, T, HK, D]; all of one dtype, float16, bfloat16, float32 (float64 by the
    reference). cos, sin [positions, D/2], fp32 or of q's dtype (the rotation runs in theirs); start
    [B] int32: row b sits at positions start[b] .. + T - 1. k_cache, v_cache [B, S, HK, D], or
    [num_pages, page_size, HK, D] with page_table [B, pages] int32, written in place at those
    positions when given; length [B] int32: only a row's first length[b] positions are written.
    Returns (q, k) rotated. Source: RoFormer (arXiv 2104.09864), half-split form.

    What lies on the device never makes a write outside the cache: positions below 0 or past its
    end, and those in pages that do not exist, are not written, and are rotated as the nearest
    position that the tables have. Raises TypeError for dtypes, ValueError for shapes and devices
    that do not agree.
    """
    _check_rotated(q, k, v)
    checks.rotation(cos, sin, q)
    checks.tensor("start", start, (torch.int32,), q.shape[:1], q.device)
    if length is not None:
        checks.tensor("length", length, (torch.int32,), q.shape[:1], q.device)
    unsupported = _check_caches(q, k, k_cache, v_cache, page_table)
    if backend.use_kernel("rope_to_cache", q, k, v, k_cache, v_cache, unsupported=unsupported):
        from .pointwise_triton import launch_rope_to_cache

        return launch_rope_to_cache(
            q, k, v, cos, sin, start, k_cache, v_cache, length=length, page_table=page_table
        )
    return rope_to_cache_reference(
        q, k, v, cos, sin, start, k_cache, v_cache, length=length, page_table=page_table
    )


def _check_rotated(q, k, v):
    checks.tensor("q", q, checks.REALS)
    checks.tensor("k", k, (q.dtype,))
    if q.ndim != 4 or not q.shape[2] or not q.shape[3]:
        raise ValueError(f"q: expected [B, T, H, D], got {tuple(q.shape)}")
    fits = k.ndim == 4 and k.shape[:2] == q.shape[:2] and k.shape[3] == q.shape[3]
    if not fits or not k.shape[2] or k.device != q.device:
        raise ValueError(
            f"k: expected [B, T, HK, D] on {q.device} beside q {tuple(q.shape)}, "
            f"got {tuple(k.shape)} on {k.device}"
        )
    checks.tensor("v", v, (q.dtype,), k.shape, q.device)


def _check_caches(q, k, k_cache, v_cache, page_table):
    """Why the kernel cannot address the caches, or None."""
    if (k_cache is None) != (v_cache is None):
        raise ValueError("k_cache, v_cache: expected both or neither")
    if k_cache is not None:
        checks.tensor("k_cache", k_cache, (k.dtype,))
        rows = q.shape[:1] if page_table is None else k_cache.shape[:1]
        fits = k_cache.ndim == 4 and k_cache.shape[:1] == rows and k_cache.shape[2:] == k.shape[2:]
        if not fits or k_cache.device != q.device:
            layout = "[B, S, HK, D]" if page_table is None else "[num_pages, page_size, HK, D]"
            raise ValueError(
                f"k_cache: expected {layout} on {q.device} beside k {tuple(k.shape)}, "
                f"got {tuple(k_cache.shape)} on {k_cache.device}"
            )
        checks.tensor("v_cache", v_cache, (k.dtype,), k_cache.shape, q.device)
    if page_table is not None:
        checks.pages(page_table, k_cache, q)
    if k_cache is not None and (k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1):
        return "the last dimension of a cache is not contiguous"
    return None
