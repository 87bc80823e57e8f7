"""The first seconds of a process: in child processes, with an empty compile cache and with what the
child before left in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack

import torch
from race.subject import synchronize

from .answering import engine_of, shaped_model, submit
from .asked import SCRIPT, Size, equal
from .counting import Captures, Compiles

KINDS = ("first request", "warm_up")
CACHES = ("empty", "warm")
CHILD_SECONDS = 300


def cold(script: str, on_gpu: bool, smoke: bool) -> list[dict]:
    """A row for each kind of beginning and state of the compile cache. Without a GPU nothing is
    compiled, so there is one state. script: what a child runs, with --child KIND; all children
    import at once, and then begin one after another.
    """
    wanted, rows = [], []
    with ExitStack() as opened:
        for kind in KINDS:
            folder = opened.enter_context(tempfile.TemporaryDirectory())
            for cache in CACHES if on_gpu else ("none",):
                child = opened.enter_context(process(script, kind, folder, smoke))
                opened.callback(child.kill)
                wanted.append((kind, cache, child))
        for kind, cache, child in wanted:
            rows.append({"kind": kind, "cache": cache, **answer_of(child)})
    return rows


def process(script: str, kind: str, folder: str, smoke: bool) -> subprocess.Popen:
    """A fresh process with its compile cache in that folder. It begins when it is told to."""
    command = [sys.executable, script, "--child", kind, *(["--smoke"] if smoke else [])]
    return subprocess.Popen(
        command,
        env=os.environ | {"TRITON_CACHE_DIR": folder},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer_of(child: subprocess.Popen) -> dict:
    """What a process says of its beginning. RuntimeError with its last words if it fails."""
    said, errors = child.communicate("begin\n", timeout=CHILD_SECONDS)
    if child.returncode:
        raise RuntimeError(f"{' '.join(child.args[1:])} failed:\n{errors[-2000:]}")
    return json.loads(said.splitlines()[-1])


def begin(kind: str, size: Size, device: torch.device) -> dict:
    """In a child, when it is told to: build model and engine, then warm up or answer the first
    request, on the clock; after it the request once more.
    """
    sys.stdin.readline()
    model = shaped_model(size, device)
    synchronize()
    (one,) = equal(model.config, size, 1)
    began = time.perf_counter()
    with engine_of(model, size) as engine:
        synchronize()
        engine_seconds = time.perf_counter() - began
        with Compiles() as compiles, Captures(engine) as captures:
            began = time.perf_counter()
            if kind == "warm_up":
                engine.warm_up(**SCRIPT)
            else:
                submit(engine, one).result()
            seconds = time.perf_counter() - began
        began = time.perf_counter()
        submit(engine, one).result()
        again = time.perf_counter() - began
    return {
        "seconds": seconds,
        "next_request_seconds": again,
        "engine_seconds": engine_seconds,
        **compiles.report(),
        **captures.report(),
    }
