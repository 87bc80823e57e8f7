"""What surrounds attention in a layer: rms_norm (+ residual), swiglu on a fused gate/up,
rope_to_cache.

rms_norm       y = (x * rsqrt(mean(x^2) + eps)) * weight, statistics in fp32; with a residual, x + residual first.
swiglu         silu(gate) * up for [gate | up] side by side, as one product writes them.
rope_to_cache  rotates the queries and keys of a refresh and writes keys and values into the cache at the rows' spans.

One launch each instead of four to eight; every tensor is read and written once. The references are
differentiable, so inputs that need a gradient take them (training); the kernels have no backward.
Under torch.compile the references run too: its own fusion reaches across them into what stands
around.
"""

import torch

from . import backend, checks


def rotate(x, cos, sin):
    """Half-split RoPE of x [B, T, H, D] by cos and sin [B, T, D/2]: computed in cos.dtype, returned
    in x.dtype.
    """
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def positions_of(start, count, table):
    """Positions [B, count] of rows that begin at `start` [B], held inside `table` (rows past their
    length may overrun).
    """
    at = start.to(torch.int64)[:, None] + torch.arange(count, device=start.device)
    return at.clamp(max=table.shape[0] - 1)


def rms_norm_reference(x, weight, eps, residual=None):
    """See `rms_norm`."""
    if residual is not None:
        x = x + residual
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    y = (x.float() * scale).to(x.dtype) * weight
    return y if residual is None else (y, x)


def swiglu_reference(gate_up):
    """See `swiglu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def rope_to_cache_reference(
    q, k, v, cos, sin, start, k_cache=None, v_cache=None, *, length=None, page_table=None
):
    """See `rope_to_cache`."""
    at = positions_of(start, q.shape[1], cos)
    q, k = rotate(q, cos[at], sin[at]), rotate(k, cos[at], sin[at])
    if k_cache is not None:
        rows, steps = at.shape
        slot = start.to(torch.int64)[:, None] + torch.arange(steps, device=at.device)
        keep = slot < k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
        if length is not None:
            keep &= torch.arange(steps, device=at.device) < length[:, None]
        row = torch.arange(rows, device=at.device)[:, None].expand_as(slot)
        if page_table is not None:
            size = k_cache.shape[1]
            page = (slot // size).clamp(max=page_table.shape[1] - 1)
            row, slot = page_table.to(torch.int64).gather(1, page), slot % size
        k_cache[row[keep], slot[keep]] = k[keep]
        v_cache[row[keep], slot[keep]] = v[keep]
    return q, k


def use_kernel(op, *operands, unsupported=None):
    """Whether `op` runs as a kernel on these operands, the first of which is a tensor; None among
    them is absent.
    """
    if torch.compiler.is_compiling():
        return False
    first, grad = operands[0], torch.is_grad_enabled()
    for operand in operands:
        if operand is None:
            continue
        if grad and operand.requires_grad:
            unsupported = "an input requires a gradient and the kernel has none"
        elif operand.dtype != first.dtype or operand.device != first.device:
            unsupported = (
                f"{operand.dtype} on {operand.device} stands beside {first.dtype} on {first.device}"
            )
    if first.dtype not in checks.FLOATS:
        unsupported = f"it takes float16, bfloat16 or float32, not {first.dtype}"
    return backend.use_triton(op, first, unsupported)


def rms_norm(x, weight, eps, residual=None):
    """RMSNorm over the last dimension, statistics in fp32, cast back, then times the weight.

    x [..., C]; weight [C]; residual [..., C] or None. Returns y [..., C], or (y, x + residual) with
    a residual: the sum is what the next residual branch starts from. fp16, bf16, fp32. ValueError
    for shapes that do not agree.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: expected shape {tuple(x.shape[-1:])}, got {tuple(weight.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"residual: expected the shape of x {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    if use_kernel("rms_norm", x, weight, residual):
        from . import pointwise_triton

        return pointwise_triton.rms_norm(x, weight, eps, residual)
    return rms_norm_reference(x, weight, eps, residual)


def swiglu(gate_up):
    """silu(gate) * up for gate_up [..., 2 I] = [gate | up]; returns [..., I]. ValueError when the
    width is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: expected an even last dimension, got {tuple(gate_up.shape)}")
    if use_kernel("swiglu", gate_up):
        from . import pointwise_triton

        return pointwise_triton.swiglu(gate_up)
    return swiglu_reference(gate_up)


def rope_to_cache(
    q, k, v, cos, sin, start, k_cache=None, v_cache=None, *, length=None, page_table=None
):
    """Rotate q and k, and write the rotated keys and the values into the cache at the rows' spans.

    q [B, T, H, D]; k, v [B, T, HK, D]; cos, sin [positions, D/2] (the rotation runs in their
    dtype); start [B] int32: row b sits at positions start[b] .. + T - 1. k_cache, v_cache [B, S,
    HK, D], or [num_pages, page_size, HK, D] with page_table [B, pages] int32, written in place at
    those positions when given; length [B] int32: only a row's first length[b] positions are
    written. Returns (q, k) rotated. Source: RoFormer (arXiv 2104.09864), half-split form. Positions
    past the end of the cache are not written. Raises TypeError for dtypes, ValueError for shapes
    that do not agree.
    """
    if cos.shape != sin.shape or cos.ndim != 2 or 2 * cos.shape[1] != q.shape[-1]:
        raise ValueError(
            f"cos, sin: expected [positions, {q.shape[-1] // 2}], got {tuple(cos.shape)}, {tuple(sin.shape)}"
        )
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"k, v: expected [B, T, HK, D] beside q {tuple(q.shape)}, got {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if (k_cache is None) != (v_cache is None):
        raise ValueError("k_cache, v_cache: expected both or neither")
    if k_cache is not None:
        shape = torch.Size(
            (len(q) if page_table is None else len(k_cache), k_cache.shape[1], *k.shape[2:])
        )
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            checks.tensor(name, cache, (k.dtype,), shape, q.device)
    for name, entries in (("start", start), ("length", length)):
        checks.tensor(
            name, entries, (torch.int32,), q.shape[:1], q.device, optional=name == "length"
        )
    if checks.tensor("page_table", page_table, (torch.int32,), optional=True) is not None and len(
        page_table
    ) != len(q):
        raise ValueError(
            f"page_table: expected [B, pages] with B = {len(q)}, got {tuple(page_table.shape)}"
        )
    unsupported = None
    if k_cache is not None and (k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1):
        unsupported = "the last dimension of a cache is not contiguous"
    if use_kernel("rope_to_cache", q, k, v, k_cache, v_cache, unsupported=unsupported):
        from . import pointwise_triton

        return pointwise_triton.rope_to_cache(
            q, k, v, cos, sin, start, k_cache, v_cache, length, page_table
        )
    return rope_to_cache_reference(
        q, k, v, cos, sin, start, k_cache, v_cache, length=length, page_table=page_table
    )
