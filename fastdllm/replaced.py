"""Methods replaced on single instances, and the plain linears, RMSNorms and MLPs that this
project's ops compute faster.
"""

import copy
from types import MethodType

import torch
from torch import nn
from torch.nn import functional

from fastdllm_kernels import linear, linear_swiglu, rms_norm

PLAIN = (torch.Tensor, nn.Parameter)  # no subclass, whose arithmetic only its own code knows


class Replaced:
    """A method set on one instance until `restore`; its class and the other instances keep theirs."""

    def __init__(self, module: nn.Module, name: str, method):
        self.module, self.name, self.method = module, name, method
        self.before = vars(module).get(
            name
        )  # what somebody else had set on the instance, a hook perhaps
        setattr(module, name, self)

    def __call__(self, *args, **options):
        return self.method(*args, **options)

    def restore(self):
        """What was there before is there again; somebody's wrapper around it stays, and calls what
        was there before.
        """
        own = vars(self.module)
        if own.get(self.name) is self:
            del own[self.name]
            if self.before is not None:
                own[self.name] = self.before
        self.method = self.before or MethodType(getattr(type(self.module), self.name), self.module)


class Faster(Replaced):
    """A module's forward by op(module, x), which reads the module's parameters when it is called.

    Where x or a weight is no plain tensor (quantised in place, sharded, traced) op gives None: the
    class's own forward runs.
    """

    def __init__(self, module: nn.Module, op):
        self.op = op
        super().__init__(module, "forward", self.compute)

    def compute(self, *args, **options):
        module = self.module
        result = (
            self.op(module, args[0])
            if len(args) == 1 and not options and type(args[0]) in PLAIN
            else None
        )
        return type(module).forward(module, *args, **options) if result is None else result


def speed_up(*parts: nn.Module | None) -> list[Replaced]:
    """Replace the forward of every nn.Linear, RMSNorm and SwiGLU MLP inside the parts; None is no
    part.

    An nn.Linear is one of that very type; the others are told by a probe. What has a forward of its
    own instance keeps it.
    """
    modules = [
        module
        for part in filter(None, parts)
        for module in part.modules()
        if "forward" not in vars(module)
    ]
    return [Faster(module, op) for module in modules if (op := _op(module))]


def _op(module):
    if type(module) is nn.Linear:
        return _linear
    return _rms_norm if _is_rms_norm(module) else _mlp if _is_mlp(module) else None


def _linear(module, x):
    return linear(x, module.weight, module.bias) if type(module.weight) in PLAIN else None


def _rms_norm(module, x):
    return rms_norm(x, module.weight, _eps(module)) if type(module.weight) in PLAIN else None


def _mlp(module, x):
    gate, up = module.gate_proj, module.up_proj
    return (
        module.down_proj(linear_swiglu(x, gate.weight, up.weight))
        if _is_bare(gate) and _is_bare(up)
        else None
    )


def _is_bare(module):
    """Whether calling the module is nothing but its product: no bias, no hook, no wrapper, not even
    one put on later.
    """
    hooks = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    plain = (
        type(module) is nn.Linear
        and module.bias is None
        and type(module.weight) in PLAIN
        and not hooks
    )
    return plain and isinstance(vars(module).get("forward"), (Faster, type(None)))


def _eps(module):
    return vars(module).get("variance_epsilon", vars(module).get("eps"))


def _computes(module, held, probe, wanted, rtol, atol) -> bool:
    """Whether the module, with `held` in place of what it holds under those names, makes of the
    probe what wanted() is.

    A twin answers: none of the module's hooks run, and its weights need not be loaded yet.
    """
    try:
        twin = copy.copy(module)
        vars(twin).update(held)
        theirs, ours = twin.forward(probe), wanted()
        return ours.dtype == theirs.dtype and torch.allclose(
            ours.float(), theirs.float(), rtol=rtol, atol=atol
        )
    except Exception:  # whatever somebody else's forward wants or raises: it is something else
        return False


@torch.no_grad()
def _is_rms_norm(module) -> bool:
    """Whether a module is made like an RMSNorm and, with other weights, computes what rms_norm does
    but for the rounding.
    """
    named = dict(module.named_parameters())
    weight = named.get("weight")
    if (
        len(named) != 1
        or type(weight) is not nn.Parameter
        or weight.ndim != 1
        or weight.is_meta
        or _eps(module) is None
    ):
        return False
    # Around 1, where a norm that takes off the mean shows; one row so small that eps counts. No
    # global generator is drawn from.
    values = 1 + torch.randn(
        3, len(weight), generator=torch.Generator().manual_seed(0), device="cpu"
    )
    probe, other = (
        (values[:2] * torch.tensor([[1e-3], [8.0]], device="cpu")).to(weight),
        values[2].to(weight),
    )
    held, limits = (
        {"_parameters": {**module._parameters, "weight": other}},
        torch.finfo(weight.dtype),
    )
    rtol = max(
        1e-5, 2 * limits.eps
    )  # two units in the last place: some round once, some before the weight as well
    return _computes(
        module, held, probe, lambda: rms_norm(probe, other, _eps(module)), rtol, limits.tiny
    )


@torch.no_grad()
def _is_mlp(module) -> bool:
    """Whether a module is made like a SwiGLU MLP and computes one, shown on small products in place
    of its own.
    """
    sizes = {"gate_proj": (8, 16), "up_proj": (8, 16), "down_proj": (16, 8)}
    if not all(type(module._modules.get(name)) is nn.Linear for name in sizes):
        return False
    generator = torch.Generator().manual_seed(0)
    small = {
        name: nn.Linear(*size, bias=False, device="cpu", dtype=torch.float32)
        for name, size in sizes.items()
    }
    for product in small.values():
        product.weight.normal_(generator=generator)
    gate, up, down = small.values()
    probe = torch.randn(3, 8, generator=generator, dtype=torch.float32, device="cpu")
    held = {"_modules": {**module._modules, **small}}
    return _computes(
        module, held, probe, lambda: down(functional.silu(gate(probe)) * up(probe)), 1e-5, 1e-5
    )
