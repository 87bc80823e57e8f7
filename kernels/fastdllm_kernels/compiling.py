"""Every launch of this package goes through `launch`, so that a launch may also only compile.

A kernel is compiled when it is first launched, each in about a second, one after another. Inside
`side_by_side` launches run nothing and their kernels compile at once, in threads: what would be
launched first in a process is then there in the time that the slowest takes. `watch` counts and
logs what is compiled.
"""

import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from .backend import triton

log = logging.getLogger(__name__)
# Inside `side_by_side` what was asked to be compiled; else None.
_asked: ContextVar[set | None] = ContextVar("fastdllm_asked", default=None)


def launch(kernel, grid: tuple, *arguments, **options) -> None:
    """kernel[grid](*arguments, **options); inside `side_by_side` the kernel is only compiled."""
    asked = _asked.get()
    if asked is None:
        kernel[grid](*arguments, **options)
        return
    # A model's layers launch alike, and to ask triton again takes longer than a launch.
    launched = kernel, tuple(map(_kind, arguments)), tuple(options.items())
    if launched not in asked:
        asked.add(launched)
        kernel.warmup(*arguments, grid=grid, **options)


def _kind(argument):
    """What a kernel may be compiled for of an argument: of a tensor its dtype and alignment."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if isinstance(argument, tuple):
        return tuple(map(_kind, argument))
    if hasattr(argument, "block_shape"):  # a TensorDescriptor
        return argument.base.dtype, tuple(argument.block_shape), repr(argument.layout)
    return argument


@contextmanager
def side_by_side() -> Iterator[bool]:
    """Launches of this thread inside only compile their kernels, side by side; leaving waits until
    all are there. Outputs hold whatever they held.

    Yields whether that is so: False where triton is too old (before 3.5) or missing, and where it
    interprets; then launches are launches. Raises what a compilation raises.
    """
    mode = getattr(triton, "AsyncCompileMode", None)
    if mode is None or os.environ.get("TRITON_INTERPRET") == "1":
        yield False
        return
    with _Compilers(max(4, os.cpu_count() or 4)) as threads, mode(threads):
        token = _asked.set(set())
        try:
            yield True
        finally:
            _asked.reset(token)


class _Compilers(ThreadPoolExecutor):
    """Threads that compile kernels and load them. To load one triton may build its launcher with a
    C compiler, 0.3 seconds each, which the first launches would do one after another.
    """

    def __init__(self, most: int):
        device = torch.cuda.current_device()
        super().__init__(most, initializer=torch.cuda.set_device, initargs=(device,))

    def submit(self, compiles, /):
        """The kernel that compiles() returns, later."""

        def loaded():
            kernel = compiles()
            _ = kernel.run
            return kernel

        return super().submit(loaded)


@dataclass
class Compiled:
    """Kernels of this package compiled in this process, and the seconds it took. Those found in
    triton's cache on disk do not count."""

    kernels: int = 0
    seconds: float = 0.0


_compiled = Compiled()
_counting = threading.Lock()
_watching = False


def watch() -> Compiled:
    """Count compilations from now on, and log each with its seconds; again, the same count.

    triton tells one listener of what it compiles; one that is there already goes on being told.
    """
    global _watching
    knobs = getattr(triton, "knobs", None)
    if _watching or knobs is None or not hasattr(knobs.compilation, "listener"):
        return _compiled
    _watching = True
    before = knobs.compilation.listener

    def listener(**told):
        function = getattr(told["src"], "fn", None)
        ours = getattr(function, "module", "").startswith(__package__)
        if ours and not told["cache_hit"]:
            seconds = told["times"].total / 1e6
            with _counting:
                _compiled.kernels += 1
                _compiled.seconds += seconds
            log.info("compiled %s in %.1f s", function.__name__, seconds)
        if before is not None:
            before(**told)

    knobs.compilation.listener = listener
    return _compiled
