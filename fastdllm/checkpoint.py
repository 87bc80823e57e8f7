"""A folder or hub id -> model, and back. Nothing here knows a family: names and shapes come from
its table.

Weights go from the mapped file straight into their place in the fused parameter, on the target
device and in the target dtype: beside the model itself, host memory holds one tensor at a time.
"""

import json
from operator import attrgetter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastdllm_kernels.checks import choice

from .families import FAMILIES
from .model import DiffusionTransformer
from .quantize import Fp8Linear, quantize

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def load(path_or_id, *, device=None, dtype=None, weights=None) -> DiffusionTransformer:
    """Load a LLaDA or Dream checkpoint for inference.

    path_or_id: a folder with config.json and safetensors (one model.safetensors, or shards with
    their index), or a hub id, which huggingface_hub downloads. device: default the GPU when there
    is one. dtype: float32, float16 or bfloat16; default that of the stored weights. weights: "fp8"
    quantises every weight matrix (but the embedding, and a head tied to it) as it is read, and the
    rows that are multiplied by it: half the bytes of bfloat16, for an accuracy that one measures;
    in float32 it gains nothing. The model comes in eval mode, its parameters not requiring
    gradients.

    Raises FileNotFoundError for a folder without a model, ValueError for a checkpoint that does not
    fit (every missing, unexpected and mis-shaped key in one message; configuration keys that would
    change the maths; pickled, truncated or NaN weights; an unknown model_type), TypeError for
    arguments of another type.
    """
    if not isinstance(path_or_id, (str, Path)):
        raise TypeError(f"path_or_id: expected a path or a hub id, got {type(path_or_id).__name__}")
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"dtype: expected torch.float32, torch.float16 or torch.bfloat16, got {dtype!r}"
        )
    if weights not in (None, "fp8"):
        raise ValueError(f"weights: expected None or 'fp8', got {weights!r}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = _folder(path_or_id)
    raw = _read_json(folder / "config.json")
    family = FAMILIES[choice("config.json: model_type", raw.get("model_type"), sorted(FAMILIES))]
    config = family.config(raw, _token_ids(folder, family.end_tokens))
    shards = _shards(folder)
    with torch.device("meta"):
        model = DiffusionTransformer(config)
    if weights:
        quantize(model)
    places = _places(model, family.published_names(config))
    stored = _check_keys(shards, places)
    model.to(dtype=dtype or stored).to_empty(device=device)
    model.requires_grad_(False)
    if config.tie_embeddings:  # to_empty gives each of the two names its own memory
        model.lm_head.weight = model.embedding.weight
    _fill(shards, _places(model, family.published_names(config)))
    return model.eval()


def save(model: DiffusionTransformer, folder) -> None:
    """Write config.json and model.safetensors with the family's published names (unfused), the
    inverse of `load`.

    ValueError for fp8 weights: save the model that they were made of.
    """
    if any(isinstance(module, Fp8Linear) for module in model.modules()):
        raise ValueError(
            "model: expected weights as they are published, got fp8 weights; save what they were made of"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    family = FAMILIES[model.config.family]
    places = _places(model, family.published_names(model.config))
    tensors = {name: place.detach().to("cpu").clone() for name, place in places.items()}
    raw = family.raw_config(model.config) | {"torch_dtype": str(model.dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def _folder(path_or_id) -> Path:
    folder = Path(path_or_id).expanduser()
    if folder.is_file():
        raise ValueError(f"path_or_id: expected a folder or a hub id, got the file {folder}")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"path_or_id: {folder} holds no config.json, so it is not a model"
            )
        return folder
    if (
        not isinstance(path_or_id, str)
        or path_or_id.count("/") != 1
        or path_or_id.startswith((".", "/", "~"))
    ):
        raise FileNotFoundError(
            f"path_or_id: no folder {path_or_id}, and a hub id has the form owner/name"
        )
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path_or_id, allow_patterns=["*.json", "*.safetensors"]))


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _token_ids(folder: Path, texts: tuple[str, ...]) -> tuple[int, ...]:
    """Ids of special tokens by their text, from tokenizer_config.json where there is one."""
    path = folder / "tokenizer_config.json"
    added = _read_json(path).get("added_tokens_decoder", {}) if path.is_file() else {}
    return tuple(int(token) for token, entry in added.items() if entry.get("content") in texts)


def _shards(folder: Path) -> list[Path]:
    shards = [folder / SINGLE]
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX}: expected a weight_map")
        shards = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder}: pickled weights are refused ({', '.join(pickles)}); convert them to safetensors"
            )
        raise FileNotFoundError(f"{folder}: missing {', '.join(missing)}")
    return shards


def _places(model, published_names) -> dict[str, torch.Tensor]:
    """Published name -> the view of our parameter that it fills."""
    places = {}
    for ours, theirs in published_names.items():
        parameter = attrgetter(ours)(model)
        places.update(
            zip(theirs, parameter.split(fused_rows(model.config, ours, parameter)), strict=True)
        )
    return places


def fused_rows(config, name: str, parameter) -> list[int]:
    """How many rows of our parameter `name` each published tensor fills, in order: q, k, v or gate,
    up or all.
    """
    if ".qkv." in name:
        kv = config.num_kv_heads * config.head_dim
        return [config.num_heads * config.head_dim, kv, kv]
    if ".gate_up." in name:
        return [config.intermediate_size] * 2
    return [parameter.shape[0]]


def _stored(shards):
    """(open file, name) of every stored tensor."""
    for shard in shards:
        try:
            with safe_open(shard, framework="pt", device="cpu") as file:
                yield from ((file, name) for name in file.keys())  # noqa: SIM118 - a safe_open handle is no mapping
        except SafetensorError as error:
            raise ValueError(f"{shard}: not a complete safetensors file ({error})") from None


def _check_keys(shards, places) -> torch.dtype:
    """Compare every stored key and shape with `places` before a byte is copied; returns the stored
    dtype.
    """
    shapes, dtypes = {}, {}
    for file, name in _stored(shards):
        stored = file.get_slice(name)
        shapes[name], dtypes[name] = tuple(stored.get_shape()), stored.get_dtype()
    wanted = {name: tuple(place.shape) for name, place in places.items()}
    wrong = [f"missing {name}" for name in wanted if name not in shapes]
    wrong += [f"unexpected {name}" for name in shapes if name not in wanted]
    both = [name for name in wanted if name in shapes]
    wrong += [
        f"{name} has shape {shapes[name]}, expected {wanted[name]}"
        for name in both
        if shapes[name] != wanted[name]
    ]
    if wrong:
        raise ValueError(f"checkpoint: {len(wrong)} keys do not fit: {'; '.join(wrong)}")
    wrong = [f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in DTYPES]
    if wrong:
        raise ValueError(f"checkpoint: expected F32, F16 or BF16 weights, but {'; '.join(wrong)}")
    return DTYPES[next(iter(dtypes.values()))]


def _fill(shards, places) -> None:
    for file, name in _stored(shards):
        place = places[name].copy_(file.get_tensor(name))
        if not torch.isfinite(
            getattr(place, "scale", place)
        ).all():  # of fp8 weights the scales: a row's is NaN if one is
            raise ValueError(f"checkpoint: {name} holds NaN or infinity")
