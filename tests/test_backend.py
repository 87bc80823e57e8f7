"""Which backend runs: what forces one, and what this machine's kernels would compute wrongly."""

import subprocess
import sys

import pytest
import torch

import fastdllm_kernels as ops
from fastdllm_kernels import backend, fp8

pytest.importorskip("triton")
interpreter_only = pytest.mark.skipif(not backend.interpreting(), reason="needs the interpreter")


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def calls(dtype):
    """A call of every op that has a kernel, in this dtype, by name."""
    x, weight, norm = (torch.ones(shape, dtype=dtype) for shape in ((4, 32), (32, 32), (32,)))
    heads, cos = torch.ones(1, 4, 2, 32, dtype=dtype), torch.ones(8, 16)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    return {
        "block_attention": lambda: ops.block_attention(*[heads] * 5, ints(0), ints(4)),
        "confidence_select": lambda: ops.confidence_select(
            x[None], tokens, mask_id=0, rule=ops.Threshold(0.9)
        ),
        "token_confidence": lambda: ops.token_confidence(x),
        "linear": lambda: ops.linear(x, weight),
        "linear_swiglu": lambda: ops.linear_swiglu(x, weight),
        "linear_rms_norm": lambda: ops.linear_rms_norm(x, weight, x, norm, 1e-5),
        "rms_norm": lambda: ops.rms_norm(x, norm, 1e-5),
        "swiglu": lambda: ops.swiglu(x),
        "rope_to_cache": lambda: ops.rope_to_cache(*[heads] * 3, cos, cos, ints(0)),
    }


def fp8_calls():
    """A call of every op that computes in fp8, by name."""
    x, weight = torch.ones(4, 32), ops.quantize_weight(torch.ones(32, 32))
    norm = torch.ones(32)
    return {
        "linear": lambda: ops.linear(x, weight),
        "linear_swiglu": lambda: ops.linear_swiglu(x, weight),
        "linear_rms_norm": lambda: ops.linear_rms_norm(x, weight, x, norm, 1e-5),
        "quantize_rows": lambda: fp8.quantize_rows(x),
    }


@interpreter_only
@pytest.mark.parametrize("op", calls(torch.float32))
def test_the_interpreter_is_refused_for_bf16(op, monkeypatch):
    reference = calls(torch.bfloat16)[op]()
    assert reference is not None, "nothing is forced: the reference runs"
    monkeypatch.setenv(backend.VARIABLE, "triton")
    calls(torch.float16)[op]()
    with pytest.raises(RuntimeError, match=rf"^{op}: .*interpreter.*bfloat16"):
        calls(torch.bfloat16)[op]()


@interpreter_only
@pytest.mark.parametrize("op", fp8_calls())
def test_the_interpreter_is_refused_for_fp8(op, monkeypatch):
    fp8_calls()[op]()
    monkeypatch.setenv(backend.VARIABLE, "triton")
    with pytest.raises(RuntimeError, match=rf"^{op}: .*interpreter.*float8_e4m3fn"):
        fp8_calls()[op]()


@interpreter_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_the_interpreter_is_still_wrong(dtype):
    """Where this fails, triton has mended its casts, and WRONG_IN_INTERPRETER may lose an entry."""
    import triton
    import triton.language as tl

    @triton.jit
    def cast(x, y, N: tl.constexpr):
        tl.store(y + tl.arange(0, N), tl.load(x + tl.arange(0, N)).to(y.dtype.element_ty))

    x = torch.linspace(1, 448, 1024)
    y = torch.empty(1024, dtype=dtype)
    cast[(1,)](x, y, N=1024)
    assert not torch.equal(y.float(), x.to(dtype).float())


LATE = """
import os, torch, triton
os.environ.update(TRITON_INTERPRET="1", FASTDLLM_BACKEND="triton")
import fastdllm_kernels as ops
try:
    ops.swiglu(torch.ones(2, 8))
except RuntimeError as error:
    print(error)
"""


def test_an_interpreter_that_comes_too_late_is_refused(monkeypatch):
    """Triton decides when it is imported; half of its functions would not be interpreted."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True)
    assert "triton was imported without TRITON_INTERPRET=1" in done.stdout, done.stderr


def test_what_forces_a_backend(device, monkeypatch):
    x = torch.ones(2, 8, device=device)
    monkeypatch.setenv(backend.VARIABLE, "reference")
    assert not backend.use_triton("swiglu", x)
    monkeypatch.setenv(backend.VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="swiglu: FASTDLLM_BACKEND=triton, but no reason"):
        backend.use_triton("swiglu", x, "no reason")
    monkeypatch.setenv(backend.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="FASTDLLM_BACKEND.*'cuda'"):
        backend.use_triton("swiglu", x)
    monkeypatch.setenv(backend.VARIABLE, "triton")
    monkeypatch.setattr(backend, "triton", None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        backend.use_triton("swiglu", x)
