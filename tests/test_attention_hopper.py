"""attention_hopper: the portable kernel's cases in every form of program, on a Hopper; elsewhere
only what is pure.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from test_attention import CASES, assert_close, inputs, real, run

from fastdllm_kernels import attention, attention_triton, backend
from fastdllm_kernels.attention import Operands, whole_attention

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
from fastdllm_kernels import attention_hopper  # noqa: E402
from fastdllm_kernels.attention_hopper import Config, config  # noqa: E402
from fastdllm_kernels.backend import Chip  # noqa: E402

on_hopper = pytest.mark.skipif(
    not (torch.cuda.is_available() and backend.chip_of(torch.device("cuda", 0)).hopper),
    reason="needs a Hopper GPU",
)
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
FORMS = {
    "1 consumer": Config(1, 64, 3),
    "1 consumer, long ring": Config(1, 64, 6),
    "1 consumer, short tiles": Config(1, 32, 6),
    "1 consumer, 3 splits": Config(1, 64, 3, splits=3),
    "2 consumers": Config(2, 64, 5),
    "2 consumers, long tiles": Config(2, 128, 3),
    "2 consumers, 2 splits": Config(2, 64, 5, splits=2),
    "rotated first": Config(2, 128, 3, rotate_first=True),
    "waits for nothing": Config(1, 64, 3, overlap=False),
    "more splits than keys": Config(1, 32, 6, splits=9),
    "1 consumer, several tiles": Config(1, 64, 3, programs=2),
    "2 consumers, several tiles": Config(2, 64, 5, programs=1),
    "2 consumers, several long tiles": Config(2, 128, 3, programs=3),
    "halved keys": Config(2, 64, 3, halve_keys=True),
    "halved keys, 3 splits": Config(2, 64, 3, splits=3, halve_keys=True),
    "halved keys, rotated first": Config(2, 64, 3, rotate_first=True, halve_keys=True),
}
SPANS = {
    "prefix, block and suffix": dict(S=300, block_start=(100, 128), kv_len=(300, 257)),
    "empty prefix": dict(S=200, block_start=(0,)),
    "empty suffix": dict(S=200, block_start=(168,)),
    "the block alone": dict(S=32, block_start=(0,)),
    "a few keys": dict(S=70, block_start=(3, 20), kv_len=(36, 70)),
    "left offsets": dict(S=300, block_start=(90, 200), kv_start=(77, 3)),
    "block lengths": dict(
        S=300, block_start=(20, 1, 250), block_len=(32, 0, 7), kv_len=(300, 40, 257)
    ),
}


H200 = Chip(132, 232448, overlap=True, hopper=True)


@pytest.mark.parametrize(
    "B, T, heads, keys, consumers, stages, splits",
    [
        (1, 32, (32, 32), 2048, 1, 6, 3),
        (1, 32, (32, 32), 4096, 1, 6, 4),
        (1, 32, (28, 4), 4096, 1, 6, 8),
        (1, 32, (28, 4), 512, 1, 6, 6),
        (8, 32, (28, 4), 512, 1, 6, 1),
        (8, 32, (28, 4), 1024, 2, 3, 1),
        (4, 32, (28, 4), 2048, 1, 6, 2),
        (8, 32, (32, 8), 2048, 1, 6, 1),
        (32, 32, (28, 4), 1024, 1, 3, 1),
        (8, 32, (32, 32), 2048, 1, 3, 1),
        (1, 32, (32, 32), 256, 1, 6, 1),
        (1, 2048, (32, 32), 2048, 2, 3, 1),
    ],
)
def test_the_measured_configurations_are_picked(B, T, heads, keys, consumers, stages, splits):
    chosen = config(B, T, *heads, 128, keys, 2, H200)
    assert (chosen.CONSUMERS, chosen.num_stages, chosen.splits) == (consumers, stages, splits)


@pytest.mark.parametrize("T", [1, 32, 100, 192, 193, 300, 5000])
@pytest.mark.parametrize("keys", [1, 257, 4096])
def test_the_ring_fits(T, keys):
    for B, heads in ((1, (8, 8)), (1, (8, 1)), (8, (28, 4)), (64, (28, 4))):
        chosen = config(B, T, *heads, 128, keys, 2, H200)
        rows = 64 * chosen.CONSUMERS
        slots = 2 * chosen.num_stages * chosen.TILE_KEYS * (2 if chosen.halve_keys else 1)
        assert (rows + slots) * 128 * 2 + 1024 <= H200.shared
        assert not (chosen.rotate_first and chosen.splits > 1), "two launches at most"


@pytest.mark.parametrize(
    "dtype, D, pages, misplaced, expected",
    [
        (torch.bfloat16, 128, 0, 0, attention_hopper),
        (torch.float16, 64, 1, 0, attention_hopper),
        (torch.float32, 128, 0, 0, attention_triton),
        (torch.bfloat16, 96, 0, 0, attention_triton),
        (torch.bfloat16, 128, 2, 0, attention_triton),
        (torch.bfloat16, 128, 0, 1, attention_triton),
    ],
)
def test_the_kernel_that_runs_on_a_hopper(dtype, D, pages, misplaced, expected, monkeypatch):
    fresh = torch.empty(2, 8, 4, D, dtype=dtype)
    cache = torch.empty(2 * 32 * 4 * D + misplaced, dtype=dtype)[misplaced:].view(
        2, 32, 4, D
    )  # one element off 16 bytes
    table = torch.zeros(2, pages, dtype=torch.int32) if pages else None
    x = Operands(fresh, fresh, fresh, cache, cache, None, None, page_table=table, out=fresh)
    assert attention._kernel(x) is attention_triton, "here"
    monkeypatch.setattr(backend, "chip_of", lambda device: H200)
    monkeypatch.setattr(attention, "_kernels", lambda hopper: (attention_hopper, attention_triton))
    assert attention._kernel(x) is expected


def test_the_kernels_of_a_chip(monkeypatch):
    attention._kernels.cache_clear()
    assert attention._kernels(False) == (attention_triton,)
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    assert attention._kernels(True) == (attention_hopper, attention_triton)
    for name, value in (
        ("interpreting", lambda: True),
        ("triton", SimpleNamespace(__version__="3.5.1")),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(backend, name, value)
            attention._kernels.cache_clear()
            assert attention._kernels(True) == (attention_triton,), "a chip's own kernel cannot run"
    attention._kernels.cache_clear()


def taken(x):
    return attention_hopper.supports(Operands(**x, out=x["q"]))


@on_hopper
@HALVES
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    "form",
    [
        "1 consumer, several tiles",
        "2 consumers, 2 splits",
        "2 consumers, long tiles",
        "halved keys",
    ],
)
def test_the_portable_kernels_cases(form, case, dtype):
    x = inputs(dtype, "cuda", **case)
    if not taken(x):
        pytest.skip("left to the portable kernel")
    assert_close(x, *run(x, FORMS[form], kernel=attention_hopper))


@on_hopper
@pytest.mark.parametrize("rotation", [None, "own", "fp32"])
@pytest.mark.parametrize("heads", [(2, 2), (14, 2)], ids=["group 1", "group 7"])
@pytest.mark.parametrize("span", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_and_spans(form, span, heads, rotation):
    x = inputs(
        torch.bfloat16,
        "cuda",
        T=32,
        H=heads[0],
        HK=heads[1],
        D=128,
        rotation=rotation,
        layout="fused",
        **span,
    )
    assert_close(x, *run(x, form, kernel=attention_hopper))


@on_hopper
@pytest.mark.parametrize("T", [1, 4, 31, 33, 64, 100, 300])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(
    "form",
    [
        "1 consumer, several tiles",
        "2 consumers",
        "2 consumers, several long tiles",
        "halved keys",
        "halved keys, 3 splits",
    ],
)
def test_block_lengths(form, D, T):
    x = inputs(
        torch.bfloat16, "cuda", T=T, H=4, HK=2, D=D, S=T + 200, block_start=(60, 0), rotation="fp32"
    )
    assert_close(x, *run(x, FORMS[form], kernel=attention_hopper))


@on_hopper
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(
    "form",
    [
        Config(2, 128, 3, programs=3),
        Config(1, 64, 3, programs=2),
        Config(2, 64, 5),
        FORMS["halved keys"],
    ],
    ids=str,
)
def test_whole_sequences_without_a_cache(form, D):
    x = inputs(
        torch.bfloat16, "cuda", T=300, H=4, HK=2, D=D, S=0, block_start=(0, 0), kv_len=(300, 300)
    )
    assert_close(x, *run(x, form, kernel=attention_hopper))


@on_hopper
def test_a_refresh_of_whole_rows_takes_this_kernel(monkeypatch):
    q, k, v = (
        torch.randn(2, 200, heads, 64, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2)
    )
    start = torch.zeros(2, dtype=torch.int32, device="cuda")
    expected = whole_attention(q, k, v)
    monkeypatch.delattr(torch.nn.functional, "scaled_dot_product_attention")
    out = whole_attention(q, k, v, start=start)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    with pytest.raises(AttributeError):  # and has no gradient
        whole_attention(q.requires_grad_(), k, v, start=start)


@on_hopper
@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_scale(scale):
    x = inputs(torch.float16, "cuda", rotation="own")
    assert_close(x, *run(x, Config(1, 64, 3), scale=scale, kernel=attention_hopper), scale=scale)


@on_hopper
def test_rows_of_a_table_and_a_strided_result():
    x = inputs(
        torch.bfloat16, "cuda", T=8, H=4, HK=2, S=90, block_start=(20, 40), rotation="own", page=90
    )
    x["page_table"] = x["page_table"][:, :1]
    assert taken(x)
    for form in (Config(1, 64, 3), Config(2, 64, 5, splits=2)):
        wide = torch.full((2, 4, 8, 80), math.nan, dtype=torch.bfloat16, device="cuda")
        out, lse = wide.transpose(1, 2)[..., :64], torch.empty(2, 8, 4, device="cuda")
        attention_hopper.launch(Operands(**x, scale=64**-0.5, out=out, lse=lse), form)
        assert_close(x, out, lse)
        assert wide[..., 64:].isnan().all()


@on_hopper
@pytest.mark.parametrize("heads", [(32, 32), (28, 4)])
@pytest.mark.parametrize(
    "form",
    [
        "1 consumer, 3 splits",
        "1 consumer, several tiles",
        "2 consumers, several long tiles",
        "halved keys",
    ],
)
def test_a_thousand_launches_give_the_same_bits(form, heads):
    x = real("cuda", 2, *heads, 1024)
    expected, expected_lse = run(x, FORMS[form], kernel=attention_hopper)
    assert_close(x, expected, expected_lse)
    for _ in range(1000):
        out, lse = run(x, FORMS[form], kernel=attention_hopper)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
