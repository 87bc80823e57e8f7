"""Engine: a request gets what it would get alone, whatever comes, goes or fails around it."""

import asyncio
import copy
import gc
import os
import subprocess
import sys
import threading
import time

import pytest
import tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_decode import CACHES, NEAR_TIE, case, oracle_rows, random_prompts
from test_graph import records  # noqa: F401

import fastdllm
from fastdllm import (
    CachePolicy,
    Engine,
    EngineClosed,
    Factor,
    QueueFull,
    Quota,
    RequestCancelled,
    Threshold,
)

RULES = {
    "threshold": Threshold(0.3),
    "all": Threshold(0.0),
    "factor": Factor(1.5),
    "quota": Quota(3),
    "dream": Quota(3, schedule="dream"),
    "function": lambda scores, candidates, step: Threshold(0.25).commit(scores, candidates, step),
}


def alone(model, prompt, engine_options, **options):
    known = ("block_length", "cache", "policy")
    shared = {name: engine_options[name] for name in known if name in engine_options}
    return fastdllm.generate(model, [prompt], **shared, **options)


def assert_as_alone(request, expected):
    done = request.result(timeout=60)
    assert torch.equal(done.tokens[0], expected.tokens[0])
    assert torch.equal(done.nfe, expected.nfe)
    assert torch.equal(done.refreshes, expected.refreshes)
    assert done.prompt_lengths == expected.prompt_lengths


requests = st.lists(
    st.fixed_dictionaries(
        {
            "length": st.integers(1, 20),
            "gen_length": st.integers(1, 16),
            "rule": st.sampled_from(sorted(RULES)),
            "temperature": st.sampled_from([0.0, 0.0, 0.7, 1.2]),
            "seed": st.integers(0, 100),
            "stop": st.booleans(),
            "top_p": st.sampled_from([None, None, 0.8]),
            "cancelled": st.booleans(),
            "after": st.sampled_from([0, 0, 0.002, 0.01]),
        }
    ),
    min_size=1,
    max_size=9,
)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    family=st.sampled_from(sorted(tiny.FAMILIES)),
    cache=st.sampled_from(CACHES),
    suffix_blocks=st.sampled_from([None, 1]),
    rows=st.integers(1, 4),
    wanted=requests,
    seed=st.integers(0, 50),
)
def test_a_request_gets_what_it_would_get_alone(family, cache, suffix_blocks, rows, wanted, seed):
    model, config, _ = case(family)
    options = {
        "rows": rows,
        "positions": 40,
        "block_length": 5,
        "cache": cache,
        "policy": CachePolicy(suffix_blocks=suffix_blocks),
    }
    prompts = random_prompts(config, [one["length"] for one in wanted], seed)
    submitted = []
    with Engine(model, **options) as engine:
        for prompt, one in zip(prompts, wanted, strict=True):
            time.sleep(one["after"])
            own = {
                "gen_length": one["gen_length"],
                "rule": RULES[one["rule"]],
                "temperature": one["temperature"],
                "seed": one["seed"],
                "stop_ids": (7, 8, 9) if one["stop"] else (),
                "top_p": one["top_p"],
            }
            request = engine.submit(prompt, **own)
            submitted.append((request, prompt, own, one))
            if one["cancelled"]:
                request.cancel()
    assert engine.stats()["busy"] == engine.stats()["waiting"] == 0
    for request, prompt, own, one in submitted:
        try:
            done = request.result(timeout=60)
        except RequestCancelled:
            assert one["cancelled"]
            continue
        expected = alone(model, prompt, options, **own)
        if not torch.equal(done.tokens[0], expected.tokens[0]):
            # The width of a product may change the last bit of its sums: a near tie proves nothing.
            assume(own["temperature"] == 0 and one["rule"] in ("threshold", "factor", "quota"))
            number = {"threshold": 0.3, "factor": 1.5, "quota": 3}[one["rule"]]
            stated = {"rule": (one["rule"], number), "cache": cache, "block_length": 5}
            stated |= {"gen_length": own["gen_length"], "stop_ids": own["stop_ids"]}
            if suffix_blocks is not None:
                stated |= {"suffix_blocks": suffix_blocks}
            (row,) = oracle_rows(family, [prompt], **stated)
            assume(row.slack > NEAR_TIE)
        assert_as_alone(request, expected)
        assert list(request) == expected.tokens[0][len(prompt) :].tolist()


