"""Family: one published architecture as data, and how its config.json becomes a ModelConfig and
back.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..config import ModelConfig

# Settings that would change the maths, in any family, with the only values this model computes.
UNSUPPORTED = {
    "alibi": (False, None),
    "attention_layer_norm": (False, None),
    "input_emb_norm": (False, None),
    "scale_logits": (False, None),
    "rope_scaling": (None,),
    "use_sliding_window": (False, None),
    "use_mrope": (False, None),
    "clip_qkv": (None,),
    "hidden_act": ("silu", None),
    "activation_type": ("silu", None),
}


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
    under the clean softmax.
    """

    name: str
    fields: Mapping[str, str | tuple[str, str]]
    fixed: Mapping[str, object]
    refused: Mapping[str, tuple]
    keys: Mapping[str, tuple[str, ...]]
    bias_keys: Mapping[str, tuple[str, ...]]
    end_tokens: tuple[str, ...]
    architecture: Mapping[str, object]
    qkv_bias: str | bool
    filtered_score: bool

    def config(self, raw: Mapping, extra_stop_ids: tuple[int, ...] = ()) -> ModelConfig:
        """The ModelConfig that config.json `raw` describes; ValueError naming the keys missing or
        unsupported.
        """
        refused = {**UNSUPPORTED, **self.refused}
        # An older Qwen-style config keeps a window size beside use_sliding_window: false.
        if raw.get("use_sliding_window") is not False:
            refused["sliding_window"] = (None,)
        wrong = [
            f"{key}={raw[key]!r}"
            for key, allowed in refused.items()
            if key in raw and raw[key] not in allowed
        ]
        if wrong:
            raise ValueError(f"config.json: {self.name} is not computed with {', '.join(wrong)}")
        given = {key: value for key, value in raw.items() if value is not None}
        wanted = {
            field: (names,) if isinstance(names, str) else names
            for field, names in self.fields.items()
        }
        missing = [
            " or ".join(names) for names in wanted.values() if given.keys().isdisjoint(names)
        ]
        if missing:
            raise ValueError(f"config.json: missing {', '.join(missing)}")
        values = {
            field: next(given[name] for name in names if name in given)
            for field, names in wanted.items()
        }
        stops = values.pop("stop_ids")
        stops = tuple(stops) if isinstance(stops, (list, tuple)) else (stops,)
        hidden, heads = values["hidden_size"], values["num_heads"]
        if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1 or hidden % heads:
            raise ValueError(
                f"config.json: the width {hidden!r} is no multiple of the number of heads {heads!r}"
            )
        if raw.get("head_dim", hidden // heads) != hidden // heads:
            raise ValueError(
                f"config.json: head_dim={raw['head_dim']!r} is not width / heads = {hidden // heads}"
            )
        qkv_bias = (
            bool(raw.get(self.qkv_bias, False)) if isinstance(self.qkv_bias, str) else self.qkv_bias
        )
        return ModelConfig(
            family=self.name,
            head_dim=hidden // heads,
            qkv_bias=qkv_bias,
            stop_ids=stops + tuple(token for token in extra_stop_ids if token not in stops),
            **values,
            **self.fixed,
        )

    def raw_config(self, config: ModelConfig) -> dict:
        """config.json for `config`, with the family's own keys."""
        raw = {"model_type": self.name, **self.architecture}
        for field, names in self.fields.items():
            raw[names if isinstance(names, str) else names[0]] = getattr(config, field)
        if isinstance(self.qkv_bias, str):
            raw[self.qkv_bias] = config.qkv_bias
        stops = config.stop_ids
        raw[self.fields["stop_ids"]] = stops[0] if len(stops) == 1 else list(stops)
        return raw

    def published_names(self, config: ModelConfig) -> dict[str, tuple[str, ...]]:
        """Our parameter name -> the published names stacked in it, for every parameter of the
        model.
        """
        templates = {**self.keys, **(self.bias_keys if config.qkv_bias else {})}
        names = {}
        for ours, theirs in templates.items():
            for i in range(
                config.num_layers if "{i}" in ours else 1
            ):  # a name without {i} formats to itself
                names[ours.format(i=i)] = tuple(name.format(i=i) for name in theirs)
        if config.tie_embeddings:
            del names["lm_head.weight"]
        return names
