"""What a conversion keeps of a model, also of one that torchao has converted, and what it says."""

import logging

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torchao.float8 import CastConfig, Float8LinearConfig
from torchao.float8 import convert_to_float8_training as torchao_convert
from torchao.float8.config import ScalingGranularity
from torchao.float8.float8_linear import Float8Linear as TorchaoLinear

import fp8dist
from fp8dist import FastAccum, Float8Config, float8_module_filter
from fp8dist.tensors.sharded_weight import Float8ShardedWeight
from tests.unit.attention_model import ALL, TOKENS, WIDTH, converted, model

# --- what survives


def test_a_converted_model_looks_like_before() -> None:
    module, before = model(), model()
    module.layers[0]["attention"].wq.weight.requires_grad_(False)
    module.layers[0]["attention"].wo.bias.requires_grad_(False)
    module.layers[1].bfloat16()
    module.output.eval()
    biases = [param for name, param in module.named_parameters() if name.endswith("bias")]
    fp8dist.convert_to_float8_training(module)
    assert [name for name, _ in module.named_parameters()] == [
        name for name, _ in before.named_parameters()
    ]
    assert [name for name, _ in module.named_modules()] == [
        name for name, _ in before.named_modules()
    ]
    assert [param for name, param in module.named_parameters() if name.endswith("bias")] == biases
    frozen = {name for name, param in module.named_parameters() if not param.requires_grad}
    assert frozen == {"layers.0.attention.wq.weight", "layers.0.attention.wo.bias"}
    assert module.layers[1]["attention"].wq.weight.dtype == torch.bfloat16
    assert module.layers[0]["attention"].wq.weight.dtype == torch.float32
    assert not module.output.training
    assert module.layers[0]["attention"].wq.training
    for name, param in module.named_parameters():
        assert isinstance(param, nn.Parameter), name
        assert param.is_leaf, name
    for name, param in before.named_parameters():
        ours = module.get_parameter(name)
        assert ours.shape == param.shape
        assert torch.equal(getattr(ours, "_tensor", ours).float(), param.to(ours.dtype).float())


def test_hooks_and_attributes_survive() -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    layer.tag = "mine"
    calls = []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    fp8dist.convert_to_float8_training(layer)
    layer(torch.randn(2, WIDTH, requires_grad=True)).sum().backward()
    assert calls == ["pre", "forward", "backward"]
    assert layer.tag == "mine"


def test_attributes_of_a_weight_survive() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    module[0].weight.no_decay = True
    fp8dist.convert_to_float8_training(module)
    assert module[0].weight.no_decay


# --- models that torchao has converted


@pytest.mark.parametrize("gather", [False, True], ids=["", "float8 gather"])
def test_a_model_that_torchao_converted_is_taken_over(gather: bool) -> None:
    reference = torchao_convert(model(), config=Float8LinearConfig(emulate=True))
    expected = reference(TOKENS)
    config = Float8LinearConfig(
        enable_fsdp_float8_all_gather=gather,
        emulate=True,
        gemm_config_output=Float8LinearConfig().gemm_config_grad_input,
    )
    module = torchao_convert(model(), config=config, module_filter_fn=lambda m, fqn: fqn != ALL[0])
    weights = {fqn: module.get_submodule(fqn).weight for fqn in ALL}
    fp8dist.convert_to_float8_training(module, config=Float8Config(cache_payload=False))
    assert converted(module) == ALL
    assert not any(isinstance(m, TorchaoLinear) for m in module.modules())
    for fqn in ALL[1:]:
        linear = module.get_submodule(fqn)
        assert linear.config == Float8Config(
            enable_fsdp_float8_all_gather=gather,
            emulate=True,
            fast_accum=FastAccum(output=False),
        ), "its own config counts"
        assert isinstance(linear.weight, Float8ShardedWeight) is gather
        inner = getattr(linear.weight, "_tensor", linear.weight)
        before = getattr(weights[fqn], "_tensor", weights[fqn])
        assert type(inner) in (torch.Tensor, nn.Parameter)
        assert inner.data_ptr() == before.data_ptr()
    assert module.get_submodule(ALL[0]).config == Float8Config(cache_payload=False)
    assert torch.equal(module(TOKENS), expected)
    module.load_state_dict(model().state_dict(), strict=True)
    assert all(type(tensor) is torch.Tensor for tensor in module.state_dict().values())


