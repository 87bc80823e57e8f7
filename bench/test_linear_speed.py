"""The products of a cached step of LLaDA-8B with what surrounds them: a block's rows, and those of
a small batch.

With fp8 weights the library is torch._scaled_mm with a scale for each row, quantising included;
"bf16 library" reads the weight that was quantised. All of them are held to the fp32 product within
what quantising two operands loses.
"""

from dataclasses import dataclass

import pytest
import torch
from timing import DEVICE, ON_GPU, Competitor, Contest

from fastdllm_kernels import (
    linear,
    linear_reference,
    linear_rms_norm,
    linear_rms_norm_reference,
    linear_swiglu,
    linear_swiglu_reference,
    quantize_weight,
    rms_norm,
    swiglu,
)
from fastdllm_kernels.linear import library_product

NAMES = ("ours", "library", "bf16 library", "reference")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
HIDDEN, INTERMEDIATE = (4096, 12288) if ON_GPU else (64, 96)
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """width_out counts the rows of the weight: for linear_swiglu gate and up."""

    op: str
    rows: int
    width_in: int
    width_out: int
    fp8: bool = False

    def __str__(self):
        return f"{self.width_out} x {self.width_in}, {self.rows} rows{', fp8' if self.fp8 else ''}"


CASES = [
    Case(op, rows, width_in, width_out, fp8)
    for fp8 in (False, True)
    for rows in ((32, 64, 128) if ON_GPU else (8,))
    for op, width_in, width_out in (
        ("linear", HIDDEN, 3 * HIDDEN),
        ("linear_rms_norm", HIDDEN, HIDDEN),
        ("linear_swiglu", HIDDEN, 2 * INTERMEDIATE),
        ("linear_rms_norm", INTERMEDIATE, HIDDEN),
    )
]


def library(op):
    """The library's product, then the kernel that would follow it."""
    return {
        "linear": library_product,
        "linear_swiglu": lambda x, weight: swiglu(library_product(x, weight)),
        "linear_rms_norm": lambda x, weight, residual, norm, eps: rms_norm(
            library_product(x, weight), norm, eps, residual
        ),
    }[op]


def inputs(case: Case, index: int):
    """The op's arguments; with fp8 the weight is (quantised, as it was)."""
    generator = torch.Generator(DEVICE).manual_seed(index)

    def normal(*shape, scale=1.0):
        return torch.empty(shape, dtype=DTYPE, device=DEVICE).normal_(
            std=scale, generator=generator
        )

    x = normal(case.rows, case.width_in)
    weight = normal(case.width_out, case.width_in, scale=case.width_in**-0.5)
    if case.fp8:
        weight = quantize_weight(weight), weight
    if "norm" not in case.op:
        return x, weight
    return x, weight, normal(case.rows, case.width_out), normal(case.width_out), EPS


def with_weight(call, which):
    """call for a buffer whose weight is (quantised, as it was): it takes one of them."""
    return lambda b: call(b[0], b[1][which], *b[2:])


def fp8_check_for(reference):
    def check(result, buffer):
        """Each operand loses 2.3% to fp8 (root mean square), and silu(gate) * up is of two
        products: up to 7.5%.
        """
        x, (_, weight), *others = buffer
        wide = [t.float() if isinstance(t, torch.Tensor) else t for t in (x, weight, *others)]
        found = (r if isinstance(r, tuple) else (r,) for r in (result, reference(*wide)))
        for one, true in zip(*found, strict=True):
            lost = (one.float() - true).norm() / true.norm()
            assert lost <= 0.075, f"off by {lost:.3g} of its size"

    return check


def check_for(reference):
    def check(result, buffer):
        """At most twice what the library loses in this dtype, plus units in the last place of the
        largest value.
        """
        wide = [x.float() if isinstance(x, torch.Tensor) else x for x in buffer]
        found = (
            r if isinstance(r, tuple) else (r,)
            for r in (result, reference(*buffer), reference(*wide))
        )
        for one, library, true in zip(*found, strict=True):
            allowed = (
                2 * (library.float() - true).abs().max()
                + 4 * torch.finfo(DTYPE).eps * true.abs().max()
            )
            error = (one.float() - true).abs().max()
            assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"

    return check


def build(case: Case) -> Contest:
    ours = {"linear": linear, "linear_swiglu": linear_swiglu, "linear_rms_norm": linear_rms_norm}[
        case.op
    ]
    reference = {
        "linear": linear_reference,
        "linear_swiglu": linear_swiglu_reference,
        "linear_rms_norm": linear_rms_norm_reference,
    }[case.op]
    theirs = library(case.op)
    if case.fp8:
        competitors = {
            "ours": Competitor(with_weight(ours, 0), theirs=False),
            "library": Competitor(with_weight(theirs, 0)),
            "bf16 library": Competitor(with_weight(theirs, 1)),
            "reference": Competitor(with_weight(reference, 0)),
        }
    else:
        competitors = {
            "ours": Competitor(lambda b: ours(*b), theirs=False),
            "library": Competitor(lambda b: theirs(*b)),
            "reference": Competitor(lambda b: reference(*b)),
        }
    moved = case.width_out * case.width_in * (1 if case.fp8 else DTYPE.itemsize)
    operations = 2 * case.rows * case.width_out * case.width_in
    check = (fp8_check_for if case.fp8 else check_for)(reference)
    return Contest(
        case.op, str(case), competitors, lambda i: inputs(case, i), check, moved, operations
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}, {case}")
def test_linear(case, name, compete):
    compete(build, case, name)
