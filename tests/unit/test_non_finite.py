"""The first module with a NaN or Inf is named: by what was put where."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

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
    x[3, 5] = math.inf


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


class Masked(nn.Module):
    """Attention that is given a mask of -Inf."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 2)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.full((16, 16), -math.inf).triu(1)
        return self.norm(self.attention(x, x, x, attn_mask=mask)[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_attention_mask_hides_nothing(value: float, caplog: pytest.LogCaptureFixture) -> None:
    model, x = Masked(), torch.randn(16, DIM)
    with fp8dist.detect_non_finite(model):
        model(x).sum().backward()
    assert caplog.records == []
    with torch.no_grad():
        model.norm.bias[0] = value
    with fp8dist.detect_non_finite(model):
        model(x).sum().backward()
    assert [record.getMessage().partition(" has ")[0] for record in caplog.records] == [
        "the output of norm"
    ]


class Table(nn.Module):
    """Its output is its parameter, which is there after the step too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self) -> torch.Tensor:
        return self.weight


def test_nothing_is_left_on_an_output_that_outlives_the_step() -> None:
    model = Table()
    with fp8dist.detect_non_finite(model):
        model().sum().backward()
    assert not model.weight._backward_hooks


def test_float8_passes(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Identity(), torch.ones(4, 4)
    x[1, 2] = math.nan
    with fp8dist.detect_non_finite(model):
        model(torch.ones(4, 4).to(torch.float8_e4m3fn))
    assert caplog.records == []
    with fp8dist.detect_non_finite(model):
        model(x.to(torch.float8_e4m3fn))
    assert "the input of Identity has a NaN" in caplog.text


def test_selective_checkpointing_may_recompute_after_it() -> None:
    context = functools.partial(
        create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.MUST_SAVE
    )
    model, x = nn.Linear(DIM, DIM), torch.ones(4, DIM, requires_grad=True)
    output = checkpoint(model, x, use_reentrant=False, context_fn=context)
    with fp8dist.detect_non_finite(model):  # what it does was not done, and not saved, in forward
        output.sum().backward()


def test_a_forward_that_cannot_be_seen_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Code that was compiled before has none of the hooks in it."""
    model, x = nn.Sequential(nn.Linear(DIM, DIM)), torch.full((4, DIM), math.nan)
    compiled = torch.compile(lambda x: model(x).sum(), backend="eager")
    compiled(x)
    with fp8dist.detect_non_finite(model):
        compiled(x).backward()
    assert "Sequential was not seen to compute anything" in caplog.text


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("how", ["whole", "part", "script"])
def test_what_is_compiled_is_refused(how: str) -> None:
    model: nn.Module = Model(False)
    first = model.layers[0]
    if how == "whole":
        model = torch.compile(model)
    elif how == "part":
        model.layers[1].compile()
    else:
        model.layers[1] = torch.jit.script(nn.Linear(DIM, DIM))
    name = "OptimizedModule" if how == "whole" else "layers.1"
    with pytest.raises(ValueError, match=f"^{name} is compiled"), fp8dist.detect_non_finite(model):
        pass
    assert not first._forward_hooks
