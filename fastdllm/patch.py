"""replace_attention(): our attention inside a model that somebody else built, and the way back.

One method per layer is set on the instance and taken off again; the user's own projections, norms
and MLPs run, whatever they are wrapped in, and what is a plain linear, RMSNorm or SwiGLU by this
project's ops (replaced.py). The model's own forward stays, behind a look at what it is called with
(guard.py). An Adapter beside the model offers what `generate` asks, so no attribute of the model
changes meaning.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fastdllm_kernels.attention import fastest_sdpa

from . import guard
from .arguments import choice, sequence
from .attention import Attached, RotaryTable, attend
from .cache import KVCache
from .config import ModelConfig
from .families import FAMILIES, MODELING_FILES, Family, ModelingFile
from .graph import side_stream
from .replaced import Replaced, speed_up

log = logging.getLogger(__name__)
ADAPTER = "fastdllm_adapter"  # the attribute of the model where `generate` finds the Adapter


class LayerAttention:
    """One layer's replaced attention: the user's projections around this project's rotation, cache
    and kernels.
    """

    def __init__(
        self,
        owner: nn.Module,
        file: ModelingFile,
        head_dim: int,
        layer: int,
        rotary: RotaryTable,
        attached: Attached,
        checked: guard.Checked,
    ):
        self.owner = owner
        self.file = file
        self.head_dim = head_dim
        self.layer = layer
        self.rotary = rotary
        self.attached = attached
        self.checked = checked
        self.names = guard.parameters_of(owner, file.attention_method)

    def attention(self, *args: Any, **options: Any) -> tuple:
        """LLaDA's method: q, k, v [R, T, width] -> (output, (k, v) before rotation [R, HK, T, D],
        or None without use_cache).
        """
        given = self._checked(args, options)
        q, k, v = given["q"], given["k"], given["v"]
        present = None
        if given.get("use_cache"):
            present = tuple(x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (k, v))
        return self._output(q, k, v), present

    def forward(self, *args: Any, **options: Any) -> tuple:
        """self_attn.forward: hidden_states [R, T, hidden_size] -> (output, None), or (output, None,
        the past as it came): there are no attention weights, and nothing is added to a past.
        """
        given = self._checked(args, options)
        output = self._output(*self._projected(given["hidden_states"]))
        if self.file.attention_outputs == 2:
            return output, None
        return output, None, given.get("past_key_value")

    def _checked(self, args: tuple, options: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name; looked at where the model's own forward did not come before."""
        given = guard.named(self.names, args, options)
        if self.attached.cache is None and not self.checked.inside:
            file = self.file
            guard.refuse(given, causal=file.causal_by_default, returns_past=file.returns_past)
        return given

    def _projected(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v; in a graph they run beside each other, for one alone leaves most of the GPU
        idle.
        """
        owner: Any = self.owner
        if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return owner.q_proj(x), owner.k_proj(x), owner.v_proj(x)
        main = torch.cuda.current_stream(x.device)
        beside_k, beside_v = (side_stream(x.device, index) for index in (1, 2))
        for side in (beside_k, beside_v):
            side.wait_stream(main)
        with torch.cuda.stream(beside_k):
            k = owner.k_proj(x)
        with torch.cuda.stream(beside_v):
            v = owner.v_proj(x)
        q = owner.q_proj(x)
        # What they free may be used again: they wait for this stream before they go on.
        for side in (beside_k, beside_v):
            main.wait_stream(side)
        return q, k, v

    def _output(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.attached.cache is None and q.shape[1] > self.rotary.positions:
            raise ValueError(
                f"input_ids: expected at most {self.rotary.positions} positions, got {q.shape[1]}"
            )
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        out = attend(q, k, v, self.rotary, self.attached.cache, self.layer).flatten(2)
        return getattr(self.owner, self.file.attention_out)(out)


class GuardedForward(Replaced):
    """The forward of a replaced model, or of the model inside it that holds the layers: what
    replaced attention does not honour is refused, then the model's own forward runs.
    """

    def __init__(self, model: nn.Module, file: ModelingFile, checked: guard.Checked):
        self.file = file
        self.checked = checked
        super().__init__(model, "forward", self.forward)
        self.names = guard.parameters_of(model, "forward")

    def forward(self, *args: Any, **options: Any) -> Any:
        """The model's own forward; ValueError, before any work, for what it would not honour."""
        if self.checked.inside:
            return self.original(*args, **options)
        given = guard.named(self.names, args, options)
        guard.refuse(given, causal=False, returns_past=self.file.returns_past)
        self._check_settings()
        self.checked.inside = True
        try:
            return self.original(*args, **options)
        finally:
            self.checked.inside = False

    def _check_settings(self) -> None:
        """ValueError for what the model's config asks of every forward and replaced attention has
        not.
        """
        config = self.module.config
        if getattr(config, "output_attentions", False):
            raise ValueError("output_attentions: replaced attention returns no weights")
        dropout = getattr(config, "attention_dropout", 0)
        if self.module.training and dropout:
            raise ValueError(
                f"attention_dropout: replaced attention has none, and the config has {dropout}: "
                "call model.eval() or set it to 0"
            )


class Adapter:
    """What `generate` asks of a model, told about one whose attention is replaced. No module: the
    model's own tree stays.
    """

    def __init__(self, model: nn.Module, file: ModelingFile, config: ModelConfig):
        self.model = model
        self.file = file
        self.config = config
        self.attached = Attached()
        self.checked = guard.Checked()
        self.replaced: list[Replaced] = [*self._attentions(), *self._forwards()]
        self.replaced += speed_up(self._part("layers"), self._part("norm"))
        # transformers 5 drops this key from LLaDA's config, and LLaDA's forward reads it.
        their_config: Any = model.config
        self.lent_use_cache = not hasattr(their_config, "use_cache")
        if self.lent_use_cache:
            their_config.use_cache = False
            log.warning(
                "replace_attention: model.config has no use_cache; set to False until "
                "restore_attention"
            )

    def _attentions(self) -> Iterator[Replaced]:
        """The layers' attention methods, replaced."""
        file, config = self.file, self.config
        rotary = RotaryTable(
            config.rope_theta, config.head_dim, config.max_positions, config.rope_in_fp32
        )
        for index, layer in enumerate(self._part("layers")):
            owner = _find(layer, file.attention_owner)
            attention = LayerAttention(
                owner, file, config.head_dim, index, rotary, self.attached, self.checked
            )
            method = getattr(attention, file.attention_method)
            yield Replaced(owner, file.attention_method, method)

    def _forwards(self) -> Iterator[Replaced]:
        """The forwards of the model and of the model inside it, guarded."""
        for path in ("", self.file.inner):
            yield GuardedForward(_find(self.model, path), self.file, self.checked)

    def _part(self, name: str) -> Any:
        """Looked up each time: the user may wrap a module after its attention was replaced."""
        return _find(self.model, getattr(self.file, name))

    @property
    def device(self) -> torch.device:
        """Where the model's embedding lies."""
        return self._part("embedding").weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's embedding."""
        return self._part("embedding").weight.dtype

    def modules(self) -> Iterator[nn.Module]:
        """The user's modules."""
        return self.model.modules()

    def attach(self, cache: KVCache | None) -> None:
        """Give every layer the cache whose span the next forwards of this thread work on; None
        takes it away.
        """
        self.attached.cache = cache

    def hidden_states(self, tokens: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
        """The last layer's output, normalised: tokens [R, T] int64 -> [R, T, hidden_size], or [...,
        hidden_size] of the tokens at [...] alone, counted through all rows.

        Through the user's layers but not their outer forward, which may run the vocabulary head on
        every row.
        """
        x = self._part("embedding")(tokens)
        with fastest_sdpa(tokens):
            for layer in self._part("layers"):
                x = layer(x)
                x = x[0] if isinstance(x, tuple) else x
        return self._part("norm")(x if at is None else x.flatten(0, 1)[at])

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits: hidden [..., hidden_size] -> [..., V]."""
        head = self._part("head")
        if head is None:  # a tied LLaDA has no module for it
            return functional.linear(hidden, self._part("embedding").weight)
        return head(hidden)

    def restore(self) -> None:
        """Take out of the model what this put in."""
        for replaced in self.replaced:
            replaced.restore()
        if self.lent_use_cache:
            vars(self.model.config).pop("use_cache", None)


def replace_attention(
    model: nn.Module,
    *,
    family: str | None = None,
    mask_id: int | None = None,
    stop_ids: Sequence[int] | None = None,
) -> nn.Module:
    """Replace the attention of somebody else's model in place; returns the same model, ready for
    `fastdllm.generate`.

    model: LLaDA's or Dream's published modeling code, or transformers' LlamaForCausalLM or
    Qwen2ForCausalLM with either's weights (told by config.model_type and the names inside), bare or
    inside PEFT, on one device. family: "llada" or "Dream", whose weights these are: it decides the
    shift of the logits, the arithmetic of RoPE and how proposals are scored; default LLaDA for
    Llama and Dream for Qwen2, whose layers those are. mask_id, stop_ids: default
    config.mask_token_id (transformers' own classes have none) and config.eos_token_id.

    The model's own projections are called, quantised or LoRA-wrapped ones too. In the layers and
    the last norm, every module that is an nn.Linear and no subclass, and what proves on a probe to
    be an RMSNorm or a SwiGLU MLP, computes its forward by the ops of `fastdllm_kernels` from its
    own parameters, unless its instance has a forward already; hooks run.

    Outside `generate` the model's forward is one plain full forward of all tokens from position 0
    on, never causal. ValueError, before any work, for an argument that it would not honour: a past,
    filled or not, and use_cache=True (LLaDA's code returns its keys and values; no forward takes
    them back), any mask that hides a token, other positions, attention weights, attention dropout
    in training mode. RoPE is computed anew (transformers 5 leaves Dream's table uninitialised).
    LLaDA's code reads config.use_cache, which transformers 5 drops: it is set to False and that is
    logged; where else that code does not fit transformers 5 is out of reach here.

    Replacing twice is replacing once; with other keywords, the last ones hold. TypeError for what
    is no module with a config; ValueError, before anything changes, for a model that is not known,
    naming what was looked for, and for a config that lacks a value or asks for other maths.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(
            f"model: expected a torch.nn.Module with a config, got {type(model).__name__}"
        )
    base = _base(model)
    if hasattr(base, ADAPTER) and family is None and mask_id is None and stop_ids is None:
        return model
    default, file = _modeling_file(base)
    config = _config(base, file, default.name if family is None else family, mask_id, stop_ids)
    restore_attention(base)
    setattr(base, ADAPTER, Adapter(base, file, config))
    return model


def restore_attention(model: nn.Module) -> nn.Module:
    """Take out what `replace_attention` put in; returns the model, computing what it did before, to
    the bit.

    A model whose attention is not replaced comes back as it is.
    """
    base = _base(model)
    if hasattr(base, ADAPTER):
        getattr(base, ADAPTER).restore()
        delattr(base, ADAPTER)
    return model


def _base(model: Any) -> Any:
    """The model inside PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _find(root: Any, path: str) -> Any:
    """The attribute at a dotted path, None where there is none; an empty path is the root."""
    for name in path.split(".") if path else ():
        root = getattr(root, name, None)
    return root


def _modeling_file(model: Any) -> tuple[Family, ModelingFile]:
    """The modeling file that the model is built by, every name of it checked, and the family whose
    weights it is taken to hold; ValueError naming what is not there.
    """
    model_type = getattr(model.config, "model_type", None)
    if model_type not in MODELING_FILES:
        known = ", ".join(f"{name} ({file.layers})" for name, (_, file) in MODELING_FILES.items())
        raise ValueError(
            f"model: {type(model).__name__} with model_type {model_type!r} is not known; "
            f"looked for {known}"
        )
    family, file = MODELING_FILES[model_type]
    paths = [file.inner, file.embedding, file.layers, file.norm]
    tied = getattr(model.config, FAMILIES[file.config_family].key_of("tie_embeddings"), False)
    if not tied:  # a tied LLaDA has no module for its head
        paths.append(file.head)
    parts = ("q_proj", "k_proj", "v_proj", file.attention_out, file.attention_method)
    for index in range(len(_find(model, file.layers) or ())):
        owner = ".".join(filter(None, (file.layers, str(index), file.attention_owner)))
        paths += [f"{owner}.{part}" for part in parts]
    missing = [path for path in paths if _find(model, path) is None]
    if missing:
        raise ValueError(
            f"model: {type(model).__name__} is not {model_type} as published: "
            f"no {', '.join(missing)}"
        )
    return family, file


def _config(
    model: Any,
    file: ModelingFile,
    family: str,
    mask_id: int | None,
    stop_ids: Sequence[int] | None,
) -> ModelConfig:
    """The ModelConfig that the model's own config and the caller's values describe."""
    choice("family", family, tuple(sorted(FAMILIES)))
    theirs = model.config
    raw = theirs.to_dict() if hasattr(theirs, "to_dict") else dict(vars(theirs))
    if mask_id is not None:
        raw["mask_token_id"] = mask_id
    if stop_ids is not None:
        raw["eos_token_id"] = sequence("stop_ids", stop_ids)
    try:
        config = FAMILIES[file.config_family].config(raw, source="model.config")
    except ValueError as error:
        if "_token_id" not in str(error):
            raise
        raise ValueError(
            f"{error} (pass mask_id= and stop_ids= where the config has no ids)"
        ) from None
    return replace(
        config,
        num_layers=len(_find(model, file.layers)),
        family=family,
        **FAMILIES[family].fixed,
    )
