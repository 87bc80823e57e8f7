"""The two small trained models that ship with the package: they load, and solve problems in a few
forwards.
"""

import re
import sys

import pytest
import torch
from safetensors import safe_open
from test_floors import ROOT
from transformers import AutoTokenizer

import fastdllm

ASSETS = ROOT / "fastdllm" / "assets"
NAMES = ("tiny-llada", "tiny-dream")
PROBLEMS = 12


@pytest.fixture(scope="module", params=NAMES)
def solved(request):
    """(model, test problems, a function that decodes them all with given options and returns texts
    and the Generation).
    """
    sys.path.insert(0, str(ROOT / "bench"))
    from tiny_models.problems import make_problem
    from tiny_models.tokenizer import prompt_of

    folder = ASSETS / request.param
    model, tokenizer = (
        fastdllm.load(folder, device="cpu", dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    problems = [make_problem(index, "test") for index in range(PROBLEMS)]
    prompts = [tokenizer(prompt_of(problem)).input_ids for problem in problems]

    def decode(**options):
        done = fastdllm.generate(model, prompts, gen_length=128, **options)
        answers = [t[n:] for t, n in zip(done.tokens, done.prompt_lengths, strict=True)]
        return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers], done

    return model, problems, decode


def right(problems, texts):
    return sum(
        text.strip().endswith(f"#### {problem.final}")
        for problem, text in zip(problems, texts, strict=True)
    )


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_unseen_problems_are_solved_in_few_forwards(solved, cache):
    model, problems, decode = solved
    texts, done = decode(cache=cache)
    assert right(problems, texts) >= PROBLEMS - 1
    assert done.nfe.float().mean() < 24, (
        "a worked answer of 70 tokens should take a few forwards, not one a token"
    )
    if cache != "none":
        assert (done.refreshes <= 128 // 32).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_small_and_in_the_published_format(name):
    folder = ASSETS / name
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= 16 * 2**20
    with safe_open(weights, framework="pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118
    assert fastdllm.load(folder, device="cpu").dtype == torch.bfloat16
    card = (folder / "README.md").read_text()
    assert re.search(r"Accuracy on 1000 unseen problems.*?(\d+\.\d)% with one token a step", card)
