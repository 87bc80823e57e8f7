"""fp8 in place of a model's weight matrices: half the bytes of bf16 to hold, and to read in every
cached step.
"""

import torch
from torch import nn

from fastdllm_kernels import Fp8Weight, linear, quantize_weight

from .bare import LINEAR_TYPES
from .model import DiffusionTransformer


class Fp8Linear(nn.Module):
    """nn.Linear for inference whose weight is an Fp8Weight: a scale for each output, the rows of x
    quantised as they come.
    """

    data: torch.Tensor
    scale: torch.Tensor
    bias: nn.Parameter | None

    def __init__(self, product: nn.Linear):
        super().__init__()
        data, scale = quantize_weight(product.weight.detach())
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", product.bias)

    @property
    def weight(self) -> Fp8Weight:
        return Fp8Weight(self.data, self.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def _apply(self, fn, recurse=True):
        """The weight moves with its model and is never cast: .to(dtype) sees bytes."""

        def move(t):
            return fn(t) if isinstance(t, nn.Parameter) else fn(t.view(torch.uint8)).view(t.dtype)

        return super()._apply(move, recurse)


LINEAR_TYPES.add(Fp8Linear)


def quantize(model: DiffusionTransformer) -> DiffusionTransformer:
    """Put an Fp8Linear in place of every nn.Linear, in place and one at a time; a head tied to the
    embedding stays.
    """
    for parent in list(model.modules()):
        for name, product in list(parent.named_children()):
            if isinstance(product, nn.Linear) and product.weight is not model.embedding.weight:
                setattr(parent, name, Fp8Linear(product))
    return model
