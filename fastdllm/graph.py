"""A forward captured once in a CUDA graph and replayed: one launch for what Python would launch
kernel by kernel.

A graph bakes in every address and every number of the host. A forward is therefore a function of
one small integer tensor, its plan, and what else it reads or writes lies at addresses that stay:
the weights, and the tensors of the model's Workspace, which outlives a call of `generate`.

What stays allocated between calls, for each model that captured: the cache, the canvas and the
logits of its largest request so far, and one forward's intermediate results, in one pool that all
its graphs share. `clear(model)` frees them; so does deleting the model.
"""

import ctypes
import functools
import logging
import math
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .cache import Shape

log = logging.getLogger(__name__)
# Captured forwards and selections that a Workspace keeps; the least recently used goes. They share
# their memory. More than the lengths of a refresh up to forward.LAUNCH_BOUND, the sizes of a step,
# and some kinds of selection for each of those.
MOST = 192
# The layout of the cache is kept while it holds a request, and grows to hold both the old and the
# new one, but not to more than so many times what the new one needs.
SPARE_LAYOUT = 2
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, eq=False)
class Captured:
    """A captured forward, or (shape None) the selection that follows one: its graph reads `plan`, a
    tensor on the device, and leaves its result in `output`. Both lie where they lie: what is copied
    into the plan in the stream's order may not overtake a replay that reads it.
    """

    shape: Shape | None
    plan: torch.Tensor
    graph: torch.cuda.CUDAGraph
    output: torch.Tensor

    @property
    def kind(self) -> str:
        """ "refresh" or "cached", as in StepEvent, or "selection"."""
        if self.shape is None:
            return "selection"
        return "refresh" if self.shape.stores else "cached"


