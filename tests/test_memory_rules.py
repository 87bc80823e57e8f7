"""Rules with a memory: what they keep of a block from step to step, and who carries it."""

import dataclasses
from typing import ClassVar

import pytest
import tiny
import torch

import fastdllm
from fastdllm.decode import decoding, row_of_prompt
from fastdllm_kernels import (
    Kept,
    Stability,
    confidence_select,
    confidence_select_reference,
    memory_of,
    new_memory,
    rules,
)

BLOCKS, WIDTH, STEPS = 10_000, 12, 6


def stable(history, tau, steps):
    """The positions that one row commits now, by the rule's statement.

    history: of each step so far ({position: score}, {position: token}).
    """
    scores = history[-1][0]

    def lasted(position):
        latest = [tokens[position] for _, tokens in history[-steps:]]
        return len(latest) == steps and len(set(latest)) == 1

    best = min(scores, key=lambda position: (-scores[position], position), default=None)
    return {best} - {None} | {at for at in scores if scores[at] >= tau and lasted(at)}


def test_stability_commits_what_its_statement_says():
    generator = torch.Generator().manual_seed(0)

    def draw(highest, *shape):
        return torch.randint(0, highest, shape, generator=generator)

    tau, steps = draw(9, BLOCKS) / 8, 1 + draw(4, BLOCKS)
    rule = Stability(tau, steps)
    candidates = draw(8, BLOCKS, WIDTH) > 0
    memory = new_memory(rule, BLOCKS, WIDTH, candidates.device)
    histories = [[] for _ in range(BLOCKS)]
    for step in range(STEPS):
        scores = (draw(9, BLOCKS, WIDTH) / 8).masked_fill(draw(20, BLOCKS, WIDTH) == 0, -torch.inf)
        token_ids = draw(2, BLOCKS, WIDTH)
        at_step = torch.full((BLOCKS,), step)
        got, memory = rule.commit(scores, candidates, at_step, token_ids, memory)
        wanted = torch.zeros_like(got)
        columns = (scores, token_ids, candidates, tau, steps)
        for b, (row, tokens, able, *parameters) in enumerate(
            zip(*map(torch.Tensor.tolist, columns), strict=True)
        ):
            held = {at: score for at, score in enumerate(row) if able[at]}
            histories[b].append((held, dict(enumerate(tokens))))
            wanted[b, list(stable(histories[b], *parameters))] = True
        assert torch.equal(got, wanted)
        counts = got.sum(1)
        assert ((counts > 1) & (counts < candidates.sum(1))).sum() > BLOCKS / 50
        candidates = candidates & ~got


def test_the_operator_keeps_in_place_what_the_rule_returns(device):
    logits = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(1)).to(device)
    rule = Stability(0.0, 2)
    for select in (confidence_select, confidence_select_reference):
        tokens = torch.full((2, 5), 19, device=device)
        memory = new_memory(rule, 2, 5, tokens.device)
        first = select(logits, tokens, mask_id=19, rule=rule, memory=memory)
        assert first.committed.sum() == 2 and (memory["run"] == 1).all()
        assert torch.equal(memory["token_ids"], first.token_ids)
        second = select(logits, tokens, mask_id=19, rule=rule, memory=memory)
        assert second.committed.sum() == 8 and not second.remaining.any()


@dataclasses.dataclass(frozen=True, eq=False)
class Counting:
    """Commits the best candidate, and counts how often it was asked about each block."""

    seen: list = dataclasses.field(default_factory=list)
    memory: ClassVar = {"asked": Kept(torch.int32, 0)}

    def commit(self, scores, candidates, step, token_ids, memory):
        self.seen.extend(zip(step.tolist(), memory["asked"].tolist(), strict=True))
        mask = candidates & (rules._ranks(scores, candidates) == 0)
        return mask, {"asked": memory["asked"] + 1}


@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_each_block_begins_with_an_empty_memory(device, tmp_path, family, cache):
    """In a batch of unequal rows, and in a slot whose last row went in the middle of a block."""
    config = tiny.FAMILIES[family]
    model, _ = tiny.build(tmp_path / "model", config, device=device)
    rule = Counting()
    options = {"gen_length": 10, "block_length": 4, "cache": cache, "stop_ids": (), "rule": rule}
    with decoding(model, [[5, 6, 7], [8]], **options) as decoder:
        for _ in range(3):
            decoder.turn()
        gone = decoder.rows[0]
        decoder.release(gone)
        row = row_of_prompt([9, 10], 6, model.config)
        row.options = gone.options
        decoder.admit(row)
        decoder.run()
        assert all(model.config.mask_id not in row.text for row in decoder.rows)
    # Dream's refresh commits one token by itself, if there is a cache.
    before = int(family == "dream" and cache == "dual")
    assert {step for step, _ in rule.seen} == set(range(before, 4))
    assert all(asked == [step - before] * 4 for step, asked in rule.seen)


def test_rows_of_several_rules_keep_apart_what_is_theirs(device, tmp_path):
    model, _ = tiny.build(tmp_path / "model", tiny.LLADA, device=device)
    options = {"gen_length": 12, "stop_ids": ()}
    asked = [([5, 6, 7], Stability(0.0, 2)), ([8, 9], Counting()), ([5, 6], Stability(0.0, 3))]
    alone = [
        fastdllm.generate(model, [prompt], rule=rule, block_length=6, **options)
        for prompt, rule in asked
    ]
    with fastdllm.Engine(model, rows=3, positions=20, block_length=6) as engine:
        requests = [engine.submit(prompt, rule=rule, **options) for prompt, rule in asked]
        for request, one in zip(requests, alone, strict=True):
            done = request.result(60)
            assert torch.equal(done.tokens[0], one.tokens[0]) and done.nfe[0] == one.nfe[0]
    assert 2 < alone[0].nfe[0] < alone[2].nfe[0] < 12 == alone[1].nfe[0]


def test_each_row_may_have_its_own_parameters(device, tmp_path):
    model, _ = tiny.build(tmp_path / "model", tiny.LLADA, device=device)
    prompts, numbers = [[5, 6, 7], [8, 9]], [(0.0, 2), (0.01, 3)]
    options = {"gen_length": 12, "block_length": 6, "stop_ids": ()}
    tau, steps = map(torch.tensor, zip(*numbers, strict=True))
    done = fastdllm.generate(model, prompts, rule=Stability(tau, steps), **options)
    for row, parameters in enumerate(numbers):
        one = fastdllm.generate(model, [prompts[row]], rule=Stability(*parameters), **options)
        assert torch.equal(done.tokens[row], one.tokens[0]) and done.nfe[row] == one.nfe[0]
    assert done.nfe[0] < done.nfe[1] < 12


def test_a_rule_says_what_it_keeps():
    assert list(memory_of(Stability())) == ["token_ids", "run"]
    assert memory_of(rules.Threshold()) == memory_of(lambda *_: None) == {}


def test_a_branch_does_not_see_a_memory():
    class Both(Stability):
        branch: ClassVar[str] = "both"

    with pytest.raises(ValueError, match="rule: Both has a memory, which no branch"):
        rules.check_rule(Both(), 1)


def test_a_rule_that_keeps_nothing_of_what_it_says_is_named(tmp_path):
    class Forgetful(Counting):
        def commit(self, *arguments):
            return super().commit(*arguments)[0], {}

    with pytest.raises(TypeError, match="rule: expected commit to return .*memory, asked"):
        fastdllm.generate(
            tiny.build(tmp_path / "model", tiny.LLADA)[0], [[5]], gen_length=2, rule=Forgetful()
        )
