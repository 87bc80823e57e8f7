"""block_attention: the active block's queries over cached prefix + fresh block + cached suffix.

    out[b, t, h] = sum_j softmax_j(scale * rot(q[b, t, h]) . key[b, j, h // G]) value[b, j, h // G]

where j runs over the cached positions [kv_start, block_start) and [block_start + n, kv_len) and
over the block's own n fresh keys (G = H / HK heads share one key head). A concatenated key tensor
is never made and the cache is never rotated again: each key is read once, from where it lies.

Layouts: q [B, T, H, D]; k, v [B, T, HK, D]; caches [B, S, HK, D] with any strides, or pages
[num_pages, page_size, HK, D] with page_table [B, pages]. fp16, bf16, fp32; sums in fp32.
"""

import math
from functools import cache

import torch

from . import backend, checks
from .pointwise import positions_of, rotate

LIBRARY = torch.library.Library("fastdllm", "FRAGMENT")


def block_attention_reference(
    q,
    k,
    v,
    k_cache,
    v_cache,
    block_start,
    kv_len,
    *,
    kv_start=None,
    page_table=None,
    block_len=None,
    cos=None,
    sin=None,
    scale=None,
    return_lse=False,
    out=None,
):
    """See `block_attention`: the same result in plain PyTorch, fp32 inside."""
    (rows, width, heads, dim), kv_heads, device = q.shape, k.shape[2], q.device
    if cos is not None:
        at = positions_of(block_start, width, cos)
        q, k = rotate(q, cos[at], sin[at]), rotate(k, cos[at], sin[at])
    if page_table is not None:
        pages = page_table.long().clamp(
            0, len(k_cache) - 1
        )  # behind what a row sees a table may hold anything
        k_cache, v_cache = (cache[pages].flatten(1, 2) for cache in (k_cache, v_cache))
    start, in_block = block_start[:, None], torch.arange(width, device=device).expand(rows, -1)
    length = torch.full_like(start, width) if block_len is None else block_len[:, None]
    first = torch.zeros_like(start) if kv_start is None else kv_start[:, None]
    slot = torch.arange(k_cache.shape[1], device=device)
    cached = ((first <= slot) & (slot < start)) | (
        (start + length <= slot) & (slot < kv_len[:, None])
    )
    visible = torch.cat([cached, in_block < length], dim=1)
    keys, values = (
        torch.cat([cache, fresh], dim=1).float().masked_fill(~visible[:, :, None, None], 0)
        for cache, fresh in ((k_cache, k), (v_cache, v))
    )
    queries = q.float().unflatten(2, (kv_heads, heads // kv_heads)) * (
        dim**-0.5 if scale is None else scale
    )
    scores = torch.einsum("bthgd,bjhd->bthgj", queries, keys).masked_fill(
        ~visible[:, None, None, None], -math.inf
    )
    seen = visible.any(1)[:, None, None, None] & (in_block < length)[:, :, None, None]
    lse = torch.logsumexp(scores, dim=-1).masked_fill(~seen, -math.inf)
    weights = torch.exp(scores - torch.where(seen, lse, 0)[..., None]).masked_fill(
        ~seen[..., None], 0
    )
    result = torch.einsum("bthgj,bjhd->bthgd", weights, values).flatten(2, 3).to(q.dtype)
    result = result if out is None else out.copy_(result)
    return (result, lse.flatten(2, 3)) if return_lse else result


LIBRARY.define(
    "block_attention(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor block_start, Tensor kv_len, "
    "Tensor? kv_start, Tensor? page_table, Tensor? block_len, Tensor? cos, Tensor? sin, float scale, Tensor(a!) out, "
    "Tensor(b!)? lse) -> ()"
)


def _run(
    q,
    k,
    v,
    k_cache,
    v_cache,
    block_start,
    kv_len,
    kv_start,
    page_table,
    block_len,
    cos,
    sin,
    scale,
    out,
    lse,
):
    arguments = (q, k, v, k_cache, v_cache, block_start, kv_len)
    if backend.use_triton(
        "block_attention", q, _unsupported(q, k, v, k_cache, v_cache, cos, sin, page_table, out)
    ):
        kernel = _kernel(q, k, v, k_cache, v_cache, page_table, cos, out)
        kernel.launch(*arguments, kv_start, page_table, block_len, cos, sin, scale, out, lse)
        return
    result = block_attention_reference(
        *arguments,
        kv_start=kv_start,
        page_table=page_table,
        block_len=block_len,
        cos=cos,
        sin=sin,
        scale=scale,
        return_lse=lse is not None,
        out=out,
    )
    if lse is not None:
        lse.copy_(result[1])


def _kernel(q, k, v, k_cache, v_cache, page_table, cos, out):
    """The module whose kernel runs: on a Hopper its own, for what that takes."""
    from . import attention_triton

    hopper = _hopper() if backend.chip_of(q.device).hopper else None
    return (
        hopper
        if hopper and hopper.supports(q, k, v, k_cache, v_cache, page_table, cos, out)
        else attention_triton
    )


@cache
def _hopper():
    """attention_hopper, or None where the installed triton's Gluon is not one that it was written
    for (3.6 and later).
    """
    if tuple(map(int, backend.triton.__version__.split(".")[:2])) < (3, 6):
        return None
    try:
        from . import attention_hopper
    except (ImportError, AttributeError):
        return None
    return attention_hopper


def takes_whole_sequences(q, k, v) -> bool:
    """Whether block_attention is as fast as cuDNN over whole sequences: where its Hopper kernel
    takes them.
    """
    graded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if (
        graded
        or not q.is_cuda
        or torch.compiler.is_compiling()
        or backend.forced() == "reference"
        or backend.triton is None
    ):
        return False
    return backend.chip_of(q.device).hopper and _kernel(q, k, v, k, v, None, None, q) is _hopper()


def _unsupported(q, k, v, k_cache, v_cache, cos, sin, page_table, out):
    """Why the kernel cannot take these inputs, or None."""
    if q.shape[-1] > 256:
        return f"the head dimension is {q.shape[-1]}, above 256"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, k_cache, v_cache)):
        return "an input requires a gradient and the kernel has none"
    named = dict(
        q=q,
        k=k,
        v=v,
        k_cache=k_cache,
        v_cache=v_cache,
        cos=cos,
        sin=sin,
        page_table=page_table,
        out=out,
    )
    for name, tensor in named.items():
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"{name} is not contiguous in its last dimension"
    return None


