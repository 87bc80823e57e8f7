"""Methods replaced on single instances, and the plain linears, RMSNorms and MLPs of somebody else's
model that this project's ops compute faster.
"""

import copy
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fastdllm_kernels import linear, linear_swiglu, rms_norm

from .bare import PLAIN, SameForward, is_bare_product

Op = Callable[[nn.Module, torch.Tensor], torch.Tensor | None]


class Replaced:
    """A method set on one instance until `restore`; its class and the other instances keep
    theirs.
    """

    def __init__(self, module: nn.Module, name: str, method: Callable):
        self.module = module
        self.name = name
        self.method = method
        # What somebody else had set on the instance, a hook perhaps.
        self.before = vars(module).get(name)
        setattr(module, name, self)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.method(*args, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of what is replaced: libraries look at a forward's before they call it."""
        return inspect.signature(self.original)

    @property
    def original(self) -> Callable:
        """The method that is called where this one is not in its place."""
        return self.before or MethodType(getattr(type(self.module), self.name), self.module)

    def restore(self) -> None:
        """What was there before is there again; somebody's wrapper around it stays, and calls what
        was there before.
        """
        own = vars(self.module)
        if own.get(self.name) is self:
            del own[self.name]
            if self.before is not None:
                own[self.name] = self.before
        self.method = self.original


class Faster(Replaced, SameForward):
    """A module's forward by op(module, x), which reads the module's parameters when it is called.

    Where x or a weight is no plain tensor (quantised in place, sharded, traced) op gives None: the
    class's own forward runs.
    """

    def __init__(self, module: nn.Module, op: Op):
        self.op = op
        super().__init__(module, "forward", self.compute)

    def compute(self, *args: Any, **options: Any) -> Any:
        """The module's forward."""
        module = self.module
        result = None
        if len(args) == 1 and not options and type(args[0]) in PLAIN:
            result = self.op(module, args[0])
        return type(module).forward(module, *args, **options) if result is None else result


def speed_up(*parts: nn.Module | None) -> list[Replaced]:
    """Replace the forward of every nn.Linear, RMSNorm and SwiGLU MLP inside the parts; None is no
    part.

    An nn.Linear is one of that very type; the others are told by a probe. What has a forward of its
    own instance keeps it.
    """
    found: list[Replaced] = []
    for part in filter(None, parts):
        modules = [module for module in part.modules() if "forward" not in vars(module)]
        for module in modules:
            op = _op_of(module)
            if op is not None:
                found.append(Faster(module, op))
    return found


def _op_of(module: nn.Module) -> Op | None:
    """What computes the module's forward by this project's ops, if anything does."""
    if type(module) is nn.Linear:
        return _linear
    if _is_rms_norm(module):
        return _rms_norm
    if _is_mlp(module):
        return _mlp
    return None


def _linear(module: Any, x: torch.Tensor) -> torch.Tensor | None:
    if type(module.weight) not in PLAIN:
        return None
    return linear(x, module.weight, module.bias)


def _rms_norm(module: Any, x: torch.Tensor) -> torch.Tensor | None:
    if type(module.weight) not in PLAIN:
        return None
    return rms_norm(x, module.weight, _eps(module))


def _mlp(module: Any, x: torch.Tensor) -> torch.Tensor | None:
    gate, up = module.gate_proj, module.up_proj
    if type(gate) is nn.Linear is type(up) and is_bare_product(gate) and is_bare_product(up):
        return module.down_proj(linear_swiglu(x, gate.weight, up.weight))
    return None


def _eps(module: nn.Module) -> Any:
    own = vars(module)
    return own.get("variance_epsilon", own.get("eps"))


def _computes(
    module: nn.Module,
    held: dict[str, Any],
    probe: torch.Tensor,
    wanted: Callable[[], torch.Tensor],
    rtol: float,
    atol: float,
) -> bool:
    """Whether the module, with `held` in place of what it holds under those names, makes of the
    probe what wanted() is.

    A twin answers: none of the module's hooks run, and its weights need not be loaded yet.
    """
    try:
        twin = copy.copy(module)
        vars(twin).update(held)
        theirs, ours = twin.forward(probe), wanted()
        if ours.dtype != theirs.dtype:
            return False
        return torch.allclose(ours.float(), theirs.float(), rtol=rtol, atol=atol)
    except Exception:  # whatever somebody else's forward wants or raises: it is something else
        return False


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    """Whether a module is made like an RMSNorm and, with other weights, computes what rms_norm does
    but for the rounding.
    """
    named = dict(module.named_parameters())
    weight = named.get("weight")
    if len(named) != 1 or type(weight) is not nn.Parameter:
        return False
    if weight.ndim != 1 or weight.is_meta or _eps(module) is None:
        return False
    # No global generator is drawn from.
    generator = torch.Generator().manual_seed(0)
    # Around 1, where a norm that takes off the mean shows; one row so small that eps counts.
    values = 1 + torch.randn(3, len(weight), generator=generator, device="cpu")
    sizes = torch.tensor([[1e-3], [8.0]], device="cpu")
    probe, other = (values[:2] * sizes).to(weight), values[2].to(weight)
    held = {"_parameters": {**module._parameters, "weight": other}}
    limits = torch.finfo(weight.dtype)
    # Two units in the last place: some round once, some before the weight as well.
    rtol = max(1e-5, 2 * limits.eps)
    return _computes(
        module, held, probe, lambda: rms_norm(probe, other, _eps(module)), rtol, limits.tiny
    )


@torch.no_grad()
def _is_mlp(module: nn.Module) -> bool:
    """Whether a module is made like a SwiGLU MLP and computes one, shown on small products in place
    of its own.
    """
    sizes = {"gate_proj": (8, 16), "up_proj": (8, 16), "down_proj": (16, 8)}
    if not all(type(module._modules.get(name)) is nn.Linear for name in sizes):
        return False
    generator = torch.Generator().manual_seed(0)
    small = {}
    for name, size in sizes.items():
        small[name] = nn.Linear(*size, bias=False, device="cpu", dtype=torch.float32)
        small[name].weight.normal_(generator=generator)
    gate, up, down = small.values()
    probe = torch.randn(3, 8, generator=generator, dtype=torch.float32, device="cpu")
    held = {"_modules": {**module._modules, **small}}
    return _computes(
        module, held, probe, lambda: down(functional.silu(gate(probe)) * up(probe)), 1e-5, 1e-5
    )
