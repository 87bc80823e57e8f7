"""The products of few rows: the kernel against an fp32 oracle, and what takes the library's product
instead.
"""

import importlib

import pytest
import torch
from conftest import ON_GPU
from torch.nn import functional

pytest.importorskip("triton")

import fastdllm_kernels as ops  # noqa: E402
from fastdllm_kernels import backend, fp8, fp8_triton, linear_triton  # noqa: E402
from fastdllm_kernels.backend import Chip  # noqa: E402
from fastdllm_kernels.linear_triton import Config, config, launch  # noqa: E402

# The package's attribute of that name is the op.
linear_ops = importlib.import_module("fastdllm_kernels.linear")
H200 = Chip(132, 232448, overlap=True)
# (rows, in, out): one row, a full tile, one more, several tiles of rows; widths that no tile
# divides.
SHAPES = [(1, 64, 64), (3, 100, 33), (32, 128, 96), (33, 72, 130), (130, 200, 20)]
EPS = 1e-5


def normal(*shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def operands(rows, width_in, width_out, dtype, device):
    shapes = (rows, width_in), (width_out, width_in), (rows, width_out), (width_out,)
    x, weight, residual, norm = (
        normal(*s, dtype=dtype, device=device, seed=i) for i, s in enumerate(shapes)
    )
    return x, (weight * width_in**-0.5).to(dtype), residual, norm


def fp8_operands(rows, width_in, width_out, dtype, device):
    x, weight, residual, norm = operands(rows, width_in, width_out, dtype, device)
    return x, ops.quantize_weight(weight), residual, norm


def normed(total, norm):
    """RMSNorm in float64."""
    return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS) * norm.double()


def assert_close(result, library, oracle, slack=0.0):
    """At most twice what PyTorch's own product loses in this dtype, plus units in the last place of
    the largest element, and `slack` of that element: what the hardware's adders lose.
    """
    lost = (library.double() - oracle).abs().max()
    error = (result.double() - oracle).abs().max()
    allowed = 2 * lost + (4 * torch.finfo(result.dtype).eps + slack) * oracle.abs().max()
    assert error <= allowed, f"{error:.3g} where PyTorch loses {lost:.3g}"


@pytest.mark.parametrize("shape", SHAPES)
class TestKernel:
    @pytest.fixture(autouse=True)
    def forced(self, triton_backend):
        """However many rows there are."""

    @pytest.mark.parametrize("with_bias", [False, True])
    def test_linear(self, shape, with_bias, dtype, device):
        x, weight, _, norm = operands(*shape, dtype, device)
        bias = norm if with_bias else None
        oracle = functional.linear(
            x.double(), weight.double(), None if bias is None else bias.double()
        )
        assert_close(ops.linear(x, weight, bias), ops.linear_reference(x, weight, bias), oracle)

    def test_linear_swiglu(self, shape, dtype, device):
        rows, width_in, width_out = shape
        x, weight, _, _ = operands(rows, width_in, 2 * width_out, dtype, device)
        gate, up = functional.linear(x.double(), weight.double()).chunk(2, -1)
        oracle = functional.silu(gate) * up
        result = ops.linear_swiglu(x, weight)
        assert_close(result, ops.linear_swiglu_reference(x, weight), oracle)
        assert torch.equal(
            result, ops.linear_swiglu(x, *weight.clone().split(width_out))
        )  # the two apart

    def test_linear_rms_norm(self, shape, dtype, device):
        given = operands(*shape, dtype, device)
        x, weight, residual, norm = given
        total = functional.linear(x.double(), weight.double()) + residual.double()
        oracle, library = (normed(total, norm), total), ops.linear_rms_norm_reference(*given, EPS)
        for ours, theirs, truth in zip(
            ops.linear_rms_norm(*given, EPS), library, oracle, strict=True
        ):
            assert_close(ours, theirs, truth)


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize("width_in", [64, 256, 200])
def test_parts_add_up(splits, width_in, device):
    x, weight, _, _ = operands(5, width_in, 70, torch.float16, device)
    y = launch(x, weight, chosen=Config(16, 64, 32, 4, 2, splits))
    assert y.shape == ((splits, 5, 70) if splits > 1 else (5, 70))
    whole = y.sum(0) if splits > 1 else y
    assert_close(
        whole.half(), functional.linear(x, weight), functional.linear(x.float(), weight.float())
    )


