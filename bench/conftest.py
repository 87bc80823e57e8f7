"""`pytest bench` checks every competitor of every benchmark; `pytest bench --benchmark` also times
those that are right.
"""

import platform
from statistics import median

import pytest
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
    """Only what the numbers depend on: neither the machine's name nor its hundred processor flags."""
    cpu = machine_info.get("cpu", {}).get("brand_raw")
    machine_info.clear()
    machine_info.update(cpu=cpu, system=platform.system(), python=platform.python_version())
    for package in ("torch", "triton", "flash_attn_4", "flash_attn", "fastdllm"):
        machine_info[package] = _version(package)
    machine_info["gpu"] = None
    if timing.ON_GPU:
        properties = torch.cuda.get_device_properties(timing.DEVICE)
        machine_info["gpu"] = properties.name
        machine_info["multiprocessors"] = properties.multi_processor_count
        machine_info["l2_bytes"] = properties.L2_cache_size
        machine_info["cuda"] = torch.version.cuda
        machine_info["cudnn"] = torch.backends.cudnn.version()
        machine_info["ceilings"] = _ceilings()


def _version(package):
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:
        return None


def _ceilings():
    if "ceilings" not in CONTESTS:
        CONTESTS["ceilings"] = timing.ceilings()
    return CONTESTS["ceilings"]


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
            pytest.fail(
                f"{contest.op} {contest.shape}: {name} is wrong, so its time means nothing: {outcome.wrong}"
            )
        CLOCK.samples = iter(outcome.seconds)
        benchmark.pedantic(CLOCK.advance, rounds=max(1, len(outcome.seconds)))
        if benchmark.enabled:
            benchmark.extra_info.update(_facts(contest, outcomes, name))

    return report


def _facts(contest, outcomes, name):
    """What one competitor's time means: throughput, share of the floor, and its ratio to the
    others.
    """
    outcome, seconds = outcomes[name], median(outcomes[name].seconds)
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
        facts["floor_us"], facts["share_of_floor"] = floor * 1e6, floor / seconds
    peers = {
        peer: o.microseconds
        for peer, o in outcomes.items()
        if contest.competitors[peer].theirs and o.seconds
    }
    if name == "ours" and peers:
        best = min(peers, key=peers.get)
        facts["best_peer"], facts["best_peer_over_ours"] = best, peers[best] / outcome.microseconds
        facts["absent"] = {peer: o.absent for peer, o in outcomes.items() if o.absent}
    elif outcomes["ours"].seconds:
        facts["over_ours"] = outcome.microseconds / outcomes["ours"].microseconds
    return facts
