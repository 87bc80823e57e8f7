"""KVCache: one preallocated tensor of rotated keys and values, and the span that the next forward
works on.

CachePolicy says what refreshes may leave out. The decoding loop owns the cache and opens a span
before it calls the model; every BlockAttention reads that span. Spans live in small device tensors,
because a CUDA graph bakes host integers in.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastdllm_kernels.checks import flag, integer

from .config import ModelConfig


@dataclass(frozen=True)
class CachePolicy:
    """What refreshes leave out to save time, for some accuracy. By default nothing; a row never
    depends on its neighbours.

    prompt_refreshes: the prompt's keys and values are computed anew at every n-th refresh of a row,
    counted from its first, which always computes them; 0: at the first alone. The refreshes between
    compute and store only what comes after the prompt (where outputs are shifted, from the prompt's
    last position on: its output is the first one generated), over the prompt's keys and values as
    they were last stored. Other values than 1 need a cache.

    suffix_blocks: the canvas that a forward sees and computes ends w blocks of masks after the
    active block, at min(total, end + w * block_length); None: with the row's last mask. Cached
    steps see the same part as their refresh.

    keep_finished: the refreshes that do not compute the prompt begin with the block that was
    finished last, so that blocks before it keep the keys of the refresh after they were finished.
    With suffix_blocks such a refresh is w + 2 blocks long, wherever the active block stands. Needs
    prompt_refreshes other than 1.

    Raises TypeError and ValueError, naming the field.
    """

    prompt_refreshes: int = 1
    suffix_blocks: int | None = None
    keep_finished: bool = False

    def __post_init__(self):
        integer("CachePolicy.prompt_refreshes", self.prompt_refreshes, 0)
        if self.suffix_blocks is not None:
            integer("CachePolicy.suffix_blocks", self.suffix_blocks, 0)
        flag("CachePolicy.keep_finished", self.keep_finished)
        if self.keep_finished and self.prompt_refreshes == 1:
            raise ValueError(
                "CachePolicy.keep_finished: expected prompt_refreshes other than 1, which computes "
                "the prompt and all that follows in every refresh"
            )


@dataclass(frozen=True)
class Packing:
    """Rows of different lengths one after another, [1, N, ...], instead of padded, [R, T, ...]: for
    what works on tokens alone.

    row, offset: [N] int64, each token's row and its place in it. slot: [R, T] int64, where a row's
    tokens lie among the N; past its end, its last one.
    """

    row: torch.Tensor
    offset: torch.Tensor
    slot: torch.Tensor

    @classmethod
    def of(cls, length: torch.Tensor, width: int, tokens: int) -> "Packing":
        """For rows of length [R] int64 on the device, the longest of `width`, `tokens` together;
        nothing is read back.
        """
        first, in_row = length.cumsum(0) - length, torch.arange(width, device=length.device)
        row = torch.arange(len(length), device=length.device).repeat_interleave(
            length, output_size=tokens
        )
        offset = torch.arange(tokens, device=length.device) - first[row]
        return cls(row, offset, first[:, None] + torch.minimum(in_row, length[:, None] - 1))

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """[1, N, ...] -> [R, T, ...]."""
        return x[0][self.slot]

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """[R, T, ...] -> [1, N, ...]."""
        return x[self.row, self.offset][None]


@dataclass(frozen=True)
class Shape:
    """What the launches of a forward depend on that the host knows; the rest lies on the device.

    One captured CUDA graph serves every forward of a shape (for one number of rows).

    width: the positions that each row is given. block: the positions of each row whose logits are
    computed. stores: fresh keys and values are written to the cache (a refresh). whole: the tokens
    are the row's canvas from position 0 on. ragged: some row has fewer than `width` tokens. paged:
    only some rows of the cache take part, or in another order. shared: where all rows take part,
    store, and see one number of keys, that number; else 0. packed: the tokens of all rows together
    where they follow each other without padding; else 0.
    """

    width: int
    block: int = 0
    stores: bool = False
    whole: bool = False
    ragged: bool = False
    paged: bool = False
    shared: int = 0
    packed: int = 0


@dataclass(frozen=True)
class Span:
    """Where each row's tokens of one forward stand, and what they may attend to.

    start, length, kv_len: [R] int32 on the device. Row r's tokens sit at positions
    start[r] .. start[r] + length[r] - 1 of a canvas of kv_len[r] positions. Where `shape.whole`,
    they are all that the row sees; otherwise keys and values outside them come from the cache.
    page_table: [R, 1] int32, the cache row of each row of the forward; None where they are equal.
    packing: how the tokens lie where they are not padded.
    """

    start: torch.Tensor
    length: torch.Tensor
    kv_len: torch.Tensor
    shape: Shape
    page_table: torch.Tensor | None = None
    packing: Packing | None = None


def cache_bytes(config: ModelConfig, rows: int, capacity: int, dtype: torch.dtype) -> int:
    """What a KVCache of that size holds: 512 KiB a position for LLaDA-8B in bf16, 56 KiB for
    Dream-7B.
    """
    of_a_position = config.num_layers * 2 * config.num_kv_heads * config.head_dim
    return rows * capacity * of_a_position * dtype.itemsize


class KVCache:
    """Rotated keys and values of all layers: one tensor [layers, 2, B, S, HK, D].

    rows B and capacity S (positions per row) are fixed; `bytes` is what it holds: 512 KiB a
    position for LLaDA-8B and 56 KiB for Dream-7B in bf16. With capacity 0 nothing is stored and
    only the span counts (decoding without a cache). allocate: called as torch.zeros is; what its
    tensor holds is never read before a refresh has written it.
    """

    span: Span  # opened before the model is called

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        capacity: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        allocate: Callable[..., torch.Tensor] = torch.zeros,
    ):
        self.data = allocate(
            config.num_layers,
            2,
            rows,
            capacity,
            config.num_kv_heads,
            config.head_dim,
            device=device,
            dtype=dtype,
        )

    @property
    def bytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def layer(self, index: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The keys and values of one layer: two views [B, S, HK, D], or two None where nothing is
        stored.
        """
        return (self.data[index, 0], self.data[index, 1]) if self.data.numel() else (None, None)
