"""What decoding allocates: the logits of the block's rows alone, and at the peak one forward beside
weights and cache.
"""

import pytest
import tiny
import torch
from test_decode import random_prompts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastdllm
from fastdllm import Quota, graph

WIDE = {
    **tiny.LLADA,
    "d_model": 256,
    "mlp_hidden_size": 512,
    "embedding_size": 65536,
    "vocab_size": 65536,
    "max_sequence_length": 2048,
}
WORKSPACE = 80 * 2**20  # cuBLAS's, 32 MiB for each of two streams, and what is small


class RowsOfLogits(TorchDispatchMode):
    """The most rows of a vocabulary that any operation returned; views of a weight do not count."""

    def __init__(self, model):
        super().__init__()
        self.width, self.most = model.config.vocab_size, 0
        self.weights = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == self.width:
                if tensor.data_ptr() not in self.weights:
                    self.most = max(self.most, tensor.numel() // self.width)
        return result


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_canvas_has_no_logits(tmp_path, family, cache):
    """A block of 8 in each of 2 rows, on canvases of 24 and 28 positions."""
    model, _ = tiny.build(tmp_path, tiny.FAMILIES[family], device="cpu", dtype=torch.float32)
    prompts = random_prompts(tiny.FAMILIES[family], (8, 12), 0)
    with RowsOfLogits(model) as seen:
        fastdllm.generate(
            model, prompts, gen_length=16, block_length=8, cache=cache, rule=Quota(2), stop_ids=()
        )
    assert seen.most == 2 * 8


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [None, "fp8"])
def test_the_peak_is_one_forward_beside_weights_and_cache(tmp_path, weights):
    """Two canvases of 1,024 positions: their logits would be 256 MiB, more than all that may be
    left over.
    """
    model, _ = tiny.build(tmp_path, WIDE, device="cuda", dtype=torch.bfloat16, weights=weights)
    rows, block, canvas, size, hidden, inner = 2, 32, 1024, 2, 256, 512
    prompts = random_prompts(WIDE, (canvas - 256,) * rows, 0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()  # the weights are in it
    fastdllm.generate(
        model, prompts, gen_length=256, block_length=block, rule=Quota(8), stop_ids=(), graph=True
    )
    assert graph._workspaces[model].steps, "nothing was captured"
    cache = model.config.num_layers * 2 * rows * canvas * hidden * size
    logits = rows * block * WIDE["vocab_size"] * size
    # Of a refresh: the residual and its norm in and out, q, k and v as they are and rotated, the
    # products of an MLP.
    activations = rows * canvas * (4 * hidden + 2 * 3 * hidden + 3 * inner) * size
    used = torch.cuda.max_memory_allocated() - before
    graph.clear(model)
    assert used <= cache + logits + activations + WORKSPACE, f"{used / 2**20:.0f} MiB"