def test_tokens_come_as_they_become_final():
    model, config, _ = case("llada")
    (prompt,) = random_prompts(config, (5,), 1)
    seen, lock = [], threading.Event()

    def slowly(event):
        assert set(event.rows.tolist()) <= {0}
        lock.wait(5)

    with Engine(model, rows=2, positions=64, block_length=4) as engine:
        request = engine.submit(prompt, gen_length=12, rule=Quota(4), stop_ids=(), on_step=slowly)
        assert not request.done()
        with pytest.raises(TimeoutError):
            request.result(timeout=0.01)
        lock.set()
        for token in request:
            seen.append(token)
        assert seen == request.result().tokens[0][5:].tolist()
        assert request.result() is request.result(), "asked again, the same again"
        assert list(request) == seen
    assert config["mask_token_id"] not in seen


def test_await_and_async_for():
    model, config, _ = case("llada")
    prompts = random_prompts(config, (5, 3, 8), 1)
    options = {"gen_length": 12, "rule": Quota(2), "stop_ids": ()}

    async def tokens_of(engine, prompt):
        request = engine.submit(prompt, **options)
        tokens = [token async for token in request]
        done = await request
        assert tokens == done.tokens[0][len(prompt) :].tolist()
        return done

    async def all_of_them(engine):
        return await asyncio.gather(*(tokens_of(engine, prompt) for prompt in prompts))

    with Engine(model, rows=2, positions=64, block_length=4) as engine:
        for prompt, done in zip(prompts, asyncio.run(all_of_them(engine)), strict=True):
            expected = alone(model, prompt, {"block_length": 4}, **options)
            assert torch.equal(done.tokens[0], expected.tokens[0])


class Broken(Exception):
    pass


def breaking(after):
    """A rule, and a listener, that raise at their call number `after`."""
    calls = []

    def rule(scores, candidates, step):
        calls.append(1)
        if len(calls) > after:
            raise Broken("on purpose")
        return Quota(4).commit(scores, candidates, step)

    def listen(event):
        calls.append(1)
        if len(calls) > after:
            raise Broken("on purpose")

    return rule, listen


def test_failure_stays_with_its_request():
    model, config, _ = case("llada")
    prompts = random_prompts(config, (5, 4, 6, 7, 3), 2)
    options = {"gen_length": 12, "rule": Quota(4), "stop_ids": ()}
    rule, listen = breaking(2)
    with Engine(model, rows=5, positions=64, block_length=4) as engine:
        good = [engine.submit(prompt, **options) for prompt in prompts[:2]]
        bad = engine.submit(prompts[2], **options | {"rule": rule})
        _, listen = breaking(2)
        deaf = engine.submit(prompts[3], **options, on_step=listen)
        wrong = engine.submit(prompts[4], **options | {"rule": lambda s, c, step: c & False})
        late = engine.submit(prompts[4], **options, deadline=1e-9)
        for request in (bad, deaf):
            with pytest.raises(Broken):
                request.result(timeout=60)
            with pytest.raises(Broken):
                list(request)
        with pytest.raises(ValueError, match="commits nothing"):
            wrong.result(timeout=60)
        with pytest.raises(TimeoutError, match="deadline"):
            late.result(timeout=60)
        for request, prompt in zip(good, prompts[:2], strict=True):
            assert_as_alone(request, alone(model, prompt, {"block_length": 4}, **options))
        again = engine.submit(prompts[2], **options)
        assert_as_alone(again, alone(model, prompts[2], {"block_length": 4}, **options))


