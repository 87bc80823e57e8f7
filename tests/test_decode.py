"""generate() against the plain decoder of one row, and what must hold whatever the model says."""

import dataclasses
import functools
import math
from concurrent.futures import ThreadPoolExecutor

import oracle_decode
import oracle_models
import pytest
import tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import fastdllm
from fastdllm import Factor, Quota, Threshold
from fastdllm.cache import KVCache, Shape, Span

CACHES = ("none", "prefix", "dual")
SCORES = ("confidence", "margin", "entropy")
NEAR_TIE = (
    1e-4  # below this, rounding may decide: fp32 logits of these models are good to about 1e-5
)

# Numbers near the middle of what the tiny models' scores are, so that a step commits now one token
# and now several.
RULES = {
    "llada": {
        "threshold": {"confidence": 0.22, "margin": 0.08, "entropy": -2.85},
        "factor": {"confidence": 2.4, "margin": 2.8, "entropy": 11.6},
        "quota": dict.fromkeys(SCORES, 3),
        "dream": dict.fromkeys(SCORES, 4),
    },
    "dream": {
        "threshold": {"confidence": 0.4, "margin": 0.2, "entropy": -2.4},
        "factor": {"confidence": 1.9, "margin": 2.3, "entropy": 10.0},
        "quota": dict.fromkeys(SCORES, 3),
        "dream": dict.fromkeys(SCORES, 4),
    },
}
KINDS = tuple(RULES["llada"])


@functools.cache
def case(family, layers=2, seed=0):
    """(model, config, source of the oracle) of a random checkpoint, kept for the whole run."""
    import pathlib
    import tempfile

    config = dict(tiny.FAMILIES[family])
    config["n_layers" if family == "llada" else "num_hidden_layers"] = layers
    with tempfile.TemporaryDirectory() as folder:
        model, state = tiny.build(pathlib.Path(folder), config, seed)
    return model, config, oracle_decode.model_source(state, config)


def product_rule(rule):
    kind, parameter = rule
    if kind == "dream":
        return Quota(parameter, schedule="dream")
    return {"threshold": Threshold, "factor": Factor, "quota": Quota}[kind](parameter)


