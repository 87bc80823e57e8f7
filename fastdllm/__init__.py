"""Fast-dLLM (arXiv 2505.22618) for LLaDA and Dream: block-wise caches and parallel decoding on
Triton kernels.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdllm_kernels import (
        EntropyBound,
        Factor,
        Frechet,
        Neighbours,
        ProgressThreshold,
        Quota,
        Stability,
        Threshold,
    )

    from .cache import CachePolicy
    from .checkpoint import load
    from .decode import Generation, StepEvent, generate, infill
    from .engine import Engine, EngineClosed, QueueFull, Request, RequestCancelled
    from .patch import replace_attention, restore_attention
    from .warming import warm_up

__version__ = "0.1.0"

__all__ = [
    "CachePolicy",
    "Engine",
    "EngineClosed",
    "EntropyBound",
    "Factor",
    "Frechet",
    "Generation",
    "Neighbours",
    "ProgressThreshold",
    "Quota",
    "QueueFull",
    "Request",
    "RequestCancelled",
    "Stability",
    "StepEvent",
    "Threshold",
    "generate",
    "infill",
    "load",
    "replace_attention",
    "restore_attention",
    "warm_up",
]

# The first use of a public name imports these, and torch with them, which takes seconds: the
# command line answers an interrupt before.
_HOMES = (
    "fastdllm_kernels",
    ".cache",
    ".checkpoint",
    ".decode",
    ".engine",
    ".patch",
    ".warming",
)


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    homes = [importlib.import_module(home, __name__) for home in _HOMES]
    for public in __all__:
        found = next(getattr(home, public) for home in homes if hasattr(home, public))
        globals().setdefault(public, found)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
