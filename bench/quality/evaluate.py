"""How well a model solves unseen problems, and with how many forwards, for every cache, rule and
block length.

    python bench/quality/evaluate.py MODEL_DIR --out FOLDER [--task chains] [--problems 1000]
                                     [--shard 0/2]
                                     [--limit-settings TEXT ...]
    python bench/quality/evaluate.py MODEL_DIR --out FOLDER --merge --plot [--readme FILE]
    python bench/quality/evaluate.py MODEL_DIR --out FOLDER --policies [--weights fp8]

Results go to FOLDER/<model>.json after every setting, those already there are skipped, and a table
of them to FOLDER/<model>.md. A shard writes a file of its own; `--merge` puts the shards together,
`--plot` draws the two plots, and `--card` writes the accuracy into the model's README.md.
`--policies` measures what refreshes may leave out instead, with one cache and rule, for
<model>-policies.*; `--weights` goes to fastdllm.load and into the names of the files. `--readme`
puts short tables of all that FOLDER holds of the two shipped models between the marks
`<!-- accuracy -->` and `<!-- options -->` of a file.

accuracy: the answer ends in `#### n` with the right n. exact: the whole worked answer is right:
letter for letter, or for chains every line in one of its wordings with the right numbers. Both have
Wilson's interval of 95 %. For chains the report ends in what the models were made to meet. tokens
per forward: generated tokens before the first end-of-text, over all problems, divided by all
forwards (NFE), full and cached.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/, where it runs as a script

import tables  # noqa: E402
from tiny_models.problems import Problem  # noqa: E402
from tiny_models.tasks import TASKS  # noqa: E402
from tiny_models.tokenizer import prompt_of  # noqa: E402

CACHES = ("none", "prefix", "dual")
BLOCK_LENGTHS = (16, 32)
SWEPT_LENGTHS = (8, 64, 128)  # with the two rules below only
VANILLA = "1 a step"
PARALLEL = "threshold 0.9"
Z = 1.959964  # the normal quantile of 95 % intervals
# Of the policies. In four blocks of 32 a suffix of four cannot matter, nor a fifth refresh: hence
# shorter ones too.
POLICY_LENGTHS = (32, 16, 8)
# What a refresh leaves out, by the name in the table: fields of CachePolicy.
POLICIES = {
    "off": {},
    "prompt_refreshes 0": {"prompt_refreshes": 0},
    "prompt_refreshes 4": {"prompt_refreshes": 4},
    "suffix_blocks 1": {"suffix_blocks": 1},
    "suffix_blocks 2": {"suffix_blocks": 2},
    "suffix_blocks 4": {"suffix_blocks": 4},
    "prompt_refreshes 0, suffix_blocks 2": {"prompt_refreshes": 0, "suffix_blocks": 2},
    "prompt_refreshes 0, suffix_blocks 4": {"prompt_refreshes": 0, "suffix_blocks": 4},
    "prompt_refreshes 0, keep_finished": {"prompt_refreshes": 0, "keep_finished": True},
    "prompt_refreshes 0, suffix_blocks 4, keep_finished": {
        "prompt_refreshes": 0,
        "suffix_blocks": 4,
        "keep_finished": True,
    },
}
# What is recorded of a setting, beside its name.
MEASURED = (
    "accuracy",
    "exact",
    "tokens_per_forward",
    "nfe",
    "refreshes",
    "cached_steps",
    "text_tokens",
)
HEADS = (
    "block",
    "rule",
    "cache",
    "accuracy",
    "whole answer",
    "tokens/forward",
    "NFE",
    "refreshes",
    "cached steps",
)
# What the short tables show.
SHIPPED = ("tiny-llada", "tiny-dream")
SHORT_SETTINGS = (
    {"cache": "none", "rule": VANILLA, "block_length": 32},
    {"cache": "none", "rule": PARALLEL, "block_length": 32},
    {"cache": "prefix", "rule": PARALLEL, "block_length": 32},
    {"cache": "dual", "rule": PARALLEL, "block_length": 32},
    {"cache": "dual", "rule": PARALLEL, "block_length": 16},
    {"cache": "dual", "rule": "factor 1.0", "block_length": 32},
)
BOTH = "prompt_refreshes 0, suffix_blocks 2"
# What is left out, told as a user would ask for it: (weights of the results file, policy).
SHORT_OPTIONS = {
    "none": ("", "off"),
    '`load(..., weights="fp8")`': ("-fp8", "off"),
    "`CachePolicy(prompt_refreshes=0)`": ("", "prompt_refreshes 0"),
    "`CachePolicy(suffix_blocks=2)`": ("", "suffix_blocks 2"),
    "`CachePolicy(prompt_refreshes=0, suffix_blocks=2)`": ("", BOTH),
    "the same with fp8 weights": ("-fp8", BOTH),
}


def rules() -> dict[str, Callable]:
    """Rule name -> (block length -> rule)."""
    from fastdllm import Factor, Quota, Threshold

    found: dict[str, Callable] = {}
    for n in (1, 2, 4):
        found[f"{n} a step"] = lambda length, n=n: Quota(length // n)
    for tau in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        found[f"threshold {tau}"] = lambda length, tau=tau: Threshold(tau)
    for f in (0.7, 1.0, 1.3):
        found[f"factor {f}"] = lambda length, f=f: Factor(f)
    return found


def all_settings() -> list[dict]:
    """Every setting, vanilla decoding first."""
    grid = [(length, rule) for length in BLOCK_LENGTHS for rule in rules()]
    grid += [(length, rule) for length in SWEPT_LENGTHS for rule in (VANILLA, PARALLEL)]
    return [
        {"cache": cache, "rule": rule, "block_length": length}
        for length, rule in grid
        for cache in CACHES
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
    named = ("cache", "rule", "block_length", "policy")
    return "/".join(str(setting[name]) for name in named if name in setting)


def final_number(text: str) -> int | None:
    """The number that an answer ends in, after `####`; None where it does not."""
    found = re.search(r"####\s*(-?\d+)\s*$", text)
    return int(found.group(1)) if found else None


def score(problem: Problem, generated: list[int], tokenizer, stop_ids) -> tuple[bool, bool, int]:
    """(final number right, whole answer right, tokens before the first stop) of the tokens that
    were generated after one prompt.
    """
    length = next((i for i, token in enumerate(generated) if token in stop_ids), len(generated))
    text = tokenizer.decode(generated[:length], skip_special_tokens=False)
    return final_number(text) == problem.final, problem.is_right(text), length


def prompt_ids(tokenizer, problems: list[Problem]) -> list[torch.Tensor]:
    """The problems' prompts as 1-D id tensors."""
    return [torch.tensor(tokenizer.encode(prompt_of(problem)).ids) for problem in problems]