class Workspace:
    """The tensors that forwards work on, and the captured forwards that know their addresses.

    state: what the captured forwards take the model to be (`_state`); None where nothing is to be
    captured. rows, capacity: the layout of the cache, as it was last asked for.
    """

    def __init__(self, device: torch.device, state: list | None = None):
        self.device = device
        self.state = state
        self.captures = state is not None
        self.rows = self.capacity = 0
        self.held: dict[str, torch.Tensor] = {}
        self.steps: OrderedDict[Hashable, Captured] = OrderedDict()
        self.uses: Counter = Counter()
        self.lock = threading.Lock()
        self.synchronize: Callable = torch.cuda.Stream.synchronize
        self.capture_seconds = 0.0
        # Pinned memory by shape and dtype, and how much of it was given out since the last wait.
        self._buffers: dict = {}
        self._taken: Counter = Counter()

    def layout(self, rows: int, capacity: int) -> tuple[int, int]:
        """(rows, positions a row) of a cache that holds at least so many of both: the last one
        where that does, so that what was captured over it serves smaller requests too.
        """
        if rows > self.rows or capacity > self.capacity:
            both = max(rows, self.rows), max(capacity, self.capacity)
            fits = math.prod(both) <= SPARE_LAYOUT * rows * capacity
            self.rows, self.capacity = both if fits else (rows, capacity)
        return self.rows, self.capacity

    def tensor(
        self, name: str, *shape: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """A tensor whose address stays until a larger one or another dtype is asked for. It holds
        what was left in it.
        """
        size = math.prod(shape)
        held = self.held.get(name)
        if held is None or held.numel() < size or held.dtype != dtype:
            self.steps.clear()
            self.uses.clear()
            del held
            self.held.pop(name, None)  # freed before the new one is made
            self.held[name] = torch.zeros(size, dtype=dtype, device=device)
        return self.held[name][:size].view(shape)

    def run(
        self,
        key: Hashable | None,
        shape: Shape | None,
        function: Callable[[torch.Tensor], torch.Tensor],
        plan: torch.Tensor,
        patience: int = 0,
        output: str = "output",
    ) -> torch.Tensor:
        """function(plan on the device), a tensor on the device.

        plan: int64, on the host. With a key (None: none) the function is captured where this
        Workspace captures, and later plans of that key replay it: it must depend on nothing else,
        do nothing for a plan of zeros and read nothing back to the host. The result then lies in
        the tensor of the name `output`, until the next run with that name. patience: so many runs
        of the key come first as they are, for what may not come often enough to repay a capture.
        """
        if key is not None and key not in self.steps and self.captures:
            self.uses[key] += 1
            if self.uses[key] > patience:
                self._capture(key, shape, function, plan, output)
        if key not in self.steps:
            return function(self.upload(plan))
        self.steps.move_to_end(key)
        step = self.steps[key]
        step.plan.copy_(self._pinned(plan), non_blocking=True)
        step.graph.replay()
        return step.output

    def forwards(self) -> list[Captured]:
        """The captured forwards, without the selections."""
        return [step for step in self.steps.values() if step.shape is not None]

    @contextmanager
    def uncaptured(self) -> Iterator[None]:
        """Inside, forwards run as they are, of whatever key."""
        captures, steps = self.captures, self.steps
        self.captures, self.steps = False, OrderedDict()
        try:
            yield
        finally:
            self.captures, self.steps = captures, steps

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """A small tensor of the host on the device, without waiting for what runs there."""
        return self._pinned(tensor).to(self.device, non_blocking=True)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """A small tensor of the device in memory of the host: there after the next `wait`, and
        until something more is sent either way.
        """
        if tensor.device.type != "cuda":
            return tensor.clone()
        return self._buffer(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)

    def _pinned(self, tensor):
        """A copy of the tensor in memory that the GPU may read until the next `wait`."""
        if self.device.type != "cuda":
            return tensor
        return self._buffer(tensor.shape, tensor.dtype).copy_(tensor)

    def _buffer(self, shape, dtype):
        """Pinned memory that nothing else is sent from or to until the next `wait`."""
        buffers, taken = self._buffers.setdefault((shape, dtype), []), self._taken[shape, dtype]
        if taken == len(buffers):
            buffers.append(torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True))
        self._taken[shape, dtype] += 1
        return buffers[taken]

    def abandon(self) -> None:
        """The device has failed: leave the pinned memory to the end of the process. PyTorch ends
        the process at once where it is freed after that.
        """
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._buffers))

    def _capture(self, key, shape, function, plan, output):
        pool = next(iter(self.steps.values())).graph.pool() if self.steps else None
        began = time.perf_counter()
        try:
            self.steps[key] = record(self, shape, function, plan, pool, output)
        except Exception as error:  # whatever somebody else's model raises
            self.captures = False
            self.steps.clear()
            log.warning(
                "forwards run uncaptured from now on: this model's forward cannot be captured: %s",
                error,
            )
        self.capture_seconds += time.perf_counter() - began
        if len(self.steps) > MOST:
            gone, _ = self.steps.popitem(last=False)
            del self.uses[gone]

    def wait(self) -> None:
        """Until everything launched so far has been computed and has arrived."""
        if self.device.type == "cuda":
            self.synchronize(torch.cuda.current_stream(self.device))
            self._taken.clear()


def record(
    space: Workspace,
    shape: Shape | None,
    function: Callable[[torch.Tensor], torch.Tensor],
    plan: torch.Tensor,
    pool: Any,
    output: str,
) -> Captured:
    """Capture function(plan) for a plan that stays where it is on the device. One thread at a time
    captures: they share the stream.
    """
    with _capturing:
        return _record(space, shape, function, plan, pool, output)


