"""From a forward's logits to the canvas: what is selected, and what the blocks hold then.

Where one kind of sampling with a branch in the select kernel serves all rows of a captured forward,
and nobody listens, this too is captured: some ten small launches become one.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fastdllm_kernels import Selection
from fastdllm_kernels.rules import Kept, branch_of, memory_of, new_memory

from .forward import PATIENCE, Forward
from .parallel import selection_of
from .sampling import Columns, RowSampling, Sampling, row_columns, select
from .schedule import Row, Work


class Place(NamedTuple):
    """Where in the canvas a row's tokens are decided: of its slot the `length` positions from
    `start` on, in the block's forward number `step`. Nothing is decided where the length is 0.
    """

    slot: int
    start: int
    length: int
    step: int


NOWHERE = Place(0, 0, 0, 0)


@dataclass(eq=False)
class Launched:
    """Rows of one forward and of one kind of sampling, and what was decided of them.

    report: on its way to the host; of each row how many masks are left (below 0: as in Selection),
    what its block holds, and where the rule has no branch in the kernel, last, what is wrong with
    its mask. selection: None where it was captured. failure: what the rule raised.
    """

    rows: list[Row]
    works: list[Work]
    selection: Selection | None = None
    report: torch.Tensor | None = None
    failure: Exception | None = field(default=None, repr=False)

    def faults(self, report: list[list[int]]) -> list[int]:
        """What is wrong with the mask of each row's rule, of the report on the host; 0 nothing."""
        sampling = sampling_of_work(self.rows[0], self.works[0]).sampling
        checked = branch_of(sampling.rule) is None
        return [of_row[-1] if checked else 0 for of_row in report]


def sampling_of_work(row: Row, work: Work) -> RowSampling:
    """How a row's forward commits: by its rule, or its first position alone."""
    sampling = row.options.sampling
    return sampling.first_alone() if work.alone else sampling


class Committer:
    """Launches what follows the forwards over one canvas. mask_id: the id of a mask."""

    def __init__(self, forward: Forward, mask_id: int):
        self.forward = forward
        self.decide = selection_of(forward.model)
        self.mask_id = mask_id
        # What rules of a class keep of each slot's block from step to step, by name.
        self._memories: dict[type, dict[str, tuple[Kept, torch.Tensor]]] = {}
        if forward.space.captures:
            size = len(forward.canvas) * (1 + forward.block_length)
            forward.space.tensor("report", size, dtype=torch.int64, device=forward.canvas.device)

    def forget(self, slot: int) -> None:
        """Set back what rules keep of a slot's block: a row comes whose blocks begin."""
        for memory in self._memories.values():
            for kept, of_slots in memory.values():
                of_slots[slot] = kept.start

    def launch(self, rows: list[Row], works: list[Work], logits: torch.Tensor) -> Launched:
        """Decide for rows of one kind of sampling from their logits [R, T, V], of which there may
        be more, of rows that sit the forward out.
        """
        samplings = [sampling_of_work(row, work) for row, work in zip(rows, works, strict=True)]
        places = [
            Place(row.slot, work.start, work.last - work.start, row.step)
            for row, work in zip(rows, works, strict=True)
        ]
        forwards = [row.forwards for row in rows]
        launched = Launched(rows, works)
        heard = any(row.options.listener is not None for row in rows)
        branch = branch_of(samplings[0].sampling.rule)
        if branch and not heard and self.forward.captured(logits):
            report = self._run(samplings, places, forwards, logits)
        else:
            try:
                launched.selection, report = self._run_eagerly(
                    samplings, places, forwards, logits[: len(rows)]
                )
            except Exception as error:
                if branch:
                    raise
                launched.failure = error
                return launched
        launched.report = self.forward.space.download(report[: len(rows)])
        return launched

    def rehearse(self, samplings: list[RowSampling], width: int) -> None:
        """Compile what rows of these samplings need for blocks of `width` positions; nothing is
        decided.
        """
        count = len(samplings)
        logits = self.forward.logits(count, width)
        self._run_eagerly(samplings, [NOWHERE] * count, [0] * count, logits)

    def capture(self, samplings: list[RowSampling], width: int) -> None:
        """Capture what these rows need after a captured forward; nothing is decided."""
        count = len(samplings)
        logits = self.forward.logits(count, width)
        self._run(samplings, [NOWHERE] * count, [0] * count, logits, patience=0)

    def _run_eagerly(self, samplings, places, forwards, logits):
        """(Selection, report) of these rows."""
        columns = _columns(samplings, places, forwards)
        table = self.forward.space.upload(columns.table)
        return self._decide(samplings[0].sampling, columns, logits, table)

    def _run(self, samplings, places, forwards, logits, patience=PATIENCE):
        """The report on these rows, from a captured graph once they have come often enough."""
        missing = len(logits) - len(samplings)
        slots = self.forward.spare([place.slot for place in places], missing)
        columns = _columns(
            samplings + samplings[:1] * missing,
            places + [NOWHERE._replace(slot=slot) for slot in slots],
            forwards + [0] * missing,
        )
        sampling = samplings[0].sampling
        key = self.forward.key, sampling.kind(), columns.layout, tuple(logits.shape)

        def report(table):
            return self._decide(sampling, columns, logits, table)[1]

        return self.forward.space.run(key, None, report, columns.table, patience, "report")

    def _decide(self, sampling: Sampling, columns: Columns, logits, table):
        """(Selection, report) of rows with these columns, whose table lies on the device."""
        of_rows = columns.on(table)
        in_block = self.forward.positions[: logits.shape[1]]
        place = of_rows["slot"][:, None], of_rows["start"][:, None] + in_block
        tokens = self.forward.canvas[place]
        candidates = (tokens == self.mask_id) & (in_block < of_rows["length"][:, None])
        memory = self._memory(sampling.rule)
        held = {name: of_slots[of_rows["slot"]] for name, (_, of_slots) in memory.items()}
        faults = None
        if branch_of(sampling.rule) is None:
            faults = torch.zeros(len(tokens), dtype=torch.int32, device=tokens.device)
        mask_id = self.mask_id
        selection = select(
            sampling, of_rows, logits, tokens, candidates, mask_id, held, faults, self.decide
        )
        self.forward.canvas[place] = tokens
        for name, (kept, of_slots) in memory.items():
            block_is_done = selection.remaining[:, None] == 0
            of_slots[of_rows["slot"]] = held[name].masked_fill(block_is_done, kept.start)
        report = [selection.remaining[:, None], tokens]
        report += [] if faults is None else [faults[:, None]]
        return selection, torch.cat(report, dim=1)

    def _memory(self, rule):
        """What rules of this class keep of all slots' blocks; empty for most."""
        if type(rule) not in self._memories:
            canvas, width = self.forward.canvas, self.forward.block_length
            tensors = new_memory(rule, len(canvas), width, canvas.device)
            kept = memory_of(rule)
            self._memories[type(rule)] = {name: (kept[name], tensors[name]) for name in kept}
        return self._memories[type(rule)]


def _columns(samplings, places, forwards):
    of_places = zip(Place._fields, map(list, zip(*places, strict=True)), strict=True)
    return Columns.of(**dict(of_places), **row_columns(samplings, forwards))
