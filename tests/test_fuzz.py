"""The fuzz of `make fuzz`, a little of it: its cases pass, and what is wrong is found, told apart
and made again.
"""

import dataclasses
import json
import subprocess
import sys
from collections import Counter, deque
from pathlib import Path
from random import Random

import fuzz
import fuzz_decodes
import fuzz_engine
import fuzz_kernels
import guarded
import pytest
import torch

import fastdllm

pytest.importorskip("triton")


def found(module, cases, device):
    """(what the oracles say of these cases, how often each was asked)."""
    outcomes = [module.check(case, device) for case in cases]
    checks = sum((outcome.checks for outcome in outcomes), Counter())
    return [failure for outcome in outcomes for failure in outcome.failures], checks


def test_twenty_decodes(device):
    cases = [fuzz_decodes.random_case(0, number) for number in range(20)]
    failures, checks = found(fuzz_decodes, cases, device.type)
    assert not failures
    assert checks["invariants"] == 20
    assert min(checks[name] for name in ("alone", "stated", "kernels", "infill")) > 0
    assert (checks["captured"] > 0) == (device.type == "cuda")


def test_twenty_kernel_calls(device):
    calls = [fuzz_kernels.random_call(0, number, device.type) for number in range(20)]
    failures, checks = found(fuzz_kernels, calls, device.type)
    assert not failures
    assert len(checks) > 5


def test_twenty_engines(device):
    cases = [fuzz_engine.random_case(0, number) for number in range(20)]
    failures, checks = found(fuzz_engine, cases, device.type)
    assert not failures
    assert checks["as alone"] > 40 and checks["as alone"] + checks["cancelled"] == sum(
        len(case.requests) for case in cases
    )


def test_a_case_is_the_python_that_makes_it_again():
    for number in range(40):
        case = fuzz_decodes.random_case(3, number)
        assert eval(repr(case), vars(fuzz_decodes)) == case == fuzz_decodes.random_case(3, number)
        served = fuzz_engine.random_case(3, number)
        assert eval(repr(served), vars(fuzz_engine)) == served
        call = fuzz_kernels.random_call(3, number)
        assert eval(repr(call), vars(fuzz_kernels)) == call


def spoil(monkeypatch, change):
    """Make `generate` return what `change` makes of the Generation and the number of prompts."""
    generate = fastdllm.generate

    def spoiled(model, prompts, **options):
        return change(generate(model, prompts, **options), len(prompts))

    monkeypatch.setattr(fastdllm, "generate", spoiled)


def case_of_rows(device, rows=3, **changes):
    model = fuzz_decodes.random_case(0, 30).model
    prompts = tuple((row % model.vocab, 1) for row in range(rows))
    return fuzz_decodes.Case(model, prompts, gen_length=6, block_length=4, **changes)


def another_token(result, rows):
    """The last token is another one where several rows are decoded together."""
    if rows > 1:
        result.tokens[-1][-1] = (result.tokens[-1][-1] + 1) % 10
    return result


def a_forward_more(result, rows):
    more = result.cached_steps + 9
    return dataclasses.replace(result, cached_steps=more, nfe=result.refreshes + more)


@pytest.mark.parametrize(
    "change, oracles",
    [
        (another_token, {"invariants", "alone", "stated"}),
        (a_forward_more, {"invariants", "stated"}),
    ],
)
def test_a_wrong_decode_is_found(change, oracles, device, monkeypatch):
    case = case_of_rows(device)
    assert not fuzz_decodes.check(case, device.type).failures
    spoil(monkeypatch, change)
    failures = fuzz_decodes.check(case, device.type).failures
    assert oracles <= {name for name, _ in failures}


def test_a_wrong_answer_of_an_engine_is_found(device, monkeypatch):
    monkeypatch.setattr(fuzz_decodes, "near_tie", lambda *_: False)
    one, two = (case_of_rows(device, rows=1, score=score) for score in ("margin", "confidence"))
    served = fuzz_engine.Served((one, two, one), rows=2, waits=(0, 0, 0))
    assert not fuzz_engine.check(served, device.type).failures
    spoil(monkeypatch, a_forward_more)
    outcome = fuzz_engine.check(served, device.type)
    assert [text[:9] for _, text in outcome.failures] == ["request 0", "request 1", "request 2"]
    small = fuzz.smaller(fuzz_engine, served, outcome, device.type)
    assert len(small.requests) == 1


