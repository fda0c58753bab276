"""Which weights of experts become float8, what is refused by name, and what a state dict holds."""

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune

import fp8dist
from fp8dist import Float8Config
from fp8dist.experts import Float8ShardedExperts
from fp8dist.tensors.float8_tensor import Float8Tensor
from tests.unit.moe import DIM, FusedExperts, Model, StackedExperts, new_model


def converted(module: nn.Module) -> list[str]:
    return [n for n, p in module.named_parameters() if isinstance(p, Float8ShardedExperts)]


def test_three_dimensional_weights_of_what_fqns_name() -> None:
    model = new_model()
    expected = {name: param.detach().clone() for name, param in model.named_parameters()}
    model.experts.w1.note = "kept"
    model.experts.w3.requires_grad_(False)
    assert (
        fp8dist.convert_moe_to_float8_training(model, config="rowwise", fqns=["experts"]) is model
    )
    assert converted(model) == ["experts.w1", "experts.w3", "experts.w2"]
    for name, param in model.named_parameters():
        assert isinstance(param, nn.Parameter)
        assert getattr(param, "_tensor", param).equal(expected[name])
    assert model.experts.w1.note == "kept"
    assert [p.requires_grad for p in model.experts.parameters()] == [True, False, True]
    assert type(model.experts) is StackedExperts


def test_a_weight_that_pruning_stands_in_for() -> None:
    """Its module has no parameter of that name, and neither has the state dict."""
    models = [new_model(), fp8dist.convert_moe_to_float8_training(new_model())]
    for model in models:
        prune.l1_unstructured(model.experts, "w1", 0.5)
    before, saved = (model.state_dict() for model in models)
    assert saved.keys() == before.keys()
    assert not any(isinstance(value, Float8ShardedExperts) for value in saved.values())
    for model in models:
        model.load_state_dict(saved)
    assert "w1" not in models[1].experts._parameters


def test_biases_stay_in_high_precision() -> None:
    model = new_model(FusedExperts)
    fp8dist.convert_moe_to_float8_training(model)
    assert converted(model) == ["experts.gate_up_proj", "experts.down_proj"]


def test_defaults() -> None:
    model = new_model()
    fp8dist.convert_moe_to_float8_training(model, config=None, fqns=None)
    assert converted(model) == ["experts.w1", "experts.w3", "experts.w2"]
    assert model.experts.w1.config == Float8Config("rowwise")


@pytest.mark.parametrize("config", ["mxfp8", "mxfp8_rceil", Float8Config("mxfp8")])
def test_the_config_reaches_the_weights(config: Any) -> None:
    model = new_model()
    fp8dist.convert_moe_to_float8_training(model, config=config)
    assert model.experts.w1.config.recipe.name == "mxfp8_rceil"


def test_several_entries_and_models_that_were_converted_before(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.ModuleDict({"a": Model(), "b": Model()})
    fp8dist.convert_moe_to_float8_training(model, fqns=["a.experts"])
    assert converted(model) == ["a.experts.w1", "a.experts.w3", "a.experts.w2"]
    before = model["a"].experts.w1
    with caplog.at_level(logging.INFO, "fp8dist"):
        fp8dist.convert_moe_to_float8_training(model, fqns=["a.experts", "b.experts", "experts"])
    assert model["a"].experts.w1 is before
    assert len(converted(model)) == 6
    assert "b.experts.w1, b.experts.w3, b.experts.w2" in caplog.text
    assert "in float8, converted before: a.experts.w1, a.experts.w3, a.experts.w2" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "fp8dist"):
        fp8dist.convert_moe_to_float8_training(model, config="mxfp8", fqns=["a.experts"])
    assert before.config.recipe.name == "rowwise"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "another config, which they keep: a.experts.w1, " in record.getMessage()


def test_tied_and_integer_weights_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = new_model()
    model.tied = nn.Module()
    model.tied.w1 = model.experts.w1
    model.experts.w3 = nn.Parameter(torch.zeros(4, 32, 32, dtype=torch.int8), requires_grad=False)
    with caplog.at_level(logging.INFO, "fp8dist"):
        fp8dist.convert_moe_to_float8_training(model)
    assert converted(model) == ["experts.w2"]
    assert "tied to another module's weight: experts.w1" in caplog.text
    assert "of torch.int8: experts.w3" in caplog.text


