"""Copies of a converted model, before and after FSDP2 has it, and what it prints."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import fp8dist
from fp8dist.config import RECIPES
from fp8dist.tensors.edits import is_sharded
from fp8dist.tensors.sharded_weight import Float8ShardedWeight


def converted(recipe: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 128, bias=False))
    model[2].weight.requires_grad_(False)
    return fp8dist.convert_to_float8_training(model, config=recipe)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_copy_is_a_float8_model_of_its_own(recipe: str, how: str, mesh: DeviceMesh) -> None:
    model = converted(recipe)
    twin = COPIES[how](model)
    x = torch.randn(4, 128)
    assert twin(x).equal(model(x))
    for mine, other in zip(model[::2], twin[::2], strict=True):
        assert isinstance(other, fp8dist.Float8Linear)
        assert isinstance(other.weight, Float8ShardedWeight)
        assert other.config == mine.config
        assert other.weight.requires_grad == mine.weight.requires_grad
        assert other.weight._tensor.data_ptr() != mine.weight._tensor.data_ptr()
    with torch.no_grad():
        twin[0].weight.mul_(2)
    assert not twin(x).equal(model(x))
    # And each is sharded and trained without the other.
    expected = model(x)
    fully_shard(twin, mesh=mesh)
    optimizer = torch.optim.AdamW(twin.parameters())
    fp8dist.register_precompute_hook(optimizer, twin)
    twin(x).sum().backward()
    optimizer.step()
    assert is_sharded(twin[0].weight)
    assert model(x).equal(expected)


@pytest.mark.parametrize("each_layer", [False, True])
def test_printing_a_sharded_model_shows_the_recipes(mesh: DeviceMesh, each_layer: bool) -> None:
    model = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128), nn.Linear(128, 32))
    rules = [
        (lambda module, fqn: fqn == "0", "rowwise"),
        (lambda module, fqn: fqn == "1", fp8dist.Float8Config("tensorwise", False)),
    ]
    fp8dist.convert_to_float8_training(model, config=rules)
    if each_layer:
        for layer in model:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    first, second, third = [line for line in str(model).splitlines() if "Linear(" in line]
    assert "Float8Linear" in first and "recipe=rowwise" in first
    assert "Float8Linear" in second and "recipe=tensorwise" in second
    assert "float8_all_gather=False" in second and "float8_all_gather" not in first
    assert "Float8" not in third and "recipe" not in third


def test_a_copy_of_a_model_knows_its_root() -> None:
    """In which FSDP2's groups are looked for; that of a part has none."""
    model = nn.Sequential(
        converted("rowwise"), fp8dist.convert_to_float8_training(nn.Linear(16, 16))
    )
    copied = copy.deepcopy(model)
    assert copied[0][2].weight_state.root() is copied[0]
    assert copied[1].weight_state.root() is copied[1]
    assert copy.deepcopy(model[0][2]).weight_state.root() is None
