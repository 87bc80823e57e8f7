"""A model of a real shape with random weights, everything that decodes on the same weights, and a
clock around one run.
"""

from __future__ import annotations

import copy
import gc
import time
from dataclasses import dataclass, replace

import plain
import timing
import torch

from fastdllm import Quota, generate, graph
from fastdllm.decode import decoding
from fastdllm.model import DiffusionTransformer, initialize
from fastdllm.patch import ADAPTER
from fastdllm.quantize import quantize
from race.hosts import replaced_model
from race.shapes import BLOCK, MODELS, Cell, Way


@dataclass(frozen=True)
class Run:
    """What one run did: the canvas [B, L], None where it was left early, and a row's forwards."""

    canvas: torch.Tensor | None
    refreshes: int
    cached_steps: int


@dataclass(frozen=True)
class Sample:
    """One timed run: a row's forwards (a vanilla one counts as a refresh), and the seconds."""

    refreshes: int
    cached_steps: int
    seconds: float


class Subject:
    """The models of one shape: fastdllm's own, the published steps on its weights (`plain`), its
    fp8 twin and the replaced models, these made when they are first asked for.

    sample: about how many seconds a timed run takes. prompts: ids [rows, canvas], for every cell.
    """

    def __init__(self, key: str, scale, device):
        self.name, self.sample = scale.names[key], scale.sample
        self.config = replace(MODELS[key], **scale.changes)
        self.native = random_model(self.config, scale.dtype, device)
        self.plain = plain.Plain(self.native)
        self.models = {("native", None): self.native}
        shape = max(scale.rows), max(scale.canvases)
        ordinary = min(self.config.mask_id, *self.config.stop_ids)
        generator = torch.Generator().manual_seed(0)
        self.prompts = torch.randint(ordinary, shape, generator=generator)

    def model(self, way: Way):
        """What `generate` decodes with, in this way; a peer's is the native model."""
        key = way.host, way.weights
        if key not in self.models:
            if way.weights == "fp8":
                self.models[key] = quantize(copy.deepcopy(self.native))
            else:
                self.models[key] = replaced_model(self.native, way.host)
        return self.models[key]

    def weight_bytes(self, way: Way) -> int:
        return sum(t.numel() * t.element_size() for t in held(self.model(way)))

    def bytes_beside(self, way: Way) -> int:
        """What the other models hold and this way's does not; weights may be shared."""
        mine = storages(self.model(way))
        others: dict[int, int] = {}
        for model in self.models.values():
            others |= storages(model)
        return sum(size for address, size in others.items() if address not in mine)

    def clear_graphs(self) -> None:
        """Free what captured forwards keep, of every model."""
        for model in self.models.values():
            graph.clear(model)
        tidy()

    @torch.no_grad()
    def logits_error(self, way: Way) -> float:
        """How far the logits of the way's model are from the native model's, relative to their
        size.
        """
        tokens = self.prompts[:1, :64].to(self.native.device)
        ours = full_forward(self.native, tokens)
        if way.peer:
            theirs, _ = self.plain.forward(tokens)
        else:
            theirs = full_forward(self.model(way), tokens)
        return float((ours.float() - theirs.float()).norm() / ours.float().norm())

    def decode(
        self, way: Way, rows: int, prompt_length: int, gen_length: int, steps: int, stop_after=None
    ) -> Run:
        """Decode at `steps` forwards a block. stop_after: leave after so many blocks, of more."""
        prompts = self.prompts[:rows, :prompt_length]
        options = {"gen_length": gen_length, "block_length": BLOCK, "cache": way.cache}
        if way.peer:
            prompts = prompts.to(self.native.device)
            options |= {"steps": steps, "stop_after": stop_after}
            return Run(*plain.decode(self.plain, prompts, **options))
        options |= {"rule": Quota(steps), "policy": way.policy}
        options |= {"graph": way.captured, "stop_ids": ()}
        if stop_after is not None:
            return self._decode_blocks(self.model(way), prompts, stop_after, options)
        done = generate(self.model(way), prompts, **options)
        canvas = torch.stack(done.tokens)
        return Run(canvas, int(done.refreshes[0]), int(done.cached_steps[0]))

    def _decode_blocks(self, model, prompts, count: int, options) -> Run:
        """Turn the loop until so many blocks are done."""
        with decoding(model, prompts, **options) as decoder:
            row = decoder.rows[0]  # all rows have one length and one rule: they go in step
            last = prompts.shape[1] + count * BLOCK
            while decoder.turn():
                if row.start >= last:
                    return Run(None, row.refreshes, row.cached_steps)
        raise RuntimeError(f"decoding ended before {count} blocks of the request were done")

    def timed(self, way: Way, cell: Cell, steps: int, blocks: int | None = None) -> Sample:
        """Time the whole request, or `blocks` blocks of it, at `steps` forwards each; without a
        cache, `steps` forwards.

        All blocks cost alike, and the last ones are taken; but a prefix cache's steps get cheaper
        from block to block, and those in the middle stand for all.
        """
        gen_length, stop_after = cell.gen_length, None
        if blocks is not None and way.cache == "prefix" and blocks < cell.blocks:
            before = (cell.blocks - blocks) // 2
            gen_length, stop_after = gen_length - before * BLOCK, blocks
        elif blocks is not None:
            gen_length = blocks * BLOCK
        prompt_length = cell.canvas - gen_length
        synchronize()
        began = time.perf_counter()
        run = self.decode(way, cell.rows, prompt_length, gen_length, steps, stop_after)
        synchronize()
        return Sample(run.refreshes, run.cached_steps, time.perf_counter() - began)


def random_model(config, dtype, device) -> DiffusionTransformer:
    """A DiffusionTransformer with weights drawn on the device; it never proposes a mask."""
    with torch.device("meta"):
        model = DiffusionTransformer(config)
    model = initialize(model.to(dtype).to_empty(device=device), seed=0)
    model.requires_grad_(False).eval()
    # The published code never ends once it proposes a mask.
    model.lm_head.weight[config.mask_id] = 0
    return model


def full_forward(model, tokens):
    """Logits [B, L, V] of what `generate` is given, as its head makes them: not shifted."""
    model = getattr(model, ADAPTER, model)
    return model.head(model.hidden_states(tokens))


def held(model) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def storages(model) -> dict[int, int]:
    """{address: bytes} of the memory that the model's tensors lie in."""
    found = (tensor.untyped_storage() for tensor in held(model))
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def synchronize() -> None:
    if timing.ON_GPU:
        torch.cuda.synchronize()


def tidy() -> None:
    """Give back the GPU memory that the last way left."""
    if timing.ON_GPU:
        gc.collect()
        torch.cuda.empty_cache()
