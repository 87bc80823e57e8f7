"""warm_up: what comes after it captures nothing."""

import random

import pytest
import tiny
import torch
from test_decode import random_prompts
from test_graph import model_of, records  # noqa: F401

import fastdllm
from fastdllm import CachePolicy, Engine, Quota, Threshold, forward, graph, warm_up

POLICIES = {
    "all": CachePolicy(),
    "kept": CachePolicy(prompt_refreshes=0, suffix_blocks=1),
    "near": CachePolicy(suffix_blocks=0),
    "finished": CachePolicy(prompt_refreshes=0, suffix_blocks=0, keep_finished=True),
}


@pytest.fixture
def launch_bound(records, monkeypatch):  # noqa: F811
    """Forwards on a CPU are captured as on a GPU, in buckets of 8 tokens. A list of the captured
    ones' shapes and rows; for selections None, and the shape of their plan.
    """
    monkeypatch.setattr(forward, "LENGTHS", 8)
    monkeypatch.setitem(forward.LAUNCH_BOUND, "cpu", 40)
    captures, record = [], graph.record

    def counted(space, shape, function, plan, pool, output):
        captures.append((shape, plan.shape) if shape is None else (shape, function.args[1]))
        return record(space, shape, function, plan, pool, output)

    monkeypatch.setattr(graph, "record", counted)
    return captures


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_stream_after_it_captures_nothing(family, cache, policy, launch_bound):
    if cache == "none" and policy in ("kept", "finished"):
        pytest.skip("nothing keeps the prompt")
    model, config = model_of(family), tiny.FAMILIES[family]
    policy = POLICIES[policy]
    options = {"cache": cache, "policy": policy, "block_length": 4}
    draw = random.Random(0)
    with Engine(model, rows=3, positions=36, **options) as engine:
        told = []
        made = engine.warm_up(progress=lambda *progress: told.append(progress))
        forwards = [form for form in launch_bound if form[0]]
        assert made.captured == len(forwards) == len(set(forwards)) > 4
        assert ("capturing forwards", made.captured, made.captured) in told and made.seconds > 0
        assert engine.stats()["captured"] == made.captured
        assert len(launch_bound) > len(forwards), "the selection after them is captured too"
        engine.warm_up(rule=Quota(2))
        before = len(launch_bound)
        submitted = []
        for number in range(25):
            length, gen_length = draw.randint(1, 20), draw.randint(1, 16)
            (prompt,) = random_prompts(config, (length,), number)
            rule = draw.choice([Threshold(0.3), Quota(2), Threshold(0.0)])
            own = {"gen_length": gen_length, "rule": rule, "stop_ids": ()}
            submitted.append((engine.submit(prompt, **own), prompt, own))
        results = [request.result(timeout=60) for request, _, _ in submitted]
    assert len(launch_bound) == before, "something was captured in traffic"
    plain = model_of(family)
    for done, (_, prompt, own) in zip(results, submitted, strict=True):
        expected = fastdllm.generate(plain, [prompt], graph=False, **options, **own)
        assert torch.equal(done.nfe, expected.nfe)
        assert torch.equal(done.tokens[0], expected.tokens[0])


def test_a_padded_length_is_no_longer_than_the_canvas(launch_bound, monkeypatch):
    monkeypatch.setattr(forward, "LENGTHS", 64)
    monkeypatch.setitem(forward.LAUNCH_BOUND, "cpu", 64)
    options = {"block_length": 4, "cache": "prefix"}
    own = {"gen_length": 8, "rule": Quota(4), "stop_ids": ()}
    prompts = random_prompts(tiny.LLADA, (6, 4), 0)
    with Engine(model_of("llada"), rows=2, positions=14, **options) as engine:
        requests = [engine.submit(prompt, **own) for prompt in prompts]
        together = [request.result(timeout=60).tokens[0] for request in requests]
    assert max(shape.width for shape, _ in launch_bound if shape) == 18
    for prompt, tokens in zip(prompts, together, strict=True):
        alone = fastdllm.generate(model_of("llada"), [prompt], graph=False, **options, **own)
        assert torch.equal(tokens, alone.tokens[0])


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_generate_captures_nothing_after_it_whatever_the_lengths(cache, launch_bound):
    model = model_of("llada")
    made = warm_up(model, rows=2, positions=36, block_length=4, cache=cache, rule=Quota(2))
    assert made.captured == sum(1 for form in launch_bound if form[0])
    before = len(launch_bound)
    options = {"block_length": 4, "cache": cache, "stop_ids": ()}
    for seed, lengths in enumerate(((3,), (20, 4), (7, 7), (1,), (19,), (12, 13))):
        prompts = random_prompts(tiny.LLADA, lengths, seed)
        done = fastdllm.generate(model, prompts, gen_length=12, rule=Quota(2), **options)
        other = fastdllm.generate(
            model, prompts, gen_length=12, rule=Quota(2), graph=False, **options
        )
        assert all(map(torch.equal, done.tokens, other.tokens))
    assert before == len(launch_bound), "something was captured after the warm-up"


def test_without_a_gpu_there_is_nothing_to_capture():
    model = model_of("llada")
    assert warm_up(model, rows=2, positions=36, block_length=4).captured == 0
    with pytest.raises(ValueError, match="cache"):
        warm_up(model, cache="other")