def test_an_infill_that_changes_a_token_is_found(device, monkeypatch):
    case, infill = case_of_rows(device), fastdllm.infill

    def spoiled(model, sequences, **options):
        return another_token(infill(model, sequences, **options), len(sequences))

    monkeypatch.setattr(fastdllm, "infill", spoiled)
    assert "infill" in {name for name, _ in fuzz_decodes.check(case, device.type).failures}


def test_a_case_that_fails_is_made_smaller(device, monkeypatch):
    spoil(monkeypatch, another_token)
    case = case_of_rows(device, score="margin", suffix_blocks=1)
    outcome = fuzz_decodes.check(case, device.type)
    small = fuzz.smaller(fuzz_decodes, case, outcome, device.type)
    assert len(small.prompts) == 2 and small.gen_length == 1
    assert small.score == "confidence" and small.suffix_blocks is None
    assert fuzz_decodes.check(small, device.type).failures


def test_an_error_is_a_failure_too(device):
    case = case_of_rows(device, rule=("threshold", float("nan")))
    ((oracle, text),) = fuzz_decodes.check(case, device.type).failures
    assert oracle == "invariants" and "ValueError: Threshold.tau" in text


@pytest.mark.parametrize("layout", ["dense", "any", "last apart"])
def test_a_step_beside_a_tensor_is_seen(layout):
    for seed in range(20):
        values = torch.randn(2, 3, 4)
        guard = guarded.place(values, Random(seed), layout)
        assert guard.view.equal(values) and guard.unchanged()
        guard.view[0, 0, 0] = 9
        assert guard.guards_hold() and not guard.unchanged()
        guard.buffer[guard.view.storage_offset() - 1] = 0
        assert not guard.guards_hold()


def test_what_is_allocated_inside_is_guarded():
    with guarded.guarded_allocations() as made:
        one = torch.empty(2, 3)
        two = torch.empty_like(one, dtype=torch.float16)
        three = one.new_empty(4, dtype=torch.int32)
    assert one.isnan().all() and two.isnan().all() and (three == three[0]).all()
    assert [guard.view.shape for guard in made] == [one.shape, two.shape, three.shape]
    assert all(guard.guards_hold() for guard in made)
    torch.as_strided(two, (1,), (1,), guarded.GUARD + 6).fill_(1)
    assert [guard.guards_hold() for guard in made] == [True, False, True]
    assert torch.empty(1).untyped_storage().nbytes() == 4


@pytest.mark.parametrize("how, text", [("dies", "ended with -9"), ("hangs", "no answer")])
def test_a_process_that_dies_or_hangs_is_a_failure(how, text, capsys):
    worker, waiting, tally = fuzz.Worker(5, "cpu"), deque(), fuzz.Tally()
    try:
        worker.give("decode", [7, 8, 9])
        if how == "dies":
            worker.process.kill()
            worker.process.join()
        limit = 300 if how == "dies" else 0
        assert not fuzz.serve(worker, how == "dies", waiting, tally, 5, "cpu", limit)
    finally:
        worker.stop()
    (failure,) = tally.failures
    assert failure["oracle"] == "process" and text in failure["text"]
    assert repr(fuzz_decodes.random_case(5, 7)) in failure["case"]
    assert list(waiting) == [("decode", [8, 9])]
    assert "--seed 5 --device cpu --only decode:7" in capsys.readouterr().err


def test_the_command(tmp_path, device):
    command = [sys.executable, Path(fuzz.__file__), "--decodes", "3", "--kernel-calls", "2"]
    command += ["--engines", "2", "--device", device.type]
    out = tmp_path / "fuzz.json"
    subprocess.run([*command, "--seed", "1", "--processes", "1", "--out", out], check=True)
    report = json.loads(out.read_text())
    assert report["done"] == {"decode": 3, "engine": 2, "kernel": 2} and not report["failures"]
    assert sum(report["options"]["decode cache"].values()) == 3
    assert report["seed"] == 1 and report["kernels"] == (
        "interpreted" if device.type == "cpu" else "compiled"
    )