def test_a_wrong_mask_fails_its_row_alone():
    """One rule for all requests: what it does to one does not touch the others."""
    model, config, _ = case("llada")
    prompts = random_prompts(config, (5, 4, 6), 2)

    def rule(scores, candidates, step):
        few = candidates.sum(1, keepdim=True)
        last = torch.arange(scores.shape[1]) == 3
        nothing, outside = few == 2, (few == 3) & last
        return candidates & ~nothing | outside

    options = {"rule": rule, "stop_ids": ()}
    with Engine(model, rows=3, positions=64, block_length=4) as engine:
        lengths = (8, 2, 3)
        requests = [
            engine.submit(prompt, gen_length=length, **options)
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        with pytest.raises(ValueError, match="rule: row 0 commits nothing"):
            requests[1].result(timeout=60)
        with pytest.raises(ValueError, match="rule: row 0 commits position 3, which is no"):
            requests[2].result(timeout=60)
        expected = alone(model, prompts[0], {"block_length": 4}, gen_length=8, **options)
        assert_as_alone(requests[0], expected)
    with pytest.raises(ValueError, match="rule: row 0 commits nothing"):
        fastdllm.generate(model, prompts[:2], gen_length=2, block_length=4, **options)


def test_on_final_sees_what_becomes_final_and_ends_the_text():
    model, config, _ = case("llada")
    (prompt,) = random_prompts(config, (5,), 2)
    options = {"gen_length": 12, "rule": Quota(4), "stop_ids": ()}
    expected = alone(model, prompt, {"block_length": 4}, **options)
    whole, seen = expected.tokens[0][5:].tolist(), []
    with Engine(model, rows=1, positions=64, block_length=4) as engine:
        watched = engine.submit(prompt, **options, on_final=seen.append)
        assert_as_alone(watched, expected)
        ended = engine.submit(prompt, **options, on_final=lambda tokens: len(tokens) >= 4)
        done = ended.result(timeout=60)
        bad = engine.submit(prompt, **options, on_final=lambda tokens: tokens[99])
        with pytest.raises(IndexError):
            bad.result(timeout=60)
        assert engine.stats()["busy"] == 0
    assert seen == [whole[: len(tokens)] for tokens in seen] and seen[-1] == whole
    assert sorted({len(tokens) for tokens in seen}) == [len(tokens) for tokens in seen]
    kept = next(len(tokens) for tokens in seen if len(tokens) >= 4)
    filled = [model.config.stop_ids[0]] * (12 - kept)
    assert done.tokens[0][5:].tolist() == whole[:kept] + filled == list(ended)
    assert int(done.nfe) < int(expected.nfe)


def test_a_nan_fails_its_own_row(monkeypatch):
    model, config, _ = case("llada")
    prompts = random_prompts(config, (6, 6), 3)
    prompts[0][0], prompts[1][0] = 3, 4
    options = {"gen_length": 8, "rule": Quota(4), "stop_ids": ()}
    expected = alone(model, prompts[1], {"block_length": 4}, **options)
    embedding = model.embedding.weight.detach().clone()
    embedding[3] = float("nan")
    monkeypatch.setattr(model.embedding.weight, "data", embedding)
    with Engine(model, rows=2, positions=64, block_length=4) as engine:
        broken, fine = (engine.submit(prompt, **options) for prompt in prompts)
        with pytest.raises(ValueError, match="NaN"):
            broken.result(timeout=60)
        assert_as_alone(fine, expected)


@pytest.mark.parametrize("device_lives", [True, False])
def test_a_failed_forward_fails_what_runs_and_nothing_hangs(device_lives, monkeypatch):
    model, config, _ = case("llada")
    prompts = random_prompts(config, (6, 5, 4), 3)
    options = {"gen_length": 8, "rule": Quota(4), "stop_ids": ()}
    engine = Engine(model, rows=2, positions=64, block_length=4)
    run, ready = engine._decoder.forward.run, threading.Event()

    def fail(slots, works):
        if len(slots) < 2:
            return run(slots, works)
        monkeypatch.setattr(engine._decoder.forward, "run", run)
        if not device_lives:
            monkeypatch.setattr(engine, "_fail_running", die)
        raise torch.OutOfMemoryError("out of memory")

    def die(error):
        raise error

    monkeypatch.setattr(engine._decoder.forward, "run", fail)
    first = engine.submit(prompts[0], **options, on_step=lambda event: ready.wait(10))
    requests = [first, *(engine.submit(prompt, **options) for prompt in prompts[1:])]
    ready.set()
    for request in requests[:2]:
        with pytest.raises((RuntimeError, EngineClosed), match="out of memory"):
            request.result(timeout=60)
    if device_lives:
        expected = alone(model, prompts[2], {"block_length": 4}, **options)
        assert_as_alone(requests[2], expected)
    else:
        with pytest.raises(EngineClosed):
            requests[2].result(timeout=60)
        engine._thread.join(10)
        with pytest.raises(EngineClosed, match="out of memory"):
            engine.submit(prompts[0], gen_length=4)
    engine.close()
    assert not engine._thread.is_alive()


def test_bad_input_is_refused_before_any_work():
    model, config, _ = case("llada")
    for wrong, error in (
        ({"rows": 0}, ValueError),
        ({"positions": 10**6}, ValueError),
        ({"positions": "many"}, TypeError),
        ({"block_length": 0}, ValueError),
        ({"cache": "other"}, ValueError),
        ({"policy": 3}, TypeError),
        ({"cache": "none", "policy": CachePolicy(0)}, ValueError),
        ({"graph": 1}, TypeError),
        ({"queue": 0}, ValueError),
    ):
        with pytest.raises(error, match=next(iter(wrong)).replace("cache", "cache|policy")):
            Engine(model, **{"positions": 64} | wrong)
    with pytest.raises(TypeError, match="model"):
        Engine(torch.nn.Linear(2, 2))
    with pytest.raises(MemoryError, match="rows would fit"):
        Engine(model, rows=10**9, positions=96)
    with Engine(model, rows=1, positions=64) as engine:
        for wrong, error in (
            ({"prompt": []}, ValueError),
            ({"prompt": [400]}, ValueError),
            ({"prompt": "text"}, TypeError),
            ({"gen_length": 0}, ValueError),
            ({"gen_length": 64}, ValueError),
            ({"rule": 3}, TypeError),
            ({"rule": Threshold(torch.tensor([0.1, 0.2]))}, ValueError),
            ({"score": "other"}, ValueError),
            ({"temperature": -1}, ValueError),
            ({"top_p": 2.0}, ValueError),
            ({"top_k": -2}, ValueError),
            ({"seed": 1.5}, TypeError),
            ({"stop_ids": [400]}, ValueError),
            ({"on_step": 3}, TypeError),
            ({"on_final": 3}, TypeError),
            ({"deadline": 0}, ValueError),
        ):
            with pytest.raises(error, match=next(iter(wrong))):
                engine.submit(**{"prompt": [1, 2], "gen_length": 4} | wrong)
        assert engine.stats()["finished"] == 0
    with pytest.raises(EngineClosed):
        engine.submit([1, 2], gen_length=4)


def test_a_full_line_a_closed_engine_and_a_late_cancel():
    model, config, _ = case("llada")
    hold = threading.Event()
    options = {"gen_length": 4, "rule": Quota(4), "stop_ids": ()}
    engine = Engine(model, rows=1, positions=64, block_length=4, queue=2)
    first = engine.submit([1, 2], **options, on_step=lambda event: hold.wait(10))
    while engine.stats()["busy"] == 0:
        time.sleep(0.001)
    waiting = [engine.submit([1, 2, number], **options) for number in range(2)]
    with pytest.raises(QueueFull, match="queue: 2 requests"):
        engine.submit([1, 2], **options)
    assert waiting[0].cancel() and not waiting[0].cancel()
    with pytest.raises(RequestCancelled):
        waiting[0].result()
    hold.set()
    engine.close()
    engine.close()
    assert first.result().nfe.tolist() == [4] and not first.cancel()
    assert waiting[1].result().nfe.tolist() == [4], "what was in line is finished"
    with pytest.raises(EngineClosed, match="closed"):
        engine.submit([1, 2], gen_length=4)
    assert not [t for t in threading.enumerate() if t.name == "fastdllm-engine"]


def test_a_request_that_is_cancelled_in_its_last_turn_has_no_result():
    model = case("llada")[0]
    with Engine(model, rows=1, positions=16, block_length=4) as engine:
        said = []
        request = engine.submit(
            [1, 2], gen_length=1, stop_ids=(), on_step=lambda event: said.append(request.cancel())
        )
        with pytest.raises(RequestCancelled):
            request.result(timeout=60)
        assert said == [True] and not request.cancel()
        assert engine.submit([1, 2], gen_length=1).result(timeout=60).nfe.tolist() == [1]


def test_an_exception_in_the_block_cancels():
    model, config, _ = case("llada")
    with pytest.raises(KeyError), Engine(model, rows=1, positions=90, block_length=4) as engine:
        requests = [
            engine.submit([1, 2], gen_length=80, rule=Quota(4), stop_ids=()) for _ in range(5)
        ]
        raise KeyError
    for request in requests[1:]:
        with pytest.raises(RequestCancelled):
            request.result()


@pytest.mark.parametrize("what", ["result", "iterate", "warm_up", "close"])
def test_a_listener_that_waits_for_its_own_loop_is_told_so(what):
    model, config, _ = case("llada")
    with Engine(model, rows=1, positions=64) as engine:
        inner = []

        def ask(event):
            inner.append(engine.submit([1], gen_length=2))
            if what == "result":
                inner[0].result()
            elif what == "iterate":
                list(inner[0])
            else:
                getattr(engine, what)()

        with pytest.raises(RuntimeError, match="waits for the loop"):
            engine.submit([1, 2], gen_length=2, on_step=ask).result(timeout=60)
        inner[0].result(timeout=60)


def test_who_stops_waiting_does_not_end_the_request():
    model, config, _ = case("llada")
    hold = threading.Event()

    async def wait(request):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(request, 0.05)

    options = {"gen_length": 4, "rule": Quota(4), "stop_ids": ()}
    with Engine(model, rows=1, positions=64, block_length=4) as engine:
        request = engine.submit([1, 2], **options, on_step=lambda event: hold.wait(10))
        asyncio.run(wait(request))
        assert not request.done()
        hold.set()
        assert request.result(timeout=60).nfe.tolist() == [4]


def test_a_row_that_could_not_be_laid_out_is_free_again(monkeypatch):
    model, config, _ = case("llada")
    options = {"gen_length": 4, "rule": Quota(4), "stop_ids": ()}
    with Engine(model, rows=1, positions=64, block_length=4) as engine:
        write = engine._decoder.forward.write

        def fail(*arguments):
            monkeypatch.setattr(engine._decoder.forward, "write", write)
            raise RuntimeError("out of memory")

        monkeypatch.setattr(engine._decoder.forward, "write", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.submit([1, 2], **options).result(timeout=60)
        assert engine.submit([1, 2], **options).result(timeout=60).nfe.tolist() == [4]


def test_generate_and_several_engines_share_a_model():
    model, config, _ = case("dream")
    prompts = random_prompts(config, (5, 4, 6), 2)
    options = {"gen_length": 10, "rule": Quota(3), "stop_ids": ()}
    expected = [alone(model, prompt, {"block_length": 4}, **options) for prompt in prompts]
    with (
        Engine(model, rows=2, positions=64, block_length=4) as one,
        Engine(model, rows=1, positions=48, block_length=4, cache="prefix") as two,
    ):
        for _ in range(3):
            requests = [one.submit(prompt, **options) for prompt in prompts]
            others = [two.submit(prompt, **options) for prompt in prompts]
            together = fastdllm.generate(model, prompts, block_length=4, **options)
            for number, request in enumerate(requests):
                assert_as_alone(request, expected[number])
                assert torch.equal(together.tokens[number], expected[number].tokens[0])
            for request in others:
                request.result(timeout=60)


def test_captured_rows_of_every_kind_share_their_forwards(records):  # noqa: F811
    model, config, _ = case("llada")
    prompts = random_prompts(config, (5, 4, 6, 7, 3), 2)
    wanted = [
        {"rule": rule, "temperature": heat, "seed": 3}
        for rule, heat in zip(list(RULES.values())[:5], (0, 0.5, 0, 0.9, 0), strict=True)
    ]
    with Engine(model, rows=4, positions=64, block_length=4) as engine:
        for _ in range(2):
            requests = [
                engine.submit(prompt, gen_length=9, stop_ids=(), **options)
                for prompt, options in zip(prompts, wanted, strict=True)
            ]
            for request, prompt, options in zip(requests, prompts, wanted, strict=True):
                options = options | {"gen_length": 9, "stop_ids": ()}
                assert_as_alone(request, alone(model, prompt, {"block_length": 4}, **options))
        stats = engine.stats()
    assert set(records) <= {1, 2, 4} and stats["captured"] == len(set(records))
    assert stats["finished"] == 10 and stats["tokens"] == 90


def test_many_requests_leave_nothing_behind():
    model, config, _ = case("llada")
    threads = threading.active_count()
    options = {"gen_length": 4, "rule": Threshold(0.0), "stop_ids": ()}
    with Engine(model, rows=4, positions=16, block_length=4, queue=500) as engine:

        def burst():
            requests = [engine.submit([number % 9, 2], **options) for number in range(300)]
            for request in requests:
                assert len(request.result(timeout=60).tokens[0]) == 6

        burst()
        gc.collect()
        before = len(gc.get_objects())
        for _ in range(2):
            burst()
        gc.collect()
        assert len(gc.get_objects()) < before + 500
        assert engine.stats()["finished"] == 900
    assert threading.active_count() == threads


@pytest.mark.gpu
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_captured_requests_on_a_gpu_are_those_of_generate(family):
    model, config = copy.deepcopy(case(family)[0]).to("cuda"), tiny.FAMILIES[family]
    prompts = random_prompts(config, [3 + number % 17 for number in range(24)], 1)
    wanted = [
        {"rule": RULES[name], "temperature": heat, "seed": 3, "top_p": nucleus}
        for name, heat, nucleus in (
            ("threshold", 0.0, None),
            ("quota", 0.8, 0.9),
            ("function", 0.0, None),
            ("factor", 0.5, None),
        )
    ]
    engine_options = {"block_length": 4}
    with Engine(model, rows=4, positions=64, block_length=4) as engine:
        made = engine.warm_up()
        requests = [
            engine.submit(prompt, gen_length=13, stop_ids=(), **wanted[number % 4])
            for number, prompt in enumerate(prompts)
        ]
        equal = 0
        for number, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
            options = wanted[number % 4] | {"gen_length": 13, "stop_ids": ()}
            expected = alone(model, prompt, engine_options, **options)
            done = request.result(timeout=60)
            equal += torch.equal(done.tokens[0], expected.tokens[0])
            assert (done.tokens[0][len(prompt) :] != config["mask_token_id"]).all()
        stats = engine.stats()
    assert made.captured == stats["captured"] > 0, "something was captured in traffic"
    assert equal >= len(prompts) - 1, "more than a near tie differs"


DEVICE_FAILS = """
import sys
import torch, tiny, fastdllm, pathlib, tempfile

def rule(scores, candidates, step):
    return candidates & (torch.zeros(1, device="cuda")[step + 7] > 0)[:, None]

with tempfile.TemporaryDirectory() as folder:
    model = tiny.build(pathlib.Path(folder), tiny.LLADA, device="cuda")[0]
engine = fastdllm.Engine(model, rows=2, positions=40, block_length=4)
assert engine.submit([1, 2], gen_length=8, rule=fastdllm.Quota(2)).result(60).nfe > 0
for expected in (RuntimeError, fastdllm.EngineClosed):
    try:
        engine.submit([1, 2], gen_length=8, rule=rule).result(60)
    except expected as error:
        print(type(error).__name__)
engine.close()
print("goes on", engine.closed)
"""


@pytest.mark.gpu
def test_a_device_that_has_failed_closes_the_engine_and_not_the_process():
    command = [sys.executable, "-c", DEVICE_FAILS]
    folder = os.path.dirname(__file__)
    paths = os.pathsep.join([folder, *filter(None, sys.path)])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": paths}
    )
    assert done.stdout.split("\n")[-2] == "goes on True", done.stderr[-2000:]
    assert done.stdout.split()[0] in ("RuntimeError", "EngineClosed")
    assert done.returncode == 0, done.stderr[-2000:]
