"""checkpoint.py: folders that load, byte for byte, and folders that must not."""

import json
import os
import pickle
import subprocess
import sys

import oracle_models
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import fastdllm
import fastdllm.checkpoint


def logits_of(folder, **options):
    model = fastdllm.load(folder, device="cpu", **options)
    return model.logits(torch.tensor([[1, 2, 3, 4]]))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("shards", [2, 5])
def test_shards_load_as_one_file_does(tmp_path, family, shards):
    config = tiny.FAMILIES[family]
    state = oracle_models.random_state(config, 0)
    single = tiny.write(tmp_path / "single", config, state)
    sharded = tiny.write(tmp_path / "sharded", config, state, shards)
    assert not (sharded / "model.safetensors").exists()
    assert torch.equal(logits_of(single), logits_of(sharded))


def test_a_path_may_be_a_string_or_a_path_and_the_model_is_ready_for_inference(tmp_path):
    tiny.build(tmp_path, tiny.LLADA)
    assert torch.equal(logits_of(tmp_path), logits_of(str(tmp_path)))
    model = fastdllm.load(tmp_path, device="cpu")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path, stored, wanted):
    state = {
        name: tensor.to(stored)
        for name, tensor in oracle_models.random_state(tiny.DREAM, 0).items()
    }
    model = fastdllm.load(tiny.write(tmp_path, tiny.DREAM, state), device="cpu", dtype=wanted)
    assert model.dtype == (wanted or stored)
    assert {parameter.dtype for parameter in model.parameters()} == {wanted or stored}
    weight = model.embedding.weight
    assert torch.equal(weight, state["model.embed_tokens.weight"].to(weight.dtype))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_writes_back_every_byte_under_the_published_names(tmp_path, family, dtype):
    config = tiny.FAMILIES[family]
    state = {
        name: tensor.to(dtype) for name, tensor in oracle_models.random_state(config, 4).items()
    }
    model = fastdllm.load(tiny.write(tmp_path / "a", config, state), device="cpu")
    fastdllm.checkpoint.save(model, tmp_path / "b")
    saved = load_file(tmp_path / "b" / "model.safetensors")
    assert saved.keys() == state.keys() == oracle_models.key_shapes(config).keys()
    for name, tensor in state.items():
        assert saved[name].dtype == dtype
        assert torch.equal(saved[name].view(torch.uint8), tensor.view(torch.uint8)), name
    again = fastdllm.load(tmp_path / "b", device="cpu")
    assert again.config == model.config
    assert torch.equal(logits_of(tmp_path / "a"), logits_of(tmp_path / "b"))
    fastdllm.checkpoint.save(again, tmp_path / "c")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "c" / file).read_bytes()


@pytest.mark.parametrize(
    "tied", [{**tiny.LLADA, "weight_tying": True}, {**tiny.DREAM, "tie_word_embeddings": True}]
)
def test_a_tied_head_is_one_weight_on_both_sides_of_saving(tmp_path, tied):
    model, state = tiny.build(tmp_path / "a", tied)
    assert model.lm_head.weight.data_ptr() == model.embedding.weight.data_ptr()
    fastdllm.checkpoint.save(model, tmp_path / "b")
    assert load_file(tmp_path / "b" / "model.safetensors").keys() == state.keys()
    assert torch.equal(logits_of(tmp_path / "a"), logits_of(tmp_path / "b"))


def test_biases_survive_saving(tmp_path):
    config = {**tiny.LLADA, "include_qkv_bias": True}
    model, state = tiny.build(tmp_path / "a", config)
    fastdllm.checkpoint.save(model, tmp_path / "b")
    assert load_file(tmp_path / "b" / "model.safetensors").keys() == state.keys()
    assert torch.equal(logits_of(tmp_path / "a"), logits_of(tmp_path / "b"))


def test_several_stop_ids(tmp_path):
    config = {**tiny.LLADA, "eos_token_id": [38, 36]}
    model, _ = tiny.build(tmp_path / "a", config)
    assert model.config.stop_ids == (38, 36)
    fastdllm.checkpoint.save(model, tmp_path / "b")
    assert fastdllm.load(tmp_path / "b", device="cpu").config.stop_ids == (38, 36)


def test_a_hub_id_is_downloaded_without_pickles(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    tiny.build(tmp_path, tiny.LLADA)
    asked = []

    def download(repo_id, **options):
        asked.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert torch.equal(logits_of("owner/name"), logits_of(tmp_path))
    ((repo_id, options),) = asked
    assert repo_id == "owner/name"
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in options["allow_patterns"])


