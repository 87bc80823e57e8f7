"""Turn what `pytest bench --benchmark --benchmark-json=RESULTS.json` wrote into tables and, on
request, two plots.

    python bench/report.py RESULTS.json [-o TABLES.md] [--plots FOLDER] [--readme README.md]

Without -o the tables go beside RESULTS.json, and both are named after the GPU: kernels-<gpu>.md,
kernels-<gpu>.json. --readme writes the short tables between the marks `<!-- kernels -->` and `<!--
/kernels -->` of that file.
"""

import argparse
import json
import re
from pathlib import Path

# the targets in microseconds were set for this GPU; on another, floors and peers say how good a
# time is
TARGETS_OF = "H200"


def load(path):
    """(machine_info, {op: {shape: {competitor: extra_info}}}) in the order of the run."""
    results = json.loads(Path(path).read_text())
    ops = {}
    for benchmark in results["benchmarks"]:
        facts = benchmark["extra_info"]
        if TARGETS_OF not in str(results["machine_info"].get("gpu")):
            facts.pop("reach_us", None)
        if "op" in facts:
            ops.setdefault(facts["op"], {}).setdefault(facts["shape"], {})[facts["competitor"]] = (
                facts
            )
    return results["machine_info"], ops


def markdown(machine, ops):
    """The whole report."""
    parts = [
        f"# Kernels on {gpu_name(machine)}",
        environment(machine),
        HOW if machine["gpu"] else ON_A_CPU,
    ]
    parts += [f"## {op}\n\n{table(shapes)}" for op, shapes in ops.items()]
    return "\n\n".join(parts) + "\n"


HOW = """Microseconds of one call: medians of CUDA-graph replays that rotate over independent buffers larger than the L2
cache, competitors in turns within one run (see bench/README.md). *(calls)* marks what no graph can hold: the host's time is
in it. Floor: the bytes or the operations at the ceilings above, whichever takes longer; share: floor / ours. Best peer /
ours above 1 means that ours is faster. Attention's peers do attention only, on rotated queries and keys laid side by side;
ours rotates."""
ON_A_CPU = """**These are CPU numbers**: references on small shapes. They say that the benchmarks work, and nothing about the
kernels."""


def gpu_name(machine):
    return machine["gpu"] or f"a CPU ({machine['cpu']})"


def environment(machine):
    names = ("python", "torch", "triton", "cuda", "cudnn", "flash_attn_4", "flash_attn")
    versions = ", ".join(f"{name} {machine[name]}" for name in names if machine.get(name))
    if not machine["gpu"]:
        return f"Measured with {versions}."
    limits = machine["ceilings"]
    return (
        f"Measured with {versions}; {machine['multiprocessors']} multiprocessors, {machine['l2_bytes'] / 2**20:.0f} MiB of L2. "
        f"Ceilings in the same run: copy {limits['bytes_per_second'] / 1e12:.2f} TB/s, "
        f"bf16 product {limits['operations_per_second'] / 1e12:.0f} TFLOP/s."
    )


