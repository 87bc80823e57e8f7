"""bench/traffic.py: its queues and figures are right, it runs on tiny models, what is wrong is said
and not timed, and the committed results say what their tables say.
"""

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import tables  # noqa: E402
import traffic  # noqa: E402
from traffic_parts import (  # noqa: E402
    answering,
    asked,
    cold,
    counting,
    figures,
    measuring,
    options,
    report,
    rules,
)
from traffic_parts import soak as soaking  # noqa: E402
from traffic_parts.answering import Answer, Answering  # noqa: E402

CPU = torch.device("cpu")
SMALL = dataclasses.replace(
    asked.SMALL,
    prompts=(4, 16),
    generations=(8, 40),
    equal=(8, 16),
    streamed=3,
    first=1,
    saturated=3,
    checked=2,
    seconds=0.05,
    turns=3,
    soaked=30,
)


@pytest.fixture(scope="module")
def config():
    return answering.shaped_model(SMALL, CPU).config


def test_more_requests_begin_with_the_same_ones(config):
    few, many = (asked.mixed(config, SMALL, count) for count in (3, 5))
    for one, other in zip(few, many, strict=False):
        assert torch.equal(one.prompt, other.prompt) and one.gen_length == other.gen_length
    longest = max(len(one.prompt) + one.gen_length for one in asked.mixed(config, SMALL, 200))
    assert longest <= SMALL.positions
    for size in (asked.LARGE, asked.SMALL):
        assert size.prompts[1] + size.generations[1] <= size.positions
        assert size.prompts[1] + size.equal[1] <= size.positions


def test_as_many_requests_come_as_the_rate_says():
    few, many = asked.arrivals(2.0, 10.0), asked.arrivals(3.0, 10.0)
    assert len(few) == 20 and len(many) == 30 and few == asked.arrivals(2.0, 10.0)
    assert few == sorted(few) and 0 <= few[0] and few[-1] < 10
    assert len(asked.arrivals(0.001, 1.0)) == 1


def test_a_queue_of_one_is_computed_from_what_each_takes_alone():
    alone = [Answer(1.0, 3.0), Answer(0.5, 1.0), Answer(0.5, 1.0)]
    answers = answering.one_by_one_at(alone, [0.0, 1.0, 10.0])
    assert answers == [Answer(1.0, 3.0), Answer(2.5, 3.0), Answer(0.5, 1.0)]


