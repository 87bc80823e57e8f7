"""bench/end_to_end.py: the peer decodes what we decode, the clock's arithmetic is right, the whole
runs on tiny models, and the committed results say what their tables say.
"""

import ast
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch

from fastdllm import Quota, generate

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import end_to_end  # noqa: E402
import end_to_end_accuracy as accuracy  # noqa: E402
import plain  # noqa: E402
import tables  # noqa: E402
from race import floors, measure, report, shapes  # noqa: E402
from race.subject import Subject  # noqa: E402

SMALL = dataclasses.replace(shapes.SMOKE, canvases={96: 64}, rows=(1,), headline=96, sample=0.001)
LIMITS = {"bytes_per_second": 4.3e12, "operations_per_second": 708e12}


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "m"
    model, _ = tiny.build(folder, tiny.FAMILIES[request.param])
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
    prompts = torch.zeros(1, 5, dtype=torch.int64)
    canvas, *forwards = plain.decode(plain.Plain(model), prompts, **options)
    assert forwards == [2, 6]
    assert (canvas == model.config.mask_id)[0].tolist() == [False] * 21 + [True] * 8


@pytest.mark.parametrize("way", ["plain prefix", "prefix eager", "prefix captured"])
def test_a_run_that_is_left_early_did_whole_blocks(way):
    subject = Subject("dream", SMALL, torch.device("cpu"))
    chosen = next(other for other in shapes.WAYS if other.name == way)
    run = subject.decode(chosen, 1, 32, 64, steps=4, stop_after=1)
    assert (run.refreshes, run.cached_steps) == (1, 3)
    cell = shapes.Cell("tiny", 128, 96, 1)
    sample = subject.timed(chosen, cell, 4, 2)  # of three blocks
    assert (sample.refreshes, sample.cached_steps) == (2, 6) and sample.seconds > 0


@pytest.mark.parametrize(
    ("canvas", "refresh", "step"), [(512, 10.4, 3.55), (1024, 21, 3.61), (2048, 45, 3.74)]
)
def test_floors_are_the_bytes_and_operations_of_llada(canvas, refresh, step):
    """Worked out by hand for the whole forward; ours is a little below, since the last layer has
    queries in the block only.
    """
    cell, way = shapes.Cell("m", canvas, 256, 1), shapes.Way("dual", "dual")
    found = floors.floors(shapes.LLADA_8B, cell, way, LIMITS)
    assert 0.92 * refresh < found["floor_ms_refresh"] < refresh
    assert found["floor_ms_step"] == pytest.approx(step, rel=0.01)


@pytest.mark.parametrize(
    ("config", "parameters"), [(shapes.LLADA_8B, 8.016e9), (shapes.DREAM_7B, 7.616e9)]
)
def test_the_real_shapes_have_the_published_numbers_of_parameters(config, parameters):
    from fastdllm.model import DiffusionTransformer

    with torch.device("meta"):
        model = DiffusionTransformer(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-3)


