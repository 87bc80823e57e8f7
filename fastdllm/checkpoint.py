"""A folder or hub id -> model, and back. Nothing here knows a family: names and shapes come from
its table.

Weights go from the mapped file straight into their place in the fused parameter, on the target
device and in the target dtype: beside the model itself, host memory holds one tensor at a time.
What a checkpoint's headers say is compared with its config.json before anything of the config's
size is built.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh

from fastdllm_kernels import Fp8Weight
from fastdllm_kernels.checks import choice

from .bare import PLAIN
from .buffers import is_computed, wrong_buffer
from .config import ModelConfig
from .families import FAMILIES, Family
from .folder import (
    CONFIG,
    Stored,
    listed,
    opened,
    read_headers,
    read_json,
    replace_checkpoint,
)
from .model import DiffusionTransformer
from .parallel import Ranks, SplitTransformer, refuse_split
from .quantize import Fp8Linear, quantize

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# The short names of the same, as other tools take them; "auto" is the stored dtype.
DTYPE_NAMES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
AUTO = "auto"
HEAD, EMBEDDING = "lm_head.weight", "embedding.weight"
ROWS_AT_ONCE = 4096  # of two tensors that are compared


def load(
    path_or_id: str | Path,
    *,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | str | None = None,
    weights: str | None = None,
    mesh: DeviceMesh | None = None,
) -> DiffusionTransformer:
    """Load a LLaDA or Dream checkpoint for inference.

    path_or_id: a folder with config.json and safetensors (one model.safetensors, or shards with
    their index), or a hub id, which huggingface_hub downloads. device: default the GPU when there
    is one; an int is that GPU. dtype: float32, float16 or bfloat16, by torch's name or a usual
    short one (`dtype_named`); default that of the stored weights. weights: "fp8" quantises every
    weight matrix (but the embedding, and a head tied to it) as it is read, and the rows that are
    multiplied by it: half the bytes of bfloat16, for an accuracy that one measures; in float32 it
    gains nothing. The model comes in eval mode, its parameters not requiring gradients.

    mesh: a DeviceMesh of one dimension, in every process of it (torchrun): each rank loads its own
    part, and the model decodes as one (parallel.py). `generate` and `infill` then run alike on all
    ranks, and refuse top_p and top_k. ValueError for sizes that do not divide by the ranks.

    Raises FileNotFoundError for a folder without a model, ValueError for a checkpoint that does not
    fit (every missing, unexpected and mis-shaped key in one message; files that contradict their
    index; configuration keys that would change the maths; pickled, truncated or NaN weights; an
    unknown model_type) and for a device that is not there, TypeError for arguments of another type,
    RuntimeError where another process saves into the folder at the same time.
    """
    if not isinstance(path_or_id, (str, Path)):
        raise TypeError(f"path_or_id: expected a path or a hub id, got {type(path_or_id).__name__}")
    wanted_dtype = dtype_named(dtype)
    if weights not in (None, "fp8"):
        raise ValueError(f"weights: expected None or 'fp8', got {weights!r}")
    ranks = None if mesh is None else Ranks(mesh)
    device = _device(device) if ranks is None else ranks.device(device)
    folder = _folder(path_or_id)
    config_bytes = (folder / CONFIG).read_bytes()
    raw = read_json(folder / CONFIG)
    family = FAMILIES[choice("config.json: model_type", raw.get("model_type"), tuple(FAMILIES))]
    config = family.config(raw, _token_ids(folder, family.end_tokens))
    stored = read_headers(folder, raw)
    names = _fitting_names(stored, config, family)
    with torch.device("meta"):
        model = DiffusionTransformer(config) if ranks is None else SplitTransformer(config, ranks)
    if weights:
        quantize(model)
    model.to(dtype=wanted_dtype or _stored_dtype(stored, names)).to_empty(device=device)
    model.requires_grad_(False)
    if config.tie_embeddings:  # to_empty gives each of the two names its own memory
        model.tie_head()
    _fill(stored, _places(model, names), ranks)
    if (folder / CONFIG).read_bytes() != config_bytes:
        raise RuntimeError(f"{folder}: the checkpoint changed while it was read; load it again")
    if ranks is not None:
        ranks.wait()
        ranks.agree("config.json", device, config)
    return model.eval()


def save(model: DiffusionTransformer, folder: str | Path) -> None:
    """Write config.json and model.safetensors with the family's published names (unfused), the
    inverse of `load`, in place of any checkpoint that the folder holds.

    At any moment, whatever ends the process, `load` finds the old checkpoint or the new one there,
    whole. Raises TypeError for another model; ValueError, before anything is written, for one that
    `load` would not give back: fp8 weights (save the model that they were made of), parameters that
    an adapter added or took away (merge it first), NaN or infinity, float64, several dtypes.
    """
    if not isinstance(model, DiffusionTransformer):
        raise TypeError(
            f"model: expected a DiffusionTransformer, got {type(model).__name__} "
            "(merge an adapter into its model first)"
        )
    refuse_split(model, "saving")
    if not isinstance(folder, (str, Path)):
        raise TypeError(f"folder: expected a path, got {type(folder).__name__}")
    family = FAMILIES[model.config.family]
    raw = family.raw_config(model.config)
    _check_config(model.config, family, raw)
    names = family.published_names(model.config)
    _check_parameters(model)
    raw["torch_dtype"] = str(model.dtype).removeprefix("torch.")

    def write(file: Path) -> None:
        tensors = {
            name: place.detach().to("cpu").clone(memory_format=torch.contiguous_format)
            for name, place in _places(model, names).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})

    replace_checkpoint(Path(folder), raw, write)


def dtype_named(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of that name; None, for None and "auto", is the dtype that the weights are stored
    in. ValueError listing the names for any other.
    """
    if dtype is None or dtype in DTYPE_NAMES.values():
        return dtype  # type: ignore[return-value]
    name = dtype.lower().removeprefix("torch.") if isinstance(dtype, str) else None
    if name == AUTO:
        return None
    if name not in DTYPE_NAMES:
        known = ", ".join([AUTO, *DTYPE_NAMES])
        raise ValueError(f"dtype: expected one of {known} or torch's dtypes of them, got {dtype!r}")
    return DTYPE_NAMES[name]


