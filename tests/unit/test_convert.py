"""Conversion: what becomes float8, what stays as it was, and what is said about it."""

import itertools
import logging
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchao.float8 import CastConfig, Float8LinearConfig
from torchao.float8 import convert_to_float8_training as torchao_convert
from torchao.float8.config import ScalingGranularity
from torchao.float8.float8_linear import Float8Linear as TorchaoLinear
from torchao.float8.float8_linear_utils import _auto_filter_for_recipe

import fp8dist
from fp8dist import FastAccum, Float8Config, Float8Linear, float8_module_filter
from fp8dist.tensors.sharded_weight import Float8ShardedWeight

WIDTH = 32


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(WIDTH, WIDTH, bias=False)
        self.wo = nn.Linear(WIDTH, WIDTH)


class Model(nn.Module):
    def __init__(self, vocabulary: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.layers = nn.ModuleList(nn.ModuleDict({"attention": Attention()}) for _ in range(3))
        self.output = nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            attention = layer["attention"]
            x = x + attention.wo(attention.wq(x))
        return self.output(x)


TOKENS = torch.arange(24).view(2, 12)


def model(**kwargs: Any) -> Model:
    torch.manual_seed(0)
    return Model(**kwargs)


def converted(module: nn.Module) -> list[str]:
    return [fqn for fqn, m in module.named_modules() if isinstance(m, Float8Linear)]


def everything(module: nn.Module, fqn: str) -> bool:
    return True


ALL = [
    "layers.0.attention.wq",
    "layers.0.attention.wo",
    "layers.1.attention.wq",
    "layers.1.attention.wo",
    "layers.2.attention.wq",
    "layers.2.attention.wo",
    "output",
]


# --- which config


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, Float8Config()),
        ("tensorwise", Float8Config(recipe_name="tensorwise")),
        (Float8Config(cache_payload=False), Float8Config(cache_payload=False)),
        (
            Float8LinearConfig(emulate=True),
            Float8Config(enable_fsdp_float8_all_gather=False, fast_accum=FastAccum(), emulate=True),
        ),
    ],
    ids=["none", "name", "config", "torchao"],
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
    module = fp8dist.convert_to_float8_training(model(), config=Float8Config(cache_payload=False))
    weights = [module.get_submodule(fqn).weight for fqn in ALL]
    with caplog.at_level(logging.INFO, logger="fp8dist"):
        fp8dist.convert_to_float8_training(module)
    assert [module.get_submodule(fqn).weight for fqn in ALL] == weights
    assert not module.output.config.cache_payload
    assert "converted before" in caplog.text


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


# --- float8_module_filter


@pytest.fixture
def unmeasured_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own may have thresholds of its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")


@pytest.mark.usefixtures("unmeasured_gpu")
@pytest.mark.parametrize("filter_fqns", [[], ["output"], ["wk", "output"]])
@pytest.mark.parametrize("recipe_name", ["tensorwise", "rowwise"])
def test_auto_filter_decides_as_torchao_does(recipe_name: str, filter_fqns: list[str]) -> None:
    sizes = [16, 1008, 1016, 1024, 1040, 2048, 2064, 4080, 4096, 4104, 4112, 8192, 28672]
    ours = float8_module_filter(recipe_name, [*filter_fqns, "auto_filter_small_kn"])
    theirs = _auto_filter_for_recipe(recipe_name, filter_fqns)
    decisions = set()
    for k, n in itertools.product(sizes, sizes):
        with torch.device("meta"):
            linear = nn.Linear(k, n, bias=False)
        for fqn in ("layers.0.attention.wq", "layers.0.attention.wk", "output"):
            decisions.add(ours(linear, fqn))
            assert ours(linear, fqn) == theirs(linear, fqn), (k, n, fqn)
    assert decisions == {True, False}


@pytest.mark.usefixtures("unmeasured_gpu")
@pytest.mark.parametrize("recipe_name", ["rowwise_with_gw_hp", "blockwise", "mxfp8"])
def test_auto_filter_without_published_thresholds_is_refused(recipe_name: str) -> None:
    with pytest.raises(ValueError, match=f"no thresholds for recipe '{recipe_name}'"):
        float8_module_filter(recipe_name, ["auto_filter_small_kn"])


@pytest.mark.parametrize(
    ("recipe_name", "multiple"), [("rowwise", 16), ("blockwise", 128), ("mxfp8_rceil", 32)]
)
def test_sizes_are_multiples_of_what_the_recipe_scales_together(
    recipe_name: str, multiple: int
) -> None:
    keep = float8_module_filter(recipe_name)
    assert keep(nn.Linear(multiple, multiple), "")
    assert not keep(nn.Linear(multiple, multiple + multiple // 2), "")
    assert not keep(nn.Linear(multiple + multiple // 2, multiple), "")


def test_without_auto_filter_size_does_not_matter() -> None:
    keep = float8_module_filter("tensorwise", [])
    assert keep(nn.Linear(16, 16), "")
    assert not keep(nn.Linear(16, 24), "")
    assert not keep(nn.Linear(24, 16), "")
    assert not keep(nn.Embedding(16, 16), "")


def test_filter_fqns_are_parts_of_names() -> None:
    keep = float8_module_filter("tensorwise", ["attention.wq", "output"])
    linear = nn.Linear(16, 16)
    assert not keep(linear, "layers.3.attention.wq")
    assert not keep(linear, "model.output")
    assert keep(linear, "layers.3.attention.wo")
    assert keep(linear, "layers.3.feed_forward.wq")


def test_filter_fqns_given_as_a_string_is_refused() -> None:
    """It would be taken for a list of single letters."""
    with pytest.raises(ValueError, match="list of names.*'output'"):
        float8_module_filter("tensorwise", "output")


def test_filter_of_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'tensorwise'"):
        float8_module_filter("tensorwize", [])


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


@pytest.mark.parametrize(
    "config", [["rowwise"], [("layers.0", "rowwise")], [(lambda m, fqn: True,)]], ids=str
)
def test_a_list_of_anything_but_pairs_is_refused(config: Any) -> None:
    with pytest.raises(ValueError, match="each entry is .filter, config."):
        fp8dist.convert_to_float8_training(model(), config=config)


@pytest.mark.parametrize("name", ["blockwise", "mxfp8"])
def test_emulation_does_not_lift_the_recipe_s_own_block(name: str) -> None:
    config = fp8dist.Float8Config(name, emulate=True)
    with pytest.raises(ValueError, match="multiples of") as caught:
        fp8dist.convert_to_float8_training(
            nn.Linear(100, 60), config=config, module_filter_fn=lambda m, fqn: True
        )
    assert "emulate" not in str(caught.value)


def test_attributes_of_a_weight_survive() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    module[0].weight.no_decay = True
    fp8dist.convert_to_float8_training(module)
    assert module[0].weight.no_decay


def test_a_subclass_with_methods_of_its_own_is_left_alone() -> None:
    class Filled(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.constant_(self.weight, 7)

    module = nn.Sequential(Filled(WIDTH, WIDTH))
    fp8dist.convert_to_float8_training(module)
    assert not converted(module)
