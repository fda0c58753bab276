"""Conversion: which config counts, what becomes float8 and what stays as it was."""

import logging
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchao.float8 import CastConfig, Float8LinearConfig, Float8LinearRecipeName

import fp8dist
from fp8dist import FastAccum, Float8Config, Float8Linear
from fp8dist.tensors.float8_tensor import Float8Tensor
from fp8dist.tensors.sharded_weight import Float8ShardedWeight
from tests.unit.attention_model import ALL, TOKENS, WIDTH, converted, everything, model

# --- which config


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, Float8Config()),
        ("tensorwise", Float8Config(recipe_name="tensorwise")),
        (Float8LinearRecipeName.ROWWISE, Float8Config(recipe_name="rowwise")),
        (Float8Config(cache_payload=False), Float8Config(cache_payload=False)),
        (
            Float8LinearConfig(emulate=True),
            Float8Config(enable_fsdp_float8_all_gather=False, fast_accum=FastAccum(), emulate=True),
        ),
    ],
    ids=["none", "name", "enum", "config", "torchao"],
)
def test_config_can_be_given_in_every_form(config: Any, expected: Float8Config) -> None:
    module = model()
    assert fp8dist.convert_to_float8_training(module, config=config) is module
    assert converted(module) == ALL
    for fqn in ALL:
        assert module.get_submodule(fqn).config == expected


def test_a_wrong_recipe_name_names_the_nearest_and_converts_nothing() -> None:
    module = model()
    with pytest.raises(ValueError, match="'tensorwize'.*did you mean 'tensorwise'"):
        fp8dist.convert_to_float8_training(module, config="tensorwize")
    assert not converted(module)


@pytest.mark.parametrize("config", [3, {"recipe_name": "tensorwise"}, CastConfig, torch.float16])
def test_something_else_as_config_is_refused(config: Any) -> None:
    with pytest.raises(ValueError, match=f"config is a {type(config).__name__}.*Float8Config"):
        fp8dist.convert_to_float8_training(model(), config=config)


def test_another_torchao_config_is_refused_for_its_type() -> None:
    """Not an AttributeError about a field it does not have."""
    with pytest.raises(ValueError, match="CastConfig"):
        fp8dist.convert_to_float8_training(model(), config=CastConfig())


def test_a_torchao_config_without_a_recipe_is_refused_by_field() -> None:
    mixed = Float8LinearConfig(cast_config_grad_output=CastConfig(target_dtype=torch.float8_e4m3fn))
    module = model()
    with pytest.raises(ValueError, match="cast_config_grad_output="):
        fp8dist.convert_to_float8_training(module, config=mixed)
    assert not converted(module)


def test_a_filter_that_is_no_function_is_refused() -> None:
    with pytest.raises(ValueError, match=r"module_filter_fn is \['output'\]: pass a function"):
        fp8dist.convert_to_float8_training(model(), module_filter_fn=["output"])


def test_a_list_of_configs_takes_the_first_whose_filter_accepts() -> None:
    module = model()
    fp8dist.convert_to_float8_training(
        module,
        config=[
            (lambda m, fqn: fqn.endswith("wq"), Float8Config(cache_payload=False)),
            (lambda m, fqn: "attention" in fqn, "tensorwise"),
        ],
    )
    assert converted(module) == ALL[:-1]  # no rule accepts the output
    for fqn in ALL[:-1]:
        cached = not fqn.endswith("wq")
        assert module.get_submodule(fqn).config.cache_payload is cached


def test_module_filter_fn_restricts_a_list_too() -> None:
    module = model()
    fp8dist.convert_to_float8_training(
        module,
        config=[(everything, "tensorwise")],
        module_filter_fn=lambda m, fqn: "layers.1" in fqn,
    )
    assert converted(module) == ["layers.1.attention.wq", "layers.1.attention.wo"]


@pytest.mark.parametrize(
    "config", [["rowwise"], [("layers.0", "rowwise")], [(lambda m, fqn: True,)]], ids=str
)
def test_a_list_of_anything_but_pairs_is_refused(config: Any) -> None:
    with pytest.raises(ValueError, match="each entry is .filter, config."):
        fp8dist.convert_to_float8_training(model(), config=config)


# --- which layers


def test_module_filter_fn_sees_every_linear_layer_by_its_name() -> None:
    module = model()
    seen = {}

    def note(linear: nn.Module, fqn: str) -> bool:
        seen[fqn] = linear
        return False

    fp8dist.convert_to_float8_training(module, module_filter_fn=note)
    assert seen == {fqn: module.get_submodule(fqn) for fqn in ALL}
    assert not converted(module)


def test_a_linear_layer_by_itself_is_converted_in_place() -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    assert fp8dist.convert_to_float8_training(layer) is layer
    assert isinstance(layer, Float8Linear)
    assert layer(torch.randn(4, WIDTH)).shape == (4, WIDTH)