def random_prompts(config, lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    vocab = oracle_models.shape_of(config)["vocab"]
    return [torch.randint(0, vocab, (length,), generator=generator) for length in lengths]


def oracle_rows(family, prompts, layers=2, **options):
    _, config, source = case(family, layers)
    shift = 0 if family == "llada" else 1
    mask_id = config["mask_token_id"]
    return [
        oracle_decode.decode_row(source, p.tolist(), mask_id=mask_id, shift=shift, **options)
        for p in prompts
    ]


def clear_case(family, lengths, **options):
    """Prompts whose decoding never comes near a tie, and what the oracle makes of them."""
    for seed in range(40):
        prompts = random_prompts(case(family)[1], lengths, seed)
        rows = oracle_rows(family, prompts, **options)
        if min(row.slack for row in rows) > NEAR_TIE:
            return prompts, rows
    raise AssertionError("every prompt came near a tie")


class Recorder:
    """Collects the events and can say what each row did, forward by forward."""

    def __init__(self):
        self.events = []

    def __call__(self, event):
        self.events.append(event)
        assert len(self.events) < 1000, "this decoding would never end"

    def steps(self, row):
        """The row's forwards that committed something: (kind, {position: token})."""
        found = []
        for event in self.events:
            of_row = event.rows == row
            commits = dict(
                zip(event.positions[of_row].tolist(), event.token_ids[of_row].tolist(), strict=True)
            )
            if commits:
                found.append((event.kind, commits))
        return found


def check_against_oracle(result, rows, recorder):
    assert [tokens.tolist() for tokens in result.tokens] == [row.tokens for row in rows]
    assert result.nfe.tolist() == [row.nfe for row in rows]
    assert result.refreshes.tolist() == [row.refreshes for row in rows]
    assert result.cached_steps.tolist() == [row.cached_steps for row in rows]
    for index, row in enumerate(rows):
        assert recorder.steps(index) == [(kind, commits) for kind, commits in row.steps if commits]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tokens_and_forwards_equal_the_oracles(family, cache, kind, score):
    rule = (kind, RULES[family][kind][score])
    options = {
        "gen_length": 11,
        "block_length": 4,
        "cache": cache,
        "score": score,
    }  # the last block is short
    prompts, rows = clear_case(family, (3, 6), rule=rule, **options)
    recorder = Recorder()
    result = fastdllm.generate(
        case(family)[0], prompts, rule=product_rule(rule), stop_ids=(), on_step=recorder, **options
    )
    check_against_oracle(result, rows, recorder)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_cases_above_commit_now_one_token_and_now_several(family, score):
    for kind in ("threshold", "factor", "quota"):
        sizes = set()
        for cache in CACHES:
            options = {"gen_length": 11, "block_length": 4, "cache": cache, "score": score}
            _, rows = clear_case(family, (3, 6), rule=(kind, RULES[family][kind][score]), **options)
            sizes |= {len(commits) for row in rows for _, commits in row.steps}
        assert 1 in sizes and max(sizes) > 1, (kind, sizes)


@pytest.mark.parametrize(
    "gen_length, block_length", [(1, 1), (5, 1), (1, 8), (7, 7), (5, 32), (13, 6), (12, 4)]
)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_lengths_of_every_kind(family, cache, gen_length, block_length):
    rule = ("threshold", 0.4)
    options = {"gen_length": gen_length, "block_length": block_length, "cache": cache}
    prompts, rows = clear_case(family, (1, 4), rule=rule, **options)
    recorder = Recorder()
    result = fastdllm.generate(
        case(family)[0], prompts, rule=Threshold(0.4), stop_ids=(), on_step=recorder, **options
    )
    check_against_oracle(result, rows, recorder)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kind", ["threshold", "quota"])
def test_stops_equal_the_oracles(family, cache, kind):
    """A token that the model writes in the middle of its text is made the stop id."""
    rule = (kind, RULES[family][kind]["confidence"])
    options = {"gen_length": 12, "block_length": 5, "cache": cache, "rule": rule}
    stopped = 0
    for seed in range(6):
        prompts = random_prompts(case(family)[1], (2, 5), seed)
        written = [row.tokens[-12:] for row in oracle_rows(family, prompts, **options)]
        stops = (written[0][6], written[1][3])
        rows = oracle_rows(family, prompts, stop_ids=stops, **options)
        if min(row.slack for row in rows) < NEAR_TIE:
            continue
        full = oracle_rows(family, prompts, **options)
        stopped += sum(row.nfe < other.nfe for row, other in zip(rows, full, strict=True))
        result = fastdllm.generate(
            case(family)[0],
            prompts,
            gen_length=12,
            block_length=5,
            cache=cache,
            rule=product_rule(rule),
            stop_ids=stops,
        )
        assert [tokens.tolist() for tokens in result.tokens] == [row.tokens for row in rows]
        assert result.nfe.tolist() == [row.nfe for row in rows]
    assert stopped, "no row ever stopped early: the test proves nothing"


def test_none_takes_the_models_own_end_of_text():
    model, config, source = case("llada")
    prompts = random_prompts(config, (4,), 0)
    options = {"gen_length": 16, "block_length": 4, "rule": Threshold(0.3)}
    free = fastdllm.generate(model, prompts, stop_ids=(), **options).tokens[0]
    ending = free[4 + 6].item()
    try:
        model.config = dataclasses.replace(model.config, stop_ids=(ending,))
        stopped = fastdllm.generate(model, prompts, **options)
        named = fastdllm.generate(model, prompts, stop_ids=[ending], **options)
    finally:
        model.config = dataclasses.replace(model.config, stop_ids=(config["eos_token_id"],))
    assert torch.equal(stopped.tokens[0], named.tokens[0])
    generated = stopped.tokens[0][4:].tolist()
    first = generated.index(ending)
    assert set(generated[first:]) == {ending}
    assert len(generated) == 16


# Batches: what a row's neighbours are must not matter.

rules = st.one_of(
    st.sampled_from([0.1, 0.3, 0.5, 2.0]).map(lambda tau: ("threshold", tau)),
    st.sampled_from([0.5, 1.5, 2.5]).map(lambda f: ("factor", f)),
    st.integers(1, 7).map(lambda steps: ("quota", steps)),
    st.integers(1, 7).map(lambda steps: ("dream", steps)),
)
batches = {
    "family": st.sampled_from(sorted(tiny.FAMILIES)),
    "lengths": st.lists(st.integers(1, 9), min_size=2, max_size=4),
    "seed": st.integers(0, 1000),
    "gen_length": st.integers(1, 14),
    "block_length": st.integers(1, 9),
    "cache": st.sampled_from(CACHES),
    "rule": rules,
}


def alone(model, prompts, row, **options):
    return fastdllm.generate(model, [prompts[row]], **options)


@settings(derandomize=True, deadline=None, max_examples=120)
@given(**batches, score=st.sampled_from(SCORES), stop=st.booleans())
def test_a_row_of_a_batch_is_the_row_alone(
    family, lengths, seed, gen_length, block_length, cache, rule, score, stop
):
    model, config, _ = case(family)
    prompts = random_prompts(config, lengths, seed)
    options = {
        "gen_length": gen_length,
        "block_length": block_length,
        "cache": cache,
        "score": score,
    }
    stops = (7, 8, 9) if stop else ()
    together = fastdllm.generate(model, prompts, rule=product_rule(rule), stop_ids=stops, **options)
    for row in range(len(prompts)):
        single = alone(model, prompts, row, rule=product_rule(rule), stop_ids=stops, **options)
        if not torch.equal(single.tokens[0], together.tokens[row]):
            # The width of a product may change the last bit of its sums: a near tie proves nothing.
            (stated,) = oracle_rows(family, [prompts[row]], rule=rule, stop_ids=stops, **options)
            assume(stated.slack > NEAR_TIE)
        assert torch.equal(single.tokens[0], together.tokens[row])
        for name in ("nfe", "refreshes", "cached_steps"):
            assert getattr(single, name)[0] == getattr(together, name)[row], name


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    **batches,
    score=st.sampled_from([*SCORES, "random"]),
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_row_r_of_a_seeded_batch_is_the_row_alone_with_seed_plus_r(
    family, lengths, seed, gen_length, block_length, cache, rule, score, temperature
):
    model, config, _ = case(family)
    prompts = random_prompts(config, lengths, seed)
    options = {
        "gen_length": gen_length,
        "block_length": block_length,
        "cache": cache,
        "score": score,
        "stop_ids": (),
        "rule": product_rule(rule),
        "temperature": temperature,
    }
    together = fastdllm.generate(model, prompts, seed=seed, **options)
    for row in range(len(prompts)):
        single = alone(model, prompts, row, seed=seed + row, **options)
        assert torch.equal(single.tokens[0], together.tokens[row])
        assert single.nfe[0] == together.nfe[row]


def test_each_row_of_a_batch_may_have_its_own_rule():
    model, config, _ = case("llada")
    prompts = random_prompts(config, (3, 5, 2), 1)
    options = {"gen_length": 9, "block_length": 4, "stop_ids": ()}
    for mixed, single in (
        (
            Threshold(torch.tensor([0.2, 0.4, 2.0])),
            [Threshold(0.2), Threshold(0.4), Threshold(2.0)],
        ),
        (Quota(torch.tensor([1, 2, 4])), [Quota(1), Quota(2), Quota(4)]),
    ):
        together = fastdllm.generate(model, prompts, rule=mixed, **options)
        for row, rule in enumerate(single):
            one = alone(model, prompts, row, rule=rule, **options)
            assert torch.equal(one.tokens[0], together.tokens[row])
            assert one.nfe[0] == together.nfe[row]


@pytest.mark.parametrize("cache", CACHES)
def test_rows_of_different_lengths_are_fed_without_padding(cache, monkeypatch):
    model, *_ = case("llada")
    fed, hidden_states = [], model.hidden_states
    monkeypatch.setattr(
        model,
        "hidden_states",
        lambda tokens, at: fed.append(tokens.shape) or hidden_states(tokens, at),
    )
    prompts = [torch.arange(length) for length in (3, 30)]
    fastdllm.generate(
        model,
        prompts,
        gen_length=8,
        block_length=8,
        cache=cache,
        rule=fastdllm.Quota(2),
        stop_ids=(),
    )
    assert fed[0] == (1, 3 + 8 + 30 + 8)
    assert fed[1] == {"none": (1, 49), "prefix": (2, 8), "dual": (2, 8)}[cache]


def test_a_tensor_of_prompts_is_a_list_of_its_rows():
    model, config, _ = case("dream")
    prompts = torch.stack(random_prompts(config, (5, 5, 5), 2))
    kept = prompts.clone()
    options = {"gen_length": 7, "block_length": 3, "stop_ids": ()}
    one = fastdllm.generate(model, prompts, **options)
    two = fastdllm.generate(model, list(prompts), **options)
    three = fastdllm.generate(model, prompts.tolist(), **options)
    for row in range(3):
        assert torch.equal(one.tokens[row], two.tokens[row]) and torch.equal(
            one.tokens[row], three.tokens[row]
        )
        assert torch.equal(one.tokens[row][:5], prompts[row])
    assert torch.equal(prompts, kept)


def test_what_a_generation_holds():
    model, config, _ = case("llada")
    result = fastdllm.generate(
        model, random_prompts(config, (2, 6), 0), gen_length=5, block_length=3, stop_ids=()
    )
    assert [tokens.shape for tokens in result.tokens] == [(7,), (11,)]
    assert all(
        tokens.dtype == torch.int64 and tokens.device.type == "cpu" for tokens in result.tokens
    )
    assert list(result.prompt_lengths) == [2, 6]
    for counts in (result.nfe, result.refreshes, result.cached_steps):
        assert counts.dtype == torch.int64 and counts.shape == (2,)
    assert torch.equal(result.nfe, result.refreshes + result.cached_steps)
    assert result.seconds > 0


# What holds for every decoding.


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    **batches, score=st.sampled_from([*SCORES, "random"]), temperature=st.sampled_from([0.0, 1.0])
)
def test_every_step_commits_and_no_mask_is_left(
    family, lengths, seed, gen_length, block_length, cache, rule, score, temperature
):
    model, config, _ = case(family)
    mask_id = config["mask_token_id"]
    prompts = random_prompts(config, lengths, seed)
    prompts[0][0] = mask_id  # a prompt may talk about masks: they are no candidates
    recorder = Recorder()
    result = fastdllm.generate(
        model,
        prompts,
        gen_length=gen_length,
        block_length=block_length,
        cache=cache,
        rule=product_rule(rule),
        score=score,
        temperature=temperature,
        seed=seed,
        stop_ids=(),
        on_step=recorder,
    )
    for row, prompt in enumerate(prompts):
        start = len(prompt)
        assert torch.equal(result.tokens[row][:start], prompt)
        assert (result.tokens[row][start:] != mask_id).all()
        steps = recorder.steps(row)
        positions = [position for _, commits in steps for position in commits]
        assert sorted(positions) == list(range(start, start + gen_length)), (
            "each position is committed once"
        )
        blocks = [(position - start) // block_length for position in positions]
        assert blocks == sorted(blocks), "blocks are decoded left to right"
        if rule[0] != "dream":
            assert len(steps) == result.nfe[row], "every forward commits at least one token"
        block_count = math.ceil(gen_length / block_length)
        refreshes = result.nfe[row] if cache == "none" else block_count
        assert result.refreshes[row] == refreshes


@settings(derandomize=True, deadline=None, max_examples=40)
@given(**batches)
def test_the_events_rebuild_the_tokens(
    family, lengths, seed, gen_length, block_length, cache, rule
):
    model, config, _ = case(family)
    prompts = random_prompts(config, lengths, seed)
    recorder = Recorder()
    options = {
        "gen_length": gen_length,
        "block_length": block_length,
        "cache": cache,
        "rule": product_rule(rule),
    }
    result = fastdllm.generate(model, prompts, stop_ids=(7, 8, 9), on_step=recorder, **options)
    canvas = [prompt.tolist() + [config["mask_token_id"]] * gen_length for prompt in prompts]
    assert [event.step for event in recorder.events] == list(range(len(recorder.events)))
    for event in recorder.events:
        assert event.kind in ("refresh", "cached")
        assert (
            event.rows.shape == event.positions.shape == event.token_ids.shape == event.scores.shape
        )
        assert event.rows.ndim == 1 and event.rows.device.type == "cpu"
        for row, position, token in zip(event.rows, event.positions, event.token_ids, strict=True):
            assert canvas[row][position] == config["mask_token_id"]
            canvas[row][position] = token.item()
        assert torch.isfinite(event.scores).all()
    for row, prompt in enumerate(prompts):
        stopped = oracle_decode.finished_by_stop(
            canvas[row], len(prompt), config["mask_token_id"], (7, 8, 9)
        )
        if stopped is not None:
            canvas[row][stopped:] = [canvas[row][stopped]] * (len(canvas[row]) - stopped)
        assert canvas[row] == result.tokens[row].tolist()
    silent = fastdllm.generate(model, prompts, stop_ids=(7, 8, 9), **options)
    assert all(map(torch.equal, silent.tokens, result.tokens))


# The caches.


def open_span(model, cache, start, length, total, whole):
    row = [torch.tensor([value], dtype=torch.int32) for value in (start, length, total)]
    cache.span = Span(*row, Shape(length, stores=whole, whole=whole))
    model.attach(cache)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("start, end", [(0, 24), (5, 9), (5, 6), (20, 24), (0, 3)])
def test_a_cached_step_on_an_unchanged_canvas_gives_the_refreshs_logits(family, start, end):
    model, config, _ = case(family)
    (tokens,) = random_prompts(config, (24,), 3)
    cache = KVCache(model.config, 1, 24, device="cpu", dtype=torch.float32)
    try:
        open_span(model, cache, 0, 24, 24, True)
        refresh = model.head(model.hidden_states(tokens[None]))[0, start:end]
        open_span(model, cache, start, end - start, 24, False)
        cached = model.head(model.hidden_states(tokens[None, start:end]))[0]
    finally:
        model.attach(None)
    assert (cached - refresh).abs().max() <= 1e-5 * refresh.abs().max()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_cached_step_on_a_changed_canvas_equals_the_oracles(family):
    """Other tokens in the block, stale keys around it: what an approximate cache must compute, to
    the letter.
    """
    model, config, source = case(family)
    (tokens,) = random_prompts(config, (20,), 4)
    changed = tokens.clone()
    changed[6:11] = torch.tensor([1, 2, 3, 4, 5])
    cache = KVCache(model.config, 1, 20, device="cpu", dtype=torch.float32)
    _, store = source(tokens.tolist(), list(range(20)), None)
    for end in (11, 20):
        wanted, _ = source(changed[6:end].tolist(), list(range(6, end)), store)
        try:
            open_span(model, cache, 0, 20, 20, True)
            model.hidden_states(tokens[None])
            open_span(model, cache, 6, end - 6, 20, False)
            cached = model.head(model.hidden_states(changed[None, 6:end]))[0]
        finally:
            model.attach(None)
        assert (cached - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    **{name: batches[name] for name in ("lengths", "seed", "gen_length", "block_length", "rule")}
)
def test_with_one_layer_no_cache_is_stale(lengths, seed, gen_length, block_length, rule):
    """One layer's keys depend on their own token alone, so for LLaDA every cache decodes exactly as
    none does.
    """
    check_equal_caches("llada", 1, CACHES, lengths, seed, gen_length, block_length, rule)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    **{name: batches[name] for name in ("lengths", "seed", "gen_length", "block_length", "rule")}
)
def test_with_one_layer_dreams_two_caches_agree(lengths, seed, gen_length, block_length, rule):
    """They differ from none even so: the refresh commits the block's first position, whatever its
    score.
    """
    check_equal_caches(
        "dream", 1, ("prefix", "dual"), lengths, seed, gen_length, block_length, rule
    )