def measure(
    model, tokenizer, problems: list[Problem], setting: dict, rows: int, task: str = "stories"
) -> dict:
    """Decode all problems of a task, `rows` at a time, and return the setting with its scores;
    counts are means per problem.
    """
    from fastdllm import CachePolicy, generate

    options = {
        "gen_length": TASKS[task].gen_length,
        "block_length": setting["block_length"],
        "cache": setting["cache"],
        "rule": rules()[setting["rule"]](setting["block_length"]),
        "policy": CachePolicy(**POLICIES[setting.get("policy", "off")]),
    }
    prompts = prompt_ids(tokenizer, problems)
    scores, counts = [], torch.zeros(3, dtype=torch.int64)
    for first in range(0, len(problems), rows):
        done = generate(model, prompts[first : first + rows], **options)
        counts += torch.stack([done.nfe.sum(), done.refreshes.sum(), done.cached_steps.sum()]).cpu()
        for row, (tokens, length) in enumerate(
            zip(done.tokens, done.prompt_lengths, strict=True), start=first
        ):
            generated = tokens[length:].tolist()
            scores.append(score(problems[row], generated, tokenizer, model.config.stop_ids))
    accuracy, exact, text = (sum(column) / len(problems) for column in zip(*scores, strict=True))
    nfe, refreshes, cached = (counts.double() / len(problems)).tolist()
    values = (accuracy, exact, text / nfe, nfe, refreshes, cached, text)
    return setting | {name: round(value, 4) for name, value in zip(MEASURED, values, strict=True)}


