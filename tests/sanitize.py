"""One small case of every kernel, for compute-sanitizer: `compute-sanitizer --tool memcheck python
tests/sanitize.py`.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives every tensor its own allocation, so that a step past its end
is seen.
"""

import torch

import fastdllm_kernels as ops
from fastdllm_kernels import attention_triton
from fastdllm_kernels.attention import Operands

DEVICE, DTYPE = "cuda", torch.bfloat16


def normal(*shape):
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def numbers(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def attention():
    """Split and whole passes, ragged rows, a group of 7, pages, rotation, a width that no tile
    divides.
    """
    for heads, kv_heads, dim, slots in ((4, 4, 128, 300), (7, 1, 64, 90), (2, 2, 96, 513)):
        q, k, v = normal(2, 9, heads, dim), normal(2, 9, kv_heads, dim), normal(2, 9, kv_heads, dim)
        caches = normal(2, slots, kv_heads, dim), normal(2, slots, kv_heads, dim)
        tables = torch.randn(2, slots, dim // 2, device=DEVICE).unbind(0)
        spans = numbers(0, slots - 9), numbers(slots, slots)
        ops.block_attention(
            q,
            k,
            v,
            *caches,
            *spans,
            block_len=numbers(9, 5),
            cos=tables[0],
            sin=tables[1],
            return_lse=True,
        )
        pages = torch.arange(2 * -(-slots // 16), dtype=torch.int32, device=DEVICE).view(2, -1)
        paged = [normal(pages.numel(), 16, kv_heads, dim) for _ in caches]
        ops.block_attention(q, k, v, *paged, *spans, page_table=pages)
        # Forms that the op does not take for such small shapes, and the portable kernel, which it
        # leaves aside on a Hopper.
        x = Operands(
            q,
            k,
            v,
            *caches,
            *spans,
            block_len=numbers(9, 5),
            cos=tables[0],
            sin=tables[1],
            scale=0.1,
            out=torch.empty_like(q),
        )
        if ops.backend.chip_of(q.device).hopper and dim != 96:
            from fastdllm_kernels.attention_hopper import Config, launch

            launch(x, Config(2, 64, 4, splits=2))
            launch(x, Config(1, 64, 3, programs=1))
            launch(x, Config(2, 64, 3, halve_keys=True))
        attention_triton.launch(x)


def selection():
    logits, tokens = normal(2, 9, 5003), torch.full((2, 9), 7, device=DEVICE)
    rules = ops.Threshold(0.5), ops.Factor(1.0), ops.Quota(4), ops.Quota(4, "dream")
    later = ops.Frechet(), ops.EntropyBound(), ops.ProgressThreshold(), ops.Neighbours()
    scores = *ops.SCORES, *map(ops.score_of, later)
    for rule, score in zip((*rules, *later), scores, strict=True):
        ops.confidence_select(
            logits, tokens.clone(), mask_id=7, rule=rule, score=score, temperature=0.7, seed=1
        )
    ops.token_confidence(
        logits.flatten(0, 1), return_logsumexp=True, return_entropy=True, return_margin=True
    )
    ops.token_confidence_partials(logits.flatten(0, 1), vocab_start=2)
    for dtype in (logits.dtype, torch.float32):
        each = torch.tensor([0.2, 1.0], device=DEVICE)
        ops.confidence_select(
            logits.to(dtype),
            tokens.clone(),
            mask_id=7,
            rule=rules[0],
            temperature=each,
            top_p=1 - each / 4,
            top_k=numbers(0, 40),
            filtered_score=True,
            seed=1,
        )


def layers():
    x, weight, norm = normal(9, 200), normal(136, 200), normal(136)
    ops.linear(x, weight, norm)
    ops.linear_swiglu(x, weight)
    ops.linear_rms_norm(x, weight, normal(9, 136), norm, 1e-5)
    ops.rms_norm(normal(9, 136), norm, 1e-5, normal(9, 136))
    ops.rms_norm(normal(3, 17000), normal(17000), 1e-5)
    ops.swiglu(normal(9, 270))
    q, k, v = normal(2, 9, 4, 64), normal(2, 9, 2, 64), normal(2, 9, 2, 64)
    cos, sin = torch.randn(2, 40, 32, device=DEVICE).unbind(0)
    ops.rope_to_cache(
        q,
        k,
        v,
        cos,
        sin,
        numbers(0, 31),
        normal(2, 40, 2, 64),
        normal(2, 40, 2, 64),
        length=numbers(9, 4),
    )


def wild():
    """Starts outside the cache and page tables that name no page: nothing outside is written, and
    no page outside is read.
    """
    least, most = -(2**31), 2**31 - 1
    q, k, v = normal(4, 9, 4, 64), normal(4, 9, 2, 64), normal(4, 9, 2, 64)
    cos, sin = torch.randn(2, 40, 32, device=DEVICE).unbind(0)
    starts = numbers(least, -4, 35, most)
    tables = numbers(0, 1, 2, -1, least, 3, 7, 1, most, 6, 5, 4).view(4, 3)
    ops.rope_to_cache(q, k, v, cos, sin, starts, normal(4, 40, 2, 64), normal(4, 40, 2, 64))
    pages = normal(7, 16, 2, 64), normal(7, 16, 2, 64)
    inside = numbers(0, 12, 30, 39)
    for start in (starts, inside):
        ops.rope_to_cache(q, k, v, cos, sin, start, *pages, page_table=tables)
    kv_len = numbers(48, 48, 48, 48)
    ops.block_attention(q, k, v, *pages, inside, kv_len, page_table=tables)
    rows = normal(4, 48, 2, 64), normal(4, 48, 2, 64)
    for column in (0, 1, 2):
        table = tables[:, column : column + 1]
        ops.block_attention(q, k, v, *rows, inside, kv_len, page_table=table)


if __name__ == "__main__":
    for run in (attention, selection, layers, wild):
        run()
    torch.cuda.synchronize()
    print("every kernel ran")
