"""DiffusionTransformer: the one native model, for every family.

Families differ only in ModelConfig. A layer is four products with what surrounds them fused in
(`fastdllm_kernels.linear`, `pointwise`). Where somebody wrapped or hooked a module (bare.py), the
module is called instead.
"""

from typing import Any

import torch
from torch import nn

from fastdllm_kernels import linear_rms_norm, linear_swiglu, rms_norm, swiglu
from fastdllm_kernels.attention import fastest_sdpa

from .attention import Attached, BlockAttention, RotaryTable
from .bare import PLAIN, is_bare, is_bare_product, multiply
from .cache import KVCache
from .config import ModelConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; statistics in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] -> [..., size], in x's dtype."""
        return rms_norm(x, self.weight, self.eps)


def add_and_norm(
    norm: Any, residual: torch.Tensor, update: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(sum), sum) of sum = residual + update, both [..., C], in one pass over the rows."""
    if _is_bare_norm(norm):
        return rms_norm(update, norm.weight, norm.eps, residual)
    total = residual + update
    return norm(total), total


def multiply_add_and_norm(
    norm: Any, residual: torch.Tensor, product: Any, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_and_norm` of the update product(x), fused with the product; x [..., in]."""
    if is_bare_product(product) and _is_bare_norm(norm):
        return linear_rms_norm(x, product.weight, residual, norm.weight, norm.eps)
    return add_and_norm(norm, residual, multiply(product, x))


def _is_bare_norm(norm: nn.Module) -> bool:
    return type(norm) is RMSNorm and type(norm._parameters.get("weight")) in PLAIN and is_bare(norm)


class TransformerLayer(nn.Module):
    """A pre-norm layer: attention, then a SwiGLU MLP.

    Query, key and value are rows of one weight (`attention.qkv`), gate and up of another
    (`gate_up`), so that each pair or triple is one product.
    """

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

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        next_norm: nn.Module,
        at: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer takes the residual stream, and the stream normalised by its own
        `attention_norm`, and returns both for the layer that follows.

        x [R, T, C]: the normalised stream. residual [R, T, C]: the stream. next_norm: the norm of
        what follows, the next layer's attention_norm or the model's last norm; it is fused with
        this layer's last product. at [...] int64, or None: the tokens whose output is wanted,
        counted through all R * T; attention still reads every token, the rest is computed for
        these alone. Returns (next_norm(stream), stream), each [R, T, C], or [..., C] with `at`.
        """
        attention = self.attention
        fused = type(attention) is BlockAttention and is_bare(attention)
        x = attention.heads(x) if fused else attention(x)
        if at is not None:
            x, residual = x.flatten(0, 1)[at], residual.flatten(0, 1)[at]
        if fused:
            x, residual = multiply_add_and_norm(self.mlp_norm, residual, attention.out, x)
        else:
            x, residual = add_and_norm(self.mlp_norm, residual, x)
        return multiply_add_and_norm(next_norm, residual, self.down, self._gated(x))

    def _gated(self, x: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up: x [..., C] -> [..., I]."""
        if is_bare_product(self.gate_up):
            return linear_swiglu(x, self.gate_up.weight)
        return swiglu(multiply(self.gate_up, x))


