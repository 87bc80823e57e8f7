"""One model over several GPUs: tensor parallel along a 1-D DeviceMesh.

Every rank holds a part of every weight matrix and the keys and values of its own heads:

    q, k, v, gate, up   some of the outputs; of few key/value heads, one on several ranks
    out, down           the inputs that belong to them; what the ranks find is added up
    head                a part of the vocabulary; proposals are merged, logits are never gathered

Every rank runs the same loop and they decide alike. What is decided follows from `Partials` that
every rank gathers and merges in the order of the ranks, so from the same bits on each; what a rule
of Python code says is rank 0's. That the ranks were asked for the same is compared before the first
forward of a call, and a seed that nobody gave is rank 0's.

A rank that waits longer than TIMEOUT for another raises. One call at a time, on all ranks.

Tested with gloo on CPUs; on several GPUs it has not been seen to run through yet.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastdllm_kernels import Selection, confidence_select
from fastdllm_kernels.noise import inverse_of_rows
from fastdllm_kernels.rules import branch_of
from fastdllm_kernels.select import (
    Confidence,
    Partials,
    merge_confidence_partials,
    select_with,
    token_confidence_partials,
)

from .bare import multiply
from .config import ModelConfig
from .model import DiffusionTransformer

TIMEOUT = timedelta(seconds=50)  # of a collective while decoding
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
# Of a sum by symmetric memory; above, bandwidth counts and NCCL is as fast.
LARGEST_SUM = 16 * 2**20
ADDRESS = r" at 0x[0-9a-f]+"
SUMMED = (torch.bfloat16, torch.float32)
CHUNK_BYTES = 16  # each rank's part of such a sum is a multiple of this


def launched_mesh(device: str | None = None) -> DeviceMesh | None:
    """The mesh of all processes that torchrun has started, on a GPU each unless `device` says
    "cpu" or there is none; None without torchrun, or for one process.
    """
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        return None
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return init_device_mesh("cuda" if on_gpu else "cpu", (int(os.environ["WORLD_SIZE"]),))


class Ranks:
    """The processes that hold one model's parts, and what they send each other.

    mesh: a DeviceMesh of one dimension, on which init_process_group has been called. rank, size:
    this process's place among them and their number. Making one waits for all. TypeError and
    ValueError name the mesh.
    """

    def __init__(self, mesh: DeviceMesh):
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh: expected a DeviceMesh, got {type(mesh).__name__}")
        if mesh.ndim != 1:
            raise ValueError(f"mesh: expected one dimension, got {mesh.ndim}")
        if mesh.device_type not in BACKENDS:
            known = " or ".join(BACKENDS)
            raise ValueError(f"mesh: expected devices {known}, got {mesh.device_type}")
        self.rank, self.size = mesh.get_local_rank(), mesh.size()
        self.kind = mesh.device_type
        self._patient = mesh.get_group()
        self.group: Any = dist.new_group(
            dist.get_process_group_ranks(self._patient),
            timeout=TIMEOUT,
            backend=BACKENDS[self.kind],
            use_local_synchronization=True,
        )
        self._space: torch.Tensor | None = None
        if self.kind == "cuda":
            self._space = self._symmetric()

    @property
    def symmetric(self) -> bool:
        """Whether small sums go by memory that all ranks' GPUs reach."""
        return self._space is not None

    def device(self, wanted: torch.device | str | int | None) -> torch.device:
        """The device asked for, by default this rank's own; ValueError for one of another kind."""
        own = torch.device("cpu")
        if self.kind == "cuda":
            own = torch.device("cuda", torch.cuda.current_device())
        device = torch.device(f"cuda:{wanted}" if isinstance(wanted, int) else wanted or own)
        if device.type != self.kind or device.index not in (None, own.index):
            raise ValueError(f"device: expected {own}, this rank's of the mesh, got {wanted!r}")
        return own

    def part(self, whole: Sequence[int], held: Sequence[int]) -> tuple[slice, ...]:
        """Where what a rank holds, of shape `held`, lies in a tensor of shape `whole`: in each
        dimension one of equal parts, some ranks after each other the same where the parts are
        fewer.
        """
        firsts = [
            self.rank * (full // own) // self.size * own
            for full, own in zip(whole, held, strict=True)
        ]
        return tuple(slice(first, first + own) for first, own in zip(firsts, held, strict=True))

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """What all ranks' tensors of this shape add up to. x may be overwritten."""
        if self._space is None or not self._fits(x):
            x = x.contiguous()
            dist.all_reduce(x, group=self.group)
            return x
        shared = self._space[: x.nbytes].view(x.dtype).view(x.shape)
        shared.copy_(x)
        total = torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.ops.symm_mem.two_shot_all_reduce_out(shared, "sum", self.group.group_name, total)
        return total

    def _fits(self, x):
        """Whether symmetric memory adds up such tensors: the same on every rank."""
        whole_chunks = x.nbytes % (CHUNK_BYTES * self.size) == 0
        return x.dtype in SUMMED and 0 < x.nbytes <= LARGEST_SUM and whole_chunks

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[...] of every rank -> [size, ...], in the order of the ranks."""
        parts = x.new_empty(self.size, *x.shape)
        dist.all_gather_into_tensor(parts.view(-1), x.reshape(-1), group=self.group)
        return parts

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor, on every rank."""
        sent = x.to(torch.int32) if x.dtype == torch.bool else x.clone()
        dist.broadcast(sent, group=self.group, group_src=0)
        return sent.to(x.dtype)

    def wait(self) -> None:
        """Until every rank is here, for as long as the mesh's own group waits."""
        dist.barrier(group=self._patient)

    def synchronize(self, stream: torch.cuda.Stream) -> None:
        """Until what was launched on the stream has been computed. RuntimeError after TIMEOUT: a
        graph's collectives wait for ever for a rank that is gone.
        """
        event = torch.cuda.Event()
        event.record(stream)
        latest = time.monotonic() + TIMEOUT.total_seconds()
        while not event.query():
            if time.monotonic() > latest:
                raise RuntimeError(f"mesh: rank {self.rank} has waited {TIMEOUT} for another rank")

    def agree(self, what: str, device: torch.device, *facts: Any, number: int = 0) -> int:
        """Rank 0's `number`, a 63-bit one. ValueError on every rank where their facts differ."""
        described = re.sub(ADDRESS, "", repr(facts))  # of a function, in this process
        digest = hashlib.sha256(described.encode()).digest()
        mine = [int.from_bytes(digest[:7], "big"), number]
        said = self.gather(torch.tensor(mine, dtype=torch.int64, device=device)).tolist()
        others = [rank for rank, (theirs, _) in enumerate(said) if theirs != said[0][0]]
        if others:
            raise ValueError(f"{what}: expected the same on all ranks, rank 0 and {others} differ")
        return said[0][1]

    def _symmetric(self) -> torch.Tensor | None:
        """Memory that all ranks' GPUs reach, [LARGEST_SUM] uint8; None where they cannot."""
        from torch.distributed import _symmetric_memory

        device = torch.device("cuda", torch.cuda.current_device())
        space = None
        try:
            space = _symmetric_memory.empty(LARGEST_SUM, dtype=torch.uint8, device=device)
            _symmetric_memory.rendezvous(space, self.group)
        except (RuntimeError, NotImplementedError):
            space = None
        works = self.gather(torch.tensor(space is not None, dtype=torch.int32, device=device))
        return space if bool(works.all()) else None


class Reduced(nn.Module):
    """A product whose inputs are spread over the ranks: x [..., in / size] -> [..., out], added up
    over all.
    """

    def __init__(self, product: nn.Module, ranks: Ranks):
        super().__init__()
        self.product = product
        self.ranks = ranks

    @property
    def weight(self) -> Any:
        return self.product.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ranks.sum(multiply(self.product, x))


class SplitTransformer(DiffusionTransformer):
    """One rank's part of a DiffusionTransformer.

    config: the part's: its heads, its key/value heads, its share of the MLP; the vocabulary and
    the width are the whole model's. whole: the whole model's config. columns: how many logits this
    rank's head gives, those of the ids from rank * columns on. ValueError naming the size that
    does not divide.
    """

    def __init__(self, config: ModelConfig, ranks: Ranks):
        super().__init__(part_of_config(config, ranks.size))
        self.whole = config
        self.ranks = ranks
        self.columns = config.vocab_size // ranks.size
        layers: list[Any] = list(self.layers)
        for layer in layers:
            layer.attention.out = Reduced(layer.attention.out, ranks)
            layer.down = Reduced(layer.down, ranks)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, self.columns, bias=False)

    def tie_head(self) -> None:
        """Make the head this rank's rows of the embedding."""
        rows = self.embedding.weight.detach().split(self.columns)[self.ranks.rank]
        self.lm_head.weight = nn.Parameter(rows, requires_grad=False)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """As DiffusionTransformer.logits, whole on every rank: who asks for all logits is given
        them. All ranks must ask; decoding does not.
        """
        return torch.cat(list(self.ranks.gather(super().logits(tokens).contiguous())), dim=-1)

    def select(
        self, logits: torch.Tensor, tokens: torch.Tensor, *, rule: Any, **options: Any
    ) -> Selection:
        """confidence_select for logits [B, T, columns] of this rank's part of the vocabulary, all
        arguments given; the same Selection on every rank.
        """
        agreed = self.ranks.first if branch_of(rule) is None else None
        return select_with(self._propose, logits, tokens, rule, agreed=agreed, **options)

    def _propose(
        self, logits, *, mask_id, score, temperature, top_p, top_k, filtered_score, seed, position
    ) -> Confidence:
        """token_confidence of the whole vocabulary, for rows of this rank's part [N, columns]."""
        _refuse_filters(top_p, top_k)
        draws = isinstance(temperature, torch.Tensor) or temperature > 0
        if filtered_score and draws:
            # The score is that of logits / T: they are divided before they are looked at.
            inverse = inverse_of_rows(temperature, logits)
            logits = logits.float() * torch.where(inverse > 0, inverse, 1)[:, None]
            temperature = (inverse > 0).float()
        mine = token_confidence_partials(
            logits,
            vocab_start=self.ranks.rank * self.columns,
            mask_id=mask_id,
            temperature=temperature,
            seed=seed if draws else None,
            position=position,
        )
        parts = [_unpacked(part) for part in self.ranks.gather(_packed(mine))]
        return merge_confidence_partials(parts, score=score, seed=seed, position=position)


