"""Dream (arXiv 2508.15487): Dream-7B Base and Instruct, Dream-Coder, DiffuCoder. Output i - 1
predicts position i.
"""

from .family import Family, ModelingFile

_LAYER = "model.layers.{i}."

FAMILY = Family(
    name="Dream",
    fields={
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "intermediate_size": "intermediate_size",
        "vocab_size": "vocab_size",
        "max_positions": "max_position_embeddings",
        "rope_theta": "rope_theta",
        "rms_norm_eps": "rms_norm_eps",
        "mask_id": "mask_token_id",
        "stop_ids": "eos_token_id",
        "tie_embeddings": "tie_word_embeddings",
    },
    fixed={"logit_shift": 1, "rope_in_fp32": False},
    refused={},
    keys={
        "embedding.weight": ("model.embed_tokens.weight",),
        "layers.{i}.attention_norm.weight": (_LAYER + "input_layernorm.weight",),
        "layers.{i}.attention.qkv.weight": tuple(
            f"{_LAYER}self_attn.{x}_proj.weight" for x in "qkv"
        ),
        "layers.{i}.attention.out.weight": (_LAYER + "self_attn.o_proj.weight",),
        "layers.{i}.mlp_norm.weight": (_LAYER + "post_attention_layernorm.weight",),
        "layers.{i}.gate_up.weight": (
            _LAYER + "mlp.gate_proj.weight",
            _LAYER + "mlp.up_proj.weight",
        ),
        "layers.{i}.down.weight": (_LAYER + "mlp.down_proj.weight",),
        "norm.weight": ("model.norm.weight",),
        "lm_head.weight": ("lm_head.weight",),
    },
    bias_keys={
        "layers.{i}.attention.qkv.bias": tuple(f"{_LAYER}self_attn.{x}_proj.bias" for x in "qkv")
    },
    end_tokens=("<|im_end|>",),
    architecture={"architectures": ["DreamModel"], "hidden_act": "silu"},
    qkv_bias=True,
    filtered_score=True,
    # Dream publishes Qwen2's tokenizer as Python code, which is not run; the files beside it are
    # Qwen2's.
    tokenizer_type="qwen2",
    # Dream's layers are Qwen2's.
    modeling={
        "Dream": ModelingFile(config_family="Dream", attention_outputs=3),
        "qwen2": ModelingFile(config_family="Dream", causal_by_default=True),
    },
)
