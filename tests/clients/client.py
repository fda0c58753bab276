"""What tests of clients share: a client on CPU ranks, and the plain loop it is compared with."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import fp8dist
from fp8dist.tensors.sharded_weight import Float8ShardedWeight
from tests.clients.models import convert
from tests.distributed.wire import Collective
from tests.environment import ROOT


def script(name: str) -> ModuleType:
    """A program in scripts/clients, without running what it does when it is started."""
    path = ROOT / "scripts" / "clients" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def environment() -> Iterator[None]:
    """As torchrun sets it; clients add to it."""
    before = dict(os.environ)
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def accelerate_on_cpu() -> Iterator[None]:
    """accelerate shards where its processes are said to be on GPUs, and does not ask again."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    original = PartialState.__init__

    def said_to_be_on_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = said_to_be_on_gpus
    try:
        with environment():
            os.environ["ACCELERATE_USE_CPU"] = "true"
            yield
    finally:
        PartialState.__init__ = original
        AcceleratorState._reset_state(reset_partial_state=True)


class Watched:
    """What a model is called with, and the losses that it returns."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: list[dict[str, Any]] = []
        self.losses: list[float] = []
        model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
        model.register_forward_hook(self._after)

    def _before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        assert not args
        self.inputs.append(kwargs)

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        self.losses.append(output.loss.item())


class PlainLoop:
    """torch alone: fully_shard per decoder layer, AdamW, clipping, and fp8dist's calls.

    Args:
        adamw: what AdamW takes besides the parameters and the learning rate.
    """

    def __init__(
        self, model: nn.Module, policy: MixedPrecisionPolicy | None = None, **adamw: Any
    ) -> None:
        self.watched = Watched(model)
        self.model = convert(model)
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        options = {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy()}
        for layer in model.model.layers:
            fully_shard(layer, **options)
        fully_shard(model, **options)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, **adamw)
        fp8dist.register_precompute_hook(self.optimizer, model)

    def losses(self, inputs: list[dict[str, Any]], scale: float = 1.0) -> list[float]:
        for one in inputs:
            (self.model(**one).loss * scale).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self.watched.losses[-len(inputs) :]


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in model.state_dict().items()
    }


def float8_of(model: nn.Module) -> dict[str, DTensor]:
    """The parameters whose shards are fp8dist's, by name."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): param
        for name, param in model.named_parameters()
        if isinstance(param, DTensor) and isinstance(param._local_tensor, Float8ShardedWeight)
    }


def layer_bytes(layer: nn.Module) -> int:
    """What a rank sends to gather a decoder layer: a byte per float8 element, 4 per other one."""
    float8 = {id(param) for param in float8_of(layer).values()}
    return sum(
        param.to_local().numel() * (1 if id(param) in float8 else param.dtype.itemsize)
        for param in layer.parameters()
    )


def check_collectives(recorded: list[Collective], model: Any, steps: int, gathers: int) -> None:
    """Each step gathers each layer `gathers` times, and reduces amaxes in one all-reduce."""
    sent = [c.numel for c in recorded if c.name == "all_gather" and c.dtype == torch.uint8]
    assert sorted(sent) == sorted(
        [layer_bytes(layer) for layer in model.model.layers] * gathers * steps
    )
    amaxes = [c for c in recorded if c.name == "all_reduce" and c.dtype == torch.int32]
    # Before there is a step to follow, the first forward computes the scales, weight by weight.
    assert len(amaxes) == len(float8_of(model)) + steps
