"""checkpoint.py: folders that load, byte for byte, and folders that must not."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import oracle_models
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune

import fastdllm
import fastdllm.checkpoint
from fastdllm import folder as folders
from fastdllm.families import FAMILIES
from fastdllm.model import DiffusionTransformer, initialize


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
        "llada": "d_model n_layers n_heads mlp_hidden_size rope_theta rms_norm_eps mask_token_id "
        "eos_token_id",
        "dream": "hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
        "intermediate_size vocab_size rope_theta rms_norm_eps mask_token_id",
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


# The files of a folder against each other.

EMBEDDING = "model.transformer.wte.weight"


def sharded(folder, shards=3, config=tiny.LLADA, seed=0):
    return tiny.write(folder, config, oracle_models.random_state(config, seed), shards)


def index_of(folder):
    return json.loads((folder / folders.INDEX).read_text())


def write_index(folder, weight_map):
    (folder / folders.INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_a_key_in_two_shards_is_refused_whatever_the_index_says(tmp_path):
    folder = sharded(tmp_path)
    last = folder / "model-00003-of-00003.safetensors"
    held = index_of(folder)["weight_map"][EMBEDDING]
    assert held != last.name
    save_file({**load_file(last), EMBEDDING: torch.zeros(40, 32)}, last)
    message = refusal(folder)
    assert EMBEDDING in message and held in message and last.name in message


def test_a_key_that_is_not_where_the_index_says_is_named(tmp_path):
    folder = sharded(tmp_path)
    weight_map = index_of(folder)["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map[EMBEDDING])
    write_index(folder, {**weight_map, EMBEDDING: other})
    message = refusal(folder)
    assert f"{EMBEDDING} is not in {other}" in message


def test_keys_that_only_the_index_or_only_a_shard_has_are_named(tmp_path):
    folder = sharded(tmp_path)
    weight_map = index_of(folder)["weight_map"]
    file = weight_map.pop(EMBEDDING)
    write_index(folder, {**weight_map, "surplus.weight": file})
    message = refusal(folder)
    assert f"surplus.weight is not in {file}" in message
    assert f"{EMBEDDING} in {file} is not in the index" in message


OUTSIDE = ["../a.safetensors", "/a.safetensors", "b/../../a.safetensors", "..\\a.safetensors"]
NO_FILE = [*OUTSIDE, "C:\\a.safetensors", "", 3, None, ["a"], {"a": 1}, "a\0.safetensors"]


@pytest.mark.parametrize("name", NO_FILE, ids=str)
@pytest.mark.parametrize("where", ["the index", "config.json"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name, where):
    state = oracle_models.random_state(tiny.LLADA, 0)
    folder = sharded(tmp_path / "b" / "model")
    for place in (tmp_path, tmp_path / "b"):
        save_file(state, place / "a.safetensors")
    if where == "the index":
        name = str(tmp_path / "a.safetensors") if name == "/a.safetensors" else name
        write_index(folder, dict.fromkeys(state, name))
    else:
        config = {**tiny.LLADA, folders.WEIGHTS_KEY: name}
        (folder / "config.json").write_text(json.dumps(config))
    message = refusal(folder)
    assert "inside the folder" in message and repr(name) in message


def test_a_shard_may_be_a_link_as_in_a_downloads_cache(tmp_path):
    folder = sharded(tmp_path / "snapshot")
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(f"../blobs/{number}")
    assert torch.equal(logits_of(folder), logits_of(sharded(tmp_path / "plain")))


def test_a_file_that_the_index_does_not_name_is_left_alone(tmp_path):
    folder = sharded(tmp_path / "a")
    wanted = logits_of(folder)
    save_file({EMBEDDING: torch.zeros(40, 32)}, folder / "model.safetensors")
    save_file({EMBEDDING: torch.zeros(40, 32)}, folder / "model-00009-of-00009.safetensors")
    assert torch.equal(logits_of(folder), wanted)


@pytest.mark.parametrize("file", ["config.json", folders.INDEX])
def test_a_key_that_comes_twice_in_a_file_of_json_is_named(tmp_path, file):
    folder = sharded(tmp_path)
    path = folder / file
    first = "rope_theta" if file == "config.json" else "weight_map"
    path.write_text(f'{{"{first}": 1, {path.read_text()[1:]}')
    assert first in refusal(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "nothing"])
@pytest.mark.parametrize("file", ["config.json", folders.INDEX])
def test_json_that_cannot_be_read_is_named(tmp_path, file, text):
    folder = sharded(tmp_path)
    (folder / file).write_text(text)
    assert file in refusal(folder)


HOSTILE = [
    ("llada", {"n_layers": 10**5}),
    ("llada", {"n_layers": 10**9}),
    ("llada", {"n_layers": 10**30}),
    ("dream", {"num_hidden_layers": 10**9}),
    ("llada", {"embedding_size": 10**9}),
    ("llada", {"embedding_size": 10**18, "d_model": 10**18, "n_heads": 2, "n_kv_heads": 2}),
    ("llada", {"d_model": 10**30, "n_heads": 10, "n_kv_heads": 10}),
    ("llada", {"mlp_hidden_size": 10**12}),
    ("dream", {"vocab_size": 10**12}),
    ("dream", {"hidden_size": 48 * 10**9}),
    ("llada", {"rope_theta": float("inf")}),
    ("llada", {"rope_theta": 10**400}),
    ("llada", {"rms_norm_eps": float("nan")}),
    ("llada", {"rms_norm_eps": float("inf")}),
    ("llada", {"weight_tying": "false"}),
    ("llada", {"include_qkv_bias": "no"}),
]


@pytest.mark.parametrize("family, change", HOSTILE, ids=str)
def test_a_config_of_absurd_numbers_fails_fast(tmp_path, family, change):
    config = tiny.FAMILIES[family]
    tiny.build(tmp_path, config)
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    began = time.perf_counter()
    message = refusal(tmp_path)
    assert time.perf_counter() - began < 2
    assert "config.json" in message or "has shape" in message


PROMISED = """
import resource, sys
import torch
import fastdllm
torch.set_num_threads(1)
model = fastdllm.load(sys.argv[1], device="cpu")
fastdllm.generate(model, [[1, 2]], gen_length=4)  # everything imported and warm
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = fastdllm.load(sys.argv[2], device="cpu")
for cache in ("none", "prefix", "dual"):
    fastdllm.generate(model, [[1, 2]], gen_length=4, cache=cache)
