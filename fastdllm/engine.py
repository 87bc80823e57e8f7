"""Engine: requests come and go in the decoding loop of decode.py.

One thread runs the loop. A request is checked in the thread that submits it and waits in line until
a row of the cache is free; its row is free again the moment its text ends, it fails, or it is
cancelled. What a request gets does not depend on who else is there.
"""

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from typing import Any

import torch

from fastdllm_kernels import Threshold
from fastdllm_kernels.compiling import watch
from fastdllm_kernels.rules import check_rule

from . import arguments
from .arguments import Ids
from .cache import CachePolicy, cache_bytes
from .decode import (
    Decoder,
    Generation,
    Listener,
    RowOptions,
    StepEvent,
    capture_obstacle,
    checked_model,
    generation_of,
    row_of_prompt,
    schedule_of,
)
from .forward import Forward, Model
from .graph import Workspace
from .parallel import refuse_split
from .sampling import Rule, sampling_of, sampling_of_rows
from .schedule import Row
from .warming import Progress, WarmUp, example_prompts, shown, warm_forward

log = logging.getLogger(__name__)
# Of the rows that are due, so many tokens are refreshed in a turn (one row at least): what the
# others wait for before their next step. As fast a token as any larger group on an H200.
REFRESH_TOKENS = 4096
# The line is looked through for passed deadlines once in so many turns.
LINE_TURNS = 16


class QueueFull(RuntimeError):
    """As many requests wait as the engine's `queue` takes."""


class EngineClosed(RuntimeError):
    """The engine takes no more requests: it was closed, or its device failed."""


class RequestCancelled(RuntimeError):
    """The request was cancelled before its end."""


class Request:
    """A request in an Engine, made by `Engine.submit`.

    Iterating over it, or `async for`, gives the generated tokens as they become final: those left
    of the first mask. `await request` is `result` without blocking. What makes a request fail is
    raised by all of these.
    """

    def __init__(
        self,
        engine: "Engine",
        row: Row,
        deadline: float | None,
        on_final: Callable[[list[int]], object] | None,
    ):
        self._engine = engine
        self._row = row
        self._submitted = time.perf_counter()
        self._deadline = None if deadline is None else self._submitted + deadline
        self._future: Future[Generation] = Future()
        self._changed = threading.Condition()
        self._final: list[int] = []
        self._watchers: list[Callable[[], object]] = []
        self._on_final = on_final
        self._cancelled = False
        self._over = False  # its end is decided; both change under the engine's lock

    def result(self, timeout: float | None = None) -> Generation:
        """The Generation of one row, once there is one; asked again, the same again.

        timeout: seconds, after which TimeoutError is raised and the request goes on. Raises
        RequestCancelled, EngineClosed, and whatever made the request fail.
        """
        if timeout is not None:
            timeout = min(arguments.number("timeout", timeout), threading.TIMEOUT_MAX)
        if not self._future.done():
            self._engine._refuse_own_thread("result")
        return self._future.result(timeout)

    def done(self) -> bool:
        """Whether `result` would return, or raise, at once."""
        return self._future.done()

    def cancel(self) -> bool:
        """End the request within a turn of the loop: it has no result then. False where it had
        ended before.
        """
        return self._engine._cancel(self)

    def __iter__(self) -> Iterator[int]:
        given = 0
        while True:
            if len(self._final) == given and not self._future.done():
                self._engine._refuse_own_thread("iteration")
            with self._changed:
                while len(self._final) == given and not self._future.done():
                    self._changed.wait()
                tokens = self._final[given:]
            yield from tokens
            given += len(tokens)
            if not tokens:
                self._future.result()
                return

    def __await__(self) -> Generator[object, None, Generation]:
        # Shielded: who stops waiting does not end the request.
        return asyncio.shield(asyncio.wrap_future(self._future)).__await__()

    async def __aiter__(self) -> AsyncIterator[int]:
        loop, changed, given = asyncio.get_running_loop(), asyncio.Event(), 0

        def wake():
            loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._watchers.append(wake)
        try:
            while True:
                changed.clear()
                ended = self._future.done()
                with self._changed:
                    tokens = self._final[given:]
                for token in tokens:
                    yield token
                given += len(tokens)
                if ended and not tokens:
                    self._future.result()
                    return
                if not tokens:
                    await changed.wait()
        finally:
            with self._changed:
                self._watchers.remove(wake)

    def _advance(self) -> int:
        """Publish what has become final, and ask whether the text ends there; how many tokens."""
        new = self._publish()
        if not new or self._on_final is None:
            return new
        row = self._row
        try:
            ends = self._on_final(list(self._final))
        except Exception as error:
            row.done, row.failure = True, error
            return new
        if ends and not row.done:
            end = row.prompt_length + len(self._final)
            self._engine._schedule.end(row, end, self._engine._end_id)
            new += self._publish()
        return new

    def _publish(self) -> int:
        """Hand out what has become final; how many tokens that is."""
        row = self._row
        first = row.prompt_length + len(self._final)
        end = row.total if row.done else row.start
        if not row.done:
            while end < row.total and row.text[end] != self._engine._schedule.mask_id:
                end += 1
        new = row.text[first:end]
        if new:
            with self._changed:
                self._final += new
            self._wake()
        return len(new)

    def _end(self, error: BaseException | None = None) -> None:
        if self._future.done():
            return
        if error is None:
            seconds = time.perf_counter() - self._submitted
            self._future.set_result(generation_of([self._row], seconds))
        else:
            self._future.set_exception(error)
        self._wake()

    def _wake(self):
        with self._changed:
            self._changed.notify_all()
            watchers = list(self._watchers)
        for wake in watchers:
            try:
                wake()
            except RuntimeError:
                pass  # the caller's event loop is closed: nobody waits there any more


