"""Fast-dLLM (arXiv 2505.22618) for LLaDA and Dream: block-wise caches and parallel decoding on
Triton kernels.
"""

from fastdllm_kernels import Factor, Quota, Threshold

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
    "Factor",
    "Generation",
    "Quota",
    "QueueFull",
    "Request",
    "RequestCancelled",
    "StepEvent",
    "Threshold",
    "generate",
    "infill",
    "load",
    "replace_attention",
    "restore_attention",
    "warm_up",
]