model.logits(torch.tensor([[1, 2]]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_positions_that_are_only_promised_cost_nothing(tmp_path):
    few, many = tmp_path / "few", tmp_path / "many"
    tiny.build(few, tiny.LLADA)
    tiny.build(many, {**tiny.LLADA, "max_sequence_length": 10**8})
    command = [sys.executable, "-c", PROMISED, str(few), str(many)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert output.returncode == 0, output.stderr
    assert int(output.stdout) < 200, f"{output.stdout.strip()} MiB"


# RoPE's base, wherever a config keeps it.


def base_in(key, **more):
    """Dream's config with the base of RoPE under `key`, in transformers 5's form."""
    rest = {name: value for name, value in tiny.DREAM.items() if not name.startswith("rope")}
    return {**rest, key: {"rope_type": "default", "rope_theta": 777.0, **more}}


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_the_base_of_rope_is_read_from_where_transformers_5_keeps_it(tmp_path, key):
    state = oracle_models.random_state(tiny.DREAM, 0)
    wanted = tiny.write(tmp_path / "a", {**tiny.DREAM, "rope_theta": 777.0}, state)
    config = base_in(key)
    folder = tiny.write(tmp_path / "b", config, state)
    assert fastdllm.load(folder, device="cpu").config.rope_theta == 777.0
    assert torch.equal(logits_of(folder), logits_of(wanted))
    tiny.write(folder, {**config, "rope_theta": 777}, state)
    assert torch.equal(logits_of(folder), logits_of(wanted))
    message = refusal(tiny.write(folder, {**config, "rope_theta": 778.0}, state))
    assert "777" in message and "778" in message and key in message


SCALED = [
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
    {"type": "yarn"},
    {"mrope_section": [16, 24, 24]},
    {"partial_rotary_factor": 0.5},
]


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("scaled", SCALED, ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_scaled_forms_of_rope_are_refused_by_name(tmp_path, family, scaled, key):
    config = {**tiny.FAMILIES[family], key: scaled}
    state = oracle_models.random_state(tiny.FAMILIES[family], 0)
    message = refusal(tiny.write(tmp_path, config, state))
    assert key in message and all(f"{name}={scaled[name]!r}" in message for name in scaled)


def test_settings_of_single_layers_are_refused(tmp_path):
    state = oracle_models.random_state(tiny.DREAM, 0)
    full = {**tiny.DREAM, "layer_types": ["full_attention"] * 2}
    fastdllm.load(tiny.write(tmp_path, full, state), device="cpu")
    for kinds in (["full_attention", "sliding_attention"], "sliding_attention", 3):
        message = refusal(tiny.write(tmp_path, {**tiny.DREAM, "layer_types": kinds}, state))
        assert "layer_types" in message
    for value in ("yarn", 3, [1]):
        message = refusal(tiny.write(tmp_path, {**tiny.DREAM, "rope_parameters": value}, state))
        assert "rope_parameters" in message
    by_kind = {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e5}}
    message = refusal(tiny.write(tmp_path, {**tiny.DREAM, "rope_parameters": by_kind}, state))
    assert "full_attention" in message


@pytest.mark.parametrize("end", [37, [38, 37]])
def test_an_end_of_text_that_is_the_mask_is_refused(tmp_path, end):
    state = oracle_models.random_state(tiny.LLADA, 0)
    message = refusal(tiny.write(tmp_path, {**tiny.LLADA, "eos_token_id": end}, state))
    assert "mask" in message and "37" in message


@pytest.mark.parametrize("added", [[1], {"x": {"content": "<|eot_id|>"}}, {"3": "a"}, {"3": None}])
def test_a_tokenizer_config_that_is_none_is_named(tmp_path, added):
    tiny.build(tmp_path, tiny.LLADA)
    content = json.dumps({"added_tokens_decoder": added})
    (tmp_path / "tokenizer_config.json").write_text(content)
    assert "tokenizer_config.json" in refusal(tmp_path)


# Keys that repeat what is known.

TIED = {
    "llada": {**tiny.LLADA, "weight_tying": True},
    "dream": {**tiny.DREAM, "tie_word_embeddings": True},
}


def names_of(family):
    table = FAMILIES[tiny.FAMILIES[family]["model_type"]].keys
    return table["embedding.weight"][0], table["lm_head.weight"][0]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_tied_checkpoint_may_store_its_head_as_well(tmp_path, family, shards, monkeypatch):
    monkeypatch.setattr(fastdllm.checkpoint, "ROWS_AT_ONCE", 16)
    embedding, head = names_of(family)
    state = oracle_models.random_state(TIED[family], 0)
    wanted = logits_of(tiny.write(tmp_path / "a", TIED[family], state))
    both = {**state, head: state[embedding].clone()}
    folder = tiny.write(tmp_path / "b", TIED[family], both, shards)
    assert torch.equal(logits_of(folder), wanted)
    only = {name: tensor for name, tensor in both.items() if name != embedding}
    folder = tiny.write(tmp_path / "c", TIED[family], only, shards)
    assert torch.equal(logits_of(folder), wanted)
    both[head][-1, -1] += 1
    message = refusal(tiny.write(tmp_path / "d", TIED[family], both, shards))
    assert head in message and embedding in message and "ties" in message
    both[head] = both[head][:-1]
    message = refusal(tiny.write(tmp_path / "e", TIED[family], both, shards))
    assert head in message and "ties" in message


def buffers(config, dtype=torch.float32):
    """What old exporters wrote beside the weights."""
    shape = oracle_models.shape_of(config)
    dim, theta = shape["width"] // shape["heads"], shape["theta"]
    inverse = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)
    angle = torch.outer(torch.arange(96).float(), inverse)
    angle = torch.cat([angle, angle], dim=-1)
    prefix = shape["names"]["layer"].format(0)
    return {
        prefix + "self_attn.rotary_emb.inv_freq": inverse.to(dtype),
        "model.rotary_emb.original_inv_freq": inverse.clone().to(dtype),
        prefix + "rotary_emb.cos_cached": angle.cos()[None, None].to(dtype),
        prefix + "rotary_emb.sin_cached": angle.sin().to(dtype),
        "model.position_ids": torch.arange(96)[None],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_computed_buffers_of_old_exporters_may_be_there(tmp_path, family, dtype):
    config = tiny.FAMILIES[family]
    state = oracle_models.random_state(config, 0)
    wanted = logits_of(tiny.write(tmp_path / "a", config, state))
    extra = buffers(config, dtype)
    folder = tiny.write(tmp_path / "b", config, {**state, **extra})
    assert torch.equal(logits_of(folder), wanted)
    assert fastdllm.load(folder, device="cpu").dtype == torch.float32
    for name, tensor in extra.items():
        for other in (tensor * 1.05 + 1, tensor[..., :-1]):
            changed = {**extra, name: other.contiguous()}
            if name == "model.position_ids" and other.shape != tensor.shape:
                continue  # fewer positions contradict nothing
            message = refusal(tiny.write(tmp_path / "c", config, {**state, **changed}))
            assert name in message


def test_another_buffer_is_still_unexpected(tmp_path):
    state = oracle_models.random_state(tiny.LLADA, 0)
    state["model.transformer.blocks.0.masked_bias"] = torch.zeros(1)
    assert "unexpected model.transformer.blocks.0.masked_bias" in refusal(
        tiny.write(tmp_path, tiny.LLADA, state)
    )


def test_the_dtype_is_that_of_most_weights(tmp_path):
    state = oracle_models.random_state(tiny.DREAM, 0)
    mixed = {
        name: tensor if tensor.ndim == 1 else tensor.bfloat16() for name, tensor in state.items()
    }
    model = fastdllm.load(tiny.write(tmp_path, tiny.DREAM, mixed), device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# The arguments of load.

NAMED = {
    torch.float32: ["float32", "fp32", "float", "FP32", "torch.float32"],
    torch.float16: ["float16", "fp16", "half", "torch.float16"],
    torch.bfloat16: ["bfloat16", "bf16", "BF16", "torch.bfloat16"],
}


@pytest.mark.parametrize("dtype", NAMED)
def test_a_dtype_goes_by_its_usual_names(tmp_path, dtype):
    tiny.build(tmp_path, tiny.LLADA)
    for name in (dtype, *NAMED[dtype]):
        assert fastdllm.load(tmp_path, device="cpu", dtype=name).dtype == dtype
        assert fastdllm.checkpoint.dtype_named(name) == dtype
    for name in (None, "auto"):
        assert fastdllm.load(tmp_path, device="cpu", dtype=name).dtype == torch.float32


@pytest.mark.parametrize(
    "dtype", ["int8", "float64", "", "fp8", torch.float64, float, 16, ["half"]]
)
def test_another_dtype_is_refused_with_the_list(tmp_path, dtype):
    tiny.build(tmp_path, tiny.LLADA)
    with pytest.raises(ValueError, match="dtype: .*auto.*float32.*bf16"):
        fastdllm.load(tmp_path, device="cpu", dtype=dtype)


def test_a_device_that_is_not_there_is_refused(tmp_path):
    tiny.build(tmp_path, tiny.LLADA)
    count = torch.cuda.device_count()
    for device in [count, f"cuda:{count}", "abacus", -1, "", "meta", torch.device("cuda", count)]:
        with pytest.raises(ValueError, match="^device: "):
            fastdllm.load(tmp_path, device=device)
    if not count:
        with pytest.raises(ValueError, match="^device: .*'cuda'"):
            fastdllm.load(tmp_path, device="cuda")
    for device in (1.5, True, ["cpu"]):
        with pytest.raises(TypeError, match="^device: "):
            fastdllm.load(tmp_path, device=device)
    assert fastdllm.load(tmp_path, device=torch.device("cpu")).device.type == "cpu"


@pytest.mark.gpu
def test_a_number_is_a_gpu(tmp_path):
    tiny.build(tmp_path, tiny.LLADA)
    assert fastdllm.load(tmp_path, device=0).device == torch.device("cuda", 0)


# Saving: what comes back, and what is left by a process that ended in the middle.


def model_of(config=tiny.LLADA, seed=0, **change):
    family = FAMILIES[config["model_type"]]
    model = DiffusionTransformer(family.config({**config, **change})).requires_grad_(False)
    return initialize(model, seed, std=0.2).eval()


def same(folder, model):
    """Whether the folder holds this model: its config, and every weight to the bit."""
    loaded = fastdllm.load(folder, device="cpu")
    ours, theirs = loaded.state_dict(), model.state_dict()
    return loaded.config == model.config and all(
        torch.equal(ours[name], tensor) for name, tensor in theirs.items()
    )


def test_weights_that_are_not_contiguous_are_saved(tmp_path):
    model = model_of()
    for product in (model.layers[0].down, model.layers[1].attention.qkv, model.lm_head):
        product.weight = torch.nn.Parameter(product.weight.T.contiguous().T, requires_grad=False)
        assert not product.weight.is_contiguous()
    spread = torch.zeros(40, 64)[:, ::2]
    spread.copy_(model.embedding.weight)
    model.embedding.weight = torch.nn.Parameter(spread, requires_grad=False)
    fastdllm.checkpoint.save(model, tmp_path)
    assert same(tmp_path, model)


def old_in_one_file(folder):
    fastdllm.checkpoint.save(model_of(seed=1, rms_norm_eps=0.25), folder)


def old_in_shards(folder):
    old_in_one_file(folder)
    state = load_file(folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "model.safetensors").unlink()
    tiny.write(folder, raw, state, 3)


def old_in_both(folder):
    """An index beside a file of that name, which it does not name."""
    old_in_shards(folder)
    save_file({EMBEDDING: torch.zeros(40, 32)}, folder / "model.safetensors")


def old_as_an_ended_process_leaves_it(folder):
    """The new config.json stands and names its weights; nothing of the old is cleaned up."""
    old_in_shards(folder)
    (folder / "saving-0123456789abcdef.json").write_text("{")
    file = "saving-00112233445566ff.safetensors"
    state = load_file(folder / "model-00001-of-00003.safetensors")
    for shard in ("model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"):
        state |= load_file(folder / shard)
    save_file(state, folder / file)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, folders.WEIGHTS_KEY: file}))
    save_file({EMBEDDING: torch.zeros(40, 32)}, folder / "model-00002-of-00003.safetensors")


def old_that_is_none(folder):
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "saving-money.txt").write_text("mine too")


