"""One model over several GPUs beside one GPU of the same machine.

    torchrun --nproc-per-node 2 bench/parallel.py [--only llada] [--out FILE]
    torchrun --nproc-per-node 2 bench/parallel.py --smoke

Every rank draws the same whole model at random and copies its part of it, so that both are timed by
the same processes. Random weights have no confidence: `Quota` commits a fixed number of positions a
step. "One" is measured on all GPUs at the same time, so that ranks * one is the throughput of
independent copies.

checked   In fp32, two layers of the real shape: tokens and forwards of a ragged batch equal those
          of one GPU. In the measured dtype: the error of the logits, relative to their size, and
          the share of equal tokens.
sums      An all-reduce of [rows, width], as the layers do it and by the process group alone.
steps     Replays of the captured step and refresh, and the wall time of a step in the loop: what
          more steps a block add to a request, selection and host included.
headline  1024 positions after a prompt of 1024 at 128 forwards, wall time.

The exit status is 1 where a check fails. Results go to bench/results/parallel-<gpu>-x<ranks>.json,
or FILE. With --smoke tiny models run, on a CPU too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from statistics import median

import tables
import torch
import torch.distributed as dist
from race.shapes import BLOCK, MODELS, TINY

from fastdllm import Quota, generate, graph
from fastdllm.cache import cache_bytes
from fastdllm.checkpoint import fused_rows
from fastdllm.families import FAMILIES
from fastdllm.model import DiffusionTransformer, initialize
from fastdllm.parallel import Ranks, SplitTransformer, launched_mesh

ON_GPU = torch.cuda.is_available()
SPREAD = 1.3  # of a product's outputs
REPLAYS = 20
RUNS = 3
MOST_ERROR = 0.05  # of logits in 16 bits, relative to their size
FEW, MANY = 4, 12  # steps a block, whose difference gives the time of a step
BLOCKS = 4  # of a timed request


@dataclass(frozen=True)
class Scale:
    """What is measured: rows of steps over `canvas` positions, lengths of refreshes of one row,
    rows of sums, (prompt, generated) positions of the headline.
    """

    dtype: torch.dtype
    changes: dict
    rows: tuple[int, ...]
    canvas: int
    refreshes: tuple[int, ...]
    sums: tuple[int, ...]
    headline: tuple[int, int]


REAL = Scale(
    torch.bfloat16, {}, (1, 8, 32), 1024, (512, 2048), (32, 128, 256, 512, 1024, 2048), (1024, 1024)
)
SMOKE = Scale(torch.float32, TINY, (1, 2), 160, (160,), (4,), (32, 64))


def whole_model(config, dtype, device) -> DiffusionTransformer:
    """The same random model on every rank."""
    with torch.device("meta"):
        model = DiffusionTransformer(config)
    # Wide enough at any width that positions differ: else near ties decide.
    std = SPREAD / config.hidden_size**0.5
    model = initialize(model.to(dtype).to_empty(device=device), seed=0, std=std)
    return model.requires_grad_(False).eval()


def part_of(whole: DiffusionTransformer, ranks: Ranks) -> SplitTransformer:
    """This rank's part of a whole model."""
    with torch.device("meta"):
        part = SplitTransformer(whole.config, ranks)
    part.to(whole.dtype).to_empty(device=whole.device).requires_grad_(False)
    for name in FAMILIES[whole.config.family].published_names(whole.config):
        full, own = attrgetter(name)(whole), attrgetter(name)(part)
        pieces = full.split(fused_rows(whole.config, name, full))
        places = own.split(fused_rows(part.config, name, own))
        for piece, place in zip(pieces, places, strict=True):
            place.copy_(piece[ranks.part(piece.shape, place.shape)])
    return part.eval()


def decode(model, rows: int, prompt: int, generated: int, steps: int):
    """The Generation of random prompts at `steps` forwards a block."""
    generator = torch.Generator().manual_seed(0)
    ordinary = min(model.config.mask_id, *model.config.stop_ids)
    prompts = torch.randint(ordinary, (rows, prompt), generator=generator)
    return generate(
        model, prompts, gen_length=generated, block_length=BLOCK, rule=Quota(steps), stop_ids=()
    )


