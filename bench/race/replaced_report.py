"""The report of `end_to_end.py --host replaced`: replaced models beside the native one, and what
attn_implementation="fastdllm" loses in bf16.
"""

from __future__ import annotations

import tables
from tables import number, share

from race.figures import ON_A_CPU, grouped, label_of, why_not

TARGET = 1.15  # of the native model's captured step
HEADS = (
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
)


def markdown(results) -> str:
    """The whole report."""
    parts = ["# Replaced models beside the native one"]
    if not any(facts["gpu"] for facts in results["environments"]):
        parts.append(ON_A_CPU)
    parts.append(tables.runs(results["environments"]))
    cells = grouped(results["rows"])
    parts += [cell_table(rows) for rows in cells]
    if cells:
        parts.append("\n".join(line for rows in cells for line in verdicts(rows)))
    if results["kernels"]:
        counts = [
            f"{count['model']}, {count['host']} {count['kernels']}" for count in results["kernels"]
        ]
        parts.append(f"Kernels of a cached step: {'; '.join(counts)}.")
    if results["checks"]:
        parts.append('## attn_implementation="fastdllm" in bf16: the largest error against fp32')
        parts.append(check_table(results["checks"]))
    return "\n\n".join(parts) + "\n"


def cell_table(rows) -> str:
    """One line for each way; its step over the native model's captured and eager ones, its refresh
    over the native one's.
    """
    by_way = {row["way"]: row for row in rows}
    align = "ll" + "r" * (len(HEADS) - 1)
    lines = [_cell_line(row, by_way) for row in rows]
    return tables.table([label_of(rows[0]), *HEADS], lines, align=align)


def _cell_line(row, by_way) -> list:
    if "ms_refresh" not in row:
        return [row["way"], row["class"], why_not(row)]
    captured = by_way.get("native captured")
    eager = by_way.get("native eager")
    alike = tables.NONE
    if "tokens_as_native" in row:
        alike = f"{row['tokens_as_native']:.0%}"
    return [
        row["way"],
        row["class"],
        number(row["ms_refresh"]),
        number(row["ms_step"]),
        share(over_native(row, captured, "ms_step")),
        share(over_native(row, eager, "ms_step")),
        share(over_native(row, captured if row["captured"] else eager, "ms_refresh")),
        f"{row['logits_error']:.4f}",
        alike,
        row.get("captured_steps", ""),
        f"{row['fit_error']:.1%}",
    ]


def short_table(results) -> str:
    """The table of the index of results: captured steps beside the native model's."""
    heads = ["cell", "class", "ms a cached step", "native", "step / native"]
    lines = []
    for rows in grouped(results["rows"]):
        native = native_captured(rows)
        for row in rows:
            if row["captured"] and row["host"] != "native" and "ms_step" in row:
                ratio = over_native(row, native, "ms_step")
                step, theirs = number(row["ms_step"]), number(native and native["ms_step"])
                lines.append([label_of(row), row["class"], step, theirs, share(ratio)])
    return tables.table(heads, lines, align="llrrr")


def native_captured(rows) -> dict | None:
    return next((row for row in rows if row["way"] == "native captured"), None)


def over_native(row, native, what) -> float | None:
    """The row's time over the native model's; None where either is missing."""
    if native is None or what not in row or what not in native:
        return None
    return row[what] / native[what]


def verdicts(rows) -> list[str]:
    """Each replaced model's captured step against the target, a line for each."""
    native = native_captured(rows)
    lines = []
    for row in rows:
        if not row["captured"] or row["host"] == "native":
            continue
        found = over_native(row, native, "ms_step")
        verdict = "not measured"
        if found is not None:
            verdict = f"{found:.2f}: {'met' if found <= TARGET else 'missed'}"
        lines.append(
            f"- {label_of(row)}, {row['class']}: captured step over the native one's, "
            f"to be at most {TARGET}: {verdict}."
        )
    return lines


def check_table(checks) -> str:
    heads = ["model", "padding", "fastdllm", "sdpa", "at most twice sdpa's"]
    lines = []
    for check in checks:
        lines.append(
            [
                check["model"],
                check["padding"],
                f"{check['error']:.4f}",
                f"{check['sdpa_error']:.4f}",
                "pass" if check["passed"] else "FAIL",
            ]
        )
    return tables.table(heads, lines, align="lllll")