OLD = [
    old_in_one_file,
    old_in_shards,
    old_in_both,
    old_as_an_ended_process_leaves_it,
    old_that_is_none,
]
NEW = {"seed": 2, "rms_norm_eps": 0.5}
FINAL = {"config.json", "model.safetensors"}


@pytest.mark.parametrize("old", OLD)
def test_what_is_saved_over_another_checkpoint_is_what_loads(tmp_path, old):
    folder = tmp_path / "model"
    old(folder)
    kept = {path.name for path in folder.glob("*.txt")}
    fastdllm.checkpoint.save(model_of(**NEW), folder)
    assert same(folder, model_of(**NEW))
    assert {path.name for path in folder.iterdir()} == FINAL | kept
    assert folders.WEIGHTS_KEY not in json.loads((folder / "config.json").read_text())


class Interrupted(BaseException):
    pass


OPERATIONS = ("open", "os.rename", "os.remove", "os.link", "os.mkdir", "shutil.copyfile")


class Interruption:
    """Ends, by `end`, the n-th operation on a file of the folder."""

    def __init__(self, folder, n, end):
        self.folder, self.left, self.end = str(folder), n, end

    def __call__(self, event, args):
        if event in OPERATIONS and any(str(arg).startswith(self.folder) for arg in args[:2]):
            self.left -= 1
            if self.left == 0:
                self.end()


