"""What is said of weights with a NaN or Inf, in every way in which that is found."""

import logging
import math
from collections import OrderedDict
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import fp8dist
from fp8dist import Float8Config
from fp8dist.shard import Shard
from fp8dist.tensors import finite
from tests.unit.tensors.sharded_layer import K, shard_of, sharded

pytestmark = pytest.mark.usefixtures("say_it_again")


def model_of(mesh: DeviceMesh, recipes: list[str], bad: dict[str, float]) -> nn.Module:
    """Layers a, b and so on, of these recipes, of which those in `bad` have such an element."""
    names = "abcdef"[: len(recipes)]
    model = nn.Sequential(OrderedDict((name, nn.Linear(64, 64, bias=False)) for name in names))
    configs = [
        (lambda _, fqn, own=name: fqn == own, Float8Config(recipe))
        for name, recipe in zip(names, recipes, strict=True)
    ]
    fp8dist.convert_to_float8_training(model, config=configs)
    for name, value in bad.items():
        with torch.no_grad():
            getattr(model, name).weight._tensor[5, 5] = value
    return fully_shard(model, mesh=mesh)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


ONE = "{} has a NaN or Inf in its weight; training goes on with it"


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "mxfp8_rceil"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_weight_that_is_not_finite_is_named_once(
    mesh: DeviceMesh,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    bad: float,
    recipe: str,
    packed: bool,
) -> None:
    """Whether scales of 32 elements travel with them or by themselves."""
    if not packed:
        monkeypatch.setattr(Shard, "packed", False)
    model = model_of(mesh, 4 * [recipe], {"b": bad, "c": bad})
    for _ in range(3):
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
    assert warnings_of(caplog) == [ONE.format("b")]
    assert all(scales.isfinite().all() for scales in model.a.weight_state.scales)


@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
@pytest.mark.parametrize("on_a_device", [False, True])
def test_in_a_mix_each_is_named(
    mesh: DeviceMesh,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    on_a_device: bool,
) -> None:
    """Also where the answers to several questions of one step are on their way at once."""
    if on_a_device:
        monkeypatch.setattr(finite, "Finite", _OnADevice)
    recipes = ["mxfp8_rceil", "tensorwise", "mxfp8_rceil", "rowwise"]
    model = model_of(mesh, recipes, {name: math.nan})
    for _ in range(1 + on_a_device):
        assert not warnings_of(caplog)
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
    assert warnings_of(caplog) == [ONE.format(name)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_shows_in_the_output(mesh: DeviceMesh, bad: float) -> None:
    layer = sharded(mesh)
    with torch.no_grad():
        shard_of(layer)[5, 5] = bad
    assert layer(torch.ones(4, K)).isnan().any()


class _OnADevice(finite.Finite):
    """As it is where the answer is read one call later, because the device has to get there."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.event = mock.Mock(query=lambda: True)


def test_every_step_is_looked_at_on_a_device(
    mesh: DeviceMesh, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finite, "Finite", _OnADevice)
    layer = sharded(mesh)
    for bad in (False, True, False):  # in one step only
        with torch.no_grad():
            shard_of(layer)[5, 5] = math.nan if bad else 1.0
        assert "NaN" not in caplog.text
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(layer)
    assert "has a NaN or Inf in its weight" in caplog.text


def test_finite_weights_are_not_reported(
    mesh: DeviceMesh, caplog: pytest.LogCaptureFixture
) -> None:
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(sharded(mesh))
    assert "NaN" not in caplog.text