def test_what_lies_outside_is_not_touched(device):
    """Rows and columns beside the operands hold NaN."""
    wide = torch.full((9, 80), float("nan"), dtype=torch.float16, device=device)
    x, weight, _, _ = operands(5, 72, 40, torch.float16, device)
    wide[2:7, 3:75] = x
    y = launch(wide[2:7, 3:75], weight, chosen=Config(16, 64, 64, 4, 2, 2))
    assert_close(
        y.sum(0).half(), functional.linear(x, weight), functional.linear(x.float(), weight.float())
    )


def test_leading_dimensions(device, triton_backend):
    x, weight, residual, norm = operands(6, 64, 48, torch.float16, device)
    shaped = x.view(2, 3, 64), weight, residual.view(2, 3, 48), norm
    assert ops.linear(shaped[0], weight).shape == (2, 3, 48)
    assert ops.linear_swiglu(shaped[0], weight).shape == (2, 3, 24)
    for one, other in zip(
        ops.linear_rms_norm(*shaped, EPS),
        ops.linear_rms_norm(x, weight, residual, norm, EPS),
        strict=True,
    ):
        assert one.shape == (2, 3, 48) and torch.equal(one.view(6, 48), other)


FP8_SHAPES = [(1, 64, 64), (3, 112, 33), (32, 256, 96), (33, 400, 130), (130, 208, 20)]


def exactly(x, weight, bias=None):
    """What the quantised operands multiply to, in float64: the oracle."""
    data, scale = fp8.quantize_rows_reference(x)
    y = data.double() @ weight.data.double().T * (scale.double()[:, None] * weight.scale.double())
    return y if bias is None else y + bias.double()


# A GPU aligns the products of an instruction to the largest and keeps some 13 bits of each: seen,
# 0.6% of the largest sum.
ADDERS = 2**-6 if ON_GPU else 0.0


@pytest.mark.parametrize("shape", FP8_SHAPES)
class TestFp8Kernel:
    """The kernel against the quantised operands' own product; what is lost may be twice what that
    product loses in 16 bits.
    """

    @pytest.fixture(autouse=True)
    def forced(self, triton_backend, monkeypatch):
        """The interpreter rounds to e4m3 without carrying into the exponent, and is refused for it:
        here the reference quantises the rows, so that it runs.
        """
        if not ON_GPU:
            monkeypatch.setattr(backend, "WRONG_IN_INTERPRETER", (torch.bfloat16,))
            monkeypatch.setattr(
                fp8_triton, "launch", lambda x, *numbers: fp8.quantize_rows_reference(x)
            )

    @pytest.mark.parametrize("with_bias", [False, True])
    def test_linear(self, shape, with_bias, dtype, device):
        x, weight, _, norm = fp8_operands(*shape, dtype, device)
        bias = norm if with_bias else None
        reference = ops.linear_reference(x, weight, bias)
        assert_close(ops.linear(x, weight, bias), reference, exactly(x, weight, bias), ADDERS)

    def test_linear_swiglu(self, shape, dtype, device):
        rows, width_in, width_out = shape
        x, weight, _, _ = fp8_operands(rows, width_in, 2 * width_out, dtype, device)
        gate, up = exactly(x, weight).chunk(2, -1)
        reference = ops.linear_swiglu_reference(x, weight)
        assert_close(
            ops.linear_swiglu(x, weight), reference, functional.silu(gate) * up, 2 * ADDERS
        )

    def test_linear_rms_norm(self, shape, dtype, device):
        x, weight, residual, norm = fp8_operands(*shape, dtype, device)
        reference = ops.linear_rms_norm_reference(x, weight, residual, norm, EPS)
        total = exactly(x, weight) + residual.double()
        oracle = normed(total, norm), total
        for ours, theirs, truth in zip(
            ops.linear_rms_norm(x, weight, residual, norm, EPS), reference, oracle, strict=True
        ):
            assert_close(ours, theirs, truth, ADDERS)

    @pytest.mark.parametrize("splits", [2, 3])
    def test_parts_add_up(self, shape, splits, device):
        x, weight, _, _ = fp8_operands(*shape, torch.float16, device)
        y = launch(x, weight, chosen=Config(32, 64, 64, 4, 2, splits))
        assert_close(y.sum(0).half(), ops.linear_reference(x, weight), exactly(x, weight), ADDERS)