def test_the_fit_finds_the_two_times():
    counts = [(4, 12), (4, 60), (32, 96)]
    runs = [{"refreshes": r, "cached_steps": s, "seconds": r * 0.05 + s * 0.004} for r, s in counts]
    refresh, step, error = measure.fit(runs)
    assert refresh == pytest.approx(50) and step == pytest.approx(4) and error < 1e-9
    refresh, step, _ = measure.fit([{"refreshes": 8, "cached_steps": 0, "seconds": 1.0}])
    assert refresh == pytest.approx(125) and step is None


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(*arguments) -> (exit status, results) of the benchmark at its smallest."""
    monkeypatch.setattr(end_to_end, "SMOKE", SMALL)
    monkeypatch.setattr(end_to_end.timing, "ON_GPU", False)
    monkeypatch.setattr(end_to_end.timing, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(measure, "TURNS", 1)
    monkeypatch.setattr(measure, "FIT_STEPS", (2, 3))
    for plot in ("throughput", "request_time"):  # slow: drawn once, below
        monkeypatch.setattr(report.plots, plot, lambda cells, path: None)
    path = tmp_path / "e2e.json"

    def run(*arguments):
        status = end_to_end.main([*arguments, "--out", str(path)])
        return status, json.loads(path.read_text())

    return run


def test_it_runs_reports_and_adds_up(run, monkeypatch, tmp_path, capsys):
    status, results = run("--headline")
    headline = len(shapes.WAYS) + len(shapes.OPTIONS)
    everything = headline + len(shapes.WAYS)
    assert status == 0 and len(results["rows"]) == headline
    for row in results["rows"]:
        assert row["headline"] and row["ms_refresh"] > -1e3 and row["peak_bytes"] is None
        assert row.get("tokens_as_peer", 1) == 1 and row.get("logits_error", 0) < 1e-4
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
    index = tmp_path / "README.md"
    index.write_text("before\n<!-- requests -->\n<!-- /requests -->\nafter\n")
    report.write_report(tmp_path / "e2e.json", index)
    assert tables.between_marks(index, "requests") == report.short_table(results)
    for name in ("throughput", "time"):
        assert (tmp_path / f"e2e-{name}.png").stat().st_size > 10_000


def test_of_a_way_that_is_in_several_files_the_last_counts(run, tmp_path):
    _, results = run("--grid", "--only", "llada", "--ways", "dual")
    dual = [row for row in results["rows"] if row["way"] == "plain dual"]
    again = results | {"rows": [row | {"ms_refresh": 7.0} for row in dual][::-1]}
    tables.write_json(tmp_path / "again.json", again)
    merged = tmp_path / "two.json"
    files = [str(tmp_path / name) for name in ("e2e.json", "again.json")]
    end_to_end.main(["--merge", *files, "--out", str(merged)])
    merged = json.loads(merged.read_text())
    assert [row["way"] for row in merged["rows"]] == [row["way"] for row in results["rows"]]
    for row, before in zip(merged["rows"], results["rows"], strict=True):
        assert (row["ms_refresh"] == 7.0) == (row["way"] == "plain dual")
        environment = merged["environments"][row["environment"]]
        assert environment == results["environments"][before["environment"]]


def test_what_is_wrong_or_does_not_fit_is_not_timed(run, monkeypatch, tmp_path):
    decode = Subject.decode

    def failing(self, way, *args, **options):
        if way.name == "plain dual":
            raise torch.OutOfMemoryError("of memory")
        run = decode(self, way, *args, **options)
        if way.name == "dual captured" and run.canvas is not None:
            run.canvas[0, -1] += 1
        return run

    monkeypatch.setattr(Subject, "decode", failing)
    status, results = run("--grid", "--only", "llada")
    rows = {row["way"]: row for row in results["rows"]}
    wrong = "1 of 64 tokens differ from those of eager decoding"
    assert status == 1 and rows["dual captured"]["wrong"] == wrong
    assert rows["plain dual"]["absent"] == "out of memory"
    for name, row in rows.items():
        assert ("ms_refresh" in row) == (name not in ("dual captured", "plain dual"))
    text = (tmp_path / "e2e.md").read_text()
    assert "WRONG: 1 of 64" in text and "| plain dual | out of memory |" in text


def test_a_peer_with_other_logits_is_not_timed(run, monkeypatch):
    error = Subject.logits_error
    monkeypatch.setattr(
        Subject, "logits_error", lambda self, way: 0.5 if way.peer else error(self, way)
    )
    status, results = run("--grid", "--only", "dream", "--ways", "plain dual,dual eager")
    peer, ours = results["rows"]
    assert status == 1 and peer["wrong"] == "the logits are off by 0.500"
    assert "ms_refresh" not in peer and "ms_refresh" in ours


def test_the_embedded_models_answer_alike():
    [entry] = accuracy.accuracy("cpu", 2, models=("tiny-llada",), settings=accuracy.SETTINGS[:1])
    assert entry["solved"]["bf16 captured"] == 2 == entry["same_tokens"]["fp32 captured"]
    assert "| 2 of 2 |" in report.accuracy_table([entry])


def test_bad_choices_are_refused(tmp_path, capsys):
    for arguments in (
        ["--only", "gpt"],
        ["--canvas", "7"],
        ["--merge", "a.json"],
        ["--host", "replaced", "--headline"],
        ["--interface"],
    ):
        with pytest.raises(SystemExit):
            end_to_end.main(arguments)
    said = capsys.readouterr().err
    assert "expected some of llada, dream, got gpt" in said
    assert "--headline: not with --host replaced" in said
    replaced = tables.RESULTS / "replaced-models-nvidia-h200.json"
    with pytest.raises(SystemExit, match="holds results of --host replaced"):
        end_to_end.main(["--grid", "--out", str(replaced)])
    native = tables.RESULTS / "end-to-end-nvidia-h200.json"
    with pytest.raises(ValueError, match="files of one host, got those of native, replaced"):
        end_to_end.main(["--merge", str(native), str(replaced), "--out", str(tmp_path / "x.json")])


def imported_names(tree):
    """(module, name or None) of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


@pytest.mark.parametrize("path", sorted(BENCH.rglob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_use_what_is_public_and_nothing_of_the_tests(path):
    tests = {file.stem for file in BENCH.parent.joinpath("tests").rglob("*.py")}
    mine = {file.stem for file in BENCH.rglob("*.py")}
    tree = ast.parse(path.read_text())
    modules = set()
    for module, name in imported_names(tree):
        assert module.split(".")[0] not in tests - mine, f"{path} imports {module}"
        if module.split(".")[0] == "fastdllm":
            modules.add(name or module)
            assert not (name or "").startswith("_"), f"{path} imports {name} of {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            private = node.value.id in modules and node.attr.startswith("_")
            assert not private, f"{path}:{node.lineno} {node.value.id}.{node.attr}"
