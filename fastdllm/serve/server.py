"""`fastdllm serve`: uvicorn around the application, from the first signal to the last."""

import logging
import signal

from .app import app_of
from .service import Service

NEEDS = "fastdllm serve needs more packages: pip install 'fastdllm[serve]'"


def run(service: Service, host: str, port: int) -> None:
    """Answer until SIGTERM or SIGINT; what runs then has the settings' drain_seconds to end.

    After SIGTERM it returns; SIGINT raises KeyboardInterrupt at the end. ImportError says what to
    install.
    """
    try:
        import uvicorn

        app = app_of(service)
    except ImportError as error:
        raise ImportError(f"{NEEDS} ({error})") from error
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,  # a path may hold what is nobody's business
        log_config=None,
        timeout_graceful_shutdown=max(1, round(service.settings.drain_seconds)),
    )
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    server = uvicorn.Server(config)
    # When it has ended uvicorn raises the signal again, for the handler that was there before.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        server.run()
    finally:
        signal.signal(signal.SIGTERM, before)
    if not server.started:
        raise RuntimeError("the server could not start")
