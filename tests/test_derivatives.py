"""Derivatives through the ops are the references', however they are asked for. No kernel has one,
and a compiler or a transform of torch.func that sees an op as one node would give zeros or nothing.
"""

import pytest
import torch
from torch.autograd import forward_ad

import fastdllm_kernels as fk
from fastdllm_kernels import Threshold, backend


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Every case is the first that torch.compile meets."""
    torch.compiler.reset()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


START, END = ints(2), ints(8)
TABLES = normal(8, 4, seed=1), normal(8, 4, seed=2)
QUERIES = normal(1, 2, 2, 8, seed=8)
CACHES = normal(1, 8, 1, 8, seed=3), normal(1, 8, 1, 8, seed=4)
WEIGHT, NORM, RESIDUAL = normal(8, 4, seed=5), normal(8, seed=6), normal(3, 8, seed=7)


def on(x, *others):
    return [other.to(x.device) for other in others]


def attend(op, q):
    k, v = q[:, :, :1], q[:, :, 1:]
    start, end, cos, sin, *caches = on(q, START, END, *TABLES, *CACHES)
    out, lse = op(q, k, v, *caches, start, end, cos=cos, sin=sin, return_lse=True)
    return out.sum(-1) + lse


def rotate_by(op, cos):
    """A gradient of the rotation's table alone."""
    q, start, sin = on(cos, QUERIES, START, TABLES[1])
    return op(q, q, q, cos, sin, start)[0]


def rotate(op, q):
    start, cos, sin = on(q, START, *TABLES)
    return op(q, q[:, :, :1], q[:, :, :1], cos, sin, start)[0]


def select(op, logits):
    tokens = torch.full(logits.shape[:2], 6, device=logits.device)
    return op(logits, tokens, mask_id=6, rule=Threshold(0.5)).score


def confidence(op, logits):
    found = op(logits, mask_id=6, return_logsumexp=True, return_entropy=True, return_margin=True)
    return torch.stack([found.score, *found[2:]])


def drawn(op, logits):
    return op(logits, temperature=2.0, seed=3, position=torch.arange(3, device=logits.device)).score


def partials(op, logits):
    found = op(logits, vocab_start=2, mask_id=4)
    return torch.stack([found.maximum, found.total, found.weighted, found.logit])


def norm(op, x):
    return torch.stack(op(x, *on(x, NORM), 1e-5, x + 1))


def product(op, x):
    return op(x, *on(x, WEIGHT))


def product_norm(op, x):
    weight, residual, norm = on(x, WEIGHT, RESIDUAL, NORM)
    return torch.stack(op(x, weight, residual, norm, 1e-5))


# The name of an op, a function of it and of one operand, and that operand.
CALLS = [
    ("block_attention", attend, normal(1, 2, 2, 8)),
    ("confidence_select", select, normal(1, 3, 7)),
    ("token_confidence", confidence, normal(3, 7)),
    ("token_confidence", drawn, normal(3, 7)),
    ("token_confidence_partials", partials, normal(3, 7)),
    ("rms_norm", norm, normal(3, 8)),
    ("swiglu", lambda op, x: op(x), normal(3, 8)),
    ("rope_to_cache", rotate, normal(1, 2, 2, 8)),
    ("rope_to_cache", rotate_by, normal(8, 4)),
    ("linear", product, normal(3, 4)),
    ("linear_swiglu", product, normal(3, 4)),
    ("linear_rms_norm", product_norm, normal(3, 4)),
]
every_call = pytest.mark.parametrize(
    "name, call, x", CALLS, ids=[f"{name}-{call.__name__}" for name, call, _ in CALLS]
)


def loss_of(op, call):
    """A function whose derivative no two outputs cancel in."""

    def loss(x):
        y = call(op, x)
        return (y * torch.arange(1.0, y.numel() + 1, device=y.device).view_as(y)).sum()

    return loss


def both(name, call):
    """The loss by the op, and by its reference."""
    return loss_of(getattr(fk, name), call), loss_of(getattr(fk, f"{name}_reference"), call)


