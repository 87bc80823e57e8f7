"""block_attention: the reference and the kernel against a naive fp64 loop, and against what
PyTorch's own SDPA loses.

Shapes say what they reach: T around the tiles (1, 4, 31, 32, 33, 64), empty prefix, empty suffix,
ragged rows, left offsets, groups 1, 4, 7, 8, every head dimension, strided and paged caches.
Whatever a row must not see holds NaN or infinity; outputs hold NaN before the call.
"""

import math

import pytest
import torch

from fastdllm_kernels import backend, block_attention, block_attention_reference
from fastdllm_kernels.attention import Operands, stored_attention, whole_attention
from fastdllm_kernels.pointwise import rotate

triton = pytest.importorskip("triton")
from fastdllm_kernels import attention_triton  # noqa: E402
from fastdllm_kernels.attention_triton import Config, config  # noqa: E402
from fastdllm_kernels.backend import Chip  # noqa: E402

H200 = Chip(132, 232448, overlap=True)
SPANS = ("block_start", "kv_len", "kv_start", "block_len")


def inputs(
    dtype,
    device,
    *,
    T=4,
    H=2,
    HK=2,
    D=64,
    S=48,
    block_start=(20,),
    kv_len=None,
    kv_start=None,
    block_len=None,
    page=0,
    rotation=None,
    layout="contiguous",
    seed=0,
):
    """Arguments of block_attention by name; every cached slot and fresh row that must have no
    influence is poisoned.
    """
    B, random = len(block_start), torch.Generator().manual_seed(seed)
    fused = torch.randn(B, T, (H + 2 * HK) * D, generator=random).to(device, dtype)
    q, k, v = (x.unflatten(-1, (-1, D)) for x in fused.split([H * D, HK * D, HK * D], dim=-1))
    caches = [torch.randn(B, S, HK, D, generator=random).to(device, dtype) for _ in range(2)]
    given = dict(
        block_start=block_start, kv_len=kv_len or (S,) * B, kv_start=kv_start, block_len=block_len
    )
    for b in range(B):
        seen, length = visible(given, b, S, T)
        unseen = [slot for slot in range(S) if slot not in seen]
        for cache in caches:
            cache[b, unseen] = math.nan if b % 2 else math.inf
        q[b, length:] = math.nan
        k[b, length:] = math.nan
        v[b, length:] = math.inf
    if layout == "heads first":
        caches = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in caches]
    elif layout == "unlike":
        caches[1] = caches[1].transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "contiguous":
        q, k, v = (x.contiguous() for x in (q, k, v))
    spans = dict.fromkeys(SPANS)
    for name, span in given.items():
        if span is not None:
            spans[name] = torch.tensor(span, dtype=torch.int32, device=device)
    table = None
    if page:
        caches, table = paged(caches, page, random)
    cos = sin = None
    if rotation:
        angles = torch.rand(S + 2 * T, D // 2, generator=random) * 100
        table_dtype = torch.float32 if rotation == "fp32" else dtype
        cos, sin = angles.cos().to(device, table_dtype), angles.sin().to(device, table_dtype)
    return dict(
        q=q,
        k=k,
        v=v,
        k_cache=caches[0],
        v_cache=caches[1],
        page_table=table,
        cos=cos,
        sin=sin,
        **spans,
    )


def visible(given, b, S, T):
    """(cached slots that row b sees, the length of its block)."""
    start = given["block_start"][b]
    length = T if given["block_len"] is None else given["block_len"][b]
    first = 0 if given["kv_start"] is None else given["kv_start"][b]
    slots = [*range(first, start), *range(start + length, given["kv_len"][b])]
    return [slot for slot in slots if slot < S], length


def paged(caches, page, random):
    """The caches cut into shuffled pages among others full of NaN, and the page table; entries past
    the end are wild.
    """
    B, S, HK, D = caches[0].shape
    count = -(-S // page)
    order = torch.randperm(B * count + 3, generator=random)
    pools = []
    for cache in caches:
        pool = torch.full(
            (B * count + 3, page, HK, D), math.nan, dtype=cache.dtype, device=cache.device
        )
        padded = torch.full(
            (B, count * page, HK, D), math.nan, dtype=cache.dtype, device=cache.device
        )
        padded[:, :S] = cache
        pool[order[: B * count].to(cache.device)] = padded.view(B * count, page, HK, D)
        pools.append(pool)
    table = torch.full((B, count + 2), 2**30, dtype=torch.int32)
    table[:, :count] = order[: B * count].view(B, count)
    return pools, table.to(caches[0].device)


def oracle(x, scale=None):
    """(out, lse) in fp64 by a loop over rows and heads, and what SDPA gives for the same keys in
    the inputs' dtype.
    """
    B, T, H, D = x["q"].shape
    HK = x["k"].shape[2]
    scale = D**-0.5 if scale is None else scale
    out = torch.zeros(B, T, H, D, dtype=torch.float64)
    lse = torch.full((B, T, H), -math.inf, dtype=torch.float64)
    library = torch.zeros(B, T, H, D, dtype=x["q"].dtype)
    given = {name: None if x[name] is None else x[name].tolist() for name in SPANS}
    caches = [x[name] if x["page_table"] is None else None for name in ("k_cache", "v_cache")]
    for b in range(B):
        S = x["k_cache"].shape[1] if x["page_table"] is None else given["kv_len"][b]
        slots, length = visible(given, b, S, T)
        if x["page_table"] is not None:
            size = x["k_cache"].shape[1]
            at = [(int(x["page_table"][b, slot // size]), slot % size) for slot in slots]
            cached = [
                torch.stack([x[name][i, j] for i, j in at]) if at else x[name][0, :0]
                for name in ("k_cache", "v_cache")
            ]
        else:
            cached = [cache[b, slots] for cache in caches]
        q, k, v = (x[name][b : b + 1, :length] for name in "qkv")
        rounded = [q, k]
        if x["cos"] is not None:
            angles = [
                table[given["block_start"][b] :][:length][None] for table in (x["cos"], x["sin"])
            ]
            rounded = [rotate(y, *angles) for y in (q, k)]
            q, k = (rotate(y.double(), *(angle.double() for angle in angles)) for y in (q, k))
        if not slots and not length:
            continue
        for head in range(H):
            keys = torch.cat([cached[0].double(), k[0].double()])[:, head * HK // H]
            values = torch.cat([cached[1], v[0]]).double()[:, head * HK // H]
            scores = scale * (q[0, :, head].double() @ keys.T)
            lse[b, :length, head] = torch.logsumexp(scores, -1).cpu()
            out[b, :length, head] = (torch.softmax(scores, -1) @ values).cpu()
        keys, values = torch.cat([cached[0], rounded[1][0]]), torch.cat([cached[1], v[0]])
        heads_first = [
            y.transpose(-3, -2)[None] if y.ndim == 3 else y.transpose(1, 2)
            for y in (rounded[0], keys, values)
        ]
        heads_first[1:] = [y.repeat_interleave(H // HK, dim=1) for y in heads_first[1:]]
        if scale <= 0:  # the library's kernels take neither
            heads_first[0] = -heads_first[0]
        result = torch.nn.functional.scaled_dot_product_attention(
            *heads_first, scale=max(abs(scale), 1e-6)
        )
        library[b, :length] = result.transpose(1, 2)[0].cpu()
    return out, lse, library


def assert_close(x, out, lse, scale=None):
    """At most twice SDPA's error in the same dtype, plus a few units in the last place of the
    largest element.
    """
    true_out, true_lse, library = oracle(x, scale)
    ulp = torch.finfo(out.dtype).eps
    allowed = 2 * (library.double() - true_out).abs().max() + 4 * ulp * true_out.abs().max()
    error = (out.cpu().double() - true_out).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
    empty = true_lse == -math.inf
    assert (lse.cpu() == -math.inf).equal(empty)
    # The log-sum-exp inherits the rounding of the rotated queries and keys, in units of the scores.
    loss = 8 * ulp if x["cos"] is not None else 64 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(
        lse.cpu().double()[~empty], true_lse[~empty], rtol=loss, atol=4 * loss
    )
    assert not out.cpu()[empty].any()


def run(x, chosen=None, scale=None, kernel=attention_triton):
    """The op on x with poisoned outputs, through the public call or, with a Config, through the
    kernel's launcher.
    """
    out = torch.full(x["q"].shape, math.nan, dtype=x["q"].dtype, device=x["q"].device)
    if chosen is None:
        result, lse = block_attention(**x, scale=scale, return_lse=True, out=out)
        assert result is out
        return out, lse
    lse = torch.full(out.shape[:3], math.nan, dtype=torch.float32, device=out.device)
    scale = out.shape[-1] ** -0.5 if scale is None else scale
    kernel.launch(Operands(**x, scale=scale, out=out, lse=lse), chosen)
    return out, lse


CASES = {
    "one position": dict(T=1, H=4, HK=4),
    "four positions, group 4": dict(T=4, H=4, HK=1, rotation="fp32"),
    "31, group 7": dict(T=31, H=7, HK=1, S=70, rotation="own"),
    "32": dict(T=32, H=2, HK=2, D=128, S=96, block_start=(30,), rotation="own"),
    "33": dict(T=33, H=1, HK=1, S=80, rotation="fp32"),
    "64, group 8": dict(T=64, H=8, HK=1, S=130, block_start=(3,)),
    "D 96": dict(D=96, rotation="own", kv_start=(3,)),
    "D 96, not rotated": dict(D=96),
    "D 256": dict(D=256, rotation="fp32"),
    "tiny D": dict(D=8, rotation="own"),
    "odd D": dict(D=7),
    "empty prefix": dict(block_start=(0,)),
    "empty suffix": dict(block_start=(44,)),
    "beyond the cache": dict(T=33, S=48, block_start=(48,), kv_len=(81,), rotation="own"),
    "the block alone": dict(T=5, S=5, block_start=(0,), rotation="fp32"),
    "no cache at all": dict(T=5, S=0, block_start=(0,), kv_len=(5,)),
    "ragged rows": dict(block_start=(0, 7, 44, 20), kv_len=(48, 11, 48, 30), rotation="own"),
    "left offsets": dict(block_start=(9, 20, 30), kv_start=(9, 3, 29), kv_len=(13, 48, 40)),
    "block lengths": dict(
        T=33, S=90, block_start=(20, 1, 50, 7), block_len=(33, 1, 0, 20), kv_len=(90, 90, 70, 9)
    ),
    "slices of one product": dict(H=4, HK=2, layout="fused", rotation="own"),
    "heads first": dict(H=4, HK=2, layout="heads first", block_start=(20, 9)),
    "unlike caches": dict(layout="unlike", block_start=(20, 9), kv_start=(1, 2)),
    "pages of 1": dict(page=1, S=40, block_start=(20, 9), rotation="own"),
    "pages of 16": dict(page=16, block_start=(20, 0), block_len=(4, 2), kv_start=(17, 0)),
    "pages of 32": dict(page=32, H=7, HK=1, S=100, block_start=(31, 64), kv_len=(70, 100)),
    "pages of 256": dict(page=256, S=300, block_start=(256, 20), kv_len=(270, 259)),
    "pages of 5": dict(page=5, H=4, HK=2, S=43, kv_len=(41,)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference(case, dtype, device, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "reference")
    x = inputs(dtype, device, **case)
    assert_close(x, *run(x))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel(case, dtype, device, triton_backend):
    x = inputs(dtype, device, **case)
    assert_close(x, *run(x))


TILES = {
    "two splits": Config(16, 16, 4, 2, splits=2),
    "five splits": Config(16, 16, 4, 3, splits=5),
    "deeper stages, split": Config(32, 32, 4, 3, splits=2),
    "rotated first": Config(16, 32, 4, 2, rotate_first=True),
    "more splits than keys": Config(16, 32, 4, 2, splits=9),
}


@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("chosen", TILES.values(), ids=TILES)
def test_configurations(chosen, page, dtype, device, triton_backend):
    x = inputs(
        dtype,
        device,
        T=9,
        H=4,
        HK=2,
        S=90,
        block_start=(40, 0, 81),
        kv_len=(77, 90, 90),
        kv_start=(2, 0, 60),
        block_len=(9, 3, 9),
        page=page,
        rotation="own" if page else "fp32",
    )
    assert_close(x, *run(x, chosen))


@pytest.mark.parametrize("chosen", [Config(16, 16, 4, 2), Config(16, 16, 4, 2, splits=3)])
def test_own_keys_of_many_tiles_without_rotation(chosen, dtype, device):
    x = inputs(
        dtype, device, T=70, H=1, HK=1, S=90, block_start=(5,), block_len=(66,), layout="fused"
    )
    assert_close(x, *run(x, chosen))


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_scale(scale, device, triton_backend):
    x = inputs(torch.float32, device, rotation="own")
    assert_close(x, *run(x, scale=scale), scale=scale)


def test_a_column_of_spans(device, triton_backend):
    x = inputs(torch.float32, device, block_start=(20, 9), kv_len=(40, 30))
    both = torch.stack([x["block_start"], x["kv_len"]], dim=1)
    assert_close(x, *run({**x, "block_start": both[:, 0], "kv_len": both[:, 1]}))


def test_out_may_be_strided(device, triton_backend):
    x = inputs(torch.float32, device, T=3, H=4, HK=2, block_start=(20, 9))
    for chosen in (Config(16, 16, 4, 2), Config(16, 16, 4, 2, splits=2)):
        wide = torch.full((2, 4, 3, 80), math.nan, device=device)
        out, lse = wide.transpose(1, 2)[..., :64], torch.empty(2, 3, 4, device=device)
        attention_triton.launch(Operands(**x, scale=64**-0.5, out=out, lse=lse), chosen)
        assert_close(x, out, lse)
        assert wide[..., 64:].isnan().all()


@pytest.mark.parametrize("page", [16, 64])
def test_pages_that_do_not_exist_are_the_nearest(page, dtype, device, triton_backend):
    """Pages of 64: a table of one column, which a chip's own kernel takes."""
    x = inputs(dtype, device, S=64, block_start=(20, 40), page=page, rotation="own")
    table = x["page_table"][:, : 64 // page].contiguous()
    table[0, 0], table[1, -1] = -(2**31), 2**31 - 1
    last = len(x["k_cache"]) - 1
    for name in ("k_cache", "v_cache"):  # between the rows' pages lie others full of NaN
        x[name][[0, last]] = torch.randn_like(x[name][[0, last]])
    out, lse = run({**x, "page_table": table})
    assert_close({**x, "page_table": table.clamp(0, last)}, out, lse)


def test_halves_merge_to_the_whole(dtype, device, triton_backend):
    x = inputs(dtype, device, T=16, H=4, HK=2, S=16, block_start=(16,), kv_len=(32,))
    whole, whole_lse = run(x)
    alone = {
        **x,
        "block_start": torch.zeros_like(x["block_start"]),
        "kv_len": torch.full_like(x["kv_len"], 16),
    }
    first, first_lse = run({**alone, "k": x["k_cache"], "v": x["v_cache"]})
    second, second_lse = run(alone)
    lse = torch.logaddexp(first_lse, second_lse)
    merged = first.float() * (first_lse - lse).exp()[..., None]
    merged += second.float() * (second_lse - lse).exp()[..., None]
    torch.testing.assert_close(lse, whole_lse)
    close = dict(rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    torch.testing.assert_close(merged.to(dtype), whole, **close)


def test_nothing_is_written_but_the_result(device, triton_backend):
    x = inputs(torch.float32, device, rotation="own", page=16)
    before = {name: value.clone() for name, value in x.items() if value is not None}
    run(x)
    run(x, Config(16, 16, 4, 2, splits=3, rotate_first=True))
    for name, value in before.items():
        assert torch.equal(value.nan_to_num(7), x[name].nan_to_num(7)), name


def test_a_nan_that_is_seen_shows(device, triton_backend):
    x = inputs(torch.float32, device, block_start=(20, 9))
    x["v_cache"][1, 3, 0, 5] = math.nan
    out, _ = run(x)
    assert out[1, :, 0, 5].isnan().all() and not out[0].isnan().any()


def test_what_the_kernel_cannot_take(device, triton_backend, monkeypatch):
    x = inputs(torch.float32, device, D=257)
    with pytest.raises(RuntimeError, match="head dimension is 257"):
        block_attention(**x)
    y = inputs(torch.float32, device)
    y["k_cache"] = y["k_cache"].transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(RuntimeError, match="k_cache is not contiguous in its last dimension"):
        block_attention(**y)
    z = inputs(torch.float32, device)
    z["k_cache"].requires_grad_()
    with pytest.raises(RuntimeError, match="requires a gradient"):
        block_attention(**z)
    with torch.no_grad():
        block_attention(**z)
    monkeypatch.delenv(backend.VARIABLE)
    for given in (x, y):
        assert_close(given, *run(given))


@pytest.mark.parametrize("lengths", [None, (9, 4)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_whole_sequences(heads, lengths, device, dtype):
    """What whole_attention chooses, and block_attention without a cache, give the same rows."""
    random = torch.Generator().manual_seed(0)
    shapes = [(2, 9, count, 64) for count in (heads[0], heads[1], heads[1])]
    q, k, v = (torch.randn(shape, generator=random).to(device, dtype) for shape in shapes)
    start = torch.zeros(2, dtype=torch.int32, device=device)
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=device)
    given = (q, k, v, k[:, :0], v[:, :0], start, start)
    expected = block_attention_reference(*given, block_len=lengths)
    close = dict(rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    out = whole_attention(q, k, v, start=start, lengths=lengths)
    for row, length in enumerate((9, 9) if lengths is None else lengths.tolist()):
        torch.testing.assert_close(out[row, :length], expected[row, :length], **close)
    if lengths is None:
        torch.testing.assert_close(whole_attention(q, k, v), expected, **close)


def test_stored_keys_are_attended_to(device, dtype):
    """The last 9 of 20 positions over a cache that holds them as well, and 5 slots that nobody
    sees.
    """
    random = torch.Generator().manual_seed(0)
    shapes = [(2, 9, 4, 64), (2, 25, 2, 64), (2, 25, 2, 64)]
    q, k_cache, v_cache = (torch.randn(s, generator=random).to(device, dtype) for s in shapes)
    start, kv_len = (torch.full((2,), n, dtype=torch.int32, device=device) for n in (11, 20))
    given = (q, k_cache[:, 11:20], v_cache[:, 11:20], k_cache, v_cache, start, kv_len)
    expected = block_attention_reference(*given)
    k_cache[:, 20:] = v_cache[:, 20:] = math.nan
    close = dict(rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    torch.testing.assert_close(stored_attention(*given, stored=20), expected, **close)


class TestConfig:
    """The configuration function: pure, and each branch where it should be."""

    def test_splits_fill_the_gpu(self):
        assert (
            config(1, 32, 32, 32, 128, 512, 2, H200).splits == 4
        )  # 128 programs, one a multiprocessor
        assert config(8, 32, 28, 4, 128, 2048, 2, H200).splits == 2  # 256, two on each
        assert config(8, 32, 32, 32, 128, 2048, 2, H200).splits == 1
        assert config(1, 32, 28, 4, 128, 256, 2, H200).splits == 1

    @pytest.mark.parametrize("capacity", [1, 100, 1000, 4096, 100_000])
    @pytest.mark.parametrize("T", [1, 32, 300])
    def test_bounds(self, capacity, T):
        for B, H, HK in ((1, 8, 8), (1, 1, 1), (16, 28, 4)):
            chosen = config(B, T, H, HK, 128, capacity, 2, H200)
            assert 1 <= chosen.splits <= 32
            assert chosen.splits == 1 or max(capacity, T) // chosen.splits >= 64
            assert not (chosen.rotate_first and chosen.splits > 1)  # two launches at most

    def test_tiles_follow_the_work(self):
        assert {
            config(1, T, 8, 8, 128, 2048, 2, H200).TILE_ROWS for T in (1, 32, 64, 100, 5000)
        } == {64}
        keys = [
            config(B, 32, 32, 32, 128, slots, 2, H200).TILE_KEYS
            for B, slots in ((1, 512), (1, 1024), (8, 2048))
        ]
        assert keys == [64, 32, 32]
        assert config(8, 32, 28, 4, 128, 2048, 2, H200).TILE_KEYS == 64

    def test_a_small_chip_gets_small_tiles(self):
        small = Chip(82, 101376)
        for D in (64, 128, 256):
            for itemsize in (2, 4):
                chosen = config(4, 512, 32, 32, D, 2048, itemsize, small)
                buffers = (
                    (chosen.TILE_ROWS + 2 * chosen.num_stages * chosen.TILE_KEYS) * D * itemsize
                )
                assert buffers <= small.shared and chosen.TILE_ROWS >= 16 and chosen.TILE_KEYS >= 16


# On a GPU, at the sizes that models have.


def real(device, B, H, HK, slots, T=32, dtype=torch.bfloat16, **changes):
    starts = tuple((slots // 2 + 37 * b) % (slots - T + 1) for b in range(B))
    return inputs(
        dtype,
        device,
        **{**dict(T=T, H=H, HK=HK, D=128, S=slots, block_start=starts, rotation="own"), **changes},
    )


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 8])
@pytest.mark.parametrize("slots", [1024, 2048, 4096])
@pytest.mark.parametrize("heads", [(32, 32), (28, 4), (32, 8)])
def test_real_shapes(heads, slots, B, device, triton_backend):
    x = real(device, B, *heads, slots)
    assert_close(x, *run(x))


@pytest.mark.gpu
@pytest.mark.parametrize("rotation", [None, "own", "fp32"])
def test_a_whole_canvas(rotation, device, triton_backend):
    x = real(device, 1, 32, 32, 2048, T=2048, rotation=rotation)
    assert_close(x, *run(x))


@pytest.mark.gpu
@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("heads", [(32, 32), (28, 4)])
def test_a_graph_replays_with_other_spans(heads, page, device, triton_backend):
    x = real(device, 2, *heads, 1024, page=page)
    out, lse = run(x)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = block_attention(**x, return_lse=True)
    other = real(
        device, 2, *heads, 1024, page=page, block_start=(0, 900), kv_len=(40, 1024), seed=1
    )
    for name, value in other.items():
        if value is not None:
            x[name].copy_(value)
    out.fill_(math.nan)
    graph.replay()
    assert_close(x, out, lse)


@pytest.mark.gpu
def test_two_streams_at_once(device, triton_backend):
    jobs = [real(device, 1, 32, 32, 4096, seed=seed) for seed in range(2)]
    alone = [block_attention(**x) for x in jobs]
    streams = [torch.cuda.Stream() for _ in jobs]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(50):
        for x, stream, kept in zip(jobs, streams, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(block_attention(**x))
    torch.cuda.synchronize()
    for expected, kept in zip(alone, results, strict=True):
        assert all(torch.equal(expected, each) for each in kept)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(32, 32), (28, 4)])
def test_a_thousand_launches_give_the_same_bits(heads, device, triton_backend):
    x = real(device, 1, *heads, 2048)
    expected, expected_lse = block_attention(**x, return_lse=True)
    for _ in range(1000):
        out, lse = block_attention(**x, return_lse=True)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
