"""The products compile for every chip without spills and within its shared memory, at the shapes
that models have.
"""

import compile_check
import pytest
import torch

# (rows, in, out, gated, splittable): LLaDA's four products, and Dream's narrow one.
SHAPES = [
    (32, 4096, 12288, False, False),
    (32, 4096, 4096, False, True),
    (32, 4096, 12288, True, False),
    (32, 3584, 4608, False, False),
    (1, 4096, 4096, False, True),
    (64, 4096, 12288, True, False),
    (128, 4096, 12288, True, False),
    (128, 18944, 3584, False, True),
    (100, 4100, 4096, False, False),
]


def launches(arch):
    from fastdllm_kernels.backend import Chip
    from fastdllm_kernels.linear_triton import config, launch

    chip = Chip(
        compile_check.MULTIPROCESSORS[arch], compile_check.SHARED_LIMIT[arch], overlap=arch >= 90
    )
    cases = [(*shape, torch.bfloat16) for shape in SHAPES]
    cases += [(*shape, torch.float32) for shape in SHAPES[:3]]
    for rows, width_in, width_out, gated, splittable, dtype in cases:
        outputs = width_out * (2 if gated else 1)
        x = torch.empty(rows, width_in, dtype=dtype, device="meta")
        weight = torch.empty(outputs, width_in, dtype=dtype, device="meta")
        bias = torch.empty(width_out, dtype=dtype, device="meta")
        chosen = config(rows, width_in, width_out, gated, splittable, dtype.itemsize, chip)
        launch(x, weight, None if gated or splittable else bias, gated=gated, chosen=chosen)


def fp8_launches(arch):
    from fastdllm_kernels import Fp8Weight, fp8, fp8_triton
    from fastdllm_kernels.backend import Chip
    from fastdllm_kernels.linear_triton import config, launch

    chip = Chip(compile_check.MULTIPROCESSORS[arch], compile_check.SHARED_LIMIT[arch], overlap=True)
    for rows, width_in, width_out, gated, splittable in [
        shape for shape in SHAPES if shape[1] % 16 == 0
    ]:
        outputs = width_out * (2 if gated else 1)
        x = torch.empty(rows, width_in, dtype=torch.bfloat16, device="meta")
        data = torch.empty(outputs, width_in, dtype=torch.float8_e4m3fn, device="meta")
        weight = Fp8Weight(data, torch.empty(outputs, device="meta"))
        bias = torch.empty(width_out, dtype=torch.bfloat16, device="meta")
        chosen = config(rows, width_in, width_out, gated, splittable, 1, chip)
        launch(x, weight, None if gated or splittable else bias, gated=gated, chosen=chosen)
    x = torch.empty(32, 18944, dtype=torch.float32, device="meta")
    fp8_triton.launch(x, fp8.LARGEST, fp8.SMALLEST)


@pytest.mark.parametrize("arch", compile_check.ARCHITECTURES)
def test_every_configuration_fits(arch):
    compile_check.assert_fits(compile_check.compile_launches(__file__, "launches", arch))


@pytest.mark.parametrize("arch", [arch for arch in compile_check.ARCHITECTURES if arch >= 90])
def test_every_fp8_configuration_fits(arch):
    compiled = compile_check.compile_launches(__file__, "fp8_launches", arch)
    compile_check.assert_fits(compiled)
    assert {kernel.name for kernel in compiled} == {"linear_kernel", "quantize_rows_kernel"}
