"""replace_attention(): our attention inside a model that somebody else built, and the way back.

One method per layer is set on the instance and taken off again; the user's own projections, norms
and MLPs run, whatever they are wrapped in, and what is a plain linear, RMSNorm or SwiGLU by this
project's ops (replaced.py). An Adapter beside the model offers what `generate` asks, so no
attribute of the model changes meaning.
"""

import logging
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional

from fastdllm_kernels.attention import fastest_sdpa

from .arguments import choice, sequence
from .attention import Attached, RotaryTable, attend
from .cache import KVCache
from .config import ModelConfig
from .families import FAMILIES
from .graph import side_stream
from .replaced import Replaced, speed_up

log = logging.getLogger(__name__)
ADAPTER = "fastdllm_adapter"  # the attribute of the model where `generate` finds the Adapter


@dataclass(frozen=True)
class Structure:
    """Where a modeling file keeps its parts: dotted paths from the model; in a layer, from the
    layer. Defaults: transformers'.

    owner: the module whose `method` is the attention ("" is the layer). outputs: the length of the
    tuple it returns. fields: the family whose config keys the model uses. family: whose weights it
    is taken to hold.
    """

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    owner: str = "self_attn"
    method: str = "forward"
    out: str = "o_proj"
    outputs: int = 2
    fields: str = "Dream"
    family: str = "Dream"


_LLADA = Structure(
    embedding="model.transformer.wte",
    layers="model.transformer.blocks",
    norm="model.transformer.ln_f",
    head="model.transformer.ff_out",
    owner="",
    method="attention",
    out="attn_out",
    fields="llada",
    family="llada",
)
# By config.model_type. LLaDA's layers are Llama's and Dream's are Qwen2's, hence whose weights
# those are taken to hold.
STRUCTURES = {
    "llada": _LLADA,
    "Dream": Structure(outputs=3),
    "llama": Structure(family="llada"),
    "qwen2": Structure(),
}


class LayerAttention:
    """One layer's replaced attention: the user's projections around this project's rotation, cache
    and kernels.
    """

    def __init__(
        self,
        owner: nn.Module,
        structure: Structure,
        head_dim,
        layer,
        rotary: RotaryTable,
        attached: Attached,
    ):
        self.owner, self.structure, self.head_dim, self.layer = owner, structure, head_dim, layer
        self.rotary, self.attached = rotary, attached

    def attention(self, q, k, v, *_, layer_past=None, use_cache=False, **__):
        """LLaDA's method: q, k, v [R, T, width] -> (output, (k, v) before rotation [R, HK, T, D],
        or None).
        """
        if layer_past is not None:
            raise ValueError(
                "layer_past: a replaced model keeps its keys and values in fastdllm.generate alone"
            )
        present = (
            tuple(x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (k, v))
            if use_cache
            else None
        )
        return self._output(q, k, v), present

    def forward(self, hidden_states, *_, attention_mask=None, position_ids=None, **__):
        """self_attn.forward: [R, T, hidden_size] -> (output, None) or (output, None, None): no
        weights, no past.
        """
        if self.layer == 0 and self.attached.cache is None:
            _refuse_padding(attention_mask, position_ids)
        return self._output(*self._projected(hidden_states)), *[None] * (self.structure.outputs - 1)

    def _projected(self, x):
        """q, k and v; in a graph they run beside each other, for one alone leaves most of the GPU
        idle.
        """
        owner = self.owner
        if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return owner.q_proj(x), owner.k_proj(x), owner.v_proj(x)
        main, sides = (
            torch.cuda.current_stream(x.device),
            [side_stream(x.device, index) for index in (1, 2)],
        )
        for side in sides:
            side.wait_stream(main)
        with torch.cuda.stream(sides[0]):
            k = owner.k_proj(x)
        with torch.cuda.stream(sides[1]):
            v = owner.v_proj(x)
        q = owner.q_proj(x)
        for (
            side
        ) in sides:  # what they free may be used again: they wait for this stream before they go on
            main.wait_stream(side)
        return q, k, v

    def _output(self, q, k, v):
        if self.attached.cache is None and q.shape[1] > self.rotary.positions:
            raise ValueError(
                f"input_ids: expected at most {self.rotary.positions} positions, got {q.shape[1]}"
            )
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        out = attend(q, k, v, self.rotary, self.attached.cache, self.layer).flatten(2)
        return getattr(self.owner, self.structure.out)(out)