def _device(device: torch.device | str | int | None) -> torch.device:
    """The device meant, by default a GPU where there is one; an int is a GPU. ValueError where this
    machine, or this build of PyTorch, has none like it.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device, bool) or not isinstance(device, (torch.device, str, int)):
        raise TypeError(f"device: expected a torch.device, a name or an int, got {device!r}")
    try:
        found = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device: expected one that this machine has, got {device!r} ({reason})"
        ) from None
    if found.type == "meta":
        raise ValueError("device: expected one that holds data, got 'meta'")
    return found


def _folder(path_or_id: str | Path) -> Path:
    folder = Path(path_or_id).expanduser()
    if folder.is_file():
        raise ValueError(f"path_or_id: expected a folder or a hub id, got the file {folder}")
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(
                f"path_or_id: {folder} holds no config.json, so it is not a model"
            )
        return folder
    name = str(path_or_id)
    if isinstance(path_or_id, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"path_or_id: no folder {path_or_id}, and a hub id has the form owner/name"
        )
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))


def _token_ids(folder: Path, texts: tuple[str, ...]) -> tuple[int, ...]:
    """Ids of special tokens by their text, from tokenizer_config.json where there is one."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return ()
    added = read_json(path).get("added_tokens_decoder") or {}
    try:
        return tuple(int(id) for id, token in added.items() if token.get("content") in texts)
    except (AttributeError, ValueError):
        raise ValueError(f"{path}: expected added_tokens_decoder as id -> token") from None


