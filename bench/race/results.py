"""The results file of an end-to-end benchmark: what it holds, and how several become one.

environments  of every run its command, versions, GPU and ceilings; all else names one by its number
rows          one way of decoding in one cell: a request shape and what was measured
accuracy      of native models: what the embedded ones solve, captured and eager
checks        of replaced models: the errors of attn_implementation="fastdllm"
kernels       of replaced models: how many kernels a cached step launches
"""

from __future__ import annotations

import json

from race.shapes import OPTIONS, REPLACED_WAYS, WAYS


def empty(host: str) -> dict:
    """The results of `--host` before anything is measured."""
    if host == "replaced":
        return {"host": host, "environments": [], "rows": [], "checks": [], "kernels": []}
    return {"environments": [], "rows": [], "accuracy": None}


def cell_of(row: dict) -> tuple:
    """The cell of a row, as its key."""
    return row["model"], row["canvas"], row["rows"]


def host_of(results: dict) -> str:
    return results.get("host", "native")


def merged(paths) -> dict:
    """One set of results out of several files; of a way of a cell that is in several, the last
    counts. ValueError for files of different hosts.
    """
    parts = [json.loads(path.read_text()) for path in paths]
    hosts = sorted({host_of(part) for part in parts})
    if len(hosts) != 1:
        raise ValueError(f"merge: expected files of one host, got those of {', '.join(hosts)}")
    results, cells = empty(hosts[0]), {}
    for part in parts:
        before = len(results["environments"])
        results["environments"] += part["environments"]
        for item in measured_items(part):
            item["environment"] += before
        for row in part["rows"]:
            cell = cells.setdefault(cell_of(row), {})
            if any(other.get("headline") != row.get("headline") for other in cell.values()):
                cell.clear()
            cell[row["way"]] = row
        for name in ("accuracy", "checks", "kernels"):
            if part.get(name):
                results[name] = part[name]
    order = [way.name for way in WAYS + OPTIONS + REPLACED_WAYS]
    for cell in cells.values():
        results["rows"] += sorted(cell.values(), key=lambda row: order.index(row["way"]))
    return with_used_environments(results)


def measured_items(results: dict) -> list[dict]:
    """Everything that names an environment."""
    items = [*results["rows"], *results.get("checks", ()), *results.get("kernels", ())]
    if results.get("accuracy"):
        items.append(results["accuracy"])
    return items


def with_used_environments(results: dict) -> dict:
    """The results without the environments of which nothing is left."""
    items = measured_items(results)
    used = sorted({item["environment"] for item in items})
    for item in items:
        item["environment"] = used.index(item["environment"])
    return results | {"environments": [results["environments"][number] for number in used]}