def on_the_grid(rows, width, dtype, device):
    """Rows that e4m3 holds exactly after scaling: nothing is rounded, and everything else about
    quantising shows.
    """
    x = normal(rows, width, dtype=torch.float32, device=device) * 40
    x[:, width // 2] = 448
    return (
        x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        * 2.0 ** -torch.arange(rows, device=device)[:, None]
    ).to(dtype)


@pytest.mark.parametrize("width", [16, 208, 1024, 4100])
def test_rows_are_quantised_as_the_reference_does(width, dtype, device):
    rows = on_the_grid(6, width, dtype, device)
    if ON_GPU:  # where casts are right
        rows = normal(6, width, dtype=dtype, device=device)
    rows[2] = 0
    wide = torch.full((6, width + 5), float("nan"), dtype=dtype, device=device)
    wide[:, 2:-3] = rows
    data, scale = fp8_triton.launch(wide[:, 2:-3], fp8.LARGEST, fp8.SMALLEST)
    theirs, their_scale = fp8.quantize_rows_reference(rows)
    assert torch.equal(
        data.view(torch.uint8) & 127, theirs.view(torch.uint8) & 127
    )  # all but the sign of a zero
    assert torch.equal(data.float(), theirs.float()) and torch.equal(scale, their_scale)


class TestFp8:
    @pytest.mark.parametrize("rows", [1, 32, 200])
    def test_what_is_lost(self, rows, dtype, device):
        """3 bits of mantissa round a number by 2.3% of it (root mean square): of two operands 3.5%
        of a product's size.
        """
        x, weight, _, norm = operands(rows, 256, 96, dtype, device)
        exact = functional.linear(x.float(), weight.float(), norm.float())
        lost = (
            (ops.linear(x, ops.quantize_weight(weight), norm).float() - exact)
            .square()
            .mean()
            .sqrt()
        )
        size = functional.linear(x.float(), weight.float()).square().mean().sqrt()
        assert 0.01 * size < lost < 0.045 * size

    def test_a_weight_is_quantised_row_by_row(self, dtype, device):
        weight = normal(5000, 32, dtype=dtype, device=device) * torch.logspace(
            -2, 2, 5000, device=device
        )[:, None].to(dtype)
        weight[7] = 0
        quantized = ops.quantize_weight(weight)
        assert (
            quantized.shape == (5000, 32)
            and quantized.ndim == 2
            and quantized.data.dtype == torch.float8_e4m3fn
        )
        assert quantized.data.is_contiguous() and quantized.scale.dtype == torch.float32
        back = quantized.data.float() * quantized.scale[:, None]
        largest = weight.float().abs().amax(1, keepdim=True)
        # Half a step of the number, or of the smallest step that e4m3 has at that scale.
        assert (
            (back - weight.float()).abs() <= weight.float().abs() / 16 + largest / 448 / 2**9
        ).all()
        assert (
            torch.equal(back.abs().amax(1)[8:], (quantized.scale * 448)[8:]) and not back[7].any()
        )

    def test_a_row_that_is_not_finite_has_no_finite_scale(self, device):
        weight = torch.ones(4, 16, device=device)
        weight[1, 3], weight[2, 5] = float("nan"), float("inf")
        assert ops.quantize_weight(weight).scale.isfinite().tolist() == [True, False, False, True]
        with pytest.raises(ValueError, match=r"weight: expected \[out, in\], got \(4,\)"):
            ops.quantize_weight(weight[:, 0])

    @pytest.mark.parametrize("rows", [0, 4, 200])
    def test_without_the_kernel(self, rows, device, monkeypatch):
        """A forced reference, wherever it runs."""
        monkeypatch.setenv(backend.VARIABLE, "reference")
        x, weight, residual, norm = fp8_operands(rows, 64, 48, torch.float32, device)
        assert torch.equal(ops.linear(x, weight, norm), ops.linear_reference(x, weight, norm))
        assert torch.equal(ops.linear_swiglu(x, weight), ops.linear_swiglu_reference(x, weight))
        reference = ops.linear_rms_norm_reference(x, weight, residual, norm, EPS)
        assert all(map(torch.equal, ops.linear_rms_norm(x, weight, residual, norm, EPS), reference))

    def test_what_the_kernel_cannot_take(self, device, triton_backend, monkeypatch):
        monkeypatch.setattr(backend, "WRONG_IN_INTERPRETER", (torch.bfloat16,))
        x, weight, _, _ = fp8_operands(4, 40, 48, torch.float16, device)
        with pytest.raises(RuntimeError, match="multiple of 16, not 40"):
            ops.linear(x, weight)
        with pytest.raises(ValueError, match=r"weight: expected \[out, 24\]"):
            ops.linear(x[:, :24], weight)
        monkeypatch.setattr(fp8, "_multiplies_fp8", lambda device: False)
        with pytest.raises(RuntimeError, match=r"compute capability 8\.9"):
            ops.linear(*fp8_operands(4, 64, 48, torch.float16, device)[:2])
        monkeypatch.delenv(backend.VARIABLE)
        torch.testing.assert_close(ops.linear(x, weight), ops.linear_reference(x, weight))

    def test_nothing_asks_for_a_gradient(self, device):
        x, weight, _, _ = fp8_operands(4, 64, 48, torch.float32, device)
        assert not ops.linear(x.requires_grad_(), weight).requires_grad

    def test_leading_dimensions(self, device):
        x, weight, _, norm = fp8_operands(6, 64, 48, torch.float16, device)
        assert torch.equal(
            ops.linear(x.view(2, 3, 64), weight, norm).view(6, 48), ops.linear(x, weight, norm)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4, 200])
