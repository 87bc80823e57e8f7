"""A server in a thread of this process, on a free port of 127.0.0.1, for tests."""

import logging
import socket
import threading
import time
from contextlib import contextmanager

import uvicorn

from fastdllm.serve.app import app_of
from fastdllm.serve.service import service_of
from fastdllm.serve.settings import Settings


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_until(what, seconds=20.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


class Served:
    """The address of a server, and the service behind it."""

    def __init__(self, service, port):
        self.service, self.engine = service, service.engine
        self.port, self.address = port, f"http://127.0.0.1:{port}"

    def client(self, key="none"):
        import openai

        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=60)


@contextmanager
def serving(loaded, rows=8, queue=64, warm=False, **settings):
    """A Served. warm: whether the service warms up, which takes seconds."""
    wanted = {"model": "tiny-llada", "positions": 1024, "gen_length": 128, **settings}
    service = service_of(loaded, Settings(**wanted), rows=rows, cache="dual", queue=queue)
    if not warm:
        service.warm_up = lambda: setattr(service, "ready", True)
    port = free_port()
    config = uvicorn.Config(
        app_of(service), host="127.0.0.1", port=port, log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield Served(service, port)
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()
