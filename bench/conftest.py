"""`pytest bench` checks every competitor of every benchmark; `pytest bench --benchmark` also times
those that are right.
"""

import platform
from functools import cache
from statistics import median

import pytest
import tables
import timing
import torch

if not timing.ON_GPU:
    torch.set_num_threads(1)  # at the small shapes of a CPU run threads cost more than they bring

CONTESTS = {}  # (test function, case) -> (contest without its buffers, outcomes)
# Options of pytest-benchmark that ask for times, as their destinations.
ASKS_FOR_TIMES = ("json", "only", "autosave", "save", "compare", "histogram", "enable")


class Replayed:
    """A clock that pytest-benchmark reads, and that moves by what was measured: its samples become
    the plugin's rounds.
    """

    def __init__(self):
        self.now, self.samples = 0.0, iter(())

    def __call__(self):
        return self.now

    def __repr__(self):
        return "replayed samples"

    def advance(self):
        self.now += next(self.samples, 0.0)


CLOCK = Replayed()


def pytest_addoption(parser):
    try:
        parser.addoption(
            "--benchmark", action="store_true", help="measure, not only check (see bench/README.md)"
        )
    except ValueError:
        pass  # somebody's other conftest.py has it already


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    option = config.option
    if option.benchmark or any(
        getattr(option, f"benchmark_{name}", None) for name in ASKS_FOR_TIMES
    ):
        option.benchmark_only = True
    else:
        option.benchmark_disable = True


def pytest_collection_modifyitems(items):
    for item in items:
        if "compete" in getattr(item, "fixturenames", ()):
            case = item.callspec.params["case"]
            item.add_marker(
                pytest.mark.benchmark(timer=CLOCK, group=f"{item.originalname}: {case}")
            )


def pytest_benchmark_update_machine_info(config, machine_info):
    """Keep what the numbers depend on: neither the machine's name nor its processor's flags."""
    cpu = machine_info.get("cpu", {}).get("brand_raw")
    machine_info.clear()
    machine_info.update(tables.environment(timing.DEVICE))
    machine_info.update(cpu=cpu, system=platform.system())
    for package in ("flash_attn_4", "flash_attn", "fastdllm"):
        machine_info[package] = tables.installed(package)
    if timing.ON_GPU:
        properties = torch.cuda.get_device_properties(timing.DEVICE)
        machine_info["multiprocessors"] = properties.multi_processor_count
        machine_info["l2_bytes"] = properties.L2_cache_size
        machine_info["ceilings"] = _ceilings()


@cache
def _ceilings():
    """Measured once a run."""
    return timing.ceilings()


@pytest.fixture
def compete(benchmark, request):
    """compete(build, case, name): check and time the contest `build(case)` once, then report its
    competitor `name`.
    """

    def report(build, case, name):
        key = build, case
        if key not in CONTESTS:
            contest = build(case)
            outcomes = timing.run(contest, timed=benchmark.enabled)
            contest.buffer = contest.check = None
            CONTESTS[key] = contest, outcomes
        contest, outcomes = CONTESTS[key]
        outcome = outcomes.get(name)
        if outcome is None or outcome.absent:
            benchmark.skipped = True
            pytest.skip(outcome.absent if outcome else f"{name} is no competitor here")
        if outcome.wrong:
            benchmark.skipped = True
            where = f"{contest.op} {contest.shape}: {name}"
            pytest.fail(f"{where} is wrong, so its time means nothing: {outcome.wrong}")
        CLOCK.samples = iter(outcome.seconds)
        benchmark.pedantic(CLOCK.advance, rounds=max(1, len(outcome.seconds)))
        if benchmark.enabled:
            benchmark.extra_info.update(_facts(contest, outcomes, name))

    return report


def _facts(contest, outcomes, name):
    """What one competitor's time means: throughput, share of the floor, and its ratio to the
    others.
    """
    outcome = outcomes[name]
    seconds = median(outcome.seconds)
    facts = {
        "op": contest.op,
        "shape": contest.shape,
        "competitor": name,
        "us": outcome.microseconds,
        "timing": outcome.how,
        "launches": outcome.launches,
        "buffers": outcome.buffers,
        "gb_per_s": contest.bytes / seconds / 1e9,
        "tflop_per_s": contest.operations / seconds / 1e12,
        "reach_us": contest.reach,
    }
    if timing.ON_GPU:
        floor = timing.floor_seconds(contest, _ceilings())
        facts["floor_us"] = floor * 1e6
        facts["share_of_floor"] = floor / seconds
    if name != "ours":
        ours = outcomes["ours"]
        if ours.seconds:
            facts["over_ours"] = outcome.microseconds / ours.microseconds
        return facts
    peers = {
        peer: other.microseconds
        for peer, other in outcomes.items()
        if contest.competitors[peer].theirs and other.seconds
    }
    if peers:
        best = min(peers, key=peers.get)
        facts["best_peer"] = best
        facts["best_peer_over_ours"] = peers[best] / outcome.microseconds
        facts["absent"] = {peer: other.absent for peer, other in outcomes.items() if other.absent}
    return facts
