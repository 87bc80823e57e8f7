"""Everything that a stream of requests would compile or capture, made before it comes.

The set is known. A forward is a cached step, of which there is one form for each power of two of
rows; a refresh of one row, of which there is one form for each multiple of forward.LENGTHS up to
forward.LAUNCH_BOUND tokens; or a forward above that, which is not captured. The selection depends
on the number of rows and on the options of the requests.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fastdllm_kernels import Threshold
from fastdllm_kernels.compiling import side_by_side, watch
from fastdllm_kernels.rules import branch_of

from . import arguments
from .cache import CachePolicy
from .commit import Committer
from .decode import capture_obstacle, checked_model, forward_of, generate, schedule_of
from .forward import Forward, Model
from .graph import workspace
from .sampling import sampling_of, sampling_of_rows
from .schedule import Schedule

log = logging.getLogger(__name__)
MOST_ROWS = 2**31 - 1
Progress = Callable[[str, int, int], None]
"""Called with what is being made, how many of it are done, and how many there are."""


@dataclass(frozen=True)
class WarmUp:
    """What a warm-up made: kernels compiled (those in triton's cache on disk do not count),
    forwards captured in CUDA graphs, and the seconds it took in all.
    """

    compiled: int
    captured: int
    seconds: float


def warm_up(
    model: Model | torch.nn.Module,
    *,
    rows: int = 1,
    positions: int = 2048,
    block_length: int = 32,
    cache: str = "dual",
    policy: CachePolicy = CachePolicy(),  # noqa: B008
    progress: Progress | None = None,
    **options: Any,
) -> WarmUp:
    """Compile and capture what `generate` needs for up to `rows` prompts at once of up to
    `positions` tokens each, generation included.

    options: rule, score, temperature, top_p, top_k of the calls to come; other options than those
    warmed up compile when they first come. progress: called as it goes on; None shows a bar where
    standard error is a terminal. The model then keeps its cache allocated, as `generate` leaves it.
    Raises what `generate` raises.
    """
    began, compiled = time.perf_counter(), watch().kernels
    model = checked_model(model)
    schedule = schedule_of(model.config, cache, policy, block_length)
    arguments.integer("rows", rows, 1, MOST_ROWS)
    arguments.integer("positions", positions, 2, model.config.max_positions)
    if positions <= block_length:
        raise ValueError(
            f"positions: expected more than the block_length {block_length}, got {positions}"
        )
    with shown(progress) as tell:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            workspace(model, capture_obstacle(model, True)) as space,
        ):
            forward = forward_of(model, rows, positions, schedule, space)
            captured = warm_forward(forward, schedule, tell, **options)
        for prompts in example_prompts(rows, positions, block_length):
            tell("decoding", 0, 1)
            generate(
                model,
                prompts,
                gen_length=block_length,
                block_length=block_length,
                cache=cache,
                policy=policy,
                **options,
            )
        tell("decoding", 1, 1)
    return WarmUp(watch().kernels - compiled, captured, time.perf_counter() - began)


def warm_forward(forward: Forward, schedule: Schedule, tell: Progress, **options: Any) -> int:
    """Capture every form of forward that rows of `forward` may come to, and compile the selection
    of requests with these options; how many were captured.
    """
    captured = 0
    committer = Committer(forward, schedule.mask_id)
    if forward.space.captures:
        capacity = forward.canvas.shape[1] - forward.block_length
        forms = forward.captured_forms(schedule.examples(capacity))
        captured = len(forms)
        # The largest first: the others then find their memory in the pool.
        forms.sort(key=lambda form: -form[0].width * form[1])
        tell("compiling", 0, 1)
        with side_by_side() as compiles_only:
            if compiles_only:
                _compile(forward, forms)
                with forward.space.uncaptured():
                    _warm_selection(committer, lambda *_: None, **options)
        tell("compiling", 1, 1)
        for number, (shape, rows) in enumerate(forms):
            tell("capturing forwards", number, captured)
            forward.capture(shape, rows)
        tell("capturing forwards", captured, captured)
    _warm_selection(committer, tell, **options)
    return captured


def _compile(forward, forms):
    """Run forms of forward that stand for all: kernels differ by the number of rows of a step, and
    by the length of a refresh where that doubles.
    """
    for shape, rows in forms:
        if not shape.stores or not shape.width & (shape.width - 1):
            with forward.space.uncaptured():
                forward.capture(shape, rows)


def _warm_selection(
    committer: Committer,
    tell: Progress,
    rule=Threshold(0.9),  # noqa: B008
    score=None,
    temperature=0.0,
    top_p=None,
    top_k=None,
    **others,
) -> None:
    """Compile the selection for each number of rows, and capture it for those of captured steps."""
    forward = committer.forward
    sampling = sampling_of(forward.config, rule, score, temperature, top_p, top_k)
    (of_row,) = sampling_of_rows(sampling, 1, 0)
    slots = len(forward.canvas)
    captured = forward.row_counts() if forward.space.captures else []
    for rows in range(1, slots + 1):
        tell("selecting", rows, slots)
        for samplings, width in (
            ([of_row] * rows, forward.block_length),
            ([of_row.first_alone()] * rows, 1),
        ):
            committer.rehearse(samplings, width)
            if rows in captured and branch_of(rule):
                committer.capture(samplings, width)


def example_prompts(rows: int, positions: int, block_length: int) -> Iterator[list[list[int]]]:
    """Prompts whose decoding makes every kind of forward that is not captured: one short, two of
    one length, two of different ones.
    """
    longest = max(1, positions - block_length)
    yield [[0]]
    if rows > 1:
        yield [[0] * longest] * 2
        yield [[0] * longest, [0] * max(1, longest // 2)]


@contextmanager
def shown(progress: Progress | None) -> Iterator[Progress]:
    """What to tell of the progress: the caller's function, a bar on a terminal, or nobody."""
    arguments.function("progress", progress)
    if progress is not None:
        yield progress
        return
    if not (sys.stderr and sys.stderr.isatty()):
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        tasks: dict = {}

        def show(what, done, total):
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total)

        yield show
