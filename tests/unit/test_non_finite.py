"""The first module with a NaN or Inf is named: by what was put where."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

import fp8dist

DIM = 32


class Model(nn.Module):
    """Three blocks of two linear layers each."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, DIM)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return x


def bad_weight(model: Model, x: torch.Tensor) -> None:
    with torch.no_grad():
        model.layers[1][2].weight[3, 5] = math.nan


def bad_input(model: Model, x: torch.Tensor) -> None:
    x[3, 5] = -math.inf


def bad_gradient(model: Model, x: torch.Tensor) -> None:
    model.layers[1][0].register_full_backward_hook(lambda *_: (torch.full((16, DIM), math.inf),))


def nothing(model: Model, x: torch.Tensor) -> None:
    pass


Put = Callable[[Model, torch.Tensor], None]
NAMED: list[tuple[Put, list[str]]] = [
    (bad_weight, ["the output of layers.1.2"]),
    (bad_input, ["the input of Model"]),
    (bad_gradient, ["the grad_output of layers.0.2"]),
    (nothing, []),
]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("put, named", NAMED, ids=lambda value: getattr(value, "__name__", None))
def test_the_first_is_named(
    put: Put, named: list[str], recompute: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, x = Model(recompute), torch.randn(16, DIM)
    fp8dist.convert_to_float8_training(model, config="rowwise")
    put(model, x)
    with fp8dist.detect_non_finite(model):
        model(x).sum().backward()
    assert [record.getMessage().partition(" has ")[0] for record in caplog.records] == named
    caplog.clear()
    model(x).sum().backward()  # nobody looks any more
    assert caplog.records == []


def test_it_is_named_where_the_step_raises(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Model(False), torch.randn(16, DIM)
    bad_weight(model, x)
    with pytest.raises(ZeroDivisionError), fp8dist.detect_non_finite(model):
        model(x)
        _ = 1 / 0
    assert "layers.1.2" in caplog.text


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_compiled_is_refused(whole: bool) -> None:
    model: nn.Module = Model(False)
    if whole:
        model = torch.compile(model)
    else:
        model.layers[1].compile()
    name = "OptimizedModule" if whole else "layers.1"
    with pytest.raises(ValueError, match=f"^{name} is compiled"), fp8dist.detect_non_finite(model):
        pass
