"""One line of a batch file: from its text to a record, and from the record to its result.

A record is {"id": ..., "prompt" or "messages": ..., options}; the options are those of a request
over HTTP (serve/asked.py). A result is {"id": ..., "text": ..., "finish_reason": ..., "usage": ...,
"forwards": ...}.
"""

import json
from typing import Any, NamedTuple

from .serve.asked import parsed, read_chat, read_completion
from .serve.errors import Refused, wrong
from .serve.service import Service
from .serve.shapes import Shape


class Record(NamedTuple):
    """A line that was read. number: of the line, from 1. id: a text or an integer."""

    number: int
    id: str | int
    body: dict[str, Any]


def record_in(line: bytes, number: int) -> Record:
    """The record in a line. ValueError says what is wrong with it."""
    try:
        body = parsed(line)
    except Refused as error:
        raise ValueError(str(error).replace("the body", "the line")) from None
    name = body.pop("id", None)
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ValueError("expected an id, a text or an integer")
    return Record(number, name, body)


async def result_of(service: Service, record: Record) -> dict[str, Any]:
    """The result of a record. Refused where it asks for what cannot be done, or decoding fails."""
    for name in ("n", "stream"):
        if record.body.get(name) not in (None, 1, False):
            raise wrong(name, "a record has one answer, which comes whole")
    reader = read_chat if "messages" in record.body else read_completion
    asked = await service.read(reader, record.body)
    if len(asked.prompts) > 1:
        raise wrong("prompt", "a record has one prompt")
    pieces = [piece async for piece in service.answers(asked)]
    whole = Shape(asked, service.loaded, service.settings).whole(pieces)
    (choice,) = whole["choices"]
    result = {
        "id": record.id,
        "text": pieces[-1].answer.writing.text,
        "finish_reason": choice["finish_reason"],
    }
    if asked.logprobs:
        result["logprobs"] = choice["logprobs"]
    return result | {"usage": whole["usage"], "forwards": whole["forwards"]}


def line_of(result: dict[str, Any]) -> bytes:
    """A result as a line of the output."""
    return json.dumps(result, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
