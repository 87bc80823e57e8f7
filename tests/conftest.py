"""Where the tests run: compiled on a GPU when there is one, else in Triton's interpreter on the
CPU.
"""

import os

import torch

# Read when a kernel is decorated, so it must stand before anything imports triton (transformers
# does).
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from fastdllm_kernels import backend  # noqa: E402

torch.set_num_threads(1)
settings.register_profile(
    "repeatable", derandomize=True, deadline=None
)  # the same examples in every run
settings.load_profile("repeatable")

ON_GPU = torch.cuda.is_available()
# The interpreter's bf16 is wrong by orders of magnitude: a compiler is needed to test it.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])


@pytest.fixture
def device():
    """The device that kernels run on here."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    """Every dtype that kernels can be tested in here."""
    return request.param


@pytest.fixture
def triton_backend(monkeypatch):
    """Force the kernels: a test that could fall back to the reference would prove nothing."""
    monkeypatch.setenv(backend.VARIABLE, "triton")


@pytest.fixture(params=["reference", "triton"])
def either_backend(request, monkeypatch):
    """Both backends must do the same."""
    monkeypatch.setenv(backend.VARIABLE, request.param)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU and the real compiler")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
