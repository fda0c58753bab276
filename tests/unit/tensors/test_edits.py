"""What outdates a weight's scales, and what does not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import fp8dist
from fp8dist.tensors.edits import Seen
from fp8dist.tensors.sharded_weight import Float8ShardedWeight
from tests.unit.tensors.sharded_layer import K, hp_weight, shard_of, sharded

# How code gets hold of a weight, and what it does to it. `sub` is on a part, as pruning code is.
WAYS: dict[str, Callable[[nn.Module], torch.Tensor]] = {
    "parameter": lambda layer: layer.weight,
    ".data": lambda layer: layer.weight.data,
    "detach": lambda layer: layer.weight.detach(),
    "to_local": lambda layer: layer.weight.to_local(),
    "_local_tensor": lambda layer: layer.weight._local_tensor,
    "inner tensor": shard_of,
    "state dict": lambda layer: layer.state_dict()["weight"],
    "state dict to_local": lambda layer: layer.state_dict()["weight"].to_local(),
}
EDITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "copy_": lambda w: w.copy_(w + 1),
    "mul_": lambda w: w.mul_(2),
    "slice": lambda w: w[2:4].mul_(2),
    "row": lambda w: w[3].mul_(2),
    "column": lambda w: w[:, 3].mul_(2),
    "transposed": lambda w: w.t().mul_(2),
    "flattened": lambda w: w.view(-1).mul_(2),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("way", WAYS)
def test_every_edit_outdates_the_scales(mesh: DeviceMesh, way: str, edit: str) -> None:
    layer = sharded(mesh)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(layer)
    seen = layer.weight_state.seen
    assert seen.still_holds(layer.weight)
    with torch.no_grad():
        EDITS[edit](WAYS[way](layer))
    assert not torch.equal(shard_of(layer), hp_weight())
    assert not seen.still_holds(layer.weight)


@pytest.mark.parametrize("way", ["parameter", ".data", "to_local", "_local_tensor"])
def test_a_foreach_edit_outdates_the_scales(mesh: DeviceMesh, way: str) -> None:
    layer = sharded(mesh)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(layer)
    with torch.no_grad():
        torch._foreach_mul_([WAYS[way](layer)], 2.0)
    assert not layer.weight_state.seen.still_holds(layer.weight)


@pytest.mark.parametrize(
    "kwargs", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str
)
def test_an_optimizer_step_outdates_the_scales(mesh: DeviceMesh, kwargs: dict[str, bool]) -> None:
    layer = sharded(mesh)
    optimizer = torch.optim.AdamW(layer.parameters(), **kwargs)
    layer(torch.ones(4, K)).sum().backward()
    layer.reshard()
    assert layer.weight_state.seen.still_holds(layer.weight)
    optimizer.step()
    assert not layer.weight_state.seen.still_holds(layer.weight)


def seen_by(mesh: DeviceMesh) -> tuple[Seen, DTensor]:
    layer = sharded(mesh)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(layer)
    return layer.weight_state.seen, layer.weight


def test_the_counter_alone_outdates(mesh: DeviceMesh) -> None:
    seen, param = seen_by(mesh)
    param._local_tensor._edits.count += 1
    assert not seen.still_holds(param)


def test_the_version_of_the_parameter_alone_outdates(mesh: DeviceMesh) -> None:
    """All that a compiled optimizer step moves."""
    seen, param = seen_by(mesh)
    torch.autograd.graph.increment_version(param)
    assert not seen.still_holds(param)


def test_the_version_of_the_inner_tensor_alone_outdates(mesh: DeviceMesh) -> None:
    seen, param = seen_by(mesh)
    count = param._local_tensor._edits.count
    param._local_tensor._tensor.mul_(2)
    assert param._local_tensor._edits.count == count
    assert not seen.still_holds(param)


@pytest.mark.parametrize("edited_before", ["the copy", "it is used again"])
def test_a_copy_of_what_was_edited_since_outdates(mesh: DeviceMesh, edited_before: str) -> None:
    layer = sharded(mesh)
    with torch.no_grad():
        if edited_before == "the copy":
            layer.weight.mul_(2)
        backup = torch.empty_like(layer.weight)
        backup.copy_(layer.weight)  # as FSDP2 moves a shard
        if edited_before == "it is used again":
            layer.weight.mul_(2)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(layer)
    seen = layer.weight_state.seen
    layer.weight._local_tensor = backup._local_tensor
    assert seen.still_holds(layer.weight) == (edited_before == "the copy")


def test_a_pinned_copy_counts_for_what_it_was_copied_from() -> None:
    """With stand-in memory: this may be a machine that can pin none."""
    weight = Float8ShardedWeight(hp_weight())
    with torch.library._scoped_library("aten", "IMPL") as aten:
        aten.impl("_pin_memory", lambda tensor, device=None: tensor.clone(), "CPU")
        pinned = torch.ops.aten._pin_memory.default(weight)
    assert pinned._edits is not weight._edits
    assert pinned._edits.is_same_as(weight._edits)
    pinned.mul_(2)
    assert not pinned._edits.is_same_as(weight._edits)


def test_another_parameter_outdates(mesh: DeviceMesh) -> None:
    seen, _ = seen_by(mesh)
    _, other = seen_by(mesh)
    assert not seen.still_holds(other)
