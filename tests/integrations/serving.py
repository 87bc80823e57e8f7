"""A server in a thread of this process, on a free port of 127.0.0.1, for tests."""

import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from load_parts import served  # noqa: E402

from fastdllm.serve.service import service_of  # noqa: E402
from fastdllm.serve.settings import Settings  # noqa: E402

free_port, wait_until = served.free_port, served.wait_until


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
    with served.serving(service) as port:
        yield Served(service, port)
