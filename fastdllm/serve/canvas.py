"""What the page shows: the canvas of one request, event by event.

The first event says how long canvas and blocks are; one for each forward says which cells were
committed; the last one holds the text.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastdllm_kernels import Quota

from ..decode import Generation, StepEvent
from .asked import Asked
from .service import Service

PAGE = Path(__file__).parent / "page.html"
# Parameters of a chat that are none of a canvas.
LACKS = frozenset(("logprobs", "n", "stop", "stream"))
# The page holds all it needs: what it may ask is this server alone.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
}


async def events(service: Service, asked: Asked, vanilla: bool) -> AsyncIterator[str]:
    """The events of one request as JSON. vanilla: decode it without a cache, a token a forward.

    Leaving early ends the decoding within a turn. Raises Refused.
    """
    came: asyncio.Queue[StepEvent | None] = asyncio.Queue()
    loop, (prompt,), options = asyncio.get_running_loop(), asked.prompts, dict(asked.options)
    engine = service.engine
    if vanilla:
        engine = await asyncio.to_thread(service.vanilla_engine)
        options["rule"] = Quota(service.settings.block_length)

    def tell(event):
        loop.call_soon_threadsafe(came.put_nowait, event)

    def over(future):
        future.exception()  # looked at even where nobody waits any more
        came.put_nowait(None)

    with service.refusing():
        request = engine.submit(prompt, on_step=tell, **options)
    ended = asyncio.ensure_future(request)
    ended.add_done_callback(over)
    began = time.perf_counter()
    try:
        yield json.dumps(_shape(service, options["gen_length"]))
        while (event := await came.get()) is not None:
            told = {"cells": _cells(service, event, len(prompt)), "forwards": event.step + 1}
            yield json.dumps(told | {"seconds": time.perf_counter() - began})
        with service.refusing():
            yield json.dumps(_last(service, ended.result()))
    finally:
        request.cancel()


def _shape(service, gen_length):
    return {"gen_length": gen_length, "block_length": service.settings.block_length}


def _cells(service: Service, event: StepEvent, prompt_length: int) -> list[Any]:
    """[place, text (None: an end of text), confidence] of each token that was committed."""
    loaded = service.loaded
    stops = loaded.model.config.stop_ids
    places = (event.positions - prompt_length).tolist()
    tokens, scores = event.token_ids.tolist(), event.scores.tolist()
    texts = [None if token in stops else loaded.tokenizer.decode([token]) for token in tokens]
    return list(zip(places, texts, scores, strict=True))


def _last(service: Service, done: Generation) -> dict[str, Any]:
    loaded = service.loaded
    written = loaded.written(done.tokens[0][done.prompt_lengths[0] :].tolist())
    return {
        "text": loaded.decode(written),
        "tokens": len(written),
        "forwards": int(done.nfe),
        "seconds": done.seconds,
    }
