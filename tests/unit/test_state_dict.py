"""State dicts of converted models: those of unconverted ones, in both directions."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrizations, parametrize, prune

import fp8dist
from fp8dist.tensors.sharded_weight import Float8ShardedWeight

WIDTH = 32
TOKENS = torch.arange(24).view(2, 12)
CONVERTED = ["layers.0", "layers.1", "output"]


class Model(nn.Module):
    def __init__(self, vocabulary: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.output = nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.output(x)


def model(vocabulary: int = 64) -> Model:
    torch.manual_seed(0)
    return Model(vocabulary)


def plain(module: nn.Module) -> dict[str, torch.Tensor]:
    """Names and copies of an unconverted model's values."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_a_state_dict_is_that_of_the_unconverted_model() -> None:
    before = model()
    module = fp8dist.convert_to_float8_training(model())
    state = module.state_dict()
    assert list(state) == list(before.state_dict())
    for name, expected in before.state_dict().items():
        assert type(state[name]) is torch.Tensor, name
        assert not state[name].requires_grad
        assert torch.equal(state[name], expected)


def test_a_state_dict_aliases_the_parameters() -> None:
    module = fp8dist.convert_to_float8_training(model())
    state = module.state_dict()
    state["output.weight"].fill_(0.5)
    assert module.output.weight._tensor.eq(0.5).all()
    with torch.no_grad():
        module.output.weight.fill_(0.25)
    assert state["output.weight"].eq(0.25).all()


def test_a_state_dict_with_keep_vars_holds_the_parameters() -> None:
    module = fp8dist.convert_to_float8_training(model())
    state = module.state_dict(keep_vars=True)
    for name, param in module.named_parameters():
        assert state[name] is param


def test_a_saved_state_dict_loads_with_weights_only(tmp_path: Path) -> None:
    module = fp8dist.convert_to_float8_training(model())
    torch.save(module.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    for name, expected in model().state_dict().items():
        assert type(loaded[name]) is torch.Tensor
        assert torch.equal(loaded[name], expected)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_from_and_to_an_unconverted_model(assign: bool) -> None:
    torch.manual_seed(1)
    source = Model()
    module = fp8dist.convert_to_float8_training(model())
    result = module.load_state_dict(plain(source), strict=True, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    for fqn in CONVERTED:
        linear = module.get_submodule(fqn)
        assert isinstance(linear.weight, Float8ShardedWeight), "still gathered in float8"
        assert isinstance(linear.weight, nn.Parameter)
        assert not isinstance(linear.weight._tensor, Float8ShardedWeight)
        assert linear.weight.requires_grad
    expected = fp8dist.convert_to_float8_training(copy.deepcopy(source))(TOKENS)
    assert torch.equal(module(TOKENS), expected)

    target = model()
    result = target.load_state_dict(module.state_dict(), strict=True, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(target(TOKENS), source(TOKENS))
    assert not any(isinstance(param, Float8ShardedWeight) for param in target.parameters())


def test_loading_in_place_keeps_the_parameters_that_the_optimizer_has() -> None:
    module = fp8dist.convert_to_float8_training(model())
    before = [id(param) for param in module.parameters()]
    module.load_state_dict(plain(model()))
    assert [id(param) for param in module.parameters()] == before


@pytest.mark.parametrize("assign", [False, True])
def test_a_frozen_weight_stays_frozen_through_a_load(assign: bool) -> None:
    module = fp8dist.convert_to_float8_training(model())
    module.output.weight.requires_grad_(False)
    module.load_state_dict(plain(model()), assign=assign)
    assert not module.output.weight.requires_grad
    assert isinstance(module.output.weight, Float8ShardedWeight)


def test_a_checkpoint_of_another_shape_is_refused_by_name() -> None:
    module = fp8dist.convert_to_float8_training(model())
    with pytest.raises(RuntimeError, match="output.weight"):
        module.load_state_dict(model(vocabulary=80).state_dict())


def test_missing_and_unexpected_keys_are_reported() -> None:
    module = fp8dist.convert_to_float8_training(model())
    state = plain(model())
    state["surplus"] = state.pop("output.weight")
    result = module.load_state_dict(state, strict=False)
    assert result.missing_keys == ["output.weight"]
    assert result.unexpected_keys == ["surplus"]


class Half(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


STAND_INS: dict[str, Callable[[nn.Module], object]] = {
    "parametrized": lambda layer: parametrize.register_parametrization(layer, "weight", Half()),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": torch.nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("way", STAND_INS)
def test_a_weight_that_something_stands_in_for(way: str) -> None:
    """Its layer has no parameter of that name, and neither has the state dict."""
    layers = [nn.Linear(WIDTH, WIDTH), fp8dist.convert_to_float8_training(nn.Linear(WIDTH, WIDTH))]
    for layer in layers:
        STAND_INS[way](layer)
    before, saved = (layer.state_dict() for layer in layers)
    assert saved.keys() == before.keys()
    assert not any(isinstance(value, Float8ShardedWeight) for value in saved.values())
    for layer in layers:
        layer.load_state_dict(saved)