def _packed(partials: Partials) -> torch.Tensor:
    """Partials of N rows as one tensor [fields, N] int32, floats by their bits."""
    *numbers, token_ids, has_nan = partials
    bits = [number.contiguous().view(torch.int32) for number in numbers]
    return torch.stack([*bits, token_ids.to(torch.int32), has_nan.to(torch.int32)])


def _unpacked(table: torch.Tensor) -> Partials:
    *bits, token_ids, has_nan = table
    numbers = (number.view(torch.float32) for number in bits)
    return Partials._make([*numbers, token_ids.to(torch.int64), has_nan.bool()])


def part_of_config(config: ModelConfig, size: int) -> ModelConfig:
    """The config of one of `size` ranks' part. ValueError naming every size that does not divide;
    two columns of the vocabulary share a draw and stay together.
    """
    wrong = []
    for name, unit in (("num_heads", 1), ("intermediate_size", 1), ("vocab_size", 2)):
        value = getattr(config, name)
        if value % (size * unit):
            wrong.append(f"{name}={value} is no multiple of {size * unit}")
    kv_heads = config.num_kv_heads
    if kv_heads % size and size % kv_heads:
        wrong.append(f"num_kv_heads={kv_heads} neither divides {size} nor is a multiple of it")
    if wrong:
        raise ValueError(f"mesh: {size} ranks cannot share this model: {'; '.join(wrong)}")
    return replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=max(1, kv_heads // size),
        intermediate_size=config.intermediate_size // size,
    )


