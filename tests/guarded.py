"""Tensors inside larger buffers whose other elements hold a canary: what reads or writes past a
tensor's own elements shows.

The canary of floats is a NaN of an odd payload, so that a sum over a stray element is NaN; that of
integers is a number that no index comes near.
"""

import contextlib
from unittest import mock

import torch

# Elements before and after: 64 keep every buffer's alignment, as an allocator would give it.
GUARD = 64
CANARY = {
    torch.float32: 0x7FC5A5A5,
    torch.float16: 0x7EA5,
    torch.bfloat16: 0x7FD5,
    torch.int64: 0x2AAAAAAA55555555,
    torch.int32: 0x2AAAAAAA,
    torch.bool: 1,
}
AS_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    """The tensor's elements as integers, NaN payloads and all."""
    return tensor.view(AS_BITS[tensor.element_size()])


class Guarded:
    """One tensor, `view`, that lies somewhere in a 1-D `buffer` of its dtype."""

    def __init__(self, buffer, view):
        self.buffer, self.view = buffer, view
        self.before = buffer.clone()

    def unchanged(self):
        """Whether no element of the buffer, inside the view or outside, has changed since."""
        return bits(self.buffer).equal(bits(self.before))

    def guards_hold(self):
        """Whether every element outside the view is what it was."""
        outside = torch.ones(self.buffer.shape, dtype=torch.bool, device=self.buffer.device)
        view = self.view
        outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
        return bits(self.buffer)[outside].equal(bits(self.before)[outside])


def buffer_of(elements, dtype, device):
    buffer = torch.zeros(elements, dtype=dtype, device=device)
    bits(buffer).fill_(CANARY[dtype])
    return buffer


def place(values, random, layout="any", offset=None) -> Guarded:
    """A Guarded whose view equals `values`.

    layout "dense": its elements follow one another. "any": dimensions lie in any order and with
    gaps between, the last one innermost and dense. "last apart": gaps between the last dimension's
    elements too. offset: elements by which the view begins later; None takes 0 or a few.
    """
    order = list(range(values.ndim - 1))
    gaps = [0] * values.ndim
    if layout != "dense":
        random.shuffle(order)
        gaps = [random.choice([0, 0, 1, 3]) for _ in range(values.ndim)]
    order.append(values.ndim - 1)
    strides, step = [0] * values.ndim, 2 if layout == "last apart" else 1
    for dimension in reversed(order):
        strides[dimension] = step
        step *= values.shape[dimension] + gaps[dimension]
    begin = GUARD + (random.choice([0, 0, 1, 2]) if offset is None else offset)
    buffer = buffer_of(begin + max(step, 1) + GUARD, values.dtype, values.device)
    view = buffer.as_strided(values.shape, strides, begin)
    view.copy_(values)
    return Guarded(buffer, view)


@contextlib.contextmanager
def guarded_allocations():
    """Every tensor that torch.empty and its relatives make inside lies in a Guarded and holds NaN
    (integers: the canary). Yields the list of them.
    """
    made, allocate = [], torch.empty

    def guarded(maker):
        def make(*arguments, **options):
            fresh = maker(*arguments, **options)
            if fresh.dtype not in CANARY or fresh.is_meta or not fresh.numel():
                return fresh
            elements = fresh.untyped_storage().nbytes() // fresh.element_size()
            buffer = allocate(elements + 2 * GUARD, dtype=fresh.dtype, device=fresh.device)
            bits(buffer).fill_(CANARY[fresh.dtype])
            made.append(Guarded(buffer, buffer.as_strided(fresh.shape, fresh.stride(), GUARD)))
            return made[-1].view

        return make

    with contextlib.ExitStack() as patches:
        for name in ("empty", "empty_like", "empty_strided"):
            patch = mock.patch.object(torch, name, guarded(getattr(torch, name)))
            patches.enter_context(patch)
        new_empty = guarded(torch.Tensor.new_empty)
        patches.enter_context(mock.patch.object(torch.Tensor, "new_empty", new_empty))
        yield made
