"""Somebody else's models after `replace_attention`, on the weights of a native one.

transformers  LlamaForCausalLM with LLaDA's weights, Qwen2ForCausalLM with Dream's
published     the module structure of the published modeling code, restated in published.py

Their weights are views of the native model's fused ones, so that all of them fit beside each other.
"""

from dataclasses import dataclass, field

import published
import torch
import transformers

from fastdllm import replace_attention
from fastdllm.checkpoint import fused_rows
from fastdllm.families import FAMILIES

NOT_FOR_A_CONFIG = ("model_type", "architectures")  # keys that the config's class decides itself


@dataclass(frozen=True)
class Host:
    """Somebody else's model class and its config's class.

    keys: the family whose names its config and its state dict have. values: for its config, beside
    the family's. options: of `replace_attention`.
    """

    model: type
    config: type
    keys: str
    values: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)


def host_named(name: str, config) -> Host:
    """The host "transformers" or "published" for the family of a native ModelConfig."""
    llada = config.family == "llada"
    if name == "published" and llada:
        return Host(published.LLaDAModelLM, published.LLaDAConfig, keys="llada")
    if name == "published":
        return Host(published.DreamModel, published.DreamConfig, keys="Dream")
    return Host(
        transformers.LlamaForCausalLM if llada else transformers.Qwen2ForCausalLM,
        transformers.LlamaConfig if llada else transformers.Qwen2Config,
        keys="Dream",  # whose names are transformers'
        values={"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}},
        options={
            "family": config.family,
            "mask_id": config.mask_id,
            "stop_ids": config.stop_ids,
        },
    )


def replaced_model(native, name: str):
    """The host's model on the native model's weights, its attention replaced."""
    config = native.config
    host = host_named(name, config)
    family = FAMILIES[host.keys]
    values = family.raw_config(config) | host.values
    for key in NOT_FOR_A_CONFIG:
        values.pop(key, None)
    with torch.device("meta"):
        model = host.model(host.config(**values))
    model.load_state_dict(published_weights(native, family), assign=True)
    model.requires_grad_(False).eval()
    return replace_attention(model, **host.options)


def published_weights(native, family) -> dict[str, torch.Tensor]:
    """{published name: the view of the native model's fused parameter that holds it}."""
    weights = {}
    for ours, theirs in family.published_names(native.config).items():
        parameter = native.get_parameter(ours)
        parts = parameter.split(fused_rows(native.config, ours, parameter))
        weights.update(zip(theirs, parts, strict=True))
    return weights
