"""Top-p, top-k and temperatures of rows: the search for the cut against the definition with a sort,
and what confidence_select and token_confidence make of it.
"""

import math

import pytest
import torch

import fastdllm_kernels as fk
from fastdllm_kernels import Quota, Threshold, backend, select

triton = pytest.importorskip("triton")

from fastdllm_kernels import filter_triton  # noqa: E402

INF, NAN = math.inf, math.nan
# What the operators make of a cut does not depend on the dtype that it was searched in; the search
# takes half the steps in this one.
HALF = torch.float16


def random_logits(device, dtype, *shape, seed=0, spread=4.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(*shape, generator=generator)).to(device=device, dtype=dtype)


def kept_one_by_one(row, mask_id, temperature, top_p, top_k):
    """The ids that the filters keep of a row of numbers: the definition, in Python's floats."""
    ids = [i for i in range(len(row)) if i != mask_id and row[i] > -INF]
    ids.sort(key=lambda i: (-row[i], i))
    power = [math.exp((row[i] - row[ids[0]]) / temperature) for i in ids]
    kept, before = [], 0.0
    for i, mass in zip(ids, power, strict=True):
        if before <= top_p * math.fsum(power):
            kept.append(i)
        before += mass
    return [i for i in kept if row[i] >= row[kept[min(top_k, len(kept)) - 1]]]


FILTERS = [
    (0.2, 0.95, None),
    (1.0, 0.9, None),
    (1.0, 0.013, None),  # one token
    (3.0, 0.999, None),
    (1.0, None, 7),
    (1.0, None, 1),
    (0.5, 0.93, 3),
    (2.0, 0.51, 40),
]


def scoring(logits, mask_id, temperature=0.0, top_p=None, top_k=None, filtered_score=True):
    """The select.Scoring of these numbers or tensors."""
    sampling = select._sampling(
        logits, "confidence", temperature, top_p, top_k, filtered_score, seed=0
    )
    return select.Scoring(logits, mask_id, logits.shape[-1], "confidence", *sampling)


def kept_by_the_kernel(asked, config=None):
    """What the cuts of the kernel's search keep, bool [N, V]."""
    z = asked.logits.float()
    cuts, lasts = filter_triton.launch(asked, (asked.logits.stride(0), 0), chosen=config)
    ids = torch.arange(z.shape[1], device=z.device)
    return (z > cuts[:, None]) | ((z == cuts[:, None]) & (ids <= lasts[:, None]))


def kept_by_the_reference(logits, mask_id, temperature, top_p, top_k):
    z = select._offered(logits.float(), -1 if mask_id is None else mask_id)
    scale = select.inverse_of_rows(temperature, z)
    return select.kept_tokens(z, torch.where(scale > 0, scale, 1)[:, None], top_p, top_k)


def assert_keeps_the_same(logits, mask_id, temperature, top_p, top_k, config=None):
    asked = scoring(logits, mask_id, temperature, top_p, top_k)
    got = kept_by_the_kernel(asked, config)
    wanted = kept_by_the_reference(logits, mask_id, temperature, top_p, top_k)
    counts = logits > -INF
    if mask_id is not None:
        counts[:, mask_id] = False
    assert torch.equal(got & counts, wanted & counts), (temperature, top_p, top_k)
    return wanted


def with_ties(device, dtype, rows, vocab):
    """Rows with many equal logits, of two values, with -inf, with +0 and -0, the mask far ahead."""
    z = random_logits(device, dtype, rows, vocab, seed=vocab)
    z[1] = z[1].round()
    z[2] = 1
    z[2, ::3] = 2
    z[3, ::2] = -INF
    z[4] = (z[4] / 4).round() * 0.5 - 0.5
    z[4, ::5] = -0.0
    z[5, 7 % vocab] = z[5].max() + 3
    return z


@pytest.mark.parametrize("temperature, top_p, top_k", FILTERS)
def test_the_reference_keeps_what_the_definition_says(temperature, top_p, top_k):
    z = with_ties(torch.device("cpu"), torch.float32, 6, 60)
    for mask_id in (None, 7, 0):
        kept = kept_by_the_reference(z, mask_id, temperature, top_p, top_k)
        for row in range(6):
            wanted = kept_one_by_one(z[row].tolist(), mask_id, temperature, top_p or 2, top_k or 99)
            got = kept[row].nonzero()[:, 0].tolist()
            assert [i for i in got if i != mask_id and z[row, i] > -INF] == sorted(wanted)


