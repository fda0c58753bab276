"""Models with `Float8ShardedWeight`s: copied, cast, built on the meta device."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fp8dist
from fp8dist.tensors.edits import is_sharded
from fp8dist.tensors.sharded_weight import Float8ShardedWeight
from tests.unit.tensors.sharded_layer import INPUT, K, N, converted


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copied_model_computes_the_same_and_is_independent(
    duplicate: Callable[[nn.Module], nn.Module],
) -> None:
    model = converted(cache_payload=False)
    model[2].weight.requires_grad_(False)
    model(INPUT).sum().backward()
    other = duplicate(model)
    assert torch.equal(other(INPUT), model(INPUT))
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert isinstance(theirs, nn.Parameter)
        assert type(theirs) is type(ours)
        assert theirs.requires_grad == ours.requires_grad
    assert other[0].config == model[0].config
    assert other[0].weight_state is not model[0].weight_state
    with torch.no_grad():
        other[0].weight.zero_()
    assert model[0].weight._edits.count == 0
    assert not model[0].weight._tensor.eq(0).any()


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, through_torch_save], ids=["deepcopy", "torch.save"]
)
def test_a_copied_model_can_be_sharded(
    duplicate: Callable[[nn.Module], nn.Module], mesh: DeviceMesh
) -> None:
    expected = converted()(INPUT)
    model = fully_shard(duplicate(converted()), mesh=mesh)
    assert is_sharded(model[0].weight)
    assert torch.equal(model(INPUT), expected)


@pytest.mark.parametrize(
    "to",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.bfloat16(),
        lambda model: model.to("cpu", torch.bfloat16),
    ],
    ids=["to", "bfloat16", "to device and dtype"],
)
def test_a_converted_model_moves_to_another_dtype(to: Callable[[nn.Module], nn.Module]) -> None:
    model = converted()
    names = [name for name, _ in model.named_parameters()]
    model[2].weight.requires_grad_(False)
    expected = fp8dist.convert_to_float8_training(converted_from(torch.bfloat16))
    to(model)
    assert [name for name, _ in model.named_parameters()] == names
    for param in model.parameters():
        assert isinstance(param, nn.Parameter)
        assert param.dtype == torch.bfloat16
    assert isinstance(model[0].weight, Float8ShardedWeight)
    assert model[0].weight._tensor.dtype == torch.bfloat16
    assert not model[2].weight.requires_grad
    assert torch.equal(model(INPUT.bfloat16()), expected(INPUT.bfloat16()))


def converted_from(dtype: torch.dtype) -> nn.Sequential:
    """The unconverted model, in `dtype`."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K, bias=False)).to(dtype)


def test_gradients_are_zeroed_and_frozen_as_in_any_model() -> None:
    model = converted()
    model(INPUT).sum().backward()
    model.zero_grad(set_to_none=False)
    assert all(param.grad.eq(0).all() for param in model.parameters())
    model.requires_grad_(False)
    assert not model(INPUT).requires_grad


@pytest.mark.parametrize("convert_first", [True, False])
def test_meta_construction_then_to_empty(convert_first: bool) -> None:
    source = converted()
    with torch.device("meta"):
        model = converted() if convert_first else converted_from(torch.float32)
    model.to_empty(device="cpu")
    if not convert_first:
        fp8dist.convert_to_float8_training(model)
    for layer in (model[0], model[2]):
        assert isinstance(layer.weight, Float8ShardedWeight)
        assert isinstance(layer.weight, nn.Parameter)
        assert layer.weight._tensor.device == layer.weight.device == torch.device("cpu")
    model.load_state_dict(source.state_dict())
    assert torch.equal(model(INPUT), source(INPUT))


@pytest.mark.parametrize("assign", [False, True])
def test_meta_construction_then_sharding_then_to_empty(mesh: DeviceMesh, assign: bool) -> None:
    source = converted()
    with torch.device("meta"):
        model = converted()
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    state = {}
    for name, param in model.state_dict().items():
        assert type(param._local_tensor) is torch.Tensor
        state[name] = DTensor.from_local(
            source.state_dict()[name], param.device_mesh, param.placements
        )
    model.load_state_dict(state, assign=assign)
    assert is_sharded(model[0].weight)
    assert torch.equal(model(INPUT), source(INPUT))


def test_meta_construction_then_sharding_then_init(mesh: DeviceMesh) -> None:
    """What trainers do: materialise, then let each module initialise itself."""
    with torch.device("meta"):
        model = converted()
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    for layer in (model[0], model[2]):
        layer.reset_parameters()
    assert model[0].weight._local_tensor._tensor.std() > 0
    assert model(INPUT).isfinite().all()
