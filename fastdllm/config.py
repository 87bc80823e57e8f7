"""ModelConfig: what a checkpoint's config.json says, in this project's names."""

import sys
from dataclasses import dataclass
from typing import Any

LARGEST = sys.float_info.max


@dataclass(frozen=True)
class ModelConfig:
    """The shape and the arithmetic of one masked diffusion transformer. Every value comes from the
    checkpoint.

    logit_shift: the logits for position i come from the output at i - logit_shift. rope_in_fp32:
    whether the rotation runs in fp32; otherwise cos and sin are cast to the model's dtype and it
    runs in that. ValueError naming the field for what describes no model.
    """

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    rms_norm_eps: float
    mask_id: int
    stop_ids: tuple[int, ...]
    qkv_bias: bool
    tie_embeddings: bool
    logit_shift: int
    rope_in_fp32: bool

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_numbers()
        self._check_tokens()

    def _check_sizes(self) -> None:
        for name in (
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
            "max_positions",
        ):
            value = getattr(self, name)
            if not _is_int(value) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads={self.num_heads}, "
                f"got {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, got {self.head_dim}")

    def _check_numbers(self) -> None:
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            is_number = _is_int(value) or isinstance(value, float)
            if not is_number or not 0 < value <= LARGEST:
                raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
        for name in ("qkv_bias", "tie_embeddings", "rope_in_fp32"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name}: expected true or false, got {value!r}")

    def _check_tokens(self) -> None:
        named = [("mask_id", self.mask_id), *(("stop_ids", stop) for stop in self.stop_ids)]
        for name, token in named:
            if not _is_int(token) or not 0 <= token < self.vocab_size:
                raise ValueError(f"{name}: expected ids in [0, {self.vocab_size}), got {token!r}")
        if self.mask_id in self.stop_ids:
            raise ValueError(
                f"stop_ids: expected ids other than the mask id, got {self.mask_id} for both"
            )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
