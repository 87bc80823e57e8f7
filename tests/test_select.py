"""confidence_select, token_confidence and its partials: kernels and reference against a float64
oracle and each other.
"""

import dataclasses
import math
from typing import ClassVar

import pytest
import torch

import fastdllm_kernels as fk
from fastdllm_kernels import Factor, Quota, Threshold, backend, rules, select
from fastdllm_kernels.noise import gumbel_noise, log_exponential, philox, philox_rounds

triton = pytest.importorskip("triton")
from triton import language as tl  # noqa: E402

from fastdllm_kernels import select_triton  # noqa: E402

INF, NAN = math.inf, math.nan
SCORES = select.SCORES
RULES = [Threshold(0.3), Factor(1.0), Quota(3), Quota(3, schedule="dream")]


def random_logits(device, dtype, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(*shape, generator=generator)).to(device=device, dtype=dtype)


def oracle(z, mask_id=None, dtype=torch.float64):
    """The four results for rows z [N, V], V > 1, by PyTorch's softmax in `dtype`; the proposal is
    the plain argmax.
    """
    p = z.to(dtype).softmax(-1)
    allowed = p.clone()
    if mask_id is not None:
        allowed[:, mask_id] = 0
    largest = allowed.topk(2).values
    return {
        "confidence": largest[:, 0],
        "margin": largest[:, 0] - largest[:, 1],
        "entropy": torch.special.entr(p).sum(-1).neg(),
        "logsumexp": z.to(dtype).logsumexp(-1),
    }


def assert_as_exact_as_pytorch(got, z, name):
    """At most twice what PyTorch's own op loses in fp32 on these logits, plus a few ulps."""
    wanted = oracle(z)[name]
    loss = (oracle(z, dtype=torch.float32)[name] - wanted).abs().max()
    ulps = 4 * torch.finfo(torch.float32).eps * wanted.abs().max().clamp(min=1)
    assert got.dtype == torch.float32
    assert (got.double() - wanted).abs().max() <= 2 * loss + ulps, name


def run_both(logits, tokens, **options):
    """The kernel's and the reference's (Selection, tokens after it); the kernel's outputs start as
    garbage.
    """
    after = [tokens.clone(), tokens.clone()]
    kernel = fk.confidence_select(logits, after[0], **options)
    reference = fk.confidence_select_reference(logits, after[1], **options)
    return (kernel, after[0]), (reference, after[1])


def assert_same(kernel, reference, broken=False):
    """Equal decisions; scores equal to a few ulps. Where a logit is NaN, the proposal means
    nothing.
    """
    (got, tokens), (wanted, wanted_tokens) = kernel, reference
    counts = ~wanted.score.isnan()
    assert broken or counts.all()
    assert torch.equal(got.committed, wanted.committed)
    assert torch.equal(got.remaining, wanted.remaining)
    assert torch.equal(tokens, wanted_tokens)
    assert torch.equal(got.token_ids[counts], wanted.token_ids[counts])
    torch.testing.assert_close(got.score, wanted.score, rtol=4e-6, atol=4e-6, equal_nan=True)