class Odd(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.w = nn.Parameter(torch.randn(shape))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Model(), {"fqns": ["moe"]}, "'moe'.*no module's name.*experts"),
        (Model(), {"fqns": ["shared_experts"]}, r"shared_experts.weight \(64, 64\).*linear"),
        (Model(), {"fqns": "experts"}, "list of names"),
        (Model(), {"config": "tensorwise"}, "'tensorwise' is not for experts.*rowwise"),
        (Model(), {"config": "blockwise"}, "'blockwise' is not for experts"),
        (Model(), {"config": "rowwize"}, "did you mean 'rowwise'"),
        (
            Model(),
            {"config": Float8Config("rowwise", enable_fsdp_float8_all_gather=False)},
            "enable_fsdp_float8_all_gather",
        ),
        (Odd(4, 24, 32), {}, "experts.w is 4 x 24 x 32.*multiples of 16"),
        (Odd(4, 32, 40), {}, "experts.w is 4 x 32 x 40.*multiples of 16"),
        (Odd(4, 32, 48), {"config": "mxfp8"}, "experts.w is 4 x 32 x 48.*multiples of 32"),
        (Odd(32, 32), {}, r"'experts', where no weight is 3-D \(experts.w \(32, 32\)\)"),
    ],
)
def test_refusals(model: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp8dist.convert_moe_to_float8_training(model, **options)
    assert converted(model) == []


def test_after_sharding_it_is_too_late(mesh: DeviceMesh) -> None:
    model = fully_shard(new_model(), mesh=mesh)
    with pytest.raises(ValueError, match="experts.w1 is already a DTensor.*before.*fully_shard"):
        fp8dist.convert_moe_to_float8_training(model)


# --- state dicts


def test_a_state_dict_is_that_of_the_unconverted_model() -> None:
    model, plain = new_model(), new_model()
    fp8dist.convert_moe_to_float8_training(model)
    saved, expected = model.state_dict(), plain.state_dict()
    assert list(saved) == list(expected)
    for name, value in saved.items():
        assert type(value) is torch.Tensor
        assert value.equal(expected[name])
    saved["experts.w1"].zero_()
    assert model.experts.w1._tensor.count_nonzero() == 0, "it aliases the parameter"
    kept = model.state_dict(keep_vars=True)
    assert kept["experts.w1"] is model.experts.w1
    plain.load_state_dict(saved)


@pytest.mark.parametrize("assign", [False, True])
def test_loading(assign: bool) -> None:
    model, source = new_model(), new_model(seed=1)
    fp8dist.convert_moe_to_float8_training(model)
    model.load_state_dict(source.state_dict(), assign=assign)
    assert len(converted(model)) == 3
    for name, param in source.named_parameters():
        found = model.get_parameter(name)
        assert getattr(found, "_tensor", found).equal(param)
        assert found.requires_grad


def test_loading_onto_meta_with_assign() -> None:
    with torch.device("meta"):
        model = Model()
    fp8dist.convert_moe_to_float8_training(model)
    model.load_state_dict(new_model().state_dict(), assign=True)
    assert len(converted(model)) == 3
    assert not model.experts.w1.is_meta


def test_copies_have_states_of_their_own() -> None:
    model = new_model()
    fp8dist.convert_moe_to_float8_training(model)
    twin = copy.deepcopy(model)
    assert twin.experts.expert_states["w1"] is not model.experts.expert_states["w1"]
    assert twin.experts.w1._tensor.data_ptr() != model.experts.w1._tensor.data_ptr()
    assert all(type(value) is torch.Tensor for value in twin.state_dict().values())
    assert DIM == twin.experts.w1.size(2)


def test_weights_of_classes_of_their_own_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """As torchao's `quantize_` makes them."""
    model = new_model()
    data = torch.zeros(model.experts.w1.shape, dtype=torch.float8_e4m3fn)
    weight = Float8Tensor(data, torch.ones(2, 1, 1), data.shape, torch.float32)
    model.experts.w1 = nn.Parameter(weight)
    with caplog.at_level(logging.INFO, logger="fp8dist"):
        fp8dist.convert_moe_to_float8_training(model)
    assert converted(model) == ["experts.w3", "experts.w2"]
    assert "experts left in high precision, a Float8Tensor: experts.w1" in caplog.text