def table(shapes):
    """One row for each shape: floor, ours, throughput, share, target, every other competitor."""
    others = list(
        dict.fromkeys(name for entries in shapes.values() for name in entries if name != "ours")
    )
    heads = [
        "shape",
        "floor",
        "ours",
        "share of floor",
        "reach",
        "best peer / ours",
        "throughput",
        *others,
    ]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for shape, entries in shapes.items():
        if "ours" not in entries:
            continue
        ours = entries["ours"]
        lines.append(
            [
                shape,
                number(ours.get("floor_us")),
                f"**{number(ours['us'])}**",
                share(ours),
                reach(ours),
                ratio(ours),
                throughput(ours),
                *(cell(entries.get(name)) for name in others),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# What the README shows: op -> (its heading, shapes, competitors and what they are called there).
SHORT = {
    "block_attention": (
        "`block_attention`, 32 queries, D 128, rotation included",
        [
            "32-32 heads, B 1, T 32, 512 keys",
            "32-32 heads, B 1, T 32, 1024 keys",
            "32-32 heads, B 1, T 32, 4096 keys",
            "32-32 heads, B 8, T 32, 2048 keys",
            "28-4 heads, B 1, T 32, 1024 keys",
            "28-4 heads, B 8, T 32, 2048 keys",
            "28-4 heads, B 32, T 32, 2048 keys",
        ],
        ["SDPA flash", "SDPA cuDNN", "flash-attn-4"],
    ),
    "confidence_select": (
        "`confidence_select`, rule and commit included",
        ["V 126464, 32 rows", "V 126464, 256 rows", "V 126464, 1024 rows", "V 152064, 1024 rows"],
        ["torch.compile", "float32 softmax", "published, float64"],
    ),
}


def short_tables(ops):
    """The README's tables, as Markdown."""
    tables = []
    for op, (heading, shapes, peers) in SHORT.items():
        found = {shape: ops.get(op, {}).get(shape) for shape in shapes}
        lines = [[heading, "floor", "ours", *peers], ["---"] + ["--:"] * (2 + len(peers))]
        for shape, entries in found.items():
            if entries and "ours" in entries:
                ours = entries["ours"]
                cells = (
                    number(ours.get("floor_us")),
                    f"**{number(ours['us'])}**",
                    *(cell(entries.get(name)) for name in peers),
                )
                lines.append([shape.replace(", T 32", ""), *cells])
        tables.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(tables)


def insert(path, name, text):
    """Put the text between the marks `<!-- name -->` and `<!-- /name -->` of a file; ValueError
    where it has none.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, mark, rest = path.read_text().partition(begin)
    _, closing, after = rest.partition(end)
    if not mark or not closing:
        raise ValueError(f"{path}: expected the marks {begin} and {end}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def slug(gpu):
    """The GPU's name as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", (gpu or "cpu").lower()).strip("-")


def number(value):
    """Three digits that matter, at most."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def cell(facts):
    if facts is None:
        return "–"
    return number(facts["us"]) + (" (calls)" if facts["timing"] == "calls" else "")


def share(facts):
    return f"{facts['share_of_floor']:.2f}" if "share_of_floor" in facts else "–"


def reach(facts):
    """The target, and whether it was met."""
    if facts.get("reach_us") is None:
        return "–"
    over = facts["us"] / facts["reach_us"] - 1
    return f"{facts['reach_us']:g} " + (f"missed by {over:.0%}" if over > 0 else "met")


def ratio(facts):
    return (
        f"{facts['best_peer_over_ours']:.2f} ({facts['best_peer']})"
        if "best_peer" in facts
        else "–"
    )


def throughput(facts):
    if facts["tflop_per_s"] > 100:
        return f"{facts['tflop_per_s']:.0f} TFLOP/s"
    return f"{facts['gb_per_s']:.0f} GB/s"


def plots(ops, folder):
    """block-attention.png: microseconds against keys (B 1, 32 heads); select.png: against rows (the
    first vocabulary).
    """
    import matplotlib

    matplotlib.use("Agg")
    Path(folder).mkdir(parents=True, exist_ok=True)
    attention = by_size(ops.get("block_attention", {}), r"32-32 heads, B 1, T 32, (\d+) keys")
    select = by_size(ops.get("confidence_select", {}), r"V 126464, (\d+) rows")
    for name, axis, sizes in (("block-attention", "keys", attention), ("select", "rows", select)):
        if sizes:
            draw(sizes, axis, Path(folder) / f"{name}.png")


def by_size(shapes, pattern):
    """{size: entries} of the shapes that match, the size being the pattern's group."""
    found = ((re.fullmatch(pattern, shape), entries) for shape, entries in shapes.items())
    return {int(match.group(1)): entries for match, entries in sorted(found, key=str) if match}


def draw(sizes, axis, path):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    order = sorted(sizes)
    for name in dict.fromkeys(name for size in order for name in sizes[size]):
        line = [(size, sizes[size][name]["us"]) for size in order if name in sizes[size]]
        axes.plot(
            *zip(*line, strict=True), marker="o", linewidth=3 if name == "ours" else 1.2, label=name
        )
    floor = [
        (size, sizes[size]["ours"]["floor_us"])
        for size in order
        if "floor_us" in sizes[size].get("ours", {})
    ]
    if floor:
        axes.plot(*zip(*floor, strict=True), color="black", linestyle=":", label="floor")
    axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="microseconds")
    axes.set_xticks(order, [str(size) for size in order])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main():
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
    arguments = parser.parse_args()
    machine, ops = load(arguments.results)
    output = arguments.output or arguments.results.parent / f"kernels-{slug(machine['gpu'])}.md"
    if not arguments.output:
        arguments.results.rename(output.with_suffix(".json"))
    output.write_text(markdown(machine, ops))
    print(output)
    if arguments.plots:
        plots(ops, arguments.plots)
    if arguments.readme:
        insert(arguments.readme, "kernels", short_tables(ops))


if __name__ == "__main__":
    main()
