"""What `fastdllm generate` and `chat` show: the canvas while it is denoised, and the lines that sum
a run up.

A `View` prints text only (a pipe, a file, --no-color), or draws frames on a console of rich, which
is imported only then. It knows nothing of how a run is made.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

from .decode import Generation
from .text import TextModel

MASK = "░"
STOP = "·"
FRAME_SECONDS = 1 / 30
# A committed token's colour by its score, the first floor that it reaches; named colours, which
# every terminal maps.
COLOURS = ((0.9, "green"), (0.7, "yellow"), (0.5, "dark_orange"))


class Piece(NamedTuple):
    """A committed token as it is shown; text None: an end of text."""

    text: str | None
    colour: str


def colour_of(score: float) -> str:
    """The colour of a token committed with this score; red for NaN and below the last floor."""
    return next((colour for floor, colour in COLOURS if score >= floor), "red")


def terminal() -> Any:
    """A rich console on standard output."""
    from rich.console import Console

    return Console()


class View:
    """What a run prints: text only, or with a rich `console` frames too while it goes on.

    quiet: nothing at all.
    """

    def __init__(self, console: Any = None, quiet: bool = False):
        self.console = console
        self.quiet = quiet

    def line(self, text: Any = "", style: str = "") -> None:
        """Print one line, on a console in a rich style."""
        if self.quiet:
            return
        if self.console is None:
            print(text, flush=True)
            return
        self.console.print(
            text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True
        )

    @contextmanager
    def frames(
        self, tokenizer: Any, prompt_length: int, gen_length: int, stop_ids: Iterable[int]
    ) -> "Iterator[Frames | None]":
        """Draw a run that goes on inside; the frames are wiped at the end.

        Yields the Frames, or None where there is no console: then nothing is called at every step.
        """
        if self.console is None:
            yield None
            return
        from rich.live import Live

        frames = Frames(tokenizer, prompt_length, gen_length, stop_ids)
        with Live(
            frames.render(), console=self.console, auto_refresh=False, transient=True
        ) as live:
            frames.draw = lambda: live.update(frames.render(), refresh=True)
            yield frames

    def answer(self, text: str, frames: "Frames | None") -> None:
        """Print a finished run's text.

        It is in colours if there are frames whose tokens, decoded one by one, spell it.
        """
        coloured = None if frames is None else frames.text()
        if coloured is not None and coloured.plain == text:
            self.line(coloured)
        else:
            self.line(text)


class Frames:
    """The generated part of one row's canvas as it fills; its `on_step` goes to `generate`.

    pieces: for each position after the prompt a Piece, or None while it is masked. fresh: the
    places committed since the last frame. seconds: the time spent here. draw: shows `render`.
    """

    def __init__(
        self, tokenizer: Any, prompt_length: int, gen_length: int, stop_ids: Iterable[int]
    ):
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length
        self.stop_ids = set(stop_ids)
        self.pieces: list[Piece | None] = [None] * gen_length
        self.fresh: set[int] = set()
        self.status = "forward 0"
        self.draw: Callable[[], None] = lambda: None
        self.drawn_at = 0.0
        self.seconds = 0.0

    def on_step(self, event: Any) -> None:
        """Take in a StepEvent; draw unless the last frame is younger than FRAME_SECONDS."""
        began = perf_counter()
        places = (event.positions - self.prompt_length).tolist()
        tokens, scores = event.token_ids.tolist(), event.scores.tolist()
        for place, token, score in zip(places, tokens, scores, strict=True):
            self.pieces[place] = self._piece(token, score)
        self.fresh.update(places)
        self.status = f"forward {event.step + 1} ({event.kind})"
        if began - self.drawn_at > FRAME_SECONDS:
            self.draw()
            self.fresh.clear()
            self.drawn_at = perf_counter()
        self.seconds += perf_counter() - began

    def _piece(self, token: int, score: float) -> Piece:
        if token in self.stop_ids:
            return Piece(None, "dim")
        return Piece(self.tokenizer.decode([token]), colour_of(score))

    def render(self) -> Any:
        """The whole canvas as a rich Text and a status line below it.

        Masks are dim, tokens in their colours and the newest bold.
        """
        from rich.text import Text

        frame = Text()
        for place, piece in enumerate(self.pieces):
            if piece is None:
                frame.append(MASK, "dim")
                continue
            text = STOP if piece.text is None else piece.text
            bold = "bold " if place in self.fresh else ""
            frame.append(text, bold + piece.colour)
        return frame.append(f"\n{self.status}", "dim")

    def text(self) -> Any:
        """The tokens before the first end of text as a rich Text in their colours."""
        from rich.text import Text

        whole = Text()
        for piece in self.pieces:
            if piece is None or piece.text is None:
                break
            whole.append(piece.text, piece.colour)
        return whole


def run_of(loaded: TextModel, generation: Generation, seconds: float) -> dict[str, Any]:
    """What the run of one prompt came to, seconds long; only tokens before the first end of text
    count.
    """
    (canvas,), (prompt_length,) = generation.tokens, generation.prompt_lengths
    written = loaded.written(canvas[prompt_length:].tolist())
    refreshes, cached_steps = int(generation.refreshes[0]), int(generation.cached_steps[0])
    forwards = refreshes + cached_steps
    return {
        "text": loaded.decode(written),
        "tokens": len(written),
        "forwards": forwards,
        "refreshes": refreshes,
        "cached_steps": cached_steps,
        "tokens_per_forward": len(written) / forwards,
        "tokens_per_second": len(written) / seconds,
        "seconds": seconds,
    }


def summary(run: Mapping[str, Any]) -> str:
    """The line below a run: tokens, forwards of both kinds, tokens per forward and per second."""
    return (
        "{tokens} tokens, {forwards} forwards ({refreshes} refresh + {cached_steps} cached), "
        "{tokens_per_forward:.2f} tokens per forward, {tokens_per_second:.1f} tokens per second"
    ).format_map(run)


def compared(vanilla: Mapping[str, Any], fast: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs of one prompt say of each other.

    same_text, same_final_number: whether the texts, or the last numbers in them, agree.
    fewer_forwards, faster: how many times fewer forwards and seconds the second took.
    """
    ours, theirs = _last_number(fast["text"]), _last_number(vanilla["text"])
    return {
        "same_text": vanilla["text"] == fast["text"],
        "same_final_number": ours is not None and ours == theirs,
        "fewer_forwards": vanilla["forwards"] / fast["forwards"],
        "faster": vanilla["seconds"] / fast["seconds"],
    }


def comparison(facts: Mapping[str, Any]) -> str:
    """The line below two runs, from what `compared` found."""
    fewer = _times(facts["fewer_forwards"], "fewer forwards", "more forwards")
    faster = _times(facts["faster"], "faster", "slower")
    return f"{_verdict(facts)}, {fewer}, {faster}"


def _verdict(facts):
    if facts["same_text"]:
        return "same answer"
    if facts["same_final_number"]:
        return "same final number, other words"
    return "different answer"


def _last_number(text):
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return numbers[-1] if numbers else None


def _times(ratio, more, less):
    return f"{ratio:.1f}x {more}" if ratio >= 1 else f"{1 / ratio:.1f}x {less}"
