"""What `fastdllm generate` shows: the canvas while it is denoised, and the lines that sum a run up.

A `View` prints text only (a pipe, a file, --no-color), or draws frames on a console of rich, which
is imported only then. It knows nothing of how a run is made.
"""

import re
from contextlib import contextmanager
from itertools import takewhile
from time import perf_counter

MASK = "░"
STOP = "·"
FRAME_SECONDS = 1 / 30
# A committed token's colour by its score, the first floor that it reaches; named colours, which
# every terminal maps.
COLOURS = ((0.9, "green"), (0.7, "yellow"), (0.5, "dark_orange"))


def colour_of(score):
    """The colour of a token committed with this score (a float; NaN and anything below the last
    floor is red).
    """
    return next((colour for floor, colour in COLOURS if score >= floor), "red")


def terminal():
    """A rich console on standard output."""
    from rich.console import Console

    return Console()


class View:
    """What a run prints: text only, or with a rich `console` also frames while it goes on; `quiet`:
    nothing at all.
    """

    def __init__(self, console=None, quiet=False):
        self.console, self.quiet = console, quiet

    def line(self, text="", style=""):
        """Print one line, on a console in a rich style."""
        if self.quiet:
            return
        if self.console is None:
            print(text, flush=True)
        else:
            self.console.print(
                text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True
            )

    @contextmanager
    def frames(self, tokenizer, prompt_length, gen_length, stop_ids):
        """Draw a run that goes on inside, wiped at the end; yields Frames, or None: nothing to call
        at every step.
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

    def answer(self, text, frames):
        """Print a finished run's text, in colours if there are frames whose tokens, decoded one by
        one, spell it.
        """
        coloured = frames and frames.text()
        self.line(coloured if coloured and coloured.plain == text else text)


class Frames:
    """The generated part of one row's canvas as it fills; `on_step` goes to generate, `seconds` is
    the time spent here.

    `pieces` holds (text, colour) per position after the prompt, (None, colour) at a stop and None
    at a mask.
    """

    def __init__(self, tokenizer, prompt_length, gen_length, stop_ids):
        self.tokenizer, self.prompt_length, self.stop_ids = tokenizer, prompt_length, set(stop_ids)
        self.pieces = [None] * gen_length
        self.fresh = set()
        self.status, self.draw = "forward 0", None
        self.drawn_at, self.seconds = 0.0, 0.0

    def on_step(self, event):
        """Take in a StepEvent; draw unless the last frame is younger than FRAME_SECONDS."""
        began = perf_counter()
        places = (event.positions - self.prompt_length).tolist()
        for place, token, score in zip(
            places, event.token_ids.tolist(), event.scores.tolist(), strict=True
        ):
            piece = None if token in self.stop_ids else self.tokenizer.decode([token])
            self.pieces[place] = (piece, "dim" if piece is None else colour_of(score))
        self.fresh.update(places)
        self.status = f"forward {event.step + 1} ({event.kind})"
        if began - self.drawn_at > FRAME_SECONDS:
            self.draw()
            self.fresh.clear()
            self.drawn_at = perf_counter()
        self.seconds += perf_counter() - began

    def render(self):
        """The whole canvas as a rich Text: masks dim, tokens in their colours, the newest bold, a
        status line below.
        """
        from rich.text import Text

        frame = Text()
        for place, piece in enumerate(self.pieces):
            text, colour = piece or (MASK, "dim")
            frame.append(text or STOP, f"bold {colour}" if place in self.fresh else colour)
        return frame.append(f"\n{self.status}", "dim")

    def text(self):
        """The tokens before the first stop as a rich Text in their colours."""
        from rich.text import Text

        return Text.assemble(
            *takewhile(lambda piece: piece is not None and piece[0] is not None, self.pieces)
        )


def summary(run):
    """The line below a run: tokens, forwards of both kinds, tokens per forward and per second."""
    return (
        "{tokens} tokens, {forwards} forwards ({refreshes} refresh + {cached_steps} cached), "
        "{tokens_per_forward:.2f} tokens per forward, {tokens_per_second:.1f} tokens per second"
    ).format_map(run)


def compared(vanilla, fast):
    """What two runs of one prompt say of each other: same text, same last number, how many times
    fewer and faster.
    """
    numbers = [
        re.findall(r"-?\d+(?:\.\d+)?", run["text"].replace(",", ""))[-1:] for run in (vanilla, fast)
    ]
    return {
        "same_text": vanilla["text"] == fast["text"],
        "same_final_number": numbers[0] == numbers[1] != [],
        "fewer_forwards": vanilla["forwards"] / fast["forwards"],
        "faster": vanilla["seconds"] / fast["seconds"],
    }


def comparison(facts):
    """The line below two runs, from what `compared` found."""
    other = "same final number, other words" if facts["same_final_number"] else "different answer"
    verdict = "same answer" if facts["same_text"] else other
    fewer = _times(facts["fewer_forwards"], "fewer forwards", "more forwards")
    return f"{verdict}, {fewer}, {_times(facts['faster'], 'faster', 'slower')}"


def _times(ratio, more, less):
    return f"{ratio:.1f}x {more}" if ratio >= 1 else f"{1 / ratio:.1f}x {less}"
