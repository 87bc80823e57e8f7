"""bench/parallel.py runs on tiny models under torchrun, and finds what it checks to hold."""

import json
import os
import subprocess
import sys

from test_floors import ROOT


def test_the_benchmark_of_several_ranks_runs_on_tiny_models(tmp_path):
    out = tmp_path / "parallel.json"
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*launch, ROOT / "bench" / "parallel.py", "--smoke", "--only", "llada", "--out", out],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads(out.read_text())
    assert results["environments"][0]["gpus"] == 2
    rows = {row["what"]: row for row in results["rows"]}
    assert {"step", "refresh", "headline", "memory"} < rows.keys()
    assert rows["tokens in fp32"]["fault"] is None
    assert rows["memory"]["speedup_cache_bytes"] == 2
    assert rows["step"]["split_loop_ms"] > 0
