"""BlockAttention: project, rotate, attend, project. It knows the cache's span and no model family."""

import threading
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdllm_kernels import block_attention, rope_to_cache
from fastdllm_kernels.attention import takes_whole_sequences

from .bare import multiply
from .cache import KVCache, Span


class RotaryTable:
    """cos and sin [positions, D/2] of RoPE, made once per device, dtype and length and shared by
    all layers.

    A table is as long as the work at hand needs, rounded up to a power of two: configs promise more
    positions than anybody decodes. None is let go of: a captured graph knows its address.

    Not module buffers: a model's `.to(torch.bfloat16)` must not round a table that its family wants
    in fp32.
    """

    def __init__(self, theta: float, head_dim: int, positions: int, in_fp32: bool):
        self.theta, self.head_dim, self.positions, self.in_fp32 = (
            theta,
            head_dim,
            positions,
            in_fp32,
        )
        self._tables = {}

    def __call__(self, like: torch.Tensor, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tables on the device of `like`, in fp32 or in its dtype, of at least the first so
        many positions, or of all that the model has.
        """
        dtype = torch.float32 if self.in_fp32 else like.dtype
        length = min(self.positions, 1 << (positions - 1).bit_length())
        key = like.device, dtype, length
        tables = self._tables.get(key)
        if tables is None:
            exponent = (
                torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=like.device)
                / self.head_dim
            )
            position = torch.arange(length, dtype=torch.float32, device=like.device)
            angle = torch.outer(position, 1.0 / self.theta**exponent)
            tables = angle.cos().to(dtype), angle.sin().to(dtype)
            if (
                type(angle) is torch.Tensor
            ):  # and no stand-in of a trace, a FakeTensor, which must not outlive it
                self._tables[key] = tables
        return tables


class Attached(threading.local):
    """What all layers of a model share: the cache whose span this thread's forward works on, or
    None.
    """

    cache: KVCache | None = None

    def __reduce__(self):  # a copy of a model has nothing attached
        return Attached, ()


class BlockAttention(nn.Module):
    """Bidirectional attention of the tokens at hand over themselves and over what a KVCache holds
    around them.

    Without a cache it is plain full attention. With one, `cache.span` says where the tokens stand:
    in a refresh it stores rotated keys and values and attends with what is fastest
    (`full_attention`); over a block it calls `block_attention`.
    """

    def __init__(
        self,
        hidden_size,
        num_heads,
        num_kv_heads,
        head_dim,
        *,
        layer,
        rotary: RotaryTable,
        attached: Attached,
        qkv_bias=False,
    ):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.layer = (
            num_heads,
            num_kv_heads,
            head_dim,
            layer,
        )
        self.rotary, self.attached = rotary, attached
        self.qkv = nn.Linear(hidden_size, (num_heads + 2 * num_kv_heads) * head_dim, bias=qkv_bias)
        self.out = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [R, T, hidden_size] -> [R, T, hidden_size]."""
        return self.out(self.heads(x))

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """What the heads found, before the output projection: x [R, T, hidden_size] -> [R, T, H *
        D].
        """
        rows, width, _ = x.shape
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = multiply(self.qkv, x).view(rows, width, heads + 2 * kv_heads, self.head_dim)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
        return attend(q, k, v, self.rotary, self.attached.cache, self.layer).reshape(
            rows, width, heads * self.head_dim
        )


def attend(q, k, v, rotary: RotaryTable, cache: KVCache | None, layer: int) -> torch.Tensor:
    """BlockAttention between its projections: q [R, T, H, D] and k, v [R, T, HK, D], not rotated
    yet -> [R, T, H, D].

    Where the cache's span has a packing, [1, N, ...] -> [1, N, H, D]: only here do rows lie beside
    each other.
    """
    packing = None if cache is None else cache.span.packing
    if packing is None:
        return _attend(q, k, v, rotary, cache, layer)
    return packing.pack(_attend(*map(packing.unpack, (q, k, v)), rotary, cache, layer))


def _attend(q, k, v, rotary, cache, layer):
    capacity = 0 if cache is None else cache.data.shape[3]
    cos, sin = rotary(q, max(capacity, q.shape[1]))
    if cache is None:
        start = torch.zeros(q.shape[0], dtype=torch.int32, device=q.device)
        q, k = rope_to_cache(q, k, v, cos, sin, start)
        return full_attention(q, k, v, None)
    span, (k_cache, v_cache) = cache.span, cache.layer(layer)
    if span.shape.whole or span.shape.stores:
        q, k = rope_to_cache(
            q,
            k,
            v,
            cos,
            sin,
            span.start,
            k_cache,
            v_cache,
            length=span.length,
            page_table=span.page_table,
        )
        cos = sin = None
    if span.shape.whole:
        return full_attention(q, k, v, span)
    if span.shape.shared and not takes_whole_sequences(q, k, v):
        return full_attention(
            q, k_cache[:, : span.shape.shared], v_cache[:, : span.shape.shared], None
        )
    return block_attention(
        q,
        k,
        v,
        k_cache,
        v_cache,
        span.start,
        span.kv_len,
        page_table=span.page_table,
        cos=cos,
        sin=sin,
        block_len=span.length if span.shape.ragged else None,
    )


# By speed on an H200 at 2,048 positions: 110 us, 201, and then what takes any dtype and mask.
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def fastest_sdpa(tensor: torch.Tensor):
    """A context in which PyTorch's SDPA prefers BACKENDS in their order, on a GPU. Entered once a
    forward: it takes 50 us.
    """
    return sdpa_kernel(BACKENDS, set_priority=True) if tensor.is_cuda else nullcontext()


def full_attention(q, k, v, span: Span | None):
    """Every query of a row with every key of it: [R, T, H, D] and [R, L, HK, D], rows no longer
    than the span says.

    On a Hopper block_attention: as fast as cuDNN there (2,048 positions: 107 us and 110 on an
    H100), which takes 50 to 110 ms to prepare for every length that is new. Elsewhere PyTorch's
    SDPA; but rows of different lengths take block_attention on every GPU, which needs no mask:
    under one, SDPA falls back to its slow paths. Positions past a row's length give values that
    nobody reads. Returns [R, T, H, D].
    """
    mask, ragged = None, span is not None and span.shape.ragged
    if span is not None and (ragged and q.is_cuda or takes_whole_sequences(q, k, v)):
        lengths = span.length if ragged else None
        return block_attention(
            q, k, v, k[:, :0], v[:, :0], span.start, span.start, block_len=lengths
        )
    if ragged:
        mask = (torch.arange(k.shape[1], device=k.device) < span.length[:, None])[:, None, None]
    out = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)
