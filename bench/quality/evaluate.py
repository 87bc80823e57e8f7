"""How well a model solves unseen problems, and with how many forwards, for every cache, rule and
block length.

    python bench/quality/evaluate.py MODEL_DIR --out FOLDER [--problems 1000] [--shard 0/2] [--limit-settings TEXT ...]
    python bench/quality/evaluate.py MODEL_DIR --out FOLDER --merge --plot
    python bench/quality/evaluate.py MODEL_DIR --out FOLDER --policies [--weights fp8]

Results go to FOLDER/<model>.json after every setting, those already there are skipped, and a table
of them to FOLDER/<model>.md. A shard writes a file of its own; `--merge` puts the shards together,
`--plot` draws the two plots, and `--card` writes the accuracy into the model's README.md.
`--policies` measures what refreshes may leave out instead, with one cache and rule, for
<model>-policies.*; `--weights` goes to fastdllm.load and into the names of the files.

accuracy: the answer ends in `#### n` with the right n. exact: the whole worked answer is right,
letter for letter. tokens per forward: generated tokens before the first end-of-text, over all
problems, divided by all forwards (NFE), full and cached.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from problems import Problem, make_problem
from tokenizer import prompt_of
from tokenizers import Tokenizer

GEN_LENGTH = 128
CACHES = ("none", "prefix", "dual")
BLOCK_LENGTHS, SWEPT_LENGTHS = (16, 32), (8, 64, 128)  # the swept ones with two rules only
POLICY_LENGTHS = (
    32,
    16,
    8,
    # in four blocks of 32 a suffix of four cannot matter, nor a fifth refresh: hence shorter ones too
)
VANILLA, PARALLEL = "1 a step", "threshold 0.9"
# What a refresh leaves out, by the name it is told by (CachePolicy's fields): prompt kept always,
# or for four; short suffixes.
POLICIES = {
    "off": {},
    "prompt_refreshes 0": {"prompt_refreshes": 0},
    "prompt_refreshes 4": {"prompt_refreshes": 4},
    **{f"suffix_blocks {w}": {"suffix_blocks": w} for w in (1, 2, 4)},
    **{
        f"prompt_refreshes 0, suffix_blocks {w}": {"prompt_refreshes": 0, "suffix_blocks": w}
        for w in (2, 4)
    },
}
SHOWN = (
    "accuracy",
    "exact",
    "tokens_per_forward",
    "nfe",
    "refreshes",
    "cached_steps",
    "text_tokens",
)


def rules() -> dict[str, Callable]:
    """Rule name -> (block length -> rule)."""
    from fastdllm import Factor, Quota, Threshold

    quotas = {f"{n} a step": lambda length, n=n: Quota(length // n) for n in (1, 2, 4)}
    thresholds = {
        f"threshold {tau}": lambda length, tau=tau: Threshold(tau)
        for tau in (0.5, 0.6, 0.7, 0.8, 0.9)
    }
    return (
        quotas
        | thresholds
        | {f"factor {f}": lambda length, f=f: Factor(f) for f in (0.7, 1.0, 1.3)}
    )


def all_settings() -> list[dict]:
    """Every setting, vanilla decoding first."""
    settings = [
        {"cache": c, "rule": r, "block_length": b}
        for b in BLOCK_LENGTHS
        for r in rules()
        for c in CACHES
    ]
    return settings + [
        {"cache": c, "rule": r, "block_length": b}
        for b in SWEPT_LENGTHS
        for r in (VANILLA, PARALLEL)
        for c in CACHES
    ]


def policy_settings() -> list[dict]:
    """The settings of `--policies`, for each block length the one that leaves nothing out first."""
    return [
        {"cache": "dual", "rule": PARALLEL, "block_length": length, "policy": policy}
        for length in POLICY_LENGTHS
        for policy in POLICIES
    ]


def key_of(setting: dict) -> str:
    """Its name, as `--limit-settings` matches it: `dual/threshold 0.9/32`, with the policy last
    where it names one.
    """
    return "/".join(
        str(setting[name])
        for name in ("cache", "rule", "block_length", "policy")
        if name in setting
    )


def final_number(text: str) -> int | None:
    """The number that an answer ends in, after `####`; None where it does not."""
    found = re.search(r"####\s*(-?\d+)\s*$", text)
    return int(found.group(1)) if found else None


def score(problem: Problem, generated: list[int], tokenizer, stop_ids) -> tuple[bool, bool, int]:
    """(final number right, whole answer right, tokens before the first stop) of one generated
    canvas part.
    """
    length = next((i for i, token in enumerate(generated) if token in stop_ids), len(generated))
    text = tokenizer.decode(generated[:length], skip_special_tokens=False)
    return final_number(text) == problem.final, text.strip() == problem.answer_text, length


def measure(model, tokenizer, problems: list[Problem], setting: dict, rows: int) -> dict:
    """Decode all problems, `rows` at a time, and return the setting with its scores; counts are
    means per problem.
    """
    from fastdllm import CachePolicy, generate

    policy = CachePolicy(**POLICIES[setting.get("policy", "off")])
    rule = rules()[setting["rule"]](setting["block_length"])
    prompts = [torch.tensor(tokenizer.encode(prompt_of(problem)).ids) for problem in problems]
    scores, counts = [], torch.zeros(3, dtype=torch.int64)
    for first in range(0, len(problems), rows):
        part = prompts[first : first + rows]
        done = generate(
            model,
            part,
            gen_length=GEN_LENGTH,
            block_length=setting["block_length"],
            cache=setting["cache"],
            rule=rule,
            policy=policy,
        )
        counts += torch.stack([done.nfe.sum(), done.refreshes.sum(), done.cached_steps.sum()]).cpu()
        for problem, prompt, tokens in zip(
            problems[first : first + rows], part, done.tokens, strict=True
        ):
            scores.append(
                score(problem, tokens[len(prompt) :].tolist(), tokenizer, model.config.stop_ids)
            )
    accuracy, exact, text = (sum(column) / len(problems) for column in zip(*scores, strict=True))
    nfe, refreshes, cached = (counts.double() / len(problems)).tolist()
    values = (accuracy, exact, text / nfe, nfe, refreshes, cached, text)
    return setting | {name: round(value, 4) for name, value in zip(SHOWN, values, strict=True)}


def environment(device: str) -> dict:
    """What the numbers were measured with."""
    versions = {}
    for package in ("torch", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        commit = None
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {
        "gpu": gpu,
        **versions,
        "python": platform.python_version(),
        "date": today,
        "commit": commit,
    }


def evaluate(args: argparse.Namespace, path: Path) -> dict:
    """Measure the settings asked for that `path` does not hold yet, writing it after each."""
    from fastdllm import load

    weights = {"weights": args.weights} if args.weights else {}
    model = load(args.model, device=args.device, dtype=getattr(torch, args.dtype), **weights)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    problems = [make_problem(index, "test") for index in range(args.problems)]
    head = {
        "model": args.model.name,
        "problems": args.problems,
        "split": "test",
        "gen_length": GEN_LENGTH,
    }
    head |= {"dtype": args.dtype, **weights}
    report = head | {"environment": environment(args.device), "results": []}
    if path.exists():
        before = json.loads(path.read_text())
        if any(before[name] != value for name, value in head.items()):
            raise ValueError(
                f"{path}: holds results of another model, split, number of problems or dtype; move it away"
            )
        report["results"] = before["results"]
    index, count = (int(number) for number in args.shard.split("/"))
    for setting in (policy_settings() if args.policies else all_settings())[index::count]:
        key = key_of(setting)
        wanted = not args.limit_settings or any(text in key for text in args.limit_settings)
        if wanted and key not in map(key_of, report["results"]):
            report["results"].append(measure(model, tokenizer, problems, setting, args.rows))
            print(
                f"{key:28}",
                *(f"{name} {report['results'][-1][name]}" for name in SHOWN[:4]),
                flush=True,
            )
            write_report(report, path)
    return report


def write_report(report: dict, path: Path) -> None:
    """The report as JSON, one line a setting, in place of the old file."""
    lines = ",\n".join(f"  {json.dumps(result)}" for result in report["results"])
    head = json.dumps(report | {"results": []}, indent=1).removesuffix("[]\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(f"{head}[\n{lines}\n]}}\n")
    fresh.replace(path)


def merge(paths: list[Path]) -> dict:
    """One report of several shards, in the order of the settings; ValueError where they differ in
    anything else.
    """
    reports = [json.loads(path.read_text()) for path in paths]
    if not reports:
        raise ValueError("merge: found no results")
    for name in ("model", "problems", "gen_length", "dtype"):
        if len({report[name] for report in reports}) > 1:
            raise ValueError(f"merge: the shards differ in {name}")
    found = {key_of(result): result for report in reports for result in report["results"]}
    keys = map(key_of, all_settings() + policy_settings())
    return reports[0] | {"results": [found[key] for key in keys if key in found]}


def table(report: dict) -> str:
    """The report as Markdown."""
    where = ", ".join(f"{name} {value}" for name, value in report["environment"].items() if value)
    kind = report["dtype"] + (f", {report['weights']} weights" if "weights" in report else "")
    lines = [
        f"# {report['model']}: {report['problems']} unseen problems, gen_length {report['gen_length']}, {kind}",
        f"\n{where}. Accuracy in %; counts are means per problem; tokens are those before the end of text.\n",
        "| block | rule | cache | accuracy | whole answer | tokens/forward | NFE | refreshes | cached steps |",
        "|--:|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for r in report["results"]:
        percent = f"{100 * r['accuracy']:.1f} | {100 * r['exact']:.1f}"
        counts = " | ".join(f"{r[name]:.1f}" for name in ("nfe", "refreshes", "cached_steps"))
        cache = f"{r['cache']}, {r['policy']}" if "policy" in r else r["cache"]
        row = f"{r['block_length']} | {r['rule']} | {cache} | {percent} | {r['tokens_per_forward']:.2f} | {counts}"
        lines.append(f"| {row} |")
    return "\n".join(lines) + "\n"


def plot(report: dict, folder: Path) -> None:
    """<model>-parallel.png: accuracy against tokens per forward; <model>-blocks.png: accuracy
    against block length.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {"threshold": "o-", "factor": "^-.", "a step": "s--"}
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axes, length in zip(panels, BLOCK_LENGTHS, strict=True):
        _curves(
            axes, report, "tokens_per_forward", styles, lambda r, n=length: r["block_length"] == n
        )
        axes.set(xlabel="tokens per forward", title=f"{report['model']}, block length {length}")
    _finish(figure, panels[0], folder / f"{report['model']}-parallel.png")
    figure, axes = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    _curves(axes, report, "block_length", {VANILLA: "s--", PARALLEL: "o-"}, lambda r: True)
    lengths = sorted({*BLOCK_LENGTHS, *SWEPT_LENGTHS})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, map(str, lengths))
    axes.set(xlabel="block length", title=report["model"])
    _finish(figure, axes, folder / f"{report['model']}-blocks.png")


