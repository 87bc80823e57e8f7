"""Compile kernels for GPUs that are not there, and look at what came out: shared memory, registers,
spills.

How a test uses it (tests/test_compile_<op>.py), arch being 80, 90 or 100:

    import compile_check
    import pytest
    import torch

    def launches(arch):
        from fastdllm_kernels import <op>_triton as kernels
        x = torch.empty(32, 4096, dtype=torch.bfloat16, device="meta")
        # The real launcher: its config, its constants, its specialisation.
        kernels.launch_something(x, ...)
        # Or one configuration by hand.
        kernels.some_kernel.warmup(x, ..., TILE=64, num_warps=4, grid=(1,))

    @pytest.mark.parametrize("arch", compile_check.ARCHITECTURES)
    def test_compiles(arch):
        compile_check.assert_fits(compile_check.compile_launches(__file__, "launches", arch))

`launches` runs in a child process, because one with TRITON_INTERPRET=1 (see conftest.py) has
interpreted kernels only. There a stand-in driver answers for the chip, and every launch,
`kernel[grid](...)` or `.warmup(...)`, compiles, is recorded and runs nothing; equal launches count
once. Tensors may be on the meta device, so real sizes cost nothing. A launcher that asks torch.cuda
for properties must be handed them instead (config functions are pure: pass what the chip has, see
MULTIPROCESSORS). Results are kept in triton's own cache, so a second run is fast.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ARCHITECTURES = (80, 90, 100)
# What one program may use, in bytes; the compiler itself does not check it.
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
# What the chips with these capabilities have, for config functions that ask: A100, H100/H200, B200.
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel: bytes of shared memory, registers a thread, and bytes of stack and local
    memory (spills).

    serialised: what the assembler says where it makes every asynchronous product wait for the one
    before it (Hopper), or "".
    """

    name: str
    configuration: str
    arch: int
    shared: int
    registers: int
    stack: int
    local: int
    serialised: str


def compile_launches(file, function, arch) -> list[Compiled]:
    """Run `function(arch)` of the Python file `file` in a child that compiles its launches; returns
    what it compiled.

    AssertionError with the child's output when something does not compile or nothing was launched.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "compiled.json"
        command = [
            sys.executable,
            __file__,
            os.fspath(file),
            function,
            str(arch),
            os.fspath(result),
        ]
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        said = f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        assert done.returncode == 0, f"{function}({arch}) of {file} failed:\n{said}"
        compiled = [Compiled(**entry) for entry in json.loads(result.read_text())]
    assert compiled, f"{function}({arch}) of {file} launched nothing"
    return compiled


def problems(compiled: list[Compiled]) -> list[str]:
    """One line for every kernel that spills registers or needs more shared memory than its chip
    has.
    """
    found = []
    for kernel in compiled:
        what = f"{kernel.name} on sm_{kernel.arch} with {kernel.configuration}"
        if kernel.stack or kernel.local:
            found.append(
                f"{what}: spills ({kernel.stack} bytes of stack, {kernel.local} of local memory)"
            )
        if kernel.serialised:
            found.append(f"{what}: {kernel.serialised}")
        if kernel.shared > SHARED_LIMIT[kernel.arch]:
            found.append(
                f"{what}: {kernel.shared} bytes of shared memory, "
                f"the limit is {SHARED_LIMIT[kernel.arch]}"
            )
    return found


def assert_fits(compiled: list[Compiled]) -> None:
    """Fail with every problem at once."""
    found = problems(compiled)
    assert not found, "\n".join(found)


class _StandInDriver:
    """What triton asks of a driver before it launches: the chip, and which device and stream are
    current.
    """

    def __init__(self, arch):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def _record(arch):
    """Turn every launch in this process into a compilation for `arch`; returns the dict that
    collects the kernels.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_StandInDriver(arch))
    run, kernels = JITFunction.run, {}

    def compile_only(self, *args, grid, warmup, **kwargs):
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception:
            print(
                f"while compiling {self.__name__} with {_configuration(self, args, kwargs)}",
                file=sys.stderr,
            )
            raise
        kernels.setdefault(id(kernel), (kernel, self.__name__, _configuration(self, args, kwargs)))
        return kernel

    JITFunction.run = compile_only
    return kernels


def _configuration(kernel, args, kwargs):
    """The arguments that choose a configuration, as text: dtypes of tensors, constants, warps and
    stages.
    """
    given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    shown = {name: getattr(value, "dtype", value) for name, value in given.items()}
    return ", ".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in shown.items())


def _resources(cubin):
    """(registers, stack, local) of a cubin, as the tool shipped with triton reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return tuple(
        int(re.search(rf"{name}:(\d+)", text).group(1)) for name in ("REG", "STACK", "LOCAL")
    )


def _serialised(ptx, arch):
    from triton.backends.nvidia.compiler import (
        get_ptxas,
    )  # the one that triton itself takes for the chip

    if arch != 90:
        return ""
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        file.write(ptx.encode())
        file.flush()
        command = [
            get_ptxas(arch).path,
            "--gpu-name=sm_90a",
            file.name,
            "--output-file",
            f"{file.name}.cubin",
        ]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        Path(f"{file.name}.cubin").unlink()
    return next((line for line in text.splitlines() if "serialized" in line), "")


def _main(file, function, arch, result):
    sys.path.insert(0, str(Path(file).resolve().parent))
    kernels = _record(int(arch))
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    getattr(module, function)(int(arch))
    compiled = []
    for kernel, name, configuration in kernels.values():
        registers, stack, local = _resources(kernel.asm["cubin"])
        serialised = _serialised(kernel.asm["ptx"], int(arch))
        compiled.append(
            Compiled(
                name,
                configuration,
                int(arch),
                kernel.metadata.shared,
                registers,
                stack,
                local,
                serialised,
            )
        )
    Path(result).write_text(json.dumps([asdict(entry) for entry in compiled]))


if __name__ == "__main__":
    _main(*sys.argv[1:])
