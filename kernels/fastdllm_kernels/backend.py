"""The one place that chooses between a Triton kernel and its PyTorch reference, reads the
environment and knows the GPU.

`FASTDLLM_BACKEND=triton|reference` forces a choice for every op, and a forced choice never falls
back: what it cannot run raises. Without it, GPU tensors take the kernel and CPU tensors the
reference. Read on every call, so a test can change it.
"""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch

from . import checks

try:
    import triton
except ImportError:  # an engine or a machine without triton still gets the references
    triton = None

VARIABLE = "FASTDLLM_BACKEND"
# What Triton's interpreter gets wrong (3.6 to 3.9): sums and products of bfloat16 by orders of
# magnitude, and casts to float8_e4m3fn where rounding carries into the exponent.
WRONG_IN_INTERPRETER = (torch.bfloat16, torch.float8_e4m3fn)


def forced():
    """The forced backend, "triton" or "reference", or None; ValueError when the variable says
    anything else.
    """
    value = os.environ.get(VARIABLE) or None
    if value not in (None, "triton", "reference"):
        raise ValueError(f"{VARIABLE} must be 'triton' or 'reference', got {value!r}")
    return value


@cache
def interpreting() -> bool:
    """True where Triton runs kernels in its CPU interpreter: TRITON_INTERPRET counts at the moment
    triton is imported.
    """
    return triton is not None and not isinstance(triton.language.cdiv, triton.JITFunction)


def use_triton(op: str, tensor: torch.Tensor, unsupported: str | None = None, *dtypes) -> bool:
    """Whether `op` runs as a kernel on `tensor`'s device.

    unsupported: why the kernel cannot take these inputs, or None. dtypes: what it computes in
    beside the tensor's own. RuntimeError when the kernel is forced and cannot run.
    """
    choice = forced()
    if choice == "reference":
        return False
    obstacle = _obstacle(tensor, *dtypes) or unsupported
    if choice == "triton":
        if obstacle:
            raise RuntimeError(f"{op}: {VARIABLE}=triton, but {obstacle}")
        return True
    return tensor.is_cuda and obstacle is None


def _obstacle(tensor, *dtypes):
    """Why no kernel runs on the tensor here, or None."""
    if triton is None:
        return "triton is not installed"
    if interpreting():
        for dtype in (tensor.dtype, *dtypes):
            if dtype in WRONG_IN_INTERPRETER:
                name = str(dtype).removeprefix("torch.")
                return f"Triton's interpreter (TRITON_INTERPRET=1) computes {name} wrongly"
        return None
    if not tensor.is_cuda:
        return (
            f"the inputs are on {tensor.device} and triton was imported without TRITON_INTERPRET=1"
        )
    return None


def use_kernel(op: str, *operands, unsupported: str | None = None, dtypes=()) -> bool:
    """Whether a small op runs as a kernel on these operands, the first of which is a tensor; None
    among them is absent.

    Small ops have no backward, need one dtype on one device, and leave torch.compile their
    references, so that its fusion reaches across them.
    """
    if torch.compiler.is_compiling():
        return False
    first, grad = operands[0], torch.is_grad_enabled()
    for operand in operands:
        if operand is None:
            continue
        if grad and operand.requires_grad:
            unsupported = "an input requires a gradient and the kernel has none"
        elif operand.dtype != first.dtype or operand.device != first.device:
            unsupported = (
                f"{operand.dtype} on {operand.device} stands beside {first.dtype} on {first.device}"
            )
    if first.dtype not in checks.FLOATS:
        unsupported = f"it takes float16, bfloat16 or float32, not {first.dtype}"
    return use_triton(op, first, unsupported, *dtypes)


def on_device(tensor: torch.Tensor):
    """A context in which Triton, which launches on the current device, launches on the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. In Python, as `power_of_2` is: triton's own cost a launcher ten times as
    much.
    """
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A tensor whose elements follow one another (a column of a table is copied, on the device);
    None stays None.
    """
    return None if tensor is None else tensor.contiguous()


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x [..., C] as rows [N, C] of contiguous values; a copy only where no stride says it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@dataclass(frozen=True)
class Chip:
    """What a kernel's configuration needs to know of a GPU: multiprocessors, shared memory of a
    program in bytes, whether a kernel may be launched while the one before it still runs
    (`overlap`, Hopper and later), and whether it is a Hopper.
    """

    multiprocessors: int
    shared: int
    overlap: bool = False
    hopper: bool = False


@cache
def chip_of(device: torch.device) -> Chip:
    """What `device` has; for the interpreter on a CPU, one multiprocessor, so that it runs no more
    programs than it must.
    """
    if device.type != "cuda":
        return Chip(1, 232448)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 65536)
    overlap = torch.version.cuda is not None and properties.major >= 9 and shared >= 232448
    return Chip(
        properties.multi_processor_count, shared, overlap, overlap and properties.major == 9
    )


def pdl(overlap: bool) -> dict:
    """The launch option of a kernel that begins with gdc_wait: it may be launched while the one
    before it still runs.
    """
    return {"launch_pdl": True} if overlap else {}


def describe() -> str:
    """One line for people: the backend that runs here, and why."""
    choice = forced()
    if choice:
        return f"{choice} (forced by {VARIABLE})"
    if triton is None:
        return "reference (triton is not installed)"
    if not torch.cuda.is_available():
        return "reference (no GPU is visible)"
    return (
        f"triton {triton.__version__} on {torch.cuda.get_device_name()}; reference for CPU tensors"
    )
