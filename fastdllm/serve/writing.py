"""An answer's text as its tokens become final, and the stop strings that end it."""

from collections.abc import Collection, Sequence

from ..text import TextModel

# What a decoder puts where bytes are no character, or not one yet.
UNDECODED = "\ufffd"


class Writing:
    """The text of one answer, from its final tokens.

    text: what has been given out, which is never taken back: the beginning of what may become a
    stop string is held back, and so are bytes that are no whole character yet. stopped: whether an
    end of text or a stop string has ended it.
    """

    def __init__(self, loaded: TextModel, stops: Sequence[str] = ()):
        self.loaded = loaded
        self.stops = stops
        self.text = ""
        self.stopped = False
        self._written: list[int] = []
        self._spelled = 0

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether a stop string stands in the text of all tokens that are final so far."""
        return cut(self.loaded.decode(self.loaded.written(tokens)), self.stops)[1]

    def add(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """What is new in the text when these, from the first on, are the answer's final tokens.

        last: no more will come, and nothing is held back.
        """
        self._written = self.loaded.written(tokens)
        whole, found = cut(self.loaded.decode(self._written), self.stops)
        self.stopped = found or len(self._written) < len(tokens)
        end = len(whole) if last or found else len(whole) - held(whole, self.stops)
        if end < len(self.text) or not whole.startswith(self.text):
            return ""
        new = whole[len(self.text) : end]
        self.text = whole[:end]
        if last and not found:
            self._spelled = len(self._written)
        return new

    def tokens(self) -> list[int]:
        """The tokens that spell the text."""
        while self._spelled < len(self._written):
            if len(self.loaded.decode(self._written[: self._spelled])) >= len(self.text):
                break
            self._spelled += 1
        return self._written[: self._spelled]


def cut(text: str, stops: Collection[str]) -> tuple[str, bool]:
    """(the text before the first of the stop strings in it, whether there is one)."""
    places = [text.find(stop) for stop in stops]
    found = [place for place in places if place >= 0]
    return (text[: min(found)], True) if found else (text, False)


def held(text: str, stops: Collection[str]) -> int:
    """How many characters at the text's end may still become part of a stop string, or are no
    characters yet.
    """
    undecoded = len(text) - len(text.rstrip(UNDECODED))
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for length in range(min(longest, len(text)), undecoded, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return undecoded
