"""bench/end_to_end.py --host replaced: on tiny models every way decodes the same, and what is wrong
is not timed.
"""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import end_to_end  # noqa: E402
from race import interface, measure, shapes  # noqa: E402
from race.hosts import replaced_model  # noqa: E402
from race.subject import Subject  # noqa: E402

# Dream's published config sets the older name, and so does the one restated in bench/published.py.
pytestmark = pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated")
SMALL = dataclasses.replace(
    shapes.SMOKE, canvases={96: 64}, rows=(2,), replaced=((96, 2),), sample=0.001
)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(*arguments) -> (exit status, results, report) of the benchmark at its smallest."""
    monkeypatch.setattr(end_to_end, "SMOKE", SMALL)
    monkeypatch.setattr(end_to_end.timing, "ON_GPU", False)
    monkeypatch.setattr(end_to_end.timing, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(measure, "TURNS", 1)
    monkeypatch.setattr(measure, "FIT_STEPS", (2, 3))
    path = tmp_path / "replaced.json"

    def run(*arguments):
        status = end_to_end.main(["--host", "replaced", *arguments, "--out", str(path)])
        return status, json.loads(path.read_text()), path.with_suffix(".md").read_text()

    return run


def test_every_way_decodes_what_the_native_model_decodes(run, capsys):
    status, results, text = run()
    assert status == 0 and len(results["rows"]) == 2 * len(shapes.REPLACED_WAYS)
    for row in results["rows"]:
        assert row["tokens_as_native"] == 1
        assert row["logits_error"] < 1e-4 and row["ms_refresh"] > -1e3
    classes = {row["class"] for row in results["rows"] if row["host"] != "native"}
    assert classes == {"LlamaForCausalLM", "Qwen2ForCausalLM", "LLaDAModelLM", "DreamModel"}
    assert [check["passed"] for check in results["checks"]] == [True] * 9
    assert "CPU numbers" in text and text.count("| pass |") == 9
    assert text.count("captured step over the native one's") == 4
    assert results["environments"][0]["transformers"]
    run()
    assert "there already" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["llada", "dream"])
@pytest.mark.parametrize("host", ["transformers", "published"])
def test_the_weights_are_views_of_the_native_ones(key, host):
    native = Subject(key, SMALL, torch.device("cpu")).native
    held = {tensor.untyped_storage().data_ptr() for tensor in native.parameters()}
    model = replaced_model(native, host)
    assert {tensor.untyped_storage().data_ptr() for tensor in model.parameters()} == held
    # Whether q, k and v have biases nobody asks once the model is built.
    config = dataclasses.replace(model.fastdllm_adapter.config, qkv_bias=native.config.qkv_bias)
    assert config == native.config


def test_memory_that_models_share_is_counted_once():
    subject = Subject("llada", SMALL, torch.device("cpu"))
    native, transformers, fp8 = (
        shapes.REPLACED_WAYS[0],
        shapes.REPLACED_WAYS[2],
        shapes.Way("fp8", "dual", weights="fp8"),
    )
    subject.model(transformers)
    assert subject.bytes_beside(native) < subject.weight_bytes(native) / 100
    subject.model(fp8)
    beside = subject.bytes_beside(fp8)
    assert beside == pytest.approx(subject.weight_bytes(native), rel=0.01)


def test_what_is_wrong_is_not_timed(run, monkeypatch):
    decode, error = Subject.decode, Subject.logits_error

    def decode_wrongly(self, way, *args, **options):
        run = decode(self, way, *args, **options)
        if way.name == "transformers captured":
            run.canvas[0, -1] += 1
        return run

    def no_error(self, way):
        return float("nan") if way.host == "published" else error(self, way)

    monkeypatch.setattr(Subject, "decode", decode_wrongly)
    monkeypatch.setattr(Subject, "logits_error", no_error)
    status, results, text = run("--grid", "--only", "llada")
    rows = {row["way"]: row for row in results["rows"]}
    assert status == 1 and not results["checks"]
    wrong = "1 of 128 tokens differ from those of eager decoding"
    assert rows["transformers captured"]["wrong"] == wrong
    assert rows["published eager"]["wrong"] == "the logits are off by nan"
    timed = [name for name, row in rows.items() if "ms_step" in row]
    assert timed == ["native eager", "native captured", "transformers eager"]
    assert "WRONG: the logits" in text and text.count("not measured") == 2


def test_an_interface_that_drops_the_padding_fails(run, monkeypatch):
    forward = interface.transformers.LlamaModel.forward

    def without_padding(self, ids, attention_mask, **options):
        if attention_mask.ndim != 4:
            attention_mask = torch.ones_like(attention_mask)
        return forward(self, ids, attention_mask=attention_mask, **options)

    monkeypatch.setattr(interface.transformers.LlamaModel, "forward", without_padding)
    status, results, text = run("--interface")
    passed = [check["passed"] for check in results["checks"]]
    assert status == 1 and passed == [True, False, False] + [True] * 6
    assert text.count("| FAIL |") == 2
