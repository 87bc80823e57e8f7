"""The two embedded models on unseen problems: captured and eager decoding against the CPU's, in
fp32 and bf16.

    python bench/end_to_end_accuracy.py FILE [--problems 1000]

writes the CPU's answers, for `end_to_end.py --accuracy --reference FILE`: it takes longer than all
the rest, and what it answers does not depend on the GPU.
"""

import argparse
import json
from pathlib import Path

import torch
from quality import evaluate
from tiny_models.problems import make_problem
from tiny_models.tasks import TASKS
from tokenizers import Tokenizer

from fastdllm import generate, load

BLOCK = 32
ROWS = 250  # decoded in one batch
ASSETS = Path(__file__).parents[1] / "fastdllm" / "assets"
MODELS = ("tiny-llada", "tiny-dream")
# Cache, and the rule as evaluate.py names it.
SETTINGS = (("dual", "threshold 0.9"), ("dual", "2 a step"), ("prefix", "threshold 0.9"))
# Run -> dtype, and whether forwards are captured.
RUNS = {
    "fp32 eager": (torch.float32, False),
    "fp32 captured": (torch.float32, True),
    "bf16 eager": (torch.bfloat16, False),
    "bf16 captured": (torch.bfloat16, True),
}
REFERENCE = "CPU fp32"


def accuracy(device, count, models=MODELS, settings=SETTINGS, reference=None) -> list[dict]:
    """For each model and setting, of `count` problems: how many every run solves, and in how many
    it gives the tokens of the CPU in fp32. reference: a file of `cpu_answers`; without one they are
    made here.
    """
    if reference:
        expected = json.loads(reference.read_text())
    else:
        expected = cpu_answers(count, models, settings)
    problems = [make_problem(index, "test") for index in range(count)]
    found = []
    for name in models:
        tokenizer = Tokenizer.from_file(str(ASSETS / name / "tokenizer.json"))
        prompts = evaluate.prompt_ids(tokenizer, problems)
        dtypes = {dtype for dtype, _ in RUNS.values()}
        loaded = {dtype: load(ASSETS / name, device=device, dtype=dtype) for dtype in dtypes}
        for cache, rule in settings:
            answered = {REFERENCE: expected[key_of(name, cache, rule)][:count]}
            if len(answered[REFERENCE]) < count:
                raise SystemExit(
                    f"--reference: {reference} holds {len(answered[REFERENCE])} answers of {name}, "
                    f"{count} are asked for"
                )
            for run, (dtype, captured) in RUNS.items():
                answered[run] = answers(loaded[dtype], prompts, cache, rule, captured)
            stop_ids = loaded[torch.float32].config.stop_ids
            entry = {"model": name, "problems": count, "cache": cache, "rule": rule}
            entry |= graded(answered, problems, tokenizer, stop_ids)
            found.append(entry)
            print(f"{key_of(name, cache, rule)}: {json.dumps(entry)}", flush=True)
    return found


def graded(answered, problems, tokenizer, stop_ids) -> dict:
    """Of each run's answers: how many solve their problem, and how many are the reference's."""
    solved, same = {}, {}
    for run, generated in answered.items():
        right = 0
        for problem, tokens in zip(problems, generated, strict=True):
            number_right, _, _ = evaluate.score(problem, tokens, tokenizer, stop_ids)
            right += number_right
        solved[run] = right
        same[run] = sum(map(list.__eq__, generated, answered[REFERENCE]))
    return {"solved": solved, "same_tokens": same}


def cpu_answers(count, models=MODELS, settings=SETTINGS) -> dict[str, list]:
    """{model, cache and rule: the tokens that the CPU generates in fp32 for each of `count`
    problems}.
    """
    problems = [make_problem(index, "test") for index in range(count)]
    found = {}
    for name in models:
        model = load(ASSETS / name, device="cpu", dtype=torch.float32)
        tokenizer = Tokenizer.from_file(str(ASSETS / name / "tokenizer.json"))
        prompts = evaluate.prompt_ids(tokenizer, problems)
        for cache, rule in settings:
            key = key_of(name, cache, rule)
            found[key] = answers(model, prompts, cache, rule, captured=False)
    return found


def key_of(name, cache, rule) -> str:
    return f"{name}, {cache}, {rule}"


def answers(model, prompts, cache, rule, captured) -> list[list[int]]:
    """The tokens generated after each prompt."""
    options = {
        "gen_length": TASKS["stories"].gen_length,
        "block_length": BLOCK,
        "cache": cache,
        "rule": evaluate.rules()[rule](BLOCK),
        "graph": captured,
    }
    found = []
    for first in range(0, len(prompts), ROWS):
        done = generate(model, prompts[first : first + ROWS], **options)
        for tokens, length in zip(done.tokens, done.prompt_lengths, strict=True):
            found.append(tokens[length:].tolist())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--problems", type=int, default=1000)
    args = parser.parse_args()
    args.file.write_text(json.dumps(cpu_answers(args.problems)))


if __name__ == "__main__":
    main()