def test_a_library_product_of_columns_and_of_narrow_outputs(rows, device):
    x = normal(64, rows, dtype=torch.bfloat16, device=device).t()
    weight = ops.quantize_weight(normal(48, 64, dtype=torch.bfloat16, device=device) / 8)
    for part in (weight, weight.split([33, 15])[0]):
        error = (ops.linear(x, part).float() - exactly(x.contiguous(), part)).abs().max()
        assert error <= 2**-5 * exactly(x.contiguous(), part).abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 32, 128, 129, 512])
@pytest.mark.parametrize("shape", [(4096, 4096), (12288, 4096), (3584, 4608), (18944, 3584)])
def test_real_shapes_in_fp8(rows, shape, device):
    """Few rows by the kernel, many by torch._scaled_mm: the quantised operands' product."""
    for dtype in (torch.bfloat16, torch.float16):
        x, weight, residual, norm = fp8_operands(rows, *shape, dtype, device)
        bias = norm if rows in (1, 512) else None
        oracle, reference = exactly(x, weight, bias), ops.linear_reference(x, weight, bias)
        # The library adds in about 14 bits all along a row: 2% of a sum, as much again as
        # quantising loses.
        slack = oracle.abs().max() * (ADDERS if rows <= linear_ops.MOST_ROWS else 2**-5)
        lost = (reference.float() - oracle).abs().max()
        error = (ops.linear(x, weight, bias).float() - oracle).abs().max()
        assert error <= 2 * lost + 4 * torch.finfo(dtype).eps * oracle.abs().max() + slack
        first = ops.linear_rms_norm(x, weight, residual, norm, EPS)
        for _ in range(20):
            assert all(map(torch.equal, ops.linear_rms_norm(x, weight, residual, norm, EPS), first))


class TestChoice:
    """Who takes the kernel where nothing is forced, and who may not."""

    def test_a_weight_that_is_not_contiguous(self, device, triton_backend, monkeypatch):
        x, weight, residual, norm = operands(4, 64, 48, torch.float16, device)
        apart = weight.t().contiguous().t()
        with pytest.raises(RuntimeError, match="the weight is not contiguous"):
            ops.linear_rms_norm(x, apart, residual, norm, EPS)
        monkeypatch.delenv(backend.VARIABLE)
        torch.testing.assert_close(ops.linear(x, apart), functional.linear(x, weight))

    @pytest.mark.parametrize("rows", [0, 4, 200])
    def test_it_falls_back_to_the_library(self, rows, dtype, device):
        """Many rows and fp32 everywhere, any rows on a CPU: the library's bits."""
        if ON_GPU and 0 < rows < 128 and dtype != torch.float32:
            pytest.skip("the kernel takes these")
        given = operands(rows, 64, 48, dtype, device)
        assert torch.equal(ops.linear(*given[:2]), functional.linear(*given[:2]))
        assert torch.equal(ops.linear_swiglu(*given[:2]), ops.swiglu(functional.linear(*given[:2])))
        library = ops.rms_norm(functional.linear(*given[:2]), given[3], EPS, given[2])
        assert all(map(torch.equal, ops.linear_rms_norm(*given, EPS), library))

    def test_gradients_take_the_reference(self, device):
        given = [x.requires_grad_() for x in operands(4, 64, 48, torch.float32, device)]
        x, weight, _, _ = given
        results = ops.linear(x, weight), ops.linear_swiglu(x, weight)
        results += ops.linear_rms_norm(*given, EPS)
        sum(result.sum() for result in results).backward()
        assert all(tensor.grad is not None for tensor in given)


