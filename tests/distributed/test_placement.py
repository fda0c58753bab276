"""The unsharded float8 weight is that of quantizing the full weight on one device, bit for bit."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from fp8dist import Float8Config, Float8Linear
from fp8dist.config import RECIPES, WHOLE, Block, Recipe
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.toy import RECIPE_NAMES, full, mesh_of, same_bits

Quantized = tuple[torch.Tensor, torch.Tensor]  # bytes, float32 scales

FLOAT8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def scale_of(largest: float, recipe: Recipe) -> float:
    """float8_max / amax, exactly or as the greatest power of two that is not above it."""
    if recipe.scale_format == "e8m0":
        # Its 8-bit exponents end at 2^127.
        least = FLOAT8_MAX[recipe.weight_dtype] / 2.0**127
    else:
        least = 1e-12
    scale = FLOAT8_MAX[recipe.weight_dtype] / max(largest, least)
    if recipe.scale_format == "exact":
        return scale
    return 2.0 ** (math.frexp(scale)[1] - 1)


def quantized(weight: torch.Tensor, block: Block, recipe: Recipe) -> Quantized:
    """Written down block by block, in float64 where it is arithmetic on scales."""
    rows, columns = (
        size if side == WHOLE else side for size, side in zip(weight.shape, block, strict=True)
    )
    data = torch.empty(weight.shape, dtype=recipe.weight_dtype)
    scales = torch.empty(weight.size(0) // rows, weight.size(1) // columns)
    for i in range(scales.size(0)):
        for j in range(scales.size(1)):
            of_block = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = scale_of(weight[of_block].double().abs().max().item(), recipe)
            # The product is rounded to float32 first: that is part of the definition.
            scaled = weight[of_block].float() * scales[i, j]
            data[of_block] = scaled.to(recipe.weight_dtype)
    return data.view(torch.uint8), scales


def weight_of(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Rows and columns of different sizes, one row of zeros, in the shard of the first rank."""
    generator = torch.Generator().manual_seed(shape[0] + shape[1])
    weight = torch.randn(shape, generator=generator)
    weight *= torch.logspace(-3, 2, shape[0])[:, None] * torch.logspace(1, -1, shape[1])
    weight[0] = 0
    return weight.to(dtype)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype | None = None
    shard_dim: int = 0


def unsharded(mesh: tuple[int, ...], recipe: str, cases: list[Case]) -> list[Any]:
    """(data, scales, scales of the backward operand or None) of a weight for every case."""
    found = []
    for case in cases:
        linear = nn.Linear(case.shape[1], case.shape[0], device=DEVICE, dtype=case.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight_of(case.shape, case.dtype))
        found.append(unshard(linear, mesh, recipe, case))
    return found


def shard(linear: nn.Linear, mesh: tuple[int, ...], recipe: str, case: Case) -> nn.Linear:
    # Not through conversion, which asks for sizes that the matmuls take: a gather takes any.
    Float8Linear.from_float(linear, Float8Config(recipe, emulate=True))
    return fully_shard(
        linear,
        mesh=mesh_of(*mesh),
        mp_policy=MixedPrecisionPolicy(param_dtype=case.param_dtype),
        shard_placement_fn=lambda param: Shard(case.shard_dim if param.dim() == 2 else 0),
    )


def unshard(linear: nn.Linear, mesh: tuple[int, ...], recipe: str, case: Case) -> Any:
    shard(linear, mesh, recipe, case).unshard()
    return read(linear)


def read(linear: nn.Linear) -> Any:
    data, scales, *_ = linear.weight.unpack(linear.config.recipe.weight)
    backward = linear.weight._scales_for_grad_input
    return (
        data.contiguous().view(torch.uint8).cpu().clone(),
        scales.cpu().clone(),
        None if backward is None else backward[1].cpu().clone(),
    )


def check(result: Any, weight: torch.Tensor, recipe: Recipe) -> None:
    data, scales, backward = result
    expected_data, expected_scales = quantized(weight, recipe.weight, recipe)
    assert same_bits(scales, expected_scales)
    assert same_bits(data, expected_data)
    if backward is not None:
        _, expected_backward = quantized(weight, recipe.weight_for_grad_input, recipe)
        assert same_bits(backward, expected_backward)


MESHES = [(1,), (2,), (3,), (4,), (2, 2)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_any_placement(recipe: str, mesh: tuple[int, ...]) -> None:
    cases = [
        Case((128, 256)),  # of 3 ranks, two have 43 rows and the last 42
        Case((256, 128), torch.bfloat16),
        Case((128, 128), param_dtype=torch.bfloat16),
        Case((128, 128), torch.bfloat16, torch.float32),
        Case((128, 384), shard_dim=1),  # FSDP2 cuts dim 1 evenly only
    ]
    # Of 4 ranks three have 2, 2 and 1 rows, and the last none; of 3 the last has 1.
    if RECIPES[recipe].weight[0] in (1, WHOLE):
        cases += [Case((5, 64)), Case((5, 64), torch.bfloat16)]
    for results in run_on_ranks(math.prod(mesh), unsharded, mesh, recipe, cases):
        for case, result in zip(cases, results, strict=True):
            check(result, weight_of(case.shape, case.dtype), RECIPES[recipe])


def from_meta(recipe: str) -> tuple[Any, torch.Tensor]:
    """What is gathered, and the full weight, of a layer that was initialised when sharded."""
    with torch.device("meta"):
        linear = nn.Linear(128, 256)
    shard(linear, (3,), recipe, Case((256, 128)))
    linear.to_empty(device=DEVICE)
    torch.manual_seed(7)
    linear.reset_parameters()
    weight = full(linear.weight)
    linear.unshard()
    return read(linear), weight


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_meta_device_construction(recipe: str) -> None:
    for result, weight in run_on_ranks(3, from_meta, recipe):
        assert weight.std() > 0
        check(result, weight, RECIPES[recipe])


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_definition_is_that_of_torchao(recipe: str, dtype: torch.dtype) -> None:
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
    from torchao.float8.float8_training_tensor import GemmInputRole, LinearMMConfig

    config = Float8LinearConfig.from_recipe_name(recipe)
    weight = weight_of((64, 128), dtype)
    theirs = hp_tensor_to_float8_dynamic(
        weight,
        config.cast_config_weight.target_dtype,
        LinearMMConfig(),
        gemm_input_role=GemmInputRole.WEIGHT,
        scaling_granularity=config.cast_config_weight.scaling_granularity,
        axiswise_dim=-1,
        round_scales_to_power_of_2=config.round_scales_to_power_of_2,
    )
    data, scales = quantized(weight, RECIPES[recipe].weight, RECIPES[recipe])
    assert same_bits(theirs._data.view(torch.uint8), data)
    assert same_bits(theirs._scale.view(scales.shape), scales)


def test_the_definition_is_that_of_torchao_in_e8m0() -> None:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    weight = weight_of((64, 128), torch.float32)
    their_scales, their_data = to_mx(
        weight, torch.float8_e4m3fn, 32, scaling_mode=ScaleCalculationMode.RCEIL
    )
    recipe = RECIPES["mxfp8_rceil"]
    data, scales = quantized(weight, recipe.weight, recipe)
    assert same_bits(their_data.view(torch.uint8), data)
    assert same_bits(1 / their_scales.float(), scales)