def test_converting_twice_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    config = Float8Config(cache_payload=False)
    module = fp8dist.convert_to_float8_training(model(), config=config)
    weights = [module.get_submodule(fqn).weight for fqn in ALL]
    with caplog.at_level(logging.INFO, logger="fp8dist"):
        fp8dist.convert_to_float8_training(module, config=config)
    assert [module.get_submodule(fqn).weight for fqn in ALL] == weights
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert caplog.text.count("in float8, converted before: ") == 1


def test_another_config_for_layers_that_were_converted_before_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = fp8dist.convert_to_float8_training(model(), config="rowwise")
    with caplog.at_level(logging.INFO, logger="fp8dist"):
        fp8dist.convert_to_float8_training(module, module_filter_fn=lambda _, fqn: fqn == "output")
    assert module.output.config.recipe_name == "rowwise"
    assert "left in high precision" not in caplog.text  # not those that the filter rejects either
    same, other = caplog.records
    assert same.levelname == "INFO" and "output" not in same.getMessage()
    assert other.levelname == "WARNING"
    assert "another config, which they keep: output: " in other.getMessage()


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Renamed(nn.Linear):
    """A subclass that computes what nn.Linear computes."""


def test_layers_that_are_more_than_a_linear_layer_are_left_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = nn.ModuleDict(
        {
            "scaled": Scaled(WIDTH, WIDTH),
            "mha": nn.MultiheadAttention(WIDTH, 2),
            "renamed": Renamed(WIDTH, WIDTH),
        }
    )
    with caplog.at_level(logging.INFO, logger="fp8dist"):
        fp8dist.convert_to_float8_training(module, module_filter_fn=everything)
    assert converted(module) == ["renamed"]
    assert type(module["scaled"]) is Scaled
    assert type(module["mha"].out_proj) is NonDynamicallyQuantizableLinear
    assert "Scaled is a subclass of nn.Linear with methods of its own: scaled" in caplog.text
    assert "nn.MultiheadAttention" in caplog.text
    x = torch.randn(4, 2, WIDTH)
    module["mha"](x, x, x)  # its weight is used without its forward


def test_a_layer_without_a_shape_yet_is_left_alone() -> None:
    module = nn.Sequential(nn.LazyLinear(WIDTH), nn.Linear(WIDTH, WIDTH))
    fp8dist.convert_to_float8_training(module)
    assert converted(module) == ["1"]
    assert module(torch.randn(4, 48)).shape == (4, WIDTH)


def test_weights_in_other_dtypes_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    module = nn.ModuleDict(
        {"f64": nn.Linear(WIDTH, WIDTH).double(), "f16": nn.Linear(WIDTH, WIDTH).half()}
    )
    with caplog.at_level(logging.INFO, logger="fp8dist"):
        fp8dist.convert_to_float8_training(module)
    assert converted(module) == ["f16"]
    assert "torch.float64: f64" in caplog.text


@pytest.mark.parametrize(
    "wrap",
    [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm],
    ids=lambda wrap: wrap.__name__,
)
def test_a_parametrized_weight_is_left_alone(wrap: Any, caplog: pytest.LogCaptureFixture) -> None:
    module = nn.ModuleDict({"it": wrap(nn.Linear(WIDTH, WIDTH))})
    with caplog.at_level(logging.INFO, logger="fp8dist"):
        fp8dist.convert_to_float8_training(module)
    assert not converted(module)
    assert "not a plain parameter: it" in caplog.text or "ParametrizedLinear" in caplog.text
    module["it"](torch.randn(2, WIDTH)).sum().backward()


def test_tied_weights_are_left_alone_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    module = model()
    module.output.weight = module.embedding.weight
    with caplog.at_level(logging.INFO, logger="fp8dist"):
        fp8dist.convert_to_float8_training(module)
    assert converted(module) == ALL[:-1]
    assert module.output.weight is module.embedding.weight
    assert "tied to another layer's: output" in caplog.text


def test_two_linear_layers_that_share_a_weight_are_left_alone() -> None:
    module = nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH), "b": nn.Linear(WIDTH, WIDTH)})
    module["b"].weight = module["a"].weight
    fp8dist.convert_to_float8_training(module)
    assert not converted(module)
    assert module["a"].weight is module["b"].weight


def test_a_module_under_two_names_is_converted_once() -> None:
    module = model()
    module.layers[2]["attention"].wo = module.layers[0]["attention"].wo
    fp8dist.convert_to_float8_training(module)
    shared = module.layers[0]["attention"].wo
    assert module.layers[2]["attention"].wo is shared
    assert isinstance(shared, Float8Linear)
    assert isinstance(shared.weight._tensor, torch.Tensor)
    assert not isinstance(shared.weight._tensor, Float8ShardedWeight)
    module(TOKENS).sum().backward()
    assert shared.weight.grad is not None


