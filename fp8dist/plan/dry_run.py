"""The dry run: a job's step on a fake process group, as one rank of many, without data."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from fp8dist import hardware
from fp8dist.plan.groups import Float32Groups
from fp8dist.plan.step import Observed, Passes, step
from fp8dist.tensors.placement import cut_of, groups_of, join
from fp8dist.tensors.sharded_weight import weights_of
from fp8dist.train import parallelize
from fp8dist.train.config import JobConfig
from fp8dist.train.model import ModelShape, RotaryEmbedding, model_shape
from fp8dist.train.moe import MoE
from fp8dist.train.packing import check_batch
from fp8dist.train.tokenizer import load_tokenizer

# Blocks are alike, so what a step does grows by the same amount with each: two short models tell
# what a deep one does. Two blocks are what is gathered at once.
SHORTEST = 2

DEVICE = torch.device("cpu")


def microbatches(job: JobConfig, ranks: int) -> int:
    """Forwards and backwards in a step.

    Raises:
        ValueError: the global batch is no multiple of what all ranks take at once.
    """
    world = ranks // job.parallelism.tensor_parallel_degree
    local, total = job.training.local_batch_size, job.training.global_batch_size
    if total == -1:
        return 1
    check_batch(total, local, world)
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
    model = parallelize.assemble(job, shape, mesh, compiled=False)
    _join_groups(model)
    # What is kept for backward is then what a device keeps that multiplies float8.
    native = hardware.assume_matmuls()
    with native, Float32Groups(), FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=DEVICE)
        _reset_buffers(model)
        size = (job.training.local_batch_size, job.training.seq_len)
        tokens = torch.zeros(size, dtype=torch.int64)
        return step(model, job, mesh, lambda: (tokens, tokens), microbatches(job, mesh.size()))


def _reset_buffers(model: nn.Module) -> None:
    """As `Llama.init_weights` does: in float32 whatever the parameters are."""
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            module.reset_parameters()
        elif isinstance(module, MoE):
            module.reset_buffers()


def _join_groups(model: nn.Module) -> None:
    """Make the group over FSDP's and tensor parallelism's ranks, which takes real tensors."""
    for module in model.modules():
        for state, param in weights_of(module):
            if isinstance(param, DTensor):
                groups = groups_of(param, cut_of(param, fqn=state.fqn))
                if len(groups) == 2:
                    join(param, groups)
                    return