@pytest.mark.parametrize("mask_id, shift", [(None, 0), (7, 3)])
def test_the_search_keeps_what_the_reference_keeps(device, dtype, mask_id, shift):
    """Each filter in a row of one launch, on one of the kinds of rows."""
    z = with_ties(device, dtype, 6, 257)
    kinds = [(i + shift) % 6 for i in range(len(FILTERS))]
    temperatures, top_ps, top_ks = zip(*FILTERS, strict=True)
    assert_keeps_the_same(
        z[kinds],
        mask_id,
        torch.tensor(temperatures, device=device),
        torch.tensor([1 if p is None else p for p in top_ps], device=device),
        torch.tensor([k or 0 for k in top_ks], dtype=torch.int32, device=device),
    )


@pytest.mark.parametrize("vocab", [2, 3, 100, 1030])
@pytest.mark.parametrize("temperature, top_p, top_k", [(1.0, 0.9, None), (2.0, 0.51, 40)])
def test_vocabularies_of_other_sizes(device, vocab, temperature, top_p, top_k):
    z = with_ties(device, HALF, 6, vocab)[[1, 5]]
    assert_keeps_the_same(z, 1, temperature, top_p, top_k)


def test_the_cut_depends_neither_on_the_parts_nor_on_their_lists(device, dtype):
    """capacity 1: lists of a part do not suffice, and the rows themselves are searched."""
    z = with_ties(device, dtype, 6, 400)[[1, 4]]
    for tile, tiles, capacity in ((64, 2, 128), (128, 1, 1), (512, 1, 16)):
        parts = -(-400 // (tile * tiles))
        config = filter_triton.Config(tile, tiles, parts, capacity)
        assert_keeps_the_same(z, 7, 1.0, 0.93, 30, config)


def test_a_cut_next_to_zero(device, dtype):
    """-0 equals 0, and the numbers beside them are subnormal."""
    tiny = torch.finfo(dtype).tiny / 4
    numbers = torch.tensor([-0.0, 0.0, -tiny, tiny, -1e-3], device=device).to(dtype)
    z = numbers.repeat(4, 40)
    top_p = torch.tensor([0.1001, 0.3001, 0.6501, 0.9001], device=device)
    assert_keeps_the_same(z, 7, 1.0, top_p, None)
    top_k = torch.tensor([39, 41, 121, 170], dtype=torch.int32, device=device)
    assert_keeps_the_same(z, 7, 1.0, None, top_k)


@pytest.mark.parametrize("low", [-INF, -60000.0])
def test_logits_put_far_down_do_not_hide_the_others(device, dtype, low):
    z = random_logits(device, dtype, 3, 600, seed=4)
    z[:, 250:] = low
    top_k = torch.tensor([1, 249, 260], dtype=torch.int32, device=device)
    assert_keeps_the_same(z, 7, 1.0, None, top_k)
    assert_keeps_the_same(z, 7, 1.0, 0.9, None)


def test_a_real_vocabulary(device):
    """A row as a model's is, but for the mask far ahead of all."""
    z = random_logits(device, torch.float16, 1, 126464, seed=5, spread=3.0)
    z[0, 126336] = 30
    kept = assert_keeps_the_same(z, 126336, 1.0, 0.9, None)
    assert 1000 < kept.sum() < 20_000


def test_equal_logits_are_kept_in_the_order_of_their_ids(device, dtype):
    z = torch.zeros(2, 1000, dtype=dtype, device=device)
    z[1, 5:] = -3
    kept = assert_keeps_the_same(z, 10, 1.0, 0.2505, None)
    # The first whose predecessors exceed 0.2505 of 999 is dropped; the mask takes no part.
    assert kept[0].nonzero()[:, 0].tolist() == [i for i in range(253) if i != 10][:251]
    kept = assert_keeps_the_same(z, 10, 1.0, None, 3)
    assert kept[0].sum() >= 999  # all of them equal the third


def test_temperatures_far_out(device, dtype):
    z = with_ties(device, dtype, 6, 300)[[0, 1, 2, 3, 4, 5, 0, 1]]
    temperature = torch.tensor([1e-30, 1e-30, 1e-5, 1e-5, 1e5, 1e5, 1e30, 1e30], device=device)
    assert_keeps_the_same(z, 7, temperature, 0.6, None)


def test_a_filter_that_is_off_in_a_row_keeps_it_whole(device, dtype):
    z = with_ties(device, dtype, 6, 300)
    temperature = torch.tensor([0.2, 1, 1, 0.5, 0, 2], device=device)
    top_p = torch.tensor([0.9, 1, 1, 0.7, 0.5, 0.3], device=device)
    top_k = torch.tensor([0, 0, 5, 2, 0, 2**31 - 1], dtype=torch.int32, device=device)
    kept = assert_keeps_the_same(z, 7, temperature, top_p, top_k)
    assert kept[1].all() and not kept[0].all()
    alone = [
        kept_by_the_reference(
            z[i : i + 1], 7, float(temperature[i]), float(top_p[i]), int(top_k[i])
        )
        for i in range(6)
    ]
    assert torch.equal(kept, torch.cat(alone))


def test_an_argmax_scored_by_the_clean_softmax_is_not_searched_for(device, dtype):
    z = with_ties(device, dtype, 6, 300)
    temperature = torch.tensor([0, 1, 0, 1, 0, 1.0], device=device)
    asked = scoring(z, 7, temperature, 0.5, None, filtered_score=False)
    kept = kept_by_the_kernel(asked)
    assert kept[::2].all() and not kept[1::2].all(1).any()


# What the operators make of it.


def run_both(logits, tokens, **options):
    """The kernel's and the reference's (Selection, tokens after it)."""
    results = []
    for op in (fk.confidence_select, fk.confidence_select_reference):
        after = tokens.clone()
        results.append((op(logits, after, **options), after))
    return results


def assert_same(kernel, reference):
    (got, tokens), (wanted, wanted_tokens) = kernel, reference
    counts = ~wanted.score.isnan()
    assert torch.equal(got.token_ids[counts], wanted.token_ids[counts])
    assert torch.equal(got.committed, wanted.committed)
    assert torch.equal(got.remaining, wanted.remaining)
    assert torch.equal(tokens, wanted_tokens)
    torch.testing.assert_close(got.score, wanted.score, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("filtered_score", [False, True])
@pytest.mark.parametrize("score", select.SCORES)
def test_the_kernel_decides_as_the_reference(triton_backend, device, score, filtered_score):
    logits = with_ties(device, HALF, 6, 257).view(3, 2, 257)
    tokens = torch.full((3, 2), 7, device=device)
    tokens[1, 0] = 9
    options = dict(mask_id=7, rule=Quota(2), score=score, filtered_score=filtered_score, seed=5)
    filters = {
        "confidence": dict(temperature=0.2, top_p=0.95),
        "margin": dict(temperature=0.5, top_k=3),
        "entropy": dict(temperature=0.0, top_p=0.8, top_k=5),
        "random": dict(temperature=torch.tensor([0.7, 0.0, 2.0], device=device), top_p=0.51),
    }[score]
    assert_same(*run_both(logits, tokens, **filters, **options))


def test_a_temperature_alone_scores_what_is_drawn_from(triton_backend, device):
    logits = with_ties(device, HALF, 6, 257).view(2, 3, 257)
    tokens = torch.full((2, 3), 7, device=device)
    options = dict(mask_id=7, rule=Quota(2), temperature=0.7, filtered_score=True, seed=5)
    assert_same(*run_both(logits, tokens, **options))


@pytest.mark.parametrize("filtered_score", [False, True])
def test_each_row_may_have_its_own_temperature_and_filters(either_backend, device, filtered_score):
    logits = random_logits(device, HALF, 5, 1, 200)
    tokens = torch.full((5, 1), 3, device=device)
    temperature = torch.tensor([0.3, 0, 1.7, 0.6, 0], device=device)
    top_p = torch.tensor([0.75, 1, 0.5, 1, 0.25], device=device)
    top_k = torch.tensor([0, 2, 3, 0, 0], dtype=torch.int32, device=device)
    options = dict(mask_id=3, rule=Threshold(0.3), filtered_score=filtered_score)
    seed = torch.arange(5, device=device) + 2**40
    together = fk.confidence_select(
        logits,
        tokens.clone(),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        **options,
    )
    for i in range(5):
        alone = fk.confidence_select(
            logits[i : i + 1],
            tokens[i : i + 1].clone(),
            temperature=float(temperature[i]),
            top_p=float(top_p[i]),
            top_k=int(top_k[i]) or None,
            seed=int(seed[i]),
            **options,
        )
        assert torch.equal(together.token_ids[i : i + 1], alone.token_ids)
        assert torch.equal(together.committed[i : i + 1], alone.committed)
        torch.testing.assert_close(together.score[i : i + 1], alone.score, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("filtered_score", [False, True])
def test_filters_that_keep_all_change_nothing(either_backend, device, filtered_score):
    logits = with_ties(device, HALF, 6, 100).view(2, 3, 100)
    tokens = torch.full((2, 3), 7, device=device)
    options = dict(mask_id=7, rule=Threshold(0.1), temperature=0.8, seed=3)
    options |= dict(filtered_score=filtered_score)
    plain = fk.confidence_select(logits, tokens.clone(), **options)
    one = torch.ones(2, device=device)
    zero = torch.zeros(2, dtype=torch.int32, device=device)
    for filters in (
        dict(top_p=1.0),
        dict(top_k=100),
        dict(top_k=10**6),
        dict(top_p=one),
        dict(top_k=zero),
        dict(top_p=one, top_k=zero + 100),
    ):
        got = fk.confidence_select(logits, tokens.clone(), **filters, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True)), filters


def test_a_temperature_of_0_in_a_tensor_is_the_argmax(either_backend, device):
    logits = with_ties(device, HALF, 6, 100).view(2, 3, 100)
    tokens = torch.full((2, 3), 7, device=device)
    options = dict(mask_id=7, rule=Threshold(0.1), score="margin")
    plain = fk.confidence_select(logits, tokens.clone(), **options)
    zero = torch.zeros(2, device=device)
    got = fk.confidence_select(logits, tokens.clone(), temperature=zero, seed=1, **options)
    assert torch.equal(got.token_ids, plain.token_ids)
    torch.testing.assert_close(got.score, plain.score, rtol=1e-6, atol=1e-6)


def test_draws_come_from_the_kept_tokens_alone(either_backend, device):
    row = torch.tensor([0.0, 1.0, 1.2, 0.9, -2, -1, 9.0, 0.1, -INF], device=device)
    z = row.half().expand(24, 9).contiguous()
    drawn = fk.token_confidence(z, mask_id=6, temperature=1.3, top_p=0.5, top_k=9, seed=4)
    assert set(drawn.token_ids.tolist()) == {1, 2, 3}


def test_a_nucleus_of_one_token_is_the_argmax(either_backend, device):
    z = random_logits(device, HALF, 2, 90)
    for filters in (dict(top_p=1e-6), dict(top_k=1)):
        got = fk.token_confidence(z, temperature=5.0, seed=2, **filters)
        assert torch.equal(got.token_ids, z.argmax(-1))


@pytest.mark.parametrize("score", ["confidence", "margin", "entropy"])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_filtered_score_is_of_what_is_drawn_from(either_backend, device, score, temperature):
    """The softmax of the kept logits / temperature and the mask's own; else of all as they are."""
    z = random_logits(device, HALF, 2, 80, spread=2.0)
    z[0, 11] = z[0].max() + 1  # the mask inside of the nucleus
    options = dict(mask_id=11, temperature=temperature, top_p=0.8, top_k=20, seed=8, score=score)
    kept = kept_by_the_reference(z, 11, temperature, 0.8, 20)
    kept[:, 11] = True
    scaled = z.double() / (temperature or 1)
    for filtered_score in (False, True):
        got = fk.token_confidence(z, filtered_score=filtered_score, **options)
        p = (scaled.masked_fill(~kept, -INF) if filtered_score else z.double()).softmax(-1)
        largest = p.index_fill(1, torch.tensor([11], device=device), 0).topk(2).values
        wanted = {
            "confidence": p.gather(1, got.token_ids[:, None])[:, 0],
            "margin": largest[:, 0] - largest[:, 1],
            "entropy": torch.special.entr(p).sum(-1).neg(),
        }[score]
        torch.testing.assert_close(got.score.double(), wanted, rtol=1e-5, atol=1e-6)


def test_token_confidence_filters_as_confidence_select(either_backend, device):
    z = with_ties(device, HALF, 6, 90)[[0, 4]]
    tokens = torch.full((1, 2), 7, device=device)
    options = dict(mask_id=7, temperature=2.0, top_p=0.51, top_k=40, seed=6)
    for filtered_score in (False, True):
        options |= dict(filtered_score=filtered_score)
        selected = fk.confidence_select(z[None], tokens.clone(), rule=Quota(9), **options)
        alone = fk.token_confidence(z, **options)
        assert torch.equal(alone.token_ids, selected.token_ids[0])
        torch.testing.assert_close(alone.score, selected.score[0], rtol=1e-6, atol=1e-6)


def test_a_rule_without_a_branch_filters_alike(either_backend, device):
    logits = with_ties(device, HALF, 6, 90)[:4].view(2, 2, 90)
    tokens = torch.full((2, 2), 7, device=device)
    options = dict(
        mask_id=7,
        temperature=torch.tensor([0.5, 2.0], device=device),
        top_p=torch.tensor([0.5, 0.9], device=device),
        top_k=torch.tensor([3, 0], dtype=torch.int32, device=device),
        filtered_score=True,
        seed=torch.tensor([1, 2], device=device),
    )
    fused = fk.confidence_select(logits, tokens.clone(), rule=Threshold(0.0), **options)
    got = fk.confidence_select(logits, tokens.clone(), rule=lambda s, c, step: c, **options)
    assert torch.equal(got.token_ids, fused.token_ids)
    torch.testing.assert_close(got.score, fused.score, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("filtered_score", [False, True])
def test_a_nan_is_reported_and_infinities_are_as_in_the_reference(
    either_backend, device, filtered_score
):
    z = random_logits(device, HALF, 2, 3, 70)
    z[0, 1, 4], z[0, 2, 69], z[1, 0] = NAN, NAN, -INF
    z[1, 1, :69] = -INF  # the mask alone
    z[1, 2, 30] = INF
    tokens = torch.full((2, 3), 69, device=device)
    options = dict(mask_id=69, rule=Threshold(-99.0), temperature=0.7, seed=1)
    options |= dict(filtered_score=filtered_score)
    for filters in (dict(top_p=0.9), dict(top_p=0.9, top_k=3))[filtered_score:]:
        got = fk.confidence_select(z, tokens.clone(), **filters, **options)
        wanted = fk.confidence_select_reference(z, tokens.clone(), **filters, **options)
        assert_same((got, tokens), (wanted, tokens))
        assert got.score[0].isnan().tolist() == [False, True, True]
        assert got.remaining.tolist()[0] == -2
        assert got.token_ids[1, :2].tolist() == [0, 0]


def test_positions_that_are_no_candidates_are_not_searched(triton_backend, device):
    z = random_logits(device, torch.float32, 1, 4, 60)
    candidates = torch.tensor([[True, False, True, False]], device=device)
    z[~candidates] = NAN
    tokens = torch.full((1, 4), 59, device=device)
    options = dict(mask_id=59, rule=Quota(1), temperature=0.4, top_p=0.9, seed=3)
    assert_same(*run_both(z, tokens, candidates=candidates, **options))


def test_rows_at_any_stride_and_a_padded_vocabulary(triton_backend, device):
    wide = torch.full((2, 9, 70), NAN, dtype=HALF, device=device)
    wide[:, 2:4, :50] = random_logits(device, HALF, 2, 2, 50)
    tokens = torch.full((2, 2), 49, device=device)
    options = dict(mask_id=49, rule=Threshold(0.2), temperature=0.9, top_p=0.8, top_k=9, seed=5)
    plain = fk.confidence_select(wide[:, 2:4, :50].contiguous(), tokens.clone(), **options)
    got = fk.confidence_select(wide[:, 2:4], tokens.clone(), vocab_size=50, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_the_compiler_sees_one_node(device):
    z = random_logits(device, torch.float32, 2, 4, 20)

    def call(tokens, temperature, top_p):
        return fk.confidence_select(
            z,
            tokens,
            mask_id=19,
            rule=Threshold(0.5),
            temperature=temperature,
            top_p=top_p,
            top_k=7,
            filtered_score=True,
            seed=1,
        ).token_ids

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    tokens = torch.full((2, 4), 19, device=device)
    for temperature in (0.5, torch.tensor([0.3, 0.0], device=device)):
        wanted = call(tokens.clone(), temperature, 0.9)
        assert torch.equal(compiled(tokens.clone(), temperature, 0.9), wanted)


H200 = backend.Chip(132, 232448, overlap=True)


@pytest.mark.parametrize("rows", [1, 32, 256, 1024, 100_000])
@pytest.mark.parametrize("vocab", [2, 257, 126464, 152064])
@pytest.mark.parametrize("itemsize, both", [(2, False), (2, True), (4, False)])
def test_the_passes_cover_the_vocabulary(rows, vocab, itemsize, both):
    config = filter_triton.config(rows, vocab, itemsize, H200, both)
    covered = config.tile_vocab * config.tiles
    assert covered * (config.parts - 1) < vocab <= covered * config.parts
    assert covered / 4 <= config.capacity <= covered / 4 + 16


def nearly_top_p(z, mask_id, temperature, top_p):
    """Before which tokens the mass is top_p up to the rounding of sums in fp32, bool [N, V]."""
    ordered, order = select._offered(z.float(), mask_id).sort(dim=-1, descending=True, stable=True)
    p = (ordered.double() / temperature).softmax(-1)
    near = (p.cumsum(-1) - p - top_p).abs() < 2e-6
    return torch.zeros_like(near).scatter(1, order, near)


@pytest.mark.gpu
@pytest.mark.parametrize("filtered_score", [False, True])
@pytest.mark.parametrize("temperature, top_p, top_k", [(0.2, 0.95, None), (1.0, 0.9, 500)])
@pytest.mark.parametrize("vocab", [126464, 152064])
def test_real_shapes(triton_backend, device, vocab, temperature, top_p, top_k, filtered_score):
    for dtype in (torch.bfloat16, torch.float32):
        z = random_logits(device, dtype, 32, vocab, spread=3.0)
        asked = scoring(z, 5, temperature, top_p, top_k)
        got = kept_by_the_kernel(asked)
        wanted = kept_by_the_reference(z, 5, temperature, top_p, top_k)
        got[:, 5] = wanted[:, 5]
        assert not ((got != wanted) & ~nearly_top_p(z, 5, temperature, top_p)).any()
        tokens = torch.full((1, 32), 5, device=device)
        options = dict(mask_id=5, rule=Threshold(0.3), temperature=temperature, seed=7)
        options |= dict(top_p=top_p, top_k=top_k, filtered_score=filtered_score)
        (got, _), (wanted, _) = run_both(z[None], tokens, **options)
        same = got.token_ids == wanted.token_ids
        assert same.sum() >= 31
        torch.testing.assert_close(got.score[same], wanted.score[same], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_a_graph_replays_with_other_temperatures_and_filters(triton_backend, device):
    B, T, V = 2, 16, 126464
    z = random_logits(device, torch.bfloat16, B, T, V, spread=3.0)
    tokens = torch.full((B, T), 5, device=device)
    temperature, top_p = torch.full((2, B), 0.5, device=device)
    top_k = torch.zeros(B, dtype=torch.int32, device=device)
    seed = torch.arange(B, device=device)
    options = dict(mask_id=5, rule=Threshold(0.2), filtered_score=True, seed=seed)
    options |= dict(temperature=temperature, top_p=top_p, top_k=top_k)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fk.confidence_select(z, tokens.clone(), **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fk.confidence_select(z, tokens, **options)
    for turn, (t, p, k) in enumerate(
        [(0.2, 0.95, 0), (0.0, 0.5, 9), (1.0, 1.0, 40), (0.7, 1.0, 0)]
    ):
        z.copy_(random_logits(device, torch.bfloat16, B, T, V, seed=turn, spread=3.0))
        temperature[0], top_p[0], top_k[0] = t, p, k
        tokens.fill_(5)
        graph.replay()
        torch.cuda.synchronize()
        eager = fk.confidence_select(z, torch.full((B, T), 5, device=device), **options)
        assert all(torch.equal(a, b) for a, b in zip(result, eager, strict=True))


@pytest.mark.gpu
def test_a_hundred_searches_give_identical_bits(triton_backend, device):
    z = random_logits(device, torch.bfloat16, 32, 126464, spread=3.0)
    options = dict(temperature=1.0, top_p=0.93, top_k=3000, seed=1, filtered_score=True)
    first = fk.token_confidence(z, **options)
    for _ in range(100):
        again = fk.token_confidence(z, **options)
        assert torch.equal(again.token_ids, first.token_ids)
        assert torch.equal(again.score, first.score)
