"""What one rank of test_parallel.py does, in a process of its own."""

import os
import time
from datetime import timedelta
from pathlib import Path

import oracle_models
import tiny
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import fastdllm
from fastdllm import parallel

FAMILIES = {
    "llada": tiny.LLADA,
    # More ranks than key/value heads, and heads of several.
    "dream": {**tiny.DREAM, "num_attention_heads": 8, "vocab_size": 48},
    "tied": {**tiny.LLADA, "weight_tying": True},
}
UNTIED = ("llada", "dream")
PROMPTS = [[3, 14, 15, 9, 26], [5, 35, 8, 9, 7, 9, 3, 2, 3], [8, 4]]
HOLES = [[3, 37, 37, 5, 9, 37, 2], [37, 37, 37, 6]]
SHORT = {"gen_length": 16, "block_length": 8, "stop_ids": ()}
RULES = {
    "threshold": fastdllm.Threshold(0.22),
    "thresholds of rows": fastdllm.Threshold(torch.tensor([0.2, 0.25, 0.3])),
    "factor": fastdllm.Factor(2.4),
    "quota": fastdllm.Quota(3),
    "frechet": fastdllm.Frechet(),
    "entropy bound": fastdllm.EntropyBound(4.0),
    "progress threshold": fastdllm.ProgressThreshold(0.2, 0.3),
    "neighbours": fastdllm.Neighbours(0.22),
    "stability": fastdllm.Stability(0.2),
}
SAMPLED = {
    "margin": {"score": "margin", "rule": fastdllm.Threshold(0.08)},
    "entropy": {"score": "entropy", "rule": fastdllm.Threshold(-2.85)},
    "random": {"score": "random", "seed": 3, "rule": fastdllm.Quota(2)},
    "drawn": {"temperature": 0.7, "seed": 5},
    "one refresh of the prompt": {"policy": fastdllm.CachePolicy(prompt_refreshes=0)},
}


def folders(root):
    """A checkpoint of every family below `root`."""
    for name, config in FAMILIES.items():
        tiny.write(root / name, config, oracle_models.random_state(config, 0), shards=2)


def plain(generation):
    """What is compared of a Generation."""
    return [row.tolist() for row in generation.tokens], generation.nfe.tolist()


def decodes(root, mesh):
    """{what: (tokens, NFE)} of every way to decode that is tested, by one model or its parts."""
    found = {}
    for family in FAMILIES:
        model = fastdllm.load(root / family, device="cpu", mesh=mesh)
        for cache in ("none", "prefix", "dual"):
            options = {**SHORT, "cache": cache, "rule": fastdllm.Threshold(0.22)}
            found[family, cache] = plain(fastdllm.generate(model, PROMPTS, **options))
        for name, rule in RULES.items() if family in UNTIED else ():
            found[family, name] = plain(fastdllm.generate(model, PROMPTS, rule=rule, **SHORT))
        for name, options in SAMPLED.items() if family in UNTIED else ():
            options = {"rule": fastdllm.Threshold(0.22), **SHORT, **options}
            found[family, name] = plain(fastdllm.generate(model, PROMPTS, **options))
        holes = [[model.config.mask_id if id == 37 else id for id in row] for row in HOLES]
        found[family, "infill"] = plain(fastdllm.infill(model, holes, block_length=4))
        logits = model.logits(torch.tensor(PROMPTS[:1]))
        found[family, "logits"] = logits
    return found


def of_one_rank(rank, root, mesh):
    """{what: what came of it} where ranks differ."""
    model = fastdllm.load(root / "llada", device="cpu", mesh=mesh)
    found = {"heads": (model.config.num_heads, model.config.num_kv_heads)}

    def slow(event):
        time.sleep(0.02 * (rank == 1))

    def own_opinion(scores, candidates, step):
        """Commits the first candidate, or on other ranks the last."""
        order = torch.arange(scores.shape[1]) * (-1 if rank else 1)
        best = order.expand_as(scores).masked_fill(~candidates, -1000).argmax(1)
        return torch.nn.functional.one_hot(best, scores.shape[1]).bool() & candidates

    options = {**SHORT, "rule": fastdllm.Threshold(0.22), "on_step": slow}
    found["slow"] = plain(fastdllm.generate(model, PROMPTS, **options))
    found["opinions"] = plain(fastdllm.generate(model, PROMPTS, rule=own_opinion, **SHORT))
    torch.manual_seed(rank)
    found["no seed"] = plain(fastdllm.generate(model, PROMPTS, temperature=1.0, **SHORT))
    for name, call in {
        "other prompts": lambda: fastdllm.generate(model, [[rank + 1]], gen_length=4),
        "top_p": lambda: fastdllm.generate(model, PROMPTS, top_p=0.9, **SHORT),
        "top_k": lambda: fastdllm.generate(model, PROMPTS, top_k=3, **SHORT),
        "engine": lambda: fastdllm.Engine(model),
        "save": lambda: fastdllm.checkpoint.save(model, root / "saved"),
    }.items():
        found[name] = error_of(call)
    fp8 = fastdllm.load(root / "llada", device="cpu", mesh=mesh, weights="fp8")
    found["fp8"] = fp8.logits(torch.tensor(PROMPTS[:1]))
    found["fp8 tokens"] = plain(fastdllm.generate(fp8, PROMPTS, **SHORT))
    return found


def error_of(call):
    """(name of its class, text) of what call() raises; None where it raises nothing."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def never_comes(rank, root, mesh):
    """Rank 0 is left waiting by a rank that lives: what it raises, and after how many seconds."""
    parallel.TIMEOUT = timedelta(seconds=2)
    model = fastdllm.load(root / "llada", device="cpu", mesh=mesh)
    if rank:
        time.sleep(4)
        return None
    began = time.monotonic()
    error = error_of(lambda: fastdllm.generate(model, PROMPTS, **SHORT))
    return error, time.monotonic() - began


def dies(rank, root, mesh):
    """Rank 1 is gone in the middle of a call: what rank 0 raises, and after how many seconds."""
    model = fastdllm.load(root / "llada", device="cpu", mesh=mesh)
    began = time.monotonic()

    def listen(event):
        if rank and event.step == 2:
            os._exit(3)

    error = error_of(lambda: fastdllm.generate(model, PROMPTS, on_step=listen, **SHORT))
    return error, time.monotonic() - began


def run(rank, size, root):
    """Everything above, each result in a file of its own."""
    torch.set_num_threads(1)
    root = Path(root)
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/meeting-{size}", rank=rank, world_size=size
    )
    mesh = init_device_mesh("cpu", (size,))

    def keep(name, found):
        torch.save(found, root / f"{name}-{size}-{rank}.pt")

    keep("decodes", decodes(root, mesh))
    keep("one", of_one_rank(rank, root, mesh))
    if size == 2:
        keep("never", never_comes(rank, root, mesh))
        parallel.TIMEOUT = timedelta(seconds=50)
        dist.barrier()
        keep("dies", dies(rank, root, mesh))
        os._exit(0)  # there is nobody left to say goodbye to
    dist.destroy_process_group()
