"""Small random checkpoints and models that the tests share."""

import json

import oracle_models
import torch
from safetensors.torch import save_file

LLADA = {
    **oracle_models.LLADA_8B,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 4,
    "mlp_hidden_size": 48,
    "embedding_size": 40,
    "vocab_size": 40,
    "max_sequence_length": 96,
    "mask_token_id": 37,
    "eos_token_id": 38,
    "pad_token_id": 38,
}
DREAM = {
    **oracle_models.DREAM_7B,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 56,
    "vocab_size": 43,
    "max_position_embeddings": 96,
    "mask_token_id": 41,
    "eos_token_id": 42,
    "bos_token_id": 42,
    "pad_token_id": 42,
}
FAMILIES = {"llada": LLADA, "dream": DREAM}


def write(folder, config, state, shards=1):
    """A checkpoint folder as published: config.json and one safetensors file, or an index and
    several.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    names = list(state)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: state[name] for name in names[shard::shards]}
        save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def build(folder, config, seed=0, **load_options):
    """(model, state): a random checkpoint written to the folder and loaded with fastdllm.load, on
    the CPU in fp32.
    """
    import fastdllm

    state = oracle_models.random_state(config, seed)
    options = {"device": "cpu", "dtype": torch.float32, **load_options}
    return fastdllm.load(str(write(folder, config, state)), **options), state