def _fitting_names(
    stored: Mapping[str, Stored], config: ModelConfig, family: Family
) -> dict[str, tuple[str, ...]]:
    """Our parameter name -> the stored names whose rows it stacks, where headers and config agree.

    Tensors that only repeat what is known (computed buffers, the head of a tied model) may be
    there. ValueError naming every key that is missing, not expected, or of another shape or dtype.
    """
    # A layer has more tensors than one: no list of the config's length is made for a wrong number.
    if config.num_layers > len(stored):
        raise ValueError(
            f"config.json: {family.key_of('num_layers')}={config.num_layers}, "
            f"but the checkpoint holds {len(stored)} tensors in all"
        )
    names = family.published_names(config)
    heads = _stored_heads(stored, family, names) if config.tie_embeddings else set()
    buffers = {name for name in stored if is_computed(name)}
    _check_keys(stored, _published_shapes(config, names), heads | buffers)
    for name in sorted(buffers):
        problem = wrong_buffer(name, _read(stored[name], name), config)
        if problem:
            raise ValueError(f"checkpoint: {name}: {problem}")
    (embedding,) = names[EMBEDDING]
    for head in heads:
        if not _same(stored, head, embedding):
            raise ValueError(
                f"checkpoint: {head} differs from {embedding}, and config.json ties the two "
                f"({family.key_of('tie_embeddings')})"
            )
    return names


def _stored_heads(
    stored: Mapping[str, Stored], family: Family, names: dict[str, tuple[str, ...]]
) -> set[str]:
    """The stored head of a tied model, if there is one beside its embedding; where it alone is
    stored, it is taken for the embedding in `names`.
    """
    (head,), (embedding,) = family.keys[HEAD], names[EMBEDDING]
    if head not in stored:
        return set()
    if embedding in stored:
        return {head}
    names[EMBEDDING] = (head,)
    return set()


def _published_shapes(
    config: ModelConfig, names: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[int, ...]]:
    """Published name -> its shape. Every layer is shaped as the first: one is built, of nothing."""
    try:
        with torch.device("meta"):
            model = DiffusionTransformer(replace(config, num_layers=1))
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"config.json: no model has such sizes ({error})") from None
    shapes: dict[str, tuple[int, ...]] = {}
    for ours, theirs in names.items():
        parameter = attrgetter(re.sub(r"^layers\.\d+", "layers.0", ours))(model)
        for name, rows in zip(theirs, fused_rows(config, ours, parameter), strict=True):
            shapes[name] = (rows, *parameter.shape[1:])
    return shapes


def _check_keys(
    stored: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]], spare: set[str]
) -> None:
    """Compare every stored key, shape and dtype with what is wanted before a byte is copied."""
    wrong = [f"missing {name}" for name in shapes if name not in stored]
    wrong += [f"unexpected {name}" for name in stored if name not in shapes and name not in spare]
    there = {name: stored[name] for name in shapes if name in stored}
    wrong += [
        f"{name} has shape {held.shape}, expected {shapes[name]}"
        for name, held in there.items()
        if held.shape != shapes[name]
    ]
    if wrong:
        raise ValueError(f"checkpoint: {len(wrong)} keys do not fit: {listed(wrong)}")
    wrong = [f"{name} is {held.dtype}" for name, held in there.items() if held.dtype not in DTYPES]
    if wrong:
        raise ValueError(f"checkpoint: expected F32, F16 or BF16 weights, but {listed(wrong)}")


def _stored_dtype(
    stored: Mapping[str, Stored], names: Mapping[str, tuple[str, ...]]
) -> torch.dtype:
    """The dtype that most of the weights are stored in."""
    sizes: Counter[str] = Counter()
    for held in (stored[name] for theirs in names.values() for name in theirs):
        sizes[held.dtype] += torch.Size(held.shape).numel()
    return DTYPES[sizes.most_common(1)[0][0]]


def _read(held: Stored, name: str) -> torch.Tensor:
    with opened(held.file) as tensors:
        return tensors.get_tensor(name)