def _curves(axes, report, across, styles, wanted) -> None:
    """One curve a cache and kind of rule (a part of its name, with its style) through the results
    that are wanted.
    """
    for kind, style in styles.items():
        for cache, color in zip(CACHES, ("C0", "C1", "C2"), strict=True):
            results = [
                r
                for r in report["results"]
                if wanted(r) and kind in r["rule"] and r["cache"] == cache
            ]
            points = sorted((r[across], 100 * r["accuracy"]) for r in results)
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color + style,
                ms=4,
                label=f"{kind}, {cache}",
            )
    axes.grid(alpha=0.3)


def _finish(figure, axes, path) -> None:
    axes.set(ylabel="problems solved, %")
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside right",
        fontsize="small",
        title="rule, cache",
    )
    figure.savefig(path, dpi=120)


def update_card(folder: Path, report: dict) -> None:
    """Put the accuracy of vanilla and of parallel cached decoding into the model card's accuracy
    line.
    """
    found = {key_of(result): result for result in report["results"]}
    parts = []
    for label, key in (
        ("one token a step", f"none/{VANILLA}/32"),
        ("threshold 0.9 and dual cache", f"dual/{PARALLEL}/32"),
    ):
        if key in found:
            r = found[key]
            parts.append(
                f"{100 * r['accuracy']:.1f}% with {label} ({100 * r['exact']:.1f}% letter for letter, "
                f"{r['tokens_per_forward']:.1f} tokens a forward)"
            )
    line = (
        f"- Accuracy on {report['problems']} unseen problems, block length 32: {'; '.join(parts)}."
    )
    card = folder / "README.md"
    text, count = re.subn(
        r"^- Accuracy.*$", lambda _: line, card.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    if count != 1 or not parts:
        raise ValueError(f"{card}: expected one accuracy line and results for block length 32")
    card.write_text(text, encoding="utf-8")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=250, help="problems decoded in one batch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--weights", choices=("fp8",), help="how the weights are held: fastdllm.load's own argument"
    )
    parser.add_argument(
        "--policies", action="store_true", help="measure CachePolicies instead of caches and rules"
    )
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th setting from the i-th on")
    parser.add_argument(
        "--limit-settings", nargs="+", metavar="TEXT", help="only settings whose name holds a TEXT"
    )
    parser.add_argument(
        "--merge", action="store_true", help="measure nothing, put the shards in FOLDER together"
    )
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--card", action="store_true")
    args = parser.parse_args(argv)
    args.model = args.model.resolve()
    name = "-".join(
        filter(None, (args.model.name, args.weights, "policies" if args.policies else None))
    )
    path = args.out / f"{name}.json"
    if args.merge:
        report = merge(sorted(args.out.glob(f"{name}.*json")))
        write_report(report, path)
    else:
        sharded = args.shard != "0/1"
        path = path.with_suffix(f".{args.shard.replace('/', '-of-')}.json") if sharded else path
        report = evaluate(args, path)
    if args.merge or args.shard == "0/1":
        path.with_suffix(".md").write_text(table(report), encoding="utf-8")
    if args.plot:
        plot(report, args.out)
    if args.card:
        update_card(args.model, report)


if __name__ == "__main__":
    main()
