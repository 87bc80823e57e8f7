"""From what is asked to answers of the engine, as they come."""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ..decode import Generation, StepEvent
from ..engine import Engine, EngineClosed, QueueFull, Request, RequestCancelled
from ..options import UsageError
from ..text import TextModel, load, one_line
from .asked import Asked
from .errors import Refused
from .settings import Settings
from .writing import Writing

# Of so many requests, the latest, the mean time says when a full line has room again.
REMEMBERED = 64
LONGEST_WAIT = 60  # seconds that a client is told to wait at most


class Answer:
    """One answer that is being written.

    writing: its text. scores: the confidence with which the token at each position of the canvas
    was committed, where logprobs were asked for. ended: will hold what the engine returns.
    """

    def __init__(self, index: int, prompt: list[int], writing: Writing):
        self.index = index
        self.prompt = prompt
        self.writing = writing
        self.scores: dict[int, float] = {}
        self.request: Request
        self.ended: asyncio.Future[Generation]

    def on_step(self, event: StepEvent) -> None:
        """Keep what was committed, in the engine's thread."""
        self.scores.update(zip(event.positions.tolist(), event.scores.tolist(), strict=True))

    def logprob(self, place: int) -> float:
        """The natural logarithm of the probability with which the answer's token at `place` was
        committed: its confidence in the logits that it was committed from.
        """
        score = self.scores.get(len(self.prompt) + place, 0.0)
        return math.log(score) if score > 0 else -9999.0  # as OpenAI writes impossible

    @property
    def forwards(self) -> int:
        """The forwards that the whole answer took."""
        return int(self.ended.result().nfe)

    @property
    def finish_reason(self) -> str:
        return "stop" if self.writing.stopped else "length"


@dataclass(frozen=True)
class Piece:
    """What is new of an answer. tokens: (place in the answer, id) of those that have come, where
    logprobs were asked for. last: the answer is whole.
    """

    answer: Answer
    text: str
    tokens: list[tuple[int, int]]
    last: bool


