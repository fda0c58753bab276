"""FSDP2's groups of parameters: looked at once, and what is refused of them.

What is refused under FSDP2 of several ranks: tests/distributed/test_bad_input.py and
test_parameter_groups.py.
"""

from typing import Any

import pytest
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh

from fp8dist.tensors import groups
from fp8dist.tensors.groups import prepare_groups
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