@settings(derandomize=True, deadline=None, max_examples=30)
@given(**{name: batches[name] for name in ("family", "lengths", "seed", "gen_length", "rule")})
def test_with_one_block_the_two_caches_agree(family, lengths, seed, gen_length, rule):
    """A block that reaches the canvas's end has no suffix to be stale. (The prompt's keys still
    are, against none.)
    """
    check_equal_caches(
        family, 2, ("prefix", "dual"), lengths, seed, gen_length, gen_length + 3, rule
    )


@settings(derandomize=True, deadline=None, max_examples=30)
@given(**{name: batches[name] for name in ("family", "lengths", "seed", "gen_length", "rule")})
def test_with_blocks_of_one_token_every_cache_is_none(family, lengths, seed, gen_length, rule):
    """Every step is a refresh, and the position that Dream's refresh commits is the only one there
    is.
    """
    assume(
        rule[0] != "dream" or rule[1] == 1
    )  # that schedule alone may start a block with an empty step
    check_equal_caches(family, 2, CACHES, lengths, seed, gen_length, 1, rule)


def check_equal_caches(family, layers, caches, lengths, seed, gen_length, block_length, rule):
    model, config, _ = case(family, layers)
    prompts = random_prompts(config, lengths, seed)
    options = {"gen_length": gen_length, "block_length": block_length}
    results = [
        fastdllm.generate(
            model, prompts, cache=cache, rule=product_rule(rule), stop_ids=(), **options
        )
        for cache in caches
    ]
    for result in results[1:]:
        for row in range(len(prompts)):
            if not torch.equal(result.tokens[row], results[0].tokens[row]):
                (stated,) = oracle_rows(
                    family, [prompts[row]], layers, rule=rule, cache=caches[0], **options
                )
                assume(stated.slack > NEAR_TIE)
        assert all(map(torch.equal, result.tokens, results[0].tokens))
        assert torch.equal(result.nfe, results[0].nfe)


