"""confidence_select's kernels compile for every chip without spills, in every configuration that
can be picked.
"""

import os

import compile_check
import pytest
import torch

from fastdllm_kernels import (
    EntropyBound,
    Factor,
    Frechet,
    Neighbours,
    ProgressThreshold,
    Quota,
    Threshold,
)

V = 126464
SCORES = ("confidence", "margin", "entropy", "random")
THRESHOLD, FACTOR, EVEN, DREAM = Threshold(), Factor(), Quota(4), Quota(4, "dream")
RULES = (THRESHOLD, FACTOR, EVEN, DREAM)
FRECHET, BOUND, PROGRESS, NEAR = Frechet(), EntropyBound(), ProgressThreshold(), Neighbours()


def cases():
    """(B, T, V, dtype, rule, score, temperature): each kernel body once, and the corners of the
    configuration.
    """
    bf16 = torch.bfloat16
    yield from (
        (1, 32, V, bf16, rule, score, 0.0) for rule, score in zip(RULES, SCORES, strict=True)
    )
    yield 32, 32, V, bf16, FRECHET, "confidence", 0.0
    yield 32, 32, V, bf16, BOUND, "entropy", 0.0
    yield 1, 32, V, bf16, PROGRESS, "margin", 0.0
    yield 1, 32, V, bf16, NEAR, "margin", 0.0
    yield 1, 32, V, bf16, THRESHOLD, "confidence", 0.5
    yield 1, 32, V, bf16, DREAM, "margin", 0.5
    yield from (
        (rows, 32, V, bf16, THRESHOLD, "confidence", 0.0) for rows in (8, 32)
    )  # more tiles a program
    yield 1, 256, V, torch.float32, FACTOR, "margin", 0.0  # ranks over the widest usual block
    yield 1, 2048, 1024, torch.float16, EVEN, "entropy", 0.0  # and over the widest of all
    yield 1, 256, V, bf16, BOUND, "entropy", 0.0  # sums in float64
    yield 1, 2048, 1024, torch.float16, NEAR, "confidence", 0.0
    yield 4, 1, 257, bf16, THRESHOLD, "confidence", 0.0  # loads that cannot be wide
    if os.environ.get("FASTDLLM_COMPILE_ALL"):
        for dtype in (bf16, torch.float16, torch.float32):
            for score in SCORES:
                for temperature in (0.0, 0.5):
                    for shape in ((1, 1, V), (1, 4, V), (8, 64, V), (32, 32, 152064), (2, 33, 100)):
                        yield *shape, dtype, RULES[SCORES.index(score)], score, temperature


def filters():
    """(dtype, changes of a Scoring of 32 rows of V): each body of the search and of a filtered scan
    once, and its corners.
    """

    def each(dtype):
        return torch.empty(32, dtype=dtype, device="meta")

    bf16, fp32 = torch.bfloat16, torch.float32
    yield bf16, {"temperature": 0.2, "top_p": 0.95}
    yield bf16, {"temperature": 0.2, "top_p": 0.95, "filtered_score": True, "score": "entropy"}
    yield bf16, {"temperature": 0.2, "top_k": 50, "score": "margin"}
    yield fp32, {"temperature": 0.2, "top_p": 0.95, "top_k": 50, "filtered_score": True}
    yield torch.float16, {"temperature": 0.2, "top_p": 0.95, "rows": 3, "vocab": 257}
    yield bf16, {"temperature": 0.2, "top_p": 0.95, "top_k": 50, "rows": 1024}
    yield (
        bf16,
        {
            "temperatures": each(fp32),
            "top_ps": each(fp32),
            "top_ks": each(torch.int32),
            "filtered_score": True,
        },
    )
    yield bf16, {"temperatures": each(fp32), "score": "margin"}


def scoring(logits, mask_id, vocab_size, score, temperature=0.0, **changes):
    """A select.Scoring without filters, with changes."""
    from fastdllm_kernels.select import Scoring

    none = dict.fromkeys(Scoring._fields)
    plain = none | {"top_p": 1.0, "top_k": 0, "filtered_score": False, "seed_number": 7}
    asked = {
        "logits": logits,
        "mask_id": mask_id,
        "vocab_size": vocab_size,
        "score": score,
        "temperature": temperature,
    }
    return Scoring(**plain | asked | changes)


def launches(arch):
    """Launch both ops as they would on that chip."""
    from fastdllm_kernels import filter_triton
    from fastdllm_kernels.backend import Chip
    from fastdllm_kernels.rules import flatten, per_row_fields, with_row_values
    from fastdllm_kernels.select import Commit, Rows
    from fastdllm_kernels.select_triton import config, launch_confidence, launch_select

    chip = Chip(
        compile_check.MULTIPROCESSORS[arch], compile_check.SHARED_LIMIT[arch], overlap=arch >= 90
    )

    def empty(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    for rows, width, vocab, dtype, rule, score, temperature in cases():
        logits = empty(rows, width, vocab, dtype=dtype)
        tokens = empty(rows, width, dtype=torch.int64)
        values = empty(rows, width, dtype=torch.float32)
        flags = empty(rows, width, dtype=torch.bool)
        vector = None
        if score in ("margin", "random"):  # whatever may be a tensor for each row is one
            vector = empty(rows, dtype=torch.int64)
            each = [empty(rows, dtype=torch.float64) for _ in per_row_fields(rule)]
            rule = with_row_values(rule, each)
        launch_select(
            scoring(logits, 5, vocab, score, temperature, seed=vector),
            Commit(
                tokens,
                None if vector is None else flags,
                vector,
                *flatten(rule, tokens.device),
                tokens,
                values,
                flags,
                empty(rows, dtype=torch.int32),
            ),
            config(rows * width, vocab, chip, temperature > 0),
        )
    for dtype, changes in filters():
        count, vocab = changes.pop("rows", 32), changes.pop("vocab", V)
        logits = empty(count, vocab, dtype=dtype)
        asked = scoring(logits, 5, vocab, changes.pop("score", "confidence"), **changes)
        both = asked.by_mass and asked.by_count
        launch_confidence(
            asked,
            Rows(position=None, vocab_start=0, entropy=False, margin=False),
            config(count, vocab, chip, draw=True),
            filter_triton.config(count, vocab, dtype.itemsize, chip, both),
        )
    for score in (None, "confidence", "random"):
        launch_confidence(
            scoring(empty(64, V, dtype=torch.bfloat16), 5, V, score),
            Rows(position=None, vocab_start=0, entropy=False, margin=False),
            config(64, V, chip),
        )


@pytest.mark.parametrize("arch", compile_check.ARCHITECTURES)
def test_every_configuration_compiles_without_spills(arch):
    compile_check.assert_fits(compile_check.compile_launches(__file__, "launches", arch))
