"""Whether attn_implementation="fastdllm" attends as well as sdpa: small Llama, Qwen2 and Qwen3
models in bf16, batches padded on either side, their largest errors against fp32.
"""

from __future__ import annotations

import copy

import torch
import transformers

from fastdllm.integrations.transformers import NAME, register

# 64 is the smallest head size that the kernel takes; at this spread of weights attention is not
# uniform.
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
}
CLASSES = {"Llama": {}, "Qwen2": {}, "Qwen3": {"head_dim": 64}}  # and what else a config needs
WIDTH = 160
# Of every row, the tokens [first, last) that are no padding.
SPANS = {
    "none": ((0, 160), (0, 160), (0, 160), (0, 160)),
    "right": ((0, 157), (0, 129), (0, 33), (0, 1)),
    "left": ((3, 160), (31, 160), (127, 160), (159, 160)),
}


@torch.no_grad()
def interface_checks(device) -> list[dict]:
    """For each small model and padding the errors of fastdllm's and sdpa's attention; passed: ours
    is at most twice sdpa's.
    """
    register()
    results = []
    for name in CLASSES:
        model = small_model(name, device)
        exact = copy.deepcopy(model).float()  # of the rounded weights
        for padding, spans in SPANS.items():
            mask = padding_mask(spans, device)
            shape, generator = mask.shape, torch.Generator().manual_seed(1)
            ids = torch.randint(SMALL["vocab_size"], shape, generator=generator).to(device)
            whole = mask[:, None, None].expand(-1, 1, WIDTH, -1)
            wanted = exact(ids, attention_mask=whole).last_hidden_state[mask]
            sdpa = model(ids, attention_mask=whole).last_hidden_state[mask]
            model.set_attn_implementation(NAME)
            ours = model(ids, attention_mask=mask, is_causal=False).last_hidden_state[mask]
            model.set_attn_implementation("sdpa")
            error, sdpa_error = largest_error(ours, wanted), largest_error(sdpa, wanted)
            results.append(
                {
                    "model": name,
                    "padding": padding,
                    "error": error,
                    "sdpa_error": sdpa_error,
                    "passed": error <= 2 * sdpa_error,
                }
            )
    return results


def small_model(name, device):
    """transformers' bare model of that name in bf16, with sdpa and random weights."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **CLASSES[name])
    build = getattr(transformers, f"{name}Model")._from_config
    model = build(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    return model.to(device).eval()


def padding_mask(spans, device):
    """bool [rows, WIDTH]: what is no padding."""
    position = torch.arange(WIDTH, device=device)
    return torch.stack([(first <= position) & (position < last) for first, last in spans])


def largest_error(output, wanted) -> float:
    return float((output.float() - wanted).abs().max())
