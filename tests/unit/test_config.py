"""Recipes, `Float8Config`, and what becomes of torchao's config."""

import dataclasses
import logging

import pytest
import torch
from torchao.float8 import CastConfig, Float8LinearConfig
from torchao.float8.config import Float8GemmConfig, ScalingGranularity, ScalingType

from fp8dist.config import (
    RECIPES,
    ROW,
    TENSOR,
    Block,
    FastAccum,
    Float8Config,
    from_torchao,
    nearest,
    recipe,
)

BLOCK_OF = {ScalingGranularity.TENSORWISE: TENSOR, ScalingGranularity.AXISWISE: ROW}


@pytest.mark.parametrize("name", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_recipes_are_torchaos_of_the_same_name(name: str) -> None:
    ours, theirs = RECIPES[name], Float8LinearConfig.from_recipe_name(name)

    def block(cast: CastConfig, contracts_rows: bool) -> Block | None:
        if cast.scaling_type is ScalingType.DISABLED:
            return None
        rows, columns = BLOCK_OF[cast.scaling_granularity]
        return (columns, rows) if contracts_rows else (rows, columns)

    assert ours.input == block(theirs.cast_config_input, False)
    assert ours.weight == block(theirs.cast_config_weight, False)
    assert ours.grad_output == block(theirs.cast_config_grad_output, False)
    assert ours.weight_for_grad_input == block(theirs.cast_config_weight_for_grad_input, True)
    assert ours.input_for_grad_weight == block(theirs.cast_config_input_for_grad_weight, True)
    assert ours.grad_output_for_grad_weight == block(
        theirs.cast_config_grad_output_for_grad_weight, True
    )
    assert ours.input_dtype == theirs.cast_config_input.target_dtype
    assert ours.weight_dtype == theirs.cast_config_weight.target_dtype
    assert ours.grad_output_dtype == theirs.cast_config_grad_output.target_dtype


def test_scales_of_rowwise_weights_are_powers_of_two() -> None:
    """So that one gathered copy serves both matmuls. torchao's rowwise_with_gw_hp leaves them."""
    formats = {name: one.scale_format for name, one in RECIPES.items()}
    assert formats == {
        "tensorwise": "exact",
        "rowwise": "power_of_2",
        "rowwise_with_gw_hp": "power_of_2",
        "blockwise": "power_of_2",
        "mxfp8_rceil": "e8m0",
        "mxfp8_rceil_wgrad_with_hp": "e8m0",
    }


def test_recipes_are_listed_under_their_names() -> None:
    assert [one.name for one in RECIPES.values()] == list(RECIPES)
    assert recipe("tensorwise") is RECIPES["tensorwise"]


@pytest.mark.parametrize("mistyped", ["tensorwize", "Tensorwise", "tensor"])
def test_unknown_recipe_names_the_nearest(mistyped: str) -> None:
    with pytest.raises(ValueError, match=f"{mistyped}.*did you mean 'tensorwise'"):
        recipe(mistyped)
    with pytest.raises(ValueError, match="did you mean 'tensorwise'"):
        Float8Config(recipe_name=mistyped)


def test_mxfp8_is_short_for_one_recipe_and_old_names_are_explained() -> None:
    assert Float8Config("mxfp8").recipe is RECIPES["mxfp8_rceil"]
    with pytest.raises(ValueError, match="'mxfp8_cublas' is called 'mxfp8_rceil' now"):
        Float8Config("mxfp8_cublas")


def test_nearest_lists_what_is_known_and_guesses_only_what_is_close() -> None:
    assert nearest("rowise", ["tensorwise", "rowwise"]) == (
        "did you mean 'rowwise'? Known: tensorwise, rowwise"
    )
    assert nearest("xyz", ["tensorwise", "rowwise"]) == "Known: tensorwise, rowwise"


def test_config_gathers_in_float8_unless_told_otherwise() -> None:
    config = Float8Config()
    assert config.recipe is RECIPES["tensorwise"]
    assert config.enable_fsdp_float8_all_gather
    assert config.cache_payload
    assert not config.emulate


def test_config_cannot_be_edited() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Float8Config().emulate = True


@pytest.mark.parametrize(
    ("fast_accum", "expected"),
    [
        (None, FastAccum(output=True, grad_input=False, grad_weight=False)),
        (True, FastAccum(output=True, grad_input=True, grad_weight=True)),
        (False, FastAccum(output=False, grad_input=False, grad_weight=False)),
        (FastAccum(False, True, False), FastAccum(False, True, False)),
    ],
)
def test_fast_accum(fast_accum: bool | FastAccum | None, expected: FastAccum) -> None:
    assert Float8Config(fast_accum=fast_accum).fast_accum_by_matmul == expected


@pytest.mark.parametrize(
    ("recipe", "fast_accum", "expected"),
    [
        ("rowwise", None, FastAccum(True, True, True)),  # as torchao's grouped matmuls have it
        ("rowwise", False, FastAccum(False, False, False)),
        ("rowwise", FastAccum(False, True, False), FastAccum(False, True, False)),
        ("mxfp8", None, FastAccum(False, False, False)),
    ],
)
def test_fast_accum_of_experts(
    recipe: str, fast_accum: bool | FastAccum | None, expected: FastAccum
) -> None:
    assert Float8Config(recipe, fast_accum=fast_accum).fast_accum_of_experts == expected


def test_fast_accum_unset_is_torchaos_choice() -> None:
    theirs = Float8LinearConfig()
    assert Float8Config().fast_accum_by_matmul == FastAccum(
        theirs.gemm_config_output.use_fast_accum,
        theirs.gemm_config_grad_input.use_fast_accum,
        theirs.gemm_config_grad_weight.use_fast_accum,
    )


# Every field of torchao's config, and what it must become. A field that torchao adds later fails
# `test_every_torchao_field_is_accounted_for` until someone has decided about it.

AXISWISE = CastConfig(
    scaling_granularity=ScalingGranularity.AXISWISE, target_dtype=torch.float8_e4m3fn
)
E4M3 = CastConfig(target_dtype=torch.float8_e4m3fn)
FAST, SLOW = Float8GemmConfig(use_fast_accum=True), Float8GemmConfig(use_fast_accum=False)
DEFAULT = Float8Config(fast_accum=FastAccum(), enable_fsdp_float8_all_gather=False)

MAPPED = {
    "enable_fsdp_float8_all_gather": (
        True,
        dataclasses.replace(DEFAULT, enable_fsdp_float8_all_gather=True),
    ),
    "emulate": (True, dataclasses.replace(DEFAULT, emulate=True)),
    "gemm_config_output": (
        SLOW,
        dataclasses.replace(DEFAULT, fast_accum=FastAccum(False, False, False)),
    ),
    "gemm_config_grad_input": (
        FAST,
        dataclasses.replace(DEFAULT, fast_accum=FastAccum(True, True, False)),
    ),
    "gemm_config_grad_weight": (
        FAST,
        dataclasses.replace(DEFAULT, fast_accum=FastAccum(True, False, True)),
    ),
    # Without effect in torchao too.
    "force_recompute_fp8_weight_in_bwd": (True, DEFAULT),
}
REFUSED = {
    "pad_inner_dim": True,
    "round_scales_to_power_of_2": True,
    "cast_config_input": AXISWISE,
    "cast_config_input_for_grad_weight": AXISWISE,
    "cast_config_weight": AXISWISE,
    "cast_config_weight_for_grad_input": AXISWISE,
    "cast_config_grad_output": E4M3,
    "cast_config_grad_output_for_grad_weight": CastConfig(
        scaling_granularity=ScalingGranularity.AXISWISE, target_dtype=torch.float8_e5m2
    ),
}


def test_every_torchao_field_is_accounted_for() -> None:
    assert {field.name for field in dataclasses.fields(Float8LinearConfig)} == (
        MAPPED.keys() | REFUSED.keys()
    )


def test_torchao_default_is_tensorwise_without_float8_all_gather() -> None:
    assert from_torchao(Float8LinearConfig()) == DEFAULT


@pytest.mark.parametrize("field", MAPPED)
def test_torchao_field_is_mapped(field: str) -> None:
    value, expected = MAPPED[field]
    assert from_torchao(Float8LinearConfig(**{field: value})) == expected


@pytest.mark.parametrize("field", REFUSED)
def test_torchao_field_is_refused_by_name(field: str) -> None:
    config = Float8LinearConfig(**{field: REFUSED[field]})
    with pytest.raises(ValueError, match=rf"\b{field}="):
        from_torchao(config)


def test_torchao_grad_weight_in_high_precision_is_refused_for_tensorwise() -> None:
    off = CastConfig(scaling_type=ScalingType.DISABLED, target_dtype=torch.float8_e4m3fn)
    off_e5m2 = CastConfig(scaling_type=ScalingType.DISABLED, target_dtype=torch.float8_e5m2)
    config = Float8LinearConfig(
        cast_config_input_for_grad_weight=off, cast_config_grad_output_for_grad_weight=off_e5m2
    )
    with pytest.raises(ValueError, match="cast_config_input_for_grad_weight="):
        from_torchao(config)


@pytest.mark.parametrize("name", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_torchao_recipes_are_taken_over(name: str) -> None:
    config = Float8LinearConfig.from_recipe_name(name)
    assert from_torchao(config).recipe_name == name


def test_float8_gathers_of_rowwise_weights_are_on_and_said_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """torchao's config cannot ask for them."""
    with caplog.at_level(logging.INFO, logger="fp8dist"):
        assert from_torchao(
            Float8LinearConfig.from_recipe_name("rowwise")
        ).enable_fsdp_float8_all_gather
    assert "float8 all-gather of rowwise weights" in caplog.text


def test_exact_scales_are_the_same_forward_and_backward() -> None:
    """Other blocks in backward are a shift of the exponent, which exact scales do not have."""
    with pytest.raises(AssertionError, match="rowwise: .*powers of two"):
        dataclasses.replace(RECIPES["rowwise"], scale_format="exact")