@pytest.mark.parametrize("gather", [False, True], ids=["", "float8 gather"])
def test_a_weight_that_torchao_froze_stays_frozen(gather: bool) -> None:
    module = torchao_convert(
        model(), config=Float8LinearConfig(enable_fsdp_float8_all_gather=gather)
    )
    module.output.weight.requires_grad_(False)
    fp8dist.convert_to_float8_training(module)
    assert not module.output.weight.requires_grad


def test_a_torchao_model_without_a_recipe_is_refused() -> None:
    mixed = Float8LinearConfig(
        cast_config_input=CastConfig(scaling_granularity=ScalingGranularity.AXISWISE),
        cast_config_weight=CastConfig(scaling_granularity=ScalingGranularity.TENSORWISE),
    )
    module = torchao_convert(model(), config=mixed, module_filter_fn=lambda m, fqn: fqn == "output")
    with pytest.raises(ValueError, match="output.*cast_config_input="):
        fp8dist.convert_to_float8_training(module)
    assert not converted(module), "a refused conversion leaves the model as it was"


# --- what is said


def messages(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_one_line_says_what_was_converted_and_one_per_reason_what_was_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = model(vocabulary=72)
    with caplog.at_level(logging.INFO, logger="fp8dist"):
        fp8dist.convert_to_float8_training(
            module, module_filter_fn=float8_module_filter("tensorwise", ["wq"])
        )
    assert messages(caplog) == [
        "float8 tensorwise: 3 of 7 linear layers: layers.*.attention.wo (3)",
        "left in high precision, in filter_fqns (wq): layers.*.attention.wq (3)",
        "left in high precision, dimensions not multiples of 16: output",
    ]
    assert not messages(caplog, logging.WARNING)


def test_filter_fqns_that_match_nothing_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fp8dist"):
        fp8dist.convert_to_float8_training(
            model(),
            module_filter_fn=float8_module_filter("tensorwise", ["wk", "output", "head"]),
        )
    (warning,) = messages(caplog, logging.WARNING)
    assert warning == "filter_fqns that match no linear layer: wk, head"


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Linear(3, 3)], ids=["no linear", "odd"])
def test_nothing_converted_is_a_warning(
    module: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="fp8dist"):
        assert fp8dist.convert_to_float8_training(module) is module
    (warning,) = messages(caplog, logging.WARNING)
    assert "no linear layer was converted to float8" in warning


def test_user_filters_are_given_as_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fp8dist"):
        fp8dist.convert_to_float8_training(
            model(), module_filter_fn=lambda module, fqn: fqn != "output"
        )
    assert "left in high precision, rejected by module_filter_fn: output" in messages(caplog)


def test_printing_the_model_shows_the_recipe() -> None:
    module = model(vocabulary=72)
    fp8dist.convert_to_float8_training(module)
    lines = [line.strip() for line in str(module).splitlines() if "Linear(" in line]
    # The three layers are alike and printed once.
    assert lines == [
        "(wq): Float8Linear(in_features=32, out_features=32, bias=False, recipe=tensorwise)",
        "(wo): Float8Linear(in_features=32, out_features=32, bias=True, recipe=tensorwise)",
        "(output): Linear(in_features=32, out_features=72, bias=False)",
    ]


def test_float8_parameters_can_be_printed() -> None:
    module = fp8dist.convert_to_float8_training(model())
    assert "Float8ShardedWeight(" in repr(module.output.weight)


@pytest.mark.parametrize("gather", [True, False])
def test_what_stays_torchao_s_is_said_to(gather: bool, caplog: pytest.LogCaptureFixture) -> None:
    layers = nn.ModuleDict({"large": nn.Linear(WIDTH, WIDTH), "odd": nn.Linear(WIDTH, 10)})
    torchao_convert(layers, config=Float8LinearConfig(enable_fsdp_float8_all_gather=gather))
    with caplog.at_level(logging.INFO, logger="fp8dist"):
        fp8dist.convert_to_float8_training(layers)
    assert type(layers["odd"]) is TorchaoLinear
    reason = "left as torchao has converted them, dimensions not multiples of 16: odd"
    assert reason in caplog.text
    assert "high precision" not in caplog.text


def test_fsdp1_takes_layers_that_are_gathered_in_high_precision(mesh: DeviceMesh) -> None:
    """As docs/migration.md says of `use_orig_params=True`."""
    layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    config = Float8Config("rowwise", enable_fsdp_float8_all_gather=False)
    fp8dist.convert_to_float8_training(layers, config=config)
    x = torch.randn(8, WIDTH)
    expected = layers(x)
    sharded = FullyShardedDataParallel(
        layers, use_orig_params=True, device_id=torch.device(mesh.device_type)
    )
    assert torch.equal(sharded(x), expected)