def test_with_the_prompt_in_several_layers_a_cache_is_an_approximation():
    """The agreements above are no accident of a model that ignores its context."""
    model, config, _ = case("llada")
    differ = 0
    for seed in range(6):
        prompts = random_prompts(config, (8,), seed)
        options = {"gen_length": 12, "block_length": 12, "rule": Threshold(2.0), "stop_ids": ()}
        none, dual = (
            fastdllm.generate(model, prompts, cache=cache, **options) for cache in ("none", "dual")
        )
        differ += not torch.equal(none.tokens[0], dual.tokens[0])
    assert differ


# Counting forwards with a script in the model's place: what it says at a position never changes.


class Scripted:
    """The smallest thing `generate` drives: its output at canvas position p is script[p]."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, script, family="llada", mask_id=9):
        shift = 0 if family == "llada" else 1
        self.script = torch.as_tensor(script, dtype=torch.float32)
        config = case(family)[0].config
        self.config = dataclasses.replace(
            config, vocab_size=self.script.shape[1], mask_id=mask_id, stop_ids=(), logit_shift=shift
        )
        self.cache = None
        self.seen = []  # (start, tokens) of every forward

    def attach(self, cache):
        self.cache = cache

    def hidden_states(self, tokens, at=None):
        start, packing = self.cache.span.start.long(), self.cache.span.packing
        rows = tokens if packing is None else packing.unpack(tokens)
        self.seen += list(zip(start.tolist(), rows.tolist(), strict=True))
        positions = start[:, None] + torch.arange(rows.shape[1])
        if at is not None:
            positions = (positions.flatten() if packing is None else packing.pack(positions)[0])[at]
        return positions.clamp(max=len(self.script) - 1)[..., None].float()

    def head(self, hidden):
        return self.script[hidden[..., 0].long()].clone()


def confident(*probabilities, vocab=10):
    """Logits per position whose token (its position modulo 8) has that probability, the rest
    shared.
    """
    rows = torch.zeros(len(probabilities), vocab, dtype=torch.float64)
    for position, p in enumerate(probabilities):
        rows[position] = math.log((1 - p) / (vocab - 1))
        rows[position, position % 8] = math.log(p)
    return rows


@pytest.mark.parametrize(
    "cache, refreshes, cached", [("none", 5, 0), ("prefix", 2, 3), ("dual", 2, 3)]
)
def test_forwards_of_a_script(cache, refreshes, cached):
    # Prompt 1; block 1: two sure, then .6, then .5 (3 forwards); block 2: all but one sure (2
    # forwards).
    model = Scripted(confident(0.5, 0.95, 0.5, 0.99, 0.6, 0.95, 0.97, 0.2, 0.93))
    recorder = Recorder()
    result = fastdllm.generate(
        model,
        [[3]],
        gen_length=8,
        block_length=4,
        cache=cache,
        rule=Threshold(0.9),
        on_step=recorder,
    )
    assert (result.refreshes.item(), result.cached_steps.item(), result.nfe.item()) == (
        refreshes,
        cached,
        5,
    )
    assert [sorted(commits) for _, commits in recorder.steps(0)] == [
        [1, 3],
        [4],
        [2],
        [5, 6, 8],
        [7],
    ]
    assert result.tokens[0].tolist() == [3, 1, 2, 3, 4, 5, 6, 7, 0]


@pytest.mark.parametrize(
    "cache, committed",
    [
        # Output i - 1 speaks for position i: the probabilities below are those of positions 1 to 8.
        ("none", [[1, 3], [4], [2], [5, 6, 8], [7]]),
        ("dual", [[1], [3], [4], [2], [5], [6, 8], [7]]),
        ("prefix", [[1], [3], [4], [2], [5], [6, 8], [7]]),
    ],
)
def test_forwards_of_a_shifted_script(cache, committed):
    model = Scripted(confident(0.95, 0.5, 0.99, 0.6, 0.95, 0.97, 0.2, 0.93, 0.5), family="dream")
    recorder = Recorder()
    result = fastdllm.generate(
        model,
        [[3]],
        gen_length=8,
        block_length=4,
        cache=cache,
        rule=Threshold(0.9),
        on_step=recorder,
    )
    assert [sorted(commits) for _, commits in recorder.steps(0)] == committed
    assert result.nfe.item() == len(committed)
    assert result.tokens[0].tolist() == [3, 0, 1, 2, 3, 4, 5, 6, 7]


def test_a_dream_refresh_commits_the_first_position_however_unsure_it_is():
    model = Scripted(confident(0.2, 0.99, 0.99, 0.99, 0.99), family="dream")
    recorder = Recorder()
    fastdllm.generate(
        model, [[3]], gen_length=4, block_length=4, rule=Threshold(0.9), on_step=recorder
    )
    assert [sorted(commits) for _, commits in recorder.steps(0)] == [[1], [2, 3, 4]]


def test_dreams_quota_counts_on_from_the_refresh():
    script = confident(*[0.5 + 0.02 * i for i in range(12)])
    for rule, counts in (
        (Quota(4), [1, 3, 3, 2]),  # 9 masks: one in the refresh, 8 over the 3 steps left
        (Quota(9), [1] * 9),
        (Quota(1), [1, 8]),
        (Quota(4, schedule="dream"), [1, *oracle_counts(8, 1, 4)]),
    ):
        recorder = Recorder()
        fastdllm.generate(
            Scripted(script, "dream"),
            [[1, 2]],
            gen_length=9,
            block_length=9,
            rule=rule,
            on_step=recorder,
        )
        assert [len(commits) for _, commits in recorder.steps(0)] == counts


def oracle_counts(masks, step, steps):
    counts = []
    while masks:
        counts.append(oracle_decode.dream_count(masks, step, steps)[0])
        masks, step = masks - counts[-1], step + 1
    return counts


@pytest.mark.parametrize("tokens", [4, 9, 16])
def test_vanilla_dream_spends_a_forward_per_token_and_the_first_is_empty(tokens):
    script = confident(*[0.3 + 0.04 * (i % 11) for i in range(tokens + 1)])
    recorder = Recorder()
    result = fastdllm.generate(
        Scripted(script, "dream"),
        [[1]],
        gen_length=tokens,
        block_length=tokens,
        cache="none",
        rule=Quota(tokens, schedule="dream"),
        on_step=recorder,
    )
    assert [len(event.positions) for event in recorder.events] == [0] + [1] * (tokens - 2) + [2]
    assert result.nfe.item() == tokens


def test_a_threshold_above_one_goes_in_order_of_confidence():
    probabilities = [0.5, 0.31, 0.77, 0.52, 0.9, 0.3, 0.65, 0.4]
    recorder = Recorder()
    result = fastdllm.generate(
        Scripted(confident(*probabilities)),
        [[1]],
        gen_length=7,
        block_length=7,
        rule=Threshold(1.5),
        on_step=recorder,
    )
    order = sorted(range(1, 8), key=lambda position: -probabilities[position])
    assert [list(commits) for _, commits in recorder.steps(0)] == [[position] for position in order]
    assert result.nfe.item() == 7


def test_scores_that_tie_go_from_left_to_right():
    recorder = Recorder()
    model = Scripted(confident(0.5).expand(6, -1))  # equal rows: equal to the last bit
    fastdllm.generate(
        model, [[1]], gen_length=5, block_length=5, rule=Threshold(2.0), on_step=recorder
    )
    assert [list(commits) for _, commits in recorder.steps(0)] == [
        [position] for position in range(1, 6)
    ]


def test_logits_that_tie_go_to_the_lowest_id():
    model = Scripted(torch.zeros(5, 10))
    assert fastdllm.generate(model, [[1]], gen_length=4, block_length=4).tokens[0].tolist() == [
        1,
        0,
        0,
        0,
        0,
    ]


def test_what_each_cache_feeds_the_model():
    """none: the canvas, every time; prefix: the block and what follows; dual: the block. None after
    the last mask.
    """
    probabilities = [0.5, 0.95, 0.5, 0.95, 0.6]
    spans = {
        "none": [(0, 5), (0, 5)] * 2,
        "prefix": [(0, 5), (1, 4), (0, 5), (3, 2)],
        "dual": [(0, 5), (1, 2), (0, 5), (3, 2)],
    }
    for cache, wanted in spans.items():
        model = Scripted(confident(*probabilities))
        fastdllm.generate(model, [[7]], gen_length=4, block_length=2, cache=cache)
        assert [(start, len(tokens)) for start, tokens in model.seen] == wanted
        assert model.seen[2][1] == [7, 1, 2, 9, 9], (
            "the second block's first forward sees the first, finished"
        )


@pytest.mark.parametrize("mask_id", [0, 5, 9])
def test_a_mask_is_never_proposed_even_where_nothing_else_has_a_chance(mask_id):
    script = torch.full((5, 10), -torch.inf)
    script[:, mask_id] = 4.0
    script[2, 3] = 1.0

    def give_up(event):
        assert event.step < 10, "a committed mask is a mask again: decoding would never end"

    model = Scripted(script, mask_id=mask_id)
    result = fastdllm.generate(
        model, [[1]], gen_length=4, block_length=4, stop_ids=(), on_step=give_up
    )
    assert (result.tokens[0][1:] != mask_id).all()
    assert result.tokens[0][2] == 3


def test_the_masks_probability_stays_in_the_sum():
    script = torch.full((2, 10), -torch.inf)
    script[:, 9], script[:, 4] = math.log(3.0), 0.0
    recorder = Recorder()
    fastdllm.generate(Scripted(script), [[1]], gen_length=1, block_length=1, on_step=recorder)
    assert recorder.events[0].token_ids.tolist() == [4]
    assert recorder.events[0].scores.item() == pytest.approx(0.25, rel=1e-5)


def test_nan_outside_the_candidates_is_nobodys_business():
    script = confident(0.5, 0.95, 0.5, 0.95, 0.6)
    script[0] = math.nan  # the prompt's own output: never looked at without a shift
    result = fastdllm.generate(Scripted(script), [[7]], gen_length=4, block_length=4)
    assert result.tokens[0].tolist() == [7, 1, 2, 3, 4]
    script[3, 5] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity in row 0 at position 3"):
        fastdllm.generate(Scripted(script), [[7]], gen_length=4, block_length=4)


# Stops, to the letter.


@pytest.mark.parametrize("cache", CACHES)
def test_a_stop_counts_once_everything_before_it_is_committed(cache):
    # Position 3 says the stop id (its own number) at once; 1 comes with it; 2 is slow, so the row
    # must wait for it.
    model = Scripted(confident(0.5, 0.95, 0.4, 0.95, 0.45, 0.3, 0.99, 0.99))
    recorder = Recorder()
    result = fastdllm.generate(
        model, [[0]], gen_length=7, block_length=5, cache=cache, stop_ids=(3,), on_step=recorder
    )
    assert [sorted(commits) for _, commits in recorder.steps(0)] == [[1, 3], [4], [2]]
    assert result.nfe.item() == 3
    assert result.tokens[0].tolist() == [0, 1, 2, 3, 3, 3, 3, 3], (
        "what was committed after the stop is filled over"
    )


def test_a_stop_in_the_prompt_stops_nothing():
    model = Scripted(confident(*[0.95] * 6))
    result = fastdllm.generate(model, [[4, 3]], gen_length=4, block_length=2, stop_ids=(3, 4))
    assert result.tokens[0].tolist() == [4, 3, 2, 3, 3, 3]


def test_each_stop_id_fills_with_itself():
    model = Scripted(confident(*[0.95] * 6))
    for stop in (2, 4):
        result = fastdllm.generate(
            model, [[0]], gen_length=5, block_length=2, stop_ids=(2, 4) if stop == 2 else (4, 5)
        )
        assert result.tokens[0].tolist() == [min(position, stop) for position in range(6)]


def test_a_stopped_row_waits_for_nobody_and_holds_nobody_up():
    model = Scripted(confident(*[0.95] * 12))
    result = fastdllm.generate(
        model, [[0], [0, 1, 2, 3]], gen_length=8, block_length=2, stop_ids=(2,)
    )
    assert result.nfe.tolist() == [1, 4]
    assert result.tokens[0].tolist() == [0, 1] + [2] * 7
    assert result.tokens[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 2]


# A rule of the user's own.


def test_a_users_rule_sees_scores_candidates_and_steps():
    model, config, _ = case("llada")
    prompts = random_prompts(config, (2, 5), 0)
    calls = []

    def leftmost(scores, candidates, step):
        assert (
            scores.dtype == torch.float32
            and candidates.dtype == torch.bool
            and step.dtype == torch.int64
        )
        assert scores.shape == candidates.shape and step.shape == scores.shape[:1]
        assert candidates.any(1).all()
        assert torch.isfinite(scores[candidates]).all()
        calls.append(step.tolist())
        first = candidates.int().argmax(1, keepdim=True)
        return torch.zeros_like(candidates).scatter_(1, first, True)

    recorder = Recorder()
    result = fastdllm.generate(
        model, prompts, gen_length=7, block_length=3, rule=leftmost, stop_ids=(), on_step=recorder
    )
    for row, start in enumerate((2, 5)):
        assert [list(commits) for _, commits in recorder.steps(row)] == [
            [start + offset] for offset in range(7)
        ]
    assert result.nfe.tolist() == [7, 7]
    assert calls == [[step, step] for step in (0, 1, 2, 0, 1, 2, 0)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("cache", CACHES)
def test_a_users_rule_that_is_ours_decodes_as_ours(family, cache):
    model, config, _ = case(family)
    prompts = random_prompts(config, (2, 5, 3), 1)
    options = {"gen_length": 10, "block_length": 4, "cache": cache, "stop_ids": ()}
    for rule in (Threshold(0.35), Factor(2.0), Quota(3)):
        one = fastdllm.generate(model, prompts, rule=rule, **options)
        two = fastdllm.generate(model, prompts, rule=rule.commit, **options)
        assert all(map(torch.equal, one.tokens, two.tokens)) and torch.equal(one.nfe, two.nfe)


# Sampling.


def draws(script_row, count, family="llada", **options):
    """`count` draws of one token from one row of logits; the ids and their scores."""
    script = torch.as_tensor(script_row, dtype=torch.float32).expand(3, -1)
    recorder = Recorder()
    fastdllm.generate(
        Scripted(script, family, mask_id=len(script_row) - 1),
        [[0]] * count,
        gen_length=1,
        block_length=1,
        stop_ids=(),
        on_step=recorder,
        **options,
    )
    (event,) = recorder.events
    return event.token_ids, event.scores


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0, 1.5, 2.5])  # the last is the mask


def offered(temperature, kept=range(7)):
    """softmax(LOGITS / temperature) over what may be proposed."""
    scaled = torch.full((8,), -torch.inf, dtype=torch.float64)
    scaled[list(kept)] = LOGITS.double()[list(kept)] / temperature
    return scaled.softmax(-1)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    "options, kept",
    [
        ({"temperature": 1.0}, range(7)),
        ({"temperature": 0.5}, range(7)),
        ({"temperature": 2.0}, range(7)),
        ({"temperature": 1.0, "top_k": 3}, [0, 6, 1]),
        ({"temperature": 2.0, "top_k": 2}, [0, 6]),
        (
            {"temperature": 1.0, "top_p": 0.7},
            [0, 6, 1],
        ),  # .42, .26, .16: the third is needed to reach .7
        ({"temperature": 1.0, "top_p": 1.0, "top_k": 8}, range(7)),
    ],
)
def test_draws_follow_the_softmax(family, options, kept):
    count = 6000
    ids, _ = draws(LOGITS, count, family, seed=11, **options)
    wanted = offered(options["temperature"], kept) * count
    found = torch.bincount(ids, minlength=8).double()
    assert found[wanted == 0].sum() == 0
    possible = wanted > 0
    chi2 = ((found - wanted)[possible].square() / wanted[possible]).sum()
    # 6 degrees of freedom at most: a value above 27.9 has probability 1e-4.
    assert chi2 < 27.9, (found, wanted)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"top_k": 1, "temperature": 1.0}, {"top_p": 1e-6, "temperature": 1.0}],
)
def test_a_single_choice_is_the_greedy_one(family, options):
    ids, _ = draws(LOGITS, 50, family, seed=3, **options)
    assert (ids == 0).all()


def test_lladas_score_is_the_clean_probability_of_what_was_drawn():
    clean = LOGITS.double().softmax(-1)
    for options in (
        {"temperature": 2.0},
        {"temperature": 0.3},
        {"temperature": 1.5, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.7},
    ):
        ids, scores = draws(LOGITS, 200, "llada", seed=5, **options)
        torch.testing.assert_close(scores.double(), clean[ids], rtol=1e-5, atol=1e-7)


def test_dreams_score_is_taken_after_temperature_and_filters():
    mask = 7
    for options, kept in (
        ({"temperature": 2.0}, range(7)),
        ({"temperature": 0.3}, range(7)),
        ({"temperature": 1.5, "top_k": 3}, [0, 6, 1]),
        ({"temperature": 1.0, "top_p": 0.7}, [0, 6, 1]),
    ):
        ids, scores = draws(LOGITS, 200, "dream", seed=5, **options)
        # The mask is never proposed and stays in the sum, here as everywhere.
        wanted = offered(options["temperature"], [*kept, mask])
        torch.testing.assert_close(scores.double(), wanted[ids], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_seed_repeats_and_another_seed_does_not(family):
    model, config, _ = case(family)
    prompts = random_prompts(config, (3, 4), 0)
    options = {"gen_length": 12, "block_length": 4, "temperature": 1.0, "stop_ids": ()}
    one, two, other = (
        fastdllm.generate(model, prompts, seed=seed, **options) for seed in (1, 1, 2)
    )
    assert all(map(torch.equal, one.tokens, two.tokens))
    assert not all(map(torch.equal, one.tokens, other.tokens))


def test_without_a_seed_the_global_generator_decides():
    model, config, _ = case("llada")
    prompts = random_prompts(config, (3,), 0)
    options = {"gen_length": 12, "block_length": 4, "temperature": 1.0, "stop_ids": ()}
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(fastdllm.generate(model, prompts, **options).tokens[0])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_greedy_decoding_leaves_the_global_generator_alone():
    model, config, _ = case("llada")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    fastdllm.generate(model, random_prompts(config, (3,), 0), gen_length=4, block_length=4)
    assert torch.equal(before, torch.get_rng_state())


def test_neighbouring_positions_and_steps_draw_independently():
    """Positions of one block, and blocks of one text, must not repeat each other's noise."""
    script = torch.zeros(65, 10)
    model = Scripted(script)
    flat = [
        fastdllm.generate(
            model,
            [[0]],
            gen_length=64,
            block_length=block,
            temperature=1.0,
            seed=1,
            rule=Quota(1),
            stop_ids=(),
        ).tokens[0][1:]
        for block in (64, 1)
    ]
    for ids in flat:
        assert len(set(ids.tolist())) > 5
        assert (ids[:-1] == ids[1:]).float().mean() < 0.4


