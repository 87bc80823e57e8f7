"""Tokens a second through HTTP beside the engine's own, and the time to the first final token.

LLaDA's shape, random weights, a scripted rule, as in bench/traffic.py; text is one word a token.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace

import torch
from race.shapes import MODELS, REAL, SMOKE, Scale
from race.subject import random_model

from fastdllm import Engine, Quota
from fastdllm.serve.service import Service, service_of
from fastdllm.serve.settings import Settings
from fastdllm.text import TextModel

from .asking import asked
from .served import serving, wait_until

STEPS = 8  # forwards a block
ROUNDS = 3  # in which the ways take turns
PATIENCE = 300.0
NAME = "random"


@dataclass(frozen=True)
class Size:
    """How much is asked of one kind of machine. Of each run: `requests` with so long a prompt and
    answer; all at once, or for the times of first tokens as many at once as the engine has rows.
    """

    scale: Scale
    rows: int
    positions: int
    prompt: int
    generation: int
    requests: int


LARGE = Size(REAL, rows=16, positions=2048, prompt=512, generation=256, requests=64)
SMALL = Size(SMOKE, rows=4, positions=160, prompt=48, generation=32, requests=8)


def speed(size: Size, device: torch.device) -> list[dict]:
    """A row for each way of asking: what the rounds took, and the seconds of first tokens."""
    service = random_service(size, device)
    prompts = drawn_prompts(size)
    with serving(service) as port:
        wait_until(lambda: service.ready, PATIENCE)
        ways = {
            "engine": lambda: through_engine(service.engine, prompts, size),
            "HTTP": lambda: through_http(port, prompts, size, stream=False),
            "HTTP, streamed": lambda: through_http(port, prompts, size, stream=True),
        }
        rows = {way: {"way": way, "requests": size.requests, "seconds": []} for way in ways}
        for ask in ways.values():
            ask()  # what is made once
        for _ in range(ROUNDS):
            for way, ask in ways.items():
                seconds, tokens = ask()
                rows[way]["seconds"].append(round(seconds, 4))
                rows[way]["tokens"] = tokens
        rows["HTTP, streamed"] |= first_tokens(port, prompts, size)
    return list(rows.values())


def random_service(size: Size, device: torch.device) -> Service:
    """The service of a random model, not warm yet."""
    settings = Settings(model=NAME, positions=size.positions, rule=Quota(STEPS))
    loaded = random_text_model(size, device)
    return service_of(loaded, settings, rows=size.rows, cache="dual", queue=4 * size.requests)


def random_text_model(size: Size, device: torch.device) -> TextModel:
    """A model of LLaDA-8B's shape, made small for a smoke test, whose texts never end by
    themselves, and a tokenizer with a word for every token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    config = replace(MODELS["llada"], **size.scale.changes | {"stop_ids": ()})
    words = {f"w{token}": token for token in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    model = random_model(config, size.scale.dtype, device)
    return TextModel(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def drawn_prompts(size: Size) -> list[list[int]]:
    draw = random.Random(1)
    ordinary = min(MODELS["llada"].stop_ids) if not size.scale.changes else 80
    return [[draw.randrange(ordinary) for _ in range(size.prompt)] for _ in range(size.requests)]


def through_engine(engine: Engine, prompts, size: Size) -> tuple[float, int]:
    """(seconds, tokens) of all requests, submitted at once."""
    began = time.perf_counter()
    options = {"gen_length": size.generation, "rule": Quota(STEPS)}
    for request in [engine.submit(prompt, **options) for prompt in prompts]:
        request.result(PATIENCE)
    return time.perf_counter() - began, size.generation * len(prompts)


def through_http(port: int, prompts, size: Size, stream: bool) -> tuple[float, int]:
    """The same over HTTP, by as many clients as there are requests."""
    found = _asked(port, prompts, size, stream, clients=len(prompts))
    return found["seconds"], sum(tokens for _, _, tokens in found["times"])


def first_tokens(port: int, prompts, size: Size) -> dict:
    """Seconds until the first final token and until the whole answer of streams, as many at once
    as the engine has rows.
    """
    found = _asked(port, prompts, size, stream=True, clients=size.rows)
    return {
        "clients": size.rows,
        "first": [round(first, 4) for first, _, _ in found["times"]],
        "whole": [round(whole, 4) for _, whole, _ in found["times"]],
    }


def _asked(port, prompts, size, stream, clients):
    streamed = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    kinds = [
        {
            "path": "/v1/completions",
            "body": {"prompt": prompt, "max_tokens": size.generation, "steps": STEPS, **streamed},
        }
        for prompt in prompts
    ]
    found = asked(port, clients, kinds, range(len(prompts)))
    if found["outcomes"] != {"answered": len(prompts)}:
        raise RuntimeError(f"over HTTP: {found['outcomes']}")
    return found
