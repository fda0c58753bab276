"""The converters against torchtitan's protocol: what they register, and make of its flags.

`tests/clients/test_torchtitan.py` runs them in torchtitan itself.
"""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from fp8dist import Float8ColwiseParallel, Float8Linear, Float8RowwiseParallel
from fp8dist.config import TENSOR
from fp8dist.tensors.float8_activation import Float8Activation

LINEAR, EXPERTS = "fp8dist", "fp8dist.grouped_mm.float8"


class Titan:
    """A stand-in for what is used of torchtitan: two registries."""

    def __init__(self) -> None:
        self.converters: dict[str, Any] = {}
        # Of the module that has a model's plan.
        self.namespace: dict[str, Any] = {
            style.__name__: style
            for style in (ColwiseParallel, RowwiseParallel, PrepareModuleInput)
        }

    def register(self, kind: Any, name: str) -> None:
        assert name not in self.converters
        self.converters[name] = kind

    def train_spec(self, name: str) -> Any:
        assert name == "llama3"
        return SimpleNamespace(parallelize_fn=SimpleNamespace(__globals__=self.namespace))


@pytest.fixture
def titan(monkeypatch: pytest.MonkeyPatch) -> Iterator[Titan]:
    titan = Titan()
    modules: dict[str, Any] = {
        name: ModuleType(name)
        for name in (
            "torchtitan",
            "torchtitan.protocols",
            "torchtitan.protocols.model_converter",
            "torchtitan.protocols.train_spec",
        )
    }
    modules["torchtitan.protocols.model_converter"].register_model_converter = titan.register
    modules["torchtitan.protocols.train_spec"].get_train_spec = titan.train_spec
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "fp8dist.torchtitan", raising=False)
    importlib.import_module("fp8dist.torchtitan")
    yield titan
    sys.modules.pop("fp8dist.torchtitan")


def job(*converters: str, float8: Any = (), mx: Any = (), experts: Any = ("experts",)) -> Any:
    """A job's configuration, with torchtitan's defaults."""
    linear = {
        "enable_fsdp_float8_all_gather": False,
        "precompute_float8_dynamic_scale_for_fsdp": False,
        "recipe_name": None,
        "filter_fqns": [],
        "emulate": False,
    }
    return SimpleNamespace(
        model=SimpleNamespace(name="llama3", converters=list(converters)),
        quantize=SimpleNamespace(
            linear=SimpleNamespace(
                float8=SimpleNamespace(**linear | dict(float8)),
                mx=SimpleNamespace(
                    **{"recipe_name": "mxfp8_cublas", "filter_fqns": ["output"]} | dict(mx)
                ),
            ),
            grouped_mm=SimpleNamespace(
                float8=SimpleNamespace(fqns=experts),
                mx=SimpleNamespace(recipe_name="mxfp8", fqns=experts),
            ),
        ),
    )


def dims(fsdp: bool = True, tp: bool = False, ep: bool = False) -> Any:
    return SimpleNamespace(fsdp_enabled=fsdp, tp_enabled=tp, ep_enabled=ep)


BOTH = {"enable_fsdp_float8_all_gather": True, "precompute_float8_dynamic_scale_for_fsdp": True}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(nn.Linear(64, 128).weight.detach().unflatten(0, (2, 64)).clone())


def model() -> nn.Module:
    return nn.ModuleDict(
        {"wq": nn.Linear(64, 64), "wo": nn.Linear(64, 64), "output": nn.Linear(64, 64)}
        | {"experts": Experts()}
    )


def test_registers_names_beside_torchtitans(titan: Titan) -> None:
    assert set(titan.converters) == {
        "fp8dist",
        "fp8dist.linear.float8",
        "fp8dist.linear.mx",
        "fp8dist.grouped_mm.float8",
        "fp8dist.grouped_mm.mx",
    }
    assert titan.converters["fp8dist"] is titan.converters["fp8dist.linear.float8"]


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({}, ("tensorwise", False, False)),
        (BOTH, ("tensorwise", True, False)),
        (BOTH | {"recipe_name": "rowwise", "emulate": True}, ("rowwise", True, True)),
    ],
)
def test_flags_mean_what_they_mean_in_torchtitan(
    titan: Titan, flags: dict[str, Any], expected: tuple[str, bool, bool]
) -> None:
    converted = model()
    config = job(LINEAR, float8=flags | {"filter_fqns": ["output"]})
    titan.converters[LINEAR](config, dims()).convert(converted)
    assert type(converted["output"]) is nn.Linear
    for name in ("wq", "wo"):
        found = converted[name].config
        gathers = found.enable_fsdp_float8_all_gather
        assert (found.recipe_name, gathers, found.emulate) == expected


def test_mx_takes_torchtitans_default_for_the_recipe_that_has_its_name_now(titan: Titan) -> None:
    converted = model()
    titan.converters["fp8dist.linear.mx"](job("fp8dist.linear.mx"), dims()).convert(converted)
    assert converted["wq"].config.recipe_name == "mxfp8_rceil"
    assert converted["wq"].config.enable_fsdp_float8_all_gather
    assert type(converted["output"]) is nn.Linear


