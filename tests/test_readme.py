"""The README's Python snippets run as they stand, in a world that has what they name."""

import re

import pytest
import torch
from test_floors import ROOT

import fastdllm

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def world():
    """What the snippets use without making it: a model, prompts, and an engine's tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=2,
    )
    q, k, v = torch.randn(3, 1, 8, 2, 16).unbind()
    cache = torch.randn(2, 1, 32, 2, 16)
    at = torch.outer(torch.arange(64.0), torch.ones(8))
    return {
        "fastdllm": fastdllm,
        "model": LlamaForCausalLM(config).eval().requires_grad_(False),
        "mask_id": 63,
        "prompts": [[5, 6, 7], [8, 9]],
        "ids": torch.tensor([[5, 6, 7]]),
        "padding": torch.tensor([[0, 1, 1]]),
        "q": q,
        "k": k,
        "v": v,
        "k_cache": cache[0],
        "v_cache": cache[1],
        "cos": at.cos(),
        "sin": at.sin(),
        "block_start": torch.tensor([8], dtype=torch.int32),
        "kv_len": torch.tensor([32], dtype=torch.int32),
        "logits": torch.randn(1, 8, 64),
        "tokens": torch.full((1, 8), 63),
    }


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[snippet.split("\n")[0] for snippet in SNIPPETS])
def test_a_snippet_runs(snippet):
    names = world()
    exec(
        snippet.replace("/path/to/checkpoint", str(ROOT / "fastdllm" / "assets" / "tiny-llada")),
        names,
    )
    if "done" in names:
        assert all(len(tokens) > 60 for tokens in names["done"].tokens)
    if "selection" in names:
        assert names["selection"].committed.any() and names["out"].shape == names["q"].shape


def test_there_is_a_snippet_for_each_use():
    assert len(SNIPPETS) == 4


def test_every_file_that_is_linked_is_there():
    linked = re.findall(r"\]\(((?!https?:)[^)#]+)\)", TEXT)
    assert linked and all((ROOT / path).exists() for path in linked)
