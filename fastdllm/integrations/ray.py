"""Ray: more than one process, each with an engine of its own (`pip install "fastdllm[ray]"`).

    fastdllm batch IN.jsonl --output OUT.jsonl --ray --workers 4 --gpus-per-worker 1

`results` is that: a stage of Ray Data whose actors answer records. `app` is the HTTP application as
a deployment of Ray Serve:

    from ray import serve
    from fastdllm.integrations.ray import app
    serve.run(app("/path/to/LLaDA-8B-Instruct", replicas=(1, 4), gpus_per_replica=1, rows=16))
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import partial
from typing import Any

from .. import batch
from ..records import Record, result_of
from ..serve.errors import Refused
from ..serve.service import Service, loaded_service

NEEDS = "Ray is not installed: pip install 'fastdllm[ray]'"
# In a Ray Data task as many rows are answered at once as this variable says.
CONCURRENCY = "RAY_DATA_DEFAULT_ASYNC_ROW_UDF_MAX_CONCURRENCY"
REPLICAS = "fastdllm"
ATTEMPTS = 3  # replicas that a request is given to, one after the other, where they are lost
MOST = 10_000  # requests in the door at once
MOST_BYTES = 64 << 20
LOST = Refused(503, "the replica that answered was lost", code="replica_lost")
# Blocks of records for each worker: what is lost of a killed one's work is one block's.
BLOCKS = 8


class Worker:
    """An actor of Ray Data: one engine, which answers many records at once."""

    def __init__(self, make: Callable[[], Service]):
        self.service = make()
        self.service.warm_up()

    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The answer to {"number", "record"} as {"number", "result", "refused"}, two of JSON."""
        record = Record(*json.loads(row["record"]))
        answer = {"number": row["number"], "result": "", "refused": ""}
        try:
            answer["result"] = json.dumps(await result_of(self.service, record))
        except Refused as error:
            if error.status == batch.ENDED:  # its engine is broken: another worker may do it
                raise RuntimeError("the engine has ended") from error
            answer["refused"] = str(error)
        return answer


def results(
    make: Callable[[], Service], workers: int, rows: int, gpus_per_worker: float = 0.0
) -> batch.Results:
    """What `batch.run` takes: records answered by so many actors, each with the service that `make`
    returns there, of so many rows and a line of batch.AHEAD times as many.

    A record of a worker that was killed is answered by another, and every record once. ImportError
    without Ray.
    """
    ray = _ray()

    def answered(records: Iterator[Record], in_order: bool) -> Iterator[Any]:
        left = {record.number: record for record in records}
        if not left:
            return
        if not ray.is_initialized():
            ray.init(include_dashboard=False)
        ray.data.DataContext.get_current().execution_options.preserve_order = in_order
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows_of_data = [
            {"number": number, "record": json.dumps(record)} for number, record in left.items()
        ]
        blocks = min(len(left), workers * BLOCKS)
        data = ray.data.from_items(rows_of_data, override_num_blocks=blocks).map(
            Worker,
            fn_constructor_args=(make,),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=gpus_per_worker,
            runtime_env={"env_vars": {CONCURRENCY: str(batch.AHEAD * rows)}},
        )
        for row in data.iter_rows():
            record = left.pop(row["number"], None)
            if record is not None:  # not answered before by a worker that was killed since
                refused = row["refused"]
                yield record, Refused(400, refused) if refused else json.loads(row["result"])
        if left:
            raise RuntimeError(f"{len(left)} records have no answer: start it again")

    return answered


