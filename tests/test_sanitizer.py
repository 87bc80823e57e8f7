"""compute-sanitizer finds nothing in a small case of every kernel, where the tool is at hand."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


@pytest.mark.gpu
@pytest.mark.skipif(not os.access(TOOL, os.X_OK), reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("check", ["memcheck", "racecheck"])
def test_nothing_is_found(check):
    script = Path(__file__).with_name("sanitize.py")
    command = [TOOL, "--tool", check, "--error-exitcode", "3", sys.executable, str(script)]
    if check == "racecheck":
        # It does not follow the barriers by which Triton starts and ends its warp partitions, and
        # reports those; and two consumers that clear the same values write the same bytes, on
        # purpose.
        command[1:1] = ["--kernel-regex-exclude", "kns=attention_hopper_kernel"]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "every kernel ran" in done.stdout, (
        done.stdout[-4000:] + done.stderr[-2000:]
    )
