"""What the published Fast-dLLM implementation does in every step, stated plainly, on the weights of
our model: the peer.

Step by step as in the published LLaDA and Dream code (arXiv 2505.22618,
github.com/NVlabs/Fast-dLLM), in our own words:

model       q, k, v, gate and up are five products; RMSNorm in fp32 out of PyTorch's own operations;
            no kernel is fused.
cache       Keys are kept before rotation, and all of them are rotated again in every layer of every
            step: LLaDA's in fp32, Dream's in the model's dtype. Prefix: past and fresh are
            concatenated. Dual: the fresh ones are written where `replace_position` says, whose
            indices the host asks for; LLaDA does so row by row, in every layer.
attention   PyTorch's SDPA without a mask, key heads repeated to the number of query heads.
head        Logits of every row of the forward: at a refresh those of the whole canvas.
selection   LLaDA: softmax of all these rows in float64, then topk and an index write row by row,
            the count asked for by the host. Dream: a shifted copy of the logits and a softmax in
            the model's dtype, of every row at a refresh and of the masked rows after it; the
            refresh commits one token.

What the published code computes and never uses (an attention bias, a second argmax) is left out,
and so is its loop over single tokens, which only the threshold rule runs: if anything, plain is
faster than what it stands for. The rule is that of a fixed number of steps a block, which decides
as `Quota(steps)` does. All rows have the same length: others go wrong there.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class LayerWeights:
    """The tensors of one layer, as published: separate, views of our fused ones."""

    attention_norm: torch.Tensor
    qkv: tuple[torch.Tensor, ...]
    qkv_bias: tuple[torch.Tensor | None, ...]
    out: torch.Tensor
    mlp_norm: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


class Plain:
    """The published forward on the weights of a DiffusionTransformer. It owns nothing but the
    rotary tables.
    """

    def __init__(self, model):
        config = self.config = model.config
        self.embedding = model.embedding.weight
        self.norm = model.norm.weight
        self.head = model.lm_head.weight
        kv = config.num_kv_heads * config.head_dim
        sizes = [config.num_heads * config.head_dim, kv, kv]
        self.layers = [self._separate(layer, sizes) for layer in model.layers]
        dtype = torch.float32 if config.rope_in_fp32 else model.dtype
        angle = rotary_angles(config, model.device)
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)

    @staticmethod
    def _separate(layer, sizes):
        qkv = layer.attention.qkv
        gate, up = layer.gate_up.weight.chunk(2)
        return LayerWeights(
            attention_norm=layer.attention_norm.weight,
            qkv=qkv.weight.split(sizes),
            qkv_bias=(None, None, None) if qkv.bias is None else qkv.bias.split(sizes),
            out=layer.attention.out.weight,
            mlp_norm=layer.mlp_norm.weight,
            gate=gate,
            up=up,
            down=layer.down.weight,
        )

    def forward(self, tokens, past=None, replace_position=None):
        """tokens [B, n] -> (outputs [B, n, V], [(k, v)] of all layers, [B, HK, keys, D], keys not
        rotated).

        past: what an earlier forward returned. Without replace_position it stands before the
        tokens; with it (bool [B, L]) the tokens' keys and values replace those it marks, in place.
        """
        x = functional.embedding(tokens, self.embedding)
        present, eps = [], self.config.rms_norm_eps
        for index, layer in enumerate(self.layers):
            normed = rms_norm(x, layer.attention_norm, eps)
            layer_past = past[index] if past else None
            out, kv = self._attention(layer, normed, layer_past, replace_position)
            present.append(kv)
            x = x + functional.linear(out, layer.out)
            normed = rms_norm(x, layer.mlp_norm, eps)
            gate = functional.silu(functional.linear(normed, layer.gate))
            x = x + functional.linear(gate * functional.linear(normed, layer.up), layer.down)
        return functional.linear(rms_norm(x, self.norm, eps), self.head), present

    def _attention(self, layer, x, past, replace_position):
        rows, width, _ = x.shape
        by_head = rows, width, -1, self.config.head_dim
        q, k, v = (
            functional.linear(x, weight, bias).view(by_head).transpose(1, 2)
            for weight, bias in zip(layer.qkv, layer.qkv_bias, strict=True)
        )
        if past is not None and replace_position is None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        elif past is not None:
            self._replace(past, (k, v), replace_position)
            k, v = past
        keys = end = k.shape[2]
        if replace_position is not None and replace_position.any():
            end = int(replace_position.nonzero(as_tuple=True)[1].max() + 1)
        present = k, v
        q = self._rotate(q, slice(end - width, end))
        k = self._rotate(k, slice(0, keys))
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).reshape(rows, width, -1), present

    def _replace(self, past, fresh, replace_position):
        """Write k and v [B, HK, n, D] over the marked positions of the past, which the host looks
        up.
        """
        if self.config.logit_shift:  # Dream's: one write, at the positions of the first row
            index = replace_position[0].nonzero(as_tuple=True)[0]
            for old, new in zip(past, fresh, strict=True):
                old[:, :, index] = new
            return
        for row in range(len(replace_position)):
            index = replace_position[row].nonzero(as_tuple=True)[0]
            if len(index) > 0:
                for old, new in zip(past, fresh, strict=True):
                    old[row, :, index] = new[row, :, : len(index)]

    def _rotate(self, x, positions):
        """x [B, heads, n, D] at consecutive positions, in the dtype of the tables."""
        y = x.to(self.cos.dtype)
        left, right = y.chunk(2, dim=-1)
        turned = torch.cat([-right, left], dim=-1)
        return (y * self.cos[positions] + turned * self.sin[positions]).to(x.dtype)


def rotary_angles(config, device):
    """The rotation's angles, fp32 [positions, D], each twice."""
    dim = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequency = 1.0 / config.rope_theta ** (dim / config.head_dim)
    position = torch.arange(config.max_positions, device=device).float()
    angle = torch.outer(position, frequency)
    return torch.cat([angle, angle], dim=-1)