interruption = None
installed = []


def interrupt(folder, n, end):
    """Set the interruption; a hook of the interpreter cannot be taken out, so it is put in once."""
    global interruption
    interruption = Interruption(folder, n, end)
    if not installed:
        installed.append(True)
        sys.addaudithook(lambda event, args: interruption and interruption(event, args))
    return interruption


def still(old, folder):
    """Whether the folder is as `old` left it: the old checkpoint, or none where there was none."""
    if old is old_that_is_none:
        return not (folder / "config.json").exists()
    return same(folder, model_of(seed=1, rms_norm_eps=0.25))


def check_either(folder, old, new):
    """The folder holds the old checkpoint or the new one; the next save cleans up after it."""
    is_new = (folder / "config.json").exists() and same(folder, new)
    assert is_new or still(old, folder)
    kept = {path.name for path in folder.glob("*.txt")}
    fastdllm.checkpoint.save(new, folder)
    assert same(folder, new) and {path.name for path in folder.iterdir()} == FINAL | kept
    return is_new


def raise_it():
    raise Interrupted


@pytest.mark.parametrize("old", OLD)
def test_a_save_that_fails_anywhere_leaves_the_old_or_the_new(tmp_path, old):
    global interruption
    new, seen = model_of(**NEW), []
    for n in range(1, 100):
        folder = tmp_path / str(n)
        old(folder)
        state = interrupt(folder, n, raise_it)
        try:
            fastdllm.checkpoint.save(new, folder)
        except Interrupted:
            pass
        interruption = None
        finished = state.left > 0
        seen.append(check_either(folder, old, new))
        if finished:
            break
    assert finished and n > 8 and seen[0] is False and seen[-1] is True
    assert seen == sorted(seen), "the new checkpoint stands from one operation on"


