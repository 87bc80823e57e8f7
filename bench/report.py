"""Turn what `pytest bench --benchmark --benchmark-json=RESULTS.json` wrote into tables and, on
request, two plots.

    python bench/report.py RESULTS.json [-o TABLES.md] [--plots FOLDER] [--readme FILE]

Without -o the tables go beside RESULTS.json, and both are named after the GPU: kernels-<gpu>.md,
kernels-<gpu>.json. --readme writes the short tables between the marks `<!-- kernels -->` and
`<!-- /kernels -->` of that file.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

import tables
from tables import NONE, number

HOW = """\
Microseconds of one call: medians of CUDA graph replays that rotate over independent buffers larger
than the L2 cache, competitors in turns within one run (see bench/README.md). *(calls)* marks what
no CUDA graph can hold: the host's time is in it. Floor: the bytes or the operations at the ceilings
above, whichever takes longer; share: floor / ours. Best peer / ours above 1 means that ours is
faster. Attention's peers do attention only, on rotated queries and keys laid side by side; ours
rotates."""
ON_A_CPU = """\
**These are CPU numbers**: references on small shapes. They say that the benchmarks work, and
nothing about the kernels."""
HEADS = ("shape", "floor", "ours", "share of floor", "reach", "best peer / ours", "throughput")


@dataclass(frozen=True)
class ShortTable:
    """What the index of results shows of one op: these shapes and these competitors."""

    op: str
    heading: str
    shapes: tuple[str, ...]
    peers: tuple[str, ...]


SHORT = (
    ShortTable(
        "block_attention",
        "`block_attention`, 32 queries, D 128, rotation included",
        (
            "32-32 heads, B 1, T 32, 512 keys",
            "32-32 heads, B 1, T 32, 1024 keys",
            "32-32 heads, B 1, T 32, 4096 keys",
            "32-32 heads, B 8, T 32, 2048 keys",
            "28-4 heads, B 1, T 32, 1024 keys",
            "28-4 heads, B 8, T 32, 2048 keys",
            "28-4 heads, B 32, T 32, 2048 keys",
        ),
        ("SDPA flash", "SDPA cuDNN", "flash-attn-4"),
    ),
    ShortTable(
        "confidence_select",
        "`confidence_select`, rule and commit included",
        ("V 126464, 32 rows", "V 126464, 256 rows", "V 126464, 1024 rows", "V 152064, 1024 rows"),
        ("torch.compile", "float32 softmax", "published, float64"),
    ),
)


def load(path):
    """Read pytest-benchmark's file: (machine_info, {op: {shape: {competitor: extra_info}}}) in the
    order of the run.
    """
    results = json.loads(Path(path).read_text())
    machine = results["machine_info"]
    ops = {}
    for benchmark in results["benchmarks"]:
        facts = benchmark["extra_info"]
        if "op" not in facts:
            continue
        if tables.TARGETS_OF not in str(machine.get("gpu")):
            facts.pop("reach_us", None)
        shapes = ops.setdefault(facts["op"], {})
        shapes.setdefault(facts["shape"], {})[facts["competitor"]] = facts
    return machine, ops


def markdown(machine, ops) -> str:
    """The whole report."""
    where = machine["gpu"] or f"a CPU ({machine['cpu']})"
    parts = [
        f"# Kernels on {where}",
        f"Measured with {tables.measured_with(machine)}.",
        HOW if machine["gpu"] else ON_A_CPU,
    ]
    parts += [f"## {op}\n\n{op_table(shapes)}" for op, shapes in ops.items()]
    return "\n\n".join(parts) + "\n"


def op_table(shapes) -> str:
    """One row for each shape: floor, ours, throughput, share, target, every other competitor."""
    names = dict.fromkeys(name for entries in shapes.values() for name in entries)
    others = [name for name in names if name != "ours"]
    rows = []
    for shape, entries in shapes.items():
        if "ours" not in entries:
            continue
        ours = entries["ours"]
        cells = [
            shape,
            number(ours.get("floor_us")),
            f"**{number(ours['us'])}**",
            tables.share(ours.get("share_of_floor")),
            target(ours),
            best_peer(ours),
            throughput(ours),
        ]
        rows.append(cells + [time_of(entries.get(name)) for name in others])
    return tables.table([*HEADS, *others], rows)


def short_tables(ops) -> str:
    """The tables of the index of results, as Markdown."""
    return "\n\n".join(_short_table(short, ops.get(short.op, {})) for short in SHORT)


def _short_table(short, measured) -> str:
    rows = []
    for shape in short.shapes:
        entries = measured.get(shape, {})
        if "ours" not in entries:
            continue
        ours = entries["ours"]
        cells = [
            shape.replace(", T 32", ""),
            number(ours.get("floor_us")),
            f"**{number(ours['us'])}**",
        ]
        rows.append(cells + [time_of(entries.get(name)) for name in short.peers])
    return tables.table([short.heading, "floor", "ours", *short.peers], rows)


def time_of(facts) -> str:
    """A competitor's microseconds, marked where the host's time is in them."""
    if facts is None:
        return NONE
    mark = " (calls)" if facts["timing"] == "calls" else ""
    return number(facts["us"]) + mark


def target(facts) -> str:
    """The target in microseconds, and whether it was met."""
    reach = facts.get("reach_us")
    if reach is None:
        return NONE
    over = facts["us"] / reach - 1
    verdict = f"missed by {over:.0%}" if over > 0 else "met"
    return f"{reach:g} {verdict}"


def best_peer(facts) -> str:
    """The best peer's time over ours, and which peer it is."""
    if "best_peer" not in facts:
        return NONE
    return f"{facts['best_peer_over_ours']:.2f} ({facts['best_peer']})"


