"""infill(): masks between given text, against a plain decoding of the same holes."""

import pytest
import tiny
import torch
from test_decode import CACHES, case, random_prompts

import fastdllm
from fastdllm import Quota, Threshold


def holes(config, lengths, seed, share=0.4):
    """Sequences with masks at random places, none where the row says so."""
    generator = torch.Generator().manual_seed(seed)
    sequences = random_prompts(config, lengths, seed)
    for sequence in sequences:
        sequence[sequence == config["mask_token_id"]] = 1
        hidden = torch.rand(len(sequence), generator=generator) < share
        sequence[hidden] = config["mask_token_id"]
    return sequences


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_mask_is_filled_and_nothing_else_changes(family, cache):
    model, config, _ = case(family)
    mask_id = config["mask_token_id"]
    sequences = holes(config, (20, 7, 13, 1), 3)
    sequences.append(torch.tensor([mask_id] * 6))
    sequences.append(torch.tensor([1, 2, 3]))
    done = fastdllm.infill(model, sequences, block_length=4, cache=cache, rule=Threshold(0.3))
    for before, after in zip(sequences, done.tokens, strict=True):
        given = before != mask_id
        assert torch.equal(after[given], before[given]) and (after != mask_id).all()
    assert done.nfe[-1] == 0 and done.nfe[-2] > 0
    first = [int((s == mask_id).int().argmax()) for s in sequences[:2]]
    assert done.prompt_lengths[:2] == first


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_masks_at_the_end_are_a_generation(family):
    model, config, _ = case(family)
    prompts = random_prompts(config, (5, 9, 3), 1)
    prompts = [p.masked_fill(p == config["mask_token_id"], 0) for p in prompts]
    masks = torch.full((10,), config["mask_token_id"])
    options = {"block_length": 4, "rule": Quota(2), "stop_ids": ()}
    infilled = fastdllm.infill(model, [torch.cat([p, masks]) for p in prompts], **options)
    generated = fastdllm.generate(model, prompts, gen_length=10, **options)
    for ours, theirs in zip(infilled.tokens, generated.tokens, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(infilled.nfe, generated.nfe)
    assert infilled.prompt_lengths == generated.prompt_lengths


def test_without_a_cache_each_token_is_the_models_own_choice():
    """One token a step, no cache: an independent loop over model.logits says the same."""
    model, config, _ = case("llada")
    mask_id = config["mask_token_id"]
    (sequence,) = holes(config, (16,), 5)
    done = fastdllm.infill(model, [sequence], block_length=5, cache="none", rule=Quota(5))
    text = sequence.clone()
    while (text == mask_id).any():
        start = int((text == mask_id).nonzero()[0])
        block = slice(start, min(start + 5, len(text)))
        masked = int((text[block] == mask_id).sum())
        for _ in range(masked):
            probabilities = model.logits(text[None])[0].softmax(-1)
            logits = probabilities.clone()
            logits[:, mask_id] = -1
            score, token = logits.max(-1)
            score[text != mask_id] = -1
            score[: block.start] = -1
            score[block.stop :] = -1
            best = int(score.argmax())
            text[best] = token[best]
    # Quota(5) spreads a block's masks over five steps: one a step where there are at most five.
    assert torch.equal(done.tokens[0], text)


def test_bad_sequences_are_refused():
    model, config, _ = case("llada")
    with pytest.raises(ValueError, match="sequences"):
        fastdllm.infill(model, [])
    with pytest.raises(ValueError, match=r"sequences\[1\]"):
        fastdllm.infill(model, [[1], [400]])
    with pytest.raises(ValueError, match="sequences: the longest"):
        fastdllm.infill(model, [[1] * 97])
    with pytest.raises(TypeError, match="gen_length"):
        fastdllm.infill(model, [[1]], gen_length=4)
    stopping = fastdllm.infill(
        model, [[1, config["mask_token_id"], 2]], stop_ids=None, rule=Threshold(0.5)
    )
    assert len(stopping.tokens[0]) == 3
