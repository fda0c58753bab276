"""A training step, observed: what a rank hands to the communication backend, and what it holds."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import fp8dist
from fp8dist import kernels
from fp8dist.plan.observe import Collective, Observer
from fp8dist.plan.operands import Operands
from fp8dist.tensors.groups import groups_of
from fp8dist.tensors.one_rank import InPlaceReduceScatter
from fp8dist.tensors.sharded_weight import weights_of
from fp8dist.train import parallelize
from fp8dist.train.config import JobConfig
from fp8dist.train.model import Llama
from fp8dist.train.moe import MoE, balance
from fp8dist.train.optimizer import build_optimizer
from fp8dist.train.tensor_parallel import loss_context
from fp8dist.train.wire import CountingAllGather


@dataclass(frozen=True)
class Passes:
    """Bytes that a step reads and writes on the device to gather weights and to multiply float8.

    Attributes:
        copies: into the buffers that are gathered, and out of them into weights.
        shards: casts of shards: to the dtype that is gathered, at every gather; to float8, once per
            step, after their amaxes.
        operands: casts of activations and their gradients to float8, and transposes of float8
            weights for grad_input.
    """

    copies: int
    shards: int
    operands: int

    @property
    def total(self) -> int:
        return self.copies + self.shards + self.operands


@dataclass(frozen=True)
class Observed:
    """What rank 0, whose shards are the largest, does in a step, and what it holds.

    Attributes:
        calls, handed: by kind, the collectives of a step, and the bytes handed over to them.
        gathered: bytes that FSDP's all-gathers put out, this rank's own part included, as a
            training job's progress line has them.
        memory: bytes, by what they are for; see `MEMORY`.
        passes: over the device's memory.
        parameters: of the whole model.
        microbatches: forwards and backwards in a step.
    """

    calls: Mapping[Collective, int]
    handed: Mapping[Collective, int]
    gathered: int
    memory: Mapping[str, int]
    passes: Passes
    parameters: int
    microbatches: int


MEMORY = {
    "parameters": "shards of parameters, and buffers",
    "gradients": "shards of gradients",
    "optimizer": "the optimizer's state",
    "payloads": "shards cast to float8, kept from one step to the next",
    "scales": "scales of float8 weights, those of other ranks too",
    "unsharded": "gathered weights, gradients to be reduced, FSDP's buffers: the most at once",
    "activations": "kept from forward to backward; layers not compiled",
}


def step(
    model: Llama,
    job: JobConfig,
    mesh: DeviceMesh,
    batch: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    microbatches: int,
) -> Observed:
    """Run and observe the trainer's step, with one of its equal microbatches, not compiled.

    Args:
        model: with its parameters on the device, from the trainer's `assemble` or `build_model`.
        batch: makes token ids and targets, (batch, seq), int64.
    """
    counters = _count_all_gathers(model)
    optimizer = build_optimizer(model, job)
    experts = [module for module in model.modules() if isinstance(module, MoE)]

    def precompute() -> None:
        if job.precomputes_scales:
            fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)

    precompute()
    tokens, targets = batch()
    operands = Operands(merged=job.compile.enable and "model" in job.compile.components)
    in_place = functools.partial(_in_place, model)
    with Observer(mesh, lambda: _unreduced(model), in_place) as observer:
        observer.phase = "forward"
        with kernels.watched(by=operands):
            logits = model(tokens)
            with loss_context(job):
                loss = parallelize.cross_entropy(logits, targets)
                del logits
                activations = observer.live_bytes()
                observer.phase = "backward"
                loss.backward()
        observer.phase = "optimizer"
        nn.utils.clip_grad_norm_(model.parameters(), job.training.max_norm)
        optimizer.step()
        observer.phase = "scales"
        precompute()
        observer.phase = "experts"
        if experts:
            balance(experts)
    return Observed(
        calls=_per_step(observer.calls, microbatches),
        handed=_per_step(observer.handed, microbatches),
        gathered=sum(counter.bytes for counter in counters.values()) * microbatches,
        memory={
            **_resident(model, optimizer),
            "unsharded": observer.peak_of_buffers,
            "activations": activations,
        },
        passes=replace(
            _passes(counters, _compute_dtype(job), microbatches),
            operands=(operands.bytes + observer.casts_of_experts) * microbatches,
        ),
        parameters=sum(param.numel() for param in model.parameters()),
        microbatches=microbatches,
    )


def _per_step(counted: Counter[Collective], microbatches: int) -> dict[Collective, int]:
    # Scales that are not precomputed are computed in the first microbatch.
    return {
        kind: count
        if kind.is_of_scales or kind.phase not in ("forward", "backward")
        else count * microbatches
        for kind, count in counted.items()
    }


def _bytes(tensors: Any) -> int:
    return sum(_local(tensor).nbytes for tensor in tensors)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _resident(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes that stay between steps."""
    params = list(model.parameters())
    of_optimizer = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    states = [state for module in model.modules() for state, _ in weights_of(module)]
    return {
        "parameters": _bytes(params) + _bytes(model.buffers()),
        "gradients": _bytes(param.grad for param in params if param.grad is not None),
        "optimizer": _bytes(of_optimizer),
        "payloads": _bytes(state.payload for state in states if state.payload is not None),
        "scales": _bytes(scale for state in states for scale in state.scales or ()),
    }


