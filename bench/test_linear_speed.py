"""The products of a cached step of LLaDA-8B with what surrounds them: a block's rows, and those of a small batch."""

from dataclasses import dataclass

import pytest
import torch
from timing import DEVICE, ON_GPU, Competitor, Contest
from torch.nn import functional

from fastdllm_kernels import (
    linear,
    linear_reference,
    linear_rms_norm,
    linear_rms_norm_reference,
    linear_swiglu,
    linear_swiglu_reference,
    rms_norm,
    swiglu,
)

NAMES = ("ours", "library", "reference")
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

    def __str__(self):
        return f"{self.width_out} x {self.width_in}, {self.rows} rows"


CASES = [
    Case(op, rows, width_in, width_out)
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
        "linear": functional.linear,
        "linear_swiglu": lambda x, weight: swiglu(functional.linear(x, weight)),
        "linear_rms_norm": lambda x, weight, residual, norm, eps: rms_norm(functional.linear(x, weight), norm, eps, residual),
    }[op]


def inputs(case: Case, index: int):
    """The op's arguments."""
    generator = torch.Generator(DEVICE).manual_seed(index)

    def normal(*shape, scale=1.0):
        return torch.empty(shape, dtype=DTYPE, device=DEVICE).normal_(std=scale, generator=generator)

    x, weight = normal(case.rows, case.width_in), normal(case.width_out, case.width_in, scale=case.width_in**-0.5)
    return (x, weight, normal(case.rows, case.width_out), normal(case.width_out), EPS) if "norm" in case.op else (x, weight)


def check_for(reference):
    def check(result, buffer):
        """At most twice what the library loses in this dtype, plus units in the last place of the largest value."""
        wide = [x.float() if isinstance(x, torch.Tensor) else x for x in buffer]
        found = (r if isinstance(r, tuple) else (r,) for r in (result, reference(*buffer), reference(*wide)))
        for one, library, true in zip(*found, strict=True):
            allowed = 2 * (library.float() - true).abs().max() + 4 * torch.finfo(DTYPE).eps * true.abs().max()
            error = (one.float() - true).abs().max()
            assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"

    return check


def build(case: Case) -> Contest:
    ours = {"linear": linear, "linear_swiglu": linear_swiglu, "linear_rms_norm": linear_rms_norm}[case.op]
    reference = {
        "linear": linear_reference, "linear_swiglu": linear_swiglu_reference, "linear_rms_norm": linear_rms_norm_reference,
    }[case.op]  # fmt: skip
    competitors = {
        "ours": Competitor(lambda b: ours(*b), theirs=False),
        "library": Competitor(lambda b: library(case.op)(*b)),
        "reference": Competitor(lambda b: reference(*b)),
    }
    moved = case.width_out * case.width_in * DTYPE.itemsize
    operations = 2 * case.rows * case.width_out * case.width_in
    return Contest(case.op, str(case), competitors, lambda i: inputs(case, i), check_for(reference), moved, operations)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}, {case}")
def test_linear(case, name, compete):
    compete(build, case, name)
