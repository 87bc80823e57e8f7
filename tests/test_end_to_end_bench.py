"""bench/end_to_end.py: the peer decodes what we decode, the clock's arithmetic is right, and the
whole runs on tiny models.
"""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch

from fastdllm import Quota, generate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import end_to_end  # noqa: E402
import end_to_end_accuracy as accuracy  # noqa: E402
import end_to_end_race as race  # noqa: E402
import end_to_end_report as report  # noqa: E402
import plain  # noqa: E402

SMALL = dataclasses.replace(race.SMOKE, canvases={96: 64}, rows=(1,), headline=96, sample=0.001)
LIMITS = {"bytes_per_second": 4.3e12, "operations_per_second": 708e12}


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def model(request, tmp_path_factory):
    model, _ = tiny.build(
        tmp_path_factory.mktemp(request.param) / "m", tiny.FAMILIES[request.param]
    )
    model.lm_head.weight[model.config.mask_id] = 0
    return model


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_the_peer_makes_the_same_decisions_in_as_many_forwards(model, cache, steps):
    prompts = torch.randint(37, (3, 9), generator=torch.Generator().manual_seed(steps))
    options = {"gen_length": 20, "block_length": 8, "cache": cache}
    ours = generate(model, prompts, rule=Quota(steps), stop_ids=(), **options)
    canvas, refreshes, cached = plain.decode(plain.Plain(model), prompts, steps=steps, **options)
    assert torch.equal(canvas, torch.stack(ours.tokens))
    assert (refreshes, cached) == (ours.refreshes[0], ours.cached_steps[0])


def test_the_peer_leaves_after_the_blocks_asked_for(model):
    options = {"gen_length": 24, "block_length": 8, "cache": "prefix", "steps": 4, "stop_after": 2}
    canvas, *forwards = plain.decode(
        plain.Plain(model), torch.zeros(1, 5, dtype=torch.int64), **options
    )
    assert (
        forwards == [2, 6]
        and (canvas == model.config.mask_id)[0].tolist() == [False] * 21 + [True] * 8
    )


@pytest.mark.parametrize(
    ("canvas", "refresh", "step"), [(512, 10.4, 3.55), (1024, 21, 3.61), (2048, 45, 3.74)]
)
def test_floors_are_the_bytes_and_operations_of_llada(canvas, refresh, step):
    """Worked out by hand for the whole forward; ours is a little below, since the last layer has
    queries in the block only.
    """
    floors = race.floors(
        race.LLADA_8B, race.Cell("m", canvas, 256, 1), race.Way("dual", "dual"), LIMITS
    )
    assert 0.92 * refresh < floors["floor_ms_refresh"] < refresh
    assert floors["floor_ms_step"] == pytest.approx(step, rel=0.01)


@pytest.mark.parametrize(
    ("config", "parameters"), [(race.LLADA_8B, 8.016e9), (race.DREAM_7B, 7.616e9)]
)
def test_the_real_shapes_have_the_published_numbers_of_parameters(config, parameters):
    with torch.device("meta"):
        model = race.DiffusionTransformer(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-3)


