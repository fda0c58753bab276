"""Backward in two halves, as zero-bubble pipeline schedules call it: of inputs, then of weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

import fp8dist
from fp8dist import linear
from fp8dist.config import RECIPES

WIDTH = 128


def stage(recipe: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A converted stage, its input, and its output."""
    torch.manual_seed(0)
    # Without biases, where backward is split at the layers themselves.
    first, last = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
    model = nn.Sequential(first, nn.Tanh(), last)
    fp8dist.convert_to_float8_training(model, config=recipe)
    x = torch.randn(32, WIDTH).requires_grad_()
    return model, x, model(x)


def halves(recipe: str) -> tuple[nn.Module, torch.Tensor, list[Callable[[], Any]]]:
    model, x, output = stage(recipe)
    groups: list[Any] = []

    def of_input() -> None:
        (grad,), found = stage_backward_input(
            [output], [torch.ones_like(output)], [x], model.parameters()
        )
        x.grad = grad
        groups.extend(found)

    return model, x, [of_input, lambda: stage_backward_weight(model.parameters(), groups)]


splits = pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch 2.11 splits no autograd function that is in Python"
)


@splits
@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_those_of_one_backward(recipe: str) -> None:
    expected, input, output = stage(recipe)
    output.backward(torch.ones_like(output))
    model, x, both = halves(recipe)
    for half in both:
        half()
    assert torch.equal(x.grad, input.grad)
    for param, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(param.grad, other.grad)


@splits
def test_both_gradients_are_computed_in_either_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd does not tell a function in Python which of its gradients are asked for."""
    calls: list[None] = []
    matmul = linear.scaled_matmul

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(None)
        return matmul(*args, **options)

    _, _, both = halves("rowwise")
    monkeypatch.setattr(linear, "scaled_matmul", counted)
    for half in both:
        calls.clear()
        half()
        assert len(calls) == 4, "two layers, of which each has two"
