"""The request shapes, the ways of decoding them, and how they are checked and timed against each
other.
"""

from __future__ import annotations

import copy
import gc
import random
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median

import plain
import timing
import torch

from fastdllm import CachePolicy, Quota, generate, graph
from fastdllm.config import ModelConfig
from fastdllm.decode import Decoder
from fastdllm.model import DiffusionTransformer, initialize
from fastdllm.quantize import quantize

BLOCK = 32
TURNS = 3
WAY_SECONDS = 6.0  # after this a way takes no further turn in its cell
HEADLINE_SECONDS = 15.0  # the same, where whole requests are decoded
HEAVY_SECONDS = 0.5  # a block that takes longer is measured at fewer steps
FIT_STEPS, WHOLE_STEPS = (4, 16), (4, 5)  # forwards a block
HEAVY_STEPS = {
    "prefix": (2, 5),
    "dual": (2, 16),
}  # dual's steps are short beside its refresh: fewer would be lost in the noise

LLADA_8B = ModelConfig(
    family="llada",
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate_size=12288,
    vocab_size=126464,
    max_positions=4096,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    mask_id=126336,
    stop_ids=(126081,),
    qkv_bias=False,
    tie_embeddings=False,
    logit_shift=0,
    rope_in_fp32=True,
)
DREAM_7B = ModelConfig(
    family="Dream",
    hidden_size=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    intermediate_size=18944,
    vocab_size=152064,
    max_positions=4096,
    rope_theta=1000000.0,
    rms_norm_eps=1e-6,
    mask_id=151666,
    stop_ids=(151643,),
    qkv_bias=True,
    tie_embeddings=False,
    logit_shift=1,
    rope_in_fp32=False,
)
TINY = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 96,
    "max_positions": 256,
    "mask_id": 90,
    "stop_ids": (91,),
}
MODELS = {"llada": LLADA_8B, "dream": DREAM_7B}


@dataclass(frozen=True)
class Scale:
    """What is measured on this machine.

    names: of the models. canvases: length -> generated positions. headline: its canvas. changes: of
    the real configurations. sample: about how many seconds a timed run takes, by the number of
    blocks in it.
    """

    names: dict[str, str]
    canvases: dict[int, int]
    rows: tuple[int, ...]
    headline: int
    dtype: torch.dtype
    changes: dict
    sample: float


REAL = Scale(
    {"llada": "LLaDA-8B", "dream": "Dream-7B"},
    {512: 256, 1024: 512, 1280: 1024, 2048: 1024},
    (1, 4, 8, 16, 32),
    2048,
    torch.bfloat16,
    {},
    0.3,
)
SMOKE = Scale(
    {"llada": "tiny LLaDA", "dream": "tiny Dream"},
    {160: 128},
    (1, 2),
    160,
    torch.float32,
    TINY,
    0.02,
)


@dataclass(frozen=True)
class Way:
    """One way of decoding. peer: bench/plain.py instead of `generate`; captured, policy:
    generate's; weights: None or "fp8".
    """

    name: str
    cache: str
    peer: bool = False
    captured: bool = False
    weights: str | None = None
    policy: CachePolicy = CachePolicy()


WAYS = (
    Way("vanilla", "none", peer=True),
    Way("vanilla, our selection", "none"),
    Way("plain prefix", "prefix", peer=True),
    Way("plain dual", "dual", peer=True),
    Way("prefix eager", "prefix"),
    Way("prefix captured", "prefix", captured=True),
    Way("dual eager", "dual"),
    Way("dual captured", "dual", captured=True),
    Way("dual captured, fp8", "dual", captured=True, weights="fp8"),
)
# What trades accuracy for time, measured beside the headline; the options' accuracy is in
# tiny-*-policies.md.
KEPT, NEAR = CachePolicy(prompt_refreshes=0), CachePolicy(prompt_refreshes=0, suffix_blocks=4)
OPTIONS = (
    Way("dual captured, prompt kept", "dual", captured=True, policy=KEPT),
    Way("dual captured, prompt kept, 4 blocks ahead", "dual", captured=True, policy=NEAR),
    Way("dual captured, fp8, prompt kept", "dual", captured=True, weights="fp8", policy=KEPT),
    Way(
        "dual captured, fp8, prompt kept, 4 blocks ahead",
        "dual",
        captured=True,
        weights="fp8",
        policy=NEAR,
    ),
)


