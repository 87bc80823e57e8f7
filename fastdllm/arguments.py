"""generate()'s arguments, checked before any work is done: every error names the argument, what was
expected and what came.
"""

import torch

from fastdllm_kernels import Factor, Quota, Threshold
from fastdllm_kernels.checks import choice, integer, number

from .cache import CachePolicy

__all__ = [
    "CACHES",
    "check_policy",
    "check_rule",
    "choice",
    "integer",
    "number",
    "prompt_ids",
    "sequence",
    "stop_tokens",
]

CACHES = ("none", "prefix", "dual")


def prompt_ids(prompts, vocab_size: int) -> list[torch.Tensor]:
    """The prompts as 1-D int64 CPU tensors, none empty, every id inside the vocabulary."""
    if (
        isinstance(prompts, (str, bytes))
        or not hasattr(prompts, "__len__")
        or not hasattr(prompts, "__iter__")
    ):
        raise TypeError(
            f"prompts: expected a list of id sequences or a [B, P] tensor, got {type(prompts).__name__}"
        )
    if not len(prompts):
        raise ValueError("prompts: expected at least one, got none")
    return [_ids(f"prompts[{row}]", prompt, vocab_size) for row, prompt in enumerate(prompts)]


def _ids(name, prompt, vocab_size):
    if isinstance(prompt, (str, bytes)):
        raise TypeError(
            f"{name}: expected token ids, got {type(prompt).__name__}: tokenize the text first"
        )
    try:
        ids = torch.as_tensor(prompt, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name}: expected a 1-D sequence of token ids, got {type(prompt).__name__}"
        ) from None
    if ids.ndim != 1 or not ids.numel():
        raise ValueError(
            f"{name}: expected a 1-D sequence of at least one token id, got shape {tuple(ids.shape)}"
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name}: expected integer token ids, got {ids.dtype}")
    ids = ids.to(torch.int64)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.numel():
        raise ValueError(f"{name}: expected ids in [0, {vocab_size}), got {outside[0].item()}")
    return ids


def sequence(name, ids) -> list:
    """`ids` as a list, if they are a sequence."""
    if isinstance(ids, (str, bytes)) or not hasattr(ids, "__iter__"):
        raise TypeError(
            f"{name}: expected None or a sequence of token ids, got {type(ids).__name__}"
        )
    return list(ids)


def stop_tokens(stop_ids, config) -> tuple[int, ...]:
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


def check_rule(rule, rows: int) -> None:
    """TypeError unless `rule` is one of ours or a function; ValueError for a per-row parameter of
    another length.
    """
    if type(rule) not in (Threshold, Factor, Quota):  # a subclass's commit would not be called
        if not callable(rule) or isinstance(rule, type):
            raise TypeError(f"rule: expected Threshold, Factor, Quota or a function, got {rule!r}")
        return
    for name, value in vars(rule).items():
        if isinstance(value, torch.Tensor) and value.shape != (rows,):
            raise ValueError(
                f"rule: expected {name} with one entry for each of {rows} prompts, got {tuple(value.shape)}"
            )


def check_policy(policy, cache: str) -> None:
    """TypeError unless `policy` is a CachePolicy; ValueError where it keeps the prompt's keys and
    there is no cache.
    """
    if not isinstance(policy, CachePolicy):
        raise TypeError(f"policy: expected a CachePolicy, got {policy!r}")
    if cache == "none" and policy.prompt_refreshes != 1:
        raise ValueError(
            f"policy: prompt_refreshes {policy.prompt_refreshes} needs cache prefix or dual, got none"
        )
