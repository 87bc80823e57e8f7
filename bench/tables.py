"""Results of the benchmarks, on disk and as Markdown: what all of them share.

A results file is JSON with one row a line, so that a diff shows which rows were measured anew. What
a row means, and which columns its table has, each benchmark says itself.
"""

import json
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
# The GPU for which targets in seconds and microseconds were set. On another one, floors and peers
# say how good a time is.
TARGETS_OF = "H200"
# What an environment's line names, in this order, where the results have it.
NAMED = (
    "gpu",
    "driver",
    "python",
    "torch",
    "triton",
    "cuda",
    "cudnn",
    "transformers",
    "flash_attn_4",
    "flash_attn",
    "date",
    "commit",
)
NONE = "–"  # a cell of a table without a value


def slug(gpu: str | None) -> str:
    """The GPU's name as a part of a file name; "cpu" without a GPU."""
    return re.sub(r"[^a-z0-9]+", "-", (gpu or "cpu").lower()).strip("-")


def write_json(path: Path, results: dict) -> None:
    """Write results in place of the old file: JSON, the items of every list one a line."""
    parts = [f" {json.dumps(name)}: {_one_a_line(value)}" for name, value in results.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    fresh.replace(path)


def _one_a_line(value) -> str:
    if not isinstance(value, list) or not value:
        return json.dumps(value)
    lines = ",\n".join(f"  {json.dumps(item)}" for item in value)
    return f"[\n{lines}\n ]"


def environment(device) -> dict:
    """Versions, and of a GPU its name and driver, as recorded beside every result."""
    facts = {
        "gpu": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
    }
    if torch.device(device).type != "cuda":
        return facts
    return facts | {
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def installed(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:
        return None


def driver() -> str | None:
    """The driver's version as nvidia-smi says it; None where that is missing."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.splitlines()
    return lines[0].strip() if lines else None


def command(script: str) -> str:
    """The command line of this process, of paths only the names."""
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return " ".join([f"python bench/{script}", *words])


def measured_with(facts: dict) -> str:
    """An environment as one line of text."""
    parts = [", ".join(f"{name} {facts[name]}" for name in NAMED if facts.get(name))]
    if facts.get("multiprocessors"):
        parts.append(f"{facts['multiprocessors']} SMs, {facts['l2_bytes'] / 2**20:.0f} MiB of L2")
    if facts.get("ceilings"):
        copy = facts["ceilings"]["bytes_per_second"] / 1e12
        product = facts["ceilings"]["operations_per_second"] / 1e12
        parts.append(
            f"ceilings in the same run: copy {copy:.2f} TB/s, bf16 product {product:.0f} TFLOP/s"
        )
    return "; ".join(parts)


def runs(environments: list[dict]) -> str:
    """A Markdown list of the commands that measured, and with what."""
    lines = [f"- `{facts['command']}`: {measured_with(facts)}" for facts in environments]
    return "\n".join(dict.fromkeys(lines))


def table(heads, rows, align: str | None = None) -> str:
    """A Markdown table. align: "l" or "r" for each column; default the first left, the others,
    numbers, right. A row may have fewer cells than there are columns.
    """
    align = align or "l" + "r" * (len(heads) - 1)
    rule = ["---:" if side == "r" else "---" for side in align]
    lines = []
    for cells in (heads, rule, *rows):
        missing = [""] * (len(heads) - len(cells))
        lines.append(f"| {' | '.join(map(str, [*cells, *missing]))} |")
    return "\n".join(lines)


def number(value: float | None) -> str:
    """At most three digits that matter, but all digits before the point."""
    if value is None:
        return NONE
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def share(value: float | None) -> str:
    """A ratio with two decimals."""
    return NONE if value is None else f"{value:.2f}"


def times(value: float | None) -> str:
    """A ratio as in "2.73x" and "39.3x"."""
    if value is None:
        return NONE
    return f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def insert(path: Path, name: str, text: str) -> None:
    """Put the text between the marks `<!-- name -->` and `<!-- /name -->` of a file; ValueError
    where it has none.
    """
    before, _, after = _around_marks(path, name)
    path.write_text(f"{before}\n{text}\n{after}", encoding="utf-8")


def between_marks(path: Path, name: str) -> str:
    """What `insert` put there."""
    _, text, _ = _around_marks(path, name)
    return text.strip("\n")


def _around_marks(path: Path, name: str) -> tuple[str, str, str]:
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, opening, rest = path.read_text(encoding="utf-8").partition(begin)
    text, closing, after = rest.partition(end)
    if not opening or not closing:
        raise ValueError(f"{path}: expected the marks {begin} and {end}")
    return before + begin, text, end + after


def pyplot():
    """matplotlib's pyplot, drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def log_ticks(axes, values, base: int = 10) -> None:
    """Make the x axis of matplotlib axes logarithmic, with plain numbers at these values alone."""
    axes.set_xscale("log", base=base)
    axes.set_xticks(values, map(str, values))
    axes.minorticks_off()