@dataclass(frozen=True)
class Cell:
    """A request shape: `rows` prompts of canvas - gen_length tokens, gen_length masks after each."""

    model: str
    canvas: int
    gen_length: int
    rows: int

    @property
    def blocks(self):
        return self.gen_length // BLOCK


@dataclass(frozen=True)
class Sample:
    """One timed run: what it did (a vanilla forward counts as a refresh), and the seconds it took."""

    refreshes: int
    cached_steps: int
    seconds: float


class Enough(Exception):
    """Raised inside a run that has done as much as it was asked for."""


class Subject:
    """A model of a real shape with random weights on the GPU, and the peer on the same weights."""

    def __init__(self, key, scale, device):
        self.name, self.sample, config = (
            scale.names[key],
            scale.sample,
            replace(MODELS[key], **scale.changes),
        )
        with torch.device("meta"):
            model = DiffusionTransformer(config)
        model = (
            initialize(model.to(scale.dtype).to_empty(device=device), seed=0)
            .requires_grad_(False)
            .eval()
        )
        model.lm_head.weight[config.mask_id] = (
            0  # the published code never ends once it proposes a mask
        )
        self.model, self.config, self.plain, self.models = (
            model,
            config,
            plain.Plain(model),
            {None: model},
        )
        generator = torch.Generator().manual_seed(0)
        shape = max(scale.rows), max(scale.canvases)
        self.prompts = torch.randint(
            min(config.mask_id, *config.stop_ids), shape, generator=generator
        )

    def of(self, way):
        """The way's model; the fp8 one is made when it is first asked for."""
        if way.weights not in self.models:
            self.models[way.weights] = quantize(copy.deepcopy(self.model))
        return self.models[way.weights]

    def weight_bytes(self, way):
        return held_bytes(self.of(way))

    @torch.no_grad()
    def logits_error(self):
        """How far the peer's logits are from the model's, relative to their size."""
        tokens = self.prompts[:1, :64].to(self.model.device)
        ours, theirs = (
            self.model.head(self.model.hidden_states(tokens)),
            self.plain.forward(tokens)[0],
        )
        return float((ours.float() - theirs.float()).norm() / ours.float().norm())

    def decode(self, way, rows, prompt_length, gen_length, steps, stop_after=None):
        """(canvas, or None where it was left early; refreshes; cached steps) of one run at `steps`
        forwards a block.

        stop_after: leave after so many blocks; with the prefix cache only.
        """
        prompts = self.prompts[:rows, :prompt_length]
        options = {"gen_length": gen_length, "block_length": BLOCK, "cache": way.cache}
        if way.peer:
            return plain.decode(
                self.plain,
                prompts.to(self.model.device),
                steps=steps,
                stop_after=stop_after,
                **options,
            )
        options |= {"stop_ids": (), "graph": way.captured, "policy": way.policy}
        with self._leaving_after(stop_after):
            done = generate(self.of(way), prompts, rule=Quota(steps), **options)
            return torch.stack(done.tokens), int(done.refreshes[0]), int(done.cached_steps[0])
        return None, stop_after, stop_after * (steps - 1)

    @contextmanager
    def _leaving_after(self, count):
        """Leave `generate` at the start of refresh number count + 1, everything before it done;
        None: never.
        """
        if count is None:
            yield
            return
        forward, kept, calls = Decoder._forward, graph._workspaces.get(self.model), 0

        def counted(decoder, rows, whole):
            nonlocal calls
            calls += whole
            if calls > count:
                raise Enough
            return forward(decoder, rows, whole)

        Decoder._forward = counted
        try:
            yield
        except Enough:
            if (
                kept is not None
            ):  # a call that fails gives up the captured steps: this one did not fail
                graph._workspaces[self.model] = kept
        finally:
            Decoder._forward = forward

    def timed(self, way, cell, steps, blocks=None) -> Sample:
        """The whole request, or `blocks` blocks of it at `steps` forwards each; without a cache,
        `steps` forwards.
        """
        gen_length, stop_after = cell.gen_length, None
        if way.cache == "prefix" and blocks is not None and blocks < cell.blocks:
            gen_length, stop_after = gen_length - (cell.blocks - blocks) // 2 * BLOCK, blocks
        elif blocks is not None:
            gen_length = blocks * BLOCK
        synchronize()
        began = time.perf_counter()
        _, refreshes, cached = self.decode(
            way, cell.rows, cell.canvas - gen_length, gen_length, steps, stop_after
        )
        synchronize()
        return Sample(refreshes, cached, time.perf_counter() - began)


