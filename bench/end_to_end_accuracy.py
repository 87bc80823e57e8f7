"""The two embedded models on unseen problems: captured and eager decoding against the CPU's, in fp32 and bf16."""

import sys
from pathlib import Path

import torch

from fastdllm import generate, load

BLOCK = 32
MODELS = ("tiny-llada", "tiny-dream")
SETTINGS = (("dual", "threshold 0.9"), ("dual", "2 a step"), ("prefix", "threshold 0.9"))  # cache, rule of evaluate.py


def accuracy(device, count, models=MODELS, settings=SETTINGS):
    """For each model and setting, of `count` problems: how many every run solves, and in how many it gives the tokens of the
    first, the CPU's in fp32."""
    sys.path.insert(0, str(Path(__file__).parent / "quality"))
    import evaluate
    from tokenizers import Tokenizer

    problems = [evaluate.make_problem(index, "test") for index in range(count)]
    assets, found = Path(__file__).parents[1] / "fastdllm" / "assets", []
    runs = {"CPU fp32": ("cpu", torch.float32, False), "fp32 eager": (device, torch.float32, False),
            "fp32 captured": (device, torch.float32, True), "bf16 eager": (device, torch.bfloat16, False),
            "bf16 captured": (device, torch.bfloat16, True)}  # fmt: skip
    for name in models:
        tokenizer = Tokenizer.from_file(str(assets / name / "tokenizer.json"))
        prompts = [torch.tensor(tokenizer.encode(evaluate.prompt_of(problem)).ids) for problem in problems]
        loaded = {(where, dtype): load(assets / name, device=where, dtype=dtype) for where, dtype, _ in runs.values()}
        for cache, rule in settings:
            entry = {"model": name, "problems": count, "cache": cache, "rule": rule, "solved": {}, "same_tokens": {}}
            reference = None
            for run, (where, dtype, captured) in runs.items():
                options = {"cache": cache, "rule": evaluate.rules()[rule](BLOCK), "graph": captured}
                texts = answers(loaded[where, dtype], prompts, evaluate.GEN_LENGTH, options)
                reference = reference or texts
                solved = (evaluate.score(p, text, tokenizer, loaded[where, dtype].config.stop_ids)[0]
                          for p, text in zip(problems, texts, strict=True))  # fmt: skip
                entry["solved"][run] = sum(solved)
                entry["same_tokens"][run] = sum(map(list.__eq__, texts, reference))
            found.append(entry)
            print(name, cache, rule, "solved", entry["solved"], "same tokens as on the CPU", entry["same_tokens"], flush=True)
    return found


def answers(model, prompts, gen_length, options, at_once=250):
    """What is generated after each prompt, as lists."""
    texts = []
    for first in range(0, len(prompts), at_once):
        part = prompts[first : first + at_once]
        done = generate(model, part, gen_length=gen_length, block_length=BLOCK, **options)
        texts += [tokens[len(prompt) :].tolist() for prompt, tokens in zip(part, done.tokens, strict=True)]
    return texts
