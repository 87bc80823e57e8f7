"""Tokens a second of two replicas behind Ray Serve's door beside one: a GPU each, where there are
two.
"""

from __future__ import annotations

import os
import sys
from functools import partial

import torch

from fastdllm.integrations.ray import app
from fastdllm.serve.service import Service

from .served import free_port
from .speed import Size, drawn_prompts, random_service, through_http

COUNTS = (1, 2)
ROUNDS = 3


def replicas(size: Size, on_gpus: bool) -> list[dict]:
    """A row for each number of replicas: the seconds of the rounds. ImportError without Ray."""
    import ray
    from ray import serve

    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # replicas import this file
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": paths})
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    prompts, rows = drawn_prompts(size), []
    settings = {"rows": size.rows, "queue": 4 * size.requests, "gpus_per_replica": int(on_gpus)}
    for count in COUNTS:
        make = partial(warm_service, size, on_gpus)
        serve.run(app(make, replicas=count, **settings))
        found: dict = {"replicas": count, "requests": size.requests, "seconds": []}
        through_http(port, prompts, size, stream=False)  # what is made once
        for _ in range(ROUNDS):
            seconds, found["tokens"] = through_http(port, prompts, size, stream=False)
            found["seconds"].append(round(seconds, 4))
        rows.append(found)
        serve.delete("default")
    serve.shutdown()
    ray.shutdown()
    return rows


def warm_service(size: Size, on_gpu: bool) -> Service:
    """The random model's service on the device that Ray gave this process, warm."""
    if not on_gpu:
        torch.set_num_threads(1)
    service = random_service(size, torch.device("cuda" if on_gpu else "cpu"))
    service.warm_up()
    return service