def _record(space, shape, function, plan, pool, output):
    device = space.device
    plan = torch.zeros_like(plan, device=device)
    stream = side_stream(device, 0)
    graph = torch.cuda.CUDAGraph()
    _unfinished.append(graph)
    stream.wait_stream(torch.cuda.current_stream(device))
    # Around the capture too: one that fails leaves its own stream the current one.
    with torch.cuda.stream(stream):
        # Kernels are compiled and libraries allocate their workspaces before the capture.
        result = function(plan)
        output = space.tensor(output, *result.shape, dtype=result.dtype, device=device)
        random = torch.cuda.default_generators[stream.device.index]
        before = random.clone_state()
        try:
            # Not by the context manager torch.cuda.graph, which collects garbage and empties the
            # allocator's cache first: a tenth of a second for each of many graphs.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                # Copied, so that no graph keeps logits of its own: they would be gigabytes.
                output.copy_(function(plan))
            finally:
                graph.capture_end()
        except BaseException:
            # A capture that fails leaves the generator believing it goes on.
            random.graphsafe_set_state(before)
            raise
    torch.cuda.current_stream(device).wait_stream(stream)
    _unfinished.remove(graph)
    return Captured(shape, plan, graph, output)


_capturing = threading.Lock()
# A graph whose capture fails is never freed: PyTorch's allocator goes on asking it.
_unfinished: list[torch.cuda.CUDAGraph] = []


@functools.cache
def side_stream(device: torch.device, index: int) -> torch.cuda.Stream:
    """A stream beside the current one: 0 is captured on, others are for forwards that run parts
    beside each other.
    """
    return torch.cuda.Stream(device)


_workspaces: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@contextmanager
def workspace(model: Any, obstacle: str | None) -> Iterator[Workspace]:
    """The Workspace for one call: the model's own, or one that captures nothing and goes with the
    call, where there is an obstacle to capturing (logged once for each) or where another call is at
    work in the model's own.
    """
    if obstacle:
        _log_once(obstacle)
        yield Workspace(model.device)
        return
    state = model_state(model)
    space = _workspaces.get(model)
    if space is None or space.state != state:
        space = _workspaces[model] = Workspace(model.device, state)
    if not space.lock.acquire(blocking=False):
        yield Workspace(model.device)
        return
    try:
        yield space
    except BaseException:
        # A call that failed half-way leaves nothing that is trusted.
        _workspaces.pop(model, None)
        raise
    finally:
        space.lock.release()


def clear(model: object) -> None:
    """Free what stays allocated for `model` between calls of `generate`; its next forwards are
    captured anew.
    """
    _workspaces.pop(unwrapped(model), None)


def captured(model: object) -> list[Captured]:
    """The captured forwards that `model` keeps between calls of `generate`."""
    space = _workspaces.get(unwrapped(model))
    return space.forwards() if space else []


def pending(model: object) -> dict[Hashable, int]:
    """What has come but not often enough to be captured: how many times."""
    space = _workspaces.get(unwrapped(model))
    if space is None:
        return {}
    return {key: uses for key, uses in space.uses.items() if key not in space.steps}


def unwrapped(model: object) -> Any:
    """What `replace_attention` leaves on somebody else's model, or the model."""
    return getattr(model, "fastdllm_adapter", model)


@functools.cache
def _log_once(obstacle):
    log.info("forwards run uncaptured: %s", obstacle)


def model_state(model: Any) -> list:
    """What a captured forward has baked in of the model: its modules, where their tensors lie, and
    their plain attributes.

    A change that this does not see, inside an object that an attribute names, wants a
    `clear(model)`.
    """
    return [
        (
            id(module),
            [
                _address(tensor)
                for held in (module._parameters, module._buffers)
                for tensor in held.values()
            ],
            {
                name: plain
                for name, value in vars(module).items()
                if (plain := _plain(value)) is not None
            },
        )
        for module in model.modules()
    ]


def _address(tensor):
    """Where a tensor lies; a subclass of Tensor, a quantised weight perhaps, may not say, so it is
    known by itself.
    """
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return tensor.data_ptr() if plain else id(tensor)


def _plain(value):
    """What can be told of an attribute: a number or a text is itself, a function its id, a
    collection what its members are.
    """
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, dict):
        members = value.values()
    elif isinstance(value, list | tuple):
        members = value
    else:
        members = ()
    if callable(value):
        return id(value)
    return [_plain(member) for member in members] if members else None