def test_a_static_batch_takes_those_that_wait(monkeypatch):
    """Time moves only when something sleeps or decodes; a batch takes 2 s whatever is in it."""
    now, batches = [100.0], []

    def decoded(model, wanted):
        batches.append(wanted)
        now[0] += 2.0
        return [Answer(1.0, 2.0) for _ in wanted]

    def sleep(moment):
        now[0] = max(now[0], moment)

    monkeypatch.setattr(answering, "decoded", decoded)
    monkeypatch.setattr(answering, "sleep_until", sleep)
    monkeypatch.setattr(answering, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    answers = answering.static_at(None, list("abcdef"), [0.5, 0.75, 1.0, 1.5, 2.0, 9.0], most=3)
    assert batches == [["a"], ["b", "c", "d"], ["e"], ["f"]]
    assert [answer.whole for answer in answers] == [2.0, 3.75, 3.5, 3.0, 4.5, 2.0]
    assert [answer.first for answer in answers] == [1.0, 2.75, 2.5, 2.0, 3.5, 1.0]


def test_a_batch_is_decoded_as_generate_does_and_its_first_tokens_are_seen(config):
    ways = Answering(SMALL, CPU)
    wanted = asked.mixed(config, SMALL, 3)
    answers = answering.decoded(ways.batched, wanted)
    assert len({answer.whole for answer in answers}) == 1
    assert all(0 < answer.first < answer.whole for answer in answers)
    with ways.engine:
        come = [0.0, 0.0, 0.05]
        answers = answering.engine_at(ways.engine, wanted, come)
    assert all(0 < answer.first <= answer.whole for answer in answers)


def test_figures():
    assert [figures.percentile([4, 1, 3, 2], part) for part in (1, 50, 99)] == [1, 2, 4]
    assert figures.percentile(range(1, 101), 99) == 99
    assert figures.own_best([{"seconds": [1, 1.05, 1]}, {"seconds": [3, 2, 2]}]) == (0.5, 1.5)
    assert figures.over_alone({"whole": [2, 9, 3], "alone": [1, 3, 2]}) == 2
    assert figures.host_part({"ms_turn": 5.0, "ms_replay": 4.0}) == pytest.approx(0.2)


def test_compiles_are_heard_of():
    triton = pytest.importorskip("triton")
    heard = []
    triton.knobs.compilation.listener = lambda **told: heard.append(told["cache_hit"])
    try:
        with counting.Compiles() as compiles:
            for cache_hit in (True, False, False):
                times = SimpleNamespace(total=500_000)
                triton.knobs.compilation.listener(times=times, cache_hit=cache_hit, src=None)
        triton.knobs.compilation.listener(times=times, cache_hit=True)
    finally:
        triton.knobs.compilation.listener = None
    expected = {"compiled": 2, "compile_seconds": 1.0, "loaded": 1, "load_seconds": 0.5}
    assert compiles.report() == expected
    assert heard == [True, False, False, True], "the listener before is told too, and comes back"


def test_a_listener_that_comes_meanwhile_stays():
    triton = pytest.importorskip("triton")
    heard = []
    try:
        with counting.Compiles() as compiles:
            before = triton.knobs.compilation.listener

            def later(**told):
                heard.append(told["cache_hit"])
                before(**told)

            triton.knobs.compilation.listener = later
            later(times=SimpleNamespace(total=1), cache_hit=False)
        assert triton.knobs.compilation.listener is later
        later(times=SimpleNamespace(total=1), cache_hit=False)
    finally:
        triton.knobs.compilation.listener = None
    assert compiles.report()["compiled"] == 1 and heard == [False, False]


def test_without_a_listener_new_files_are_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(counting, "triton", SimpleNamespace())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (tmp_path / "old.cubin").touch()
    with counting.Compiles() as compiles:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "new.cubin").touch()
    found = compiles.report()
    assert found["compiled"] == 1 and found["loaded"] is None and found["compile_seconds"] is None
    assert measuring.made_in_traffic(found | {"captured": 0}) == "1 kernels compiled"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(*arguments) -> (exit status, results or None) of the benchmark at its smallest, its
    child processes left out.
    """
    beginning = {"seconds": 2.0, "next_request_seconds": 1.0, "engine_seconds": 0.1}
    beginning |= {"compiled": 3, "compile_seconds": 1.5, "loaded": 0, "load_seconds": 0.0}
    beginning |= {"captured": 4, "capture_seconds": 1.6}
    monkeypatch.setattr(traffic, "SMALL", SMALL)
    monkeypatch.setattr(measuring, "PASSES", 2)
    monkeypatch.setattr(measuring, "ROUNDS", 1)
    monkeypatch.setattr(cold, "process", lambda *arguments: FakeChild(json.dumps(beginning)))
    path = tmp_path / "traffic.json"

    def run(*arguments):
        status = traffic.main(["--smoke", *arguments, "--out", str(path)])
        return status, json.loads(path.read_text()) if path.exists() else None

    return run


class FakeChild:
    """A child process that has said something."""

    returncode = 0

    def __init__(self, said):
        self.said = said

    def communicate(self, told, timeout):
        return f"a warning\n{self.said}\n", ""

    def kill(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_it_runs_reports_and_adds_up(run, tmp_path):
    status, results = run("--part", "cold,stream,saturated,host")
    assert status == 0
    assert [row["kind"] for row in results["cold"]] == list(cold.KINDS)
    assert results["check"][0]["wrong"] == []
    assert len(results["stream_requests"]) == SMALL.streamed
    assert {(row["lengths"], row["way"]) for row in results["saturated"]} == {
        ("equal", "engine"),
        ("equal", "static"),
        ("mixed", "engine"),
        ("mixed", "static"),
        ("mixed", "one by one"),
    }
    asked_for = {row["tokens"] for row in results["saturated"] if row["lengths"] == "equal"}
    assert asked_for == {SMALL.saturated * SMALL.equal[1]}
    assert [row["ms_replay"] for row in results["host"]] == [None, None]
    status, results = run("--part", "open", "--seconds", "0.1")
    assert status == 0 and len(results["environments"]) == 2, "the parts before are kept"
    assert {row["environment"] for row in results["open"]} == {1}
    assert len(results["open"]) == len(asked.LOADS) * len(asked.WAYS)
    for row in results["open"]:
        assert len(row["first"]) == len(row["whole"]) == len(row["alone"]) == row["requests"]
        assert all(first <= whole for first, whole in zip(row["first"], row["whole"], strict=True))
    text = (tmp_path / "traffic.md").read_text()
    assert "CPU numbers" in text and "nothing compiled, loaded or captured" in text
    assert (tmp_path / "traffic.png").stat().st_size > 10_000
    index = tmp_path / "README.md"
    index.write_text("<!-- traffic -->\n<!-- /traffic -->\n")
    report.write_report(tmp_path / "traffic.json", index)
    assert "traffic.png" in tables.between_marks(index, "traffic")


def test_options_are_timed_again_and_again(run, tmp_path):
    status, results = run("--part", "options")
    assert status == 0 and [row["option"] for row in results["options"]] == [
        option.name for option in options.OPTIONS
    ]
    for row in results["options"]:
        assert len(row["fewer"]) == len(row["more"]) == options.TIMES
    assert "fp8, prompt kept" in (tmp_path / "traffic.md").read_text()


def test_rules_of_every_kind_take_turns(run, tmp_path):
    status, results = run("--part", "rules")
    assert status == 0 and [row["rule"] for row in results["rules"]] == [
        kind.name for kind in rules.KINDS
    ]
    assert all(len(row["ms"]) == rules.ROUNDS for row in results["rules"])
    text = (tmp_path / "traffic.md").read_text()
    assert text.count("ms over a fused rule (target: at most 0.5)") == 3


def test_what_a_rule_costs():
    rows = [{"rule": rules.FUSED, "ms": [4.0, 5.0, 6.0]}, {"rule": "other", "ms": [5.5, 5.25, 5.0]}]
    assert rules.over_fused(rows, rows[1]) == 0.25 and rules.over_fused(rows, rows[0]) == 0


def test_figures_of_options():
    row = {"fewer": [9.0, 1.5, 1.0, 1.0, 1.0, 2.0], "more": [1.8, 1.8, 1.8, 1.8, 1.8, 5.0]}
    assert options.later_times(row) == 1.5
    # 140 forwards, three eighths of the way from 128 to 160; the first time is left out.
    assert options.of_the_paper(row) == pytest.approx(1.0 + 0.375 * 0.8)


def test_a_child_begins_when_it_is_told_to(monkeypatch):
    read = []
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(readline=lambda: read.append(1)))
    for kind in cold.KINDS:
        found = cold.begin(kind, SMALL, CPU)
        assert found["seconds"] > 0 and found["compiled"] == 0 == found["captured"]
    assert len(read) == 2


def test_a_child_that_fails_says_why():
    child = FakeChild("")
    child.communicate = lambda told, timeout: ("", "ValueError: a reason")
    child.returncode, child.args = 1, ["python", "traffic.py"]
    with pytest.raises(RuntimeError, match="a reason"):
        cold.answer_of(child)


def test_wrong_tokens_are_not_timed(run, monkeypatch, capsys):
    generate = measuring.generate

    def other(*arguments, **options):
        done = generate(*arguments, **options)
        done.tokens[0][-1] += 1
        return done

    monkeypatch.setattr(measuring, "generate", other)
    status, results = run("--part", "stream,saturated,open")
    said = capsys.readouterr().out
    assert status == 1 and results is None
    assert "FAILED: check: request 0: 1 of" in said and "no times are told" in said


def test_what_is_made_in_the_stream_is_a_failure(run, monkeypatch, capsys, tmp_path):
    """Of three countings the second is that of the stream; the first is of warm_up."""
    opened = []

    def enter(compiles):
        opened.append(compiles)
        compiles.loaded += len(opened) == 2
        return compiles

    monkeypatch.setattr(counting.Compiles, "__enter__", enter)
    monkeypatch.setattr(counting.Compiles, "__exit__", lambda *error: None)
    status, results = run("--part", "stream")
    assert status == 1 and results["stream"][0]["loaded"] == 1
    assert "FAILED: stream: after warm_up: 1 kernels loaded" in capsys.readouterr().out
    assert "FAILED: 1 kernels loaded" in (tmp_path / "traffic.md").read_text()


def test_bad_choices_are_refused(run, capsys):
    for arguments in (["--part", "stream,other"], ["--seconds", "0"], ["--seconds", "x"]):
        with pytest.raises(SystemExit):
            traffic.main(arguments)
    assert (
        "expected some of cold, options, rules, stream, saturated, open, host, soak, got other"
        in (capsys.readouterr().err)
    )
    with pytest.raises(SystemExit, match="--part saturated"):
        run("--part", "open")


def test_a_soak_loses_nothing(run, tmp_path):
    status, results = run("--part", "soak")
    rows = results["soak"]
    assert status == 0 and rows[-1]["wrong"] == []
    assert [row["requests"] for row in rows] == [0, 10, 20, 30]
    outcomes = rows[-1]["outcomes"]
    assert outcomes["done"] + outcomes["cancelled"] + outcomes.get("failed", 0) == 30
    assert "Nothing lost, doubled or other." in (tmp_path / "traffic.md").read_text()


def test_a_soak_says_what_is_wrong():
    def row(**others):
        told = {"requests": 9, "outcomes": {"done": 9}, "objects": 1000, "threads": 2}
        return told | {"resident_bytes": 100, "threads_after": 1} | others

    stats = {"finished": 10, "busy": 0, "waiting": 0}
    rows = [row(), row(), row(), row()]
    assert soaking.faults(rows, stats, 1) == []
    for last, stated, words in (
        ({"outcomes": {"done": 8}}, {}, "8 of 9 requests ended"),
        ({"outcomes": {"done": 8, "lost": 1}}, {}, "1 requests: lost"),
        ({"objects": 2000}, {}, "1000 Python objects more"),
        ({"resident_bytes": 110}, {}, "resident memory has grown by 10.0%"),
        ({"threads": 3}, {}, "threads: [2, 3]"),
        ({"threads_after": 2}, {}, "the engine's thread outlives it"),
        ({}, {"finished": 9}, "the engine finished 8 of 9 requests"),
        ({}, {"waiting": 2}, "0 rows are busy and 2 requests wait"),
    ):
        found = soaking.faults([*rows[:-1], row(**last)], stats | stated, 1)
        assert found == [words]


def test_an_outcome_that_is_wrong_is_told():
    tokens = torch.tensor([5, 6, 7])
    done = SimpleNamespace(tokens=[tokens], nfe=torch.tensor([2]))
    kind = soaking.Kind([5], {}, done)

    class Request(SimpleNamespace):
        def result(self, timeout):
            return self.done

        def __iter__(self):
            return iter(self.read)

    def became(kind=kind, read=(6, 7), **others):
        given = SimpleNamespace(**{"tokens": [tokens], "nfe": torch.tensor([2])} | others)
        return soaking.outcome(Request(done=given, read=list(read)), kind, True)

    assert became() == "done"
    assert became(read=(6, 7, 7)) == "other tokens read than in the result"
    assert became(tokens=[tokens + 1]) == "other tokens than alone"
    assert became(nfe=torch.tensor([3])) == "more or fewer forwards than alone"
    assert became(kind=soaking.Kind([5], {}, None)) == "done in spite of its rule"


def test_a_line_that_is_full_is_waited_for(monkeypatch):
    tries, counted = [], Counter()

    def submit(prompt, **options):
        tries.append(prompt)
        if len(tries) < 3:
            raise soaking.QueueFull
        return "request"

    monkeypatch.setattr(soaking.time, "sleep", lambda seconds: None)
    kind = soaking.Kind([5], {}, None)
    assert soaking.submitted(SimpleNamespace(submit=submit), kind, counted) == "request"
    assert counted == {"line was full": 2}


COMMITTED = sorted(tables.RESULTS.glob("traffic-*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_report_is_made_of_its_results_and_nothing_else(path):
    assert path.with_suffix(".md").read_text() == report.markdown(traffic.loaded(path))


def test_the_index_shows_what_the_files_hold():
    index = tables.RESULTS / "README.md"
    results = traffic.loaded(tables.RESULTS / "traffic-cpu.json")
    assert tables.between_marks(index, "soak") == report.soak_table(results["soak"])
    assert results["soak"][-1]["requests"] == 10_000 and results["soak"][-1]["wrong"] == []
    measured = [path for path in COMMITTED if traffic.loaded(path)["saturated"]]
    for path in measured[-1:]:  # an H200's, where there are several
        shown = tables.between_marks(index, "traffic")
        assert shown == report.short_table(traffic.loaded(path), path.stem)
