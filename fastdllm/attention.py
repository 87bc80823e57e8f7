"""BlockAttention: project, rotate, attend, project. It knows the cache's span, no model family and
no chip.
"""

import threading

import torch
from torch import nn

from fastdllm_kernels import block_attention, rope_to_cache
from fastdllm_kernels.attention import stored_attention, whole_attention

from .bare import multiply
from .cache import KVCache


class RotaryTable:
    """cos and sin [positions, D/2] of RoPE, made once per device, dtype and length and shared by
    all layers.

    A table is as long as the work at hand needs, rounded up to a power of two: configs promise more
    positions than anybody decodes. None is let go of: a captured graph knows its address.

    Not module buffers: a model's `.to(torch.bfloat16)` must not round a table that its family wants
    in fp32.
    """

    def __init__(self, theta: float, head_dim: int, positions: int, in_fp32: bool):
        self.theta = theta
        self.head_dim = head_dim
        self.positions = positions
        self.in_fp32 = in_fp32
        self._tables: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, like: torch.Tensor, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tables on the device of `like`, in fp32 or in its dtype, of at least the first so
        many positions, or of all that the model has.
        """
        dtype = torch.float32 if self.in_fp32 else like.dtype
        length = min(self.positions, 1 << (positions - 1).bit_length())
        key = like.device, dtype, length
        tables = self._tables.get(key)
        if tables is None:
            column = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=like.device)
            frequency = 1.0 / self.theta ** (column / self.head_dim)
            position = torch.arange(length, dtype=torch.float32, device=like.device)
            angle = torch.outer(position, frequency)
            tables = angle.cos().to(dtype), angle.sin().to(dtype)
            # A trace's stand-in, a FakeTensor, must not outlive it.
            if type(angle) is torch.Tensor:
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

    Without a cache it is attention of whole rows. With one, `cache.span` says where the tokens
    stand: a refresh stores rotated keys and values and attends over whole rows; over a block it is
    `block_attention`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        layer: int,
        rotary: RotaryTable,
        attached: Attached,
        qkv_bias: bool = False,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.layer = layer
        self.rotary = rotary
        self.attached = attached
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


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rotary: RotaryTable,
    cache: KVCache | None,
    layer: int,
) -> torch.Tensor:
    """BlockAttention between its projections: q [R, T, H, D] and k, v [R, T, HK, D], not rotated
    yet -> [R, T, H, D].

    Where the cache's span has a packing, [1, N, ...] -> [1, N, H, D]: only here do rows lie beside
    each other.
    """
    packing = None if cache is None else cache.span.packing
    if packing is None:
        return _attend_rows(q, k, v, rotary, cache, layer)
    q, k, v = packing.unpack(q), packing.unpack(k), packing.unpack(v)
    return packing.pack(_attend_rows(q, k, v, rotary, cache, layer))


def _attend_rows(q, k, v, rotary, cache, layer):
    """`attend` of rows that lie beside each other, padded to one width."""
    capacity = 0 if cache is None else cache.data.shape[3]
    cos, sin = rotary(q, max(capacity, q.shape[1]))
    if cache is None:
        start = torch.zeros(q.shape[0], dtype=torch.int32, device=q.device)
        q, k = rope_to_cache(q, k, v, cos, sin, start)
        return whole_attention(q, k, v)
    span, (k_cache, v_cache) = cache.span, cache.layer(layer)
    lengths = span.length if span.shape.ragged else None
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
        return whole_attention(q, k, v, start=span.start, lengths=lengths)
    if span.shape.shared:
        return stored_attention(
            q, k, v, k_cache, v_cache, span.start, span.kv_len, stored=span.shape.shared
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
        block_len=lengths,
    )
