"""An honest clock for short GPU work: graph replays over rotated buffers, every competitor in the
same run.

Three things make microbenchmarks of microseconds lie, and what is done about each:

launching   Python and the driver take longer than the kernels. Every competitor is captured in a CUDA graph of at least 8
            launches, and a replay is timed by events, queued while the GPU is kept busy, so that it never waits for the host.
caches      A kernel that reads what it read a moment ago is served by L2; in a model it is not. Launches rotate over
            independent buffers that together exceed twice the L2 cache (and there are at least 8).
drift       Clocks and neighbours change from minute to minute. Competitors take turns, replay by replay, and the figure is
            the median.

What one launch leaves unsaid stays in: the gap of about a microsecond that the GPU needs between
two kernels.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch

REPLAYS, WARMUP, LEAST_LAUNCHES, MOST_BUFFERS = 20, 3, 8, 256
GRAPH_SECONDS = 150e-6  # a graph shorter than this would show the start of the graph itself
SECONDS = (
    0.3  # for all replays of one competitor: a slow one gets fewer, but never under LEAST_REPLAYS
)
LEAST_REPLAYS = 5
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


@dataclass
class Competitor:
    """`call(buffer)` does the work once and returns what is checked.

    capturable: False where the host must look at results, so that no graph can hold it: it is timed
    call by call, and the host's time counts. theirs: somebody else's code, which may be absent or
    refuse a shape; ours may not.
    """

    call: Callable
    capturable: bool = True
    theirs: bool = True


@dataclass
class Contest:
    """One operation at one shape. bytes and operations: the least that must be moved and done, for
    the floor.

    buffer(i): the i-th independent set of inputs, all alike. footprint: bytes of one set.
    check(result, buffer) raises AssertionError. reach: the target in microseconds, or None.
    """

    op: str
    shape: str
    competitors: dict[str, Competitor]
    buffer: Callable
    check: Callable
    bytes: int
    operations: int = 0
    reach: float | None = None
    footprint: int | None = None


@dataclass
class Outcome:
    """What came of one competitor: seconds of a call, one for each replay; or why there are none."""

    seconds: list[float] = field(default_factory=list)
    absent: str | None = None
    wrong: str | None = None
    how: str = "graph"
    launches: int = 0
    buffers: int = 0

    @property
    def microseconds(self):
        return median(self.seconds) * 1e6 if self.seconds else math.nan


def run(contest: Contest, timed: bool) -> dict[str, Outcome]:
    """Check every competitor, and where `timed` measure those that are right, in turns."""
    first = contest.buffer(0)
    outcomes = {
        name: checked(contest, competitor, first)
        for name, competitor in contest.competitors.items()
    }
    fit = [name for name, outcome in outcomes.items() if not (outcome.absent or outcome.wrong)]
    if timed and fit:
        footprint = contest.footprint or contest.bytes
        buffers = [first, *(contest.buffer(i) for i in range(1, buffers_needed(footprint)))]
        for name, outcome in measure(
            {name: contest.competitors[name] for name in fit}, buffers
        ).items():
            outcomes[name] = outcome
        del buffers
    del first
    if ON_GPU:
        torch.cuda.empty_cache()
    return outcomes


def checked(contest: Contest, competitor: Competitor, buffer) -> Outcome:
    """An outcome without times: right, wrong, or absent."""
    try:
        result = competitor.call(buffer)
    except Exception as error:
        if not competitor.theirs:
            raise
        lines = str(error).strip().splitlines() or [""]
        return Outcome(absent=f"{type(error).__name__}: {lines[0][:160]}")
    try:
        contest.check(result, buffer)
    except AssertionError as error:
        return Outcome(wrong=str(error).strip() or "the check failed")
    return Outcome()


def buffers_needed(footprint: int) -> int:
    """How many sets of inputs exceed twice the L2 cache; at least LEAST_LAUNCHES (on a CPU 2:
    nothing is kept cold).
    """
    if not ON_GPU:
        return 2
    cold = 2 * torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return min(MOST_BUFFERS, max(LEAST_LAUNCHES, math.ceil(cold / footprint)))


def measure(competitors: dict[str, Competitor], buffers: list) -> dict[str, Outcome]:
    """Seconds of a call for each competitor, `REPLAYS` samples (fewer where one is slow), taken in
    turns.
    """
    if not ON_GPU:
        return {name: _on_the_host(competitor, buffers) for name, competitor in competitors.items()}
    outcomes, graphs = {}, {}
    for name, competitor in competitors.items():
        try:
            if competitor.capturable:
                graphs[name], launches, rounds = _captured(competitor.call, buffers)
                outcomes[name] = Outcome(launches=launches, buffers=len(buffers))
                graphs[name] = graphs[name], rounds, []
            else:
                outcomes[name] = _one_by_one(competitor.call, buffers)
        except Exception as error:
            if not competitor.theirs:
                raise
            outcomes[name] = Outcome(
                absent=f"not capturable: {type(error).__name__}: {str(error).splitlines()[0][:160]}"
            )
    for turn in range(REPLAYS):
        torch.cuda.synchronize()
        torch.cuda._sleep(4_000_000)  # about 2 ms of idling, in which the replays below are queued
        for graph, rounds, events in graphs.values():
            if turn < rounds:
                events.append(_timed(graph))
    torch.cuda.synchronize()
    for name, (_, _, events) in graphs.items():
        outcomes[name].seconds = [
            a.elapsed_time(b) / 1e3 / outcomes[name].launches for a, b in events
        ]
    return outcomes


def _captured(call, buffers):
    """(graph, its launches, how many replays the budget allows) of `call` over the buffers in
    rotation.
    """
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for buffer in buffers[:2]:
            call(buffer)
    torch.cuda.synchronize()
    graph = _graph(call, buffers)
    estimate = _estimate(graph)
    launches = len(buffers)
    if estimate < GRAPH_SECONDS:
        repeats = math.ceil(GRAPH_SECONDS / estimate)
        graph, launches = _graph(call, buffers * repeats), repeats * launches
        estimate *= repeats
    for _ in range(WARMUP - 1):
        graph.replay()
    return graph, launches, min(REPLAYS, max(LEAST_REPLAYS, int(SECONDS / estimate)))


def _graph(call, buffers):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Held until the end: results written over each other would stay in L2.
        results = [call(buffer) for buffer in buffers]
    del results
    return graph


def _timed(graph):
    events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    events[0].record()
    graph.replay()
    events[1].record()
    return events


def _estimate(graph):
    """Seconds of one replay; the first one uploads the graph and is not looked at."""
    graph.replay()
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000)
    start, end = _timed(graph)
    end.synchronize()
    return max(start.elapsed_time(end) / 1e3, 1e-6)


def _one_by_one(call, buffers):
    """What needs the host: LEAST_REPLAYS * LEAST_LAUNCHES calls in a row between two
    synchronisations each.
    """
    samples = []
    for turn in range(WARMUP + LEAST_REPLAYS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(LEAST_LAUNCHES):
            call(buffers[i % len(buffers)])
        torch.cuda.synchronize()
        if turn >= WARMUP:
            samples.append((time.perf_counter() - start) / LEAST_LAUNCHES)
    return Outcome(samples, how="calls", launches=LEAST_LAUNCHES, buffers=len(buffers))


def _on_the_host(competitor, buffers):
    samples = []
    for turn in range(1 + LEAST_REPLAYS):
        start = time.perf_counter()
        competitor.call(buffers[turn % len(buffers)])
        samples.append(time.perf_counter() - start)
    return Outcome(samples[1:], how="cpu", launches=1, buffers=len(buffers))


def ceilings() -> dict[str, float]:
    """What this GPU does at best: bytes a second of a copy of 2 GB, operations a second of a bf16
    product of 8192 cubed.
    """
    source, target = torch.empty(2, 2**31, dtype=torch.uint8, device=DEVICE)
    copy = _best(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    product = _best(lambda: torch.mm(a, b, out=out))
    return {"bytes_per_second": 2 * 2**31 / copy, "operations_per_second": 2 * 8192**3 / product}


def _best(call):
    """Median seconds of a long call by events."""
    call()
    samples = []
    for _ in range(10):
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        call()
        events[1].record()
        samples.append(events)
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) / 1e3 for start, end in samples)


def floor_seconds(contest: Contest, limits: dict[str, float]) -> float:
    """The least time the bytes or the operations take at those ceilings."""
    return max(
        contest.bytes / limits["bytes_per_second"],
        contest.operations / limits["operations_per_second"],
    )
