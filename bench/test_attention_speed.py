"""block_attention against what else attends: a block over a cache, and whole sequences.

Ours rotates q and the block's keys inside; the others get rotated queries, and keys already laid
side by side.
"""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from timing import DEVICE, ON_GPU, Competitor, Contest
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdllm_kernels import block_attention, block_attention_reference, rope_to_cache_reference

PEERS = (
    ("SDPA flash", "SDPA cuDNN", "flash-attn-4", "flash-attn", "flex_attention") if ON_GPU else ()
)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


@dataclass(frozen=True)
class Case:
    """rows x width queries over `keys` keys each (the block's own among them); flex: whether it is
    worth its compilation.

    turned: ours gets rotated queries and keys, too, as a refresh has them.
    """

    heads: int
    kv_heads: int
    rows: int
    keys: int
    reach: float | None = None
    width: int = 32
    dim: int = 128
    flex: bool = False
    turned: bool = False

    def __str__(self):
        shape = (
            f"{self.heads}-{self.kv_heads} heads, B {self.rows}, T {self.width}, {self.keys} keys"
        )
        return shape + ", rotated" * self.turned


BLOCKS = [
    Case(32, 32, 1, 512, 8),
    Case(32, 32, 1, 1024, 10, flex=True),
    Case(32, 32, 1, 2048, 14),
    Case(32, 32, 1, 4096, 21),
    Case(32, 32, 8, 1024, 35),
    Case(32, 32, 8, 2048, 66),
    Case(32, 32, 32, 1024, 131),
    Case(32, 32, 32, 2048, 252),
    Case(28, 4, 1, 512, 7),
    Case(28, 4, 1, 1024, 8),
    Case(28, 4, 1, 4096, 12),
    Case(28, 4, 8, 1024, 13, flex=True),
    Case(28, 4, 8, 2048, 20),
    Case(28, 4, 32, 1024, 32),
    Case(28, 4, 32, 2048, 54),
    # Beyond the table: other block lengths, and a group of 4.
    Case(32, 32, 1, 2048, width=4),
    Case(32, 32, 1, 2048, width=8),
    Case(32, 32, 1, 2048, width=64),
    Case(32, 8, 8, 2048),
]
# The target there is 0.85 of cuDNN's speed.
LENGTHS = (1024, 39.4), (2048, 130.6), (4096, 488)
WHOLE = [
    Case(32, 32, 1, length, reach, length, turned=turned)
    for turned in (False, True)
    for length, reach in LENGTHS
]
SMALL = [
    Case(4, 4, 1, 64, width=8, dim=64),
    Case(7, 1, 2, 96, width=8, dim=64),
    Case(4, 2, 1, 32, width=32, dim=64),
    Case(4, 2, 1, 32, width=32, dim=64, turned=True),
]
CASES = BLOCKS + WHOLE if ON_GPU else SMALL


def inputs(case: Case, index: int):
    """Independent inputs; the block stands in the middle, between a prefix and a suffix."""
    generator = torch.Generator(DEVICE).manual_seed(index)

    def normal(*shape):
        return torch.empty(shape, dtype=DTYPE, device=DEVICE).normal_(generator=generator)

    rows, width, dim = case.rows, case.width, case.dim
    qkv = normal(rows, width, case.heads + 2 * case.kv_heads, dim)
    q, k, v = qkv.split([case.heads, case.kv_heads, case.kv_heads], dim=2)
    first = (case.keys - width) // 2
    start = torch.full((rows,), first, dtype=torch.int32, device=DEVICE)
    length = torch.full((rows,), case.keys, dtype=torch.int32, device=DEVICE)
    k_cache = normal(rows, case.keys, case.kv_heads, dim)
    v_cache = normal(rows, case.keys, case.kv_heads, dim)
    cos, sin = tables(case.keys, dim)
    # What stands in the cache at the block's positions is never read by ours; there it serves the
    # others.
    turned = rope_to_cache_reference(q, k, v, cos, sin, start)
    k_cache[:, first : first + width] = turned[1]
    v_cache[:, first : first + width] = v
    ours = dict(
        q=q,
        k=k,
        v=v,
        k_cache=k_cache,
        v_cache=v_cache,
        block_start=start,
        kv_len=length,
        cos=cos,
        sin=sin,
    )
    if width == case.keys:
        ours |= dict(k_cache=k_cache[:, :0], v_cache=v_cache[:, :0])
    if case.turned:
        ours |= dict(q=turned[0], k=turned[1], cos=None, sin=None)
    return ours, turned[0], k_cache, v_cache


@cache
def tables(positions, dim):
    angle = torch.outer(
        torch.arange(positions, device=DEVICE),
        1e4 ** -(torch.arange(0, dim, 2, device=DEVICE) / dim),
    )
    return angle.cos(), angle.sin()


def sdpa(backend):
    def call(buffer):
        _, q, k, v = buffer
        with sdpa_kernel(backend):
            out = functional.scaled_dot_product_attention(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                enable_gqa=q.shape[2] != k.shape[2],
            )
        return out.transpose(1, 2)

    return call


def flash_attention_4(buffer):
    from flash_attn.cute import flash_attn_func

    result = flash_attn_func(*buffer[1:])
    return result[0] if isinstance(result, tuple) else result


def flash_attention(buffer):
    from flash_attn import flash_attn_func

    return flash_attn_func(*buffer[1:])


@cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(buffer):
    q, k, v = (x.transpose(1, 2) for x in buffer[1:])
    return compiled_flex()(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def check(result, buffer):
    """At most twice what PyTorch's own attention loses in this dtype, plus a few units in the last
    place.
    """
    ours, *others = buffer
    given = {
        name: x.float() if x is not None and x.is_floating_point() else x
        for name, x in ours.items()
    }
    oracle = block_attention_reference(**given)
    torchs = sdpa(
        SDPBackend.MATH if not ON_GPU else [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    )(buffer)
    lost = (torchs.float() - oracle).abs().max()
    allowed = 2 * lost + 4 * torch.finfo(result.dtype).eps * oracle.abs()
    error = (result.float() - oracle).abs()
    assert (error <= allowed).all(), f"off by {error.max():.3g} where PyTorch loses {lost:.3g}"


def build(case: Case) -> Contest:
    competitors = {
        "ours": Competitor(lambda b: block_attention(**b[0]), theirs=False),
        "reference": Competitor(lambda b: block_attention_reference(**b[0]), theirs=True),
    }
    if ON_GPU:
        competitors |= {
            "SDPA flash": Competitor(sdpa(SDPBackend.FLASH_ATTENTION)),
            "SDPA cuDNN": Competitor(sdpa(SDPBackend.CUDNN_ATTENTION)),
            "flash-attn-4": Competitor(flash_attention_4),
            "flash-attn": Competitor(flash_attention),
        }
        competitors |= {"flex_attention": Competitor(flex)} if case.flex else {}
    queries, keys = case.rows * case.width * case.heads, case.rows * case.keys * case.kv_heads
    moved = 2 * (queries + keys) * case.dim * DTYPE.itemsize
    operations = 4 * queries * case.keys * case.dim
    op = "full attention" if case.width == case.keys else "block_attention"
    return Contest(
        op, str(case), competitors, lambda i: inputs(case, i), check, moved, operations, case.reach
    )


@pytest.mark.parametrize("name", ("ours", *PEERS, "reference"))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case, name, compete):
    compete(build, case, name)
