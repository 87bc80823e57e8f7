"""The two embedded models on unseen problems: captured and eager decoding against the CPU's, in
fp32 and bf16.

    python bench/end_to_end_accuracy.py FILE [--problems 1000]

writes the CPU's answers, for `end_to_end.py --accuracy --reference FILE`: it takes longer than all
the rest, and what it answers does not depend on the GPU.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from fastdllm import generate, load

BLOCK = 32
ASSETS = Path(__file__).parents[1] / "fastdllm" / "assets"
MODELS = ("tiny-llada", "tiny-dream")
SETTINGS = (
    ("dual", "threshold 0.9"),
    ("dual", "2 a step"),
    ("prefix", "threshold 0.9"),
)  # cache, rule of evaluate.py
RUNS = {
    "fp32 eager": (torch.float32, False),
    "fp32 captured": (torch.float32, True),
    "bf16 eager": (torch.bfloat16, False),
    "bf16 captured": (torch.bfloat16, True),
}


def accuracy(device, count, models=MODELS, settings=SETTINGS, reference=None):
    """For each model and setting, of `count` problems: how many every run solves, and in how many
    it gives the tokens of the first, the CPU's in fp32. reference: a file of `cpu_answers`; without
    one they are made here.
    """
    evaluate, problems = problems_of(count)
    expected = (
        json.loads(reference.read_text()) if reference else cpu_answers(count, models, settings)
    )
    found = []
    for name in models:
        tokenizer, prompts = prompts_of(name, problems)
        loaded = {
            dtype: load(ASSETS / name, device=device, dtype=dtype) for dtype, _ in RUNS.values()
        }
        for cache, rule in settings:
            cpu = expected[key_of(name, cache, rule)][:count]
            if len(cpu) < count:
                raise SystemExit(
                    f"--reference: {reference} holds {len(cpu)} answers of {name}, {count} are asked for"
                )
            entry = {
                "model": name,
                "problems": count,
                "cache": cache,
                "rule": rule,
                "solved": {},
                "same_tokens": {},
            }
            texts = {"CPU fp32": cpu}
            for run, (dtype, captured) in RUNS.items():
                options = {"cache": cache, "rule": evaluate.rules()[rule](BLOCK), "graph": captured}
                texts[run] = answers(loaded[dtype], prompts, evaluate.GEN_LENGTH, options)
            for run, given in texts.items():
                solved = (
                    evaluate.score(problem, text, tokenizer, loaded[torch.float32].config.stop_ids)[
                        0
                    ]
                    for problem, text in zip(problems, given, strict=True)
                )
                entry["solved"][run] = sum(solved)
                entry["same_tokens"][run] = sum(map(list.__eq__, given, cpu))
            found.append(entry)
            print(
                name,
                cache,
                rule,
                "solved",
                entry["solved"],
                "same tokens as on the CPU",
                entry["same_tokens"],
                flush=True,
            )
    return found


def cpu_answers(count, models=MODELS, settings=SETTINGS):
    """{model, cache and rule: the tokens that the CPU generates in fp32 for each of `count`
    problems}.
    """
    evaluate, problems = problems_of(count)
    found = {}
    for name in models:
        model, (_, prompts) = (
            load(ASSETS / name, device="cpu", dtype=torch.float32),
            prompts_of(name, problems),
        )
        for cache, rule in settings:
            options = {"cache": cache, "rule": evaluate.rules()[rule](BLOCK), "graph": False}
            found[key_of(name, cache, rule)] = answers(model, prompts, evaluate.GEN_LENGTH, options)
    return found


def key_of(name, cache, rule):
    return f"{name}, {cache}, {rule}"


def problems_of(count):
    """(the module evaluate, the first `count` problems of its test)."""
    sys.path.insert(0, str(Path(__file__).parent / "quality"))
    import evaluate

    return evaluate, [evaluate.make_problem(index, "test") for index in range(count)]


def prompts_of(name, problems):
    """(a model's tokenizer, the problems' prompts as ids)."""
    from tokenizer import prompt_of
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ASSETS / name / "tokenizer.json"))
    return tokenizer, [
        torch.tensor(tokenizer.encode(prompt_of(problem)).ids) for problem in problems
    ]


def answers(model, prompts, gen_length, options, at_once=250):
    """What is generated after each prompt, as lists."""
    texts = []
    for first in range(0, len(prompts), at_once):
        part = prompts[first : first + at_once]
        done = generate(model, part, gen_length=gen_length, block_length=BLOCK, **options)
        texts += [
            tokens[len(prompt) :].tolist() for prompt, tokens in zip(part, done.tokens, strict=True)
        ]
    return texts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--problems", type=int, default=1000)
    args = parser.parse_args()
    args.file.write_text(json.dumps(cpu_answers(args.problems)))
