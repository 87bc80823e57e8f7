"""How the ways of decoding one cell are checked, planned and timed against each other."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from statistics import median

import timing
import torch

from fastdllm import graph
from race.floors import cache_bytes, floors
from race.shapes import BLOCK, REPLACED_WAYS, Cell, Way
from race.subject import Sample, Subject, tidy

TURNS = 3
WAY_SECONDS = 6.0  # after this a way takes no further turn in its cell
HEADLINE_SECONDS = 15.0  # the same, where whole requests are decoded
HEAVY_SECONDS = 0.5  # a block that takes longer is measured at fewer steps
# Forwards a block of the two runs that times are fitted to.
FIT_STEPS = (4, 16)
# The same, of a heavy cell. Dual's steps are short beside its refresh: fewer of them would be lost
# in the noise.
HEAVY_STEPS = {"prefix": (2, 5), "dual": (2, 16)}
WHOLE_STEPS = (4, 5)  # forwards a block of the headline's whole requests
MOST_WARM_UPS = 48  # as many as the forwards that a model keeps captured
REPLAYS = 20
# How far logits may be from the native model's, relative to their size; in bf16 products that are
# not fused round elsewhere.
PEER_LOGITS_OFF = 0.2
REPLACED_LOGITS_OFF = 0.05
NATIVE = REPLACED_WAYS[0]
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Checked:
    """What came of a check: the canvas [B, L] on the CPU, the peak memory, and what is wrong."""

    canvas: torch.Tensor
    peak_bytes: int | None
    wrong: str | None


def measure_cell(subject: Subject, cell: Cell, ways, limits, headline: bool = False) -> list[dict]:
    """Check, time and describe every way of one cell: its rows of the results, in order.

    limits: the machine's ceilings, None on a CPU. headline: whole requests are decoded too.
    """
    rows, canvases = check_all(subject, cell, ways)
    plans = {}
    for way in canvases:
        try:
            plans[way] = plan(subject, way, cell, headline)
        except torch.OutOfMemoryError:
            rows[way]["absent"] = OUT_OF_MEMORY
    tidy()
    raced = race(subject, cell, plans, HEADLINE_SECONDS if headline else WAY_SECONDS)
    for way in plans:
        if way not in raced:
            rows[way]["absent"] = OUT_OF_MEMORY
            continue
        if timing.ON_GPU and captures_steps(way):
            steps = cached_steps(subject.model(way))
            if steps:
                rows[way]["ms_step_gpu"] = ms_on_gpu(steps[-1])
    for way, samples in raced.items():
        rows[way] |= timings(samples)
        rows[way] |= floors(subject.config, cell, way, limits)
    for row in rows.values():
        row["headline"] = headline
    return list(rows.values())


def check_all(subject, cell, ways):
    """({way: its row so far}, {way: the canvas of its check}); a way that is wrong, or does not fit
    into memory, has no canvas.
    """
    rows, canvases = {}, {}
    for way in ways:
        row = rows[way] = described(subject, cell, way)
        try:
            canvas = check_way(subject, cell, way, row, canvases)
        except torch.OutOfMemoryError:
            row["absent"] = OUT_OF_MEMORY
            continue
        if "wrong" not in row:
            canvases[way] = canvas
    for way, canvas in canvases.items():
        rows[way] |= agreement(way, canvas, canvases)
    return rows, canvases


def described(subject, cell, way) -> dict:
    """What a row says of its cell and its way."""
    row = asdict(cell) | asdict(way)
    row["way"] = row.pop("name")
    model = subject.plain if way.peer else subject.model(way)
    row["class"] = type(model).__name__
    row["weight_bytes"] = subject.weight_bytes(way)
    row["cache_bytes"] = cache_bytes(subject.config, subject.native.dtype, cell, way)
    return row


def check_way(subject, cell, way, row, canvases):
    """Check one way and record in its row what was found; returns the canvas."""
    if way.weights is None:
        row["logits_error"] = subject.logits_error(way)
    checked = check(subject, way, cell)
    row["peak_bytes"] = checked.peak_bytes
    if captures_steps(way):
        row["captured_steps"] = len(cached_steps(subject.model(way)))
    wrong = logits_fault(way, row) or checked.wrong
    if way.captured and not wrong:
        eager = eager_canvas(subject, cell, way, canvases)
        wrong = difference(checked.canvas, eager)
    if wrong:
        row["wrong"] = wrong
    return checked.canvas


def check(subject: Subject, way: Way, cell: Cell) -> Checked:
    """Decode the last two blocks, compiling and capturing what is needed; nothing else is kept."""
    subject.clear_graphs()
    if timing.ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    steps = 2 if way.cache == "none" else 4
    run = subject.decode(way, cell.rows, cell.canvas - 2 * BLOCK, 2 * BLOCK, steps)
    peak = None
    if timing.ON_GPU:
        peak = torch.cuda.max_memory_allocated() - subject.bytes_beside(way)
    canvas = run.canvas.cpu()
    forwards = run.refreshes, run.cached_steps
    scripted = (4, 0) if way.cache == "none" else (2, 6)
    prompts = subject.prompts[: cell.rows, : cell.canvas - 2 * BLOCK]
    wrong = None
    if forwards != scripted:
        wrong = (
            f"{forwards[0]} whole and {forwards[1]} cached forwards, "
            f"{scripted[0]} and {scripted[1]} were scripted"
        )
    elif (canvas == subject.config.mask_id).any():
        wrong = "masks were left"
    elif not torch.equal(canvas[:, : prompts.shape[1]], prompts):
        wrong = "the prompt was changed"
    elif timing.ON_GPU and captures_steps(way) and not cached_steps(subject.model(way)):
        wrong = "no step was captured"
    return Checked(canvas, peak, wrong)


def logits_fault(way, row) -> str | None:
    """What is wrong with the logits of what is not the native model."""
    limit = PEER_LOGITS_OFF if way.peer else REPLACED_LOGITS_OFF
    error = row.get("logits_error", 0.0)
    return None if error < limit else f"the logits are off by {error:.3f}"


def eager_canvas(subject, cell, way, canvases):
    """What a captured way's eager twin decodes: the one that races, or one decoded for this."""
    for other, canvas in canvases.items():
        if replace(other, name=way.name, captured=True) == way:
            return canvas
    return check(subject, replace(way, captured=False), cell).canvas


