"""A checkpoint's folder: its config.json, its index and the headers of its safetensors files; and
how a new checkpoint takes the place of an old one.

Nothing in a folder is trusted. Everything is read and compared before a byte of a weight is.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

try:
    import fcntl
except ImportError:  # Windows: one process at a time is the caller's to see to
    fcntl = None  # type: ignore[assignment]

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUFFIX = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# While a checkpoint is saved, and where that was cut short: the key of config.json that names the
# file with its weights, and the names of files that are not to stay (a pattern).
WEIGHTS_KEY = "fastdllm_weights"
UNFINISHED = "saving-" + 16 * "[0-9a-f]" + ".*"


class Stored(NamedTuple):
    """What a header says of one tensor: its file, its shape and its dtype as safetensors writes
    it.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError naming the file for anything else, a key that comes
    twice among it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {key!r} comes twice")
        content[key] = value
    return content


def read_headers(folder: Path, config: dict[str, Any]) -> dict[str, Stored]:
    """Every tensor that the folder's checkpoint holds, by its name.

    config: the folder's config.json. Where there is an index it says which tensor lies in which
    file. FileNotFoundError for a file that is not there; ValueError for one that is no safetensors
    file or lies outside the folder, and for files that contradict each other or the index.
    """
    if WEIGHTS_KEY in config:
        return _stored(_files(folder, [config[WEIGHTS_KEY]], folder / CONFIG))
    if not (folder / INDEX).is_file():
        return _stored(_files(folder, [SINGLE], folder))
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected a weight_map")
    stored = _stored(_files(folder, list(weight_map.values()), index))
    wrong = [
        f"{name} is not in {file}"
        for name, file in weight_map.items()
        if name not in stored or stored[name].file != folder / file
    ]
    wrong += [
        f"{name} in {held.file.name} is not in the index"
        for name, held in stored.items()
        if name not in weight_map
    ]
    if wrong:
        raise ValueError(f"{index}: its files hold something else: {listed(wrong)}")
    return stored


def listed(wrong: list[str], most: int = 1000) -> str:
    """The entries as one text, at most so many of them."""
    more = len(wrong) - most
    return "; ".join(wrong[:most]) + (f"; and {more} more" if more > 0 else "")


def _files(folder: Path, names: list[Any], source: Path) -> list[Path]:
    """The paths of the named files, each there and inside the folder; source: what names them."""
    for name in names:
        if not _stays_inside(name):
            raise ValueError(f"{source}: expected a file inside the folder, got {name!r}")
    paths = sorted({folder / name for name in names})
    missing = [path.name for path in paths if not path.is_file()]
    pickles = [path.name for path in paths if path.name.endswith(PICKLES)]
    if missing and not pickles:
        pickles = sorted(path.name for path in folder.iterdir() if path.name.endswith(PICKLES))
    if pickles:
        raise ValueError(
            f"{folder}: pickled weights are refused ({', '.join(pickles)}); "
            "convert them to safetensors"
        )
    if missing:
        raise FileNotFoundError(f"{folder}: missing {', '.join(missing)}")
    return paths


def _stays_inside(name: Any) -> bool:
    """Whether a file name, by either system's rules, is a relative one that does not go up."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.is_absolute() or path.drive or path.root or ".." in path.parts:
            return False
    return True


def _stored(files: list[Path]) -> dict[str, Stored]:
    """What the headers of the files say; ValueError for a name that comes twice."""
    stored: dict[str, Stored] = {}
    twice = []
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - the handle is no mapping
                if name in stored:
                    twice.append(f"{name} in {stored[name].file.name} and in {file.name}")
                header = tensors.get_slice(name)
                stored[name] = Stored(file, tuple(header.get_shape()), header.get_dtype())
    if twice:
        raise ValueError(f"checkpoint: tensors that lie in two files: {listed(twice)}")
    return stored


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The tensors of a safetensors file, on the host; ValueError where it is none."""
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file}: not a complete safetensors file ({error})") from None


def replace_checkpoint(
    folder: Path, config: dict[str, Any], write_weights: Callable[[Path], None]
) -> None:
    """Put a checkpoint of config.json and model.safetensors in place of whatever the folder holds.

    write_weights: writes the safetensors file it is given. At every moment, one at which the
    process is killed among them, `read_headers` finds the old checkpoint whole or the new one:
    the weights are written beside the old ones, and the rename of a config.json that names their
    file switches both at once. What is left to do then leads to the usual two names. An interrupted
    save is cleaned up by the next. Savers of one folder take turns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = _unfinished(folder, SUFFIX)
    with _alone_in(folder):
        stale = _shards_and_index(folder)
        try:
            write_weights(weights)
            _flush(weights)
            _write_config(folder, {**config, WEIGHTS_KEY: weights.name})
        except BaseException:
            if not _is_named(folder, weights):
                weights.unlink(missing_ok=True)
            raise
        # From here on the folder holds the new checkpoint.
        for path in stale:
            path.unlink(missing_ok=True)
        _give_second_name(weights, folder / SINGLE)
        _write_config(folder, config)
        for path in folder.glob(UNFINISHED):
            path.unlink(missing_ok=True)


def _unfinished(folder: Path, suffix: str) -> Path:
    """A file name of its own for what is not to stay."""
    return folder / f"saving-{secrets.token_hex(8)}{suffix}"


def _is_named(folder: Path, weights: Path) -> bool:
    """Whether the folder's config.json names these weights."""
    try:
        return read_json(folder / CONFIG).get(WEIGHTS_KEY) == weights.name
    except (OSError, ValueError):
        return False


def _shards_and_index(folder: Path) -> list[Path]:
    """The files of a checkpoint in shards, its index last: it alone knows the others' names."""
    index = folder / INDEX
    if not index.is_file():
        return []
    try:
        weight_map = read_json(index).get("weight_map")
    except ValueError:
        return [index]
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    shards = {folder / name for name in names if _stays_inside(name) and name.endswith(SUFFIX)}
    return [*shards, index]


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    """config.json in one step: another process reads the old one or this one."""
    beside = _unfinished(folder, ".json")
    beside.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _flush(beside)
    os.replace(beside, folder / CONFIG)
    _flush(folder)


def _give_second_name(file: Path, name: Path) -> None:
    """The same file under another name, in one step; the first name stays."""
    beside = _unfinished(file.parent, SUFFIX)
    try:
        os.link(file, beside)
    except OSError:  # a file system without hard links
        shutil.copyfile(file, beside)
        _flush(beside)
    os.replace(beside, name)
    _flush(name.parent)


def _flush(path: Path) -> None:
    """Wait until what was written lies on the disk: a rename must not come before it."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other savers of the folder waiting, where the file system can."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
