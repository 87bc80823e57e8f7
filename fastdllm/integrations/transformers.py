"""transformers (4.53 and later): attn_implementation="fastdllm" on every model that dispatches
through AttentionInterface.

    from fastdllm.integrations.transformers import register

    register()
    model = AutoModel.from_pretrained(path, attn_implementation="fastdllm")
    model(ids, attention_mask=padding, is_causal=False)

Attention is bidirectional, so a causal layer is refused. What a layer is, is decided as flash
attention decides it there: by `is_causal` in the model's call, else by `config.is_causal`, else by
the layer's own `is_causal`, which is True in every decoder class whatever its use.
`is_causal=False` therefore turns a Llama or Qwen into a bidirectional model. A 4-D mask of the
caller's own goes before all of them, as it does for sdpa, and must be the same for every query.

attention_mask [B, L] may pad rows on the left, on the right or between a cache and the new tokens;
it is read once a forward. Queries at padding give 0.
"""

from collections.abc import Callable
from typing import Any

import torch

from fastdllm_kernels import block_attention

NAME = "fastdllm"
# Arguments of attention functions that would change the result and are not computed.
UNSUPPORTED = (
    "softcap",
    "s_aux",
    "sinks",
    "position_bias",
    "attention_bias",
    "output_attentions",
    "head_mask",
    "layer_head_mask",
    "cache",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "seq_idx",
    "indices",
    "block_indices",
)


def register() -> None:
    """Make "fastdllm" an attn_implementation, with its masks. Calling it again changes nothing.

    ImportError where transformers is missing or has no mask interface: without one it would drop
    padding silently.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ImportError(f"transformers: expected version 4.53 or later ({error})") from error
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [B, H, Lq, D], key and value [B, HK, Lk, D] -> ([B,
    Lq, H, D], None).

    The queries are taken to be the last Lq of the Lk positions. attention_mask: None, a plan of
    `make_mask`, or a 4-D mask. Raises ValueError for what is not full attention.
    """
    width = query.shape[2]
    cached = key.shape[2] - width
    _refuse(module, query, key, value, dropout, options)
    if attention_mask is None or attention_mask.ndim == 3:
        _refuse_causal(module, is_causal, width)
        plan = attention_mask
    else:
        plan = _plan_of_mask(attention_mask, key.shape[2], width)
    q, keys, values = (states.transpose(1, 2) for states in (query, key, value))
    k, v = keys[:, cached:], values[:, cached:]
    # The suffix is empty: no position lies behind block_start + block_len and before kv_len.
    if plan is None:
        start = torch.full((len(q),), cached, dtype=torch.int32, device=q.device)
        return block_attention(q, k, v, keys, values, start, start, scale=scaling), None
    first, start, length = plan[:, 0, :3].to(torch.int32).unbind(1)
    order = plan[:, 0, 3:, None, None].to(q.device)
    if order.shape[1]:
        q, k, v = (states.take_along_dim(order, 1) for states in (q, k, v))
    out = block_attention(
        q, k, v, keys, values, start, start, kv_start=first, block_len=length, scale=scaling
    )
    if order.shape[1]:
        out = out.take_along_dim(order.argsort(1), 1)
    return out, None


def make_mask(
    batch_size: int,
    kv_length: int,
    mask_function: Callable | None = None,
    attention_mask: torch.Tensor | None = None,
    kv_offset: int = 0,
    **options: Any,
) -> torch.Tensor | None:
    """transformers' mask function: what `attend` needs to know of the padding, or None where
    nothing is padded.

    attention_mask [B, positions] bool. Returns a [B, 1, 3 or 3 + Lq] plan (see `_plan`); a [B, 1,
    1, Lk] mask where the model's own mask function gives every query the same keys. ValueError for
    windows, packed sequences and the like.
    """
    from transformers import masking_utils

    library: Any = masking_utils  # of which every version has another part
    queries = options["cache_position"] if "cache_position" in options else options["q_length"]
    width = queries if isinstance(queries, int) else len(queries)
    bidirectional = mask_function is getattr(library, "bidirectional_mask_function", library)
    if not bidirectional and mask_function is not library.causal_mask_function:
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask = library.sdpa_mask(
            batch_size=batch_size,
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **options,
        )
        keys, causal = _visible_keys(mask, or_causal=True)
        return _plan(keys, width) if causal else keys[:, None, None]
    if width != kv_length:
        _refuse_static(options, width, kv_offset + kv_length)
    if attention_mask is None:
        return None
    keys = attention_mask.bool()[:, kv_offset : kv_offset + kv_length]
    keys = torch.nn.functional.pad(keys, (0, kv_length - keys.shape[1]))
    return None if keys.all() else _plan(keys, width)


