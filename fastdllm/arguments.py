"""generate()'s arguments, checked before any work is done: every error names the argument, what was
expected and what came.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from fastdllm_kernels.checks import choice, integer, number

from .cache import CachePolicy
from .config import ModelConfig

__all__ = [
    "CACHES",
    "check_policy",
    "choice",
    "integer",
    "number",
    "prompt_ids",
    "sequence",
    "stop_tokens",
    "top_k",
]

CACHES = ("none", "prefix", "dual")
Ids = Collection[int] | torch.Tensor
"""A 1-D sequence of token ids, of integers on any device."""
Prompts = Collection[Ids] | torch.Tensor | Mapping[str, Any]
"""A list of them, a [B, P] tensor, or what a tokenizer returns."""
Padding = Collection[Collection[int]] | torch.Tensor | None
"""An attention_mask [B, P]: 1 at a row's own tokens, 0 at padding."""


def prompt_ids(
    prompts: Any, vocab_size: int, attention_mask: Any = None, name: str = "prompts"
) -> list[torch.Tensor]:
    """The prompts as 1-D int64 CPU tensors, none empty, every id inside the vocabulary.

    prompts: a list of id sequences, a [B, P] tensor, or what a tokenizer returns (a mapping with
    input_ids and perhaps attention_mask). attention_mask: 0 at padding, left out on either side.
    """
    if isinstance(prompts, Mapping):
        if "input_ids" not in prompts:
            raise TypeError(f"{name}: expected a mapping with input_ids, got {sorted(prompts)}")
        if attention_mask is None:
            attention_mask = prompts.get("attention_mask")
        prompts = prompts["input_ids"]
        if hasattr(prompts, "ndim"):
            flat = prompts.ndim == 1
        else:
            flat = bool(prompts) and isinstance(prompts[0], int)
        if flat:  # a tokenizer that was given one text
            prompts = [prompts]
            attention_mask = None if attention_mask is None else [attention_mask]
    listed = hasattr(prompts, "__len__") and hasattr(prompts, "__iter__")
    if isinstance(prompts, str | bytes) or not listed or getattr(prompts, "ndim", 1) == 0:
        raise TypeError(
            f"{name}: expected a list of id sequences or a [B, P] tensor, "
            f"got {type(prompts).__name__}"
        )
    if not len(prompts):
        raise ValueError(f"{name}: expected at least one, got none")
    rows = [_ids(f"{name}[{row}]", prompt, vocab_size) for row, prompt in enumerate(prompts)]
    if attention_mask is None:
        return rows
    return _without_padding(rows, attention_mask)


def _without_padding(rows, attention_mask):
    """Each row's tokens where its mask is 1: one run, the padding on one side or both."""
    if not hasattr(attention_mask, "__len__") or len(attention_mask) != len(rows):
        raise ValueError(
            f"attention_mask: expected one row for each of {len(rows)} prompts, "
            f"got {getattr(attention_mask, 'shape', attention_mask)}"
        )
    found = []
    for row, (ids, mask) in enumerate(zip(rows, attention_mask, strict=True)):
        name = f"attention_mask[{row}]"
        seen = torch.as_tensor(mask, device="cpu")
        if seen.shape != ids.shape:
            raise ValueError(
                f"{name}: expected {len(ids)} entries, one for each id, got shape "
                f"{tuple(seen.shape)}"
            )
        if not ((seen == 0) | (seen == 1)).all():
            raise ValueError(f"{name}: expected 0 at padding and 1 elsewhere, got {mask}")
        (at,) = seen.nonzero(as_tuple=True)
        if not len(at):
            raise ValueError(f"{name}: expected at least one token that is no padding, got none")
        first, last = int(at[0]), int(at[-1])
        if last - first + 1 != len(at):
            raise ValueError(f"{name}: expected padding on either side, got some inside the text")
        found.append(ids[first : last + 1])
    return found


def _ids(name, prompt, vocab_size):
    if isinstance(prompt, str | bytes):
        raise TypeError(
            f"{name}: expected token ids, got {type(prompt).__name__}: tokenize the text first"
        )
    try:
        # A copy where numpy counts backwards, which no tensor can.
        ids = torch.as_tensor(prompt.copy() if hasattr(prompt, "strides") else prompt, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        if isinstance(prompt, list | tuple) and all(isinstance(token, int) for token in prompt):
            raise ValueError(
                f"{name}: expected ids in [0, {vocab_size}), got {max(prompt, key=abs)}"
            ) from None
        raise TypeError(
            f"{name}: expected a 1-D sequence of token ids, got {type(prompt).__name__}"
        ) from None
    if ids.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of {ids.layout}")
    if ids.ndim != 1 or not ids.numel():
        raise ValueError(
            f"{name}: expected a 1-D sequence of at least one token id, "
            f"got shape {tuple(ids.shape)}"
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name}: expected integer token ids, got {ids.dtype}")
    ids = ids.to(torch.int64)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.numel():
        raise ValueError(f"{name}: expected ids in [0, {vocab_size}), got {outside[0].item()}")
    return ids


def top_k(value: Any) -> int | None:
    """`value` as a number of tokens; None, 0 and -1 mean that the filter is off, as elsewhere."""
    if value is None:
        return None
    if integer("top_k", value, -1) < 1:
        return None
    return value


def sequence(name: str, ids: Any) -> list:
    """`ids` as a list, if they are a sequence."""
    if isinstance(ids, (str, bytes)) or not hasattr(ids, "__iter__"):
        raise TypeError(
            f"{name}: expected None or a sequence of token ids, got {type(ids).__name__}"
        )
    return list(ids)


def stop_tokens(stop_ids: Any, config: ModelConfig) -> tuple[int, ...]:
    """The ids that end a text: the model's own for None."""
    if stop_ids is None:
        return config.stop_ids
    ids = tuple(
        integer("stop_ids", token, 0, config.vocab_size - 1)
        for token in sequence("stop_ids", stop_ids)
    )
    if config.mask_id in ids:
        raise ValueError(f"stop_ids: expected ids other than the mask id {config.mask_id}")
    return ids


def check_policy(policy: object, cache: str) -> None:
    """TypeError unless `policy` is a CachePolicy; ValueError where it keeps the prompt's keys and
    there is no cache.
    """
    if not isinstance(policy, CachePolicy):
        raise TypeError(f"policy: expected a CachePolicy, got {policy!r}")
    if cache == "none" and policy.prompt_refreshes != 1:
        raise ValueError(
            f"policy: prompt_refreshes {policy.prompt_refreshes} needs cache prefix or dual, "
            "got none"
        )
