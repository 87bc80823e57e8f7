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
from .rules import Factor, Quota, Threshold
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
    "commit_proposals",
    "confidence_select",
    "confidence_select_reference",
    "linear",
    "linear_reference",
    "linear_rms_norm",
    "linear_rms_norm_reference",
    "linear_swiglu",
    "linear_swiglu_reference",
    "merge_confidence_partials",
    "quantize_weight",
    "rms_norm",
    "rms_norm_reference",
    "rope_to_cache",
    "rope_to_cache_reference",
    "swiglu",
    "swiglu_reference",
    "token_confidence",
    "token_confidence_partials",
    "token_confidence_partials_reference",
    "token_confidence_reference",
]
