"""What is kept about a sharded weight, and that copies start empty."""

import copy
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

import fp8dist
from fp8dist import Float8Config
from fp8dist.precompute import CastPass
from fp8dist.tensors.sharded_weight import Float8ShardedWeight
from fp8dist.tensors.weight_state import WeightState, update_scales
from tests.unit.tensors.sharded_layer import K, N, hp_weight, sharded

pytestmark = pytest.mark.usefixtures("say_it_again")


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes and the scale of a weight, by the definition of tensorwise scaling."""
    scale = torch.tensor(448 / weight.abs().max().item(), dtype=torch.float32)
    data = (weight.float() * scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return data.view(torch.uint8), scale


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the shards that were cast."""
    shapes: list[tuple[int, ...]] = []
    run = CastPass.run

    def counting(cast_pass: CastPass) -> None:
        shapes.extend(tuple(shard.data.shape) for shard in cast_pass.shards)
        run(cast_pass)

    monkeypatch.setattr(CastPass, "run", counting)
    return shapes


# --- scale and payload


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_payload_are_those_of_the_weight(mesh: DeviceMesh, dtype: torch.dtype) -> None:
    layer = sharded(mesh, dtype=dtype)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(layer)
    payload, scale = quantized(hp_weight().to(dtype))
    state = layer.weight_state
    assert state.scales[0].shape == (2, 1, 1)
    assert state.scales[0].flatten().tolist() == [scale.reciprocal().item(), scale.item()]
    assert state.payload.dtype == torch.uint8
    assert torch.equal(state.payload, payload)


def test_an_edit_is_followed_by_a_new_scale_in_the_same_storage(mesh: DeviceMesh) -> None:
    """Compiled graphs hold on to the storage; payloads are cast into the same bytes."""
    layer = sharded(mesh)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(layer)
    state = layer.weight_state
    (scale,), payload = state.scales, state.payload
    version = scale._version
    with torch.no_grad():
        layer.weight.copy_(layer.weight + 3)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(layer)
    assert state.scales[0] is scale
    assert state.payload is payload
    expected_payload, expected_scale = quantized(hp_weight() + 3)
    assert scale[1].item() == expected_scale.item()
    assert scale[0].item() == expected_scale.reciprocal().item()
    assert torch.equal(payload, expected_payload)
    assert scale._version == version, "a graph that saved it may still be freed or reused"


def test_a_payload_is_cast_once_and_reused(
    mesh: DeviceMesh, casts: list[Any], amaxes_computed: list[int]
) -> None:
    layer = sharded(mesh)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(layer)
    for _ in range(3):  # microbatches, each with a gather in forward and one in backward
        layer(torch.randn(4, K)).sum().backward()
        layer.reshard()
    assert casts == [(N, K)]
    assert amaxes_computed == [1]


def test_rows_are_cast_where_their_amaxes_are_found(
    mesh: DeviceMesh, casts: list[tuple[int, ...]]
) -> None:
    layer = sharded(mesh, Float8Config("rowwise"))
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(layer)
    for factor in (1, 3):
        if factor > 1:  # the next gather notices it
            with torch.no_grad():
                layer.weight.mul_(factor)
        layer.unshard()
        layer.reshard()
        weight = hp_weight() * factor
        scale = 2 ** torch.floor(torch.log2(448 / weight.abs().amax(1, keepdim=True)))
        expected = (weight * scale).to(torch.float8_e4m3fn).view(torch.uint8)
        assert torch.equal(layer.weight_state.payload, expected)
    assert casts == []
    layer.weight_state.payload = None  # lost: cast from known scales
    layer.unshard()
    assert torch.equal(layer.weight_state.payload, expected)
    assert casts == [(N, K)]


