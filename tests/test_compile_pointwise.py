"""Every configuration of the pointwise kernels compiles for A100, H100/H200 and B200 without
spilling.
"""

import compile_check
import pytest
import torch

pytest.importorskip("triton")


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(arch):
    from fastdllm_kernels import pointwise_triton as kernels

    # The models' widths, the widest single tile in the largest dtype, the loop, and a width that
    # divides nothing.
    for width, dtype in (
        (4096, torch.bfloat16),
        (16384, torch.float32),
        (20000, torch.float32),
        (33, torch.float16),
    ):
        x = empty(32, width, dtype=dtype)
        kernels.launch_rms_norm(x, empty(width, dtype=dtype), 1e-5, x)
    kernels.launch_rms_norm(empty(32, 4096), empty(4096), 1e-5)
    kernels.launch_swiglu(empty(32, 2 * 12288))
    kernels.launch_swiglu(empty(32, 66, dtype=torch.float32))
    start = empty(2, dtype=torch.int32)
    for heads, kv_heads, dim, table, paged in (
        (32, 32, 128, torch.float32, False),
        (28, 4, 128, torch.bfloat16, True),
        (8, 1, 256, torch.float32, False),
        (32, 32, 96, torch.bfloat16, True),
    ):
        q, k, v = empty(2, 32, heads + 2 * kv_heads, dim).split([heads, kv_heads, kv_heads], dim=2)
        cos = empty(4096, dim // 2, dtype=table)
        cache = empty(512, 16, kv_heads, dim) if paged else empty(2, 2048, kv_heads, dim)
        pages = empty(2, 128, dtype=torch.int32) if paged else None
        kernels.launch_rope_to_cache(
            q, k, v, cos, cos, start, cache, cache, length=start, page_table=pages
        )
    q = empty(2, 32, 8, 64, dtype=torch.float32)
    cos = empty(4096, 32, dtype=torch.float32)
    kernels.launch_rope_to_cache(q, q, q, cos, cos, start, None, None, length=None, page_table=None)


def a_kernel_that_spills(arch):
    from fastdllm_kernels import pointwise_triton as kernels

    x = empty(32, 8192, dtype=torch.float32)
    constants = {"TILE": 8192, "ONE_TILE": True, "PARTS": 1, "OVERLAP": False}
    kernels.rms_norm_kernel.warmup(
        x, x, x, x, x, 8192, 8192, 0, 8192, 1e-5, **constants, num_warps=1, grid=(32,)
    )


@pytest.mark.parametrize("arch", compile_check.ARCHITECTURES)
def test_compiles_without_spills(arch):
    compiled = compile_check.compile_launches(__file__, "launches", arch)
    assert {kernel.name for kernel in compiled} == {
        "rms_norm_kernel",
        "swiglu_kernel",
        "rope_to_cache_kernel",
    }
    compile_check.assert_fits(compiled)


def test_the_check_sees_a_spill():
    compiled = compile_check.compile_launches(__file__, "a_kernel_that_spills", 90)
    assert len(compile_check.problems(compiled)) == 1
    with pytest.raises(AssertionError, match="spills"):
        compile_check.assert_fits(compiled)
