"""[Note: shared casts] in `fp8dist.linear`: one cast for the layers that share an input."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

import fp8dist
from fp8dist import kernels, linear

DIM = 32


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the activations and gradients that were cast (weights are square here)."""
    shapes: list[torch.Size] = []
    original = kernels.quantize_both

    def noting(x: torch.Tensor, *args: Any) -> Any:
        if x.shape != (DIM, DIM):
            shapes.append(x.shape)
        return original(x, *args)

    monkeypatch.setattr(kernels, "quantize_both", noting)
    return shapes


def layers(count: int = 3, config: str = "rowwise") -> nn.ModuleList:
    torch.manual_seed(0)
    return fp8dist.convert_to_float8_training(
        nn.ModuleList(nn.Linear(DIM, DIM, bias=False) for _ in range(count)), config=config
    )


def test_three_layers_cast_their_input_once(casts: list[torch.Size]) -> None:
    q, k, v = layers()
    x = torch.randn(2, 8, DIM, requires_grad=True)
    outputs = [layer(x) for layer in (q, k, v)]
    assert casts == [(16, DIM)]
    alone = []
    for layer in (q, k, v):
        alone.append(layer(x.detach().clone()))
    assert len(casts) == 4
    for shared, own in zip(outputs, alone, strict=True):
        assert torch.equal(shared, own)


def test_gradients_are_those_of_casts_of_their_own() -> None:
    shared, separate = layers(), layers()
    x = torch.randn(16, DIM)
    mine = x.clone().requires_grad_()
    sum(layer(mine).square().sum() for layer in shared).backward()
    copies = [x.clone().requires_grad_() for _ in separate]
    sum(layer(copy).square().sum() for layer, copy in zip(separate, copies, strict=True)).backward()
    for a, b in zip(shared, separate, strict=True):
        assert torch.equal(a.weight.grad, b.weight.grad)
    torch.testing.assert_close(mine.grad, sum(copy.grad for copy in copies))  # order of the sum


def test_an_input_that_was_written_to_is_cast_again(casts: list[torch.Size]) -> None:
    first, second, _ = layers()
    x = torch.randn(16, DIM)
    with torch.no_grad():
        first(x)
        x.mul_(3)
        output = second(x)
    assert len(casts) == 2
    assert torch.equal(output, second(x.clone()))


def test_another_recipe_casts_again(casts: list[torch.Size]) -> None:
    (rowwise,), (tensorwise,) = layers(1), layers(1, "tensorwise")
    x = torch.randn(16, DIM)
    rowwise(x)
    tensorwise(x)
    assert len(casts) == 2


def test_a_layer_that_needs_no_grad_weight_does_not_spoil_one_that_does() -> None:
    frozen, trained, _ = layers()
    frozen.weight.requires_grad_(False)
    x = torch.randn(16, DIM, requires_grad=True)
    (frozen(x) + trained(x)).square().sum().backward()
    assert trained.weight.grad is not None
    assert frozen.weight.grad is None


def test_nothing_is_kept_once_the_input_is_gone() -> None:
    (layer,) = layers(1)
    x = torch.randn(16, DIM)
    with torch.no_grad():
        layer(x)
    data = weakref.ref(linear._last_cast.operands[0].data)
    assert data() is not None
    del x
    gc.collect()
    assert data() is None


def test_inference_tensors_are_cast_each_time(casts: list[torch.Size]) -> None:
    """They have no version that would tell of a write."""
    first, second, _ = layers()
    with torch.inference_mode():
        x = torch.randn(16, DIM)
        first(x)
        x.mul_(2)
        assert torch.equal(second(x), second(x.clone()))
    assert len(casts) == 3


def test_recomputation_gives_the_same_gradients() -> None:
    def gradients(recompute: bool) -> list[torch.Tensor]:
        model = layers()
        x = torch.linspace(-1, 1, 16 * DIM).view(16, DIM).requires_grad_()

        def block(x: torch.Tensor) -> torch.Tensor:
            normed = torch.tanh(x)
            return model[0](normed) * model[1](normed) + model[2](normed)

        output = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        output.square().sum().backward()
        return [x.grad, *(layer.weight.grad for layer in model)]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)
