"""LLaDA's and Dream's published modeling code, its module structure restated: what
`replace_attention` meets on the hub.

Module names, the order of calls and what every method takes and returns are those of
modeling_llada.py (GSAI-ML/LLaDA-8B-Instruct) and modeling_dream.py
(Dream-org/Dream-v0-Instruct-7B); the words are our own, and what neither decoding nor
`replace_attention` touches is left out. The end-to-end benchmark races these models, tests compare
them with the native one.
"""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, PretrainedConfig


class Norm(nn.Module):
    """RMSNorm, fp32 inside."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


def half_turn(x):
    """Turn every pair (x[i], x[i + D / 2]) of the last dimension by 90 degrees."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def widen(x, heads):
    """Repeat key and value heads [B, HK, L, D] for grouped queries."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def bare_linear(width, out):
    return nn.Linear(width, out, bias=False)


# LLaDA: the layer projects, its method `attention` does the rest, the head sits inside the inner
# model.


class LLaDAConfig(PretrainedConfig):
    model_type = "llada"

    def __init__(self, use_cache=False, **values):
        super().__init__(**{**values, "use_cache": use_cache})


class LLaDARotary(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, q, k):
        """Rotate k at positions 0 .. keys - 1 and q as the last of them."""
        keys, dim = k.shape[2], k.shape[3]
        frequency = self.config.rope_theta ** -(torch.arange(0, dim, 2).float() / dim)
        angle = torch.outer(torch.arange(keys).float(), frequency)
        angle = torch.cat([angle, angle], dim=-1)
        return self._turn(q, angle[keys - q.shape[2] :]), self._turn(k, angle)

    @staticmethod
    def _turn(x, angle):
        wide = x.float()
        return (wide * angle.cos() + half_turn(wide) * angle.sin()).to(x.dtype)


class LLaDALlamaBlock(nn.Module):
    def __init__(self, layer_id, config):
        super().__init__()
        self.layer_id, self.config = layer_id, config
        width, mlp = config.d_model, config.mlp_hidden_size
        kv = width // config.n_heads * config.n_kv_heads
        self.attn_norm = Norm(width, config.rms_norm_eps)
        self.ff_norm = Norm(width, config.rms_norm_eps)
        self.q_proj = bare_linear(width, width)
        self.k_proj = bare_linear(width, kv)
        self.v_proj = bare_linear(width, kv)
        self.attn_out = bare_linear(width, width)
        self.ff_proj = bare_linear(width, mlp)
        self.up_proj = bare_linear(width, mlp)
        self.ff_out = bare_linear(mlp, width)
        self.act = nn.SiLU()
        self.dropout = nn.Dropout(0.0)
        self.rotary_emb = LLaDARotary(config)

    def attention(self, q, k, v, attention_bias=None, layer_past=None, use_cache=False):
        rows, length, width = q.shape
        heads = self.config.n_heads
        q, k, v = (x.view(rows, length, -1, width // heads).transpose(1, 2) for x in (q, k, v))
        if layer_past is not None:
            past_k, past_v = layer_past
            k = torch.cat([past_k, k], dim=-2)
            v = torch.cat([past_v, v], dim=-2)
        present = (k, v) if use_cache else None
        q, k = self.rotary_emb(q, k)
        out = functional.scaled_dot_product_attention(
            q, widen(k, heads), widen(v, heads), attn_mask=attention_bias, is_causal=False
        )
        return self.attn_out(out.transpose(1, 2).reshape(rows, length, width)), present

    def forward(self, x, attention_bias=None, layer_past=None, use_cache=False):
        normed = self.attn_norm(x)
        q, k, v = self.q_proj(normed), self.k_proj(normed), self.v_proj(normed)
        out, present = self.attention(
            q, k, v, attention_bias, layer_past=layer_past, use_cache=use_cache
        )
        x = x + self.dropout(out)
        normed = self.ff_norm(x)
        out = self.ff_out(self.act(self.ff_proj(normed)) * self.up_proj(normed))
        return x + self.dropout(out), present


class LLaDAModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        blocks = [LLaDALlamaBlock(i, config) for i in range(config.n_layers)]
        parts = {
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "emb_drop": nn.Dropout(0.0),
            "blocks": nn.ModuleList(blocks),
            "ln_f": Norm(config.d_model, config.rms_norm_eps),
        }
        if not config.weight_tying:
            parts["ff_out"] = bare_linear(config.d_model, config.embedding_size)
        self.transformer = nn.ModuleDict(parts)

    def forward(
        self,
        input_ids,
        input_embeddings=None,
        attention_mask=None,
        attention_bias=None,
        past_key_values=None,
        use_cache=False,
    ):
        parts = self.transformer
        x = parts.wte(input_ids) if input_embeddings is None else input_embeddings
        x = parts.emb_drop(x)
        if attention_mask is not None and 0.0 in attention_mask:
            hidden = 1.0 - attention_mask.float()[:, None, None]
            attention_bias = hidden * torch.finfo(x.dtype).min
        pasts = past_key_values or [None] * len(parts.blocks)
        presents = []
        for block, past in zip(parts.blocks, pasts, strict=True):
            x, present = block(
                x, attention_bias=attention_bias, layer_past=past, use_cache=use_cache
            )
            presents.append(present)
        x = parts.ln_f(x)
        tied = self.config.weight_tying
        logits = functional.linear(x, parts.wte.weight) if tied else parts.ff_out(x)
        return SimpleNamespace(logits=logits, past_key_values=presents if use_cache else None)


class LLaDAModelLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = LLaDAModel(config)

    def forward(
        self,
        input_ids=None,
        inputs_embeds=None,
        attention_mask=None,
        attention_bias=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
    ):
        use_cache = self.config.use_cache if use_cache is None else use_cache
        return self.model.forward(
            input_ids,
            input_embeddings=inputs_embeds,
            attention_mask=attention_mask,
            attention_bias=attention_bias,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )


# Dream: Qwen2's layers, self_attn returning three things, RoPE tables from the inner model.


class DreamConfig(PretrainedConfig):
    model_type = "Dream"

    def __init__(
        self,
        rope_theta=10000.0,
        rope_scaling=None,
        use_cache=True,
        tie_word_embeddings=False,
        **values,
    ):
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **values)


class DreamAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        width = config.hidden_size
        self.head_dim = width // self.num_heads
        kv = self.head_dim * self.num_key_value_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, kv)
        self.v_proj = nn.Linear(width, kv)
        self.o_proj = bare_linear(width, width)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_value=None,
        output_attentions=False,
        use_cache=False,
        cache_position=None,
        position_embeddings=None,
    ):
        rows, length, width = hidden_states.shape
        q, k, v = (
            project(hidden_states).view(rows, length, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = (x.unsqueeze(1) for x in position_embeddings)
        q, k = (x * cos + half_turn(x) * sin for x in (q, k))
        if past_key_value is not None:
            k, v = past_key_value.update(k, v, self.layer_idx)
        mask = attention_mask if isinstance(attention_mask, torch.Tensor) else None
        k, v = widen(k, self.num_heads), widen(v, self.num_heads)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=False)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, width)), None, past_key_value


class DreamMLP(nn.Module):
    def __init__(self, width, mlp):
        super().__init__()
        self.gate_proj = bare_linear(width, mlp)
        self.up_proj = bare_linear(width, mlp)
        self.down_proj = bare_linear(mlp, width)

    def forward(self, x):
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DreamDecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = DreamAttention(config, layer_idx)
        self.mlp = DreamMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_value=None,
        output_attentions=False,
        use_cache=False,
        cache_position=None,
        position_embeddings=None,
    ):
        out, _, present = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=past_key_value,
            output_attentions=output_attentions,
            use_cache=use_cache,
            cache_position=cache_position,
            position_embeddings=position_embeddings,
        )
        hidden_states = hidden_states + out
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return (hidden_states, present) if use_cache else (hidden_states,)


class DreamRotaryEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim = config.hidden_size // config.num_attention_heads
        inv_freq = config.rope_theta ** -(torch.arange(0, dim, 2).float() / dim)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, x, position_ids):
        angle = position_ids[..., None].float() * self.inv_freq
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


class DreamBaseModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [DreamDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = DreamRotaryEmbedding(config)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_attentions=None,
        cache_position=None,
    ):
        use_cache = self.config.use_cache if use_cache is None else use_cache
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past = DynamicCache() if use_cache and past_key_values is None else past_key_values
        if cache_position is None:
            seen = 0 if past is None else past.get_seq_length()
            cache_position = torch.arange(seen, seen + x.shape[1])
        if position_ids is None:
            position_ids = cache_position[None]
        tables = self.rotary_emb(x, position_ids)
        for layer in self.layers:
            outputs = layer(
                x,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_value=past,
                output_attentions=output_attentions,
                use_cache=use_cache,
                cache_position=cache_position,
                position_embeddings=tables,
            )
            x = outputs[0]
        present = outputs[1] if use_cache else None
        return SimpleNamespace(last_hidden_state=self.norm(x), past_key_values=present)


class DreamModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = DreamBaseModel(config)
        self.lm_head = bare_linear(config.hidden_size, config.vocab_size)

    def forward(self, input_ids=None, attention_mask="full", position_ids=None, **options):
        """options: past_key_values, inputs_embeds, use_cache, output_attentions, cache_position."""
        outputs = self.model(input_ids, attention_mask, position_ids, **options)
        outputs.logits = self.lm_head(outputs.last_hidden_state)
        return outputs