class Engine:
    """Requests of any thread, decoded together in one loop.

        with Engine(model, rows=16) as engine:
            request = engine.submit(prompt, gen_length=256)
            for token in request: ...
            done = request.result()

    The loop runs in a thread of its own from the first request on. Leaving the block finishes what
    was submitted; an exception cancels it.
    """

    def __init__(
        self,
        model: Model | torch.nn.Module,
        *,
        rows: int = 8,
        positions: int = 2048,
        block_length: int = 32,
        cache: str = "dual",
        policy: CachePolicy = CachePolicy(),  # noqa: B008
        graph: bool = True,
        queue: int = 1024,
    ):
        """Allocate canvas and cache for `rows` requests of up to `positions` tokens each, prompt
        included. model, block_length, cache, policy, graph: as in `fastdllm.generate`; the model
        must not change while the engine is open. queue: how many requests may wait for a row.

        TypeError and ValueError name the argument; MemoryError says how many bytes were wanted and
        how many rows would fit, before anything is allocated.
        """
        model = checked_model(model)
        refuse_split(model, "an Engine, whose requests come when they come")
        config = model.config
        arguments.integer("rows", rows, 1)
        arguments.integer("positions", positions, 2)
        if positions > config.max_positions:
            raise ValueError(
                f"positions: expected at most the model's {config.max_positions}, got {positions}"
            )
        self._schedule = schedule_of(config, cache, policy, block_length, positions)
        arguments.flag("graph", graph)
        arguments.integer("queue", queue, 1)
        _check_memory(model, rows, positions, cache)
        self.model, self.rows, self.positions, self.queue = model, rows, positions, queue
        obstacle = capture_obstacle(model, graph)
        if obstacle:
            log.info("forwards run uncaptured: %s", obstacle)
        watch()
        self._space = Workspace(model.device, None if obstacle else [])
        with torch.inference_mode(False), torch.no_grad():
            forward = Forward(
                model,
                rows,
                positions,
                block_length=self._schedule.block_length,
                cached=cache != "none",
                space=self._space,
            )
        self._decoder = Decoder(forward, self._schedule)
        self._end_id = config.stop_ids[0] if config.stop_ids else config.mask_id
        self._running: dict[Row, Request] = {}
        self._waiting: deque[Request] = deque()
        self._calls: deque[tuple[Callable, Future]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed: str | None = None  # why no more requests are taken
        self._ending = False  # the loop ends once nothing is left
        self._tokens = self._turns = self._finished = 0

    def submit(
        self,
        prompt: Ids,
        *,
        gen_length: int = 256,
        rule: Rule = Threshold(0.9),  # noqa: B008
        score: str | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop_ids: Iterable[int] | None = None,
        on_step: Callable[[StepEvent], object] | None = None,
        on_final: Callable[[list[int]], object] | None = None,
        deadline: float | None = None,
    ) -> Request:
        """Put a request in line; from any thread. Returns at once.

        prompt: a 1-D sequence of token ids. deadline: seconds from now, after which the request
        fails with TimeoutError. on_step is called in the loop's thread with the events of this
        request alone (its row is 0). on_final is called there too, whenever more tokens are final,
        with all generated ones that are; where it answers with something true, the text ends after
        them: what follows becomes the model's first stop id. The others are those of
        `fastdllm.generate`, whose tokens for this prompt alone the request gets.

        Raises what `generate` raises, ValueError where prompt and generation are longer than the
        engine's positions, QueueFull and EngineClosed.
        """
        request = self._request(
            prompt,
            gen_length=gen_length,
            rule=rule,
            score=score,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop_ids=stop_ids,
            on_step=on_step,
            on_final=on_final,
            deadline=deadline,
        )
        self._line_up([request], self.queue)
        return request

    def _request(
        self,
        prompt,
        *,
        gen_length,
        rule=Threshold(0.9),  # noqa: B008
        score=None,
        temperature=0.0,
        top_p=None,
        top_k=None,
        seed=None,
        stop_ids=None,
        on_step=None,
        on_final=None,
        deadline=None,
    ) -> Request:
        """A Request of checked arguments, not yet in line."""
        config = self.model.config
        row = row_of_prompt(prompt, gen_length, config)
        if row.total > self.positions:
            raise ValueError(
                f"gen_length: prompt and generation need {row.total} positions, "
                f"the engine's rows have {self.positions}"
            )
        check_rule(rule, 1)
        row.stops = frozenset(arguments.stop_tokens(stop_ids, config))
        arguments.function("on_step", on_step)
        arguments.function("on_final", on_final)
        if deadline is not None:
            arguments.number("deadline", deadline, above=0)
        sampling = sampling_of(config, rule, score, temperature, top_p, top_k)
        (of_row,) = sampling_of_rows(sampling, 1, seed)
        row.options = RowOptions(of_row, 0, None if on_step is None else Listener(on_step))
        return Request(self, row, deadline, on_final)

    def _line_up(self, requests, most):
        """Put requests in line together, if no more than `most` wait then."""
        with self._changed:
            self._refuse_if_closed()
            if len(self._waiting) + len(requests) > most:
                raise QueueFull(f"queue: {len(self._waiting)} requests are waiting already")
            self._waiting.extend(requests)
            self._start()
            self._changed.notify_all()

    def warm_up(self, *, progress: Progress | None = None, **options: Any) -> WarmUp:
        """Compile and capture all that requests with these options will need; returns when it is
        made. Without it things work, and the first requests wait for what they are the first to
        need.

        options: rule, score, temperature, top_p, top_k, as in `submit`; call it again for others.
        progress: called as it goes on; None shows a bar where standard error is a terminal.
        """
        began, compiled = time.perf_counter(), watch().kernels
        forward, schedule = self._decoder.forward, self._schedule
        with shown(progress) as tell:
            captured = self._call(lambda: warm_forward(forward, schedule, tell, **options))
            length = schedule.block_length
            for prompts in example_prompts(self.rows, self.positions, length):
                gen_length = min(length, self.positions - 1)
                requests = [
                    self._request(prompt, gen_length=gen_length, **options) for prompt in prompts
                ]
                self._line_up(requests, self.queue + len(requests))
                for number, request in enumerate(requests):
                    tell("decoding", number, len(requests))
                    request.result()
        return WarmUp(watch().kernels - compiled, captured, time.perf_counter() - began)

    def _call(self, function):
        """What function() returns, or raises, in the loop's thread between two turns."""
        self._refuse_own_thread("warm_up")
        future: Future = Future()
        with self._changed:
            self._refuse_if_closed()
            self._calls.append((function, future))
            self._start()
            self._changed.notify_all()
        return future.result()

    def stats(self) -> dict:
        """What the engine is doing and has done.

        rows, busy, waiting: now. finished: requests that have ended. tokens: that became final.
        turns; refreshes, cached_steps: forwards launched, of one or more rows each. compiled:
        kernels compiled in this process; compile_seconds. captured: forwards captured in CUDA
        graphs; capture_seconds. bytes: canvas, cache and logits.
        """
        with self._changed:
            held = self._space.held.values()
            return {
                "rows": self.rows,
                "busy": len(self._running),
                "waiting": len(self._waiting),
                "finished": self._finished,
                "tokens": self._tokens,
                "turns": self._turns,
                "refreshes": self._decoder.forwards["refresh"],
                "cached_steps": self._decoder.forwards["cached"],
                "compiled": watch().kernels,
                "compile_seconds": watch().seconds,
                "captured": len(self._space.forwards()),
                "capture_seconds": self._space.capture_seconds,
                "bytes": sum(tensor.numel() * tensor.element_size() for tensor in held),
            }

    @property
    def closed(self) -> bool:
        """Whether no more requests are taken: it was closed, or its device has failed."""
        return self._closed is not None

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests, and return when the loop's thread has ended.

        drain: finish what was submitted; False: cancel it. Closing twice is closing once. What the
        engine had allocated is freed with it.
        """
        arguments.flag("drain", drain)
        self._refuse_own_thread("close")
        with self._changed:
            self._closed = self._closed or "it was closed"
            self._ending = True
            requests = [] if drain else [*self._waiting, *self._running.values()]
            self._changed.notify_all()
            thread = self._thread
        for request in requests:
            self._cancel(request)
        if thread is not None:
            thread.join()

    def __enter__(self) -> "Engine":
        with self._changed:
            self._refuse_if_closed()
            self._start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close(drain=kind is None)

    def _refuse_own_thread(self, what):
        """RuntimeError where the loop's own thread would wait for the loop."""
        if threading.current_thread() is self._thread:
            raise RuntimeError(f"{what}: a rule or listener waits for the loop that called it")

    def _refuse_if_closed(self):
        if self._closed:
            raise EngineClosed(f"engine: it takes no more requests: {self._closed}")

    def _start(self):
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="fastdllm-engine", daemon=True)
            self._thread.start()

    def _cancel(self, request):
        with self._changed:
            if request._over:
                return False
            request._cancelled = True
            if request in self._waiting:
                self._waiting.remove(request)
                self._finished += 1
                request._over = True
                request._end(RequestCancelled("the request was cancelled before it began"))
            self._changed.notify_all()
        return True

    def _loop(self):
        """What the engine's thread runs, until it is closed and nothing is left."""
        device = self.model.device
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        error: BaseException | None = None
        try:
            with on_device, torch.inference_mode(False), torch.no_grad():
                while self._wait_for_work():
                    self._take_turn()
        except BaseException as unexpected:
            error = unexpected
            log.exception("engine: the loop has failed")
        self._end_all(error)

    def _wait_for_work(self):
        """Sleep until there is something to do, and let requests in; False: the loop ends."""
        with self._changed:
            while not (self._running or self._waiting or self._calls or self._ending):
                self._changed.wait()
            calls = list(self._calls)
            self._calls.clear()
            if not (self._running or self._waiting or calls):
                return False
        for function, future in calls:
            _resolve(future, function)
        return True

    def _admit(self):
        """Give the requests that wait the rows that are free, in their order."""
        admitted = 0
        while self._decoder.free and (request := self._next()):
            self._decoder.admit(request._row)
            admitted += 1
        if admitted:
            self._decoder.compile_ahead()

    def _next(self):
        """The first request in line, which runs from now on, or None."""
        with self._changed:
            if not self._waiting:
                return None
            request = self._waiting.popleft()
            self._running[request._row] = request
            return request

    def _take_turn(self):
        try:
            self._admit()
            self._drop_what_is_late()
            if not self._running:
                return
            self._turns += 1
            self._decoder.turn(refresh_tokens=REFRESH_TOKENS)
        except Exception as error:
            self._fail_running(error)
            return
        for row, request in list(self._running.items()):
            self._tokens += request._advance() if row.failure is None else 0
            if row.done:
                self._leave(request, row.failure)

    def _drop_what_is_late(self):
        """End requests that were cancelled or whose deadline has passed."""
        now = time.perf_counter()
        with self._changed:
            looked_at = list(self._running.values())
            if self._turns % LINE_TURNS == 0:
                looked_at += self._waiting
        late = [
            request
            for request in looked_at
            if request._cancelled or (request._deadline or now) < now
        ]
        for request in late:
            if request._cancelled:
                self._leave(request, RequestCancelled("the request was cancelled"))
            else:
                self._leave(request, TimeoutError("deadline: it passed before the request's end"))

    def _leave(self, request, error=None):
        """A request is over; its row, if it has one, is free at once."""
        row = request._row
        with self._changed:
            if self._running.pop(row, None) is None and request in self._waiting:
                self._waiting.remove(request)
            self._finished += 1
            request._over = True
            if request._cancelled and error is None:  # in its last turn
                error = RequestCancelled("the request was cancelled")
        if row in self._decoder.rows:
            self._decoder.release(row)
        request._end(error)

    def _fail_running(self, error):
        """A forward failed: its rows are lost. Go on where the device still answers."""
        log.error("engine: a forward has failed: %s", error)
        for request in list(self._running.values()):
            failure = RuntimeError(f"engine: a forward has failed: {error}")
            failure.__cause__ = error
            self._leave(request, failure)
        self._space.steps.clear()
        self._space.uses.clear()
        try:
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)
                torch.cuda.empty_cache()
        except Exception as broken:
            self._space.abandon()
            with self._changed:
                self._closed = f"its device has failed: {broken}"
                self._ending = True
            self._end_all(broken)

    def _end_all(self, error):
        """Nothing is left waiting when the loop ends."""
        with self._changed:
            self._closed = self._closed or "it was closed"
            if error is not None:
                self._closed = f"its loop has failed: {error}"
            left = [*self._running.values(), *self._waiting]
            calls = list(self._calls)
            self._waiting.clear()
            self._calls.clear()
        for request in left:
            self._leave(request, EngineClosed(f"engine: {self._closed}"))
        for _, future in calls:
            future.set_exception(EngineClosed(f"engine: {self._closed}"))


def _resolve(future, function):
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)


def _check_memory(model, rows, positions, cache):
    """MemoryError where the cache cannot fit, before it is allocated."""
    if cache == "none":
        return
    a_row = cache_bytes(model.config, 1, positions, model.dtype)
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        # What PyTorch's allocator holds and does not use counts as free.
        free += torch.cuda.memory_reserved(model.device)
        free -= torch.cuda.memory_allocated(model.device)
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if rows * a_row > free:
        raise MemoryError(
            f"rows: a cache of {rows} rows of {positions} positions takes {rows * a_row:,} bytes, "
            f"{free:,} are free: {free // a_row} rows would fit"
        )