def synchronize():
    if timing.ON_GPU:
        torch.cuda.synchronize()


def held_bytes(model):
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def tidy():
    """Give back the GPU memory that the last way left."""
    if timing.ON_GPU:
        gc.collect()
        torch.cuda.empty_cache()


def check(subject, way, cell):
    """Decode the last two blocks, compiling and capturing what is needed: (canvas, peak bytes, what
    is wrong or None).
    """
    model = subject.of(way)
    for kept in subject.models.values():
        graph.clear(kept)
    tidy()
    if timing.ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    steps = 2 if way.cache == "none" else 4
    canvas, *forwards = subject.decode(way, cell.rows, cell.canvas - 2 * BLOCK, 2 * BLOCK, steps)
    others = sum(held_bytes(other) for other in subject.models.values() if other is not model)
    peak = torch.cuda.max_memory_allocated() - others if timing.ON_GPU else None
    canvas, scripted = canvas.cpu(), [4, 0] if way.cache == "none" else [2, 6]
    wrong = None
    if forwards != scripted:
        wrong = f"{forwards[0]} whole and {forwards[1]} cached forwards, {scripted[0]} and {scripted[1]} were scripted"
    elif (canvas == subject.config.mask_id).any():
        wrong = "masks were left"
    elif not torch.equal(
        canvas[:, : -2 * BLOCK], subject.prompts[: cell.rows, : cell.canvas - 2 * BLOCK]
    ):
        wrong = "the prompt was changed"
    elif way.captured and way.cache == "dual" and timing.ON_GPU and not captured_steps(model):
        wrong = "no step was captured"
    return canvas, peak, wrong


def captured_steps(model):
    """The captured cached steps that the model keeps."""
    space = graph._workspaces.get(model)
    return (
        [step for (_, shape, _), step in space.steps.items() if not shape.refresh] if space else []
    )


def ms_on_gpu(step, replays=20):
    """What one replay of a captured step takes on the GPU: a cached step's time without what the
    host adds.
    """
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    step.graph.replay()
    begin.record()
    for _ in range(replays):
        step.graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / replays


def prepare(subject, cell, ways):
    """{way name: row}, and {way: its plan} of the ways that are fit to be timed; a plan is [(steps,
    blocks or None), ...].
    """
    rows, plans, canvases = {}, {}, {}
    for way in ways:
        row = rows[way.name] = asdict(cell) | {
            key: value for key, value in asdict(way).items() if key != "name"
        }
        row |= {
            "way": way.name,
            "weight_bytes": subject.weight_bytes(way),
            "cache_bytes": cache_bytes(subject, way, cell),
        }
        try:
            canvases[way], row["peak_bytes"], wrong = check(subject, way, cell)
        except torch.OutOfMemoryError:
            row["absent"] = "out of memory"
            continue
        if way.captured and not wrong:
            wrong = difference(canvases[way], check(subject, replace(way, captured=False), cell)[0])
        if wrong:
            row["wrong"] = wrong
            del canvases[way]
    for way in canvases:  # only now, for every check frees what the captured ways keep
        peer = next((other for other in canvases if other.peer and other.cache == way.cache), None)
        if peer and not way.peer and not way.weights and way.policy == CachePolicy():
            rows[way.name]["tokens_as_peer"] = (
                (canvases[way] == canvases[peer])[:, -2 * BLOCK :].float().mean().item()
            )
        try:
            plans[way] = plan(subject, way, cell)
        except torch.OutOfMemoryError:
            rows[way.name]["absent"] = "out of memory"
    return rows, plans