class Service:
    """A model that answers requests. ready: whether what requests need is compiled and captured.

    first_token: called with the seconds until the first final tokens of a stream.
    """

    def __init__(self, loaded: TextModel, engine: Engine, settings: Settings):
        self.loaded, self.engine, self.settings = loaded, engine, settings
        self.ready = False
        self.first_token: Callable[[float], object] = lambda seconds: None
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._vanilla: Engine | None = None
        self._making = threading.Lock()
        # Tokenizers are not made for several threads at once.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="fastdllm-reader")

    def warm_up(self) -> None:
        """Make what requests will need; what comes meanwhile waits for it. EngineClosed where the
        engine is closed before its end.
        """
        rule = self.settings.rule
        self.engine.warm_up(progress=self._go_on, rule=rule)
        self.engine.warm_up(progress=self._go_on, rule=rule, temperature=1.0)
        self.ready = True

    def _go_on(self, *_):
        # On a GPU a warm-up takes minutes, which a server that is to end has not.
        if self.engine.closed:
            raise EngineClosed("engine: it was closed while it warmed up")

    async def read(self, reader: Callable[..., Asked], body: Mapping[str, Any]) -> Asked:
        """What a request asks for, read in another thread: a long prompt stops nobody else."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._reader, reader, body, self.loaded, self.settings)

    async def answers(self, asked: Asked) -> AsyncIterator[Piece]:
        """The answers in pieces, as their tokens become final (in one piece without a stream).

        Leaving early ends their decoding within a turn. Raises Refused: 429 where the line is full,
        500 where decoding fails, 503 where the engine is closed.
        """
        began = time.perf_counter()
        came: asyncio.Queue[tuple[Answer, list[int] | None]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(answer, tokens):
            loop.call_soon_threadsafe(came.put_nowait, (answer, tokens))

        answers = self._submitted(asked, tell if asked.stream else None)
        try:
            for answer in answers:
                _when_done(answer, came)
            left, first = len(answers), True
            while left:
                answer, tokens = await came.get()
                if first and asked.stream:
                    self.first_token(time.perf_counter() - began)
                first = False
                piece = self._piece(asked, answer, tokens)
                left -= piece.last
                if piece.text or piece.last:
                    yield piece
            self._seconds.append((time.perf_counter() - began) / len(answers))
        finally:
            for answer in answers:
                answer.request.cancel()

    def _submitted(self, asked: Asked, tell) -> list[Answer]:
        """The answers, in the engine's line; none is where not all have room."""
        answers: list[Answer] = []
        try:
            for index in range(asked.n * len(asked.prompts)):
                prompt = asked.prompts[index // asked.n]
                answer = Answer(index, prompt, Writing(self.loaded, asked.stops))
                options = dict(asked.options)
                if options["seed"] is not None:
                    options["seed"] += index
                if asked.logprobs:
                    options["on_step"] = answer.on_step
                if tell or asked.stops:
                    options["on_final"] = _on_final(answer, tell, bool(asked.stops))
                answer.request = self.engine.submit(prompt, **options)
                answers.append(answer)
        except Exception as error:
            for answer in answers:
                answer.request.cancel()
            raise self._refusal(error) from error
        return answers

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """What goes wrong inside, with the engine, as a Refused."""
        try:
            yield
        except Exception as error:
            raise self._refusal(error) from error

    def _piece(self, asked: Asked, answer: Answer, tokens: list[int] | None) -> Piece:
        """What is new. tokens: the final ones so far, or None where the answer has ended."""
        last = tokens is None
        if tokens is None:
            with self.refusing():
                canvas = answer.ended.result().tokens[0]
            tokens = canvas[len(answer.prompt) :].tolist()
        writing = answer.writing
        before = len(writing.tokens()) if asked.logprobs else 0
        text = writing.add(tokens, last=last)
        new = list(enumerate(writing.tokens()))[before:] if asked.logprobs else []
        return Piece(answer, text, new, last)

    def _refusal(self, error: Exception) -> Refused:
        """What a client is told of an error of the engine."""
        if isinstance(error, QueueFull):
            wait = {"Retry-After": str(self._room_in())}
            return Refused(429, "the line is full", code="queue_full", headers=wait)
        if isinstance(error, EngineClosed | RequestCancelled):
            return Refused(503, "the server is ending", code="ending")
        if isinstance(error, UsageError):
            return Refused(400, str(error))
        return Refused(500, f"decoding has failed: {one_line(error)}", code="decoding_failed")

    def _room_in(self) -> int:
        """In how many seconds a full line may have room, from what requests took lately."""
        if not self._seconds:
            return 1
        mean = sum(self._seconds) / len(self._seconds)
        return min(LONGEST_WAIT, max(1, math.ceil(mean / self.engine.rows)))

    def vanilla_engine(self) -> Engine:
        """An engine of one row without a cache, made when it is first wanted."""
        with self._making:
            if self._vanilla is None:
                self._vanilla = Engine(
                    self.loaded.model,
                    rows=1,
                    positions=self.settings.positions,
                    block_length=self.settings.block_length,
                    cache="none",
                    queue=self.engine.queue,
                )
            return self._vanilla

    def close(self) -> None:
        """End what is running, and the engine with it."""
        self.ready = False
        self.engine.close(drain=False)
        with self._making:
            if self._vanilla is not None:
                self._vanilla.close(drain=False)
        self._reader.shutdown()


def service_of(
    loaded: TextModel, settings: Settings, *, rows: int, cache: str, queue: int
) -> Service:
    """A Service with an engine of its own. A request gets no more answers than its line takes."""
    settings = replace(settings, choices=min(settings.choices, queue))
    engine = Engine(
        loaded.model,
        rows=rows,
        positions=settings.positions,
        block_length=settings.block_length,
        cache=cache,
        queue=queue,
    )
    return Service(loaded, engine, settings)


def loaded_service(
    model: str,
    *,
    name: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    rows: int = 8,
    positions: int = 2048,
    cache: str = "dual",
    queue: int = 256,
    **settings: Any,
) -> Service:
    """A Service of a model that is loaded from `model`: embedded, a folder or a hub id.

    name: the model's name for clients, by default the same. device, dtype: of `text.load`.
    positions: at most the model's. settings: other fields of Settings.
    """
    loaded = load(model, device, dtype)
    positions = min(positions, loaded.model.config.max_positions)
    wanted = Settings(model=name or model, positions=positions, **settings)
    return service_of(loaded, wanted, rows=rows, cache=cache, queue=queue)


def _on_final(answer: Answer, tell, stops: bool):
    """What the engine calls, in its thread, with the final tokens of an answer."""

    def on_final(tokens):
        if tell:
            tell(answer, tokens)
        return stops and answer.writing.ends(tokens)

    return on_final


def _when_done(answer: Answer, came: asyncio.Queue) -> None:
    """Put (answer, None) in the queue when it has ended, after all that came before."""

    def ended(future):
        future.exception()  # looked at even where nobody waits any more
        came.put_nowait((answer, None))

    answer.ended = asyncio.ensure_future(answer.request)
    answer.ended.add_done_callback(ended)
