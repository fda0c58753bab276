"""Parameters in their wrapper, and the plain tensors in them."""

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from fp8dist.tensors.parameters import plain, wrap_weight
from fp8dist.tensors.sharded_weight import Float8ShardedWeight
from tests.unit.tensors.sharded_layer import hp_weight


def layer_of(weight: torch.Tensor, requires_grad: bool = True) -> nn.Module:
    layer = nn.Module()
    layer.weight = nn.Parameter(weight, requires_grad=requires_grad)
    return layer


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_plain_parameter_is_wrapped_once(requires_grad: bool) -> None:
    layer = layer_of(hp_weight(), requires_grad)
    before = layer.weight
    before.note = "kept"
    wrap_weight(layer, "weight", Float8ShardedWeight)
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    assert isinstance(weight, Float8ShardedWeight)
    assert weight.requires_grad is requires_grad
    assert weight.note == "kept"
    assert weight._tensor.data_ptr() == before.data_ptr()
    wrap_weight(layer, "weight", Float8ShardedWeight)
    assert layer.weight is weight


@pytest.mark.parametrize("swapped", [True, False])
def test_a_dtensor_is_wrapped_inside(mesh: DeviceMesh, swapped: bool) -> None:
    """Where parameters are swapped, FSDP2 expects that they stay the same objects."""
    layer = layer_of(DTensor.from_local(hp_weight(), mesh, [Shard(0)]))
    before = layer.weight
    torch.__future__.set_swap_module_params_on_conversion(swapped)
    try:
        wrap_weight(layer, "weight", Float8ShardedWeight)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert (layer.weight is before) is swapped
    assert isinstance(layer.weight, nn.Parameter)
    assert isinstance(layer.weight._local_tensor, Float8ShardedWeight)
    assert layer.weight.placements == (Shard(0),)
    assert torch.equal(layer.weight._local_tensor._tensor, hp_weight())


def test_plain_shares_storage_and_versions(mesh: DeviceMesh) -> None:
    wrapped = Float8ShardedWeight(hp_weight())
    sharded = DTensor.from_local(wrapped, mesh, [Shard(0)])
    inside = sharded._local_tensor._tensor
    for found, inner in ((plain(wrapped), wrapped._tensor), (plain(sharded)._local_tensor, inside)):
        assert type(found) is torch.Tensor
        version = inner._version
        found.add_(1)
        assert inner._version > version
    assert torch.equal(wrapped._tensor, hp_weight() + 1 + 1)
    other = torch.ones(2)
    assert plain(other).data_ptr() == other.data_ptr()