LIBRARY.impl("block_attention", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fastdllm::block_attention", lambda *arguments: None, lib=LIBRARY)


def block_attention(
    q,
    k,
    v,
    k_cache,
    v_cache,
    block_start,
    kv_len,
    *,
    kv_start=None,
    page_table=None,
    block_len=None,
    cos=None,
    sin=None,
    scale=None,
    return_lse=False,
    out=None,
):
    """Attention of an active block over a cached prefix, itself and a cached suffix (Fast-dLLM,
    arXiv 2505.22618, 3.2).

    q [B, T, H, D]; k, v [B, T, HK, D]: the block's queries and fresh keys and values; H a multiple
    of HK. k_cache, v_cache [B, S, HK, D], any strides with D contiguous, or [num_pages, page_size,
    HK, D] with page_table [B, pages] int32. All of one dtype: float16, bfloat16 or float32.
    block_start, kv_len, kv_start [B] int32 on q's device: row b's queries sit at positions
    block_start[b] .. + T - 1 and see the cached [kv_start[b], block_start[b]), the block's own
    keys, and the cached [block_start[b] + T, kv_len[b]). What the cache holds at the block's own
    positions is never read; it is never written. block_len [B] int32: row b's block has only that
    many of the T positions (its suffix starts right after them; rows past it give 0). cos, sin
    [positions, D/2]: rotate q and k, in their dtype; cached keys are rotated already. scale:
    default D ** -0.5. out: where to write [B, T, H, D].

    Returns out [B, T, H, D], and with return_lse also the log-sum-exp of the scaled scores [B, T,
    H] fp32. A row without a visible key gives 0 and -inf. Nothing is read back to the host. Spans
    are trusted: they lie on the device, so a position outside the cache is the caller's error.
    Raises TypeError for dtypes, ValueError for shapes and devices.
    """
    _check(q, k, v, k_cache, v_cache, page_table)
    _check_spans(q, block_start=block_start, kv_len=kv_len, kv_start=kv_start, block_len=block_len)
    _check_rotation(q, cos, sin)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    checks.number("scale", scale)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    else:
        checks.tensor("out", out, (q.dtype,), q.shape, q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if return_lse else None
    torch.ops.fastdllm.block_attention(
        q,
        k,
        v,
        k_cache,
        v_cache,
        block_start,
        kv_len,
        kv_start,
        page_table,
        block_len,
        cos,
        sin,
        float(scale),
        out,
        lse,
    )
    return (out, lse) if return_lse else out


def _check(q, k, v, k_cache, v_cache, page_table):
    for name, tensor in (("q", q), ("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        checks.tensor(name, tensor, checks.FLOATS if tensor is q else (q.dtype,))
        if tensor.ndim != 4:
            raise ValueError(f"{name}: expected 4 dimensions, got shape {tuple(tensor.shape)}")
        if tensor.device != q.device:
            raise ValueError(
                f"{name}: expected a tensor on {q.device}, as q, got one on {tensor.device}"
            )
    rows, width, heads, dim = q.shape
    if not rows or not width or not heads or not dim:
        raise ValueError(f"q: expected a non-empty [B, T, H, D], got {tuple(q.shape)}")
    kv_heads = k.shape[2]
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != (rows, width, kv_heads, dim):
            raise ValueError(
                f"{name}: expected [B, T, HK, D] = {(rows, width, kv_heads, dim)}, got {tuple(tensor.shape)}"
            )
    if not kv_heads or heads % kv_heads:
        raise ValueError(
            f"k: expected a number of heads that divides H = {heads}, got HK = {kv_heads}"
        )
    if k_cache.shape != v_cache.shape:
        raise ValueError(
            f"v_cache: expected the shape of k_cache {tuple(k_cache.shape)}, got {tuple(v_cache.shape)}"
        )
    layout = "[B, S, HK, D]" if page_table is None else "[num_pages, page_size, HK, D]"
    if k_cache.shape[2:] != (kv_heads, dim) or (page_table is None and k_cache.shape[0] != rows):
        raise ValueError(
            f"k_cache: expected {layout} with B = {rows}, HK = {kv_heads}, D = {dim}, "
            f"got {tuple(k_cache.shape)}"
        )
    if checks.tensor("page_table", page_table, (torch.int32,), optional=True) is None:
        return
    if page_table.ndim != 2 or page_table.shape[0] != rows or page_table.device != q.device:
        raise ValueError(
            f"page_table: expected [B, pages] with B = {rows} on {q.device}, "
            f"got {tuple(page_table.shape)} on {page_table.device}"
        )


def _check_spans(q, **spans):
    for name, span in spans.items():
        checks.tensor(
            name,
            span,
            (torch.int32,),
            q.shape[:1],
            q.device,
            optional=name in ("kv_start", "block_len"),
        )


def _check_rotation(q, cos, sin):
    if (cos is None) != (sin is None):
        raise ValueError(
            f"cos, sin: expected both or neither, got only {'sin' if cos is None else 'cos'}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if checks.tensor(name, table, (torch.float32, q.dtype), optional=True) is None:
            continue
        if table.ndim != 2 or 2 * table.shape[1] != q.shape[-1] or table.shape != cos.shape:
            raise ValueError(
                f"{name}: expected [positions, D/2] with D = {q.shape[-1]}, got {tuple(table.shape)}"
            )
        if table.device != q.device:
            raise ValueError(
                f"{name}: expected a table on {q.device}, as q, got one on {table.device}"
            )
