"""Where a row of the canvas stands, and what its next forward computes, stores and sees.

Pure Python: no tensor, no model. The cache mode and the CachePolicy are looked at here and nowhere
else, so a way to refresh less, or to see less of the canvas, is a method of `Schedule`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .cache import CachePolicy


@dataclass(frozen=True)
class Work:
    """What one row's next forward computes.

    Positions [origin, origin + length) of the row are computed; they attend to positions
    [0, visible). refresh: their keys and values are stored (without a cache, every forward is a
    refresh). Of the masks among positions [start, last) some are committed; alone: only the first,
    whatever its score.
    """

    refresh: bool
    origin: int
    length: int
    visible: int
    start: int
    last: int
    alone: bool = False


@dataclass(eq=False)
class Row:
    """One sequence that is being decoded.

    text: its token ids, prompt included, masks where nothing is committed yet. slot: the row of the
    device's canvas and cache that it occupies. prompt_length: what comes before the first block.
    given: positions past the prompt that hold real text (only in infilling). stops: the ids that
    end a text. [start, end): the active block; step: the forwards made in it. finished: where the
    block before it began.
    options: whatever the loop keeps with a row. turn: the last turn of the loop it had a part in.
    """

    text: list[int]
    prompt_length: int
    slot: int = 0
    stops: frozenset[int] = frozenset()
    given: frozenset[int] = frozenset()
    options: Any = None
    turn: int = 0
    start: int = 0
    end: int = 0
    finished: int = 0
    step: int = 0
    refreshes: int = 0
    cached_steps: int = 0
    done: bool = False
    failure: Exception | None = field(default=None, repr=False)

    @property
    def total(self) -> int:
        """The length of the row's canvas."""
        return len(self.text)

    @property
    def forwards(self) -> int:
        """The forwards that the row has taken part in."""
        return self.refreshes + self.cached_steps


@dataclass(frozen=True)
class Schedule:
    """The order in which a row's positions are computed (Fast-dLLM, arXiv 2505.22618, section 3.2).

    cache: "none", "prefix" or "dual". logit_shift: the logits for a position come from the output
    so many positions before it. mask_id: the id of a mask.
    """

    cache: str
    policy: CachePolicy
    block_length: int
    logit_shift: int
    mask_id: int

    def begin(self, row: Row) -> None:
        """Put the row at its first block."""
        self._open_block(row, row.prompt_length)

    def work(self, row: Row) -> Work:
        """What the row's next forward computes."""
        visible = self._visible(row)
        if self.cache == "none" or row.step == 0:
            origin = self._refresh_origin(row)
            alone = self._refresh_commits_one()
            last = row.start + 1 if alone else row.end
            return Work(True, origin, visible - origin, visible, row.start, last, alone)
        computed = row.end if self.cache == "dual" else visible
        return Work(False, row.start, computed - row.start, visible, row.start, row.end)

    def examples(self, capacity: int) -> Iterator[Work]:
        """Works of every kind and length that a row of up to `capacity` positions may come to."""
        prompt = (
            1 + self.logit_shift
        )  # of which a refresh that keeps it computes nothing but the end
        for total in range(2, capacity + 1):
            text = [self.mask_id] * total
            for start in {1, prompt, max(1, total - self.block_length)}:
                end = min(start + self.block_length, total)
                for step, refreshes in ((0, 0), (0, 1), (1, 1)):
                    row = Row(text, min(prompt, start), step=step)
                    row.start, row.end, row.refreshes = start, end, refreshes
                    row.finished = max(0, start - self.block_length)
                    yield self.work(row)

    def advance(self, row: Row, tokens: list[int]) -> None:
        """Count a forward whose block now holds `tokens`, and move the row on: a further step of
        its block, the next block, or the end.
        """
        refreshed = self.cache == "none" or row.step == 0
        row.refreshes += refreshed
        row.cached_steps += not refreshed
        row.text[row.start : row.end] = tokens
        if self._stopped(row):
            return
        if self.mask_id in tokens:
            row.step += 1
        else:
            self._open_block(row, row.end)

    def end(self, row: Row, position: int, token: int) -> None:
        """End the row's text before `position`: what follows becomes `token`."""
        for later in range(position, row.total):
            if later not in row.given:
                row.text[later] = token
        row.done = True

    def _open_block(self, row, position):
        """The block that begins with the first mask at `position` or after it."""
        row.finished = row.start
        try:
            row.start = row.text.index(self.mask_id, position)
        except ValueError:
            row.done = True
            return
        row.end = min(row.start + self.block_length, row.total)
        row.step = 0

    def _visible(self, row):
        """Where the canvas ends that a forward sees."""
        ahead = self.policy.suffix_blocks
        if ahead is None:
            return row.total
        return min(row.total, row.end + ahead * self.block_length)

    def _refresh_origin(self, row):
        """The first position that a refresh computes: 0, or past the prompt whose keys are kept, or
        the block that was finished last.

        Where outputs are shifted, the output at the prompt's last position is the first generated
        token's, so that position is computed too.
        """
        every = self.policy.prompt_refreshes
        kept = row.refreshes % every if every else row.refreshes
        if not kept:
            return 0
        if self.policy.keep_finished:
            return row.finished
        return max(0, row.prompt_length - self.logit_shift)

    def _refresh_commits_one(self):
        """Whether a refresh commits the block's first position alone: with shifted outputs and a
        cache, no cached step can see what predicts it.
        """
        return self.cache != "none" and self.logit_shift > 0

    def _stopped(self, row):
        """Whether the text ends now: at its first stop id, once nothing before it is masked. What
        follows becomes that id.
        """
        for position in range(row.start, row.end):
            token = row.text[position]
            if token == self.mask_id:
                return False
            if token in row.stops and position not in row.given:
                self.end(row, position + 1, token)
                return True
        return False
