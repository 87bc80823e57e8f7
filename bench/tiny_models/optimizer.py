"""Muon for the layers' matrices and AdamW for the rest, over fp32 master weights of a model that
may run in bf16.

Muon (Jordan et al., 2024): a matrix moves along the nearest (semi-)orthogonal one to its momentum,
found in five Newton-Schulz steps. Fused matrices are split into their published parts, and equal
shapes take the steps as one batch.
"""

from __future__ import annotations

import torch

from fastdllm.checkpoint import fused_rows

MOMENTUM = 0.95
WEIGHT_DECAY = 0.05
# At the full rate the biases of q, k and v grew to 14 and names in a problem were never copied into
# its answer; at this share of it they were (one run of each).
BIAS_SHARE = 0.03


def orthogonalize(matrices: torch.Tensor, dtype=torch.bfloat16) -> torch.Tensor:
    """[N, R, C] -> the same shape with all singular values near 1."""
    x = matrices.to(dtype)
    x = x.mT if x.shape[1] > x.shape[2] else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


class Optimizer:
    """step(scale) updates the masters with both learning rates times `scale` and copies them into
    the model.
    """

    def __init__(self, model, muon_lr: float, adam_lr: float):
        self.muon_lr, self.adam_lr = muon_lr, adam_lr
        self.rows = {
            name: fused_rows(model.config, name, p) for name, p in model.named_parameters()
        }
        self.parameters = dict(model.named_parameters())
        self.masters = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        self.groups: dict[tuple, list] = {}
        for name, master in self.masters.items():
            if name.startswith("layers.") and master.ndim == 2:
                for index, part in enumerate(master.split(self.rows[name])):
                    self.groups.setdefault(tuple(part.shape), []).append((name, index, part))
        self.momentum = {
            shape: master.new_zeros(len(group), *shape) for shape, group in self.groups.items()
        }
        matrices = {name for group in self.groups.values() for name, _, _ in group}
        self.rest = [name for name in self.masters if name not in matrices]
        biases = [self.masters[name] for name in self.rest if name.endswith("bias")]
        others = [self.masters[name] for name in self.rest if not name.endswith("bias")]
        groups = [{"params": others, "share": 1.0}]
        if biases:
            groups.append({"params": biases, "share": BIAS_SHARE})
        self.adam = torch.optim.AdamW(
            groups,
            lr=adam_lr,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=model.device.type == "cuda",
        )

    @torch.no_grad()
    def step(self, scale: float) -> None:
        for shape, group in self.groups.items():
            grads = [
                self.parameters[name].grad.split(self.rows[name])[index] for name, index, _ in group
            ]
            grad = torch.stack(grads).float()
            momentum = self.momentum[shape]
            momentum.lerp_(grad, 1 - MOMENTUM)
            ahead = grad.lerp_(momentum, MOMENTUM)  # Nesterov's look ahead
            update = orthogonalize(ahead).float()
            lr = self.muon_lr * scale
            masters = [part for _, _, part in group]
            torch._foreach_mul_(masters, 1 - lr * WEIGHT_DECAY)
            stretch = max(1.0, shape[0] / shape[1]) ** 0.5
            torch._foreach_add_(masters, update.unbind(), alpha=-lr * stretch)
        for name in self.rest:
            self.masters[name].grad = self.parameters[name].grad.float()
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * scale * group["share"]
        self.adam.step()
        self.write()
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Copy the masters into the model, in its dtype."""
        torch._foreach_copy_(list(self.parameters.values()), list(self.masters.values()))

    def state_dict(self) -> dict:
        return {"masters": self.masters, "momentum": self.momentum, "adam": self.adam.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        for name, master in self.masters.items():
            master.copy_(state["masters"][name])
        for shape, momentum in self.momentum.items():
            momentum.copy_(state["momentum"][shape])
        self.adam.load_state_dict(state["adam"])
        self.write()
