"""Which modules may be computed past their call: those whose call is nothing but their own forward.

A fused op reads a module's parameters and never calls the module. What somebody put around it (a
LoRA adapter, a quantised stand-in, a forward hook, an offloading wrapper) would then be skipped
without a word. Every place that reads a weight past its module asks here first.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from fastdllm_kernels import linear

# No subclass of Tensor: what one multiplies to (quantised in place, sharded), only its code knows.
PLAIN = (torch.Tensor, nn.Parameter)
# Classes that compute x W^T + bias from `weight` and `bias`; quantize.py adds its own.
LINEAR_TYPES: set[type[nn.Module]] = {nn.Linear}


class SameForward:
    """A forward set on an instance that computes what the forward of the instance's class does."""


def is_bare(module: nn.Module) -> bool:
    """Whether calling `module` is nothing but its class's forward: no hook of its own, no global
    one, and no forward of the instance but a SameForward. About 0.4 us.
    """
    own = module.__dict__
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or _has_any_global_hook()
    ):
        return False
    return "forward" not in own or isinstance(own["forward"], SameForward)


def is_product(module: nn.Module) -> bool:
    """Whether calling `module` is nothing but x W^T + bias with a weight that the ops know."""
    kind = type(module)
    if kind not in LINEAR_TYPES or not is_bare(module):
        return False
    # By the dictionary: looking up `module.weight` takes longer than all the rest.
    return kind is not nn.Linear or type(module._parameters.get("weight")) in PLAIN


def is_bare_product(module: nn.Module) -> bool:
    """Whether calling `module` is nothing but x W^T: a product as above, without a bias."""
    return is_product(module) and module._parameters["bias"] is None


def multiply(product: Any, x: torch.Tensor) -> torch.Tensor:
    """product(x), by the op for few rows where that is the same."""
    if is_product(product):
        return linear(x, product.weight, product.bias)
    return product(x)