def app(
    model: str | Callable[[], Service],
    *,
    replicas: int | tuple[int, int] = 1,
    gpus_per_replica: float = 0.0,
    rows: int = 8,
    queue: int = 256,
    autoscaling: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """The application of Ray Serve that answers OpenAI's API, to be given to `serve.run`.

    Its replicas each have an engine and the FastAPI application of `fastdllm serve`. Before them
    stands a door, which hands what a killed replica had not begun to answer to another one.

    model: what `fastdllm.serve.service.loaded_service` loads, or a function that makes a replica's
    Service, of so many rows and so long a queue. replicas: how many, or (at least, at most): then
    there is one more while more requests wait than have rows. autoscaling: other fields of Ray's
    AutoscalingConfig. options: of `loaded_service`.

    ImportError without Ray.
    """
    serve = _ray().serve
    settings: dict[str, Any] = {
        "max_ongoing_requests": rows + queue,
        "ray_actor_options": {"num_gpus": gpus_per_replica},
    }
    if isinstance(replicas, int):
        settings["num_replicas"] = replicas
    else:
        least, most = replicas
        settings["autoscaling_config"] = {
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": rows,
            **(autoscaling or {}),
        }
    of_replica = serve.deployment(Replica, name=REPLICAS, **settings)
    make = model
    if isinstance(model, str):
        make = partial(loaded_service, model, rows=rows, queue=queue, **options)
    # Whatever is under way passes the door: it is never what makes requests wait, nor a replica.
    of_door = {"max_ongoing_requests": MOST, "ray_actor_options": {"num_cpus": 0}}
    door = serve.deployment(serve.ingress(_door)(), name="door", **of_door)
    return door.bind(of_replica.bind(make))


class Replica:
    """One engine and its FastAPI application, in a process of its own."""

    async def __init__(self, make: Callable[[], Service]):  # type: ignore[misc]  # Ray's way
        from ..serve.app import app_of

        self.app = app_of(make())
        self._life = self.app.router.lifespan_context(self.app)
        await self._life.__aenter__()

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[dict[str, Any]]:
        """The application's ASGI messages for a request; it is cancelled with the generator."""
        said: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        request, gone = [{"type": "http.request", "body": body}], asyncio.Event()

        async def receive():
            if request:
                return request.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        work = asyncio.ensure_future(self.app(scope, receive, said.put))
        work.add_done_callback(lambda _: said.put_nowait(None))
        try:
            while (message := await said.get()) is not None:
                yield message
            await work
        finally:
            gone.set()
            work.cancel()

    async def check_health(self) -> None:
        """Ray replaces a replica whose engine has ended."""
        if self.app.state.service.engine.closed:
            raise RuntimeError("the engine has ended")


class Door:
    """The ASGI application before the replicas. handle: Ray Serve's, of the replicas."""

    def __init__(self, handle: Any, lost: type[Exception]):
        self.answer = handle.options(stream=True).answer
        self.lost = lost

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = await _whole(receive)
        going = asyncio.ensure_future(self._answered(_plain(scope), body, send))
        left = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({going, left}, return_when=asyncio.FIRST_COMPLETED)
            if going.done():
                going.result()
        finally:
            left.cancel()
            going.cancel()

    async def _answered(self, scope, body, send) -> None:
        for _ in range(ATTEMPTS):
            started: dict[str, Any] | None = None
            messages = self.answer.remote(scope, body)
            try:
                async for message in messages:
                    started = started or message
                    await send(message)
                return
            except asyncio.CancelledError:
                messages.cancel()
                raise
            except self.lost:
                if started is not None:
                    await _cut_short(started, send)
                    return
        await _send(send, 503, json.dumps(LOST.body()).encode())


async def _whole(receive) -> bytes:
    """A request's body; what is far too long for any replica is not read to its end."""
    body, more = bytearray(), True
    while more and len(body) <= MOST_BYTES:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


async def _left(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _plain(scope) -> dict[str, Any]:
    """What of a scope goes to another process."""
    names = ("type", "method", "path", "raw_path", "query_string", "headers", "http_version")
    return {name: scope[name] for name in names if name in scope} | {"asgi": {"version": "3.0"}}


async def _cut_short(started, send) -> None:
    """End an answer whose replica was lost: a stream says so, of others nothing had been sent."""
    headers = {bytes(name).lower(): bytes(value) for name, value in started["headers"]}
    if headers.get(b"content-type", b"").startswith(b"text/event-stream"):
        event = f"data: {json.dumps(LOST.body())}\n\n".encode()
        await send({"type": "http.response.body", "body": event})
        return
    raise RuntimeError(str(LOST))


async def _send(send, status, body) -> None:
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _door():
    """The door, made where it runs."""
    from ray.exceptions import RayActorError
    from ray.serve import get_deployment_handle

    return Door(get_deployment_handle(REPLICAS), RayActorError)


def _ray():
    # It would report to its makers over the network.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
        import ray.serve
    except ImportError as error:
        raise ImportError(f"{NEEDS} ({error})") from error
    return ray
