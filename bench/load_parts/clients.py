"""Clients of a server, in a process of their own that needs nothing but Python.

Standard input holds a job as JSON: `port`, `clients` (how many ask at once), `kinds` (what may be
asked) and `numbers` [first, end) of the requests; request i asks kind i modulo their number. A kind
is a `path`, a `body` and what is to come of it: `text` and `forwards`, or `param` of a refusal, or
`leave`: the client goes away. Standard output gets `outcomes`, how many came to what, and `times`,
for each answer [seconds until its first part, seconds until it was whole, tokens].
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
import threading
import time
from collections import Counter

PATIENCE = 120.0
HEADERS = {"Content-Type": "application/json"}


class Client:
    """One client: asks one request after another over one connection."""

    def __init__(self, port: int):
        self.port = port
        self.connection: http.client.HTTPConnection | None = None
        self.outcomes: Counter = Counter()
        self.times: list[tuple[float, float, int]] = []

    def ask(self, kind: dict) -> None:
        """Ask one request and count what becomes of it."""
        try:
            self.outcomes[self._outcome(kind)] += 1
        except (OSError, http.client.HTTPException) as error:
            self.outcomes[f"{type(error).__name__}: {error}"] += 1
            self.close()

    def _outcome(self, kind):
        began = time.perf_counter()
        response = self._response(kind)
        if kind.get("leave"):
            return self._leave(response)
        found = response.status
        if found == 200 and kind["body"].get("stream"):
            first, answer = self._streamed(response, began)
        else:
            answer = json.loads(response.read())
            first = time.perf_counter() - began
        if "param" in kind:
            return "refused" if (found, _param(answer)) == (400, kind["param"]) else "not refused"
        if found != 200:
            return f"status {found}"
        whole = time.perf_counter() - began
        self.times.append((first, whole, answer["usage"]["completion_tokens"]))
        return _compared(kind, answer)

    def _response(self, kind):
        if self.connection is None:
            self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
            self.connection.connect()
            self.connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection.request("POST", kind["path"], json.dumps(kind["body"]), HEADERS)
        if kind.get("leave") == "at once":
            return None
        return self.connection.getresponse()

    def _leave(self, response):
        """Go away at once, or after the first part of a stream."""
        if response is not None:
            response.readline()
        self.close()
        return "left"

    def _streamed(self, response, began):
        """(seconds until the first part, the answer that the parts make)."""
        first, text, usage = None, "", {}
        for line in response:
            if not line.startswith(b"data:"):
                continue
            first = first or time.perf_counter() - began
            if line.strip() == b"data: [DONE]":
                break
            part = json.loads(line[len(b"data:") :])
            if "error" in part:
                return first, {"choices": [{"text": part["error"]}], **EMPTY}
            for choice in part["choices"]:
                text += choice["text"] if "text" in choice else choice["delta"]["content"]
            usage = part if part.get("usage") else usage
        response.read()
        return first, {**usage, "choices": [{"text": text}]}

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
        self.connection = None


EMPTY = {"usage": {"completion_tokens": 0}, "forwards": 0}


def _param(answer):
    return answer.get("error", {}).get("param")


def _compared(kind, answer):
    """Whether an answer is the one that was expected, where one was."""
    (choice,) = answer["choices"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    if "text" in kind and text != kind["text"]:
        return "another text"
    if "forwards" in kind and answer["forwards"] != kind["forwards"]:
        return "other forwards"
    return "answered"


def work(job: dict) -> dict:
    """Do a job."""
    numbers = iter(range(*job["numbers"]))
    taking = threading.Lock()
    clients = [Client(job["port"]) for _ in range(job["clients"])]

    def run(client):
        while True:
            with taking:
                number = next(numbers, None)
            if number is None:
                client.close()
                return
            client.ask(job["kinds"][number % len(job["kinds"])])

    threads = [threading.Thread(target=run, args=(client,)) for client in clients]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    outcomes: Counter = Counter()
    for client in clients:
        outcomes.update(client.outcomes)
    times = [time for client in clients for time in client.times]
    return {"seconds": seconds, "outcomes": outcomes, "times": times}


if __name__ == "__main__":
    json.dump(work(json.load(sys.stdin)), sys.stdout)
