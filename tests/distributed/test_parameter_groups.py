"""FSDP2's groups of parameters, where torch is newer than 2.11: several of one module, on meshes of
their own or on one that is not of data parallelism alone, and the gradients of one without any.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fp8dist
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.toy import (
    RECIPE_NAMES,
    convert,
    full,
    local_batch,
    loss_of,
    mesh_of,
    new_model,
    same_bits,
    shard,
)

pytestmark = pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp, "DataParallelMeshDims"),
    reason="torch 2.11 has one group for a module, and gives unused weights no gradient",
)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: full(param.grad) for name, param in model.named_parameters()}


def another_mesh() -> Any:
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo

    group = dist.new_group(list(range(dist.get_world_size())))
    return FSDPMeshInfo(DeviceMesh.from_group(group, DEVICE), shard_mesh_dim=0)


def shard_apart(model: Any) -> None:
    """The first weight of each layer's feed-forward network on a mesh of its own."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult

    mesh, own = another_mesh(), {id(layer.w1.weight) for layer in model.layers}

    def place(param: nn.Parameter) -> Any:
        return ShardPlacementResult(Shard(0), mesh) if id(param) in own else None

    for layer in model.layers:
        fully_shard(layer, mesh=mesh_of(dist.get_world_size()), shard_placement_fn=place)
    fully_shard(model, mesh=mesh_of(dist.get_world_size()))


def train_together_and_apart(recipe: str, precompute: bool) -> list[Any]:
    found = []
    for sharded in (lambda model: shard(model, mesh_of(dist.get_world_size())), shard_apart):
        model = convert(new_model(), recipe)
        sharded(model)
        if precompute:
            fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
        loss = loss_of(model, local_batch(0))
        loss.backward()
        found.append((loss.item(), gradients(model)))
    return found


@pytest.mark.parametrize("precompute", [True, False])
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_weights_on_a_mesh_of_their_own(recipe: str, precompute: bool) -> None:
    for together, apart in run_on_ranks(2, train_together_and_apart, recipe, precompute):
        assert same_bits(together, apart)


def refusals_of_a_mesh_of_everything() -> list[str]:
    from torch.distributed.fsdp import DataParallelMeshDims

    mesh = torch.distributed.init_device_mesh(DEVICE, (1, 2), mesh_dim_names=("shard", "tensor"))
    model = convert(new_model())
    for module in list(model.modules()):
        for name, param in list(module.named_parameters(recurse=False)):
            placed = distribute_tensor(param.detach(), mesh, [Replicate(), Replicate()])
            setattr(module, name, nn.Parameter(placed))
    fully_shard(model, mesh=mesh, dp_mesh_dims=DataParallelMeshDims(shard=("shard", "tensor")))
    messages = []
    for call in (
        lambda: fp8dist.precompute_float8_dynamic_scale_for_fsdp(model),
        lambda: loss_of(model, local_batch(0)),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_mesh_of_more_than_data_parallelism_is_refused() -> None:
    for messages in run_on_ranks(2, refusals_of_a_mesh_of_everything):
        for message in messages:
            assert "fully_shard(dp_mesh_dims=...) does not work" in message


class SecondLayerUnused(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.model.layers[0](self.model.embedding(tokens))
        self.model.layers[1](x)
        return self.model.output(self.model.norm(x))


def gradients_with_one_layer_unused(recipe: str) -> tuple[Any, Any]:
    """Of the layer that is used and of the other, whose weights FSDP2 has freed by then."""
    model: Any = convert(new_model(), recipe)
    mesh = mesh_of(dist.get_world_size())
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    whole = fully_shard(SecondLayerUnused(model), mesh=mesh)
    assert isinstance(whole, FSDPModule)
    whole.set_reduce_scatter_unused_params(True)
    loss_of(whole, local_batch(0)).backward()
    return gradients(model.layers[0]), gradients(model.layers[1])


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_gradients_of_unused_weights_are_zeros(recipe: str) -> None:
    for used, unused in run_on_ranks(2, gradients_with_one_layer_unused, recipe):
        assert all(gradient.any() for gradient in used.values())
        assert not any(gradient.any() for gradient in unused.values())