class DiffusionTransformer(nn.Module):
    """A bidirectional transformer that fills masks: LLaDA's and Dream's architecture, chosen by
    `config`.

    Built with PyTorch's default initialisation; `fastdllm.load` builds it on the meta device and
    fills it from a checkpoint.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.attached = Attached()
        rotary = RotaryTable(
            config.rope_theta, config.head_dim, config.max_positions, config.rope_in_fp32
        )
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            TransformerLayer(config, index, rotary, self.attached)
            for index in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    def tie_head(self) -> None:
        """Make the head the embedding's weight again, where something gave it memory of its own."""
        self.lm_head.weight = self.embedding.weight

    @property
    def device(self) -> torch.device:
        """Where the weights lie; the embedding's come first."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are, in fp8 those that are not; the embedding's come first."""
        return next(self.parameters()).dtype

    def attach(self, cache: KVCache | None) -> None:
        """Give every layer the cache whose span the next forwards of this thread work on; None
        takes it away.
        """
        self.attached.cache = cache

    def check_layers(self) -> None:
        """ValueError naming the first layer that was put into the model and that this one's cache
        does not reach: none of this kind, another model's or a copy's, or one that is there twice.
        """
        layers: list[Any] = list(self.layers)
        if not layers:
            raise ValueError("model: expected a layer or more in model.layers, got none")
        numbers: dict[int, int] = {}
        for index, layer in enumerate(layers):
            if not hasattr(layer, "attention_norm"):
                raise ValueError(
                    f"model: expected a TransformerLayer in model.layers[{index}], "
                    f"got {type(layer).__name__}"
                )
            for module in layer.modules():
                if not isinstance(module, BlockAttention):
                    continue
                if module.attached is not self.attached:
                    raise ValueError(
                        f"model: expected layers that were built with it, got in "
                        f"model.layers[{index}] one of another model or a copy: copy its weights "
                        "with load_state_dict instead"
                    )
                first = numbers.setdefault(module.layer, index)
                if first != index:
                    raise ValueError(
                        f"model: expected layers with keys and values of their own, got one layer "
                        f"in model.layers[{first}] and model.layers[{index}]"
                    )

    def hidden_states(self, tokens: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
        """The last layer's output, normalised.

        tokens [R, T] int64 -> [R, T, hidden_size]. at [...] int64, or None: only the outputs of
        these tokens are wanted, counted through all R * T, and come as [..., hidden_size]; the
        last layer then computes little for the others.
        """
        layers: list[Any] = list(self.layers)
        residual = self.embedding(tokens)
        x = layers[0].attention_norm(residual)
        with fastest_sdpa(tokens):
            for layer, following in zip(layers, layers[1:], strict=False):
                x, residual = layer(x, residual, following.attention_norm)
            x, _ = layers[-1](x, residual, self.norm, at)
        return x

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits of the chosen rows only: hidden [..., hidden_size] -> [..., V]."""
        return self.lm_head(hidden)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """One plain full forward: tokens [B, L] int64 -> logits [B, L, V], row i predicting
        position i.

        Where the family's outputs are shifted (Dream), output i - 1 predicts position i and
        position 0 uses its own. TypeError for what is no tensor; ValueError for tokens of another
        shape or dtype, for more than the positions the model has, for ids outside its vocabulary
        (the host waits for these to be looked at), and for layers that are not the model's own.
        """
        self._check_tokens(tokens)
        if not torch.compiler.is_compiling():
            self.check_layers()
        outputs = self.head(self.hidden_states(tokens))
        shift, length = self.config.logit_shift, tokens.shape[1]
        if not shift:
            return outputs
        return torch.cat([outputs[:, :shift], outputs[:, : length - shift]], dim=1)

    def _check_tokens(self, tokens: torch.Tensor) -> None:
        if not isinstance(tokens, torch.Tensor):
            raise TypeError(f"tokens: expected a tensor, got {type(tokens).__name__}")
        if tokens.layout != torch.strided or tokens.is_nested:
            raise TypeError(f"tokens: expected a dense tensor, got one of {tokens.layout}")
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or not tokens.numel():
            raise ValueError(
                "tokens: expected a non-empty [B, L] int64 tensor, "
                f"got {tokens.dtype} {tuple(tokens.shape)}"
            )
        if tokens.shape[1] > self.config.max_positions:
            raise ValueError(
                f"tokens: expected at most {self.config.max_positions} positions, "
                f"got {tokens.shape[1]}"
            )
        if not _can_be_read(tokens):
            return
        low, high = (value.item() for value in tokens.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"tokens: expected ids in [0, {self.config.vocab_size}), "
                f"got {low if low < 0 else high}"
            )


def _can_be_read(tensor: torch.Tensor) -> bool:
    """Whether the host may look at what the tensor holds: not where a compiler traces, a CUDA
    graph captures, or nothing lies behind the tensor.
    """
    if torch.compiler.is_compiling() or tensor.is_meta or type(tensor) is not torch.Tensor:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


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
