"""`fastdllm serve`: uvicorn around the application, from the first signal to the last."""

import asyncio
import logging
import math
import signal
import socket
from collections.abc import Callable
from typing import Any

from .app import app_of
from .service import Service

NEEDS = "fastdllm serve needs more packages: pip install 'fastdllm[serve]'"


def run(make: Callable[[], Service], host: str, port: int) -> None:
    """Answer until SIGTERM or SIGINT; what runs then has the settings' drain_seconds to end.

    make: returns the service, once it is known that packages and address are there. After SIGTERM
    it returns; SIGINT raises KeyboardInterrupt at the end. ImportError says what to install,
    RuntimeError why nobody can listen there.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import sse_starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ImportError(f"{NEEDS} ({error})") from error
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    with bound(host, port) as address:
        service = make()
        config = uvicorn.Config(
            app_of(service),
            access_log=False,  # a path may hold what is nobody's business
            log_config=None,
            timeout_graceful_shutdown=math.ceil(service.settings.cut_seconds),
        )
        server = _server(config, service)
        # When it has ended uvicorn raises the signal again, for the handler that was there before.
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            server.run(sockets=[address])
        finally:
            signal.signal(signal.SIGTERM, before)
    if not server.started:
        raise RuntimeError("the server could not start")


def _server(config: Any, service: Service) -> Any:
    """A uvicorn.Server that closes the service once its requests have had their time: they are
    refused with 503, and their connections end as usual.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            loop, seconds = asyncio.get_running_loop(), service.settings.drain_seconds
            late = loop.call_later(seconds, loop.run_in_executor, None, service.close)
            await super().shutdown(sockets)
            late.cancel()

    return Server(config)


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address, which does not listen yet. RuntimeError where there can be none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except OSError as error:
        raise RuntimeError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return found
