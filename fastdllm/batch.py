"""`fastdllm batch`: the records of a file through the engine, their results appended to another.

A result is one write of one line, so that whoever is killed leaves whole lines, and at most one
torn one at the end, which the next run takes off. What has a result there is not asked again.
"""

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from .options import UsageError
from .records import Record, line_of, record_in, result_of
from .serve.errors import Refused
from .serve.service import Service

try:
    import fcntl
except ImportError:  # Windows: one process at a time is the caller's to see to
    fcntl = None  # type: ignore[assignment]

# Records under way for each row of the engine: so that a row never waits for the next one. The
# engine's line must take them all.
AHEAD = 4
# How a result begins, by which a torn one is told from somebody's file.
BEGINNING = b'{"id": '
# Where there is no terminal, progress is a line once in so many seconds.
TELL_SECONDS = 30.0
ENDED = 503  # what the service refuses with when its engine has


class Results(Protocol):
    """Whatever answers records: pairs of a record and its result, or what it was refused with."""

    def __call__(
        self, records: Iterator[Record], in_order: bool, /
    ) -> Iterator[tuple[Record, dict[str, Any] | Exception]]: ...


class Counts:
    """What became of the records: told as it goes on, and at the end."""

    def __init__(self, total: int, there: int):
        self.total, self.there = total, there
        self.answered = self.broken = 0
        self.began = self.told = time.monotonic()

    def left(self) -> str:
        """The time left, from the pace so far."""
        done = self.answered + self.broken
        if not done:
            return "time left unknown"
        seconds = (time.monotonic() - self.began) / done * (self.total - self.there - done)
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"

    def line(self) -> str:
        """How far it is."""
        return f"{self.there + self.answered + self.broken} of {self.total}, {self.left()}"

    def summary(self) -> str:
        """The last line."""
        parts = [f"{self.answered} answered"]
        parts += [f"{self.there} were there already"] if self.there else []
        parts += [f"{self.broken} broken"] if self.broken else []
        return f"{self.total} records: {', '.join(parts)}"


def run(source: Path, output: Path, results: Results, *, in_order: bool, quiet: bool) -> Counts:
    """Answer every record of `source` that has no result in `output` yet.

    Broken lines, and records that are refused, are reported by their number on standard error; the
    others go on. UsageError for files that cannot be used.
    """
    with opened(output, source) as file:
        there = ids_in(file, output)
        known, total, broken = _looked_through(source)
        counts = Counts(total, len(there & known.keys()))
        for number, error in broken:
            _report(counts, number, error)
        wanted = (record for record in _records(source, known, broken) if record.id not in there)
        with _progress(counts, quiet) as tell:
            for record, result in results(wanted, in_order):
                if isinstance(result, Exception):
                    _report(counts, record.number, result)
                else:
                    _append(file, line_of(result))
                    counts.answered += 1
                tell()
        if not quiet:
            print(counts.summary(), file=sys.stderr)
        return counts


def _append(file: int, line: bytes) -> None:
    if os.write(file, line) < len(line):  # the rest would stand behind somebody else's line
        raise RuntimeError("--output: there is no space left")


def with_engine(make: Callable[[], Service]) -> Results:
    """Results of the engine of a service that is made when there is a record for it, and that ends
    with the last one.
    """

    def results(records, in_order):
        first = next(records, None)
        if first is None:
            return
        service = make()
        service.warm_up()
        most = AHEAD * service.engine.rows
        with ThreadPoolExecutor(most) as threads:
            try:
                wanted = itertools.chain([first], records)
                futures = (threads.submit(_answered, service, record) for record in wanted)
                yield from _finished(futures, most, in_order)
            finally:
                service.close()

    return results


def _answered(service, record):
    try:
        return record, asyncio.run(result_of(service, record))
    except Refused as error:
        if error.status == ENDED:
            raise RuntimeError("the engine has ended") from error
        return record, error


def _finished(futures: Iterator[Future], most: int, in_order: bool) -> Iterator[Any]:
    """What the futures hold, with `most` of them under way: as they end, or in order."""
    running: list[Future] = []
    while True:
        running += itertools.islice(futures, most - len(running))
        if not running:
            return
        looked_at = running[:1] if in_order else running
        done, _ = wait(looked_at, return_when=FIRST_COMPLETED)
        running = [future for future in running if future not in done]
        for future in done:
            yield future.result()


# The files.


@contextmanager
def opened(output: Path, source: Path) -> Iterator[int]:
    """The output, open to append to, for one process alone. UsageError where it cannot be."""
    if output.exists() and source.exists() and output.samefile(source):
        raise UsageError("--output: expected another file than IN")
    try:
        file = os.open(output, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise UsageError(f"--output: cannot write {output}: {error.strerror}") from None
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file
    except BlockingIOError:
        raise UsageError(f"--output: another process writes {output}") from None
    finally:
        os.close(file)


def ids_in(file: int, output: Path) -> set[str | int]:
    """The ids that have a result in the output; a torn last line is taken off first.

    UsageError where a whole line is no result: the file is somebody's.
    """
    found: set[str | int] = set()
    end = 0
    with os.fdopen(os.dup(file), "rb") as lines:
        lines.seek(0)
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                if line[: len(BEGINNING)] != BEGINNING[: len(line)]:
                    raise UsageError(f"--output: line {number} of {output} is no result")
                os.ftruncate(file, end)
                break
            try:
                found.add(json.loads(line)["id"])
            except (ValueError, KeyError, TypeError):
                raise UsageError(f"--output: line {number} of {output} is no result") from None
            end += len(line)
    return found


def _looked_through(source: Path) -> tuple[dict[str | int, int], int, list[tuple[int, str]]]:
    """(the lines of all ids, how many records there are, broken lines with what is wrong)."""
    known: dict[str | int, int] = {}
    broken: list[tuple[int, str]] = []
    for number, line in _lines(source):
        try:
            record = record_in(line, number)
        except ValueError as error:
            broken.append((number, str(error)))
            continue
        if record.id in known:
            broken.append((number, f"its id is that of line {known[record.id]} too"))
        else:
            known[record.id] = number
    return known, len(known) + len(broken), broken


def _records(source: Path, known: dict[str | int, int], broken: list) -> Iterator[Record]:
    """The records of the lines that are not broken."""
    left_out = {number for number, _ in broken}
    for number, line in _lines(source):
        if number not in left_out:
            yield record_in(line, number)


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that hold anything, with their numbers."""
    try:
        with source.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UsageError(f"IN: cannot read {source}: {error.strerror}") from None


# What is told.


def _report(counts: Counts, number: int, error: Any) -> None:
    counts.broken += 1
    print(f"line {number}: {error}", file=sys.stderr, flush=True)


@contextmanager
def _progress(counts: Counts, quiet: bool) -> Iterator[Callable[[], None]]:
    """What tells of the progress: a bar on a terminal, a line now and then elsewhere."""

    def line():
        if not quiet and time.monotonic() - counts.told > TELL_SECONDS:
            counts.told = time.monotonic()
            print(counts.line(), file=sys.stderr, flush=True)

    if quiet or not (sys.stderr and sys.stderr.isatty()):
        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = BarColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("", total=counts.total)

        def draw():
            done = counts.there + counts.answered + counts.broken
            bars.update(bar, completed=done, description=counts.line())

        yield draw