def difference(ours, twin) -> str | None:
    """What is wrong where captured and eager decoding differ; None where they do not."""
    differing = int((ours[:, -2 * BLOCK :] != twin[:, -2 * BLOCK :]).sum())
    if not differing:
        return None
    tokens = ours.shape[0] * 2 * BLOCK
    return f"{differing} of {tokens} tokens differ from those of eager decoding"


def agreement(way, canvas, canvases) -> dict:
    """The share of the checked tokens that are those of the published code with the same cache, and
    of the native model where replaced ones race.
    """
    found = {}
    if NATIVE in canvases:
        found["tokens_as_native"] = shared(canvas, canvases[NATIVE])
    peers = [other for other in canvases if other.peer and other.cache == way.cache]
    if peers and not way.peer and not way.weights and way.whole_refreshes:
        found["tokens_as_peer"] = shared(canvas, canvases[peers[0]])
    return found


def shared(canvas, other) -> float:
    same = canvas[:, -2 * BLOCK :] == other[:, -2 * BLOCK :]
    return same.float().mean().item()


def captures_steps(way) -> bool:
    return way.captured and way.cache == "dual"


def cached_steps(model) -> list:
    """The captured cached steps that the model keeps."""
    return [step for step in graph.captured(model) if step.kind == "cached"]


def ms_on_gpu(step) -> float:
    """What one replay of a captured step takes on the GPU: a cached step's time without what the
    host adds.
    """
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    step.graph.replay()
    begin.record()
    for _ in range(REPLAYS):
        step.graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / REPLAYS


