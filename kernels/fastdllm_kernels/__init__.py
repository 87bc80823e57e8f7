"""Triton kernels and PyTorch references for block-wise diffusion decoding. Imports torch and triton
only.

<op>.py holds an op's reference, its checks and the choice between that and a kernel. Beside it,
<op>_triton.py holds its kernels (`<what>_kernel`), the pure function `config` that returns a frozen
`Config`, and `launch`; where a file has several of them the op's name stands with each.
"""

from .attention import block_attention, block_attention_reference
from .fp8 import Fp8Weight, quantize_weight
from .linear import (
    linear,
    linear_reference,
    linear_rms_norm,
    linear_rms_norm_reference,
    linear_swiglu,
    linear_swiglu_reference,
)
from .pointwise import (
    rms_norm,
    rms_norm_reference,
    rope_to_cache,
    rope_to_cache_reference,
    swiglu,
    swiglu_reference,
)
from .rules import (
    Factor,
    Quota,
    Threshold,
    branch_of,
    check_rule,
    commit_of,
    fixed_values,
    per_row,
    per_row_fields,
    row_values,
    with_row_values,
)
from .select import (
    SCORES,
    Confidence,
    Partials,
    Selection,
    commit_proposals,
    confidence_select,
    confidence_select_reference,
    merge_confidence_partials,
    token_confidence,
    token_confidence_partials,
    token_confidence_partials_reference,
    token_confidence_reference,
)

__all__ = [
    "SCORES",
    "Confidence",
    "Factor",
    "Fp8Weight",
    "Partials",
    "Quota",
    "Selection",
    "Threshold",
    "block_attention",
    "block_attention_reference",
    "branch_of",
    "check_rule",
    "commit_of",
    "commit_proposals",
    "confidence_select",
    "confidence_select_reference",
    "fixed_values",
    "linear",
    "linear_reference",
    "linear_rms_norm",
    "linear_rms_norm_reference",
    "linear_swiglu",
    "linear_swiglu_reference",
    "merge_confidence_partials",
    "per_row",
    "per_row_fields",
    "quantize_weight",
    "rms_norm",
    "rms_norm_reference",
    "rope_to_cache",
    "rope_to_cache_reference",
    "row_values",
    "swiglu",
    "swiglu_reference",
    "token_confidence",
    "token_confidence_partials",
    "token_confidence_partials_reference",
    "token_confidence_reference",
    "with_row_values",
]
