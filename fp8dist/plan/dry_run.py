"""A training step on a fake process group: what one rank of many would send and hold."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import fp8dist
from fp8dist import hardware
from fp8dist.config import Recipe
from fp8dist.plan.groups import float32_groups
from fp8dist.plan.observe import Collective, Observer
from fp8dist.plan.operands import Operands
from fp8dist.tensors import weight_state
from fp8dist.tensors.placement import cut_of, groups_of, join
from fp8dist.tensors.sharded_weight import weights_of
from fp8dist.train import parallelize
from fp8dist.train.config import JobConfig
from fp8dist.train.model import Llama, ModelShape, model_shape
from fp8dist.train.moe import MoE, balance
from fp8dist.train.optimizer import build_optimizer
from fp8dist.train.tensor_parallel import check_shape, cut, loss_context
from fp8dist.train.tokenizer import load_tokenizer
from fp8dist.train.wire import CountingAllGather

# Blocks are alike, so what a step does grows by the same amount with each: two short models tell
# what a deep one does. Two blocks are what is gathered at once.
SHORTEST = 2

DEVICE = torch.device("cpu")


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


def microbatches(job: JobConfig, ranks: int) -> int:
    """Forwards and backwards in a step.

    Raises:
        ValueError: the global batch is no multiple of what all ranks take at once.
    """
    world = ranks // job.parallelism.tensor_parallel_degree
    local, total = job.training.local_batch_size, job.training.global_batch_size
    if total == -1:
        return 1
    if total % (local * world):
        raise ValueError(
            f"training.global_batch_size={total} is not a multiple of "
            f"training.local_batch_size={local} times {world} data-parallel ranks"
        )
    return total // (local * world)


def shape_of(job: JobConfig) -> ModelShape:
    """The sizes of the job's model.

    Raises:
        ValueError: there is no such flavor, or the tokenizer cannot be read.
    """
    return model_shape(job.model.flavor, load_tokenizer(job.model.hf_assets_path).vocab_size)


def observe(job: JobConfig, mesh: DeviceMesh, *, all_layers: bool = False) -> Observed:
    """Run a step of `job` as rank 0 of a `fake_mesh`, on tensors without contents.

    Args:
        all_layers: run every layer, instead of two models with a few and the rest from these.

    Raises:
        ValueError: the job does not fit the ranks or the model.
    """
    shape = shape_of(job)
    period = _period(job)
    shorter = SHORTEST + (shape.n_layers - SHORTEST) % period
    longer = shorter + period
    if all_layers or shape.n_layers <= longer:
        return _run(job, shape, mesh)
    first, second = (
        _run(job, replace(shape, n_layers=layers), mesh) for layers in (shorter, longer)
    )
    return _continued(first, second, (shape.n_layers - shorter) // period)


def _period(job: JobConfig) -> int:
    """After how many blocks they repeat."""
    section = job.activation_checkpoint
    every_nth = section.mode == "selective" and section.selective_ac_option != "op"
    return int(section.selective_ac_option) if every_nth else 1


def _continued(first: Observed, second: Observed, times: int) -> Observed:
    """What `times` as many more layers make of `first` as `second` has."""

    def grown(a: int, b: int) -> int:
        return a + (b - a) * times

    def all_grown(a: Mapping[Any, int], b: Mapping[Any, int]) -> dict[Any, int]:
        if a.keys() != b.keys():
            raise AssertionError(f"other layers, other kinds: {a.keys() ^ b.keys()}")
        return {key: grown(a[key], b[key]) for key in a}

    return replace(
        first,
        calls=all_grown(first.calls, second.calls),
        handed=all_grown(first.handed, second.handed),
        gathered=grown(first.gathered, second.gathered),
        memory=all_grown(first.memory, second.memory),
        passes=Passes(**all_grown(asdict(first.passes), asdict(second.passes))),
        parameters=grown(first.parameters, second.parameters),
    )


@contextmanager
def fake_mesh(job: JobConfig, ranks: int) -> Iterator[DeviceMesh]:
    """The mesh of `job` on a process group of rank 0 of `ranks` alone, which sends nothing.

    Raises:
        ValueError: the job's degrees do not fit the ranks.
        AssertionError: there is a process group.
    """
    if dist.is_initialized():
        raise AssertionError("a dry run needs a process without a process group")
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield parallelize.build_mesh(job, DEVICE, ranks)
    finally:
        dist.destroy_process_group()


def _run(job: JobConfig, shape: ModelShape, mesh: DeviceMesh) -> Observed:
    model = assemble(job, shape, mesh)
    _join_groups(model)
    # Values are looked at to report those that are not finite; here there are none.
    unreported = mock.patch.object(weight_state, "_reported_non_finite", True)
    # What is kept for backward is what a device keeps that multiplies float8.
    native = mock.patch.object(hardware, "multiplies", _multiplies)
    with unreported, native, float32_groups(), FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=DEVICE)
        size = (job.training.local_batch_size, job.training.seq_len)
        tokens = torch.zeros(size, dtype=torch.int64)
        return step(model, job, mesh, lambda: (tokens, tokens), microbatches(job, mesh.size()))


def _multiplies(device: torch.device, recipe: Recipe, emulate: bool, grouped: bool = False) -> bool:
    """`hardware.multiplies` of a device that has every recipe's matmul.

    Grouped ones, which torch cannot run without data, are left to their stand-ins.
    """
    return not emulate and not grouped


def assemble(job: JobConfig, shape: ModelShape, mesh: DeviceMesh) -> Llama:
    """The sharded model of `job` as the trainer makes it, on the meta device."""
    check_shape(job, shape)
    parallelize._check_experts(job, shape)
    with torch.device("meta"):
        model = Llama(shape, job.training.seq_len).to(parallelize.DTYPES[job.training.dtype])
    if job.float8_enabled:
        parallelize.convert(model, job)
    if job.parallelism.tensor_parallel_degree > 1:
        cut(model, job, mesh["tp"])
    parallelize.checkpoint_activations(model, job)
    parallelize.shard(model, job, parallelize.data_parallel(mesh))
    return model


def _join_groups(model: nn.Module) -> None:
    """Make the group over FSDP's and tensor parallelism's ranks, which takes real tensors."""
    for module in model.modules():
        for state, param in weights_of(module):
            if isinstance(param, DTensor):
                groups = groups_of(param, cut_of(param, fqn=state.fqn))
                if len(groups) == 2:
                    join(param, groups)
                    return


def step(
    model: Llama,
    job: JobConfig,
    mesh: DeviceMesh,
    batch: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    microbatches: int,
) -> Observed:
    """Run and observe the trainer's step, with one of its equal microbatches, not compiled.

    Args:
        model: with its parameters on the device, from `assemble` or the trainer's `build_model`.
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
    with Observer(mesh, lambda: _unreduced(model)) as observer:
        observer.phase = "forward"
        with operands.counting():
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
    return {
        kind: count * (microbatches if kind.phase in ("forward", "backward") else 1)
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
                    casts += 2 * shard.nbytes + state.payload.nbytes
                elif shard.dtype != dtype:
                    size = shard.nbytes + shard.numel() * dtype.itemsize
                    casts += size * counter.calls * microbatches
    return Passes(copies, casts, operands=0)
