"""rms_norm (+ residual), swiglu and rope_to_cache at the widths of LLaDA-8B: a block's rows, and a
refresh's.
"""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from timing import DEVICE, ON_GPU, Competitor, Contest

import fastdllm_kernels

NAMES = ["ours", "reference"] + ["torch.compile"] * ON_GPU
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
HIDDEN, INTERMEDIATE, HEADS, DIM = (4096, 12288, 32, 128) if ON_GPU else (64, 96, 4, 32)
POSITIONS = 4096


@dataclass(frozen=True)
class Case:
    op: str
    rows: int

    def __str__(self):
        return f"{self.op}, {self.rows} rows"


CASES = [
    Case(op, rows)
    for op in ("rms_norm", "swiglu", "rope_to_cache")
    for rows in ((32, 2048) if ON_GPU else (8,))
]


def inputs(case: Case, index: int):
    """The op's arguments."""
    generator = torch.Generator(DEVICE).manual_seed(index)

    def normal(*shape):
        return torch.empty(shape, dtype=DTYPE, device=DEVICE).normal_(generator=generator)

    if case.op == "rms_norm":
        return normal(case.rows, HIDDEN), normal(HIDDEN), 1e-5, normal(case.rows, HIDDEN)
    if case.op == "swiglu":
        return (normal(case.rows, 2 * INTERMEDIATE),)
    q, k, v = normal(1, case.rows, 3 * HEADS, DIM).split(HEADS, dim=2)
    start = torch.full((1,), 64, dtype=torch.int32, device=DEVICE)
    return (
        q,
        k,
        v,
        *tables(),
        start,
        normal(1, case.rows + 64, HEADS, DIM),
        normal(1, case.rows + 64, HEADS, DIM),
    )


@cache
def tables():
    return torch.empty(2, POSITIONS, DIM // 2, device=DEVICE).normal_()


@cache
def compiled(op):
    return torch.compile(getattr(fastdllm_kernels, f"{op}_reference"), dynamic=False)


def check_for(op):
    reference = getattr(fastdllm_kernels, f"{op}_reference")

    def check(result, buffer):
        """The reference's results, up to a unit in the last place of a rounding that went the other
        way.
        """
        tolerance = 2 * torch.finfo(DTYPE).eps
        torch.testing.assert_close(result, reference(*buffer), rtol=tolerance, atol=tolerance)

    return check


def build(case: Case) -> Contest:
    ours = getattr(fastdllm_kernels, case.op)
    reference = getattr(fastdllm_kernels, f"{case.op}_reference")
    # The reference of rope_to_cache asks the host how many positions to write.
    in_a_graph = case.op != "rope_to_cache"
    competitors = {
        "ours": Competitor(lambda b: ours(*b), theirs=False),
        "reference": Competitor(lambda b: reference(*b), capturable=in_a_graph),
    }
    if ON_GPU and in_a_graph:
        competitors["torch.compile"] = Competitor(lambda b: compiled(case.op)(*b))
    # Read and written once each: x, residual, y, sum; gate, up, y; q, k, v, both rotated, both
    # cached.
    values = {"rms_norm": 4 * HIDDEN, "swiglu": 3 * INTERMEDIATE, "rope_to_cache": 7 * HEADS * DIM}[
        case.op
    ]
    moved = case.rows * values * DTYPE.itemsize
    return Contest(
        case.op,
        f"{case.rows} rows",
        competitors,
        lambda i: inputs(case, i),
        check_for(case.op),
        moved,
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pointwise(case, name, compete):
    compete(build, case, name)
