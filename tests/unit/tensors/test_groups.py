"""FSDP2's groups of parameters: looked at once, and what is refused of them.

What is refused under FSDP2 of several ranks: tests/distributed/test_bad_input.py and
test_parameter_groups.py.
"""

from typing import Any

import pytest
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_common
from torch.distributed.tensor import Shard

from fp8dist.tensors import groups
from fp8dist.tensors.groups import groups_of, prepare_groups
from tests.unit.tensors.sharded_layer import converted


def test_reshard_to_a_part_of_the_mesh_is_looked_for_once_per_root(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted(mesh)
    prepare_groups(model)
    monkeypatch.setattr(nn.Module, "named_modules", lambda *_: pytest.fail("looked again"))
    prepare_groups(model)
    prepare_groups(None)


def test_without_float8_weights_nothing_is_kept(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before `fully_shard` there is nothing to see yet: the model is looked at again."""
    prepared: list[Any] = []
    monkeypatch.setattr(groups, "keep_gradients_in_place", prepared.append)
    model = converted()
    prepare_groups(model)
    assert model not in groups._prepared_roots
    gather_off = converted(mesh, enable_fsdp_float8_all_gather=False)
    prepare_groups(gather_off)
    assert gather_off not in groups._prepared_roots
    assert not prepared
    sharded = converted(mesh)
    prepare_groups(sharded)
    assert sharded in groups._prepared_roots
    assert prepared


@pytest.mark.skipif(
    not hasattr(_fsdp_common, "ShardPlacementResult"),
    reason="torch 2.11 has one group for a module",
)
def test_every_group_of_a_module_is_seen_to(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[Any] = []
    monkeypatch.setattr(groups, "keep_gradients_in_place", prepared.append)
    model = converted()
    another = DeviceMesh.from_group(dist.new_group([0]), mesh.device_type)
    info = _fsdp_common.FSDPMeshInfo(another, shard_mesh_dim=0)

    def place(param: nn.Parameter) -> Any:
        apart = param is model[0].weight
        return _fsdp_common.ShardPlacementResult(Shard(0), info) if apart else None

    fully_shard(model, mesh=mesh, shard_placement_fn=place)
    prepare_groups(model)
    assert prepared == groups_of(model)
    assert len(prepared) == 2