def gradient(loss, x):
    x = x.clone().requires_grad_()
    y = loss(x)
    assert y.requires_grad
    y.backward()
    return x.grad


@every_call
def test_backward(name, call, x, device):
    x = x.to(device)
    op, reference = both(name, call)
    wanted = gradient(reference, x)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(gradient(op, x), wanted)


def test_gradients_beside_a_logit_of_minus_infinity(device):
    """Those of the other logits alone, by PyTorch's own softmax."""
    logits = normal(3, 7).to(device)
    without = logits[:, :6].clone().requires_grad_()
    logits[:, 6] = -torch.inf
    logits.requires_grad_()
    names = ("return_logsumexp", "return_entropy", "return_margin")
    found = fk.token_confidence(logits, **dict.fromkeys(names, True))
    p = without.softmax(-1)
    top = p.topk(2).values
    wanted = (top[:, 0], without.logsumexp(-1), (p * p.log()).sum(-1), top[:, 0] - top[:, 1])
    for value, other in zip(found[1:], wanted, strict=True):
        (got,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
        (other,) = torch.autograd.grad(other.sum(), without, retain_graph=True)
        torch.testing.assert_close(got, torch.cat([other, 0 * other[:, :1]], dim=1))


@every_call
def test_backward_under_torch_compile(name, call, x, device):
    x = x.to(device)
    op, reference = both(name, call)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(compiled, x), gradient(reference, x))


@every_call
def test_transforms_of_torch_func(name, call, x, device):
    x, tangent = x.to(device), normal(*x.shape, seed=9).to(device)
    op, reference = both(name, call)
    wanted = gradient(reference, x)
    torch.testing.assert_close(torch.func.grad(op)(x), wanted)
    (pushed,) = torch.func.jvp(op, (x,), (tangent,))[1:]
    torch.testing.assert_close(pushed, (wanted * tangent).sum())
    with forward_ad.dual_level():
        dual = op(forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, (wanted * tangent).sum())


@pytest.mark.parametrize("name, call, x", CALLS[:1] + CALLS[2:5])
def test_a_transform_inside_torch_compile(name, call, x, device):
    op, reference = both(name, call)
    compiled = torch.compile(torch.func.grad(op), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.to(device)), gradient(reference, x.to(device)))


@every_call
def test_rows_under_vmap(name, call, x, device):
    two = torch.stack([x, x.flip(0)]).to(device)
    op, reference = both(name, call)
    rows = torch.func.vmap(lambda x: call(getattr(fk, name), x))
    if name == "confidence_select":
        # Only one of its tensors would be a batch's: torch refuses to write the other.
        with pytest.raises(RuntimeError, match="vmap"):
            rows(two)
        return
    wanted = torch.stack([call(getattr(fk, f"{name}_reference"), x) for x in two])
    torch.testing.assert_close(rows(two), wanted)
    gradients = torch.stack([gradient(reference, x) for x in two])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(op))(two), gradients)
    summed = torch.func.grad(lambda two: torch.func.vmap(op)(two).sum())(two)
    torch.testing.assert_close(summed, gradients)


@pytest.mark.parametrize("name, call, x", CALLS[:5])
def test_a_forced_kernel_refuses(name, call, x, device, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "triton")
    x = x.to(device)
    op, _ = both(name, call)
    with pytest.raises(RuntimeError, match=f"{name}.*requires a gradient"):
        op(x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=f"{name}.*torch.func"):
        torch.func.grad(op)(x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"{name}.*tangent"):
        op(forward_ad.make_dual(x, x))


def test_without_a_derivative_the_compiler_sees_one_node(device):
    """An input may require a gradient where none is recorded."""
    seen = []

    def inspect(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(fk.token_confidence, fullgraph=True, backend=inspect)
    with torch.no_grad():
        compiled(normal(3, 7).to(device).requires_grad_())
    assert "fastdllm.token_confidence.default" in seen or "fastdllm.token_confidence" in seen, seen
