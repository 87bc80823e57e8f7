"""rms_norm, swiglu, rope_to_cache: kernels against fp64 oracles and against the rounding that the
references promise.
"""

import pytest
import torch

from fastdllm_kernels import (
    backend,
    rms_norm,
    rms_norm_reference,
    rope_to_cache,
    rope_to_cache_reference,
    swiglu,
    swiglu_reference,
)

# 1 and 33 leave lanes idle, 257 wastes nearly half a tile, 3584 and 4096 are the models' widths,
# 12288 fills the widest tile in part, 20000 takes the loop.
WIDTHS = [1, 33, 257, 3584, 4096, 12288, 20000]
LAYOUTS = ["contiguous", "rows apart", "values apart"]
triton_only = pytest.mark.skipif(backend.triton is None, reason="needs triton")


@pytest.fixture
def poisoned(monkeypatch):
    """Memory fresh from the allocator holds NaN: what a kernel leaves unwritten shows."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def filled(*args, allocate=allocate, **kwargs):
            fresh = allocate(*args, **kwargs)
            return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

        monkeypatch.setattr(torch, name, filled)


def random(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def laid_out(x, layout):
    """The same values at other strides."""
    if layout == "rows apart":
        return torch.cat([x, torch.full_like(x, torch.nan)], dim=-1)[..., : x.shape[-1]]
    if layout == "values apart":
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1).flatten(-2)[..., ::2]
    return x


def assert_as_good(ours, reference, oracle):
    """At most twice what PyTorch's own operations lose in this dtype, plus a few units in the last
    place.
    """
    assert ours.dtype == reference.dtype and ours.shape == reference.shape
    ulp = torch.finfo(ours.dtype).eps * oracle.abs().clamp(min=torch.finfo(ours.dtype).tiny)
    lost = (reference.double() - oracle).abs().max()
    excess = (ours.double() - oracle).abs() - (2 * lost + 3 * ulp)
    assert excess.max() <= 0, (
        f"off by {(ours.double() - oracle).abs().max()} where PyTorch loses {lost}"
    )


@triton_only
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(width, with_residual, layout, device, dtype, triton_backend, poisoned):
    x = laid_out(random(2, 2, width, dtype=dtype, device=device), layout)
    weight = random(width, seed=1, dtype=dtype, device=device)
    residual = None
    if with_residual:
        residual = laid_out(random(2, 2, width, seed=2, dtype=dtype, device=device), layout)
    ours = rms_norm(x, weight, 1e-5, residual)
    reference = rms_norm_reference(x, weight, 1e-5, residual)
    summed = x
    if with_residual:
        (ours, total), (reference, summed) = ours, reference
        assert torch.equal(total, summed)
    wide = summed.double()
    oracle = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    assert_as_good(ours, reference, oracle)


@triton_only
def test_rms_norm_rounds_before_the_weight(device, triton_backend):
    x = random(4, 4096, dtype=torch.float16, device=device)
    weight = random(4096, seed=1, dtype=torch.float16, device=device)
    same = rms_norm(x, weight, 1e-5) == rms_norm_reference(x, weight, 1e-5)
    # The statistics may differ in their last bit, which moves a value across a rounding boundary
    # now and then.
    assert same.float().mean() > 0.995


@triton_only
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu(width, layout, device, dtype, triton_backend, poisoned):
    gate_up = laid_out(4 * random(3, 2 * width, dtype=dtype, device=device), layout)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_as_good(swiglu(gate_up), swiglu_reference(gate_up), torch.nn.functional.silu(gate) * up)


@triton_only
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_swiglu_at_the_ends(device, dtype, triton_backend):
    gate = torch.tensor(
        [-torch.inf, -200, -90, -0.0, 0, 90, 200, torch.inf, torch.nan], dtype=dtype, device=device
    )
    gate_up = torch.cat([gate, torch.full_like(gate, 2)])
    torch.testing.assert_close(swiglu(gate_up), swiglu_reference(gate_up), equal_nan=True)


@triton_only
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty_inputs(shape, device, triton_backend):
    x = torch.empty(shape, device=device)
    assert rms_norm(x, torch.ones(8, device=device), 1e-5).shape == shape
    assert swiglu(x).shape == (*shape[:-1], 4)


def rope_inputs(heads, kv_heads, dim, steps, dtype, device, table_dtype):
    """(q, k, v) as views of one fused product, cos, sin, and three rows' starts, the last of which
    overruns the tables.
    """
    qkv = random(3, steps, heads + 2 * kv_heads, dim, dtype=dtype, device=device)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
    cos, sin = random(2, 48, dim // 2, seed=1, dtype=table_dtype, device=device)
    return q, k, v, cos, sin, torch.tensor([0, 7, 46], dtype=torch.int32, device=device)


def caches(kind, kv_heads, dim, slots, dtype, device):
    """Two poisoned caches for three rows, and a page table where they are paged."""
    if kind == "heads first":
        return *(
            torch.full(
                (2, 3, kv_heads, slots, dim), torch.nan, dtype=dtype, device=device
            ).transpose(2, 3)
        ), None
    if kind == "contiguous":
        return *torch.full(
            (2, 3, slots, kv_heads, dim), torch.nan, dtype=dtype, device=device
        ), None
    size = int(kind.removeprefix("pages of "))
    pages = -(-slots // size)
    table = torch.randperm(3 * pages + 2, generator=torch.Generator().manual_seed(3))[
        : 3 * pages
    ].view(3, pages)
    both = torch.full(
        (2, 3 * pages + 2, size, kv_heads, dim), torch.nan, dtype=dtype, device=device
    )
    return *both, table.to(device, torch.int32)


@triton_only
@pytest.mark.parametrize("table", ["fp32 table", "table in the dtype"])
# Every kind of cache; group 1, 2, 7; D 64, 96 (no power of two), 128; tiles of heads filled in
# part, and several of them.
@pytest.mark.parametrize(
    "kind, heads, kv_heads, dim",
    [
        ("contiguous", 2, 2, 128),
        ("contiguous", 28, 4, 128),
        ("heads first", 10, 5, 64),
        ("pages of 1", 2, 2, 128),
        ("pages of 3", 7, 1, 96),
        ("pages of 16", 10, 5, 64),
    ],
)
def test_rope_to_cache(kind, heads, kv_heads, dim, table, device, dtype, triton_backend, poisoned):
    steps = 3
    table_dtype = torch.float32 if table == "fp32 table" else dtype
    q, k, v, cos, sin, start = rope_inputs(heads, kv_heads, dim, steps, dtype, device, table_dtype)
    length = torch.tensor([3, 0, 2], dtype=torch.int32, device=device)
    k_cache, v_cache, page_table = caches(kind, kv_heads, dim, 48, dtype, device)
    k_expected, v_expected = k_cache.clone(), v_cache.clone()
    options = {"length": length, "page_table": page_table}
    expected = rope_to_cache_reference(q, k, v, cos, sin, start, k_expected, v_expected, **options)
    ours = rope_to_cache(q, k, v, cos, sin, start, k_cache, v_cache, **options)
    # Every bit: the kernel rounds where the reference does, and writes nothing else (NaN where
    # nothing belongs).
    for one, other in zip(
        (*ours, k_cache, v_cache), (*expected, k_expected, v_expected), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@triton_only
@pytest.mark.parametrize("steps", [1, 17])
def test_rope_without_a_cache(steps, device, dtype, triton_backend, poisoned):
    q, k, v, cos, sin, start = rope_inputs(4, 2, 64, steps, dtype, device, torch.float32)
    ours = rope_to_cache(q, k, v, cos, sin, start)
    expected = rope_to_cache_reference(q, k, v, cos, sin, start)
    assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))
    assert ours[0].is_contiguous() and ours[1].is_contiguous()


@triton_only
def test_rope_takes_any_strides(device, triton_backend):
    q, k, v, cos, sin, start = rope_inputs(2, 1, 64, 2, torch.float32, device, torch.float32)
    expected = rope_to_cache_reference(q, k, v, cos, sin, start)
    q, k, v = (laid_out(x, "values apart") for x in (q, k, v))
    ours = rope_to_cache(
        q,
        k,
        v,
        *(laid_out(table, "rows apart") for table in (cos, sin)),
        start.repeat_interleave(2)[::2],
    )
    assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


@triton_only
def test_rope_writes_nothing_past_the_cache(device, triton_backend):
    q, k, v, cos, sin, start = rope_inputs(2, 2, 64, 4, torch.float32, device, torch.float32)
    around = torch.full((2, 3, 20, 2, 64), torch.nan, device=device)
    rope_to_cache(q, k, v, cos, sin, start, *around[:, :, :9])
    assert around[:, :, 9:].isnan().all() and around[:, 2].isnan().all()
    assert not around[:, 1, 7:9].isnan().any()


# Row by row: before the cache by far and by a little, across its end, past it by far, and inside.
WILD_STARTS = [-(2**31), -2, 10, 2**31 - 1, 4, 3]
# Of ten pages; the first and the fourth row would share theirs.
WILD_PAGES = [
    [0, 1, 2],
    [3, -1, 4],
    [5, 6, 10],
    [0, 1, 2],
    [-(2**31), 9, 2**31 - 1],
    [7, -1, 8],
]


@triton_only
@pytest.mark.parametrize("paged", [False, True])
def test_rope_never_writes_outside_the_cache(paged, device, dtype, triton_backend):
    """Whatever the starts and the pages are; the kernel writes what the reference writes, bit for
    bit, and around the cache lies what lay there.
    """
    q, k, v = random(6, 4, 8, 64, dtype=dtype, device=device).split([4, 2, 2], dim=2)
    cos, sin = random(2, 20, 32, seed=1, device=device)
    start = torch.tensor(WILD_STARTS, dtype=torch.int32, device=device)
    table = torch.tensor(WILD_PAGES, dtype=torch.int32, device=device) if paged else None
    rows, slots = (10, 4) if paged else (6, 12)
    around = torch.full((2, rows + 2, slots + 2, 2, 64), torch.nan, dtype=dtype, device=device)
    caches, expected = around[:, 1:-1, 1:-1], around[:, 1:-1, 1:-1].clone()
    ours = rope_to_cache(q, k, v, cos, sin, start, *caches, page_table=table)
    reference = rope_to_cache_reference(q, k, v, cos, sin, start, *expected, page_table=table)
    for one, other in zip((*ours, caches), (*reference, expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    written = (~expected[0].isnan()).flatten(2).any(2).sum(1).tolist()
    assert written == ([0, 0, 0, 2, 0, 0, 0, 1, 0, 4] if paged else [0, 2, 2, 0, 4, 4])
    caches.fill_(torch.nan)
    assert around.isnan().all()


def test_the_reference_writes_nothing_past_a_rows_pages():
    q, k, v, cos, sin, _ = rope_inputs(2, 2, 64, 4, torch.float32, "cpu", torch.float32)
    pages = torch.full((2, 4, 4, 2, 64), torch.nan)
    start = torch.tensor([0, 6], dtype=torch.int32)
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    rope_to_cache_reference(q[:2], k[:2], v[:2], cos, sin, start, *pages, page_table=table)
    written = ~pages[0].isnan().flatten(2).any(2)
    assert written.tolist() == [[True] * 4, [False] * 4, [False] * 4, [False, False, True, True]]


@triton_only
def test_rope_refuses_a_cache_it_cannot_address(device, triton_backend):
    q, k, v, cos, sin, start = rope_inputs(2, 2, 64, 2, torch.float32, device, torch.float32)
    k_cache, v_cache = torch.zeros(2, 3, 64, 2, 48, device=device).transpose(2, 4)
    with pytest.raises(RuntimeError, match="rope_to_cache.*not contiguous"):
        rope_to_cache(q, k, v, cos, sin, start, k_cache, v_cache)


def test_gradients_flow(device):
    x = random(2, 8, device=device).requires_grad_()
    weight = random(8, device=device).requires_grad_()
    q, k, v, cos, sin, start = rope_inputs(2, 1, 8, 2, torch.float32, device, torch.float32)
    q = q.detach().requires_grad_()
    y, total = rms_norm(x, weight, 1e-5, x)
    rotated = rope_to_cache(q, k, v, cos, sin, start)[0]
    (y.sum() + total.square().sum() + swiglu(x).sum() + rotated.square().sum()).backward()
    for leaf in (x, weight, q):
        assert leaf.grad is not None and leaf.grad.abs().max() > 0
    # A rotation by these tables scales each pair by cos^2 + sin^2.
    at = (start.long()[:, None] + torch.arange(2, device=device)).clamp(max=47)
    scale = (cos.square() + sin.square())[at][:, :, None].repeat(1, 1, 1, 2)
    torch.testing.assert_close(q.grad, 2 * q.detach() * scale)


@triton_only
def test_a_forced_kernel_refuses_gradients(device, triton_backend):
    x = torch.ones(2, 8, device=device, requires_grad=True)
    for call in (lambda: rms_norm(x, torch.ones(8, device=device), 1e-5), lambda: swiglu(x)):
        with pytest.raises(RuntimeError, match="gradient"):
            call()
        with torch.no_grad():
            call()


@triton_only
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float16, torch.float32)])
def test_a_forced_kernel_refuses_other_dtypes(dtypes, device, triton_backend):
    x, weight = (torch.ones(8, dtype=dtype, device=device) for dtype in dtypes)
    with pytest.raises(RuntimeError, match="rms_norm.*float"):
        rms_norm(x, weight, 1e-5)


def test_other_dtypes_take_the_reference(device):
    x, weight = torch.ones(2, 8, dtype=torch.float16, device=device), torch.ones(8, device=device)
    assert rms_norm(x, weight, 1e-5).dtype == torch.float32
    assert swiglu(x.double()).dtype == torch.float64


def test_torch_compile_sees_the_references(device):
    # Aot tracing only: what is asserted is that nothing breaks the graph, not how inductor compiles
    # it.
    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(x, weight, residual):
        y, residual = rms_norm(x, weight, 1e-5, residual)
        return swiglu(y), residual

    x, weight = random(2, 8, device=device), random(8, seed=1, device=device)
    expected = rms_norm_reference(x, weight, 1e-5, x)
    compiled = layer(x, weight, x)
    torch.testing.assert_close(compiled[0], swiglu_reference(expected[0]))
    torch.testing.assert_close(compiled[1], expected[1])


def test_errors_name_the_argument():
    x, start = torch.ones(2, 3), torch.zeros(1, dtype=torch.int32)
    q, table = torch.ones(1, 2, 2, 8), torch.ones(4, 4)
    for message, call in (
        (
            r"weight: expected shape \(3,\) on cpu, got \(4,\)",
            lambda: rms_norm(x, torch.ones(4), 1e-5),
        ),
        (
            r"residual: expected shape \(2, 3\)",
            lambda: rms_norm(x, torch.ones(3), 1e-5, torch.ones(2, 4)),
        ),
        ("gate_up: expected an even last dimension", lambda: swiglu(x)),
        (
            r"cos: expected \[positions, D/2\] with D = 8, got \(4, 3\)",
            lambda: rope_to_cache(q, q, q, table[:, :3], table, start),
        ),
        ("v: expected", lambda: rope_to_cache(q, q, q[:, :1], table, table, start)),
        (
            "k_cache, v_cache: expected both or neither",
            lambda: rope_to_cache(q, q, q, table, table, start, q),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.gpu
def test_a_graph_replays_with_other_spans(triton_backend):
    q, k, v, cos, sin, start = rope_inputs(28, 4, 128, 3, torch.bfloat16, "cuda", torch.bfloat16)
    length = torch.tensor([3, 3, 2], dtype=torch.int32, device="cuda")
    k_cache, v_cache, table = caches("pages of 16", 4, 128, 48, torch.bfloat16, "cuda")

    def call():
        return rope_to_cache(
            q, k, v, cos, sin, start, k_cache, v_cache, length=length, page_table=table
        )

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = call()
    start.copy_(torch.tensor([20, 1, 45]))
    length.copy_(torch.tensor([1, 3, 2]))
    expected_caches = k_cache.fill_(torch.nan).clone(), v_cache.fill_(torch.nan).clone()
    graph.replay()
    expected = rope_to_cache_reference(
        q, k, v, cos, sin, start, *expected_caches, length=length, page_table=table
    )
    for one, other in zip((*ours, k_cache, v_cache), (*expected, *expected_caches), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_the_same_bits_every_time(triton_backend):
    x = random(2048, 4096, dtype=torch.bfloat16, device="cuda")
    weight = random(4096, dtype=torch.bfloat16, device="cuda")
    first = rms_norm(x, weight, 1e-5, x)
    for _ in range(1000):
        assert all(map(torch.equal, rms_norm(x, weight, 1e-5, x), first))
