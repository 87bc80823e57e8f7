"""Family: one published architecture as data, and how its config.json becomes a ModelConfig and
back. ModelingFile: where code that holds such weights keeps its parts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import ModelConfig

# Settings that would change the maths, in any family, with the only values this model computes.
UNSUPPORTED: Mapping[str, tuple] = {
    "alibi": (False, None),
    "attention_layer_norm": (False, None),
    "input_emb_norm": (False, None),
    "scale_logits": (False, None),
    "use_sliding_window": (False, None),
    "use_mrope": (False, None),
    "clip_qkv": (None,),
    "hidden_act": ("silu", None),
    "activation_type": ("silu", None),
    "partial_rotary_factor": (1.0, None),
}
FULL_ATTENTION = "full_attention"
# Where a config says how positions turn: transformers 5's name, and the older one.
ROPE_KEYS = ("rope_parameters", "rope_scaling")
PLAIN_ROPE: Mapping[str, tuple] = {
    "rope_type": ("default", None),
    "type": ("default", None),
    "partial_rotary_factor": (1.0, None),
}


@dataclass(frozen=True)
class ModelingFile:
    """Where a modeling file keeps its parts: dotted paths from the model; in a layer, from the
    layer. Defaults: what transformers' Llama, Qwen2 and what was made after them have.

    config_family: the family in whose words the model's config is written. inner: the model that
    holds the layers and has a forward of its own. embedding, layers, norm, head: its parts.
    attention_owner: the module of a layer whose `attention_method` is the attention; "" is the
    layer itself. attention_out: the owner's output projection. attention_outputs: how many values
    the method returns, the output first. returns_past: whether the method returns keys and values
    where it is called with use_cache. causal_by_default: whether the model's own code makes a
    causal mask where it is given none.
    """

    config_family: str
    inner: str = "model"
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    attention_owner: str = "self_attn"
    attention_method: str = "forward"
    attention_out: str = "o_proj"
    attention_outputs: int = 2
    returns_past: bool = False
    causal_by_default: bool = False


@dataclass(frozen=True)
class Family:
    """One architecture.

    name: config.json's model_type. fields: ModelConfig field -> config.json key, or (key, fallback
    key). fixed: ModelConfig fields that the architecture decides. refused: config keys that would
    change the maths -> the values that do not. keys: our parameter name -> the published names
    whose rows it stacks; `{i}` is the layer. bias_keys: the same, where qkv_bias is set.
    end_tokens: texts of further end-of-text tokens, looked up in the checkpoint's
    tokenizer_config.json. architecture: what `save` writes into config.json beside the fields.
    qkv_bias: whether q, k and v have biases, or the config key that says so. filtered_score: scores
    are taken after temperature and top-p/top-k filtering, as the family's own sampler does, not
    under the clean softmax. tokenizer_type: transformers' name for the tokenizer of a checkpoint
    that has no tokenizer.json; None: its files say it. modeling: the modeling files that hold such
    weights, by their config's model_type.
    """

    name: str
    fields: Mapping[str, str | tuple[str, str]]
    fixed: Mapping[str, Any]
    refused: Mapping[str, tuple]
    keys: Mapping[str, tuple[str, ...]]
    bias_keys: Mapping[str, tuple[str, ...]]
    end_tokens: tuple[str, ...]
    architecture: Mapping[str, Any]
    qkv_bias: str | bool
    filtered_score: bool
    tokenizer_type: str | None
    modeling: Mapping[str, ModelingFile]

    def config(
        self,
        raw: Mapping[str, Any],
        extra_stop_ids: tuple[int, ...] = (),
        source: str = "config.json",
    ) -> ModelConfig:
        """The ModelConfig that `raw`, a config.json, describes.

        extra_stop_ids: further ids that end a text. source: what errors call the config. ValueError
        naming the keys that are missing, contradict each other or ask for other maths.
        """
        raw = _with_rope_base(raw, source)
        wrong = self._other_maths(raw)
        if wrong:
            raise ValueError(f"{source}: {self.name} is not computed with {', '.join(wrong)}")
        values = self._values(raw, source)
        hidden, heads = values["hidden_size"], values["num_heads"]
        if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1 or hidden % heads:
            raise ValueError(
                f"{source}: the width {hidden!r} is no multiple of the number of heads {heads!r}"
            )
        head_dim = hidden // heads
        if raw.get("head_dim") not in (None, head_dim):
            raise ValueError(
                f"{source}: head_dim={raw['head_dim']!r} is not width / heads = {head_dim}"
            )
        qkv_bias: Any = self.qkv_bias
        if isinstance(qkv_bias, str):
            qkv_bias = raw.get(qkv_bias) or False
        stops = values.pop("stop_ids")
        stops = tuple(stops) if isinstance(stops, (list, tuple)) else (stops,)
        extra = tuple(token for token in extra_stop_ids if token not in stops)
        values |= {"qkv_bias": qkv_bias, "head_dim": head_dim, "stop_ids": stops + extra}
        try:
            return ModelConfig(family=self.name, **values, **self.fixed)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def _other_maths(self, raw: Mapping[str, Any]) -> list[str]:
        """key=value of everything in the config that would change the maths."""
        refused = {**UNSUPPORTED, **self.refused}
        # An older Qwen-style config keeps a window size beside use_sliding_window: false.
        if raw.get("use_sliding_window") is not False:
            refused["sliding_window"] = (None,)
        wrong = [key for key, allowed in refused.items() if raw.get(key) not in (*allowed, None)]
        kinds = raw.get("layer_types") or ()
        if not isinstance(kinds, (list, tuple)) or set(kinds) - {FULL_ATTENTION}:
            wrong.append("layer_types")
        return [f"{key}={raw[key]!r}" for key in wrong]

    def _values(self, raw: Mapping[str, Any], source: str) -> dict[str, Any]:
        """ModelConfig field -> what the config says for it."""
        values, missing = {}, []
        for field, names in self.fields.items():
            keys = (names,) if isinstance(names, str) else names
            given = [raw[key] for key in keys if raw.get(key) is not None]
            if given:
                values[field] = given[0]
            else:
                missing.append(" or ".join(keys))
        if missing:
            raise ValueError(f"{source}: missing {', '.join(missing)}")
        return values

    def raw_config(self, config: ModelConfig) -> dict[str, Any]:
        """config.json for `config`, with the family's own keys."""
        raw: dict[str, Any] = {"model_type": self.name, **self.architecture}
        for field in self.fields:
            raw[self.key_of(field)] = getattr(config, field)
        if isinstance(self.qkv_bias, str):
            raw[self.qkv_bias] = config.qkv_bias
        stops = config.stop_ids
        raw[self.key_of("stop_ids")] = stops[0] if len(stops) == 1 else list(stops)
        return raw

    def key_of(self, field: str) -> str:
        """The config.json key that is written for a ModelConfig field."""
        names = self.fields[field]
        return names if isinstance(names, str) else names[0]

    def published_names(self, config: ModelConfig) -> dict[str, tuple[str, ...]]:
        """Our parameter name -> the published names stacked in it, for every parameter of the
        model.
        """
        templates = {**self.keys, **(self.bias_keys if config.qkv_bias else {})}
        names = {}
        for ours, theirs in templates.items():
            # A name without {i} formats to itself.
            for i in range(config.num_layers if "{i}" in ours else 1):
                names[ours.format(i=i)] = tuple(name.format(i=i) for name in theirs)
        if config.tie_embeddings:
            del names["lm_head.weight"]
        return names


def _with_rope_base(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`raw` with the base of RoPE at `rope_theta`, wherever the config keeps it.

    ValueError for scaled forms of RoPE, and for two bases that disagree.
    """
    flat = {key: value for key, value in raw.items() if key not in ROPE_KEYS}
    for key in ROPE_KEYS:
        rope = raw.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise ValueError(f"{source}: {key}: expected an object, got {rope!r}")
        scaled = [
            f"{name}={value!r}"
            for name, value in rope.items()
            if name != "rope_theta" and value not in PLAIN_ROPE.get(name, (None,))
        ]
        if scaled:
            raise ValueError(
                f"{source}: only plain RoPE is computed, not {key} with {', '.join(scaled)}"
            )
        base, other = rope.get("rope_theta"), flat.get("rope_theta")
        if base is not None and other not in (None, base):
            raise ValueError(f"{source}: rope_theta={other!r}, but {key} has rope_theta={base!r}")
        flat["rope_theta"] = other if base is None else base
    return flat