def throughput(facts) -> str:
    """Operations a second where they bound the time, else bytes a second."""
    if facts["tflop_per_s"] > 100:
        return f"{facts['tflop_per_s']:.0f} TFLOP/s"
    return f"{facts['gb_per_s']:.0f} GB/s"


def plots(ops, folder) -> None:
    """Draw block-attention.png, microseconds against keys (B 1, 32 heads), and select.png, against
    rows (the first vocabulary).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    keys = by_size(ops.get("block_attention", {}), r"32-32 heads, B 1, T 32, (\d+) keys")
    rows = by_size(ops.get("confidence_select", {}), r"V 126464, (\d+) rows")
    if keys:
        draw(keys, "keys", folder / "block-attention.png")
    if rows:
        draw(rows, "rows", folder / "select.png")


def by_size(shapes, pattern):
    """{size: entries} of the shapes that match, the size being the pattern's group; sorted."""
    found = {}
    for shape, entries in shapes.items():
        match = re.fullmatch(pattern, shape)
        if match:
            found[int(match.group(1))] = entries
    return dict(sorted(found.items()))


def draw(sizes, label, path) -> None:
    """One line a competitor, and the floor, over the sizes; both axes logarithmic."""
    pyplot = tables.pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name in dict.fromkeys(name for entries in sizes.values() for name in entries):
        points = [(size, entries[name]["us"]) for size, entries in sizes.items() if name in entries]
        width = 3 if name == "ours" else 1.2
        axes.plot(*zip(*points, strict=True), marker="o", linewidth=width, label=name)
    floor = [
        (size, entries["ours"]["floor_us"])
        for size, entries in sizes.items()
        if "floor_us" in entries.get("ours", {})
    ]
    if floor:
        axes.plot(*zip(*floor, strict=True), color="black", linestyle=":", label="floor")
    axes.set(yscale="log", xlabel=label, ylabel="microseconds")
    tables.log_ticks(axes, list(sizes))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument(
        "--plots",
        type=Path,
        metavar="FOLDER",
        help="also draw the two plots there (needs matplotlib)",
    )
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="also put the short tables between its marks"
    )
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse(argv)
    machine, ops = load(args.results)
    output = args.output
    if output is None:
        output = args.results.with_name(f"kernels-{tables.slug(machine['gpu'])}.md")
        args.results.rename(output.with_suffix(".json"))
    output.write_text(markdown(machine, ops))
    print(output)
    if args.plots:
        plots(ops, args.plots)
    if args.readme:
        tables.insert(args.readme, "kernels", short_tables(ops))


if __name__ == "__main__":
    main()
