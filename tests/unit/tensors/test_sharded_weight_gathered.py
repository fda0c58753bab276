"""`Float8ShardedWeight` under FSDP2: its hooks, and what autograd and one rank make of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations, prune

import fp8dist
from fp8dist import Float8Config
from fp8dist.config import RECIPES
from fp8dist.tensors.edits import is_sharded
from fp8dist.tensors.float8_tensor import Float8Tensor
from fp8dist.tensors.sharded_weight import Float8ShardedWeight
from tests.unit.tensors.sharded_layer import INPUT, K, N, converted, hp_weight


def test_is_sharded(mesh: DeviceMesh) -> None:
    assert not is_sharded(None)
    assert not is_sharded(nn.Parameter(Float8ShardedWeight(hp_weight())))
    assert not is_sharded(DTensor.from_local(hp_weight(), mesh))
    assert is_sharded(DTensor.from_local(Float8ShardedWeight(hp_weight()), mesh))
    assert is_sharded(converted(mesh)[0].weight)
    assert not is_sharded(converted(mesh, enable_fsdp_float8_all_gather=False)[0].weight)


@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("kind", ["a DTensor", "a tensor"])
def test_a_weight_that_was_replaced_is_refused(
    mesh: DeviceMesh, kind: str, precomputed: bool
) -> None:
    model = converted(mesh)
    model(INPUT)
    model.reshard()
    weight = model[0].weight.detach() * 2
    model[0].weight = nn.Parameter(weight if kind == "a DTensor" else weight.full_tensor())
    if precomputed:
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
    with pytest.raises(ValueError, match="^0: its weight was replaced, .* load a state dict, "):
        model(INPUT)


@pytest.mark.parametrize(
    ("stand_in", "message"),
    [
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "^0: .* prune before the conv"),
        (parametrizations.weight_norm, "tie or parametrize weights before the conversion"),
    ],
    ids=["pruned", "weight_norm"],
)
def test_a_weight_that_something_stands_in_for_is_refused(
    mesh: DeviceMesh, stand_in: Callable[[nn.Module], object], message: str
) -> None:
    model = converted()
    stand_in(model[0])
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match=message):
        model(INPUT)


@pytest.mark.parametrize("param_dtype", [None, torch.bfloat16])
def test_the_unsharded_weight_is_float8_in_the_dtype_of_the_policy(
    mesh: DeviceMesh, param_dtype: torch.dtype | None
) -> None:
    model = fully_shard(
        converted(), mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=param_dtype)
    )
    shard = model[0].weight._local_tensor._tensor.clone()
    model.unshard()
    weight = model[0].weight
    assert isinstance(weight, Float8Tensor)
    assert isinstance(weight, nn.Parameter)
    assert weight.dtype == (param_dtype or torch.float32)
    assert weight.shape == (N, K)
    scale = 448 / shard.abs().max().double()
    expected = (shard * scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(weight._data.view(torch.uint8), expected.view(torch.uint8))
    assert weight._scales[1].item() == scale.float()
    assert type(model[0].bias) is nn.Parameter
    model.reshard()
    assert is_sharded(model[0].weight)


@pytest.mark.parametrize("reshard", [True, False])
def test_training_under_fsdp_equals_training_without(mesh: DeviceMesh, reshard: bool) -> None:
    """One rank: FSDP2 gathers a weight of one shard, and nothing may change."""
    alone, sharded = converted(), fully_shard(converted(), mesh=mesh, reshard_after_forward=reshard)
    optimizers = [torch.optim.AdamW(model.parameters()) for model in (alone, sharded)]
    fp8dist.register_precompute_hook(optimizers[1], sharded)
    for step in range(4):
        losses = []
        for model, optimizer in zip((alone, sharded), optimizers, strict=True):
            loss = model(INPUT + step).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == losses[1], step
    for ours, theirs in zip(alone.parameters(), sharded.parameters(), strict=True):
        local = theirs._local_tensor
        assert torch.equal(getattr(local, "_tensor", local), getattr(ours, "_tensor", ours))


def test_what_autograd_saved_is_refilled(mesh: DeviceMesh) -> None:
    """A forward saves the unsharded weight, resharding frees it, and backward gathers it again."""
    model = converted(mesh, cache_payload=False)
    model.unshard()
    weight = model[0].weight
    saved, before = weight.detach(), weight.dequantize()
    model.reshard()
    assert saved._data.untyped_storage().size() == 0, "its memory was freed"
    with torch.no_grad():
        model[0].weight.mul_(2)
    model.unshard()
    assert model[0].weight is weight
    # Twice the weight is the same float8 data with half the scale.
    assert torch.equal(saved.dequantize(), before * 2)


# --- one rank, whose payload is the weight


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_payload_of_one_rank_is_not_copied(mesh: DeviceMesh, recipe: str) -> None:
    def one_layer(**config: Any) -> nn.Module:
        torch.manual_seed(0)
        layer = nn.Linear(256, 128, bias=False)
        fp8dist.convert_to_float8_training(layer, config=Float8Config(recipe, **config))
        return fully_shard(layer, mesh=mesh)

    layer, copied = one_layer(), one_layer(cache_payload=False)
    for _ in range(2):
        layer.unshard()
        copied.unshard()
        payload = layer.weight_state.payload
        assert layer.weight._data.data_ptr() == payload.data_ptr()
        assert torch.equal(layer.weight.dequantize(), copied.weight.dequantize())
        layer.reshard()
        copied.reshard()
        assert payload.untyped_storage().size() == payload.nbytes, "FSDP2 has freed it"
    (param,) = layer._get_fsdp_state()._fsdp_param_group.fsdp_params
    assert sum(tensor.numel() for tensor in param.all_gather_outputs) == 0


def test_an_edit_of_one_rank_reaches_the_weight(mesh: DeviceMesh) -> None:
    model = converted(mesh)
    model.unshard()
    weight = model[0].weight
    saved, before = weight.detach(), weight.dequantize()
    model.reshard()
    with torch.no_grad():
        model[0].weight.mul_(2)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
    model.unshard()
    assert model[0].weight is weight
    assert torch.equal(weight.dequantize(), before * 2)
    assert torch.equal(saved.dequantize(), before * 2)


def test_one_rank_with_another_payload_has_that_one(mesh: DeviceMesh) -> None:
    model = converted(mesh)
    model.unshard()
    before = model[0].weight.dequantize()
    model.reshard()
    state = model[0].weight_state
    lost, state.payload = state.payload.zero_(), None
    model.unshard()
    assert state.payload is not lost
    assert model[0].weight._data.data_ptr() == state.payload.data_ptr()
    assert torch.equal(model[0].weight.dequantize(), before)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_one_rank_goes_backward_after_an_edit_as_fsdp_does(
    mesh: DeviceMesh, compiled: bool, first: bool
) -> None:
    """With the weight as it is then: FSDP2 tells autograd of no unshard, and we of no cast.

    Args:
        first: whether it has the payload that it was first gathered with.
    """

    def grad_input(edited: bool, **config: Any) -> torch.Tensor:
        model = converted(mesh, **config)
        x = INPUT.clone().requires_grad_()
        model.unshard()
        if not first:
            model.reshard()
            model[2].weight_state.payload = None
            model.unshard()
        forward = nn.Sequential(*model)  # without FSDP2's hooks
        loss = (torch.compile(forward, backend="aot_eager") if compiled else forward)(x).sum()
        model.reshard()
        if edited:
            with torch.no_grad():
                model[2].weight.mul_(2)
            fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
        model.unshard()
        loss.backward()
        return x.grad

    found = grad_input(edited=True)
    assert torch.equal(found, 2 * grad_input(edited=False))
    assert torch.equal(found, grad_input(edited=True, cache_payload=False))


def test_a_weight_in_another_module_is_refused(mesh: DeviceMesh) -> None:
    layer = nn.Linear(K, N)
    layer.weight = nn.Parameter(Float8ShardedWeight(layer.weight.detach()))
    fully_shard(layer, mesh=mesh)
    layer.weight_state = None
    with pytest.raises(ValueError, match="FSDPLinear holds the weight.*tie or parametrize"):
        layer(torch.randn(2, K))