def _plan_of_mask(mask: torch.Tensor, kv_length: int, width: int) -> torch.Tensor:
    """The plan (see `_plan`) of a 4-D mask of the caller's own."""
    visible, _ = _visible_keys(_boolean(mask, kv_length))
    cached = kv_length - width
    # Padding, or the empty slots of a static cache: a mask cannot tell.
    if cached and not visible[:, cached:].all():
        raise ValueError(
            "attention_mask: expected a 4-D mask beside a cache to show all new tokens; "
            "give [B, L] padding"
        )
    return _plan(visible, width)


def _plan(keys: torch.Tensor, width: int) -> torch.Tensor:
    """What block_attention is told of visible keys [B, Lk] whose last `width` are the block's own.

    [B, 1, 3] int64: where the visible cached keys start and end, and how many of the block's are
    visible; for blocks with padding in front, then the order [width] that brings a row's visible
    positions to its front.
    """
    cached = keys.shape[1] - width
    first, end = _run(keys[:, :cached])
    begin, stop = _run(keys[:, cached:])
    plan = torch.stack([first, end, stop - begin], dim=1)
    if begin.any():
        order = (torch.arange(width, device=keys.device) + begin[:, None]) % width
        plan = torch.cat([plan, order], dim=1)
    return plan[:, None]


def _run(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B] start and end of the one run of True in every row of keys [B, n]; 0 and 0 for none.
    ValueError for several.
    """
    at = torch.arange(keys.shape[1], device=keys.device)
    count = keys.sum(1)
    # The first of equals: 0 where none is True.
    start = keys.int().argmax(1) if keys.shape[1] else count
    end = start + count
    if not torch.equal(keys, (start[:, None] <= at) & (at < end[:, None])):
        raise ValueError(
            "attention_mask: expected the visible tokens of a row without a gap between them"
        )
    return start, end


def _boolean(mask: torch.Tensor, kv_length: int) -> torch.Tensor:
    """A 4-D mask of bools, True where a key is seen, of one of bools or of biases."""
    if mask.ndim != 4:
        raise ValueError(
            "attention_mask: expected what the model's mask functions make or a 4-D mask, "
            f"got {mask.ndim}-D"
        )
    mask = mask[..., :kv_length]
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise ValueError(f"attention_mask: expected bools or floats in 4-D, got {mask.dtype}")
    visible = mask == 0
    if not (visible | (mask <= torch.finfo(mask.dtype).min / 2)).all():
        raise ValueError("attention_mask: expected 0 or the lowest number of its dtype, got a bias")
    return visible


def _visible_keys(mask: torch.Tensor, or_causal: bool = False) -> tuple[torch.Tensor, bool]:
    """([B, Lk] the keys that a mask [B, H or 1, Lq, Lk] shows, False) if they are the same for
    every query that sees any; with or_causal also (keys, True) for a mask that lets each query see
    those up to itself. ValueError for others.
    """
    keys = mask.any(dim=2).any(dim=1)
    sees_none = ~mask.any(-1, keepdim=True)
    if ((mask == keys[:, None, None]) | sees_none).all():
        return keys, False
    queries, length = mask.shape[2:]
    triangle = torch.ones(queries, length, dtype=torch.bool, device=mask.device)
    triangle = triangle.tril(length - queries)
    if or_causal and torch.equal(mask, (keys[:, None, None] & triangle).expand_as(mask)):
        return keys, True
    raise ValueError(
        f'attention_mask: attn_implementation="{NAME}" is full attention, and here queries differ '
        "in the keys they see (a causal mask, a sliding window, packed sequences)"
    )


def _refuse_static(options: dict[str, Any], width: int, end: int) -> None:
    """ValueError for a cache that does not end, at position `end`, with the new tokens."""
    if "cache_position" in options:
        offset = options["cache_position"][0]
    else:
        offset = options["q_offset"]
    if int(offset) + width != end:
        raise ValueError(
            "past_key_values: expected a cache that ends at the new tokens, not a static one"
        )


def _refuse_causal(module: torch.nn.Module, is_causal: bool | None, width: int) -> None:
    """ValueError for a layer of several queries that is causal, by the call or by what it is."""
    if is_causal is None:
        is_causal = getattr(getattr(module, "config", None), "is_causal", None)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if is_causal and width > 1:
        raise ValueError(
            f'is_causal: attn_implementation="{NAME}" is bidirectional and {type(module).__name__} '
            "is causal; call the model with is_causal=False if it is to attend both ways, "
            'or use "sdpa"'
        )


def _refuse(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    options: dict[str, Any],
) -> None:
    """ValueError for what would silently change the result."""
    for name in UNSUPPORTED:
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f'{name}: not supported by attn_implementation="{NAME}"')
    if dropout:
        raise ValueError(f"dropout: expected 0, got {dropout}: call model.eval()")
    if key.shape[2] < query.shape[2] or "CrossAttention" in type(module).__name__:
        raise ValueError(
            f"{type(module).__name__}: expected self-attention, of all positions or of the last "
            "ones"
        )
    if torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value)):
        raise ValueError(
            f'attn_implementation="{NAME}" has no gradient: use torch.no_grad(), or "sdpa" for '
            "training"
        )
