"""A server in a thread of this process, on a free port of 127.0.0.1."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastdllm.serve.app import app_of
from fastdllm.serve.service import Service


@contextmanager
def serving(service: Service) -> Iterator[int]:
    """The port on which the service is answered inside; it is closed at the end."""
    import uvicorn

    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    port = free_port()
    config = uvicorn.Config(
        app_of(service), host="127.0.0.1", port=port, log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield port
    finally:
        server.should_exit = True
        thread.join(30)
    if thread.is_alive():
        raise RuntimeError("the server does not end")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_until(holds: Callable[[], object], seconds: float = 20.0) -> None:
    """Return once it holds; AssertionError where it does not for so long."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)
