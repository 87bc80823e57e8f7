"""ModelConfig: what a checkpoint's config.json says, in this project's names."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """The shape and the arithmetic of one masked diffusion transformer. Every value comes from the
    checkpoint.
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
    logit_shift: int  # the logits for position i come from the output at i - logit_shift
    rope_in_fp32: (
        bool  # False: cos and sin are cast to the model's dtype and the rotation runs in it
    )

    def __post_init__(self):
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
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads={self.num_heads}, got {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, got {self.head_dim}")
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{name}: expected a number above 0, got {value!r}")
        for name, token in [
            ("mask_id", self.mask_id),
            *(("stop_ids", stop) for stop in self.stop_ids),
        ]:
            if (
                isinstance(token, bool)
                or not isinstance(token, int)
                or not 0 <= token < self.vocab_size
            ):
                raise ValueError(f"{name}: expected ids in [0, {self.vocab_size}), got {token!r}")
