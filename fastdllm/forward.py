"""One forward of some rows: from what each row's next forward computes to the logits of its block.

The canvas and the cache lie on the device. A forward is a function of its *plan*, an int64 tensor
with a named column for each number that differs from row to row, and of its `Shape`, all that its
launches depend on beside: forwards that come often are captured in CUDA graphs, one for each shape
and number of rows. Nothing here commits a token: the logits go to sampling.py.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch

from fastdllm_kernels.backend import forced

from .cache import KVCache, Packing, Shape, Span
from .config import ModelConfig
from .graph import Workspace
from .parallel import columns_of, wait_for
from .schedule import Work

# Up to so many tokens, by kind of device, a forward waits for its launches (20 to 37 ms of them for
# an 8B model), so it is worth a CUDA graph.
LAUNCH_BOUND = {"cuda": 2048}
# Such forwards are padded to a multiple of LENGTHS, so that few graphs serve all lengths, and
# captured when a length has come more often than PATIENCE times: a capture costs as much as two.
LENGTHS = 64
PATIENCE = 1
# Packed where that leaves at most this share of the padded tokens: laying rows together and apart
# again moves as much as two norms do.
WORTH_PACKING = 0.9


class Model(Protocol):
    """What decoding needs of a model: DiffusionTransformer has it, and what `replace_attention`
    leaves beside somebody else's model.
    """

    config: ModelConfig

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def modules(self) -> Iterator[torch.nn.Module]: ...

    def attach(self, cache: KVCache | None) -> None:
        """Give every layer the cache whose span this thread's next forward works on, or None."""

    def hidden_states(self, tokens: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
        """tokens [R, T] int64 -> normalised outputs [R, T, C], or [..., C] of the tokens at [...]
        alone, counted through all rows.
        """

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., C] -> logits [..., V]."""


class Plan(NamedTuple):
    """The columns of a forward's plan, [R] int64 each: the row of canvas and cache, and of `Work`
    where the tokens begin, how many they are, where the canvas ends, where the block begins.
    """

    slot: torch.Tensor
    origin: torch.Tensor
    length: torch.Tensor
    visible: torch.Tensor
    start: torch.Tensor


class Forward:
    """The canvas and the cache of `slots` rows of up to `capacity` positions, and their forwards.

    block_length: the longest active block. cached: whether keys and values are kept. space: what
    the tensors lie in and where forwards are captured.
    """

    def __init__(
        self,
        model: Model,
        slots: int,
        capacity: int,
        *,
        block_length: int,
        cached: bool,
        space: Workspace,
    ):
        self.model = model
        self.config = model.config
        self.columns = columns_of(model)
        self.space = space
        space.synchronize = wait_for(model)
        self.block_length = block_length
        device = model.device
        # The margin lets a short last block be read and written back at the full block length.
        length = capacity + block_length
        self.canvas = space.tensor("canvas", slots, length, dtype=torch.int64, device=device)
        self.positions = space.tensor("positions", length, dtype=torch.int64, device=device)
        torch.arange(length, out=self.positions, device=device)
        self.cache = KVCache(
            self.config,
            slots,
            capacity if cached else 0,
            device=device,
            dtype=_product_dtype(model),
            allocate=functools.partial(space.tensor, "cache"),
        )
        if space.captures:
            logits = slots * block_length * self.columns
            space.tensor("output", logits, dtype=model.dtype, device=device)
        # What captured forwards have in common.
        self.key = self.canvas.shape, self.cache.data.shape, block_length, self.config, forced()

    def write(self, slot: int, tokens: torch.Tensor) -> None:
        """Lay a row's canvas [total] int64 into a slot. Behind it lies no mask, so that what is
        masked in a block may be committed, however far the block would reach.
        """
        behind = int(self.config.mask_id == 0)
        row = torch.full(self.canvas.shape[1:], behind, dtype=torch.int64, device="cpu")
        row[: len(tokens)] = tokens
        self.canvas[slot] = self.space.upload(row)

    def parts(self, works: Sequence[Work]) -> list[slice]:
        """How works of one kind (all refreshes, or all cached steps) are divided into forwards.

        A refresh that waits for its launches is captured by itself: of one row there are few
        lengths, of several rows too many to capture all, and rows together gain little on one
        another, since a refresh is bound by arithmetic.
        """
        tokens = sum(work.length for work in works)
        alone = works[0].refresh and self.space.captures and tokens <= self._launch_bound()
        if alone and len(works) > 1:
            return [slice(index, index + 1) for index in range(len(works))]
        return [slice(0, len(works))]

    def run(self, slots: Sequence[int], works: Sequence[Work]) -> torch.Tensor:
        """The logits [R, T, V] of the works' blocks, T 1 where all commit their first position
        alone, and after them of rows that sit this forward out, if it was padded by some; they hold
        until the next forward. The works are all refreshes from position 0, or all other refreshes,
        or all cached steps.
        """
        entries = [
            (slot, work.origin, work.length, work.visible, work.start)
            for slot, work in zip(slots, works, strict=True)
        ]
        shape, patience = self._shape(slots, works)
        if patience is not None and not shape.stores:
            padding = (1 << (len(slots) - 1).bit_length()) - len(slots)
            entries += [(slot, 0, 0, 0, 0) for slot in self.spare(slots, padding)]
        return self._run(shape, patience, entries)

    def captured(self, logits: torch.Tensor) -> bool:
        """Whether these logits, all that `run` returned, are those of a captured forward."""
        held = self.space.held.get("output")
        return self.space.captures and held is not None and logits.data_ptr() == held.data_ptr()

    def logits(self, rows: int, width: int) -> torch.Tensor:
        """Where the logits [rows, width, V] of a captured forward lie; without captures a new
        tensor.
        """
        vocab, dtype, device = self.columns, self.model.dtype, self.model.device
        if self.space.captures:
            return self.space.tensor("output", rows, width, vocab, dtype=dtype, device=device)
        return torch.zeros(rows, width, vocab, dtype=dtype, device=device)

    def spare(self, slots: Sequence[int], count: int) -> list[int]:
        """Up to `count` slots that are not among these."""
        taken = set(slots)
        free = (slot for slot in range(len(self.canvas)) if slot not in taken)
        return list(itertools.islice(free, count))

    def captured_forms(self, examples: Iterable[Work]) -> list[tuple[Shape, int]]:
        """The (shape, number of rows) of every forward that is captured when works such as these
        come, alone or, for cached steps, together.
        """
        # Of works that are launched alike one stands for all.
        alike = {(work.refresh, work.origin > 0, work.length): work for work in examples}
        forms: dict[tuple[Shape, int], None] = {}
        for work in alike.values():
            for count in [1] if work.refresh else self.row_counts():
                shape, patience = self._shape(range(count), [work] * count)
                if patience is not None:
                    forms[shape, count] = None
        return list(forms)

    def row_counts(self) -> list[int]:
        """The numbers of rows that cached steps are padded to."""
        slots = len(self.canvas)
        return sorted({min(1 << power, slots) for power in range(slots.bit_length() + 1)})

    def capture(self, shape: Shape, rows: int) -> None:
        """Compile and capture a forward of that form, computing nothing for anybody."""
        self._run(shape, 0, [(0,) * len(Plan._fields)] * rows)

    def _run(self, shape, patience, entries):
        """The logits of a forward with these plan entries, a tuple for each row."""
        rows = len(entries)
        # Columns of whole 16 bytes as int32: kernels are compiled for the alignment of pointers.
        padding = [0] * (-rows % 4)
        columns = [[*column, *padding] for column in zip(*entries, strict=True)]
        plan = torch.tensor(columns, dtype=torch.int64, device="cpu")
        compute = functools.partial(self._compute, shape, rows)
        key = None if patience is None else (self.key, shape, rows)
        return self.space.run(key, shape, compute, plan, patience or 0)

    def _shape(self, slots, works):
        """(the Shape of a forward, how often it must have come to be captured; None: never)."""
        first = works[0]
        lengths = [work.length for work in works]
        width, ragged, patience = max(lengths), min(lengths) < max(lengths), None
        if not first.refresh and width <= self.block_length:
            # The block's own positions: one shape for all such steps.
            width, ragged, patience = self.block_length, True, 0
        elif len(works) * width <= self._launch_bound():
            # Ragged even where it is not: half as many graphs. The canvas holds no more.
            padded = -(-width // LENGTHS) * LENGTHS
            width, ragged, patience = min(padded, self.canvas.shape[1]), True, PATIENCE
        every_row = list(slots) == list(range(len(self.canvas)))
        alike = len({(work.origin, work.length, work.visible) for work in works}) == 1
        shared = first.refresh and every_row and alike and not ragged
        tokens = sum(lengths)
        pack = patience is None and tokens <= WORTH_PACKING * len(works) * width
        shape = Shape(
            width,
            block=1 if first.alone else self.block_length,
            stores=first.refresh,
            whole=first.refresh and first.origin == 0,
            ragged=ragged,
            paged=not (first.refresh and every_row),
            shared=first.origin + width if shared else 0,
            packed=tokens if pack else 0,
        )
        return shape, patience

    def _launch_bound(self):
        return LAUNCH_BOUND.get(self.model.device.type, 0)

    def _compute(self, shape, rows, plan):
        """The logits [R, T, V] of the blocks of a plan's `rows` rows, from device tensors alone."""
        columns = Plan(*plan[:, :rows])
        packing = Packing.of(columns.length, shape.width, shape.packed) if shape.packed else None
        page, *span = plan[:4].to(torch.int32)[:, :rows]
        pages = page[:, None] if shape.paged else None
        self.cache.span = Span(*span, shape, page_table=pages, packing=packing)
        wanted = self._wanted(shape, columns, packing)
        with attached(self.model, self.cache):
            hidden = self.model.hidden_states(self._tokens(shape, columns, packing), wanted)
        return self.model.head(hidden)

    def _tokens(self, shape, plan, packing):
        """What the model is fed: [R, T] int64, or packed [1, N]."""
        if packing:
            position = plan.origin[packing.row] + packing.offset
            return self.canvas[plan.slot[packing.row], position][None]
        position = plan.origin[:, None] + self.positions[: shape.width]
        position = position.clamp(max=self.canvas.shape[1] - 1)
        return self.canvas[plan.slot[:, None], position]

    def _wanted(self, shape, plan, packing):
        """Which outputs give a block's logits, [R, T] int64 counted through all rows; None: all."""
        shift = self.config.logit_shift
        if not shape.stores and shape.width == shape.block and not shift:
            return None
        if packing:
            first = packing.slot[:, :1]
        else:
            rows = torch.arange(len(plan.slot), device=plan.slot.device)
            first = shape.width * rows[:, None]
        offset = (plan.start - plan.origin)[:, None] + self.positions[: shape.block] - shift
        return first + torch.minimum(offset, plan.length[:, None] - 1).clamp(min=0)


def _product_dtype(model):
    """What the model's products give keys and values in."""
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype


@contextmanager
def attached(model: Model, cache: KVCache | None) -> Iterator[None]:
    """For one forward the model's layers see this cache: what a listener or a rule computes with
    the same model does not.
    """
    model.attach(cache)
    try:
        yield
    finally:
        model.attach(None)
