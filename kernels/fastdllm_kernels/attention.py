"""block_attention: the active block's queries over cached prefix + fresh block + cached suffix.

    out[b, t, h] = sum_j softmax_j(scale * rot(q[b, t, h]) . key[b, j, h // G]) value[b, j, h // G]

where j runs over the cached positions [kv_start, block_start) and [block_start + n, kv_len) and
over the block's own n fresh keys (G = H / HK heads share one key head). A concatenated key tensor
is never made and the cache is never rotated again: each key is read once, from where it lies.

Layouts: q [B, T, H, D]; k, v [B, T, HK, D]; caches [B, S, HK, D] with any strides, or pages
[num_pages, page_size, HK, D] with page_table [B, pages]. fp16, bf16, fp32; sums in fp32.

Here are also `whole_attention` and `stored_attention`, by which a model attends over whole
sequences: they choose between this op and PyTorch's scaled_dot_product_attention (SDPA).
"""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import backend, checks
from .pointwise import positions_of, rotate

LIBRARY = torch.library.Library("fastdllm", "FRAGMENT")


def block_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_start: Tensor,
    kv_len: Tensor,
    *,
    kv_start: Tensor | None = None,
    page_table: Tensor | None = None,
    block_len: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Any:
    """See `block_attention`: the same result by PyTorch's own operations, fp32 inside."""
    rows, width, heads, dim = q.shape
    kv_heads, device = k.shape[2], q.device
    if cos is not None and sin is not None:
        at = positions_of(block_start, width, cos)
        q, k = rotate(q, cos[at], sin[at]), rotate(k, cos[at], sin[at])
    if page_table is not None:
        # Behind what a row sees a table may hold anything.
        pages = page_table.long().clamp(0, len(k_cache) - 1)
        k_cache, v_cache = k_cache[pages].flatten(1, 2), v_cache[pages].flatten(1, 2)

    start = block_start[:, None]
    length = torch.full_like(start, width) if block_len is None else block_len[:, None]
    first = torch.zeros_like(start) if kv_start is None else kv_start[:, None]
    slot = torch.arange(k_cache.shape[1], device=device)
    in_prefix = (first <= slot) & (slot < start)
    in_suffix = (start + length <= slot) & (slot < kv_len[:, None])
    in_block = torch.arange(width, device=device).expand(rows, -1) < length
    visible = torch.cat([in_prefix | in_suffix, in_block], dim=1)

    hidden = ~visible[:, :, None, None]
    keys = torch.cat([k_cache, k], dim=1).float().masked_fill(hidden, 0)
    values = torch.cat([v_cache, v], dim=1).float().masked_fill(hidden, 0)
    scale = dim**-0.5 if scale is None else scale
    queries = q.float().unflatten(2, (kv_heads, heads // kv_heads)) * scale
    scores = torch.einsum("bthgd,bjhd->bthgj", queries, keys)
    scores = scores.masked_fill(~visible[:, None, None, None], -math.inf)
    seen = visible.any(1)[:, None, None, None] & in_block[:, :, None, None]
    lse = torch.logsumexp(scores, dim=-1).masked_fill(~seen, -math.inf)
    weights = torch.exp(scores - torch.where(seen, lse, 0)[..., None])
    weights = weights.masked_fill(~seen[..., None], 0)
    result = torch.einsum("bthgj,bjhd->bthgd", weights, values).flatten(2, 3).to(q.dtype)
    result = result if out is None else out.copy_(result)
    return (result, lse.flatten(2, 3)) if return_lse else result


class Operands(NamedTuple):
    """What one call of `block_attention` works on, in the order of the torch op's schema.

    A chip's kernel is handed this one record: the public op's arguments, `out` always there and
    `lse` where it was asked for.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_start: Tensor
    kv_len: Tensor
    kv_start: Tensor | None = None
    page_table: Tensor | None = None
    block_len: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    scale: float = 1.0
    out: Tensor | None = None
    lse: Tensor | None = None


LIBRARY.define(
    "block_attention(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, "
    "Tensor block_start, Tensor kv_len, Tensor? kv_start, Tensor? page_table, Tensor? block_len, "
    "Tensor? cos, Tensor? sin, float scale, Tensor(a!) out, Tensor(b!)? lse) -> ()"
)


def _run(*operands):
    x = Operands._make(operands)
    if backend.use_triton("block_attention", x.q, _unsupported(x)):
        _kernel(x).launch(x)
        return
    given = x._asdict()
    lse = given.pop("lse")
    result = block_attention_reference(**given, return_lse=lse is not None)
    if lse is not None:
        lse.copy_(result[1])


LIBRARY.impl("block_attention", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fastdllm::block_attention", lambda *operands: None, lib=LIBRARY)


def _unsupported(x):
    """Why no kernel takes these operands, or None."""
    if x.q.shape[-1] > 256:
        return f"the head dimension is {x.q.shape[-1]}, above 256"
    if torch.is_grad_enabled() and any(t.requires_grad for t in x[:5]):
        return "an input requires a gradient and the kernel has none"
    for name in ("q", "k", "v", "k_cache", "v_cache", "cos", "sin", "page_table", "out"):
        tensor = getattr(x, name)
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"{name} is not contiguous in its last dimension"
    return None


class Kernel(Protocol):
    """What the file of a chip's kernel offers: attention_triton, the portable one, and
    attention_hopper.

    What they are asked about has passed `_unsupported`.
    """

    def supports(self, x: Operands) -> bool:
        """Whether this kernel takes these operands. The portable one takes all."""

    def config(
        self,
        B: int,
        T: int,
        H: int,
        HK: int,
        D: int,
        capacity: int,
        itemsize: int,
        chip: backend.Chip,
    ) -> Any:
        """The file's frozen `Config` for q [B, T, H, D], k [B, T, HK, D], `capacity` cached slots
        a row and `itemsize` bytes an element. Pure, cached, and a measured reason beside each
        branch.
        """

    def launch(self, x: Operands, chosen: Any = None) -> None:
        """Run the kernel into x.out and x.lse; `chosen`, a Config, replaces what `config` picks."""


def _kernel(x):
    """The module whose kernel computes x: a chip's own before the portable one."""
    for kernel in _kernels(backend.chip_of(x.q.device).hopper):
        if kernel.supports(x):
            return kernel


@cache
def _kernels(hopper: bool) -> tuple[Kernel, ...]:
    """The modules whose kernels may run, in the order of preference.

    attention_hopper is left out where the installed triton's Gluon is not one that it was written
    for (3.6 and later), and under the interpreter, which Gluon does not have.
    """
    from . import attention_triton

    version = tuple(map(int, backend.triton.__version__.split(".")[:2]))
    if not hopper or version < (3, 6) or backend.interpreting():
        return (attention_triton,)
    try:
        from . import attention_hopper
    except (ImportError, AttributeError):
        return (attention_triton,)
    return attention_hopper, attention_triton


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_start: Tensor,
    kv_len: Tensor,
    *,
    kv_start: Tensor | None = None,
    page_table: Tensor | None = None,
    block_len: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Any:
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
    are trusted: they lie on the device, so a position outside the cache is the caller's error. A
    page that does not exist is read as the nearest one that does. Raises TypeError for dtypes,
    ValueError for shapes and devices.
    """
    _check(q, k, v, k_cache, v_cache, page_table)
    _check_spans(q, block_start=block_start, kv_len=kv_len, kv_start=kv_start, block_len=block_len)
    _check_rotation(q, cos, sin)
    scale = q.shape[-1] ** -0.5 if scale is None else checks.number("scale", scale)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    else:
        checks.tensor("out", out, (q.dtype,), q.shape, q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if return_lse else None
    x = Operands(
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
    )
    torch.ops.fastdllm.block_attention(*x)
    return (out, lse) if return_lse else out


# By speed over 2,048 positions on an H200; the last takes any dtype and mask.
SDPA_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def fastest_sdpa(tensor: Tensor) -> AbstractContextManager:
    """A context in which PyTorch's SDPA prefers SDPA_BACKENDS in their order, on a GPU. To be
    entered once a forward: it takes 50 us.
    """
    return sdpa_kernel(SDPA_BACKENDS, set_priority=True) if tensor.is_cuda else nullcontext()


def whole_attention(
    q: Tensor, k: Tensor, v: Tensor, *, start: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    """Attention of every query of a row to every key of it, both rotated already.

    q [B, T, H, D]; k, v [B, L, HK, D]; without `start` they may differ in T and L. start [B] int32
    on the device, all zeros: where the caller holds such a tensor and T = L, `block_attention` may
    compute this, which it does as fast as cuDNN where a chip has its own kernel, and without the
    50 to 110 ms that cuDNN takes to prepare for every length that is new. lengths [B] int32, with
    start: row b has only that many positions; those past them give values that nobody may read.
    Rows of different lengths take `block_attention` on every GPU, which needs no mask: under one,
    SDPA falls back to its slow paths. Everything else is SDPA's. Returns [B, T, H, D].
    """
    if start is not None:
        x = Operands(q, k, v, k[:, :0], v[:, :0], start, start, out=q)
        if (lengths is not None and q.is_cuda) or _has_own_kernel(x):
            return block_attention(*x[:7], block_len=lengths)
    mask = None
    if lengths is not None:
        position = torch.arange(k.shape[1], device=k.device)
        mask = (position < lengths[:, None])[:, None, None]
    out = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def stored_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_start: Tensor,
    kv_len: Tensor,
    *,
    stored: int,
) -> Tensor:
    """`block_attention` of rows that stand alike, over a cache that holds their own keys and values
    already.

    Arguments as there, rotated and without pages. Every row begins at one position and sees the
    first `stored` slots of its cache, its own T among them, which kv_len [B] says on the device:
    so SDPA may compute it, and does where no chip's own kernel takes it. Returns [B, T, H, D].
    """
    x = Operands(q, k, v, k_cache, v_cache, block_start, kv_len, out=q)
    if _has_own_kernel(x):
        return block_attention(*x[:7])
    return whole_attention(q, k_cache[:, :stored], v_cache[:, :stored])


def _has_own_kernel(x: Operands) -> bool:
    """Whether block_attention computes x by a chip's own kernel: over whole sequences the portable
    one has 0.6 of cuDNN's speed.
    """
    if not x.q.is_cuda or torch.compiler.is_compiling():
        return False
    if backend.triton is None or backend.forced() == "reference":
        return False
    return _unsupported(x) is None and _kernel(x) is not _kernels(False)[0]


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
    fresh = (rows, width, kv_heads, dim)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != fresh:
            raise ValueError(f"{name}: expected [B, T, HK, D] = {fresh}, got {tuple(tensor.shape)}")
    if not kv_heads or heads % kv_heads:
        raise ValueError(
            f"k: expected a number of heads that divides H = {heads}, got HK = {kv_heads}"
        )
    if k_cache.shape != v_cache.shape:
        raise ValueError(
            f"v_cache: expected the shape of k_cache {tuple(k_cache.shape)}, "
            f"got {tuple(v_cache.shape)}"
        )
    layout = "[B, S, HK, D]" if page_table is None else "[num_pages, page_size, HK, D]"
    if k_cache.shape[2:] != (kv_heads, dim) or (page_table is None and k_cache.shape[0] != rows):
        raise ValueError(
            f"k_cache: expected {layout} with B = {rows}, HK = {kv_heads}, D = {dim}, "
            f"got {tuple(k_cache.shape)}"
        )
    if page_table is not None:
        checks.pages(page_table, k_cache, q)


def _check_spans(q, **spans):
    for name, span in spans.items():
        optional = name in ("kv_start", "block_len")
        checks.tensor(name, span, (torch.int32,), q.shape[:1], q.device, optional=optional)


def _check_rotation(q, cos, sin):
    if (cos is None) != (sin is None):
        given = "sin" if cos is None else "cos"
        raise ValueError(f"cos, sin: expected both or neither, got only {given}")
    if cos is not None:
        checks.rotation(cos, sin, q)
