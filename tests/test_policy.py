"""CachePolicy: refreshes that keep the prompt's keys and values, and a canvas that ends soon after
the active block.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_decode import (
    CACHES,
    KINDS,
    NEAR_TIE,
    RULES,
    Recorder,
    alone,
    batches,
    case,
    check_against_oracle,
    clear_case,
    oracle_rows,
    product_rule,
    random_prompts,
)
from test_graph import BATCH, check_equal, model_of, records, replaced, told  # noqa: F401

import fastdllm
from fastdllm import CachePolicy, Quota, Threshold

FIELDS = ("prompt_refreshes", "suffix_blocks", "keep_finished")
# Each alone, together, the extremes of all.
POLICIES = [(0, None), (2, None), (1, 0), (1, 1), (0, 1), (3, 0), (2, 2)]
POLICIES += [(0, None, True), (0, 0, True), (2, 1, True), (3, None, True)]
BLOCKS = {"gen_length": 19, "block_length": 4}  # five blocks, the last of them short


def options_of(family, cache, kind, policy):
    """What generate and the oracle both take, the policy as the oracle says it."""
    rule = (kind, RULES[family][kind]["confidence"])
    return dict(zip(FIELDS, policy, strict=False)), {
        "cache": cache,
        "rule": rule,
        **BLOCKS,
    }


def against_oracle(model, family, lengths, cache, kind, policy):
    fields, options = options_of(family, cache, kind, policy)
    prompts, rows = clear_case(family, lengths, **fields, **options)
    recorder = Recorder()
    options["rule"] = product_rule(options["rule"])
    result = fastdllm.generate(
        model, prompts, policy=CachePolicy(*policy), stop_ids=(), on_step=recorder, **options
    )
    check_against_oracle(result, rows, recorder)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("kind", ["threshold", "quota"])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tokens_and_forwards_equal_the_oracles(family, cache, kind, policy):
    against_oracle(case(family)[0], family, (3, 6), cache, kind, policy)


@pytest.mark.parametrize("suffix_blocks", [0, 1, 3])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_bounded_suffix_without_a_cache(family, suffix_blocks):
    against_oracle(case(family)[0], family, (3, 6), "none", "threshold", (1, suffix_blocks))


@pytest.mark.parametrize("lengths", [(5,), (1,), (4, 4, 4), (2, 9, 1, 5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rows_alone_of_one_length_and_of_many(family, kind, lengths):
    """One length: all rows start together, and as long as they stay so, attention is PyTorch's."""
    against_oracle(case(family)[0], family, lengths, "dual", kind, (2, 1))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_policy_changes_what_is_decoded(family):
    """Otherwise the tests above would prove nothing."""
    model, config, _ = case(family)
    for policy in POLICIES:
        changed = False
        for seed in range(5):
            prompts = random_prompts(config, (6, 6), seed)
            results = [
                fastdllm.generate(model, prompts, policy=one, rule=Quota(2), stop_ids=(), **BLOCKS)
                for one in (CachePolicy(), CachePolicy(*policy))
            ]
            changed |= not all(map(torch.equal, results[0].tokens, results[1].tokens))
        assert changed, policy


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_suffix_as_long_as_the_canvas_is_none_at_all(family, cache):
    model, config, _ = case(family)
    prompts, events = random_prompts(config, (3, 6, 6), 0), []
    for policy in (
        {},
        {"policy": CachePolicy()},
        {"policy": CachePolicy(1, 4)},
        {"policy": CachePolicy(suffix_blocks=10**9)},
    ):
        recorder = Recorder()
        fastdllm.generate(
            model,
            prompts,
            cache=cache,
            rule=Threshold(0.3),
            stop_ids=(),
            on_step=recorder,
            **policy,
            **BLOCKS,
        )
        events.append(told(recorder))
    assert all(other == events[0] for other in events)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    **batches,
    stop=st.booleans(),
    prompt_refreshes=st.integers(0, 3),
    suffix_blocks=st.none() | st.integers(0, 2),
)
def test_a_row_of_a_batch_is_the_row_alone(
    family,
    lengths,
    seed,
    gen_length,
    block_length,
    cache,
    rule,
    stop,
    prompt_refreshes,
    suffix_blocks,
):
    model, config, _ = case(family)
    prompts = random_prompts(config, lengths, seed)
    fields = {
        "prompt_refreshes": 1 if cache == "none" else prompt_refreshes,
        "suffix_blocks": suffix_blocks,
    }
    options = {
        "gen_length": gen_length,
        "block_length": block_length,
        "cache": cache,
        "stop_ids": (7, 8, 9) if stop else (),
    }
    ours = {"policy": CachePolicy(**fields), "rule": product_rule(rule), **options}
    together = fastdllm.generate(model, prompts, **ours)
    for row in range(len(prompts)):
        single = alone(model, prompts, row, **ours)
        if not torch.equal(single.tokens[0], together.tokens[row]):
            # The width of a product may change the last bit of its sums: a near tie proves nothing.
            (stated,) = oracle_rows(family, [prompts[row]], rule=rule, **fields, **options)
            assume(stated.slack > NEAR_TIE)
        assert torch.equal(single.tokens[0], together.tokens[row])
        for name in ("nfe", "refreshes", "cached_steps"):
            assert getattr(single, name)[0] == getattr(together, name)[row], name


def widths(model, monkeypatch, **options):
    """How many positions each forward of a call is fed."""
    fed, forward = [], model.hidden_states
    monkeypatch.setattr(
        model,
        "hidden_states",
        lambda tokens, at=None: (fed.append(tokens.shape[1]), forward(tokens, at))[1],
    )
    result = fastdllm.generate(
        model, rule=Quota(2), stop_ids=(), gen_length=16, block_length=4, graph=False, **options
    )
    monkeypatch.undo()
    assert result.nfe[0] == len(fed)
    return fed