def _unreduced(model: nn.Module) -> Iterator[torch.Tensor]:
    """Gradients of what is around the blocks, which wait until the last of them is there."""
    for module in _own_modules(model):
        for param in module.parameters(recurse=False):
            gathered = not isinstance(param, DTensor) or param.device_mesh.mesh_dim_names == ("tp",)
            if gathered and param.grad is not None:
                yield _local(param.grad)


def _in_place(model: Llama, dtype: torch.dtype) -> bool:
    """Whether gradients stay in place: see [Note: gradients of one rank] in `one_rank`."""
    (group,) = groups_of(model)
    comm = group._reduce_scatter_comm
    return isinstance(comm, InPlaceReduceScatter) and not comm.copies(dtype)


def _compute_dtype(job: JobConfig) -> torch.dtype:
    return parallelize.DTYPES[job.training.mixed_precision_param]


class _Counter(CountingAllGather):
    """Counts the gathers of one group, and the bytes handed over, too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.handed = 0

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        self.calls += 1
        self.handed += input_tensor.nbytes
        return super().__call__(output_tensor, input_tensor, group, async_op)


def _count_all_gathers(model: nn.Module) -> dict[nn.Module, _Counter]:
    """The gathers of each module that `fully_shard` was called on, from now on."""
    counters: dict[nn.Module, _Counter] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            counters[module] = counter = _Counter()
            module.set_custom_all_gather(counter)  # type: ignore[arg-type]  # as in train.wire
    return counters


def _own_modules(group: nn.Module) -> Iterator[nn.Module]:
    """The modules whose parameters are gathered with those of `group`."""
    yield group
    for child in group.children():
        if not isinstance(child, FSDPModule):
            yield from _own_modules(child)


def _passes(counters: dict[nn.Module, _Counter], dtype: torch.dtype, microbatches: int) -> Passes:
    """All but those of operands.

    Args:
        dtype: in which weights that are not float8 are gathered.
    """
    copies = casts = 0
    for group, counter in counters.items():
        # What is copied is read and written.
        copies += 2 * (counter.bytes + counter.handed) * microbatches
        for module in _own_modules(group):
            float8 = {id(param): state for state, param in weights_of(module)}
            for param in module.parameters(recurse=False):
                shard, state = _local(param), float8.get(id(param))
                if state is not None and state.payload is not None:
                    # Packed, and often rows: amaxes are found in the pass that casts.
                    reads = 1 if not state.scales or state.cast_by_rows else 2
                    casts += reads * shard.nbytes + state.payload.nbytes
                elif shard.dtype != dtype:
                    size = shard.nbytes + shard.numel() * dtype.itemsize
                    casts += size * counter.calls * microbatches
    return Passes(copies, casts, operands=0)
