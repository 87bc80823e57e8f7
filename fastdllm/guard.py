"""What a replaced model is called with, looked at before any work.

Replaced attention is full attention from position 0 on: every token sees every other, nothing is
cached between calls, no attention weights come out. Whatever else a caller asks for is refused by
name: an argument that is read past would change the result without a word. Modeling files differ in
what they call things (a past is past_key_values, layer_past or cache), so what is honoured is
listed here and not what is refused.
"""

import inspect
import threading
from collections.abc import Mapping
from typing import Any

import torch

# Arguments that a forward honours as it did before, by any modeling file's name for them.
HONOURED = frozenset(
    (
        # what the tokens are
        "input_ids",
        "inputs_embeds",
        "input_embeddings",
        "token_type_ids",
        # what is made of the outputs
        "labels",
        "shift_labels",
        "num_items_in_batch",
        "logits_to_keep",
        "num_logits_to_keep",
        "last_logits_only",
        "output_hidden_states",
        "return_dict",
        # a layer's and an attention's operands; RoPE's tables are computed anew
        "x",
        "hidden_states",
        "q",
        "k",
        "v",
        "position_embeddings",
    )
)
MASKS = frozenset(("attention_mask", "attention_bias", "mask", "attn_mask", "causal_mask"))
POSITIONS = frozenset(("position_ids", "cache_position"))
# Masks that are added to the scores where they are of floats, whatever their shape.
BIASES = frozenset(("attention_bias",))
EVERYTHING = "full"  # Dream's word for a mask that hides nothing


class Checked(threading.local):
    """Whether this thread is inside a forward whose arguments were looked at: what reaches a layer
    then is the modeling file's own, a causal mask or an empty cache among it.
    """

    inside = False

    def __reduce__(self) -> tuple:  # a copy of a model is not inside a forward
        return Checked, ()


def parameters_of(owner: object, method: str) -> tuple[str, ...]:
    """The names of the positional parameters of a method of the owner's class, without self."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(getattr(type(owner), method)).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)[1:]


def named(names: tuple[str, ...], args: tuple, options: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name; TypeError for more positional ones than there are names."""
    if len(args) > len(names):
        raise TypeError(f"expected at most {len(names)} positional arguments, got {len(args)}")
    return {**dict(zip(names, args, strict=False)), **options}


def refuse(arguments: Mapping[str, Any], *, causal: bool, returns_past: bool) -> None:
    """ValueError naming the first argument that replaced attention does not honour.

    causal: a causal mask may be there, which the modeling file makes of none. returns_past:
    use_cache is honoured.
    """
    for name, value in arguments.items():
        not_asked = value is None or isinstance(value, int) and not value
        if not_asked or name in HONOURED:
            continue
        if name in MASKS:
            _check_mask(name, value, causal)
        elif name in POSITIONS:
            _check_positions(name, value)
        elif not (name == "use_cache" and returns_past):
            raise ValueError(
                f"{name}: not honoured by a model whose attention is replaced: a forward is full "
                "attention from position 0 on, keeps no keys and values (pass use_cache=False) "
                "and returns no attention weights; fastdllm.generate decodes with a cache"
            )


def _check_mask(name: str, mask: Any, causal: bool) -> None:
    if not _hides_nothing(mask, causal, additive=name in BIASES):
        raise ValueError(
            f"{name}: a replaced model's forward attends to every token, and this mask hides some "
            "(padding, a window, the future); fastdllm.generate takes ragged rows"
        )


def _hides_nothing(mask: Any, causal: bool, additive: bool) -> bool:
    """Whether every query sees every key.

    mask: a tensor, [B, L] with zeros at padding, or a bias of the scores [..., L, L], bool or
    integers that are not 0 or floats that are 0 where a key is seen; a dict of such by the kind of
    layer; or Dream's "full". causal: a bias may also show each query the keys up to its own, and
    those only.
    """
    if isinstance(mask, str):
        return mask == EVERYTHING
    if isinstance(mask, Mapping):
        return all(part is None or _hides_nothing(part, causal, additive) for part in mask.values())
    if not isinstance(mask, torch.Tensor):
        return False
    is_bias = additive or mask.ndim > 2
    visible = mask == 0 if is_bias and mask.is_floating_point() else mask != 0
    if bool(visible.all()):
        return True
    if not causal or mask.ndim <= 2 or mask.shape[-1] != mask.shape[-2]:
        return False
    triangle = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    return bool((visible == triangle).all())


def _check_positions(name: str, positions: Any) -> None:
    if isinstance(positions, torch.Tensor) and positions.ndim:
        counted = torch.arange(positions.shape[-1], device=positions.device)
        if bool((positions == counted).all()):
            return
    raise ValueError(
        f"{name}: a replaced model's forward starts at position 0 and takes no past: expected "
        "0, 1, 2, ..."
    )
