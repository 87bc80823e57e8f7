"""A forward captured once in a CUDA graph and replayed: one launch for what Python would launch
kernel by kernel.

A graph bakes in every address and every number of the host. A forward is therefore a function of
one small integer tensor, its plan, and what else it reads or writes lies at addresses that stay:
the weights, and the tensors of the model's Workspace, which outlives a call of `generate`.

What stays allocated between calls, for each model that captured: the cache and the canvas of its
largest request so far, and one forward's intermediate results, in one pool that all its graphs
share. `clear(model)` frees them; so does deleting it.
"""

import functools
import logging
import math
import threading
import weakref
from collections import Counter, OrderedDict
from contextlib import contextmanager
from typing import NamedTuple

import torch

log = logging.getLogger(__name__)
# Captured forwards that a model keeps; the least recently used goes. They share their memory, and
# lengths up to decode.LAUNCH_BOUND are as many.
MOST = 48
PLAIN = (bool, int, float, str, type(None))


class Step(NamedTuple):
    """A captured forward: its graph reads the pinned `plan` and leaves, in `result`, a pinned
    report and what else it made.
    """

    plan: torch.Tensor
    graph: torch.cuda.CUDAGraph
    result: tuple


class Workspace:
    """The tensors that a call of `generate` works on and the captured steps that know their
    addresses.

    state: what the captured steps take the model to be (`_state`); None where nothing is to be
    captured.
    """

    def __init__(self, device: torch.device, state=None):
        self.device, self.state, self.captures = device, state, state is not None
        self.held, self.steps, self.uses, self.lock = {}, OrderedDict(), Counter(), threading.Lock()

    def tensor(
        self, name: str, *shape: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """A tensor whose address stays until a larger one or another dtype is asked for. It holds
        what was left in it.
        """
        size = math.prod(shape)
        if (
            name not in self.held
            or self.held[name].numel() < size
            or self.held[name].dtype != dtype
        ):
            self.steps.clear()
            self.uses.clear()
            self.held.pop(name, None)  # freed before the new one is made
            self.held[name] = torch.zeros(size, dtype=dtype, device=device)
        return self.held[name][:size].view(shape)

    def run(self, key, function, plan: torch.Tensor, patience: int = 0):
        """function(plan on the device) -> (report, more), with the report on the host: to be read
        after `wait`.

        plan: int64, on the host. With a key (None: none) the function is captured where this
        Workspace captures, and later plans of that key replay it: it must depend on nothing else,
        do nothing for a plan of zeros and read nothing back to the host. `more` then holds until
        the next replay. patience: so many runs of the key come first as they are, for what may not
        come often enough to repay a capture.
        """
        if key is not None and key not in self.steps and self.captures:
            self.uses[key] += 1
            if self.uses[key] > patience:
                self._capture(key, function, plan)
        if key not in self.steps:
            report, more = function(plan.to(self.device))
            return report.to("cpu", non_blocking=True), more
        self.steps.move_to_end(key)
        step = self.steps[key]
        step.plan.copy_(plan)
        step.graph.replay()
        return step.result

    def _capture(self, key, function, plan):
        pool = next(iter(self.steps.values())).graph.pool() if self.steps else None
        try:
            self.steps[key] = record(function, plan, self.device, pool)
        except Exception as error:  # whatever somebody else's model raises
            self.captures = False
            self.steps.clear()
            log.warning(
                "forwards run uncaptured from now on: this model's forward cannot be captured: %s",
                error,
            )
        if len(self.steps) > MOST:
            gone, _ = self.steps.popitem(last=False)
            del self.uses[gone]

    def wait(self) -> None:
        """Until the reports of every `run` so far have arrived."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def record(function, plan, device, pool) -> Step:
    """Capture function(plan), with the plan's way to the device and its report's way back."""
    plan = torch.zeros_like(plan).pin_memory()
    stream, graph = side_stream(device, 0), torch.cuda.CUDAGraph()
    _unfinished.append(graph)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(
        stream
    ):  # around the capture too: one that fails leaves its own stream the current one
        for _ in range(
            2
        ):  # kernels are compiled and libraries allocate their workspaces before the capture
            report, _ = function(plan.to(device))
        landed = torch.empty(report.shape, dtype=report.dtype, pin_memory=True)
        random = torch.cuda.default_generators[stream.device.index]
        before = random.clone_state()
        try:
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                report, more = function(plan.to(device, non_blocking=True))
                landed.copy_(report, non_blocking=True)
        except BaseException:
            random.graphsafe_set_state(
                before
            )  # a capture that fails leaves the generator believing it goes on
            raise
    torch.cuda.current_stream(device).wait_stream(stream)
    _unfinished.remove(graph)
    return Step(plan, graph, (landed, more))


# a graph whose capture fails is never freed: PyTorch's allocator goes on asking it
_unfinished = []


@functools.cache
def side_stream(device, index):
    """A stream beside the current one: 0 is captured on, others are for forwards that run parts
    beside each other.
    """
    return torch.cuda.Stream(device)


_workspaces = weakref.WeakKeyDictionary()


@contextmanager
def workspace(model, obstacle: str | None):
    """The Workspace for one call: the model's own, or one that captures nothing and goes with the
    call, where there is an obstacle to capturing (logged once for each) or where another call is at
    work in the model's own.
    """
    if obstacle:
        _log_once(obstacle)
        yield Workspace(model.device)
        return
    state, space = _state(model), _workspaces.get(model)
    if space is None or space.state != state:
        space = _workspaces[model] = Workspace(model.device, state)
    if not space.lock.acquire(blocking=False):
        yield Workspace(model.device)
        return
    try:
        yield space
    except BaseException:
        _workspaces.pop(model, None)  # a call that failed half-way leaves nothing that is trusted
        raise
    finally:
        space.lock.release()


def clear(model) -> None:
    """Free what stays allocated for `model` between calls of `generate`; its next forwards are
    captured anew.
    """
    _workspaces.pop(getattr(model, "fastdllm_adapter", model), None)


@functools.cache
def _log_once(obstacle):
    log.info("forwards run uncaptured: %s", obstacle)


def _state(model):
    """What a captured step has baked in of the model: its modules, where their tensors lie, and
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
    return tensor.data_ptr() if type(tensor) in (torch.Tensor, torch.nn.Parameter) else id(tensor)


def _plain(value):
    """What can be told of an attribute: a number or a text is itself, a function its id, a
    collection what its members are.
    """
    if isinstance(value, PLAIN):
        return value
    members = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, (list, tuple))
        else ()
    )
    return (
        id(value)
        if callable(value)
        else [_plain(member) for member in members]
        if members
        else None
    )


# STAND-IN for what bench/ is written against, to be replaced.


class Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    kind: str
    width: int


def captured(model) -> list[Captured]:
    space = _workspaces.get(getattr(model, "fastdllm_adapter", model))
    steps = space.steps.items() if space else ()
    kinds = {False: "cached", True: "refresh"}
    return [Captured(step.graph, kinds[s.refresh], s.width) for (_, s, _), step in steps]


def pending(model) -> dict:
    space = _workspaces.get(getattr(model, "fastdllm_adapter", model))
    uses = space.uses.items() if space else ()
    return {key: count for key, count in uses if key not in space.steps}