class Adapter:
    """What `generate` asks of a model, told about one whose attention is replaced. No module: the
    model's own tree stays.
    """

    def __init__(self, model: nn.Module, structure: Structure, config: ModelConfig):
        self.model, self.structure, self.config, self.attached = (
            model,
            structure,
            config,
            Attached(),
        )
        rotary = RotaryTable(
            config.rope_theta, config.head_dim, config.max_positions, config.rope_in_fp32
        )
        attentions = [
            LayerAttention(
                _find(layer, structure.owner),
                structure,
                config.head_dim,
                index,
                rotary,
                self.attached,
            )
            for index, layer in enumerate(self._part("layers"))
        ]
        method = structure.method
        self.replaced = [
            Replaced(attention.owner, method, getattr(attention, method))
            for attention in attentions
        ]
        self.replaced += speed_up(self._part("layers"), self._part("norm"))
        # transformers 5 drops this key from LLaDA's config, and LLaDA's forward reads it.
        self.lent_use_cache = not hasattr(model.config, "use_cache")
        if self.lent_use_cache:
            model.config.use_cache = False
            log.warning(
                "replace_attention: model.config has no use_cache; set to False until restore_attention"
            )

    def _part(self, name):
        """Looked up each time: the user may wrap a module after its attention was replaced."""
        return _find(self.model, getattr(self.structure, name))

    @property
    def device(self) -> torch.device:
        return self._part("embedding").weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._part("embedding").weight.dtype

    def modules(self):
        return self.model.modules()

    def attach(self, cache: KVCache | None) -> None:
        self.attached.cache = cache

    def hidden_states(self, tokens: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
        """Through the user's layers but not their outer forward, which may run the vocabulary head
        on every row.
        """
        x = self._part("embedding")(tokens)
        with fastest_sdpa(tokens):
            for layer in self._part("layers"):
                x = layer(x)
                x = x[0] if isinstance(x, tuple) else x
        return self._part("norm")(x if at is None else x.flatten(0, 1)[at])

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        head = self._part("head")
        return (
            functional.linear(hidden, self._part("embedding").weight)
            if head is None
            else head(hidden)
        )

    def restore(self) -> None:
        for replaced in self.replaced:
            replaced.restore()
        if self.lent_use_cache:
            vars(self.model.config).pop("use_cache", None)


def replace_attention(model: nn.Module, *, family=None, mask_id=None, stop_ids=None) -> nn.Module:
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

    Outside `generate` the model's forward is one plain full forward, never causal and without
    attention dropout; padding, position_ids and a past raise ValueError (what LLaDA's code is given
    for a mask is not looked at). RoPE is computed anew (transformers 5 leaves Dream's table
    uninitialised). LLaDA's code reads config.use_cache, which transformers 5 drops: it is set to
    False and that is logged; where else that code does not fit transformers 5 is out of reach here.

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
    structure = _structure(base)
    config = _config(
        base, structure, structure.family if family is None else family, mask_id, stop_ids
    )
    restore_attention(base)
    setattr(base, ADAPTER, Adapter(base, structure, config))
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


def _base(model):
    """The model inside PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _find(root, path):
    """The attribute at a dotted path, None where there is none; an empty path is the root."""
    for name in path.split(".") if path else ():
        root = getattr(root, name, None)
    return root


def _structure(model) -> Structure:
    """The structure of the model, every name of it checked; ValueError naming what is not there."""
    model_type = getattr(model.config, "model_type", None)
    if model_type not in STRUCTURES:
        known = ", ".join(f"{name} ({structure.layers})" for name, structure in STRUCTURES.items())
        raise ValueError(
            f"model: {type(model).__name__} with model_type {model_type!r} is not known; looked for {known}"
        )
    structure = STRUCTURES[model_type]
    paths = [structure.embedding, structure.layers, structure.norm]
    if (
        structure is not _LLADA or not model.config.weight_tying
    ):  # a tied LLaDA has no module for its head
        paths.append(structure.head)
    for index in range(len(_find(model, structure.layers) or ())):
        owner = ".".join(filter(None, (structure.layers, str(index), structure.owner)))
        paths += [
            f"{owner}.{name}"
            for name in ("q_proj", "k_proj", "v_proj", structure.out, structure.method)
        ]
    missing = [path for path in paths if _find(model, path) is None]
    if missing:
        raise ValueError(
            f"model: {type(model).__name__} is not {model_type} as published: no {', '.join(missing)}"
        )
    return structure


def _config(model, structure, family, mask_id, stop_ids) -> ModelConfig:
    """The ModelConfig that the model's own config and the caller's values describe."""
    choice("family", family, tuple(sorted(FAMILIES)))
    raw = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(vars(model.config))
    rope = raw.pop("rope_parameters", None) or {}  # transformers 5 keeps the base in there
    raw |= rope if rope.get("rope_type", "default") == "default" else {"rope_scaling": rope}
    raw["mask_token_id"] = raw.get("mask_token_id") if mask_id is None else mask_id
    raw["eos_token_id"] = (
        raw.get("eos_token_id") if stop_ids is None else sequence("stop_ids", stop_ids)
    )
    try:
        config = FAMILIES[structure.fields].config(
            {key: value for key, value in raw.items() if value is not None}
        )
    except ValueError as error:
        hint = (
            " (pass mask_id= and stop_ids= where the config has no ids)"
            if "_token_id" in str(error)
            else ""
        )
        raise ValueError(str(error).replace("config.json", "model.config") + hint) from None
    return replace(
        config,
        num_layers=len(_find(model, structure.layers)),
        family=family,
        **FAMILIES[family].fixed,
    )


def _refuse_padding(attention_mask, position_ids):
    """ValueError where a forward outside `generate` asks for more than full attention from position
    0 on.
    """
    if isinstance(attention_mask, torch.Tensor):
        # A causal mask is what transformers' classes make of none: its last row shows which keys
        # are padding.
        last = attention_mask if attention_mask.ndim == 2 else attention_mask[..., -1, :]
        visible = last == 0 if last.is_floating_point() else last.bool()
        if not visible.all():
            raise ValueError(
                "attention_mask: a replaced model's forward takes no padding; fastdllm.generate takes ragged rows"
            )
    if (
        position_ids is not None
        and (position_ids != torch.arange(position_ids.shape[-1], device=position_ids.device)).any()
    ):
        raise ValueError(
            "position_ids: a replaced model's forward starts at position 0 and takes no past"
        )
