"""bench/load.py runs on tiny models, and says what is wrong."""

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import load  # noqa: E402
import tables  # noqa: E402
from load_parts import clients, report, soak  # noqa: E402

from fastdllm.serve.service import Service  # noqa: E402


@pytest.fixture
def quick(monkeypatch):
    """No warm-up, which takes seconds."""
    monkeypatch.setattr(Service, "warm_up", lambda self: setattr(self, "ready", True))


def test_it_runs_small_and_its_report_follows_from_its_results(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(load, "SMOKE_REQUESTS", 40)
    out = tmp_path / "load.json"
    assert load.main(["--smoke", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results["soak"][-1]["outcomes"] == {"answered": 32, "left": 4, "refused": 4}
    assert [row["way"] for row in results["speed"]] == ["engine", "HTTP", "HTTP, streamed"]
    assert all(row["tokens"] == 8 * 32 and len(row["seconds"]) == 3 for row in results["speed"])
    assert len(results["speed"][-1]["first"]) == 8
    assert out.with_suffix(".md").read_text() == report.markdown(results)


def test_a_wrong_answer_is_seen(quick, monkeypatch):
    """The clients are told to expect another text, and another parameter."""
    drawn = soak.drawn_kinds

    def spoiled(loaded):
        kinds = drawn(loaded)
        kinds[0]["text"] = "something else"
        kinds[soak.WRONG]["param"] = "another"
        return kinds

    monkeypatch.setattr(soak, "drawn_kinds", spoiled)
    rows, wrong = soak.soak(40, 8)
    assert "1 requests: another text" in wrong and "1 requests: not refused" in wrong


def row(**changes):
    found = {"requests": 4, "outcomes": {"answered": 4}, "resident_bytes": 100}
    return found | {"files": 5, "threads": 2} | changes


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"outcomes": {"answered": 3}}, "3 of 4 requests ended"),
        ({"files": 6}, "files: [5, 5, 6]"),
        ({"threads": 3}, "threads: [2, 2, 3]"),
        ({"resident_bytes": 110}, "resident memory has grown by 10.0%"),
        ({"outcomes": {"answered": 3, "status 500": 1}}, "1 requests: status 500"),
    ],
)
def test_faults(changes, says):
    assert soak.faults([row(), row(), row(), row(**changes)]) == [says]
    assert soak.faults([row()] * 4) == []


def test_an_answer_is_compared():
    answer = {"choices": [{"text": "a"}], "forwards": 3}
    assert clients._compared({"text": "a", "forwards": 3}, answer) == "answered"
    assert clients._compared({"text": "b"}, answer) == "another text"
    assert clients._compared({"text": "a", "forwards": 4}, answer) == "other forwards"


def test_results_stay_where_their_gpu_says():
    assert load.default_file(False, load.CPU) == tables.RESULTS / "load-cpu.json"
    assert load.default_file(True, load.CPU).parent != tables.RESULTS
