"""The HTTP application: routes, keys, limits and errors around a Service."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any

from ..engine import EngineClosed, RequestCancelled
from ..text import one_line
from . import canvas
from .asked import Fields, a_bool, parsed, read_chat, read_completion
from .errors import Refused, wrong
from .metrics import Counted, Metrics
from .service import Piece, Service
from .shapes import Shape

log = logging.getLogger(__name__)
READERS = {"/v1/chat/completions": read_chat, "/v1/completions": read_completion}
GONE = 499  # as web servers log a client that went away; nobody reads it


def app_of(service: Service) -> Any:
    """The FastAPI application of a service: it warms it up when it starts, and closes it."""
    from fastapi import Depends, FastAPI
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.routing import Route

    # It writes every chunk, which is somebody's text, into the log where that says everything.
    logging.getLogger("sse_starlette").setLevel(logging.INFO)
    settings, metrics = service.settings, Metrics(service.engine)
    service.first_token = metrics.first_token.observe
    app = FastAPI(
        title="fastdllm",
        lifespan=_lifespan(service),
        openapi_url=None,  # nor its pages, which fetch scripts from elsewhere
        exception_handlers={
            Refused: _refused,
            HTTPException: _no_such,
            ClientDisconnect: _gone,
            Exception: _failed,
        },
    )
    app.state.service = service
    guarded = [Depends(_key_check(settings.key))]
    for path, reader in READERS.items():
        answer = _answering(service, reader, metrics)
        app.add_api_route(path, answer, methods=["POST"], dependencies=guarded)
    page, show = _showing(service)
    app.add_api_route("/", page, methods=["GET"])
    app.add_api_route("/canvas", show, methods=["POST"], dependencies=guarded)
    for path, tell in _facts(service, metrics).items():
        app.add_api_route(path, tell, methods=["GET"], dependencies=guarded)
    for path, tell in _probes(service).items():
        app.add_api_route(path, tell, methods=["GET"])
    paths = frozenset(route.path for route in app.routes if isinstance(route, Route))
    app.add_middleware(Counted, metrics=metrics, paths=paths)
    if settings.origins:
        origins = list(settings.origins)
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _lifespan(service):
    @asynccontextmanager
    async def lifespan(app):
        warming = asyncio.create_task(asyncio.to_thread(_warm_up, service))
        yield
        await asyncio.to_thread(service.close)
        await warming

    return lifespan


def _warm_up(service):
    try:
        service.warm_up()
        log.info("ready")
    except (EngineClosed, RequestCancelled):
        log.info("the warm-up was ended")
    except Exception as error:
        log.error("the warm-up has failed: %s", one_line(error))


def _key_check(key):
    """A dependency that refuses requests without the key, comparing in constant time."""
    from fastapi import Request

    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        # As bytes again: headers are read as Latin-1.
        if key and not hmac.compare_digest(given.encode("latin-1"), key.encode()):
            headers = {"WWW-Authenticate": "Bearer"}
            raise Refused(401, "the key is wrong", code="invalid_api_key", headers=headers)

    return check


def _answering(service, reader, metrics):
    """The route that answers requests of one kind."""
    from fastapi import Request
    from fastapi.responses import JSONResponse, Response

    async def answer(request: Request) -> Response:
        began = time.perf_counter()
        body = parsed(await _body(request, service.settings.body_bytes))
        asked = await service.read(reader, body)
        shape, pieces = Shape(asked, service.loaded, service.settings), service.answers(asked)

        def ended():
            metrics.seconds.observe(time.perf_counter() - began)

        if asked.stream:
            return await _streamed(request, _chunks(shape, pieces, ended), service.settings)
        whole = await _while_connected(request, _all(pieces))
        ended()
        return JSONResponse(shape.whole(whole))

    return answer


def _showing(service):
    """The routes of the page: itself, and a canvas event by event."""
    from fastapi import Request
    from fastapi.responses import FileResponse, Response

    async def page() -> Response:
        return FileResponse(canvas.PAGE, headers=canvas.PAGE_HEADERS)

    async def show(request: Request) -> Response:
        fields = Fields(parsed(await _body(request, service.settings.body_bytes)))
        vanilla = fields.take("vanilla", a_bool, False)
        for name in canvas.LACKS & fields.left.keys():
            raise wrong(name, "a canvas shows one answer, to its end", "unsupported")
        asked = await service.read(read_chat, fields.left)
        events = canvas.events(service, asked, vanilla)
        return await _streamed(request, events, service.settings)

    return page, show


async def _streamed(request, data: Any, settings) -> Any:
    """A response that streams these texts as events. What fails before the first one is told by the
    status, what fails later by an event.
    """
    from sse_starlette import EventSourceResponse

    async def all_of_it(first):
        async with aclosing(data):
            yield first
            try:
                async for other in data:
                    yield other
            except Refused as error:
                yield json.dumps(error.body())

    first = await _while_connected(request, anext(data))
    # Its own way would end streams at once where the server is told to end.
    return EventSourceResponse(
        all_of_it(first), sep="\n", shutdown_grace_period=settings.cut_seconds
    )


async def _body(request, most: int) -> bytes:
    """A request's body; 400 where it is larger than `most` bytes or not said to be JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another origin may send others unasked
        raise wrong(None, "expected the header Content-Type: application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise wrong(None, f"expected a body of at most {most} bytes", "body_too_large")
    return bytes(body)


async def _all(pieces: AsyncIterator[Piece]) -> list[Piece]:
    async with aclosing(pieces):  # type: ignore[type-var]
        return [piece async for piece in pieces]


async def _while_connected(request, work: Coroutine) -> Any:
    """What the work returns; it is cancelled, and ClientDisconnect raised, when the client goes."""
    from starlette.requests import ClientDisconnect

    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        gone.cancel()
        working.cancel()
        await asyncio.wait({working})


async def _disconnected(request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chunks(shape: Shape, pieces: Any, ended: Callable[[], None]) -> AsyncIterator[str]:
    """The data of a stream's events."""
    answers = []
    async with aclosing(pieces):
        async for piece in pieces:
            yield json.dumps(shape.chunk(piece))
            if piece.last:
                answers.append(piece.answer)
    ended()
    if shape.asked.usage:
        yield json.dumps(shape.last_chunk(answers))
    yield "[DONE]"


def _facts(service, metrics):
    """Routes that tell what the server is and does."""
    from fastapi import Request
    from fastapi.responses import Response

    settings = service.settings
    model = {
        "id": settings.model,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "fastdllm",
        "max_model_len": settings.positions,
    }

    async def models() -> dict:
        return {"object": "list", "data": [model]}

    async def one_model(request: Request) -> dict:
        if request.path_params["name"] != settings.model:
            raise Refused(404, f"expected {settings.model!r}", param="model", code="not_found")
        return model

    async def prometheus() -> Response:
        body, kind = metrics.text()
        return Response(body, headers={"content-type": kind})

    return {"/v1/models": models, "/v1/models/{name:path}": one_model, "/metrics": prometheus}


def _probes(service):
    """Routes that say whether the server lives, and whether it is ready to be asked."""

    async def health() -> dict:
        if service.engine.closed:
            raise Refused(503, "the engine has ended", code="ended")
        return {"status": "ok"}

    async def ready() -> dict:
        if service.engine.closed or not service.ready:
            raise Refused(503, "not ready yet", code="not_ready")
        return {"status": "ready"}

    return {"/health": health, "/ready": ready}


# What went wrong, as responses.


async def _refused(request, error):
    from fastapi.responses import JSONResponse

    if error.status == 500:
        log.error("%s", error)
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _no_such(request, error):
    from fastapi.responses import JSONResponse

    refused = Refused(error.status_code, f"{error.detail}: {request.method} {request.url.path}")
    return JSONResponse(refused.body(), error.status_code, headers=error.headers)


async def _gone(request, error):
    from fastapi.responses import Response

    return Response(status_code=GONE)


async def _failed(request, error):
    from fastapi.responses import JSONResponse

    return JSONResponse(Refused(500, "the server has failed").body(), 500)
