"""An honest clock for short GPU work: graph replays over rotated buffers, every competitor in the
same run.

Three things make microbenchmarks of microseconds lie, and what is done about each:

launching   Python and the driver take longer than the kernels. Every competitor is captured in a
            CUDA graph of at least 8 launches, and a replay is timed by events, queued while the GPU
            is kept busy, so that it never waits for the host.
caches      A kernel that reads what it read a moment ago is served by L2; in a model it is not.
            Launches rotate over independent buffers that together exceed twice the L2 cache (and
            there are at least 8).
drift       Clocks and neighbours change from minute to minute. Competitors take turns, replay by
            replay, and the figure is the median.

What one launch leaves unsaid stays in: the gap of about a microsecond that the GPU needs between
two kernels.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch

REPLAYS = 20
LEAST_REPLAYS = 5
WARMUP = 3
LEAST_LAUNCHES = 8
MOST_BUFFERS = 256
GRAPH_SECONDS = 150e-6  # a CUDA graph shorter than this would show the start of the graph itself
# For all replays of one competitor: a slow one gets fewer, but never under LEAST_REPLAYS.
SECONDS = 0.3
IDLE_CYCLES = 4_000_000  # about 2 ms, in which the host queues a turn's replays
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
    """What came of one competitor: seconds of a call, one for each replay, or why there are none.

    how: "graph" for replays, "calls" for calls one by one with the host's time in them, "cpu".
    launches: of a replay. buffers: the sets of inputs that they rotate over.
    """

    seconds: list[float] = field(default_factory=list)
    absent: str | None = None
    wrong: str | None = None
    how: str = "graph"
    launches: int = 0
    buffers: int = 0

    @property
    def microseconds(self):
        """The median of a call; NaN where nothing was measured."""
        return median(self.seconds) * 1e6 if self.seconds else math.nan


@dataclass
class Replayable:
    """A competitor's CUDA graph: its launches, how many replays the budget allows, their events."""

    graph: torch.cuda.CUDAGraph
    launches: int
    rounds: int
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """Seconds of one launch, one for each replay that has ended."""
        return [begin.elapsed_time(end) / 1e3 / self.launches for begin, end in self.events]


def run(contest: Contest, timed: bool) -> dict[str, Outcome]:
    """Check every competitor, and where `timed` measure those that are right, in turns."""
    first = contest.buffer(0)
    outcomes, right = {}, {}
    for name, competitor in contest.competitors.items():
        outcome = outcomes[name] = checked(contest, competitor, first)
        if not outcome.absent and not outcome.wrong:
            right[name] = competitor
    if timed and right:
        count = buffers_needed(contest.footprint or contest.bytes)
        buffers = [first, *(contest.buffer(i) for i in range(1, count))]
        outcomes |= measure(right, buffers)
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
        return Outcome(absent=first_line(error))
    try:
        contest.check(result, buffer)
    except AssertionError as error:
        return Outcome(wrong=str(error).strip() or "the check failed")
    return Outcome()


def first_line(error: Exception) -> str:
    """An exception in short."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


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
            if not competitor.capturable:
                outcomes[name] = _one_by_one(competitor.call, buffers)
                continue
            graph = graphs[name] = _captured(competitor.call, buffers)
            outcomes[name] = Outcome(launches=graph.launches, buffers=len(buffers))
        except Exception as error:
            if not competitor.theirs:
                raise
            outcomes[name] = Outcome(absent=f"not capturable: {first_line(error)}")
    for turn in range(REPLAYS):
        torch.cuda.synchronize()
        torch.cuda._sleep(IDLE_CYCLES)
        for graph in graphs.values():
            if turn < graph.rounds:
                graph.events.append(_timed(graph.graph))
    torch.cuda.synchronize()
    for name, graph in graphs.items():
        outcomes[name].seconds = graph.seconds
    return outcomes


def _captured(call, buffers) -> Replayable:
    """Capture `call` over the buffers in rotation, as often as makes the graph long enough."""
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for buffer in buffers[:2]:
            call(buffer)
    torch.cuda.synchronize()
    graph = _graph(call, buffers)
    seconds, repeats = _estimate(graph), 1
    if seconds < GRAPH_SECONDS:
        repeats = math.ceil(GRAPH_SECONDS / seconds)
        graph = _graph(call, buffers * repeats)
    for _ in range(WARMUP - 1):
        graph.replay()
    affordable = int(SECONDS / (seconds * repeats))
    rounds = min(REPLAYS, max(LEAST_REPLAYS, affordable))
    return Replayable(graph, launches=repeats * len(buffers), rounds=rounds)


def _graph(call, buffers):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Held until the end: results written over each other would stay in L2.
        results = [call(buffer) for buffer in buffers]
    del results
    return graph


def _timed(graph):
    """Queue a replay; (the event before it, the event after it)."""
    return _between_events(graph.replay)


def _between_events(call):
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    return begin, end


def _estimate(graph):
    """Seconds of one replay; the first one uploads the graph and is not looked at."""
    graph.replay()
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000)
    begin, end = _timed(graph)
    end.synchronize()
    return max(begin.elapsed_time(end) / 1e3, 1e-6)


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
    size, width = 2**31, 8192
    source, target = torch.empty(2, size, dtype=torch.uint8, device=DEVICE)
    copy = _median_seconds(lambda: target.copy_(source))
    a, b = torch.randn(2, width, width, device=DEVICE, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    product = _median_seconds(lambda: torch.mm(a, b, out=out))
    return {
        "bytes_per_second": 2 * size / copy,  # read and written
        "operations_per_second": 2 * width**3 / product,
    }


def _median_seconds(call) -> float:
    """Median seconds of a long call by events."""
    call()
    samples = [_between_events(call) for _ in range(10)]
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) / 1e3 for begin, end in samples)


def floor_seconds(contest: Contest, limits: dict[str, float]) -> float:
    """The least time the bytes or the operations take at those ceilings."""
    return max(
        contest.bytes / limits["bytes_per_second"],
        contest.operations / limits["operations_per_second"],
    )
