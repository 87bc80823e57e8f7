"""Launches that only compile: each kind of launch is asked for once."""

import threading

import pytest
import torch

from fastdllm_kernels import compiling


class Kernel:
    """Stands for a jit function: a list of what was launched, and of what was only compiled."""

    def __init__(self):
        self.launched, self.compiled = [], []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launched.append((grid, arguments, options))

    def warmup(self, *arguments, grid, **options):
        self.compiled.append((grid, arguments, options))


@pytest.fixture
def only_compiles():
    token = compiling._asked.set(set())
    yield
    compiling._asked.reset(token)


def test_a_launch_is_a_launch():
    kernel, x = Kernel(), torch.zeros(4)
    for _ in range(2):
        compiling.launch(kernel, (3,), x, 1, WIDTH=4)
    assert kernel.launched == [((3,), (x, 1), {"WIDTH": 4})] * 2 and not kernel.compiled


def test_what_launches_alike_is_compiled_once(only_compiles):
    kernel, other = Kernel(), Kernel()
    x = torch.zeros(64)
    for one, arguments, options in (
        (kernel, (x, 1), {"WIDTH": 4}),
        (kernel, (torch.ones(128), 1), {"WIDTH": 4}),  # alike
        (kernel, (x.half(), 1), {"WIDTH": 4}),
        (kernel, (x[1:], 1), {"WIDTH": 4}),  # other alignment
        (kernel, (x, 16), {"WIDTH": 4}),
        (kernel, (x, 1), {"WIDTH": 8}),
        (kernel, (x, None), {"WIDTH": 4}),
        (kernel, ((x, 1.0), 1), {"WIDTH": 4}),
        (kernel, ((x.half(), 1.0), 1), {"WIDTH": 4}),
        (other, (x, 1), {"WIDTH": 4}),
    ):
        compiling.launch(one, (3,), *arguments, **options)
    assert len(kernel.compiled) == 8 and len(other.compiled) == 1
    assert not kernel.launched and not other.launched


def test_what_compiles_side_by_side_is_loaded_there_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    here, loaded_by = threading.get_ident(), []

    class Loads:
        @property
        def run(self):
            loaded_by.append(threading.get_ident())

    class Fails:
        @property
        def run(self):
            raise RuntimeError("no room for this kernel")

    with compiling._Compilers(2) as threads:
        assert isinstance(threads.submit(Loads).result(), Loads)
        with pytest.raises(RuntimeError, match="no room"):
            threads.submit(Fails).result()
    assert len(loaded_by) == 1 and loaded_by[0] != here
