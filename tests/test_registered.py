"""The ops that the package registers with torch: their schemas, their shapes for fake tensors, and
what torch.compile and torch.export make of a call.
"""

import warnings

import pytest
import torch

import fastdllm_kernels as fk
from fastdllm_kernels import select
from fastdllm_kernels.attention import Operands
from fastdllm_kernels.rules import flatten

B, T, H, HK, D, V, MASK, PAGE = 2, 4, 4, 2, 64, 20, 19, 4
RULES = [fk.Threshold(0.3), fk.Quota(2, "dream"), fk.Neighbours(0.6, torch.tensor([0.2, 0.3]))]


def normal(device, *shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def block(device):
    """The arguments of block_attention that must be there: two rows over 16 slots."""
    fresh = [normal(device, B, T, heads, D, seed=heads) for heads in (H, HK, HK)]
    caches = normal(device, 2, B, 16, HK, D, seed=9).unbind()
    spans = torch.tensor([[4, 6], [12, 10]], dtype=torch.int32, device=device).unbind()
    return *fresh, *caches, *spans


def plain_operands(device):
    x = block(device)
    return Operands(*x, scale=0.125, out=torch.empty_like(x[0]))


def all_operands(device):
    """With pages, rotation, spans of every kind and a log-sum-exp."""
    q, k, v, k_cache, v_cache, block_start, kv_len = block(device)
    pages = [cache.reshape(-1, PAGE, HK, D) for cache in (k_cache, v_cache)]
    table = torch.randperm(8, generator=torch.Generator().manual_seed(0)).view(B, 4)
    angles = normal(device, 16, D // 2)
    return Operands(
        q,
        k,
        v,
        *pages,
        block_start,
        kv_len,
        kv_start=torch.tensor([1, 0], dtype=torch.int32, device=device),
        page_table=table.to(device=device, dtype=torch.int32),
        block_len=torch.tensor([4, 3], dtype=torch.int32, device=device),
        cos=angles.cos(),
        sin=angles.sin(),
        scale=0.125,
        out=torch.empty_like(q),
        lse=torch.empty(B, T, H, device=device),
    )


def scoring(logits, score="confidence"):
    return select.Scoring(logits, MASK, V, score, 0.0, None, 1.0, None, 0, None, False, 0, None)


def drawing(logits):
    """Proposals that are drawn and filtered, by numbers of each row."""
    rows = logits.shape[:1]
    return scoring(logits)._replace(
        temperatures=torch.full(rows, 0.7, device=logits.device),
        top_ps=torch.full(rows, 0.9, device=logits.device),
        top_ks=torch.full(rows, 5, dtype=torch.int32, device=logits.device),
        filtered_score=True,
        seed=torch.arange(len(logits), device=logits.device),
    )


def selecting(ask, rule):
    def arguments(device):
        tokens = torch.full((B, 2), MASK, device=device)
        commit = select.Commit(
            tokens, None, None, *flatten(rule, tokens.device), *select._empty_selection(tokens)
        )
        return *ask(normal(device, B, 2, V)), *commit

    return arguments


def confident(ask, **rows):
    rows = {"position": None, "vocab_start": 0, "entropy": False, "margin": False, **rows}
    return lambda device: (*ask(normal(device, 2, V)), *select.Rows(**rows))


ARGUMENTS = [
    ("block_attention", plain_operands),
    ("block_attention", all_operands),
    *(("confidence_select", selecting(scoring, rule)) for rule in RULES),
    ("confidence_select", selecting(drawing, RULES[0])),
    ("token_confidence", confident(scoring)),
    ("token_confidence", confident(drawing, entropy=True, margin=True)),
    ("token_confidence", confident(lambda z: scoring(z, None), vocab_start=4)),  # the partials
]
every_op = pytest.mark.parametrize("name, arguments", ARGUMENTS)


def test_there_are_arguments_for_every_op_that_is_registered():
    registered = torch._C._dispatch_get_all_op_names()
    ours = {name.split("::")[1] for name in registered if name.startswith("fastdllm::")}
    assert ours == {name for name, _ in ARGUMENTS}


@every_op
def test_opcheck(either_backend, name, arguments, device):
    op = getattr(torch.ops.fastdllm, name).default
    found = torch.library.opcheck(op, arguments(device))
    assert len(found) == 4 and set(found.values()) == {"SUCCESS"}


class Attention(torch.nn.Module):
    def forward(self, *operands):
        return fk.block_attention(*operands, return_lse=True)


class Select(torch.nn.Module):
    """By a rule with numbers of its own and of each row, tokens written in place."""

    def forward(self, logits, tokens, tau):
        rule = fk.Neighbours(0.6, tau)
        return fk.confidence_select(logits, tokens, mask_id=MASK, rule=rule), tokens


def best_alone(scores, candidates, step):
    """A rule without a branch in the kernel."""
    best = scores.masked_fill(~candidates, -torch.inf).amax(1, keepdim=True)
    return candidates & (scores == best)


class OwnRule(torch.nn.Module):
    def forward(self, logits, tokens, faults):
        options = {"mask_id": MASK, "rule": best_alone, "faults": faults}
        return fk.confidence_select(logits, tokens, **options), tokens, faults


class Confidence(torch.nn.Module):
    def forward(self, logits):
        return fk.token_confidence(logits, mask_id=MASK, return_entropy=True)


class Parts(torch.nn.Module):
    def forward(self, logits):
        return fk.token_confidence_partials(logits, vocab_start=4, mask_id=MASK)


def inputs(module, device):
    logits = normal(device, B, T, V)
    tokens = torch.full((B, T), MASK, device=device)
    return {
        Attention: block(device),
        Select: (logits, tokens, torch.tensor([0.2, 0.3], device=device)),
        OwnRule: (logits, tokens, torch.ones(B, dtype=torch.int32, device=device)),
        Confidence: (logits[0],),
        Parts: (logits[0],),
    }[type(module)]


CALLS = [
    (Attention(), "block_attention"),
    (Select(), "confidence_select"),
    (OwnRule(), "token_confidence"),
    (Confidence(), "token_confidence"),
    (Parts(), "token_confidence"),
]
every_call = pytest.mark.parametrize("module, op", CALLS)


# What exported graphs hold beside ops of ours: outputs being made, taken apart, a rule's dtype.
AROUND = ("aten.empty", "aten.new_empty", "aten.select", "aten.unbind", "getitem", "aten.to")
AROUND += ("aten._assert_tensor_metadata",)


@every_call
def test_torch_compile_sees_one_node(module, op, device):
    seen = []

    def inspect(graph, _):
        seen.append(graph.graph)
        return graph

    compiled = torch.compile(module, fullgraph=True, backend=inspect)
    torch.testing.assert_close(
        compiled(*inputs(module, device)), module(*inputs(module, device)), rtol=0, atol=0
    )
    (graph,) = seen
    found = [node for node in graph.nodes if "fastdllm" in str(node.target)]
    assert [str(node.target).split(".")[1] for node in found] == [op]


@every_call
def test_aot_keeps_what_is_written_in_place(module, op, device):
    """Through functionalization, as inductor takes it: results and tokens are those of the call."""
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(*inputs(module, device)), module(*inputs(module, device)), rtol=0, atol=0
    )


@every_call
def test_torch_export_sees_one_node(module, op, device):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own about its trees
        program = torch.export.export(module, inputs(module, device))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [target for target in targets if "fastdllm" in target] == [f"fastdllm.{op}.default"]
    if not isinstance(module, OwnRule):  # whose commit stands there in PyTorch
        assert all(any(name in target for name in (op, *AROUND)) for target in targets)
    torch.testing.assert_close(
        program.module()(*inputs(module, device)), module(*inputs(module, device)), rtol=0, atol=0
    )