def _same(stored: Mapping[str, Stored], name: str, other: str) -> bool:
    """Whether two stored matrices hold the same numbers."""
    one, two = stored[name], stored[other]
    if one.shape != two.shape or one.dtype not in DTYPES:
        return False
    with opened(one.file) as first, opened(two.file) as second:
        left, right = first.get_slice(name), second.get_slice(other)
        for start in range(0, one.shape[0], ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            if not torch.equal(left[rows].float(), right[rows].float()):
                return False
    return True


def _places(model: DiffusionTransformer, names: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Published name -> the view of our parameter, or Fp8Weight, that it fills."""
    places: dict[str, Any] = {}
    for ours, theirs in names.items():
        parameter = attrgetter(ours)(model)
        parts = parameter.split(fused_rows(model.config, ours, parameter))
        places.update(zip(theirs, parts, strict=True))
    return places


def fused_rows(config: ModelConfig, name: str, parameter: torch.Tensor | Fp8Weight) -> list[int]:
    """How many rows of our parameter `name` each published tensor fills, in order: q, k, v or gate,
    up or all.
    """
    if ".qkv." in name:
        kv = config.num_kv_heads * config.head_dim
        return [config.num_heads * config.head_dim, kv, kv]
    if ".gate_up." in name:
        return [config.intermediate_size] * 2
    return [parameter.shape[0]]


def _fill(
    stored: Mapping[str, Stored], places: Mapping[str, Any], ranks: Ranks | None = None
) -> None:
    """Copy every stored tensor, or this rank's part of it, to its place, file by file. ValueError
    for what is not finite.
    """
    by_file: dict[Path, list[str]] = {}
    for name in places:
        by_file.setdefault(stored[name].file, []).append(name)
    for file, names in by_file.items():
        with opened(file) as tensors:
            for name in names:
                place = places[name]
                if ranks is None:
                    place.copy_(tensors.get_tensor(name))
                else:
                    part = ranks.part(stored[name].shape, place.shape)
                    place.copy_(tensors.get_slice(name)[part])
                # Of fp8 weights the scales: a row's is NaN if one of its weights is.
                written = getattr(place, "scale", place)
                if not torch.isfinite(written).all():
                    raise ValueError(
                        f"checkpoint: {name} holds NaN or infinity in {_name_of(written.dtype)}"
                    )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_config(config: ModelConfig, family: Family, raw: Mapping[str, Any]) -> None:
    """ValueError where config.json would not give this config back."""
    again = family.config(raw)
    lost = [
        f"{name}={value!r}" for name, value in vars(config).items() if getattr(again, name) != value
    ]
    if lost:
        raise ValueError(
            f"model: its config.json, as {family.name} has it, cannot say {', '.join(lost)}"
        )


def _check_parameters(model: DiffusionTransformer) -> None:
    """ValueError for a model whose parameters are not those of its config, or whose weights `load`
    would refuse or change.
    """
    if any(isinstance(module, Fp8Linear) for module in model.modules()):
        raise ValueError(
            "model: expected weights as they are published, got fp8 weights; "
            "save what they were made of"
        )
    held = model.state_dict(keep_vars=True)
    with torch.device("meta"):
        built = DiffusionTransformer(model.config).state_dict()
    wrong = [f"missing {name}" for name in built if name not in held]
    wrong += [f"unexpected {name}" for name in held if name not in built]
    wrong += [
        f"{name} has shape {tuple(held[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in built.items()
        if name in held and held[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"model: expected the parameters of its config: {listed(wrong)}")
    for name, parameter in held.items():
        problem = _unsaveable(parameter, model.dtype)
        if problem:
            raise ValueError(f"model: {name} {problem}")
    if model.config.tie_embeddings and not torch.equal(held[HEAD], held[EMBEDDING]):
        raise ValueError("model: its config ties head and embedding, and the two differ")


def _unsaveable(parameter: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why `load` would not give the parameter back, or None; dtype: the model's."""
    if type(parameter) not in PLAIN:
        return f"is a {type(parameter).__name__}, no plain tensor"
    if parameter.is_meta:
        return "holds no data: it is on the meta device"
    if parameter.dtype not in DTYPES.values():
        return f"is {_name_of(parameter.dtype)}, expected float32, float16 or bfloat16"
    if parameter.dtype != dtype:
        return f"is {_name_of(parameter.dtype)} in a model of {_name_of(dtype)}"
    if not torch.isfinite(parameter).all():
        return "holds NaN or infinity"
    return None
