"""The table of model families: what a checkpoint's config.json and state dict are called, and
where code of others that holds such weights keeps its parts.

A family is one file with one `Family` value and one row in FAMILIES, keyed by config.json's
`model_type`.
"""

from . import dream, llada
from .family import Family, ModelingFile

FAMILIES: dict[str, Family] = {family.name: family for family in (llada.FAMILY, dream.FAMILY)}
# Modeling files by config.model_type, each with the family whose weights it is taken to hold.
MODELING_FILES: dict[str, tuple[Family, ModelingFile]] = {
    model_type: (family, file)
    for family in FAMILIES.values()
    for model_type, file in family.modeling.items()
}

__all__ = ["FAMILIES", "MODELING_FILES", "Family", "ModelingFile"]