def plan(subject: Subject, way: Way, cell: Cell, headline: bool) -> list[tuple[int, int | None]]:
    """The runs that a way is timed by, [(forwards a block, blocks), ...], from how long a block (a
    forward, without a cache) takes; blocks is None for the whole request.

    Whatever is compiled or captured once, for a rule or a length, is so before the clock starts.
    """
    if way.cache == "none":
        seconds = subject.timed(way, cell, 2, 1).seconds / 2
        forwards = int(2 * subject.sample / seconds)
        return [(max(2, min(BLOCK // 2, forwards)), 1)]
    block = subject.timed(way, cell, FIT_STEPS[0], 1).seconds
    chosen = HEAVY_STEPS[way.cache] if block > HEAVY_SECONDS else FIT_STEPS
    blocks = max(1, min(cell.blocks, int(subject.sample / block)))
    for steps in chosen:
        warm_up(subject, way, cell, steps, blocks)
    fitted = [(steps, blocks) for steps in chosen]
    if not headline or way.cache != "dual":
        return fitted
    whole = [(steps, None) for steps in WHOLE_STEPS]
    if way.whole_refreshes:
        warm_up(subject, way, cell, WHOLE_STEPS[1], 1)
        return fitted + whole
    # What a policy saves differs from block to block: only whole requests tell.
    warm_up(subject, way, cell, WHOLE_STEPS[1], None)
    return whole


def warm_up(subject, way, cell, steps, blocks) -> None:
    """Run until what is captured once it has come often has been, or a run drives out what the last
    one captured.
    """
    model = subject.model(way)
    for _ in range(MOST_WARM_UPS):
        before = graph.pending(model)
        subject.timed(way, cell, steps, blocks)
        if graph.pending(model) == before:
            break


def race(subject, cell, plans, limit) -> dict[Way, dict[tuple, list[Sample]]]:
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
                    sample = subject.timed(way, cell, *what)
                    samples[way][what].append(sample)
                    spent[way] += sample.seconds
            except torch.OutOfMemoryError:
                del samples[way]
            if way not in samples:
                tidy()
    return samples


def timings(samples) -> dict:
    """What a row records of a way's runs: each plan's median, and what is fitted to them."""
    measured = []
    for (steps, blocks), taken in samples.items():
        measured.append(
            {
                "steps": steps,
                "blocks": blocks,
                "refreshes": taken[0].refreshes,
                "cached_steps": taken[0].cached_steps,
                "seconds": median(sample.seconds for sample in taken),
                "samples": len(taken),
            }
        )
    refresh, step, error = fit(measured)
    return {"measured": measured, "ms_refresh": refresh, "ms_step": step, "fit_error": error}


def fit(measured) -> tuple[float, float | None, float]:
    """Least squares over measured runs, errors relative: (ms of a refresh, ms of a cached step or
    None, largest error).
    """
    counts = [[run["refreshes"], run["cached_steps"]] for run in measured]
    counts = torch.tensor(counts, dtype=torch.float64)
    seconds = torch.tensor([run["seconds"] for run in measured], dtype=torch.float64)
    if not counts[:, 1].any():
        counts = counts[:, :1]
    scaled = counts / seconds[:, None]
    ones = torch.ones_like(seconds)[:, None]
    solution = torch.linalg.lstsq(scaled, ones).solution[:, 0]
    error = float((scaled @ solution - 1).abs().max())
    refresh, *step = (1e3 * solution).tolist()
    return refresh, step[0] if step else None, error


def kernels_a_step(subject: Subject, way: Way, cell: Cell) -> int:
    """How many kernels a cached step launches: those that a run with one step more has more."""
    counts = []
    for steps in (2, 3):
        subject.timed(way, cell, steps, 1)  # whatever is made once is made here
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            subject.timed(way, cell, steps, 1)
        on_gpu = torch.autograd.DeviceType.CUDA
        events = [event for event in profile.events() if event.device_type == on_gpu]
        counts.append(sum(not event.name.startswith("Mem") for event in events))
    return counts[1] - counts[0]