@pytest.mark.parametrize("features", [(WIDTH, 40), (40, WIDTH), (24, 24)], ids=str)
def test_default_filter_leaves_odd_sizes_alone_and_says_so(
    features: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    module = nn.ModuleDict({"odd": nn.Linear(*features), "even": nn.Linear(WIDTH, WIDTH)})
    with caplog.at_level(logging.INFO, logger="fp8dist"):
        fp8dist.convert_to_float8_training(module)
    assert converted(module) == ["even"]
    assert "left in high precision, dimensions not multiples of 16: odd" in caplog.text


def test_a_filter_that_accepts_odd_sizes_is_refused_by_module() -> None:
    module = nn.ModuleDict({"even": nn.Linear(WIDTH, WIDTH), "odd": nn.Linear(WIDTH, 40)})
    with pytest.raises(ValueError, match="odd: its weight is 40 x 32.*multiples of 16"):
        fp8dist.convert_to_float8_training(module, module_filter_fn=everything)
    assert not converted(module), "a refused conversion leaves the model as it was"


def test_emulation_takes_odd_sizes() -> None:
    layer = nn.Linear(24, 40)
    fp8dist.convert_to_float8_training(
        layer, config=Float8Config(emulate=True), module_filter_fn=everything
    )
    assert layer(torch.randn(3, 24)).shape == (3, 40)


def test_a_sharded_model_is_refused_by_module(mesh: DeviceMesh) -> None:
    module = model()
    fully_shard(module.layers[1]["attention"], mesh=mesh)
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.wq: .*DTensor.*before"):
        fp8dist.convert_to_float8_training(module)
    assert not converted(module)


@pytest.mark.parametrize("name", ["blockwise", "mxfp8"])
def test_emulation_does_not_lift_the_recipe_s_own_block(name: str) -> None:
    config = fp8dist.Float8Config(name, emulate=True)
    with pytest.raises(ValueError, match="multiples of") as caught:
        fp8dist.convert_to_float8_training(
            nn.Linear(100, 60), config=config, module_filter_fn=lambda m, fqn: True
        )
    assert "emulate" not in str(caught.value)


def test_a_subclass_with_methods_of_its_own_is_left_alone() -> None:
    class Filled(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.constant_(self.weight, 7)

    module = nn.Sequential(Filled(WIDTH, WIDTH))
    fp8dist.convert_to_float8_training(module)
    assert not converted(module)


def test_weights_of_classes_of_their_own_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """As quantized ones are, which say themselves what an op does with them."""
    data = torch.zeros(WIDTH, WIDTH, dtype=torch.float8_e4m3fn)
    weight = Float8Tensor(data, torch.ones(2, 1, 1), data.shape, torch.float32)
    module = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("own", "sparse", "plain")})
    module["own"].weight = nn.Parameter(weight)
    module["sparse"].weight = nn.Parameter(module["sparse"].weight.detach().to_sparse())
    with caplog.at_level(logging.INFO, logger="fp8dist"):
        fp8dist.convert_to_float8_training(module)
    assert converted(module) == ["plain"]
    assert "left in high precision, its weight is a Float8Tensor: own" in caplog.text
    assert "left in high precision, its weight is torch.sparse_coo: sparse" in caplog.text


def test_what_an_encoder_takes_past_the_layer_is_left_alone() -> None:
    """Without gradients torch multiplies by these weights itself, in high precision."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=True).eval()
    model = nn.Sequential(encoder, nn.Linear(WIDTH, WIDTH))
    fp8dist.convert_to_float8_training(model)
    assert converted(model) == ["1"]


@pytest.mark.parametrize("gather", [True, False])
def test_an_input_that_is_refused_names_the_layer(gather: bool) -> None:
    config = Float8Config(enable_fsdp_float8_all_gather=gather)
    module = fp8dist.convert_to_float8_training(
        nn.ModuleDict({"wq": nn.Linear(WIDTH, WIDTH)}), config=config
    )
    with pytest.raises(ValueError, match=r"^wq: the input is torch\.float64"):
        module["wq"](torch.randn(4, WIDTH, dtype=torch.float64))


def test_weights_that_stand_in_for_plain_ones_are_converted() -> None:
    """Fake ones, and one of a layer that was converted before, tied since."""
    with FakeTensorMode():
        fake = fp8dist.convert_to_float8_training(nn.Linear(WIDTH, WIDTH))
    assert isinstance(fake, Float8Linear)
    first = fp8dist.convert_to_float8_training(nn.Linear(WIDTH, WIDTH))
    second = nn.Linear(WIDTH, WIDTH)
    second.weight = first.weight
    assert isinstance(fp8dist.convert_to_float8_training(second), Float8Linear)
    assert second.weight is first.weight