@pytest.mark.parametrize("family, shift", [("llada", 0), ("dream", 1)])
def test_forwards_are_fed_what_the_policy_says(family, shift, monkeypatch):
    model, config, _ = case(family)
    prompts = random_prompts(config, (10,), 0)

    def refreshes(**options):
        fed = widths(model, monkeypatch, prompts=prompts, **options)
        assert set(fed[1::2]) == {4}
        return fed[::2]

    kept = 16 + shift
    assert refreshes() == [26, 26, 26, 26]
    assert refreshes(policy=CachePolicy(prompt_refreshes=0)) == [26, kept, kept, kept]
    assert refreshes(policy=CachePolicy(prompt_refreshes=2)) == [26, kept, 26, kept]
    assert refreshes(policy=CachePolicy(prompt_refreshes=3)) == [26, kept, kept, 26]
    assert refreshes(policy=CachePolicy(suffix_blocks=1)) == [18, 22, 26, 26]
    assert refreshes(policy=CachePolicy(0, 0)) == [14, 8 + shift, 12 + shift, 16 + shift]
    prefix = widths(
        model, monkeypatch, prompts=prompts, cache="prefix", policy=CachePolicy(suffix_blocks=1)
    )
    assert sorted(set(prefix)) == [4, 8, 18, 22, 26]
    none = widths(
        model, monkeypatch, prompts=prompts, cache="none", policy=CachePolicy(suffix_blocks=1)
    )
    assert sorted(set(none)) == [18, 22, 26]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_captured_decoding_is_decoding_and_no_policy_captures_anew(family, records):  # noqa: F811
    model, config, _ = case(family)
    options = {
        "rule": Threshold(RULES[family]["threshold"]["confidence"]),
        "stop_ids": (),
        **BLOCKS,
    }
    for policy in [(1, None), *POLICIES]:
        check_equal(model, random_prompts(config, BATCH, 1), policy=CachePolicy(*policy), **options)
    assert records and len(set(records)) == len(records)
    before = len(records)
    check_equal(
        model,
        random_prompts(config, BATCH, 1),
        cache="prefix",
        policy=CachePolicy(suffix_blocks=0),
        **options,
    )
    assert len(records) == before, "without a suffix, prefix steps are dual steps"


def test_a_nan_in_a_refresh_that_keeps_the_prompt_is_named(monkeypatch):
    model, config, _ = case("llada")
    head, calls = model.head, []

    def broken(hidden):
        logits = head(hidden)
        calls.append(logits.shape)
        if len(calls) == 3:  # the second block's refresh
            logits[1, 2, 5] = torch.nan
        return logits

    monkeypatch.setattr(model, "head", broken)
    with pytest.raises(ValueError, match="NaN or infinity in row 1 at position 10"):
        fastdllm.generate(
            model,
            random_prompts(config, (6, 4), 0),
            gen_length=8,
            block_length=4,
            rule=Quota(2),
            stop_ids=(),
            policy=CachePolicy(prompt_refreshes=0),
        )


def test_a_replaced_model_keeps_its_prompt_too(records):  # noqa: F811
    model = replaced()
    options = {"rule": Threshold(0.035), "stop_ids": (), **BLOCKS}
    for lengths in ((6, 6), (6, 3, 4)):
        for policy in POLICIES:
            check_equal(
                model,
                random_prompts(tiny.LLADA, lengths, 0),
                policy=CachePolicy(*policy),
                **options,
            )


def test_a_policy_is_a_value():
    assert CachePolicy() == CachePolicy(1, None) and hash(CachePolicy(0, 2)) == hash(
        CachePolicy(0, 2)
    )
    with pytest.raises(AttributeError):
        CachePolicy().suffix_blocks = 1


def test_the_evaluation_measures_every_policy(tmp_path, monkeypatch):
    root = Path(__file__).resolve().parents[1]
    monkeypatch.syspath_prepend(str(root / "bench" / "quality"))
    import evaluate

    short = replace(evaluate.TASKS["stories"], gen_length=40)
    monkeypatch.setitem(evaluate.TASKS, "stories", short)
    model = str(root / "fastdllm" / "assets" / "tiny-llada")
    command = [
        model,
        "--out",
        str(tmp_path),
        "--policies",
        "--problems",
        "2",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    evaluate.main([*command, "--limit-settings", "off", "suffix_blocks"])
    evaluate.main(command)
    results = json.loads((tmp_path / "tiny-llada-policies.json").read_text())["results"]
    keys = sorted(map(evaluate.key_of, results))
    assert keys == sorted(map(evaluate.key_of, evaluate.policy_settings())) and len(set(keys)) == 30
    assert (
        "| dual, prompt_refreshes 0, suffix_blocks 2 |"
        in (tmp_path / "tiny-llada-policies.md").read_text()
    )


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("lengths", [(5,), (4, 4, 4), (2, 9, 1, 5)], ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_gpu_decodes_as_is_right(family, lengths, policy):
    against_oracle(model_of(family, "cuda"), family, lengths, "dual", "threshold", policy)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_captured_on_a_gpu(family, dtype, records):  # noqa: F811
    model = model_of(family, "cuda", dtype)
    options = {
        "rule": Threshold(RULES[family]["threshold"]["confidence"]),
        "stop_ids": (),
        **BLOCKS,
    }
    for lengths in ((5, 5), BATCH):
        for policy in POLICIES:
            check_equal(
                model,
                random_prompts(tiny.FAMILIES[family], lengths, 2),
                policy=CachePolicy(*policy),
                **options,
            )
    assert records
