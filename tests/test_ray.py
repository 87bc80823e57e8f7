"""fastdllm/integrations/ray.py without Ray: what the door does when replicas are lost."""

import asyncio
import json

import pytest

from fastdllm.integrations.ray import ATTEMPTS, Door, Replica


class Lost(Exception):
    """A replica was killed."""


START = {"type": "http.response.start", "status": 200, "headers": []}
STREAM = START | {"headers": [(b"Content-Type", b"text/event-stream; charset=utf-8")]}


def body(data, more=False):
    return {"type": "http.response.body", "body": data, "more_body": more}


class Handle:
    """A handle of Ray Serve: each request gets the next of these answers, lists of messages in
    which an exception is raised.
    """

    def __init__(self, *answers):
        self.answers, self.asked, self.cancelled = list(answers), [], 0

    def options(self, **options):
        assert options == {"stream": True}
        return self

    @property
    def answer(self):
        return self

    def remote(self, scope, body):
        self.asked.append((scope, body))
        return Messages(self, self.answers.pop(0))


class Messages:
    def __init__(self, handle, messages):
        self.handle, self.messages = handle, messages

    async def __aiter__(self):
        for message in self.messages:
            await asyncio.sleep(0)
            if message is Lost:
                raise Lost
            if message == "for ever":
                await asyncio.Event().wait()
            yield message

    def cancel(self):
        self.handle.cancelled += 1


def asked(handle, leaves=False):
    """What the client of a door gets."""
    sent = []
    parts = [
        {"type": "http.request", "body": b"a ", "more_body": True},
        {"type": "http.request", "body": b"body"},
    ]

    async def receive():
        if parts:
            return parts.pop(0)
        if not leaves:
            await asyncio.Event().wait()
        await asyncio.sleep(0.02)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1", "headers": [], "app": object()}
    asyncio.run(Door(handle, Lost)(scope, receive, send))
    assert all(body == b"a body" and "app" not in scope for scope, body in handle.asked)
    return sent


def test_an_answer_passes_through():
    whole = [START, body(b"one", True), body(b"two")]
    assert asked(Handle(whole)) == whole


def test_what_a_lost_replica_had_not_begun_another_one_answers():
    handle = Handle([Lost], [Lost], [START, body(b"{}")])
    assert asked(handle) == [START, body(b"{}")] and len(handle.asked) == 3


def test_where_all_are_lost_it_is_503():
    start, found = asked(Handle(*[[Lost]] * ATTEMPTS))
    assert start["status"] == 503 and (b"retry-after", b"1") in start["headers"]
    assert json.loads(found["body"])["error"]["code"] == "replica_lost"


def test_a_stream_that_had_begun_ends_with_an_error():
    handle = Handle([STREAM, body(b"data: 1\n\n", True), Lost])
    *begun, last = asked(handle)
    assert begun == [STREAM, body(b"data: 1\n\n", True)] and not last.get("more_body")
    assert json.loads(last["body"].removeprefix(b"data: "))["error"]["code"] == "replica_lost"


def test_a_whole_answer_that_had_begun_is_cut():
    with pytest.raises(RuntimeError, match="lost"):
        asked(Handle([START, Lost]))


def test_a_client_that_goes_away_ends_it_in_the_replica():
    handle = Handle([STREAM, "for ever"])
    assert asked(handle, leaves=True) == [STREAM] and handle.cancelled == 1


async def of_replica(app):
    replica = object.__new__(Replica)
    replica.app = app
    found = []
    messages = replica.answer({"type": "http"}, b"body")
    async for message in messages:
        found.append(message)
        if message["type"] == "leave":
            break
    await messages.aclose()
    await asyncio.sleep(0.01)
    return found


def test_a_replica_gives_the_applications_messages():
    async def app(scope, receive, send):
        request = await receive()
        await send(START)
        await send(body(request["body"]))

    assert asyncio.run(of_replica(app)) == [START, body(b"body")]


def test_what_fails_in_a_replica_is_raised():
    async def app(scope, receive, send):
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        asyncio.run(of_replica(app))


def test_a_replica_ends_what_nobody_waits_for():
    ended = []

    async def app(scope, receive, send):
        await send({"type": "leave"})
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    assert asyncio.run(of_replica(app)) == [{"type": "leave"}] and ended == [True]
