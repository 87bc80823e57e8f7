"""LLaDA (arXiv 2502.09992): LLaDA-8B Base and Instruct, LLaDA-1.5. No shift; RoPE in fp32."""

from .family import Family, ModelingFile

_LAYER = "model.transformer.blocks.{i}."

FAMILY = Family(
    name="llada",
    fields={
        "hidden_size": "d_model",
        "num_layers": "n_layers",
        "num_heads": "n_heads",
        "num_kv_heads": ("n_kv_heads", "n_heads"),
        "intermediate_size": "mlp_hidden_size",
        "vocab_size": ("embedding_size", "vocab_size"),
        "max_positions": "max_sequence_length",
        "rope_theta": "rope_theta",
        "rms_norm_eps": "rms_norm_eps",
        "mask_id": "mask_token_id",
        "stop_ids": "eos_token_id",
        "tie_embeddings": "weight_tying",
    },
    fixed={"logit_shift": 0, "rope_in_fp32": True},
    refused={
        "block_type": ("llama", None),
        "layer_norm_type": ("rms", None),
        "bias_for_layer_norm": (False, None),
        "include_bias": (False, None),
        "rope": (True, None),
        "rope_full_precision": (True, None),
    },
    keys={
        "embedding.weight": ("model.transformer.wte.weight",),
        "layers.{i}.attention_norm.weight": (_LAYER + "attn_norm.weight",),
        "layers.{i}.attention.qkv.weight": tuple(f"{_LAYER}{x}_proj.weight" for x in "qkv"),
        "layers.{i}.attention.out.weight": (_LAYER + "attn_out.weight",),
        "layers.{i}.mlp_norm.weight": (_LAYER + "ff_norm.weight",),
        "layers.{i}.gate_up.weight": (_LAYER + "ff_proj.weight", _LAYER + "up_proj.weight"),
        "layers.{i}.down.weight": (_LAYER + "ff_out.weight",),
        "norm.weight": ("model.transformer.ln_f.weight",),
        "lm_head.weight": ("model.transformer.ff_out.weight",),
    },
    bias_keys={"layers.{i}.attention.qkv.bias": tuple(f"{_LAYER}{x}_proj.bias" for x in "qkv")},
    end_tokens=("<|eot_id|>",),
    architecture={"architectures": ["LLaDAModelLM"], "include_bias": False},
    qkv_bias="include_qkv_bias",
    filtered_score=False,
    tokenizer_type=None,
    # LLaDA's layers are Llama's, whose config is written as Qwen2's and therefore Dream's is.
    modeling={
        "llada": ModelingFile(
            config_family="llada",
            embedding="model.transformer.wte",
            layers="model.transformer.blocks",
            norm="model.transformer.ln_f",
            head="model.transformer.ff_out",
            attention_owner="",
            attention_method="attention",
            attention_out="attn_out",
            returns_past=True,
        ),
        "llama": ModelingFile(config_family="Dream", causal_by_default=True),
    },
)
