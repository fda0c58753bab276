"""A weight that only tensor parallelism cuts: cast once per step, and by whom it is gathered."""

from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import fp8dist
from fp8dist import Float8Config
from fp8dist.precompute import CastPass
from fp8dist.tensors import weight_state
from fp8dist.tensors.float8_tensor import Float8Tensor
from fp8dist.tensors.weight_state import WeightState, local_float8
from tests.unit.tensors.sharded_layer import K, N, hp_weight, sharded

pytestmark = pytest.mark.usefixtures("say_it_again")


def over_tp(mesh: DeviceMesh, **options: Any) -> nn.Module:
    layer = nn.Linear(K, N, bias=False)
    with torch.no_grad():
        layer.weight.copy_(hp_weight())
    fp8dist.convert_to_float8_training(layer, config=Float8Config("rowwise", **options))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight, mesh, [Shard(0)]))
    return layer


def use(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Float8Tensor:
    return local_float8(layer.weight_state, layer.weight, dtype)


def check_value(found: Float8Tensor, weight: torch.Tensor) -> None:
    """As FSDP2 gathers it of one rank."""
    scale = 2.0 ** torch.floor(torch.log2(448 / weight.abs().amax(1, keepdim=True)))
    assert torch.equal(found._scales[1], scale)
    assert torch.equal(found._scales[0], 1 / scale)
    assert torch.equal(found._data.float(), (weight * scale).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("precompute", [True, False])
def test_a_weight_over_tp_is_cast_once_per_step(
    mesh: DeviceMesh, precompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = over_tp(mesh)
    if precompute:
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(layer)
    first = use(layer, torch.bfloat16)
    assert (first.shape, first.dtype, first.requires_grad) == ((N, K), torch.bfloat16, False)
    check_value(first, hp_weight())
    monkeypatch.setattr(weight_state, "update_scales", lambda *_: pytest.fail("computed again"))
    monkeypatch.setattr(WeightState, "shard_now", lambda state, _: state.shard[1])
    monkeypatch.setattr(CastPass, "run", lambda _: pytest.fail("cast again"))
    again = use(layer)
    assert again._data.data_ptr() == first._data.data_ptr()
    assert again._scales is first._scales


def test_an_edited_weight_over_tp_is_cast_again_and_warned_of_once(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(weight_state, "_warn_stale", warned.append)
    layer = over_tp(mesh)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(layer)
    with torch.no_grad():
        layer.weight.mul_(3)
    check_value(use(layer), hp_weight() * 3)
    check_value(use(layer), hp_weight() * 3)
    assert warned == [""]


def test_a_weight_over_tp_without_a_cached_payload(mesh: DeviceMesh) -> None:
    layer = over_tp(mesh, cache_payload=False)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(layer)
    assert layer.weight_state.payload is None
    check_value(use(layer), hp_weight())
    assert use(layer)._data.data_ptr() != use(layer)._data.data_ptr()


def test_who_gathers_the_weight_is_known_before_the_first_use(mesh: DeviceMesh) -> None:
    tp_and_dp = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    layer, model = over_tp(tp_and_dp["tp"]), sharded(mesh)
    for module in (layer, model):
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(module)
    assert layer.weight_state.gathered is False
    assert model.weight_state.gathered is True
    state = layer.weight_state
    state.set_gathered(False)
    assert state.scales is not None
    fully_shard(layer, mesh=tp_and_dp["dp"])
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(layer)
    assert state.gathered is True
    # What was computed for another use is not kept.
    state.set_gathered(False)
    assert state.scales is state.seen is state.shard is state.payload is None