def rms_norm(x, weight, eps):
    """fp32 inside, one operation after the other."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


@torch.no_grad()
def decode(plain: Plain, prompts, *, gen_length, block_length, cache, steps, stop_after=None):
    """Decode prompts [B, P]: `steps` forwards a block, the masks spread over them evenly.

    cache: "none", "prefix" or "dual". stop_after: leave after that many blocks, or without a cache
    after that many forwards. Returns (canvas [B, P + gen_length], refreshes, cached steps).
    """
    config = plain.config
    select = select_shifted if config.logit_shift else select_by_confidence
    # With a cache, Dream's refresh commits one token and the steps after it the others.
    alone = cache != "none" and config.logit_shift > 0
    canvas = functional.pad(prompts, (0, gen_length), value=config.mask_id)
    refreshes = cached = 0
    for start in range(prompts.shape[1], canvas.shape[1], block_length):
        end = min(start + block_length, canvas.shape[1])
        plan = [1, *spread(end - start - 1, steps - 1)] if alone else spread(end - start, steps)
        counts = torch.tensor(plan, device=canvas.device)
        last, past, replace_position = canvas.shape[1], None, None
        if cache == "dual":
            last = end
            replace_position = torch.zeros_like(canvas, dtype=torch.bool)
            replace_position[:, start:end] = True
        step = 0
        while (canvas[:, start:end] == config.mask_id).sum() != 0:
            whole = cache == "none" or step == 0
            if whole and refreshes == stop_after:
                return canvas, refreshes, cached
            if whole:
                outputs, past = plain.forward(canvas)
                if cache == "prefix":
                    past = [(k[:, :, :start], v[:, :, :start]) for k, v in past]
                select(outputs, canvas, start, end, counts[step], config.mask_id, alone)
                refreshes += 1
            else:
                window = canvas[:, start:last]
                outputs, _ = plain.forward(window, past, replace_position)
                select(outputs, window, 0, end - start, counts[step], config.mask_id, False)
                cached += 1
            del outputs
            step += 1
    return canvas, refreshes, cached


def spread(masks, steps):
    """The masks over the steps as evenly as possible, the first steps taking the remainder; at
    least one step.
    """
    steps = max(steps, 1)
    base, remainder = divmod(masks, steps)
    return [base + (step < remainder) for step in range(steps)]


def select_by_confidence(logits, tokens, start, end, count, mask_id, alone):
    """LLaDA's: commit `count` masks of each row of tokens [B, n] in start:end; a float64 softmax of
    all rows of the logits.
    """
    candidates = tokens == mask_id
    candidates[:, end:] = False
    proposal = logits.argmax(-1)
    probability = functional.softmax(logits.to(torch.float64), dim=-1)
    probability = probability.gather(-1, proposal[..., None])[..., 0]
    proposal = torch.where(candidates, proposal, tokens)
    confidence = torch.where(candidates, probability, -torch.inf)
    commit = torch.zeros_like(candidates)
    for row in range(len(confidence)):
        _, best = torch.topk(confidence[row], k=int(count))
        commit[row, best] = True
    tokens[commit] = proposal[commit]


def select_shifted(logits, tokens, start, end, count, mask_id, alone):
    """Dream's: the outputs are shifted by a copy. `alone`: a softmax of every row, and position
    `start` alone is committed.
    """
    logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    if alone:
        _, proposal = torch.softmax(logits, dim=-1).max(-1)
        tokens[:, start] = proposal[:, start]
        return
    candidates = tokens == mask_id
    candidates[:, :start] = candidates[:, end:] = False
    confidence, proposal = torch.softmax(logits[candidates], dim=-1).max(-1)
    every = torch.full_like(tokens, -torch.inf, dtype=logits.dtype)
    every[candidates] = confidence
    _, best = torch.topk(every, int(count))
    ids = torch.full_like(tokens, mask_id)
    ids[candidates] = proposal
    row = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(best)
    tokens[row, best] = ids[row, best]