@pytest.mark.parametrize("family, text", [("llada", "<|eot_id|>"), ("dream", "<|im_end|>")])
def test_the_end_of_a_turn_stops_a_text_too(tmp_path, family, text):
    config = tiny.FAMILIES[family]
    tiny.build(tmp_path, config)
    added = {"36": {"content": text}, "12": {"content": "<|other|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    assert fastdllm.load(tmp_path, device="cpu").config.stop_ids == (config["eos_token_id"], 36)


# Peak memory. A process reads the kernel's high-water mark of its resident pages (VmHWM, reset just
# before loading through clear_refs). That number counts the pages of the mapped shards too,
# although they are not memory the process owns, so it is an upper bound: a loader that keeps a
# second copy, or all shards mapped at once, cannot stay below it.
MEASURE = """
import gc, sys
import torch
torch.set_num_threads(1)
import fastdllm

def field(name):
    for line in open("/proc/self/status"):
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024

fastdllm.load(sys.argv[2], device="cpu")  # everything imported and warm
gc.collect()
before = field("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
model = fastdllm.load(sys.argv[1], device="cpu")
print(before, field("VmHWM"), sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs"
)
def test_peak_memory_stays_near_the_model_and_one_shard(tmp_path):
    config = {
        **tiny.LLADA,
        "d_model": 512,
        "n_heads": 8,
        "n_kv_heads": 8,
        "n_layers": 16,
        "mlp_hidden_size": 2048,
    }
    shapes = oracle_models.key_shapes(config)
    shards = 8
    folder = tmp_path / "big"
    state = {name: torch.full(shape, 0.01) for name, shape in shapes.items()}
    tiny.write(folder, config, state, shards)
    shard = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    del state
    small = tiny.write(tmp_path / "small", tiny.LLADA, oracle_models.random_state(tiny.LLADA, 0))
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(small)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert output.returncode == 0, output.stderr
    before, peak, model = map(int, output.stdout.split())
    assert model > 6 * shard, "the shards are too large for this test to tell the two apart"
    assert peak - before < model + 2 * shard, (
        f"{(peak - before) / 2**20:.0f} MiB for a model of {model / 2**20:.0f} MiB"
    )


# Folders that must not load.


def refusal(folder, error=ValueError):
    with pytest.raises(error) as raised:
        fastdllm.load(folder, device="cpu")
    return str(raised.value)


def test_every_wrong_key_is_named_in_one_error(tmp_path):
    state = oracle_models.random_state(tiny.LLADA, 0)
    prefix = "model.transformer.blocks.1."
    del state[prefix + "q_proj.weight"], state["model.transformer.ln_f.weight"]
    state["surplus.weight"] = torch.zeros(2)
    state[prefix + "q_norm.weight"] = torch.zeros(8)
    state[prefix + "up_proj.weight"] = torch.zeros(48, 31)
    state["model.transformer.wte.weight"] = torch.zeros(41, 32)
    message = refusal(tiny.write(tmp_path, tiny.LLADA, state))
    for name in (prefix + "q_proj.weight", "model.transformer.ln_f.weight"):
        assert f"missing {name}" in message
    for name in ("surplus.weight", prefix + "q_norm.weight"):
        assert f"unexpected {name}" in message
    for name, came, expected in (
        (prefix + "up_proj.weight", "(48, 31)", "(48, 32)"),
        ("model.transformer.wte.weight", "(41, 32)", "(40, 32)"),
    ):
        start = message.index(name)
        assert came in message[start : start + 160] and expected in message[start : start + 160]


def test_wrong_keys_are_named_across_shards(tmp_path):
    state = oracle_models.random_state(tiny.DREAM, 0)
    del state["lm_head.weight"]
    state["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(5)
    message = refusal(tiny.write(tmp_path, tiny.DREAM, state, 3))
    assert "missing lm_head.weight" in message and "model.layers.0.self_attn.q_proj.bias" in message


def test_a_shape_that_has_the_right_number_of_elements_is_still_wrong(tmp_path):
    state = oracle_models.random_state(tiny.LLADA, 0)
    name = "model.transformer.blocks.0.ff_proj.weight"
    state[name] = state[name].T.contiguous()
    assert name in refusal(tiny.write(tmp_path, tiny.LLADA, state))


def test_an_unknown_model_type_lists_the_known_ones(tmp_path):
    state = oracle_models.random_state(tiny.LLADA, 0)
    for value in ("gpt2", None, 3):
        message = refusal(tiny.write(tmp_path, {**tiny.LLADA, "model_type": value}, state))
        assert "model_type" in message and "llada" in message and "Dream" in message
    without = {key: value for key, value in tiny.LLADA.items() if key != "model_type"}
    assert "model_type" in refusal(tiny.write(tmp_path, without, state))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_and_never_opened(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "opened"),))

    (tmp_path / "config.json").write_text(json.dumps(tiny.LLADA))
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    message = refusal(tmp_path)
    assert name in message and "safetensors" in message
    assert not (tmp_path / "opened").exists()


def test_a_pickle_named_by_the_index_is_refused(tmp_path):
    state = oracle_models.random_state(tiny.LLADA, 0)
    (tmp_path / "config.json").write_text(json.dumps(tiny.LLADA))
    torch.save(state, tmp_path / "pytorch_model.bin")
    index = {"weight_map": dict.fromkeys(state, "pytorch_model.bin")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "pytorch_model.bin" in refusal(tmp_path)


CHANGES_THE_MATHS = [
    ("llada", "alibi", True),
    ("llada", "attention_layer_norm", True),
    ("llada", "input_emb_norm", True),
    ("llada", "scale_logits", True),
    ("llada", "rope_scaling", {"type": "linear", "factor": 2.0}),
    ("llada", "activation_type", "swiglu"),
    ("llada", "activation_type", "gelu"),
    ("llada", "rope", False),
    ("llada", "rope_full_precision", False),
    ("llada", "include_bias", True),
    ("llada", "bias_for_layer_norm", True),
    ("llada", "layer_norm_type", "default"),
    ("llada", "block_type", "sequential"),
    ("llada", "sliding_window", 128),
    ("dream", "hidden_act", "gelu"),
    ("dream", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("dream", "use_sliding_window", True),
    ("dream", "use_mrope", True),
    ("dream", "alibi", True),
    ("dream", "scale_logits", True),
]


@pytest.mark.parametrize("family, key, value", CHANGES_THE_MATHS)
def test_a_key_that_would_change_the_maths_is_refused_by_name(tmp_path, family, key, value):
    config = tiny.FAMILIES[family]
    state = oracle_models.random_state(config, 0)
    assert key in refusal(tiny.write(tmp_path, {**config, key: value}, state))


def test_a_sliding_window_counts_only_where_it_is_used(tmp_path):
    state = oracle_models.random_state(tiny.DREAM, 0)
    fastdllm.load(tiny.write(tmp_path, {**tiny.DREAM, "sliding_window": 64}, state), device="cpu")
    message = refusal(
        tiny.write(
            tmp_path, {**tiny.DREAM, "sliding_window": 64, "use_sliding_window": True}, state
        )
    )
    assert "sliding_window" in message


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_required_key_is_named_when_it_is_missing(tmp_path, family):
    required = {
        "llada": "d_model n_layers n_heads mlp_hidden_size rope_theta rms_norm_eps mask_token_id eos_token_id",
        "dream": "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size "
        "rope_theta rms_norm_eps mask_token_id",
    }[family].split()
    config = tiny.FAMILIES[family]
    state = oracle_models.random_state(config, 0)
    for key in required:
        without = {name: value for name, value in config.items() if name != key}
        assert key in refusal(tiny.write(tmp_path, without, state)), key
    without = {name: value for name, value in config.items() if name not in required}
    message = refusal(tiny.write(tmp_path, without, state))
    assert all(key in message for key in required)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    tiny.build(tmp_path, tiny.LLADA)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    length = int(len(content) * keep) if isinstance(keep, float) else keep
    file.write_bytes(content[:length])
    message = refusal(tmp_path)
    assert "model.safetensors" in message


def test_a_missing_shard_is_named(tmp_path):
    state = oracle_models.random_state(tiny.LLADA, 0)
    folder = tiny.write(tmp_path, tiny.LLADA, state, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in refusal(folder, FileNotFoundError)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.transformer.blocks.1.v_proj.weight", "model.transformer.ln_f.weight"]
)
def test_weights_that_are_not_finite_are_named(tmp_path, name, value):
    state = oracle_models.random_state(tiny.LLADA, 0)
    state[name].view(-1)[-1] = value
    message = refusal(tiny.write(tmp_path, tiny.LLADA, state))
    assert name in message and "NaN" in message


def test_integer_weights_are_refused_wherever_they_are(tmp_path):
    for name in ("model.transformer.wte.weight", "model.transformer.blocks.1.ff_out.weight"):
        state = oracle_models.random_state(tiny.LLADA, 0)
        state[name] = torch.ones_like(state[name], dtype=torch.int8)
        message = refusal(tiny.write(tmp_path, tiny.LLADA, state))
        assert f"{name} is I8" in message


def test_an_index_without_a_map_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny.LLADA))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "weight_map" in refusal(tmp_path)
