"""Tensors that old exporters wrote beside the weights though a model computes them: RoPE's
frequencies and tables, the positions. They may be in a checkpoint where they say what is computed.
"""

import torch

from .config import ModelConfig

# By the last part of a key.
FREQUENCIES = ("inv_freq", "original_inv_freq")
TABLES = ("cos_cached", "sin_cached")
POSITIONS = ("position_ids",)


def is_computed(name: str) -> bool:
    """Whether a key of a checkpoint names what a model computes."""
    return _kind(name) in FREQUENCIES + TABLES + POSITIONS


def wrong_buffer(name: str, held: torch.Tensor, config: ModelConfig) -> str | None:
    """What contradicts the config in the tensor that a checkpoint holds under that name, or None.

    inv_freq [D/2]: theta ** (-2 i / D). cos_cached, sin_cached [..., positions, D]: of the position
    times the frequencies, which come twice. position_ids [..., positions]: 0, 1, 2, ...
    """
    wanted = _computed(_kind(name), tuple(held.shape), config)
    if wanted is None:
        return f"the shape {tuple(held.shape)} is none that a model with this config.json has"
    rtol, atol = _tolerance(_kind(name), held.dtype)
    if torch.allclose(held.double(), wanted.expand(held.shape), rtol=rtol, atol=atol):
        return None
    return f"it is not what plain RoPE with base {config.rope_theta} computes"


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _computed(kind: str, shape: tuple[int, ...], config: ModelConfig) -> torch.Tensor | None:
    """What the model computes, float64, to be expanded to `shape`; None where it has another
    shape.
    """
    half = config.head_dim // 2
    frequency = config.rope_theta ** -(_count(half) / half)
    if kind in POSITIONS and shape:
        return _count(shape[-1])
    if kind in FREQUENCIES and shape[-1:] == (half,):
        return frequency
    if kind in TABLES and len(shape) > 1 and shape[-1] == config.head_dim:
        angle = torch.outer(_count(shape[-2]), frequency).repeat(1, 2)
        return angle.cos() if kind == "cos_cached" else angle.sin()
    return None


def _tolerance(kind: str, dtype: torch.dtype) -> tuple[float, float]:
    """(relative, absolute) error of what an exporter computed in fp32 and stored in `dtype`."""
    if kind in TABLES:
        return 0.0, 2**-6  # of an angle at a late position, and of bf16
    if kind in POSITIONS or not dtype.is_floating_point:
        return 0.0, 0.0
    precision = torch.finfo(dtype).eps
    # fp16 has steps of 2^-24 near 0, where the last frequencies lie.
    return max(1e-4, precision), 2**-24 if dtype == torch.float16 else 0.0


def _count(length: int) -> torch.Tensor:
    return torch.arange(length, dtype=torch.float64, device="cpu")