def environment(device: str) -> dict:
    """What the numbers were measured with, today's date and the commit included."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        commit = None
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return tables.environment(device) | {"date": today, "commit": commit}


def resumed(path: Path, head: dict) -> list[dict]:
    """The results that the file holds already, none where it is not there; ValueError where they
    are of something else than `head` says.
    """
    if not path.exists():
        return []
    before = json.loads(path.read_text())
    if any(before.get(name) != value for name, value in head.items()):
        raise ValueError(
            f"{path}: holds results of another model, split, number of problems or dtype; "
            "move it away"
        )
    return before["results"]


def asked_for(args: argparse.Namespace) -> list[dict]:
    """The settings that the command line names: its shard's, and of them the limited."""
    index, count = (int(number) for number in args.shard.split("/"))
    settings = (policy_settings() if args.policies else all_settings())[index::count]
    texts = args.limit_settings or [""]
    return [setting for setting in settings if any(text in key_of(setting) for text in texts)]


def evaluate(args: argparse.Namespace, path: Path) -> dict:
    """Measure the settings asked for that `path` does not hold yet, writing it after each."""
    from fastdllm import load

    weights = {"weights": args.weights} if args.weights else {}
    model = load(args.model, device=args.device, dtype=getattr(torch, args.dtype), **weights)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    task = TASKS[args.task]
    problems = [task.make(index, "test") for index in range(args.problems)]
    named = {} if args.task == "stories" else {"task": args.task}
    head = {
        "model": args.model.name,
        **named,
        "problems": args.problems,
        "split": "test",
        "gen_length": task.gen_length,
        "dtype": args.dtype,
        **weights,
    }
    results = resumed(path, head)
    report = head | {"environment": environment(args.device), "results": results}
    for setting in asked_for(args):
        key = key_of(setting)
        if key in map(key_of, results):
            continue
        result = measure(model, tokenizer, problems, setting, args.rows, args.task)
        results.append(result)
        print(f"{key:28}", *(f"{name} {result[name]}" for name in MEASURED[:4]), flush=True)
        tables.write_json(path, report)
    return report


def merge(paths: list[Path]) -> dict:
    """One report of several shards, in the order of the settings; ValueError where they differ in
    anything else.
    """
    reports = [json.loads(path.read_text()) for path in paths]
    if not reports:
        raise ValueError("merge: found no results")
    for name in ("model", "task", "problems", "gen_length", "dtype"):
        if len({report.get(name) for report in reports}) > 1:
            raise ValueError(f"merge: the shards differ in {name}")
    found = {key_of(result): result for report in reports for result in report["results"]}
    keys = map(key_of, all_settings() + policy_settings())
    return reports[0] | {"results": [found[key] for key in keys if key in found]}


