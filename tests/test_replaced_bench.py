"""bench/replaced_models.py: on tiny models every way decodes the same, and what is wrong is not
timed.
"""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import end_to_end_race as race  # noqa: E402
import replaced_models as bench  # noqa: E402

# Dream's published config sets the older name, and so does the one restated in test_patch.py.
pytestmark = pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(*arguments) -> (exit status, results, report) of the benchmark at its smallest."""
    monkeypatch.setattr(
        race, "SMOKE", dataclasses.replace(race.SMOKE, canvases={96: 64}, rows=(2,), sample=0.001)
    )
    monkeypatch.setattr(bench, "SMOKE_SHAPES", ((96, 2),))
    monkeypatch.setattr(bench.timing, "ON_GPU", False)
    monkeypatch.setattr(bench.timing, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(race, "TURNS", 1)
    monkeypatch.setattr(race, "FIT_STEPS", (2, 3))
    path = tmp_path / "replaced.json"

    def run(*arguments):
        status = bench.main([*arguments, "--out", str(path)])
        return status, json.loads(path.read_text()), path.with_suffix(".md").read_text()

    return run


def test_every_way_decodes_what_the_native_model_decodes(run):
    status, results, text = run()
    assert status == 0 and len(results["rows"]) == 2 * len(bench.WAYS)
    for row in results["rows"]:
        assert (
            row["tokens_as_native"] == 1 and row["logits_error"] < 1e-4 and row["ms_refresh"] > -1e3
        )
    classes = {row["class"] for row in results["rows"] if row["host"] != "native"}
    assert classes == {"LlamaForCausalLM", "Qwen2ForCausalLM", "LLaDAModelLM", "DreamModel"}
    assert [check["passed"] for check in results["checks"]] == [True] * 9
    assert (
        "CPU numbers" in text
        and text.count("captured step over the native one's") == 4
        and text.count("| pass |") == 9
    )


def test_the_weights_are_views_of_the_native_ones():
    native = race.Subject("dream", race.SMOKE, torch.device("cpu"))
    held = {tensor.untyped_storage().data_ptr() for tensor in native.model.parameters()}
    for host in bench.hosts_of(native.config).values():
        model = bench.replaced(native, host).model
        assert {tensor.untyped_storage().data_ptr() for tensor in model.model.parameters()} == held
        assert model.config == native.config


def test_what_is_wrong_is_not_timed(run, monkeypatch):
    decode, error = race.Subject.decode, bench.logits_error

    def decode_wrongly(self, way, *args, **kwargs):
        canvas, *forwards = decode(self, way, *args, **kwargs)
        if way.name == "transformers captured":
            canvas[0, -1] += 1
        return canvas, *forwards

    monkeypatch.setattr(race.Subject, "decode", decode_wrongly)
    monkeypatch.setattr(
        bench,
        "logits_error",
        lambda a, b: (
            float("nan")
            if hasattr(b.model, "replaced") and type(b.model.model).__name__ == "LLaDAModelLM"
            else error(a, b)
        ),
    )
    status, results, text = run("--only", "llada")
    rows = {row["way"]: row for row in results["rows"]}
    assert status == 1 and not results["checks"]
    assert (
        rows["transformers captured"]["wrong"]
        == "1 of 128 tokens differ from those of eager decoding"
    )
    assert rows["published eager"]["wrong"] == "the logits are off by nan"
    timed = [name for name, row in rows.items() if "ms_step" in row]
    assert timed == ["native eager", "native captured", "transformers eager"]
    assert "WRONG: the logits" in text and text.count("not measured") == 2


def test_an_interface_that_drops_the_padding_fails(run, monkeypatch):
    forward = bench.transformers.LlamaModel.forward

    def without_padding(self, ids, attention_mask, **options):
        attention_mask = (
            attention_mask if attention_mask.ndim == 4 else torch.ones_like(attention_mask)
        )
        return forward(self, ids, attention_mask=attention_mask, **options)

    monkeypatch.setattr(bench.transformers.LlamaModel, "forward", without_padding)
    status, results, text = run("--only", "interface")
    assert (
        status == 1
        and [check["passed"] for check in results["checks"]] == [True, False, False] + [True] * 6
    )
    assert text.count("| FAIL |") == 2


def test_bad_choices_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--only", "gpt", "--out", "x.json"])
    assert "expected some of llada, dream, interface, got gpt" in capsys.readouterr().err
