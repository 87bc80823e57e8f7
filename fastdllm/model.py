"""DiffusionTransformer: the one native model, for every family. Families differ only in
ModelConfig.
"""

import torch
from torch import nn

from fastdllm_kernels import linear_rms_norm, linear_swiglu, rms_norm
from fastdllm_kernels.attention import fastest_sdpa

from .attention import Attached, BlockAttention, RotaryTable
from .cache import KVCache
from .config import ModelConfig


class RMSNorm(nn.Module):
    """RMSNorm that takes in the product and the residual addition before it, since all read and
    write the same rows.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)

    def after(self, product: nn.Linear, x, residual):
        """(normalised product(x) + residual, product(x) + residual)."""
        return linear_rms_norm(x, product.weight, residual, self.weight, self.eps)


class TransformerLayer(nn.Module):
    """Pre-norm attention and SwiGLU; q/k/v are one product, and so are gate/up."""

    def __init__(self, config: ModelConfig, index: int, rotary: RotaryTable, attached: Attached):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = BlockAttention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            layer=index,
            rotary=rotary,
            attached=attached,
            qkv_bias=config.qkv_bias,
        )
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x, residual, next_norm: RMSNorm, at=None):
        """From x, normalised, and the residual to the same two for what follows, by its norm; at:
        of those tokens only.
        """
        x = self.attention.heads(x)
        if at is not None:
            x, residual = x.flatten(0, 1)[at], residual.flatten(0, 1)[at]
        x, residual = self.mlp_norm.after(self.attention.out, x, residual)
        return next_norm.after(self.down, linear_swiglu(x, self.gate_up.weight), residual)


class DiffusionTransformer(nn.Module):
    """A bidirectional transformer that fills masks: LLaDA's and Dream's architecture, chosen by
    `config`.

    Built with PyTorch's default initialisation; `fastdllm.load` builds it on the meta device and
    fills it from a checkpoint.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.attached = config, Attached()
        rotary = RotaryTable(
            config.rope_theta, config.head_dim, config.max_positions, config.rope_in_fp32
        )
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            TransformerLayer(config, i, rotary, self.attached) for i in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def attach(self, cache: KVCache | None) -> None:
        """Give every layer the cache whose span the next forwards work on; None takes it away."""
        self.attached.cache = cache

    def hidden_states(self, tokens: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
        """The last layer's output, normalised: tokens [R, T] int64 -> [R, T, hidden_size], or [...,
        hidden_size] of the tokens at [...] alone, counted through all rows, without what the last
        layer would compute for others.
        """
        residual = self.embedding(tokens)
        x = self.layers[0].attention_norm(residual)
        with fastest_sdpa(tokens):
            for layer, following in zip(self.layers, self.layers[1:], strict=False):
                x, residual = layer(x, residual, following.attention_norm)
            return self.layers[-1](x, residual, self.norm, at)[0]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits of the chosen rows only: hidden [..., hidden_size] -> [..., V]."""
        return self.lm_head(hidden)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """One plain full forward: tokens [B, L] int64 -> logits [B, L, V], row i predicting
        position i.

        Where the family's outputs are shifted (Dream), output i - 1 predicts position i and
        position 0 uses its own. ValueError for tokens of another shape or dtype, or longer than the
        positions the model has.
        """
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or not tokens.numel():
            raise ValueError(
                f"tokens: expected a non-empty [B, L] int64 tensor, got {tokens.dtype} {tuple(tokens.shape)}"
            )
        if tokens.shape[1] > self.config.max_positions:
            raise ValueError(
                f"tokens: expected at most {self.config.max_positions} positions, got {tokens.shape[1]}"
            )
        logits = self.head(self.hidden_states(tokens))
        shift = self.config.logit_shift
        return (
            torch.cat([logits[:, :shift], logits[:, : logits.shape[1] - shift]], dim=1)
            if shift
            else logits
        )


def initialize(model: DiffusionTransformer, seed: int, std: float = 0.02) -> DiffusionTransformer:
    """Draw every weight matrix from normal(0, std), reproducibly; norms are 1 and biases 0. For
    training and tests.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, std, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model