def check_tokens(config, ranks, device) -> str | None:
    """What is wrong with the tokens of two layers in fp32, or None."""
    whole = whole_model(replace(config, num_layers=2), torch.float32, device)
    part = part_of(whole, ranks)
    generator = torch.Generator().manual_seed(1)
    lengths = (7, 40, 23)
    ordinary = min(config.mask_id, *config.stop_ids)
    prompts = [torch.randint(ordinary, (length,), generator=generator) for length in lengths]
    for rule in (Quota(5), Quota(16)):
        options = {"gen_length": 2 * BLOCK, "block_length": BLOCK, "rule": rule, "stop_ids": ()}
        one, many = (generate(model, prompts, **options) for model in (whole, part))
        if one.nfe.tolist() != many.nfe.tolist():
            return f"{rule}: {many.nfe.tolist()} forwards, one GPU {one.nfe.tolist()}"
        if any(not torch.equal(*rows) for rows in zip(one.tokens, many.tokens, strict=True)):
            return f"{rule}: other tokens than one GPU's"
    return None


def compared(whole, part, canvas: int) -> dict:
    """How far the part's logits and tokens are from the whole model's."""
    tokens = torch.arange(canvas, device=whole.device)[None] % 50
    with torch.no_grad():
        one, many = whole.logits(tokens).float(), part.logits(tokens).float()
    error = float((one - many).norm() / one.norm())
    prompt = canvas - 2 * BLOCK
    runs = [decode(model, 1, prompt, 2 * BLOCK, FEW) for model in (whole, part)]
    left, right = (run.tokens[0][prompt:] for run in runs)
    return {"logits_error": error, "equal_tokens": float((left == right).float().mean())}


def seconds_of(call: Callable[[], object]) -> float:
    """The median wall time of a call that ends with the host waiting for the GPU, all ranks
    beginning together.
    """
    call()
    found = []
    for _ in range(RUNS):
        dist.barrier()
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return median(found)


def ms_of_replay(model, kind: str) -> float | None:
    """What a replay of the model's latest captured forward of that kind takes on the GPU; None
    where nothing was captured.
    """
    steps = [step for step in graph.captured(model) if step.kind == kind]
    return ms_of_graph(steps[-1].graph) if steps else None


def ms_of_graph(captured) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    dist.barrier()
    captured.replay()
    begin.record()
    for _ in range(REPLAYS):
        captured.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / REPLAYS


def step_times(model, rows: int, canvas: int) -> dict:
    """ms of a step: of its replay, and in the loop."""
    generated = BLOCKS * BLOCK
    prompt = canvas - generated
    graph.clear(model)
    few, many = (
        seconds_of(lambda steps=steps: decode(model, rows, prompt, generated, steps))
        for steps in (FEW, MANY)
    )
    loop = (many - few) / (BLOCKS * (MANY - FEW)) * 1e3
    return {"replay_ms": ms_of_replay(model, "cached"), "loop_ms": loop}


def refresh_times(model, canvas: int) -> dict:
    """ms of a refresh's replay, one row."""
    graph.clear(model)
    decode(model, 1, canvas - BLOCKS * BLOCK, BLOCKS * BLOCK, FEW)
    return {"replay_ms": ms_of_replay(model, "refresh")}


def sum_times(ranks: Ranks, rows: int, width: int, dtype, device) -> dict:
    """us of an all-reduce in a graph, and whether both ways add up the same numbers."""
    x = torch.randint(-8, 8, (rows, width), device=device).to(dtype) + ranks.rank

    def by_group():
        total = x.clone()
        dist.all_reduce(total, group=ranks.group)
        return total

    ways = {"ours": lambda: ranks.sum(x.clone()), "group": by_group}
    wanted = by_group()
    found: dict = {"right": all(torch.equal(ways["ours"](), wanted) for _ in range(REPLAYS))}
    if device.type == "cuda":
        for name, way in ways.items():
            captured = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(captured, capture_error_mode="thread_local"):
                for _ in range(REPLAYS):
                    way()
            found[f"{name}_us"] = ms_of_graph(captured) / REPLAYS * 1e3
    return found


