"""LLaDA's and Dream's architectures stated plainly: double precision, one row at a time, one head
at a time.

Nothing here is shared with the product: a checkpoint's own key names and its config.json go in,
logits come out. The decoder oracle also needs a model whose keys and values can be kept and reused,
so the one forward below takes a *store*: for every layer the keys and values of the whole canvas,
of which only the given positions are recomputed.
"""

import torch


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], dim=-1)


def rotate(x, positions, theta):
    """x [n, D] at canvas positions [n]: the half-split rotation, angle = position * theta ** (-2 i
    / D).
    """
    dim = x.shape[-1]
    frequencies = torch.tensor(
        [theta ** (-2.0 * i / dim) for i in range(dim // 2)], dtype=torch.float64
    )
    angles = positions.double()[:, None] * frequencies[None, :]
    angles = torch.cat([angles, angles], dim=-1)
    return x * angles.cos() + rotate_half(x) * angles.sin()


def linear(x, state, name):
    out = x @ state[name + ".weight"].double().T
    bias = state.get(name + ".bias")
    return out if bias is None else out + bias.double()


LLADA_NAMES = {
    "embedding": "model.transformer.wte.weight",
    "layer": "model.transformer.blocks.{}.",
    "attention_norm": "attn_norm.weight",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "attn_out",
    "mlp_norm": "ff_norm.weight",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
    "norm": "model.transformer.ln_f.weight",
    "head": "model.transformer.ff_out.weight",
}
DREAM_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "layer": "model.layers.{}.",
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}


def llada_shape(config):
    """The numbers of a config.json of LLaDA, under one set of words."""
    return {
        "names": LLADA_NAMES,
        "width": config["d_model"],
        "layers": config["n_layers"],
        "heads": config["n_heads"],
        "kv_heads": config["n_kv_heads"],
        "mlp": config["mlp_hidden_size"],
        "vocab": config["embedding_size"],
        "theta": config["rope_theta"],
        "eps": config["rms_norm_eps"],
        "tied": config.get("weight_tying", False),
        "bias": config.get("include_qkv_bias", False),
    }


def dream_shape(config):
    """The numbers of a config.json of Dream, under one set of words."""
    return {
        "names": DREAM_NAMES,
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "mlp": config["intermediate_size"],
        "vocab": config["vocab_size"],
        "theta": config["rope_theta"],
        "eps": config["rms_norm_eps"],
        "tied": config.get("tie_word_embeddings", False),
        "bias": True,
    }


def shape_of(config):
    return llada_shape(config) if config["model_type"] == "llada" else dream_shape(config)


def attention(q, keys, values, heads, kv_heads):
    """q [n, heads * D]; keys, values [kv_heads, L, D]: every query sees every key. One head after
    the other.
    """
    outputs = []
    dim = keys.shape[-1]
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        scores = q[:, head] @ keys[kv_head].T / dim**0.5
        outputs.append(torch.softmax(scores, dim=-1) @ values[kv_head])
    return torch.cat(outputs, dim=-1)


def forward_row(state, config, tokens, positions=None, store=None):
    """Raw outputs [n, V] fp32 of the tokens [n] that sit at positions [n] of a canvas.

    store, when given, holds per layer (keys, values) [kv_heads, L, D] of the whole canvas; the
    given positions' own keys and values are computed fresh and stand in for the stored ones.
    Returns (outputs, new store); the old store is left as it was.
    """
    shape = shape_of(config)
    names = shape["names"]
    heads, kv_heads = shape["heads"], shape["kv_heads"]
    dim = shape["width"] // heads
    count = len(tokens)
    positions = torch.arange(count) if positions is None else torch.as_tensor(positions)
    x = state[names["embedding"]].double()[tokens]
    new_store = []
    for layer in range(shape["layers"]):
        prefix = names["layer"].format(layer)
        normed = rms_norm(x, state[prefix + names["attention_norm"]].double(), shape["eps"])
        q = linear(normed, state, prefix + names["q"]).view(count, heads, dim)
        k = linear(normed, state, prefix + names["k"]).view(count, kv_heads, dim)
        v = linear(normed, state, prefix + names["v"]).view(count, kv_heads, dim)
        q = torch.stack([rotate(q[:, h], positions, shape["theta"]) for h in range(heads)], dim=1)
        k = torch.stack(
            [rotate(k[:, h], positions, shape["theta"]) for h in range(kv_heads)], dim=0
        )
        v = v.transpose(0, 1)
        if store is None:
            keys, values = k, v
        else:
            keys, values = store[layer][0].clone(), store[layer][1].clone()
            keys[:, positions], values[:, positions] = k, v
        new_store.append((keys, values))
        x = x + linear(attention(q, keys, values, heads, kv_heads), state, prefix + names["o"])
        normed = rms_norm(x, state[prefix + names["mlp_norm"]].double(), shape["eps"])
        gate = linear(normed, state, prefix + names["gate"])
        up = linear(normed, state, prefix + names["up"])
        x = x + linear(gate * torch.sigmoid(gate) * up, state, prefix + names["down"])
    x = rms_norm(x, state[names["norm"]].double(), shape["eps"])
    head = state[names["embedding"]] if shape["tied"] else state[names["head"]]
    return (x @ head.double().T).float(), new_store


def llada_logits(state, config, tokens):
    """tokens [B, L] -> [B, L, V]: output i predicts position i."""
    return torch.stack([forward_row(state, config, row)[0] for row in tokens])


def dream_logits(state, config, tokens):
    """tokens [B, L] -> [B, L, V], shifted: row i is output i - 1; row 0 is output 0."""
    rows = []
    for row in tokens:
        outputs = forward_row(state, config, row)[0]
        rows.append(torch.cat([outputs[:1], outputs[:-1]]))
    return torch.stack(rows)


def logits(state, config, tokens):
    return (llada_logits if config["model_type"] == "llada" else dream_logits)(
        state, config, tokens
    )


# What the published config.json files carry, with the numbers of the 8B and 7B checkpoints.

LLADA_8B = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_dropout": 0.0,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}

DREAM_7B = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_dream.DreamConfig",
        "AutoModel": "modeling_dream.DreamModel",
    },
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "mask_token_id": 151666,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def key_shapes(config):
    """Every key of a published checkpoint of this config -> its shape, written out from the table
    of names.
    """
    shape = shape_of(config)
    names = shape["names"]
    width, mlp = shape["width"], shape["mlp"]
    kv_width = width // shape["heads"] * shape["kv_heads"]
    shapes = {names["embedding"]: (shape["vocab"], width), names["norm"]: (width,)}
    if not shape["tied"]:
        shapes[names["head"]] = (shape["vocab"], width)
    for layer in range(shape["layers"]):
        prefix = names["layer"].format(layer)
        shapes[prefix + names["attention_norm"]] = (width,)
        shapes[prefix + names["mlp_norm"]] = (width,)
        for part, rows in (("q", width), ("k", kv_width), ("v", kv_width)):
            shapes[prefix + names[part] + ".weight"] = (rows, width)
            if shape["bias"]:
                shapes[prefix + names[part] + ".bias"] = (rows,)
        shapes[prefix + names["o"] + ".weight"] = (width, width)
        shapes[prefix + names["gate"] + ".weight"] = (mlp, width)
        shapes[prefix + names["up"] + ".weight"] = (mlp, width)
        shapes[prefix + names["down"] + ".weight"] = (width, mlp)
    return shapes


def random_state(config, seed, scale=0.25):
    """A random state dict of published names; norm weights are spread around 1 so that a dropped
    one shows.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in key_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1 and not name.endswith(".bias")
        state[name] = (
            1.0 + 0.3 * values if is_norm else values * (1.0 if name.endswith(".bias") else scale)
        )
    return state