# Lengths around the powers of two that tiles are padded to; vocabularies of both parities, below
# and above a tile.
SHAPES = [(2, 1, 257), (2, 4, 100), (1, 31, 17), (1, 32, 16), (1, 33, 9), (2, 64, 5), (1, 256, 3)]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("B, T, V", SHAPES)
def test_the_kernel_decides_as_the_reference(triton_backend, device, dtype, B, T, V, temperature):
    if T == 256 and temperature:
        B, T = 1, 65  # draws are slow in the interpreter; more positions show nothing more
    logits = random_logits(device, dtype, B, T, V, seed=T)
    tokens = torch.full((B, T), V - 1, device=device)
    tokens[:, T // 2 + 1 :: 3] = 0
    step = torch.arange(B, device=device)
    for turn, score in enumerate(SCORES if T <= 4 else [SCORES[T % 4]]):
        rule = RULES[(turn + T // 32) % 4]
        same = run_both(
            logits,
            tokens,
            mask_id=V - 1,
            rule=rule,
            score=score,
            temperature=temperature,
            seed=11,
            step=step,
        )
        assert_same(*same)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "rule", RULES, ids=lambda rule: f"{type(rule).__name__}-{getattr(rule, 'schedule', '')}"
)
def test_every_rule_works_with_every_score(triton_backend, device, rule, score):
    logits = random_logits(device, torch.float32, 2, 7, 50, seed=2)
    tokens = torch.full((2, 7), 49, device=device)
    assert_same(
        *run_both(
            logits,
            tokens,
            mask_id=49,
            rule=rule,
            score=score,
            seed=3,
            step=torch.tensor([1, 2], device=device),
        )
    )


def test_a_row_of_a_real_vocabulary(triton_backend, device, dtype):
    logits = random_logits(device, dtype, 1, 1, 126464)
    tokens = torch.full((1, 1), 126336, device=device)
    for temperature in (0.0, 1.0):
        options = dict(mask_id=126336, rule=Threshold(0.9), temperature=temperature, seed=2**40 + 7)
        assert_same(*run_both(logits, tokens, **options))


def test_each_row_may_have_its_own_parameter_step_and_seed(triton_backend, device):
    logits = random_logits(device, torch.float32, 3, 6, 40)
    tokens = torch.full((3, 6), 39, device=device)
    step = torch.tensor([0, 1, 5], dtype=torch.int32, device=device)
    seed = torch.tensor([5, -(2**62) - 3, 2**33], device=device)
    for rule in (
        Threshold(torch.tensor([0.1, 0.6, 2.0], device=device)),
        Factor(torch.tensor([0.5, 1.0, 9.0], dtype=torch.float64, device=device)),
        Quota(torch.tensor([1, 3, 7], device=device)),
        Quota(torch.tensor([2, 4, 6], dtype=torch.int32, device=device), schedule="dream"),
    ):
        assert_same(
            *run_both(logits, tokens, mask_id=39, rule=rule, temperature=0.5, seed=seed, step=step)
        )
    # A view that is not contiguous, and one number for all.
    spread = torch.stack([seed, seed + 1], 1)[:, 0]
    one = run_both(logits, tokens, mask_id=39, rule=Threshold(0.5), temperature=0.5, seed=spread)
    assert_same(*one)
    assert not torch.equal(one[0][0].token_ids[0], one[0][0].token_ids[1])


@dataclasses.dataclass(frozen=True, eq=False)
class Decay:
    """A rule of two parameters: commit what scores at least tau less `ease` a step, and the best
    candidate. `strict`: only what scores more.
    """

    tau: float | torch.Tensor = rules.per_row(0.5)
    ease: float | torch.Tensor = rules.per_row(0.125)
    strict: bool = False

    def commit(self, scores, candidates, step):
        bound = rules._column(self.tau, scores)
        bound = bound - rules._column(self.ease, scores) * step[:, None].float()
        sure = scores > bound if self.strict else scores >= bound
        return candidates & (sure | (rules._ranks(scores, candidates) == 0))


@dataclasses.dataclass(frozen=True, eq=False)
class FusedDecay(Decay):
    """The same with a branch of the kernel."""

    branch: ClassVar[str] = "decay"


@triton.jit
def _chosen_decay(
    scores,
    able,
    parameters,
    step,
    width,
    RULE: tl.constexpr,
    FIXED: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What Decay's branch in select_triton._chosen would be."""
    tl.static_assert(RULE == "decay")
    tau, ease = parameters[0], parameters[1]
    bound = tau - ease * step.to(tl.float32)
    sure = scores > bound if FIXED[0] else scores >= bound
    order = tl.where(able, scores, float("-inf"))
    return able & (sure | (select_triton._ranks(order, WIDTH, CHUNK) == 0))


DECAYS = [(0.6, 0.25), (torch.tensor([0.9, 0.2]), 0.25), (torch.tensor([0.9, 0.2]), None)]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("tau, ease", DECAYS)
def test_a_rule_of_two_parameters_is_a_dataclass_and_a_branch(
    either_backend, device, monkeypatch, tau, ease, strict
):
    """Nothing else knows of it: its own fields, its own branch."""
    monkeypatch.setattr(select_triton, "_chosen", _chosen_decay)
    if isinstance(tau, torch.Tensor):
        tau = tau.to(device)
    if ease is None:
        ease = torch.tensor([0.0, 0.0625], dtype=torch.float64, device=device)
    logits = random_logits(device, torch.float32, 2, 9, 30, seed=7)
    tokens = torch.full((2, 9), 29, device=device)
    step = torch.tensor([0, 3], device=device)
    results = []
    for kind in (FusedDecay, Decay):
        after = tokens.clone()
        rule = kind(tau, ease, strict)
        result = fk.confidence_select(logits, after, mask_id=29, rule=rule, step=step)
        results.append((result, after))
    assert_same(*results)
    masks = torch.ones_like(tokens, dtype=torch.bool)
    wanted = Decay(tau, ease, strict).commit(results[1][0].score, masks, step)
    assert torch.equal(results[0][0].committed, wanted) and 2 < wanted.sum() < 18


def test_a_branch_that_the_kernel_does_not_have_is_no_silent_other_rule(triton_backend, device):
    logits = random_logits(device, torch.float32, 1, 3, 10)
    tokens = torch.full((1, 3), 9, device=device)
    with pytest.raises(Exception) as raised:
        fk.confidence_select(logits, tokens, mask_id=9, rule=FusedDecay())
    said, error = "", raised.value
    while (
        error is not None
    ):  # Triton tells the kernel first, and the function it calls as its cause
        said, error = said + str(error), error.__cause__
    assert "no branch of this name" in said


def leftmost(scores, candidates, step):
    return candidates & (candidates.cumsum(1) == 1)


class Bolder(Threshold):
    """A subclass with a commit of its own, which must be the one that runs."""

    def commit(self, scores, candidates, step):
        return candidates


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("score", SCORES)
def test_a_rule_without_a_branch_sees_the_same_proposals_and_scores(
    either_backend, device, dtype, score, temperature
):
    logits = random_logits(device, dtype, 2, 5, 40)
    tokens = torch.full((2, 5), 39, device=device)
    tokens[0, :2] = 7
    options = dict(
        mask_id=39,
        score=score,
        temperature=temperature,
        seed=torch.tensor([3, 4], device=device),
        vocab_size=40,
    )
    fused = fk.confidence_select(logits, tokens.clone(), rule=Threshold(0.5), **options)
    for rule, count in ((leftmost, 2), (Bolder(0.5), 8)):
        after = tokens.clone()
        got = fk.confidence_select(logits, after, rule=rule, **options)
        assert torch.equal(got.token_ids, fused.token_ids)
        torch.testing.assert_close(got.score, fused.score, rtol=1e-6, atol=1e-6)
        assert got.committed.sum() == count and got.remaining.sum() == 8 - count
        assert torch.equal(after, torch.where(got.committed, got.token_ids, tokens))


def test_a_nan_is_reported_to_a_rule_without_a_branch_too(either_backend, device):
    logits = random_logits(device, torch.float32, 2, 3, 20)
    logits[0, 1, 4] = NAN
    tokens = torch.full((2, 3), 19, device=device)
    got = fk.confidence_select(logits, tokens, mask_id=19, rule=lambda s, c, step: c)
    assert got.remaining.tolist() == [-2, 0] and got.score[0, 1].isnan()
    assert got.committed.tolist() == [[True, False, True], [True, True, True]]


@pytest.mark.parametrize("rule", [*RULES, Threshold(INF)])
def test_the_compiler_sees_one_node_whatever_the_rule(device, rule):
    logits = random_logits(device, torch.float32, 2, 4, 20)

    def call(tokens):
        return fk.confidence_select(logits, tokens, mask_id=19, rule=rule).committed

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    tokens = torch.full((2, 4), 19, device=device)
    assert torch.equal(compiled(tokens.clone()), call(tokens.clone()))


def test_the_compiler_takes_tokens_of_any_strides_and_lengths(device):
    def call(logits, tokens):
        chosen = fk.confidence_select(logits, tokens, mask_id=19, rule=Threshold(0.3))
        return chosen.committed, tokens

    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=True)
    for width in (3, 4):
        logits = random_logits(device, torch.float32, 2, width, 20)
        one, two = (torch.full((width, 2), 19, device=device).t() for _ in range(2))
        for got, wanted in zip(compiled(logits, one), call(logits, two), strict=True):
            assert torch.equal(got, wanted)


@triton.jit
def _quota_kernel(masks, steps, step, even, dream, N: tl.constexpr):
    at = tl.arange(0, N)
    m, s, i = tl.load(masks + at).to(tl.int32), tl.load(steps + at), tl.load(step + at)
    tl.store(even + at, select_triton._quota(m, s, i, False).to(tl.int64))
    tl.store(dream + at, select_triton._quota(m, s, i, True).to(tl.int64))


def test_quotas_are_counted_exactly_as_in_the_rules(device):
    generator = torch.Generator().manual_seed(0)
    N = 16384
    masks = torch.randint(0, 257, (N,), generator=generator).to(device)
    steps = torch.randint(1, 257, (N,), generator=generator).to(device)
    steps[::5] = torch.randint(257, 2**24 + 1, steps[::5].shape, generator=generator).to(device)
    step = (torch.rand(N, generator=generator).to(device) * (steps + 1)).long()
    even, dream = torch.full((2, N), -1, device=device)
    _quota_kernel[(1,)](masks, steps, step, even, dream, N=N, enable_fp_fusion=False, num_warps=16)
    assert torch.equal(even, rules.quota_count(masks, steps, step, "even"))
    assert torch.equal(dream, rules.quota_count(masks, steps, step, "dream"))


@pytest.mark.parametrize("score", ["confidence", "margin", "entropy"])
def test_scores_match_a_float64_oracle(either_backend, device, dtype, score):
    for V in (2, 100, 257):
        z = random_logits(device, dtype, 6, V, seed=V)
        z[1], z[2, 0], z[3, 1:] = 0, 30, -INF
        got = fk.token_confidence(
            z, score=score, return_logsumexp=True, return_entropy=True, return_margin=True
        )
        assert torch.equal(got.token_ids, z.argmax(-1))
        assert_as_exact_as_pytorch(got.score, z, score)
        for name in ("logsumexp", "entropy", "margin"):
            assert_as_exact_as_pytorch(getattr(got, name), z, name)


def test_the_mask_is_never_proposed_but_stays_in_the_sum(either_backend, device, dtype):
    z = random_logits(device, dtype, 3, 100)
    z[0, 7], z[1, 7] = 60, z[1].max()  # far ahead; a tie
    z[2, 0:99:3] = z[2].max() + 1  # the mask among many equals
    for mask_id in (7, 0, 99):
        got = fk.token_confidence(z, mask_id=mask_id, return_margin=True)
        wanted = oracle(z, mask_id)
        offered = z.float().index_fill(1, torch.tensor([mask_id], device=device), -INF)
        assert torch.equal(got.token_ids, offered.argmax(-1))
        torch.testing.assert_close(got.score.double(), wanted["confidence"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(got.margin.double(), wanted["margin"], rtol=1e-5, atol=1e-6)


def test_ties_go_to_the_lowest_id_and_the_lower_position(
    either_backend, device, dtype, monkeypatch
):
    monkeypatch.setattr(select_triton, "config", lambda *a: select_triton.Config(32, 2, 4))
    z = torch.zeros(2, 5, 200, dtype=dtype, device=device)
    z[0, :, 130], z[0, :, 60], z[0, :, 61], z[1, :, 199] = 9, 9, 9, 9
    tokens = torch.full((2, 5), 3, device=device)
    got = fk.confidence_select(z, tokens, mask_id=3, rule=Threshold(2.0), score="margin")
    assert got.token_ids.tolist() == [[60] * 5, [199] * 5]
    assert got.score[0].tolist() == [0] * 5  # equal best two
    assert got.committed.nonzero().tolist() == [[0, 0], [1, 0]]
    assert tokens.tolist() == [[60, 3, 3, 3, 3], [199, 3, 3, 3, 3]] and got.remaining.tolist() == [
        4,
        4,
    ]
    everywhere = fk.token_confidence(torch.zeros(2, 200, dtype=dtype, device=device), mask_id=0)
    assert everywhere.token_ids.tolist() == [1, 1]


def test_rows_without_a_finite_logit_have_probability_zero(either_backend, device, dtype):
    z = torch.full((4, 40), -INF, dtype=dtype, device=device)
    z[1, 0] = 2  # only the mask
    z[2] = torch.finfo(dtype).min
    z[3, 5], z[3, 6] = torch.finfo(dtype).max, -INF
    got = fk.token_confidence(
        z, mask_id=0, return_logsumexp=True, return_entropy=True, return_margin=True
    )
    assert got.token_ids.tolist() == [1, 1, 1, 5]
    torch.testing.assert_close(got.score.cpu(), torch.tensor([0, 0, 1 / 40, 1]))
    assert got.logsumexp[:2].tolist() == [-INF, 2] and got.entropy[0] == 0
    assert got.margin.tolist() == [0, 0, 0, 1]
    assert fk.token_confidence(z, mask_id=0, temperature=1.0, seed=0).token_ids[0] == 1


def test_a_certain_token_scores_exactly_one(either_backend, device, dtype):
    z = random_logits(device, dtype, 3, 300)
    z[:, 200] = 300
    got = fk.token_confidence(z)
    assert got.score.tolist() == [1, 1, 1]
    tokens = torch.full((1, 3), 299, device=device)
    assert fk.confidence_select(z[None], tokens, mask_id=299, rule=Threshold(1.0)).committed.all()


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("score", SCORES)
def test_a_nan_is_reported_and_never_committed(either_backend, device, dtype, score, temperature):
    z = random_logits(device, dtype, 4, 5, 70)
    z[0, 3, 0], z[0, 4, 69] = NAN, NAN
    z[1] = NAN
    z[2, 0, 69] = NAN  # the mask's logit is in the sum: it matters too
    z[3, 0] = NAN  # no candidate
    tokens = torch.full((4, 5), 69, device=device)
    tokens[3, 0] = 8
    before = tokens.clone()
    got = fk.confidence_select(
        z, tokens, mask_id=69, rule=Threshold(-99.0), score=score, temperature=temperature, seed=1
    )
    assert got.remaining.tolist() == [-4, -1, -1, 0]
    broken = torch.zeros(4, 5, dtype=torch.bool, device=device)
    broken[0, 3:], broken[1], broken[2, 0] = True, True, True
    assert torch.equal(got.score.isnan(), broken)
    wanted = ~broken
    wanted[3, 0] = False
    assert torch.equal(got.committed, wanted)
    assert torch.equal(tokens, torch.where(wanted, got.token_ids, before))
    assert got.token_ids[3, 0] == 8 and got.score[3, 0] == -INF


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mask_id", [0, 2, 4])
@pytest.mark.parametrize("mask_logit, lse", [(-INF, -INF), (3.0, 3.0)])
def test_the_mask_is_not_proposed_where_nothing_else_is_likely(
    mask_logit, lse, mask_id, temperature, device, either_backend
):
    logits = torch.full((2, 5), -INF, device=device)
    logits[:, mask_id] = mask_logit
    other = int(mask_id == 0)
    wanted = [torch.full((2,), value) for value in (0.0, lse, 0.0, 0.0)]
    names = ("return_logsumexp", "return_entropy", "return_margin")
    options = {"mask_id": mask_id, "temperature": temperature, "seed": 1}
    got = fk.token_confidence(logits, **options, **dict.fromkeys(names, True))
    assert got.token_ids.tolist() == [other, other]
    for value, number in zip(got[1:], wanted, strict=True):
        assert torch.equal(value.cpu(), number)
    halves = [
        fk.token_confidence_partials(logits[:, at : at + 2], vocab_start=at, **options)
        for at in (2, 0)
    ]
    merged = fk.merge_confidence_partials(halves)
    assert merged.token_ids.tolist() == [other, other]
    tokens = torch.full((1, 2), mask_id, device=device)
    fk.confidence_select(logits[None], tokens, rule=Quota(1), **options)
    assert tokens.tolist() == [[other, other]]


def test_an_infinite_logit_is_as_in_the_reference(triton_backend, device):
    z = random_logits(device, torch.float32, 1, 4, 70)
    z[0, 0, 5], z[0, 1, 69], z[0, 2, 3:5] = INF, INF, INF
    tokens = torch.full((1, 4), 69, device=device)
    for score in SCORES:
        assert_same(
            *run_both(z, tokens, mask_id=69, rule=Quota(1), score=score, seed=1), broken=True
        )


def test_positions_that_are_no_candidates_are_left_alone(either_backend, device, dtype):
    z = random_logits(device, dtype, 2, 6, 33)
    candidates = torch.tensor([[1, 0, 1, 0, 0, 1], [0] * 6], dtype=torch.bool, device=device)
    z[~candidates] = NAN
    canvas = torch.arange(40, device=device).view(2, 20)
    tokens = canvas[:, 3:9]  # a span of a canvas
    before = canvas.clone()
    got = fk.confidence_select(z, tokens, mask_id=32, rule=Threshold(0.0), candidates=candidates)
    assert torch.equal(got.committed, candidates)
    assert torch.equal(got.token_ids, tokens) and got.remaining.tolist() == [0, 0]
    outside = torch.ones(2, 20, dtype=torch.bool, device=device)
    outside[:, 3:9] = ~candidates
    assert torch.equal(canvas[outside], before[outside])
    assert (got.score[~candidates] == -INF).all()


def test_rows_may_be_addressed_through_strides(triton_backend, device, dtype):
    wide = torch.full((2, 9, 70), NAN, dtype=dtype, device=device)
    wide[:, 2:7, :50] = random_logits(device, dtype, 2, 5, 50)
    tokens = torch.full((2, 5), 49, device=device)
    options = dict(mask_id=49, rule=Threshold(0.2), temperature=0.3, seed=5)
    plain = fk.confidence_select(wide[:, 2:7, :50].contiguous(), tokens.clone(), **options)
    for view in (wide[:, 2:7, :50], wide.transpose(0, 1).contiguous().transpose(0, 1)[:, 2:7, :50]):
        got = fk.confidence_select(view, tokens.clone(), **options)
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
    got = fk.confidence_select(wide[:, 2:7], tokens.clone(), vocab_size=50, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_a_padded_vocabulary_counts_for_nothing(either_backend, device, dtype):
    z = random_logits(device, dtype, 3, 64)
    z[0, 50:], z[1, 50:], z[2, 50:] = NAN, INF, 1000
    got = fk.token_confidence(
        z, vocab_size=50, mask_id=4, temperature=0.5, seed=1, return_entropy=True
    )
    plain = fk.token_confidence(
        z[:, :50].contiguous(), mask_id=4, temperature=0.5, seed=1, return_entropy=True
    )
    assert torch.equal(got.token_ids, plain.token_ids) and got.score.isfinite().all()
    torch.testing.assert_close(got.entropy, plain.entropy)


# (counter, key, result) of philox4x32-10 in the known-answer file of its authors' library.
KNOWN = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize("counter, key, result", KNOWN)
def test_philox_gives_the_published_answers(counter, key, result):
    words = [torch.tensor([int(word, 16)]) for word in f"{counter} {key}".split()]
    assert " ".join(f"{int(word):08x}" for word in philox_rounds(*words)) == result


@triton.jit
def _words_kernel(seeds, out, N: tl.constexpr):
    at = tl.arange(0, N)
    pair = at.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seeds + at), pair, pair + 3, pair * 0, pair * 0)
    tl.store(out + at, w0.to(tl.int64))
    tl.store(out + N + at, w1.to(tl.int64))
    tl.store(out + 2 * N + at, w2.to(tl.int64))
    tl.store(out + 3 * N + at, w3.to(tl.int64))


def test_the_kernels_generator_is_the_references(device):
    seeds = torch.randint(
        -(2**63), 2**63 - 1, (64,), generator=torch.Generator().manual_seed(0)
    ).to(device)
    out = torch.full((4, 64), -1, device=device)
    _words_kernel[(1,)](seeds, out, N=64, enable_fp_fusion=True)
    at = torch.arange(64, device=device)
    assert torch.equal(out, torch.stack(philox(seeds, at, at + 3)))


@triton.jit
def _log_exponential_kernel(high, low, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(
        out + at,
        select_triton._log_exponential(
            tl.load(high + at).to(tl.uint32), tl.load(low + at).to(tl.uint32)
        ),
    )


def test_the_exponential_keeps_fp32_precision_in_both_tails(device):
    generator = torch.Generator().manual_seed(1)
    top = 2**32 - 1
    high = torch.cat(
        [
            torch.randint(0, 2**32, (2000,), generator=generator),
            torch.tensor([0, 0, 0, 1, 2**31 - 1, 2**31] * 3),
        ]
    )
    # Every binade near 0 and near 1.
    small = torch.tensor([max(0, 2**k + d) for k in range(32) for d in (-1, 0, 1)])
    high = torch.cat(
        [high, small, top - small, torch.full((60,), top), torch.zeros(60, dtype=torch.int64)]
    ).clamp(0, top)
    low = torch.randint(0, 2**32, high.shape, generator=generator)
    low[-120:] = torch.cat([top - small[:60], small[:60]]).clamp(0, top)
    exact = []
    for h, w in zip(high.tolist(), low.tolist(), strict=True):
        count = 2 * ((h << 32) + w) + 1  # U = count / 2^65
        near_one = count > 2**64
        exact.append(
            math.log(
                -math.log1p(-(2**65 - count) / 2**65) if near_one else -math.log(count / 2**65)
            )
        )
    exact = torch.tensor(exact, dtype=torch.float64)
    size = triton.next_power_of_2(len(exact))
    pad = [
        torch.nn.functional.pad(words, (0, size - len(words))).to(device) for words in (high, low)
    ]
    kernel = torch.full((size,), NAN, device=device)
    _log_exponential_kernel[(1,)](*pad, kernel, N=size, enable_fp_fusion=True)
    eps = torch.finfo(torch.float32).eps
    for got in (log_exponential(high, low), kernel[: len(exact)].cpu()):
        # An absolute error of ln E is a relative error of E.
        assert ((got.double() - exact).abs() <= eps * (4 + 2 * exact.abs())).all()


def chi_squared(counts, p):
    """How many standard deviations the chi-squared statistic of counts lies above its mean."""
    wanted = p * counts.sum()
    statistic = ((counts - wanted) ** 2 / wanted).sum().item()
    freedom = len(p) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def test_a_million_draws_follow_the_softmax():
    temperature, N = 0.7, 1_000_000
    p = torch.tensor([0.5, 0.3, 0.1, 0.05, 0.04, 0.009, 0.00098, 1e-5, 1e-5], dtype=torch.float64)
    logits = (p / p.sum()).log().mul(temperature).float()
    counts = torch.zeros(len(p), dtype=torch.float64)
    for chunk in torch.arange(N).split(100_000):
        noise = gumbel_noise(torch.full_like(chunk, 99), chunk, len(p))
        counts += torch.bincount((logits / temperature + noise).argmax(-1), minlength=len(p))
    assert chi_squared(counts, (logits.double() / temperature).softmax(-1)) < 4


def test_rare_tokens_are_drawn_as_often_as_they_should_be():
    """Of a class of tokens of probability p = 1e-8 each (a thousand make 1e-5), one beats the rest
    when E < p E'.

    Only small E can, so only such are drawn: U's first 20 bits are ones. A 24-bit uniform has no E
    between 0 and 6e-8.
    """
    N, p, condition = 1_000_000, 1e-8, 2.0**-20
    words = philox(torch.tensor(3), torch.arange(N), torch.tensor(0))
    rest = log_exponential(words[2], words[3])
    rare = log_exponential(words[0] | (0xFFFFF << 12), words[1])
    expected = N * p / condition
    deviation = math.sqrt(expected)
    assert abs((rare < rest + math.log(p)).sum().item() - expected) < 4 * deviation
    coarse = ((words[0] | (0xFFFFF << 12)) >> 8).float() * 2.0**-24
    low_precision = torch.log(-torch.log(coarse.clamp(max=1 - 2.0**-24)))
    assert abs((low_precision < rest + math.log(p)).sum().item() - expected) > 20 * deviation


def test_draws_do_not_depend_on_the_split(triton_backend, device, monkeypatch):
    logits = random_logits(device, torch.float32, 1, 3, 131)
    tokens = torch.full((1, 3), 130, device=device)
    results = []
    for config in ((256, 1, 1), (64, 3, 1), (32, 2, 3), (16, 1, 9)):
        monkeypatch.setattr(select_triton, "config", lambda *a, c=config: select_triton.Config(*c))
        results += [
            fk.confidence_select(
                logits,
                tokens.clone(),
                mask_id=130,
                rule=Threshold(0.1),
                score=score,
                temperature=temperature,
                seed=4,
            )
            for temperature, score in (
                (0.0, "margin"),
                (0.0, "entropy"),
                (0.4, "confidence"),
                (2.0, "margin"),
            )
        ]
    for i, got in enumerate(results):
        first = results[i % 4]
        assert torch.equal(got.token_ids, first.token_ids) and torch.equal(
            got.committed, first.committed
        )
        torch.testing.assert_close(got.score, first.score, rtol=1e-6, atol=2e-6)


def test_the_same_seed_draws_the_same_and_another_another(either_backend, device):
    z = torch.zeros(1, 12, 64, device=device)
    tokens = torch.full((1, 12), 63, device=device)

    def draw(seed):
        return fk.confidence_select(
            z, tokens.clone(), mask_id=63, rule=Quota(1), temperature=1.0, seed=seed
        ).token_ids

    seven = draw(7)
    assert torch.equal(seven, draw(7)) and torch.equal(
        seven, draw(torch.tensor([7], device=device))
    )
    assert (seven != draw(8)).sum() > 6 and (seven != draw(7 + 2**32)).sum() > 6
    assert len(seven.unique()) > 6  # positions draw apart


def test_draws_agree_between_kernel_and_reference(triton_backend, device):
    N = 200_000 if device.type == "cuda" else 100
    z = random_logits(device, torch.float32, 1, 120).expand(N, 120)  # rows may share their logits
    position = torch.arange(N, device=device) * 7
    got = fk.token_confidence(z, temperature=1.0, seed=5, position=position)
    wanted = fk.token_confidence_reference(z, temperature=1.0, seed=5, position=position)
    # Logarithms differ in their last bit between devices: a near tie in ten thousand may fall the
    # other way.
    assert (got.token_ids != wanted.token_ids).sum() <= N // 10_000


@pytest.mark.parametrize("parts, mask_id", [(1, None), (2, 40), (4, 0), (8, 201)])
@pytest.mark.parametrize("temperature", [0.0, 0.8, [0.0, 0.8, 1.0, 0.0, 0.5]], ids=str)
def test_partials_of_a_split_vocabulary_merge_to_the_whole(
    either_backend, device, dtype, parts, mask_id, temperature
):
    N, V = 5, 202
    z = random_logits(device, dtype, N, V)
    z[1], z[2, :100], z[3, 40] = -INF, -INF, 50
    z[4, ::9] = z[4].max() + 1
    each = 2 * math.ceil(V / parts / 2)
    seed = torch.arange(N, device=device) + 2**35
    position = torch.arange(N, device=device) * 3
    if isinstance(temperature, list):
        temperature = torch.tensor(temperature, device=device)
    draw = dict(temperature=temperature, seed=seed, position=position)
    partials = [
        fk.token_confidence_partials(
            z[:, start : start + each], vocab_start=start, mask_id=mask_id, **draw
        )
        for start in range(0, V, each)
    ]
    for score in SCORES:
        asked = dict(score=score, return_logsumexp=True, return_entropy=True, return_margin=True)
        merged = fk.merge_confidence_partials(partials[::-1], seed=seed, position=position, **asked)
        whole = fk.token_confidence_reference(z, mask_id=mask_id, **draw, **asked)
        assert torch.equal(merged.token_ids, whole.token_ids)
        for got, wanted in zip(merged[1:], whole[1:], strict=True):
            torch.testing.assert_close(got, wanted, rtol=4e-6, atol=4e-6)


def test_a_nan_in_one_part_is_kept_by_the_merge(either_backend, device):
    z = random_logits(device, torch.float32, 2, 40)
    z[0, 33] = NAN
    partials = [fk.token_confidence_partials(z[:, s : s + 20], vocab_start=s) for s in (0, 20)]
    assert [part.has_nan.tolist() for part in partials] == [[False, False], [True, False]]
    merged = fk.merge_confidence_partials(partials)
    assert merged.score.isnan().tolist() == [True, False] and (merged.token_ids < 40).all()


def test_token_confidence_scores_as_confidence_select(either_backend, device, dtype):
    z = random_logits(device, dtype, 6, 90)
    tokens = torch.full((1, 6), 89, device=device)
    for score in SCORES:
        for temperature in (0.0, 0.6):
            options = dict(mask_id=89, score=score, temperature=temperature, seed=6)
            selected = fk.confidence_select(z[None], tokens.clone(), rule=Quota(9), **options)
            alone = fk.token_confidence(z, **options)
            assert torch.equal(alone.token_ids, selected.token_ids[0])
            torch.testing.assert_close(alone.score, selected.score[0], rtol=1e-6, atol=1e-6)
            assert alone[2:] == (None, None, None)


def test_ops_are_registered_with_shapes_for_the_compiler(device):
    z = torch.zeros(3, 8, device=device)
    for score in ("confidence", None):  # None: the numbers of the partials
        scoring = select.Scoring(z, 7, 8, score, 0.0, None, 1.0, None, 0, None, False, 0, None)
        arguments = (*scoring, *select.Rows(None, 0, entropy=False, margin=False))
        tests = ["test_schema", "test_faketensor"]
        torch.library.opcheck(
            torch.ops.fastdllm.token_confidence.default, arguments, test_utils=tests
        )


def test_the_compiler_may_make_numbers_symbols(device):
    z = random_logits(device, torch.float32, 6, 20)

    def draw(temperature):
        return fk.token_confidence(z, temperature=temperature, seed=1).token_ids

    compiled = torch.compile(draw, fullgraph=True, backend="eager", dynamic=True)
    for temperature in (0.5, 0.6, 0.7):
        assert torch.equal(compiled(temperature), draw(temperature))


def test_what_the_kernel_cannot_take_goes_to_the_reference_or_raises(device, monkeypatch):
    z = random_logits(device, torch.float32, 20, 6).T  # the vocabulary is strided
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    assert torch.equal(fk.token_confidence(z).token_ids, z.argmax(-1))
    monkeypatch.setenv(backend.VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="not contiguous in the vocabulary"):
        fk.token_confidence(z)
    with pytest.raises(RuntimeError, match="the block length is 2049"):
        tokens = torch.zeros(1, 2049, dtype=torch.int64, device=device)
        fk.confidence_select(
            torch.zeros(1, 2049, 2, device=device), tokens, mask_id=1, rule=Threshold()
        )


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda z: fk.token_confidence_partials(z, vocab_start=3),
            ValueError,
            "vocab_start: expected an even number",
        ),
        (
            lambda z: fk.token_confidence_partials(z, vocab_start=-2),
            ValueError,
            "vocab_start: expected an int in .*got -2",
        ),
        (
            lambda z: fk.token_confidence_partials(z, vocab_start=2.0),
            TypeError,
            "vocab_start: expected an int",
        ),
        (
            lambda z: fk.token_confidence_partials(z, mask_id="9"),
            TypeError,
            "mask_id: expected an int",
        ),
        (
            lambda z: fk.token_confidence_partials(z, temperature=1.0),
            ValueError,
            "seed: expected an int or a tensor",
        ),
        (
            lambda z: fk.token_confidence(z, score="random", seed=2**63),
            ValueError,
            "seed: expected an int in",
        ),
        (
            lambda z: fk.token_confidence(z, position=[0, 1]),
            TypeError,
            "position: expected a tensor",
        ),
        (lambda z: fk.merge_confidence_partials([]), ValueError, "partials: expected at least one"),
        (
            lambda z: fk.merge_confidence_partials([fk.token_confidence_partials(z)], score="b"),
            ValueError,
            "score: expected",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 8))


H200 = backend.Chip(132, 232448, overlap=True)


# Row counts, two vocabularies and one chip: programs fill the chip, cover every tile once, and none
# is empty.
@pytest.mark.parametrize("rows", [1, 7, 32, 256, 1024, 100_000])
@pytest.mark.parametrize("vocab", [1, 100, 126464, 152064])
@pytest.mark.parametrize("draw", [False, True])
def test_the_cut_covers_the_vocabulary(rows, vocab, draw):
    config = select_triton.config(rows, vocab, H200, draw)
    covered = config.tile_vocab * config.tiles
    assert covered * (config.parts - 1) < vocab <= covered * config.parts
    assert config.tiles == 1 or rows * config.parts >= 3 * 132


@pytest.mark.parametrize(
    "rows, vocab, cut",
    [
        (32, 126464, (4096, 2, 16, 4)),
        (256, 126464, (2048, 11, 6, 2)),
        (1024, 126464, (4096, 11, 3, 2)),
        (32, 152064, (4096, 3, 13, 4)),
        (256, 152064, (2048, 13, 6, 2)),
        (1024, 152064, (4096, 13, 3, 2)),
    ],
)
def test_the_measured_cuts_are_picked(rows, vocab, cut):
    assert select_triton.config(rows, vocab, H200) == select_triton.Config(*cut, overlap=True)


GPU_SHAPES = [
    (1, 32, 126464),
    (32, 32, 126464),
    (1, 32, 152064),
    (32, 32, 152064),
    (1, 256, 126464),
]


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize("B, T, V", GPU_SHAPES)
def test_real_shapes(triton_backend, device, B, T, V, temperature):
    logits = random_logits(device, torch.bfloat16, B, T, V)
    logits[0, 0, 77] = 60
    tokens = torch.full((B, T), V - 128, device=device)
    for score, rule in (
        ("confidence", Threshold(0.01)),
        ("margin", Factor(3.0)),
        ("entropy", Quota(4)),
    ):
        (got, after), (wanted, _) = run_both(
            logits, tokens, mask_id=V - 128, rule=rule, score=score, temperature=temperature, seed=8
        )
        same = got.token_ids == wanted.token_ids
        assert same.float().mean() >= (1 if temperature == 0 else 0.999)
        torch.testing.assert_close(got.score[same], wanted.score[same], rtol=1e-5, atol=1e-5)
        # The rule's decisions, on the kernel's own scores.
        masks = torch.ones_like(got.committed)
        assert torch.equal(
            got.committed,
            rule.commit(got.score, masks, torch.zeros(B, dtype=torch.int64, device=device)),
        )
        assert torch.equal(after, torch.where(got.committed, got.token_ids, tokens))


@pytest.mark.gpu
def test_a_graph_replays_with_other_tokens_thresholds_and_steps(triton_backend, device):
    B, T, V = 2, 32, 126464
    logits = random_logits(device, torch.bfloat16, B, T, V) * 2
    tokens = torch.full((B, T), 5, device=device)
    tau = torch.full((B,), 2.0, device=device)

    def call():
        return fk.confidence_select(logits, tokens, mask_id=5, rule=Threshold(tau))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    for seed in range(4):
        logits.copy_(random_logits(device, torch.bfloat16, B, T, V, seed=seed) * 2)
        tokens.fill_(5)
        tokens[:, seed::3] = 9
        tau.fill_(0.1 * (seed + 1))
        before = tokens.clone()
        graph.replay()
        torch.cuda.synchronize()
        wanted = fk.confidence_select_reference(logits, before, mask_id=5, rule=Threshold(tau))
        assert_same((result, tokens), (wanted, before))


@pytest.mark.gpu
def test_two_streams_at_once(triton_backend, device):
    streams = [torch.cuda.Stream() for _ in range(2)]
    inputs = [random_logits(device, torch.bfloat16, 1, 32, 126464, seed=seed) for seed in range(2)]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(fk.token_confidence(inputs[i][0]))
    torch.cuda.synchronize()
    for i in range(2):
        wanted = fk.token_confidence_reference(inputs[i][0])
        for got in results[i]:
            assert torch.equal(got.token_ids, wanted.token_ids)
            assert torch.equal(got.score, results[i][0].score)


@pytest.mark.gpu
def test_a_thousand_launches_give_identical_bits(triton_backend, device):
    logits = random_logits(device, torch.bfloat16, 1, 32, 126464)
    tokens = torch.full((1, 32), 5, device=device)
    options = dict(mask_id=5, rule=Factor(1.0), temperature=0.8, seed=3)
    first = fk.confidence_select(logits, tokens.clone(), **options)
    differing = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(1000):
        for got, wanted in zip(
            fk.confidence_select(logits, tokens.clone(), **options), first, strict=True
        ):
            differing += (got != wanted).sum()
    assert differing.item() == 0


@pytest.mark.gpu
def test_the_kernels_draws_follow_the_softmax_into_the_tail(triton_backend, device):
    """A million draws; the last 1024 tokens together have probability 1e-5, 1e-8 each."""
    tail = torch.full((1024,), 1e-5 / 1024, dtype=torch.float64)
    p = torch.cat([torch.tensor([0.5, 0.3, 0.1, 0.05, 0.04, 0.01], dtype=torch.float64), tail])
    logits = (0.7 * (p / p.sum()).log()).float().to(device)
    counts = torch.zeros(7, dtype=torch.float64)
    for chunk in torch.arange(1_000_000, device=device).split(250_000):
        drawn = fk.token_confidence(
            logits.expand(len(chunk), -1), temperature=0.7, seed=21, position=chunk
        ).token_ids
        counts += torch.bincount(drawn.clamp(max=6), minlength=7).cpu()
    exact = (logits.double() / 0.7).softmax(-1).cpu()
    grouped = torch.cat([exact[:6], exact[6:].sum()[None]])
    assert chi_squared(counts, grouped) < 4
    assert 1 <= counts[6] <= 25