def beside(one: dict, many: dict) -> dict:
    """One GPU's times, those of all together, and how many times faster that is."""
    found = {}
    for name, value in many.items():
        found |= {f"one_{name}": one[name], f"split_{name}": value}
        if value and one[name]:
            found[f"speedup_{name}"] = one[name] / value
    return found


def measure(key: str, scale: Scale, ranks: Ranks, device) -> list[dict]:
    """The rows of results of one model."""
    config = replace(MODELS[key], **scale.changes)
    fault = check_tokens(config, ranks, device)
    rows: list[dict] = [{"what": "tokens in fp32", "fault": fault}]
    whole = whole_model(config, scale.dtype, device)
    part = part_of(whole, ranks)
    close = compared(whole, part, scale.canvas)
    wrong = close["logits_error"] > MOST_ERROR
    rows.append({"what": "numbers", **close, "fault": "logits are far off" if wrong else None})
    for count in scale.sums:
        found = sum_times(ranks, count, config.hidden_size, scale.dtype, device)
        fault = None if found.pop("right") else "sums differ"
        rows.append({"what": "sum", "rows": count, **found, "fault": fault})
    models = whole, part
    for count in scale.rows:
        times = [step_times(model, count, scale.canvas) for model in models]
        rows.append({"what": "step", "rows": count, "canvas": scale.canvas, **beside(*times)})
    for canvas in scale.refreshes:
        times = [refresh_times(model, canvas) for model in models]
        rows.append({"what": "refresh", "rows": 1, "canvas": canvas, **beside(*times)})
    prompt, generated = scale.headline
    seconds = []
    for model in models:
        graph.clear(model)
        call = lambda model=model: decode(model, 1, prompt, generated, FEW)  # noqa: E731
        seconds.append({"seconds": seconds_of(call)})
    rows.append({"what": "headline", "prompt": prompt, "generated": generated, **beside(*seconds)})
    held = [
        {
            "weight_bytes": sum(t.numel() * t.element_size() for t in model.parameters()),
            "cache_bytes": cache_bytes(model.config, 1, sum(scale.headline), scale.dtype),
        }
        for model in models
    ]
    rows.append({"what": "memory", **beside(*held)})
    return [{"model": key, "ranks": ranks.size, **row} for row in rows]


def main(arguments=None) -> int:
    """Measure, and on rank 0 print and write; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny models")
    parser.add_argument("--only", choices=MODELS, action="append", help="this model alone")
    parser.add_argument("--out", type=Path, help="the results file")
    args = parser.parse_args(arguments)
    mesh = launched_mesh()
    if mesh is None:
        parser.error("start it with torchrun, on two ranks or more")
    ranks = Ranks(mesh)
    device = ranks.device(None)
    rows = []
    for key in args.only or MODELS:
        rows += measure(key, SMOKE if args.smoke else REAL, ranks, device)
        if ON_GPU:
            torch.cuda.empty_cache()
    fine = not any(row.get("fault") for row in rows)
    if ranks.rank == 0:
        command = " ".join(["torchrun --nproc-per-node", str(ranks.size), "bench/parallel.py"])
        facts = tables.environment(device) | {"command": command, "gpus": ranks.size}
        facts["sums"] = "symmetric memory" if ranks.symmetric else "process group"
        name = f"parallel-{tables.slug(facts['gpu'])}-x{ranks.size}.json"
        tables.write_json(
            args.out or tables.RESULTS / name, {"environments": [facts], "rows": rows}
        )
        for row in rows:
            print(", ".join(f"{name} {shown(value)}" for name, value in row.items()))
    dist.destroy_process_group()
    return 0 if fine else 1


def shown(value) -> str:
    return tables.number(value) if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
