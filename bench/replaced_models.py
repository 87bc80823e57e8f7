"""Somebody else's models with their attention replaced, beside our native model on the same
weights.

    python bench/replaced_models.py --out FILE.json [--only llada,dream,interface]

Results go to FILE.json after every cell and to FILE.md at the end. The shapes, the clock and the
scripted rule are those of bench/end_to_end.py: LLaDA-8B's and Dream-7B's sizes, random bf16
weights, dual cache, times of a refresh and of a cached step fitted to runs at two quotas. Three
models decode every cell, eager and captured, in turns within one run:

native        fastdllm's own DiffusionTransformer
transformers  LlamaForCausalLM with LLaDA's weights, Qwen2ForCausalLM with Dream's, after `replace_attention`
published     the module structure of the published modeling code, restated in tests/test_patch.py, after `replace_attention`

The others' weights are views of the native model's fused ones, so that all three fit beside each
other.

checked       Before anything is timed: logits near the native model's, two blocks decoded with no mask left and forwards as
              scripted, captured the same tokens as eager, and steps really captured. What fails is not timed.
interface     attn_implementation="fastdllm" on small Llama, Qwen2 and Qwen3 models in bf16, batches padded on either side: its
              largest error against fp32 is at most twice that of sdpa.
kernels       How many kernels a cached step launches, by torch.profiler: last, for profiling slows down what comes after it.

The exit status is 1 where a check failed. On a machine without a GPU tiny models run: a smoke test.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import end_to_end_race as race
import end_to_end_report as report
import timing
import torch
import transformers
from end_to_end import environment, key_of
from end_to_end_race import Cell, Subject, Way

from fastdllm import replace_attention
from fastdllm.checkpoint import _places
from fastdllm.families import FAMILIES
from fastdllm.integrations.transformers import NAME, register
from fastdllm.patch import ADAPTER

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import test_patch as restated  # noqa: E402

HOSTS = ("native", "transformers", "published")
WAYS = tuple(
    Way(f"{host} {'captured' if captured else 'eager'}", "dual", captured=captured)
    for host in HOSTS
    for captured in (False, True)
)
SHAPES, SMOKE_SHAPES = ((2048, 1), (1280, 8)), ((160, 1), (160, 2))  # (canvas, rows)
LOGITS_OFF = 0.05  # relative to their size; bf16 rounds elsewhere where products are not fused
TARGET = 1.15  # of the native model's captured step
PARTS = (*race.MODELS, "interface")
# 64 is the smallest head size that the kernel takes; at this spread of weights attention is not
# uniform.
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
}
KINDS = {"Llama": {}, "Qwen2": {}, "Qwen3": {"head_dim": 64}}
WIDTH, SPANS = (
    160,
    {  # of the tokens that are no padding
        "none": ((0, 160),) * 4,
        "right": ((0, 157), (0, 129), (0, 33), (0, 1)),
        "left": ((3, 160), (31, 160), (127, 160), (159, 160)),
    },
)


class Entrants(dict):
    """{way: the Subject that decodes so}, to be timed as one subject is."""

    def timed(self, way, *what):
        return self[way].timed(way, *what)


@dataclass(frozen=True)
class Host:
    """Somebody else's class: its config's class and further values, whose key names it reads, what
    replace_attention needs.
    """

    build: type
    config: type
    more: dict
    keys: str
    options: dict


def hosts_of(config):
    """{"transformers": Host, "published": Host} for the family of a native model."""
    mine = {"family": config.family, "mask_id": config.mask_id, "stop_ids": config.stop_ids}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    if config.family == "llada":
        build, its_config = transformers.LlamaForCausalLM, transformers.LlamaConfig
        published = Host(restated.LLaDAModelLM, restated.LLaDAConfig, {}, "llada", {})
    else:
        build, its_config = transformers.Qwen2ForCausalLM, transformers.Qwen2Config
        published = Host(restated.DreamModel, restated.DreamConfig, {}, "Dream", {})
    return {"transformers": Host(build, its_config, rope, "Dream", mine), "published": published}


def replaced(subject, host):
    """The subject with somebody else's model in place of ours: our weights under their names, the
    attention replaced.
    """
    family = FAMILIES[host.keys]
    values = restated.without(family.raw_config(subject.config), "model_type", "architectures")
    with torch.device("meta"):
        model = host.build(host.config(**{**values, **host.more}))
    model.load_state_dict(
        _places(subject.model, family.published_names(subject.config)), assign=True
    )
    model = replace_attention(model.requires_grad_(False).eval(), **host.options)
    other = copy.copy(subject)
    other.model = getattr(
        model, ADAPTER
    )  # what `generate` works with, and what captured steps are kept for
    other.models = {None: other.model}
    return other


def entrants(subject):
    subjects = {
        "native": subject,
        **{name: replaced(subject, host) for name, host in hosts_of(subject.config).items()},
    }
    return Entrants({way: subjects[host_of(way)] for way in WAYS})


def host_of(way):
    return way.name.split()[0]


@torch.no_grad()
def logits_error(native, other):
    """How far the other's logits are from the native model's, relative to their size."""
    tokens = native.prompts[:1, :64].to(native.model.device)
    ours, theirs = (
        subject.model.head(subject.model.hidden_states(tokens)).float()
        for subject in (native, other)
    )
    return float((ours - theirs).norm() / ours.norm())


def prepare(field, cell):
    """{way: row}, and {way: its plan} of the ways that are fit to be timed."""
    rows, plans, canvases = {}, {}, {}
    for way, subject in field.items():
        model = type(getattr(subject.model, "model", subject.model)).__name__
        row = rows[way] = asdict(cell) | {
            "way": way.name,
            "host": host_of(way),
            "class": model,
            "captured": way.captured,
        }
        error = row["logits_error"] = logits_error(field[WAYS[0]], subject)
        try:
            canvas, _, wrong = race.check(subject, way, cell)
        except torch.OutOfMemoryError:
            row["absent"] = "out of memory"
            continue
        if not error < LOGITS_OFF:
            wrong = f"the logits are off by {error:.3f}"
        if way.captured:
            row["captured_steps"] = race.captured_steps(subject.model)
            twin = next((other for other in canvases if field[other] is subject), None)
            wrong = wrong or (twin and race.difference(canvas, canvases[twin]))
        if wrong:
            row["wrong"] = wrong
            continue
        canvases[way] = canvas
        if WAYS[0] in canvases:
            row["tokens_as_native"] = (
                (canvas == canvases[WAYS[0]])[:, -2 * race.BLOCK :].float().mean().item()
            )
    for way in canvases:
        plans[way] = race.plan(field[way], way, cell)
    return rows, plans


def measure_cell(field, cell):
    """The rows of one cell, one for each way."""
    rows, plans = prepare(field, cell)
    race.tidy()
    raced = race.race(field, cell, plans, race.WAY_SECONDS)
    for way in plans.keys() - raced.keys():
        rows[way]["absent"] = "out of memory"
    for way, by_plan in raced.items():
        rows[way] |= race.timings(by_plan)
    return list(rows.values())


@torch.no_grad()
def interface_checks(device):
    """For each small model and padding: attn_implementation="fastdllm" and sdpa, both in bf16,
    against sdpa in fp32.
    """
    register()
    results, at = [], torch.arange(WIDTH, device=device)
    for kind, more in KINDS.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**SMALL, **more)
        model = getattr(transformers, f"{kind}Model")._from_config(
            config, attn_implementation="sdpa", dtype=torch.bfloat16
        )
        model = model.to(device).eval()
        exact = copy.deepcopy(model).float()  # of the rounded weights
        for padding, spans in SPANS.items():
            mask = torch.stack([(first <= at) & (at < last) for first, last in spans])
            ids = torch.randint(
                SMALL["vocab_size"], mask.shape, generator=torch.Generator().manual_seed(1)
            ).to(device)
            full = mask[:, None, None].expand(-1, 1, WIDTH, -1)
            want = exact(ids, attention_mask=full).last_hidden_state[mask]
            theirs = error_of(model(ids, attention_mask=full), want, mask)
            model.set_attn_implementation(NAME)
            ours = error_of(model(ids, attention_mask=mask, is_causal=False), want, mask)
            model.set_attn_implementation("sdpa")
            errors = {"error": ours, "sdpa_error": theirs, "passed": ours <= 2 * theirs}
            results.append({"model": kind, "padding": padding, **errors})
    return results


def error_of(output, want, mask):
    return float((output.last_hidden_state[mask].float() - want).abs().max())


def kernels_a_step(subject, way, cell):
    """How many kernels a cached step launches: those that a run with one step more has more."""
    counts = []
    for steps in (2, 3):
        subject.timed(way, cell, steps, 1)  # whatever is made once is made here
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            subject.timed(way, cell, steps, 1)
        on_device = [
            event
            for event in profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        ]
        counts.append(sum(not event.name.startswith("Mem") for event in on_device))
    return counts[1] - counts[0]


def measure(args, results):
    """Measure what was asked for, writing the results after every cell; False where something was
    wrong.
    """
    scale, shapes = (race.REAL, SHAPES) if timing.ON_GPU else (race.SMOKE, SMOKE_SHAPES)
    cells = {
        key: [
            Cell(scale.names[key], canvas, scale.canvases[canvas], rows) for canvas, rows in shapes
        ]
        for key in race.MODELS
        if key in args.only
    }
    for key in cells:
        field = entrants(Subject(key, scale, timing.DEVICE))
        for cell in cells[key]:
            results["rows"] += measure_cell(field, cell)
            write(args.out, results)
        del field
        race.tidy()
    if "interface" in args.only:
        results["checks"] = interface_checks(timing.DEVICE)
        write(args.out, results)
    for key in cells if timing.ON_GPU else ():
        for way, subject in entrants(Subject(key, scale, timing.DEVICE)).items():
            if not way.captured:  # captured are the same
                count = kernels_a_step(subject, way, cells[key][0])
                results["kernels"].append(
                    {"model": scale.names[key], "host": host_of(way), "kernels": count}
                )
        del subject
        race.tidy()
        write(args.out, results)
    return not any("wrong" in row for row in results["rows"]) and all(
        check["passed"] for check in results["checks"]
    )


def write(path, results):
    """The results as JSON, one line a row, and the tables made of them."""
    parts = [
        f" {json.dumps(name)}: [\n"
        + ",\n".join(f"  {json.dumps(item)}" for item in results[name])
        + "\n ]"
        for name in ("rows", "checks", "kernels")
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'{{\n "environment": {json.dumps(results["environment"])},\n' + ",\n".join(parts) + "\n}\n"
    )
    path.with_suffix(".md").write_text(markdown(results))


def markdown(results):
    facts = results["environment"]
    text = f"{report.environment_line(facts)}; transformers {facts['transformers']}"
    parts = [
        "# Replaced models beside the native one",
        text if facts["gpu"] else f"{report.ON_A_CPU}\n\n{text}",
    ]
    parts += [cell_table(rows) for rows in report.grouped(results["rows"])]
    if results["rows"]:
        parts.append("\n".join(verdicts(results["rows"])))
    if results["kernels"]:
        counts = [
            f"{count['model']}, {count['host']} {count['kernels']}" for count in results["kernels"]
        ]
        parts.append(f"Kernels of a cached step: {'; '.join(counts)}.")
    if results["checks"]:
        parts += [
            '## attn_implementation="fastdllm" in bf16: the largest error against fp32',
            check_table(results["checks"]),
        ]
    return "\n\n".join(parts) + "\n"


def cell_table(rows):
    """One line for each way; its step over the native model's captured and eager ones, its refresh
    over the native one's.
    """
    first = f"{rows[0]['model']}, canvas {rows[0]['canvas']}, B {rows[0]['rows']}"
    heads = [
        first,
        "class",
        "ms/refresh",
        "ms/step",
        "step / native captured",
        "step / native eager",
        "refresh / native",
        "logits off",
        "tokens as native's",
        "steps captured",
        "fit's error",
    ]
    lines = [report.line(heads), report.line(["---", "---"] + ["---:"] * (len(heads) - 2))]
    by_way = {row["way"]: row for row in rows}
    for row in rows:
        if "ms_refresh" not in row:
            said = row.get("absent") or f"WRONG: {row['wrong']}"
            lines.append(report.line([row["way"], row["class"], said, *[""] * (len(heads) - 3)]))
            continue
        same = f"native {'captured' if row['captured'] else 'eager'}"
        ratios = [
            ratio(row, by_way[name], what)
            for name, what in (
                ("native captured", "ms_step"),
                ("native eager", "ms_step"),
                (same, "ms_refresh"),
            )
        ]
        alike = f"{row['tokens_as_native']:.0%}" if "tokens_as_native" in row else "–"
        lines.append(
            report.line(
                [
                    row["way"],
                    row["class"],
                    report.number(row["ms_refresh"]),
                    report.number(row["ms_step"]),
                    *("–" if value is None else f"{value:.2f}" for value in ratios),
                    f"{row['logits_error']:.4f}",
                    alike,
                    row.get("captured_steps", ""),
                    f"{row['fit_error']:.1%}",
                ]
            )
        )
    return "\n".join(lines)


def ratio(row, native, what):
    return row[what] / native[what] if what in row and what in native else None


def verdicts(rows):
    """Each replaced model's captured step against the target, a line for each."""
    lines, by_way = [], {(*key_of(row), row["way"]): row for row in rows}
    for row in rows:
        if not row["captured"] or row["host"] == "native":
            continue
        found = ratio(row, by_way[(*key_of(row), "native captured")], "ms_step")
        said = (
            "not measured"
            if found is None
            else f"{found:.2f}: {'met' if found <= TARGET else 'missed'}"
        )
        lines.append(
            f"- {row['model']}, canvas {row['canvas']}, B {row['rows']}, {row['class']}: captured step over the "
            f"native one's, to be at most {TARGET}: {said}."
        )
    return lines


def check_table(checks):
    lines = [
        report.line(["model", "padding", "fastdllm", "sdpa", "at most twice sdpa's"]),
        report.line(["---"] * 5),
    ]
    for check in checks:
        errors = f"{check['error']:.4f}", f"{check['sdpa_error']:.4f}"
        lines.append(
            report.line(
                [check["model"], check["padding"], *errors, "pass" if check["passed"] else "FAIL"]
            )
        )
    return "\n".join(lines)


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", required=True)
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=PARTS,
        metavar="PARTS",
        help=", ".join(PARTS),
    )
    args = parser.parse_args(argv)
    unknown = set(args.only) - set(PARTS)
    if unknown:
        parser.error(
            f"--only: expected some of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}"
        )
    return args


def main(argv=None) -> int:
    args = parse(argv)
    if not timing.ON_GPU:
        torch.set_num_threads(1)  # at these shapes threads cost more than they bring
    facts = environment(timing.DEVICE) | {"transformers": transformers.__version__}
    facts["command"] = facts["command"].replace("end_to_end.py", "replaced_models.py", 1)
    results = {"environment": facts, "rows": [], "checks": [], "kernels": []}
    fine = measure(args, results)
    print(args.out.with_suffix(".md").read_text())
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
