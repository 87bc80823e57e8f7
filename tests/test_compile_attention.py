"""block_attention compiles for every chip without spills and within its shared memory, in every
configuration it can pick.

On a machine with two cores each kernel takes 1 to 4 seconds, so by default every chip gets the
shapes that models have and the corners of the configuration function; FASTDLLM_COMPILE_ALL=1 adds
the rest.
"""

import os

import compile_check
import pytest
import torch

# (B, T, H, HK, D, slots, dtype, rotation, page size or 0). Which branch each one reaches is said
# beside it.
COMMON = [
    (1, 32, 32, 32, 128, 2048, torch.bfloat16, "fp32", 0),  # LLaDA's step: 32 rows, split over keys
    (8, 32, 32, 32, 128, 2048, torch.bfloat16, "fp32", 0),  # heads fill the GPU: one split
    (1, 32, 28, 4, 128, 2048, torch.bfloat16, "own", 0),  # Dream's step: 64 rows, group 7
    (32, 32, 28, 4, 128, 2048, torch.bfloat16, "own", 16),  # several waves of programs, pages
    (1, 32, 32, 32, 128, 1024, torch.bfloat16, "fp32", 0),  # half the keys
    # A short cache: one program a multiprocessor, 8 warps.
    (1, 32, 32, 32, 128, 512, torch.bfloat16, "fp32", 0),
    (1, 2048, 32, 32, 128, 2048, torch.bfloat16, None, 0),  # a whole canvas
    (1, 32, 32, 32, 128, 2048, torch.float32, "own", 0),  # exact fp32 products
    (1, 1, 8, 8, 64, 1024, torch.float16, "own", 256),  # 16 rows of padding around one
    (1, 32, 8, 8, 96, 2048, torch.float16, "fp32", 0),  # a padded head dimension
    (64, 512, 8, 1, 256, 2048, torch.bfloat16, None, 0),  # D 256 has its own tiles
    (1, 32, 8, 8, 256, 2048, torch.float32, "own", 0),
]
REST = [
    (1, T, H, HK, D, slots, dtype, rotation, page)
    for T, H, HK in (
        (1, 32, 32),
        (4, 32, 8),
        (32, 32, 32),
        (64, 32, 32),
        (256, 28, 4),
        (2048, 32, 32),
    )
    for D in (16, 64, 96, 128, 256)
    for slots, dtype, rotation, page in (
        (1024, torch.bfloat16, "fp32", 0),
        (8192, torch.bfloat16, "own", 1),
        (2048, torch.float16, None, 100),
        (2048, torch.float32, "own", 32),
    )
]


def launches(arch):
    """Launch every case as the op would on that chip."""
    from fastdllm_kernels.backend import Chip

    chip = Chip(
        compile_check.MULTIPROCESSORS[arch], compile_check.SHARED_LIMIT[arch], overlap=arch >= 90
    )
    for case in COMMON + (REST if os.environ.get("FASTDLLM_COMPILE_ALL") else []):
        launch_case(chip, *case)


# The same, for the Hopper kernel: (B, T, H, HK, D, slots, dtype, rotation, 1 for a table of one
# column).
ON_HOPPER = [
    (1, 32, 32, 32, 128, 2048, torch.bfloat16, "fp32", 0),
    (1, 32, 28, 4, 128, 1024, torch.bfloat16, "own", 1),
    (8, 32, 28, 4, 128, 2048, torch.bfloat16, "own", 0),
    (8, 32, 28, 4, 128, 2048, torch.float16, "fp32", 1),
    (32, 32, 28, 4, 128, 2048, torch.bfloat16, "own", 1),
    (8, 32, 28, 4, 128, 512, torch.bfloat16, "own", 0),
    (4, 256, 8, 8, 128, 2048, torch.bfloat16, None, 0),
    (1, 2048, 32, 32, 128, 2048, torch.bfloat16, None, 0),
    (1, 2048, 32, 32, 128, 0, torch.bfloat16, None, 0),
    (4, 64, 8, 8, 64, 2048, torch.float16, "fp32", 0),
    (1, 512, 8, 1, 64, 2048, torch.float16, None, 0),
]


def launches_on_hopper(arch):
    """Launch every case with each configuration that the Hopper kernel's function can return."""
    from fastdllm_kernels import attention_hopper
    from fastdllm_kernels.backend import Chip

    chip = Chip(
        compile_check.MULTIPROCESSORS[arch],
        compile_check.SHARED_LIMIT[arch],
        overlap=True,
        hopper=True,
    )
    for case in ON_HOPPER:
        launch_case(chip, *case, kernel=attention_hopper)


def launches_on_less_shared_memory(arch):
    """The same chip with the shared memory of sm_86 and sm_89: the tiles shrink."""
    from fastdllm_kernels.backend import Chip

    for case in COMMON:
        launch_case(Chip(82, compile_check.SHARED_LIMIT[86]), *case)


def launch_case(chip, B, T, H, HK, D, slots, dtype, rotation, page, kernel=None):
    from fastdllm_kernels import attention_triton
    from fastdllm_kernels.attention import Operands

    kernel = kernel or attention_triton

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    spans = [empty(B, dtype=torch.int32) for _ in range(3)] + [
        empty(B, dtype=torch.int32) if slots else None
    ]
    cache = (64, page, HK, D) if page and kernel is attention_triton else (B, slots, HK, D)
    table = empty(B, -(-slots // cache[1]), dtype=torch.int32) if page else None
    chosen = kernel.config(B, T, H, HK, D, slots, dtype.itemsize, chip)
    tables = (None, None)
    if rotation and not chosen.rotate_first:
        tables = (empty(slots, D // 2, dtype=dtype if rotation == "own" else torch.float32),) * 2
    x = Operands(
        empty(B, T, H, D),
        empty(B, T, HK, D),
        empty(B, T, HK, D),
        empty(*cache),
        empty(*cache),
        *spans[:3],
        table,
        spans[3],
        *tables,
        scale=D**-0.5,
        out=empty(B, T, H, D),
        lse=empty(B, T, H, dtype=torch.float32),
    )
    kernel.launch(x, chosen)


@pytest.mark.parametrize("arch", compile_check.ARCHITECTURES)
def test_every_configuration_fits(arch):
    compile_check.assert_fits(compile_check.compile_launches(__file__, "launches", arch))


def test_every_configuration_of_the_hopper_kernel_fits():
    compile_check.assert_fits(compile_check.compile_launches(__file__, "launches_on_hopper", 90))


def test_configurations_shrink_to_a_small_chip():
    compiled = compile_check.compile_launches(__file__, "launches_on_less_shared_memory", 80)
    compile_check.assert_fits(compiled)
    assert max(kernel.shared for kernel in compiled) <= compile_check.SHARED_LIMIT[86]