def _refuse_filters(top_p: object, top_k: object) -> None:
    """ValueError for filters, which ask for whole rows of logits."""
    for name, value in (("top_p", top_p), ("top_k", top_k)):
        if value is not None:
            raise ValueError(
                f"{name}: expected None for a model over several ranks, which never gathers its "
                f"logits, got {value!r}"
            )


def agreed_seed(model: Any, sampling: Any, seed: int | None, *asked: Any) -> int | None:
    """The seed of a call of `generate`: where nobody gave one and chance decides, rank 0's of a
    model over several ranks, which must all ask for the same. ValueError where they do not, and
    for filters.
    """
    if not isinstance(model, SplitTransformer):
        return seed
    _refuse_filters(sampling.top_p, sampling.top_k)
    draws = seed is None and sampling.draws
    drawn = int(torch.randint(2**62, (), device="cpu")) if draws else 0
    asked = seed, vars(sampling), *asked
    agreed = model.ranks.agree("arguments of generate", model.device, *asked, number=drawn)
    return agreed if draws else seed


def columns_of(model: Any) -> int:
    """How many logits the model's head gives for a position."""
    return model.columns if isinstance(model, SplitTransformer) else model.config.vocab_size


def selection_of(model: Any) -> Any:
    """What turns the logits of the model's head into a Selection, as confidence_select does."""
    return model.select if isinstance(model, SplitTransformer) else confidence_select


def wait_for(model: Any) -> Callable[[torch.cuda.Stream], None]:
    """How the host waits for what was launched of the model on a stream."""
    if isinstance(model, SplitTransformer):
        return model.ranks.synchronize
    return torch.cuda.Stream.synchronize


def refuse_split(model: Any, what: str) -> None:
    """ValueError where the model is spread over ranks, and `what` would not run alike on all."""
    if isinstance(model, SplitTransformer):
        raise ValueError(f"model: expected one on one device for {what}, got one over several")