def test_ddp_gets_plain_parameters(titan: Titan) -> None:
    converted = model()
    titan.converters[LINEAR](job(LINEAR, float8=BOTH), dims(fsdp=False)).convert(converted)
    assert isinstance(converted["wq"], Float8Linear)
    assert type(converted["wq"].weight) is nn.Parameter


def precomputed(
    titan: Titan, monkeypatch: pytest.MonkeyPatch, config: Any, parallel_dims: Any
) -> list[Any]:
    """What is precomputed after one step of an optimizer."""
    seen: list[Any] = []
    ours = sys.modules["fp8dist.torchtitan"]
    monkeypatch.setattr(ours, "precompute_float8_dynamic_scale_for_fsdp", seen.append)
    stages = [model(), model()]
    for name in config.model.converters:
        titan.converters[name](config, parallel_dims).post_optimizer_hook(stages)
    assert all(stages is found for found in seen)
    return seen


@pytest.mark.parametrize(
    "config, parallel_dims, times",
    [
        (job(LINEAR, float8=BOTH), dims(), 1),
        (job(LINEAR, float8=BOTH), dims(fsdp=False, tp=True), 1),
        (job(LINEAR, float8=BOTH), dims(fsdp=False), 0),
        (job(LINEAR, float8=BOTH | {"enable_fsdp_float8_all_gather": False}), dims(), 0),
        (job(LINEAR, float8={"enable_fsdp_float8_all_gather": True}), dims(), 0),
        (job("fp8dist.linear.mx"), dims(), 1),
        (job(LINEAR, EXPERTS, float8=BOTH), dims(), 1),
        (job(LINEAR, EXPERTS), dims(), 1),
        (job(EXPERTS, LINEAR, float8=BOTH), dims(), 1),
    ],
)
def test_scales_are_precomputed_once_if_at_all(
    titan: Titan, monkeypatch: pytest.MonkeyPatch, config: Any, parallel_dims: Any, times: int
) -> None:
    assert len(precomputed(titan, monkeypatch, config, parallel_dims)) == times


@pytest.mark.parametrize("name", [EXPERTS, "fp8dist.grouped_mm.mx"])
@pytest.mark.parametrize("fqns", [["experts"], "experts", []])
def test_experts(titan: Titan, name: str, fqns: Any) -> None:
    converted = model()
    titan.converters[name](job(name, experts=fqns), dims()).convert(converted)
    recipe = converted["experts"].expert_states["w1"].config.recipe.name
    assert recipe == ("rowwise" if name == EXPERTS else "mxfp8_rceil")
    assert type(converted["wq"]) is nn.Linear


@pytest.mark.parametrize("parallel_dims", [dims(ep=True), dims(tp=True)])
def test_experts_that_are_cut_otherwise(titan: Titan, parallel_dims: Any) -> None:
    with pytest.raises(ValueError, match="fp8dist.grouped_mm.float8: .*expert_parallel_degree"):
        titan.converters[EXPERTS](job(EXPERTS), parallel_dims)


class Attention(nn.ModuleDict):
    """Gives what its layers would get."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def applied(titan: Titan, mesh: DeviceMesh, filter_fqns: list[str]) -> tuple[list[Any], Any]:
    """torchtitan's plan of an attention: the styles its layers got, and what they take."""
    attention = Attention({"wq": nn.Linear(64, 64), "wo": nn.Linear(64, 64)})
    config = job(LINEAR, float8=BOTH | {"filter_fqns": filter_fqns})
    titan.converters[LINEAR](config, dims(tp=True)).convert(attention)
    prepare = titan.namespace["PrepareModuleInput"](
        input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
    )
    parallelize_module(attention, mesh, prepare)
    plan = {
        "wq": titan.namespace["ColwiseParallel"](),
        "wo": titan.namespace["RowwiseParallel"](output_layouts=Shard(1)),
    }
    parallelize_module(attention, mesh, plan)
    prepared: Any = attention(torch.ones(1, 16, 64))
    assert prepared.placements == (Replicate(),)
    styles = [type(getattr(layer, "style", None)) for layer in attention.values()]
    return styles, prepared.to_local()


def test_plans_are_made_of_the_styles_of_float8(titan: Titan, mesh: DeviceMesh) -> None:
    styles, taken = applied(titan, mesh, [])
    assert styles == [Float8ColwiseParallel, Float8RowwiseParallel]
    assert isinstance(taken, Float8Activation) and taken._block == TENSOR


def test_plans_of_layers_left_alone_are_torchs(titan: Titan, mesh: DeviceMesh) -> None:
    """And what some of them take is not rounded."""
    styles, taken = applied(titan, mesh, ["wq"])
    assert styles == [type(None), Float8RowwiseParallel]
    assert type(taken) is torch.Tensor


def test_without_tensor_parallelism_torchtitan_keeps_its_styles(titan: Titan) -> None:
    titan.converters[LINEAR](job(LINEAR, float8=BOTH), dims()).convert(model())
    assert titan.namespace["ColwiseParallel"] is ColwiseParallel
