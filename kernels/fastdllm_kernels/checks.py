"""Checks of arguments: each returns the value, or raises what names the argument, what was expected
and what came.
"""

import math
import sys
from typing import Any

import torch

LARGEST = sys.float_info.max
FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # what every op takes
REALS = (*FLOATS, torch.float64)  # and what the references of the small ops take


def integer(name: str, value, low: float = -math.inf, high: float = math.inf) -> int:
    """`value` if it is an int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not low <= value <= high:
        limit = f">= {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ValueError(f"{name}: expected an int {limit}, got {value}")
    return value


def number(
    name: str,
    value,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
) -> float:
    """`value` if it is a finite number inside the bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    # By comparisons, which an int too large for a float and torch.compile's symbols stand as well.
    if not (above < value and at_least <= value <= at_most and abs(value) <= LARGEST):
        low = f"above {above}" if above > -math.inf else f"at least {at_least}"
        high = f", at most {at_most}" if at_most < math.inf else ""
        raise ValueError(f"{name}: expected a finite number {low}{high}, got {value}")
    return float(value)


def choice(name: str, value, known: tuple[str, ...]) -> str:
    """`value` if it is one of `known`."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    return value


def tensor(
    name: str, value, dtypes: tuple, shape=None, device=None, *, optional: bool = False
) -> Any:
    """`value` if it is a tensor of one of `dtypes`, and of this shape on this device where they are
    given.
    """
    if value is None and optional:
        return None
    if not isinstance(value, torch.Tensor) or value.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"{name}: expected a tensor of {wanted}, got {got}")
    if shape is not None and (value.shape != shape or value.device != device):
        raise ValueError(
            f"{name}: expected shape {tuple(shape)} on {device}, "
            f"got {tuple(value.shape)} on {value.device}"
        )
    return value


def rotation(cos, sin, q):
    """cos and sin if they are tables [positions, D/2], of a position or more, that rotate q."""
    for name, table in (("cos", cos), ("sin", sin)):
        tensor(name, table, (torch.float32, q.dtype))
        if table.ndim != 2 or 2 * table.shape[1] != q.shape[-1] or table.shape != cos.shape:
            raise ValueError(
                f"{name}: expected [positions, D/2] with D = {q.shape[-1]}, "
                f"got {tuple(table.shape)}"
            )
        if not table.shape[0]:
            raise ValueError(f"{name}: expected a position or more, got {tuple(table.shape)}")
        if table.device != q.device:
            raise ValueError(
                f"{name}: expected a table on {q.device}, as q, got one on {table.device}"
            )
    return cos, sin


def pages(page_table, k_cache, q):
    """page_table if it is [B, pages] int32, a page or more a row of q, beside a k_cache (or None)
    of a page or more, of a slot or more each.
    """
    tensor("page_table", page_table, (torch.int32,))
    columns = page_table.shape[1] if page_table.ndim == 2 else 0
    if not columns or page_table.shape[0] != q.shape[0] or page_table.device != q.device:
        raise ValueError(
            f"page_table: expected [B, pages] with B = {q.shape[0]} and a page or more on "
            f"{q.device}, got {tuple(page_table.shape)} on {page_table.device}"
        )
    if k_cache is not None and 0 in k_cache.shape[:2]:
        raise ValueError(
            "k_cache: expected [num_pages, page_size, HK, D] with a page of a slot or more, "
            f"got {tuple(k_cache.shape)}"
        )
    return page_table
