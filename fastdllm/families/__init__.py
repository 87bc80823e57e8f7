"""The table of model families: what a checkpoint's config.json and state dict are called, and
nothing else.

A family is one file with one `Family` value and one row in FAMILIES, keyed by config.json's
`model_type`.
"""

from . import dream, llada
from .family import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (llada.FAMILY, dream.FAMILY)}

__all__ = ["FAMILIES", "Family"]