def test_random_scores_shuffle_the_order_of_the_commits():
    orders = set()
    for seed in range(5):
        recorder = Recorder()
        fastdllm.generate(
            Scripted(confident(*[0.5] * 9)),
            [[1]],
            gen_length=8,
            block_length=8,
            score="random",
            seed=seed,
            rule=Threshold(2.0),
            on_step=recorder,
        )
        orders.add(tuple(position for _, commits in recorder.steps(0) for position in commits))
    assert len(orders) == 5


def other_work(model):
    """What a listener or a rule may do with the model at any time, and what it gives."""
    tokens = torch.arange(1, 25).view(2, 12) % 50
    return model.logits(tokens), fastdllm.generate(
        model, [[5, 6], [7]], gen_length=6, block_length=3
    ).tokens


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_listener_and_a_rule_may_use_the_model(family, cache):
    model, config, _ = case(family)
    prompts = random_prompts(config, (5, 9), 3)
    options = {"gen_length": 12, "block_length": 4, "cache": cache}
    logits, tokens = other_work(model)
    plain = fastdllm.generate(model, prompts, rule=Threshold(0.3), **options)

    def busy(*_):
        now, then = other_work(model)
        assert torch.equal(now, logits) and all(map(torch.equal, then, tokens))

    def rule(scores, candidates, step):
        busy()
        commit = Threshold(0.3).commit(scores, candidates, step)
        candidates.zero_()  # what a rule is given is its own
        return commit

    for done in (
        fastdllm.generate(model, prompts, rule=Threshold(0.3), on_step=busy, **options),
        fastdllm.generate(model, prompts, rule=rule, **options),
    ):
        assert all(map(torch.equal, done.tokens, plain.tokens))