@pytest.mark.parametrize("old", OLD)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_process_killed_anywhere_leaves_the_old_or_the_new(tmp_path, old):
    new, seen = model_of(**NEW), []
    for n in range(1, 100):
        folder = tmp_path / str(n)
        old(folder)
        child = os.fork()
        if not child:
            interrupt(folder, n, lambda: os.kill(os.getpid(), signal.SIGKILL))
            fastdllm.checkpoint.save(new, folder)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        seen.append(check_either(folder, old, new))
        if not os.WIFSIGNALED(status):
            break
    assert os.WEXITSTATUS(status) == 0 and n > 8
    assert seen[0] is False and seen[-1] is True and seen == sorted(seen)


@pytest.mark.parametrize("old", [old_in_one_file, old_in_shards])
def test_weights_that_are_half_written_are_never_read(tmp_path, old, monkeypatch):
    old(tmp_path / "model")

    def half(tensors, file, metadata):
        save_file(tensors, file, metadata=metadata)
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(fastdllm.checkpoint, "save_file", half)
    before = {path.name for path in (tmp_path / "model").iterdir()}
    with pytest.raises(OSError, match="no space"):
        fastdllm.checkpoint.save(model_of(**NEW), tmp_path / "model")
    assert still(old, tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == before


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
import test_checkpoint as tests
import fastdllm.checkpoint
models = [tests.model_of(**tests.NEW), tests.model_of(seed=1, rms_norm_eps=0.25)]
print("ready", flush=True)
while True:
    for model in models:
        fastdllm.checkpoint.save(model, sys.argv[1])
"""


def test_a_killed_process_leaves_one_of_its_models(tmp_path):
    """kill -9 at moments nobody chose, in a process that saves two models in turn."""
    folder, tests = tmp_path / "model", os.path.dirname(__file__)
    old_in_shards(folder)
    models = [model_of(**NEW), model_of(seed=1, rms_norm_eps=0.25)]
    for moment in range(4):
        command = [sys.executable, "-c", KILLED, str(folder), tests]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.05 + 0.037 * moment)
            process.kill()
        assert any(same(folder, model) for model in models)


def test_a_file_system_without_links_is_no_obstacle(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError("links are not supported")

    monkeypatch.setattr(os, "link", refuse)
    old_in_shards(tmp_path / "model")
    fastdllm.checkpoint.save(model_of(**NEW), tmp_path / "model")
    assert same(tmp_path / "model", model_of(**NEW))
    assert {path.name for path in (tmp_path / "model").iterdir()} == FINAL


def test_a_link_into_a_downloads_cache_is_replaced_not_written_through(tmp_path):
    old_in_one_file(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.rename(tmp_path / "blob")
    file.symlink_to("../blob")
    before = (tmp_path / "blob").read_bytes()
    fastdllm.checkpoint.save(model_of(**NEW), tmp_path / "model")
    assert same(tmp_path / "model", model_of(**NEW)) and not file.is_symlink()
    assert (tmp_path / "blob").read_bytes() == before


def test_an_old_index_makes_nothing_but_shards_go(tmp_path):
    """It may name anything."""
    folder = tmp_path / "model"
    old_in_one_file(folder)
    (tmp_path / "mine.safetensors").write_text("mine")
    (folder / "tokenizer.json").write_text("{}")
    names = ["../mine.safetensors", "tokenizer.json", "config.json", 3, "gone.safetensors"]
    write_index(folder, {str(number): name for number, name in enumerate(names)})
    fastdllm.checkpoint.save(model_of(**NEW), folder)
    assert same(folder, model_of(**NEW)) and (tmp_path / "mine.safetensors").exists()
    assert {path.name for path in folder.iterdir()} == FINAL | {"tokenizer.json"}


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_no_mixture(tmp_path, monkeypatch):
    old_in_one_file(tmp_path)
    fill = fastdllm.checkpoint._fill

    def replaced_first(*args):
        fastdllm.checkpoint.save(model_of(**NEW), tmp_path)
        return fill(*args)

    monkeypatch.setattr(fastdllm.checkpoint, "_fill", replaced_first)
    with pytest.raises(RuntimeError, match="changed while it was read"):
        fastdllm.load(tmp_path, device="cpu")


def spoiled(change, **config):
    model = model_of(**config)
    with torch.no_grad():
        change(model)
    return model


class Subclass(torch.Tensor):
    pass


def set_weight(module, weight):
    module.weight = torch.nn.Parameter(weight, requires_grad=False)


UNSAVEABLE = {
    "NaN": (lambda m: m.norm.weight[3].fill_(float("nan")), "norm.weight.*NaN"),
    "infinity": (lambda m: m.layers[1].down.weight[0, 0].fill_(float("inf")), "down.weight.*inf"),
    "float64": (lambda m: m.double(), "embedding.weight.*float64"),
    "one float64": (lambda m: m.layers[0].down.double(), "layers.0.down.weight.*float64"),
    "two dtypes": (lambda m: m.norm.half(), "norm.weight.*float16.*float32"),
    "integers": (
        lambda m: set_weight(m.norm, torch.ones(32, dtype=torch.int8)),
        "norm.weight.*int8",
    ),
    "no data": (lambda m: m.to("meta"), "meta"),
    "a layer more": (lambda m: m.layers.append(m.layers[0]), "unexpected layers.2"),
    "a layer less": (lambda m: m.layers.pop(1), "missing layers.1"),
    "another width": (lambda m: set_weight(m.norm, torch.ones(31)), r"norm.weight.*\(31,\)"),
    "a bias": (
        lambda m: setattr(m.layers[0].down, "bias", torch.nn.Parameter(torch.ones(32))),
        "unexpected layers.0.down.bias",
    ),
    "a parametrised weight": (
        lambda m: torch.nn.utils.parametrizations.weight_norm(m.layers[0].down),
        "layers.0.down.parametrizations",
    ),
    "a pruned weight": (
        lambda m: prune.random_unstructured(m.layers[0].down, "weight", 0.5),
        "layers.0.down.weight_mask",
    ),
    "a weight of a class of its own": (
        lambda m: set_weight(m.norm, m.norm.weight.detach().as_subclass(Subclass)),
        "norm.weight.*Subclass",
    ),
}


@pytest.mark.parametrize("name", UNSAVEABLE)
def test_what_would_not_load_is_not_saved(tmp_path, name):
    change, message = UNSAVEABLE[name]
    old_in_one_file(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"(?s)^model: .*{message}"):
        fastdllm.checkpoint.save(spoiled(change), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_config_that_would_not_come_back_is_not_saved(tmp_path):
    from dataclasses import replace

    for change in ({"logit_shift": 1}, {"rope_in_fp32": False}):
        config = replace(model_of().config, **change)
        with pytest.raises(ValueError, match=f"^model: .*{next(iter(change))}"):
            fastdllm.checkpoint.save(DiffusionTransformer(config), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_head_that_is_no_longer_tied_is_not_saved(tmp_path):
    model = model_of(weight_tying=True)
    model.lm_head.weight = torch.nn.Parameter(model.embedding.weight.clone())
    fastdllm.checkpoint.save(model, tmp_path)
    assert same(tmp_path, model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="^model: .*ties"):
        fastdllm.checkpoint.save(model, tmp_path)


def test_an_adapted_model_is_merged_before_it_is_saved(tmp_path):
    peft = pytest.importorskip("peft")
    model = model_of()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["qkv"]))
    with pytest.raises(TypeError, match="^model: .*PeftModel.*merge"):
        fastdllm.checkpoint.save(adapted, tmp_path)
    with pytest.raises(ValueError, match="^model: .*lora_A"):
        fastdllm.checkpoint.save(model, tmp_path)
    fastdllm.checkpoint.save(adapted.merge_and_unload(), tmp_path)
    assert same(tmp_path, model)
    with pytest.raises(TypeError, match="^model: .*Linear"):
        fastdllm.checkpoint.save(torch.nn.Linear(2, 2), tmp_path)
