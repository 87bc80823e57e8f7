"""bench/results: the committed results are read, and its index and reports say what they hold."""

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import report as kernels  # noqa: E402
import tables  # noqa: E402
from load_parts import report as load  # noqa: E402
from quality import evaluate  # noqa: E402
from race import replaced_report  # noqa: E402
from race import report as requests  # noqa: E402

RESULTS = tables.RESULTS
INDEX = RESULTS / "README.md"
# The files that the short tables are made of.
GPU = "nvidia-h200"


def loaded(name):
    return json.loads((RESULTS / name).read_text())


@pytest.mark.parametrize(
    "mark, text",
    [
        ("accuracy", lambda: evaluate.accuracy_table(RESULTS)),
        ("options", lambda: evaluate.options_table(RESULTS)),
        ("kernels", lambda: kernels.short_tables(kernels.load(RESULTS / f"kernels-{GPU}.json")[1])),
        ("requests", lambda: requests.short_table(loaded(f"end-to-end-{GPU}.json"))),
        ("replaced", lambda: replaced_report.short_table(loaded(f"replaced-models-{GPU}.json"))),
    ],
)
def test_the_index_shows_what_the_files_hold(mark, text):
    assert tables.between_marks(INDEX, mark) == text()


KINDS = ("kernels", "end-to-end", "load", "replaced-models", "tiny")
REPORTED = [path for kind in KINDS for path in sorted(RESULTS.glob(f"{kind}-*.json"))]


def reported(path):
    """What the benchmark of that results file says of it."""
    if path.name.startswith("kernels"):
        return kernels.markdown(*kernels.load(path))
    results = json.loads(path.read_text())
    if path.name.startswith("load"):
        return load.markdown(results)
    if path.name.startswith("replaced"):
        return replaced_report.markdown(results)
    if path.name.startswith("end-to-end"):
        return requests.markdown(results)
    return evaluate.markdown(results)


@pytest.mark.parametrize("path", REPORTED, ids=lambda path: path.stem)
def test_a_report_is_made_of_its_results_and_nothing_else(path):
    assert path.with_suffix(".md").read_text() == reported(path)


def test_the_index_names_every_file_and_links_to_none_that_is_missing():
    text = INDEX.read_text()
    linked = re.findall(r"\]\(((?!https?:)[^)#]+)\)", text)
    assert linked and all((RESULTS / path).exists() for path in linked)
    patterns = [
        r"README\.md",
        r"end-to-end-.*-(throughput|time)\.png",
        r"tiny-.*-(parallel|blocks)\.png",
    ]
    for path in RESULTS.iterdir():
        named = path.name in linked or path.with_suffix(".md").name in linked
        assert named or any(re.fullmatch(pattern, path.name) for pattern in patterns), path.name


def test_marks_are_needed_and_what_stood_around_them_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nafter\n")
    tables.insert(page, "a", "new")
    assert page.read_text() == "before\n<!-- a -->\nnew\n<!-- /a -->\nafter\n"
    with pytest.raises(ValueError, match="expected the marks <!-- b --> and <!-- /b -->"):
        tables.insert(page, "b", "new")


def test_results_come_back_as_they_were_written(tmp_path):
    results = {"environments": [], "rows": [{"a": 1}, {"b": None}], "accuracy": {"c": "–"}}
    tables.write_json(tmp_path / "r.json", results)
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text) == results
    assert text.count("\n") == 8, "one row a line"
    assert not (tmp_path / "r.new").exists()