class TestConfig:
    def test_products_fill_the_gpu(self):
        for width_in, width_out, gated, splittable in (
            (4096, 12288, False, False),
            (4096, 4096, False, True),
            (4096, 12288, True, False),
            (12288, 4096, False, True),
            (18944, 3584, False, True),
        ):
            chosen = config(32, width_in, width_out, gated, splittable, 2, H200)
            assert -(-width_out // chosen.TILE_OUT) * chosen.splits >= H200.multiprocessors
            assert chosen.splits == 1 or splittable

    def test_a_narrow_product_keeps_more_in_flight(self):
        narrow = config(32, 3584, 4608, False, False, 2, H200)
        assert (narrow.TILE_OUT, narrow.num_stages, narrow.splits) == (64, 5, 1)
        assert config(32, 3584, 12288, False, False, 2, H200).num_stages == 3
        assert config(32, 3584, 4608, False, False, 2, Chip(108, 166912)).TILE_OUT == 32

    def test_tiles_follow_the_rows(self):
        rows = [
            config(n, 4096, 12288, False, False, 2, H200).TILE_ROWS
            for n in (1, 16, 17, 32, 64, 65, 128, 256)
        ]
        assert rows == [16, 16, 32, 32, 64, 128, 128, 128]

    @pytest.mark.parametrize("rows", [1, 32, 128])
    def test_fp8_takes_the_tiles_its_tensor_cores_want(self, rows):
        for shape in (
            (3584, 4608, False, False),
            (4096, 12288, True, False),
            (18944, 3584, False, True),
        ):
            chosen = config(rows, *shape, 1, H200)
            assert chosen.TILE_OUT == 64 and chosen.TILE_IN in (128, 256)

    def test_a_chip_without_overlap_is_not_asked_for_it(self):
        assert not config(32, 4096, 4096, False, True, 2, Chip(108, 166912)).overlap


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 32, 64, 128])
def test_real_shapes_and_determinism(rows, device, triton_backend):
    for width_in, width_out in ((4096, 4096), (12288, 4096), (3584, 4608), (18944, 3584)):
        x, weight, residual, norm = operands(rows, width_in, width_out, torch.bfloat16, device)
        first = ops.linear_rms_norm(x, weight, residual, norm, EPS)
        oracle = ops.linear_rms_norm_reference(
            *(t.float() for t in (x, weight, residual, norm)), EPS
        )
        library = ops.linear_rms_norm_reference(x, weight, residual, norm, EPS)
        for ours, theirs, truth in zip(first, library, oracle, strict=True):
            assert_close(ours, theirs, truth)
        for _ in range(50):
            again = ops.linear_rms_norm(x, weight, residual, norm, EPS)
            assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.gpu
def test_a_chain_in_a_graph_waits_for_what_it_reads(device, triton_backend):
    """Every launch may begin before its predecessor ends: a long chain replayed must give what
    separate calls give.
    """
    weights = [
        normal(512, 512, dtype=torch.bfloat16, device=device, seed=i) * 512**-0.5 for i in range(24)
    ]
    norm = torch.ones(512, dtype=torch.bfloat16, device=device)
    x = normal(32, 512, dtype=torch.bfloat16, device=device, seed=99)

    def chain(synchronise):
        y, residual = x, x
        for weight in weights:
            y, residual = ops.linear_rms_norm(y, weight, residual, norm, EPS)
            y = ops.linear(y, weight)
            if synchronise:
                torch.cuda.synchronize()
        return y

    alone = chain(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(False)
    for _ in range(100):
        captured.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, alone)


def test_the_kernel_is_the_one_under_test(device, triton_backend, monkeypatch):
    calls = []
    real = linear_triton.launch

    def counted(*args, **options):
        calls.append(args)
        return real(*args, **options)

    monkeypatch.setattr(linear_triton, "launch", counted)
    x, weight, residual, norm = operands(4, 64, 48, torch.float16, device)
    ops.linear(x, weight)
    ops.linear_swiglu(x, weight)
    ops.linear_rms_norm(x, weight, residual, norm, EPS)
    assert len(calls) == 3
