"""When what is kept about a sharded weight counts as outdated, and what is said of it then."""

import logging

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import fp8dist
from tests.unit.tensors.sharded_layer import K, N, sharded

pytestmark = pytest.mark.usefixtures("say_it_again")


def test_reading_outdates_nothing(mesh: DeviceMesh, amaxes_computed: list[int]) -> None:
    layer = sharded(mesh)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(layer)
    layer.state_dict()
    layer.weight.full_tensor()
    layer.weight.norm()
    repr(layer.weight)
    nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    layer(torch.ones(4, K))
    layer.reshard()
    assert amaxes_computed == [1]


def test_lazy_initialisation_that_moves_a_shard_outdates_nothing(
    mesh: DeviceMesh, amaxes_computed: list[int]
) -> None:
    """FSDP2 does it on ranks with a short shard, and those only: they must not communicate."""
    layer = sharded(mesh)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(layer)
    local = layer.weight._local_tensor
    padded = local.new_zeros(N + 1, K)
    with torch.no_grad():
        padded.narrow(0, 0, N).copy_(local)
    layer.weight._local_tensor = padded.narrow(0, 0, N)
    assert layer.weight_state.seen.still_holds(layer.weight)
    assert amaxes_computed == [1]
    with torch.no_grad():
        layer.weight.mul_(2)
    assert not layer.weight_state.seen.still_holds(layer.weight)


def test_outdated_scales_are_healed_at_the_gather_with_one_warning(
    mesh: DeviceMesh, caplog: pytest.LogCaptureFixture
) -> None:
    layer, reference = sharded(mesh), sharded(mesh)
    optimizers = [torch.optim.AdamW(m.parameters(), 0.1) for m in (layer, reference)]
    fp8dist.register_precompute_hook(optimizers[1], reference)
    for step in range(3):
        outputs = []
        for model, optimizer in zip((layer, reference), optimizers, strict=True):
            output = model(torch.ones(4, K) + step)
            output.sum().backward()
            model.reshard()
            optimizer.step()
            optimizer.zero_grad()
            outputs.append(output.detach())
        assert torch.equal(*outputs), step
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "precompute_float8_dynamic_scale_for_fsdp" in warning
    assert "register_precompute_hook" in warning


def test_the_warning_names_the_layer(mesh: DeviceMesh, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(K, N))
    fp8dist.convert_to_float8_training(model)
    fully_shard(model, mesh=mesh)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
    with torch.no_grad():
        model[1].weight.mul_(2)
    model(torch.ones(4, K))
    assert "1 was edited after its float8 scales were computed" in caplog.text


def test_the_first_gather_computes_scales_without_a_warning(
    mesh: DeviceMesh, caplog: pytest.LogCaptureFixture
) -> None:
    sharded(mesh)(torch.ones(4, K))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