def markdown(report: dict) -> str:
    """The report as Markdown."""
    dtype = report["dtype"]
    if "weights" in report:
        dtype += f", {report['weights']} weights"
    title = (
        f"# {report['model']}: {report['problems']} unseen {report.get('task', 'problems')}, "
        f"gen_length {report['gen_length']}, {dtype}"
    )
    how = (
        f"{tables.measured_with(report['environment'])}. Accuracy in % with its 95 % interval; "
        "counts are means per problem; tokens are those before the end of text."
    )
    rows = [_cells(result, report["problems"]) for result in report["results"]]
    text = f"{title}\n\n{how}\n\n{tables.table(HEADS, rows, align='rll' + 'r' * 6)}\n"
    return f"{text}\n{requirements(report)}\n" if report.get("task") == "chains" else text


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` problems."""
    middle = share + Z**2 / (2 * count)
    reach = Z * (share * (1 - share) / count + (Z / (2 * count)) ** 2) ** 0.5
    return (middle - reach) / (1 + Z**2 / count), (middle + reach) / (1 + Z**2 / count)


def requirements(report: dict) -> str:
    """What chains were made to meet, and whether this model does, as Markdown; settings that were
    not measured have no row.
    """
    found = {key_of(result): result for result in report["results"]}
    vanilla = found.get(f"none/{VANILLA}/32")
    parallel = found.get(f"dual/{PARALLEL}/32")
    strict, loose = found.get("dual/threshold 1.0/32"), found.get("dual/threshold 0.5/32")
    rows = []
    if vanilla:
        solved = vanilla["accuracy"]
        rows.append(["solved by vanilla", ">= 95%", f"{100 * solved:.1f}%", solved >= 0.95])
    if parallel:
        rate, share = parallel["tokens_per_forward"], parallel["cached_steps"] / parallel["nfe"]
        label = "threshold 0.9, dual, block 32: "
        rows.append([label + "tokens/forward", "3 to 5", f"{rate:.2f}", 3 <= rate <= 5])
        rows.append([label + "cached forwards", ">= 60%", f"{100 * share:.1f}%", share >= 0.6])
    if strict and loose:
        for name, label in (("accuracy", "solved"), ("exact", "whole answers")):
            fall = 100 * (strict[name] - loose[name])
            label = f"dual, block 32: {label} lost from threshold 1 to 0.5"
            rows.append([label, ">= 5 points", f"{fall:.1f}", fall >= 5])
    cells = [[*row, "yes" if holds else "no"] for *row, holds in rows]
    return tables.table(("required", "bound", "found", "holds"), cells, align="lrrl")


def _percent(share: float, count: int) -> str:
    low, high = interval(share, count)
    return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _cells(result: dict, count: int) -> list[str]:
    cache = result["cache"]
    if "policy" in result:
        cache += f", {result['policy']}"
    return [
        result["block_length"],
        result["rule"],
        cache,
        _percent(result["accuracy"], count),
        _percent(result["exact"], count),
        f"{result['tokens_per_forward']:.2f}",
        f"{result['nfe']:.1f}",
        f"{result['refreshes']:.1f}",
        f"{result['cached_steps']:.1f}",
    ]


def accuracy_table(folder: Path) -> str:
    """The shipped models' caches and rules, a few settings of each, as Markdown."""
    heads = ["model", "cache", "rule", "block", "solved, %"]
    heads += ["tokens per forward", "forwards (refresh + cached)"]
    rows = []
    for model in SHIPPED:
        found = results_by_key(folder / f"{model}.json")
        for setting in SHORT_SETTINGS:
            result = found[key_of(setting)]
            parts = f"{result['refreshes']:.1f} + {result['cached_steps']:.1f}"
            rows.append(
                [
                    model,
                    setting["cache"],
                    setting["rule"],
                    setting["block_length"],
                    f"{100 * result['accuracy']:.1f}",
                    f"{result['tokens_per_forward']:.1f}",
                    f"{result['nfe']:.1f} ({parts})",
                ]
            )
    return tables.table(heads, rows, align="lllrrrr")


def options_table(folder: Path) -> str:
    """What the options that trade accuracy solve, the shipped models beside each other, as
    Markdown.
    """
    rows = []
    for label, (weights, policy) in SHORT_OPTIONS.items():
        row = [label]
        for model in SHIPPED:
            found = results_by_key(folder / f"{model}{weights}-policies.json")
            result = found[f"dual/{PARALLEL}/32/{policy}"]
            row.append(f"{100 * result['accuracy']:.1f}")
        rows.append(row)
    return tables.table(["option", *SHIPPED], rows)


def results_by_key(path: Path) -> dict[str, dict]:
    results = json.loads(path.read_text())["results"]
    return {key_of(result): result for result in results}


def plot(report: dict, folder: Path, name: str) -> None:
    """<name>-parallel.png: accuracy against tokens per forward; <name>-blocks.png: accuracy
    against block length.
    """
    pyplot = tables.pyplot()
    model, results = name, report["results"]
    styles = {"threshold": "o-", "factor": "^-.", "a step": "s--"}
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axes, length in zip(panels, BLOCK_LENGTHS, strict=True):
        chosen = [result for result in results if result["block_length"] == length]
        _curves(axes, chosen, "tokens_per_forward", styles)
        axes.set(xlabel="tokens per forward", title=f"{model}, block length {length}")
    _finish(figure, panels[0], folder / f"{model}-parallel.png")
    figure, axes = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    _curves(axes, results, "block_length", {VANILLA: "s--", PARALLEL: "o-"})
    tables.log_ticks(axes, sorted({*BLOCK_LENGTHS, *SWEPT_LENGTHS}), base=2)
    axes.set(xlabel="block length", title=model)
    _finish(figure, axes, folder / f"{model}-blocks.png")


def _curves(axes, results, across, styles) -> None:
    """Draw accuracy over the field `across`: one curve a cache and kind of rule, which is a part of
    the rules' names and has a style.
    """
    for kind, style in styles.items():
        for cache, color in zip(CACHES, ("C0", "C1", "C2"), strict=True):
            points = sorted(
                (result[across], 100 * result["accuracy"])
                for result in results
                if kind in result["rule"] and result["cache"] == cache
            )
            xs = [x for x, _ in points]
            ys = [y for _, y in points]
            axes.plot(xs, ys, color + style, ms=4, label=f"{kind}, {cache}")
    axes.grid(alpha=0.3)


def _finish(figure, axes, path) -> None:
    axes.set(ylabel="problems solved, %")
    handles, labels = axes.get_legend_handles_labels()
    title = "rule, cache"
    figure.legend(handles, labels, loc="outside right", fontsize="small", title=title)
    figure.savefig(path, dpi=120)


def update_card(folder: Path, report: dict) -> None:
    """Put the accuracy of vanilla and of parallel cached decoding into the model card's accuracy
    line.
    """
    found = {key_of(result): result for result in report["results"]}
    shown = {
        "one token a step": found.get(f"none/{VANILLA}/32"),
        "threshold 0.9 and dual cache": found.get(f"dual/{PARALLEL}/32"),
    }
    parts = [
        f"{100 * result['accuracy']:.1f}% with {label} ({100 * result['exact']:.1f}% whole "
        f"answers, {result['tokens_per_forward']:.1f} tokens a forward)"
        for label, result in shown.items()
        if result
    ]
    count = report["problems"]
    line = f"- Accuracy on {count} unseen problems, block length 32: {'; '.join(parts)}."
    card = folder / "README.md"
    before = card.read_text(encoding="utf-8")
    text, lines = re.subn(r"^- Accuracy.*$", lambda _: line, before, flags=re.MULTILINE)
    if lines != 1 or not parts:
        raise ValueError(f"{card}: expected one accuracy line and results for block length 32")
    card.write_text(text, encoding="utf-8")


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--task", choices=TASKS, default="stories")
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
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="also put short tables between its marks"
    )
    args = parser.parse_args(argv)
    args.model = args.model.resolve()
    return args


def main(argv=None) -> None:
    args = parse(argv)
    task = None if args.task == "stories" else args.task
    parts = [args.model.name, task, args.weights, "policies" if args.policies else None]
    name = "-".join(filter(None, parts))
    path = args.out / f"{name}.json"
    sharded = args.shard != "0/1"
    if args.merge:
        report = merge(sorted(args.out.glob(f"{name}.*json")))
        tables.write_json(path, report)
    elif sharded:
        shard = args.shard.replace("/", "-of-")
        report = evaluate(args, path.with_suffix(f".{shard}.json"))
    else:
        report = evaluate(args, path)
    if args.merge or not sharded:
        path.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    if report.get("task") == "chains":
        print(requirements(report))
    if args.plot:
        plot(report, args.out, name)
    if args.card:
        update_card(args.model, report)
    if args.readme:
        tables.insert(args.readme, "accuracy", accuracy_table(args.out))
        tables.insert(args.readme, "options", options_table(args.out))


if __name__ == "__main__":
    main()