def difference(ours, twin):
    """What is wrong where captured and eager decoding differ; None where they do not."""
    differing = int((ours[:, -2 * BLOCK :] != twin[:, -2 * BLOCK :]).sum())
    return (
        f"{differing} of {ours.shape[0] * 2 * BLOCK} tokens differ from those of eager decoding"
        if differing
        else None
    )


def plan(subject, way, cell):
    """How a way is timed, from how long a block (a forward, without a cache) takes: about `sample`
    a run.
    """
    if way.cache == "none":
        seconds = subject.timed(way, cell, 2, 1).seconds / 2
        return [(max(2, min(BLOCK // 2, int(2 * subject.sample / seconds))), 1)]
    block = subject.timed(way, cell, FIT_STEPS[0], 1).seconds
    chosen = HEAVY_STEPS[way.cache] if block > HEAVY_SECONDS else FIT_STEPS
    blocks = max(1, min(cell.blocks, int(subject.sample / block)))
    for (
        steps
    ) in chosen:  # whatever is made once, for a rule or a length, is made before the clock starts
        warm_up(subject, way, cell, steps, blocks)
    return [(steps, blocks) for steps in chosen]


def warm_up(subject, way, cell, steps, blocks):
    """Run until what is captured once it has come often has been, or a run drives out what the last
    one captured.
    """
    model = subject.of(way)
    for _ in range(graph.MOST):
        before = waiting_to_be_captured(model)
        subject.timed(way, cell, steps, blocks)
        if waiting_to_be_captured(model) == before:
            break


def waiting_to_be_captured(model):
    """{what has come, but not often enough to be captured: how many times}."""
    space = graph._workspaces.get(model)
    return (
        {key: uses for key, uses in space.uses.items() if key not in space.steps} if space else {}
    )


def race(subject, cell, plans, limit):
    """{way: {(steps, blocks): [Sample, ...]}}: the ways take turns, a slow one fewer of them; no
    entry: out of memory.
    """
    samples = {way: {what: [] for what in plans[way]} for way in plans}
    spent = dict.fromkeys(plans, 0.0)
    for turn in range(TURNS):
        # In another order each turn: a way finds the card as the one before it left it.
        for way in random.Random(turn).sample(list(samples), len(samples)):
            if turn and spent[way] * (turn + 1) / turn > limit:
                continue
            try:
                for what in plans[way]:
                    samples[way][what].append(subject.timed(way, cell, *what))
                    spent[way] += samples[way][what][-1].seconds
            except torch.OutOfMemoryError:
                del samples[way]
            if way not in samples:
                tidy()
    return samples


def fit(measured):
    """Least squares over measured runs, errors relative: (ms of a refresh, ms of a cached step or
    None, largest error).
    """
    counts = torch.tensor(
        [[m["refreshes"], m["cached_steps"]] for m in measured], dtype=torch.float64
    )
    seconds = torch.tensor([m["seconds"] for m in measured], dtype=torch.float64)
    counts = counts if counts[:, 1].any() else counts[:, :1]
    scaled = counts / seconds[:, None]
    solution = torch.linalg.lstsq(scaled, torch.ones_like(seconds)[:, None]).solution[:, 0]
    error = float((scaled @ solution - 1).abs().max())
    refresh, *step = (1e3 * solution).tolist()
    return refresh, step[0] if step else None, error


def timings(by_plan):
    """What a row records of a way's runs: each plan's median, and what is fitted to them."""
    measured = [
        {
            "steps": steps,
            "blocks": blocks,
            "refreshes": taken[0].refreshes,
            "cached_steps": taken[0].cached_steps,
            "seconds": median(sample.seconds for sample in taken),
            "samples": len(taken),
        }
        for (steps, blocks), taken in by_plan.items()
    ]
    refresh, step, error = fit(measured)
    return {"measured": measured, "ms_refresh": refresh, "ms_step": step, "fit_error": error}


def measure_cell(subject, cell, limits, headline, wanted=("",)):
    """The rows of one cell, one for each way whose name holds one of the texts wanted."""
    ways = [
        way
        for way in (WAYS + OPTIONS if headline else WAYS)
        if any(text in way.name for text in wanted)
    ]
    rows, plans = prepare(subject, cell, ways)
    if headline:
        for way in plans:
            if way.cache == "dual":
                # What a policy saves differs from block to block: only whole requests tell.
                warm_up(
                    subject, way, cell, WHOLE_STEPS[1], 1 if way.policy == CachePolicy() else None
                )
                plans[way] = plans[way] * (way.policy == CachePolicy()) + [
                    (steps, None) for steps in WHOLE_STEPS
                ]
    tidy()
    raced = race(subject, cell, plans, HEADLINE_SECONDS if headline else WAY_SECONDS)
    for way in raced if timing.ON_GPU else ():
        if way.captured and way.cache == "dual" and (steps := captured_steps(subject.of(way))):
            rows[way.name]["ms_step_gpu"] = ms_on_gpu(steps[-1])
    for way in plans.keys() - raced.keys():
        rows[way.name]["absent"] = "out of memory"
    for way, by_plan in raced.items():
        row = rows[way.name]
        row |= timings(by_plan)
        row |= floors(subject.config, cell, way, limits)
    for row in rows.values():
        row["headline"] = headline
    return list(rows.values())


def cache_bytes(subject, way, cell):
    """Keys and values of the whole canvas; nothing without a cache."""
    config = subject.config
    position = (
        config.num_layers * 2 * config.num_kv_heads * config.head_dim * subject.model.dtype.itemsize
    )
    return 0 if way.cache == "none" else cell.rows * cell.canvas * position


def floors(config, cell, way, limits):
    """{"floor_ms_refresh", "floor_ms_step"}: the least time of the bytes to be moved and the
    operations to be done; nothing where a policy makes both differ from block to block.
    """
    if limits is None or way.policy != CachePolicy():
        return {}
    wide = (cell.gen_length + BLOCK) / 2  # of a prefix step, over the blocks
    options = {"limits": limits, "weight_size": 1 if way.weights == "fp8" else 2}
    refresh = floor_seconds(config, cell, cell.canvas, stores=way.cache != "none", **options)
    step = floor_seconds(
        config, cell, wide if way.cache == "prefix" else BLOCK, stores=False, **options
    )
    return {
        "floor_ms_refresh": 1e3 * refresh,
        "floor_ms_step": None if way.cache == "none" else 1e3 * step,
    }


def floor_seconds(config, cell, width, *, stores, limits, weight_size):
    """Of one forward over `width` positions of every row: of the last layer only keys and values
    are needed outside the block, and the head only in it; the keys and values of the other
    positions are read, and its own stored or not. Products of weights of one byte run at twice the
    speed of bf16's.
    """
    heads, dim, hidden = config.num_heads, config.head_dim, config.hidden_size
    kv = 2 * config.num_kv_heads * dim * hidden
    layer = kv + 2 * heads * dim * hidden + 3 * hidden * config.intermediate_size
    head = config.vocab_size * hidden
    earlier = config.num_layers - 1
    products = 2 * (width * (earlier * layer + kv) + BLOCK * (layer - kv + head)) * weight_size / 2
    attention = 4 * heads * dim * cell.canvas * (earlier * width + BLOCK)
    position = 2 * config.num_layers * 2 * config.num_kv_heads * dim
    moved = position * (cell.canvas - width + (width if stores else 0))
    weights = weight_size * (config.num_layers * layer + head)
    read = (weights + cell.rows * moved) / limits["bytes_per_second"]
    return max(read, cell.rows * (products + attention) / limits["operations_per_second"])