def test_without_a_cached_payload_every_gather_casts(
    mesh: DeviceMesh, casts: list[Any], amaxes_computed: list[int]
) -> None:
    layer = sharded(mesh, Float8Config(cache_payload=False))
    expected = sharded(mesh)(torch.ones(4, K))
    casts.clear()
    amaxes_computed.clear()
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(layer)
    assert casts == []
    for _ in range(2):
        assert torch.equal(layer(torch.ones(4, K)), expected)
        layer.reshard()
    assert casts == [(N, K)] * 2
    assert layer.weight_state.payload is None
    assert amaxes_computed == [1]


def test_a_lost_payload_is_cast_again_from_the_known_scale(
    mesh: DeviceMesh, amaxes_computed: list[int]
) -> None:
    """Without a collective: whether a payload was lost may differ from rank to rank."""
    layer = sharded(mesh)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(layer)
    state, before = layer.weight_state, layer.weight_state.payload.clone()
    state.payload, state.payload_is_current = None, False
    layer(torch.ones(4, K))
    assert torch.equal(state.payload, before)
    assert amaxes_computed == [1]


def test_a_short_shard_is_padded_with_zeros() -> None:
    """The payload has the size of the largest shard, also where this rank's is short or empty."""

    class Mesh:
        def size(self, dim: int) -> int:
            return 5

        def get_local_rank(self, dim: int) -> int:
            return 4

        def get_group(self, dim: int) -> mock.Mock:
            return mock.Mock(size=lambda: 5)

    class Param:
        shape, placements, device_mesh = torch.Size((N, K)), (Shard(0),), Mesh()

    for rows in (10, 8, 0):
        state = WeightState(Float8Config(), "layer")
        state.scales = [torch.tensor([0.5, 2.0]).view(2, 1, 1)]
        shard = hp_weight()[:rows]
        Param._local_tensor = Float8ShardedWeight(shard)
        payload = state.current_payload(shard, Param())
        assert [group.size() for group in state.groups] == [5]
        assert payload.shape == (10, K)  # ceil(48 / 5)
        expected = (shard * 2).to(torch.float8_e4m3fn).view(torch.uint8)
        assert torch.equal(payload[:rows], expected)
        assert payload[rows:].eq(0).all()


def test_a_shard_is_looked_at_again_when_it_has_moved(mesh: DeviceMesh) -> None:
    """FSDP2's lazy initialisation moves a short shard without another parameter."""
    layer = sharded(mesh)
    param, state = layer.weight, layer.weight_state
    shard = state.shard_now(param)
    assert state.shard_now(param) is shard
    param._local_tensor = Float8ShardedWeight(shard.data + 1)
    assert state.shard_now(param).data is param._local_tensor._tensor


def test_update_scales_takes_many_weights_at_once(
    mesh: DeviceMesh, amaxes_computed: list[int]
) -> None:
    layers = [sharded(mesh) for _ in range(3)]
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.weight.mul_(i + 1)
    amaxes_computed.clear()
    update_scales([layer.weight_state for layer in layers], [layer.weight for layer in layers])
    assert amaxes_computed == [3]
    for i, layer in enumerate(layers):
        assert layer.weight_state.scales[0][1].item() == quantized(hp_weight() * (i + 1))[1].item()
    storages = {layer.weight_state.scales[0].untyped_storage().data_ptr() for layer in layers}
    assert len(storages) == 3, "each in a storage of its own"


# --- copies


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))],
    ids=["deepcopy", "pickle"],
)
def test_copies_start_empty(mesh: DeviceMesh, duplicate: Callable[[Any], Any]) -> None:
    layer = sharded(mesh)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(layer)
    layer.weight_state.fqn = "layers.0.wq"
    other = duplicate(layer.weight_state)
    assert other.config == layer.weight_state.config
    assert other.fqn == "layers.0.wq"
    assert other.seen is other.scales is other.payload is None
    assert not other.payload_is_current


def test_a_state_does_not_keep_its_model_alive() -> None:
    model = nn.Sequential(nn.Linear(K, N))
    fp8dist.convert_to_float8_training(model)
    state = model[0].weight_state
    assert state.root() is model
    del model
    assert state.root() is None