@pytest.mark.parametrize("cache", CACHES)
def test_threads_may_share_a_model(cache):
    model, config, _ = case("dream")
    prompts = random_prompts(config, (3, 6, 9, 12), 5)
    options = {"gen_length": 16, "block_length": 4, "cache": cache, "rule": Quota(3)}
    alone = [fastdllm.generate(model, [prompt], **options).tokens[0] for prompt in prompts]
    logits = other_work(model)[0]
    with ThreadPoolExecutor(len(prompts) + 1) as pool:
        plain = pool.submit(lambda: [torch.equal(other_work(model)[0], logits) for _ in range(20)])
        together = pool.map(
            lambda prompt: [
                fastdllm.generate(model, [prompt], **options).tokens[0] for _ in range(5)
            ],
            prompts,
        )
    assert all(
        torch.equal(tokens, expected)
        for many, expected in zip(together, alone, strict=True)
        for tokens in many
    )
    assert all(plain.result())


def test_a_trace_leaves_nothing_in_the_model(tmp_path):
    model, _ = tiny.build(tmp_path, tiny.LLADA)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.logits(torch.ones(1, 4, dtype=torch.int64))
    assert type(model.logits(torch.ones(1, 4, dtype=torch.int64))) is torch.Tensor


@pytest.mark.parametrize("cache", CACHES)
def test_autocast_and_another_default_device_do_no_harm(cache):
    model, config, _ = case("llada")
    options = {"gen_length": 8, "block_length": 4, "cache": cache, "rule": Quota(2), "stop_ids": ()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fastdllm.generate(model, [[1, 2, 3], [4, 5, 6, 7]], **options)
    plain = fastdllm.generate(model, [[1, 2, 3], [4, 5, 6, 7]], **options)
    with torch.device("meta"):
        elsewhere = fastdllm.generate(
            model, [[1, 2, 3], [4, 5, 6, 7]], on_step=lambda event: event, **options
        )
    assert cast.nfe.tolist() == plain.nfe.tolist() and not any(
        (row == config["mask_token_id"]).any() for row in cast.tokens
    )
    assert all(map(torch.equal, elsewhere.tokens, plain.tokens)) and plain != elsewhere


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_smallest_temperature_is_the_greedy_choice(family):
    model, config, _ = case(family)
    options = {"gen_length": 8, "block_length": 8, "rule": Quota(1)}
    greedy = fastdllm.generate(model, random_prompts(config, (4,), 1), **options)
    nearly = fastdllm.generate(
        model, random_prompts(config, (4,), 1), temperature=1e-39, top_p=0.9, seed=1, **options
    )
    assert torch.equal(nearly.tokens[0], greedy.tokens[0])


def test_the_model_is_left_as_it_was():
    model, config, _ = case("dream")
    prompts = random_prompts(config, (3,), 0)
    before = model.logits(prompts[0][None])
    fastdllm.generate(model, prompts, gen_length=4, block_length=2)
    assert torch.equal(model.logits(prompts[0][None]), before)

    def fail(event):
        raise KeyError("the listener's own error")

    with pytest.raises(KeyError):
        fastdllm.generate(model, prompts, gen_length=4, block_length=2, on_step=fail)
    assert torch.equal(model.logits(prompts[0][None]), before)