def test_the_fit_finds_the_two_times():
    counts = [(4, 12), (4, 60), (32, 96)]
    runs = [{"refreshes": r, "cached_steps": s, "seconds": r * 0.05 + s * 0.004} for r, s in counts]
    refresh, step, error = race.fit(runs)
    assert (refresh, step) == (pytest.approx(50), pytest.approx(4)) and error < 1e-9
    assert race.fit([{"refreshes": 8, "cached_steps": 0, "seconds": 1.0}])[:2] == (
        pytest.approx(125),
        None,
    )


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(*arguments) -> (exit status, results) of the benchmark at its smallest."""
    monkeypatch.setattr(end_to_end, "SMOKE", SMALL)
    monkeypatch.setattr(end_to_end.timing, "ON_GPU", False)
    monkeypatch.setattr(end_to_end.timing, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(race, "TURNS", 1)
    monkeypatch.setattr(race, "FIT_STEPS", (2, 3))
    for plot in ("plot_throughput", "plot_time"):  # slow: drawn once, below
        monkeypatch.setattr(report, plot, lambda cells, path: None)
    path = tmp_path / "e2e.json"

    def run(*arguments):
        status = end_to_end.main([*arguments, "--out", str(path)])
        return status, json.loads(path.read_text())

    return run


def test_it_runs_reports_and_adds_up(run, monkeypatch, tmp_path, capsys):
    status, results = run("--headline")
    headline, everything = (
        len(race.WAYS) + len(race.OPTIONS),
        2 * len(race.WAYS) + len(race.OPTIONS),
    )
    assert status == 0 and len(results["rows"]) == headline
    for row in results["rows"]:
        assert row["headline"] and row["ms_refresh"] > -1e3 and row["peak_bytes"] is None
        assert row.get("tokens_as_peer", 1) == 1
        whole = [run for run in row["measured"] if run["blocks"] is None]
        scripted = [(2, 6), (2, 8)] if row["cache"] == "dual" else []
        assert [(run["refreshes"], run["cached_steps"]) for run in whole] == scripted
    status, results = run("--grid")  # the headline's cell is not measured again
    assert status == 0 and len(results["environments"]) == 2 and len(results["rows"]) == everything
    assert {row["environment"] for row in results["rows"]} == {0, 1}
    run("--grid")
    assert "there already" in capsys.readouterr().out
    text = (tmp_path / "e2e.md").read_text()
    assert "CPU numbers" in text and text.count("| dual captured |") == 3
    monkeypatch.undo()
    report.write_report(tmp_path / "e2e.json")
    assert all(
        (tmp_path / f"e2e-{name}.png").stat().st_size > 10_000 for name in ("throughput", "time")
    )
    again = results | {
        "rows": [
            row | {"ms_refresh": 7.0} for row in results["rows"] if row["way"] == "plain dual"
        ][::-1]
    }
    (tmp_path / "again.json").write_text(json.dumps(again))
    end_to_end.main(
        [
            "--merge",
            str(tmp_path / "e2e.json"),
            str(tmp_path / "again.json"),
            "--out",
            str(tmp_path / "two.json"),
        ]
    )
    merged = json.loads((tmp_path / "two.json").read_text())
    assert [row["way"] for row in merged["rows"]] == [row["way"] for row in results["rows"]]
    assert all((row["ms_refresh"] == 7.0) == (row["way"] == "plain dual") for row in merged["rows"])
    kept = [merged["environments"][row["environment"]] for row in merged["rows"]]
    assert kept == [results["environments"][row["environment"]] for row in results["rows"]]


def test_what_is_wrong_or_does_not_fit_is_not_timed(run, monkeypatch, tmp_path):
    decode = race.Subject.decode

    def failing(self, way, *args, **kwargs):
        if way.name == "plain dual":
            raise torch.OutOfMemoryError("of memory")
        canvas, *forwards = decode(self, way, *args, **kwargs)
        if way.name == "dual captured" and way.captured and canvas is not None:
            canvas[0, -1] += 1
        return canvas, *forwards

    monkeypatch.setattr(race.Subject, "decode", failing)
    status, results = run("--grid", "--only", "llada")
    rows = {row["way"]: row for row in results["rows"]}
    assert (
        status == 1
        and rows["dual captured"]["wrong"] == "1 of 64 tokens differ from those of eager decoding"
    )
    assert rows["plain dual"]["absent"] == "out of memory"
    assert all(
        ("ms_refresh" in row) == (name not in ("dual captured", "plain dual"))
        for name, row in rows.items()
    )
    text = (tmp_path / "e2e.md").read_text()
    assert "WRONG: 1 of 64" in text and "| plain dual | out of memory |" in text


def test_the_embedded_models_answer_alike():
    [entry, *_] = accuracy.accuracy(
        "cpu", 2, models=("tiny-llada",), settings=accuracy.SETTINGS[:1]
    )
    assert entry["solved"]["bf16 captured"] == 2 == entry["same_tokens"]["fp32 captured"]
    assert "| 2 of 2 |" in report.accuracy_table({"results": [entry]})


def test_bad_choices_are_refused(capsys):
    for arguments in (["--only", "gpt"], ["--canvas", "7"], ["--merge", "a.json"]):
        with pytest.raises(SystemExit):
            end_to_end.main(arguments)
    assert "expected some of llada, dream, got gpt" in capsys.readouterr().err
