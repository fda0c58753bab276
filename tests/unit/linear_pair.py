"""A layer here and in torchao, and what one forward and backward of each gives."""

import dataclasses
from typing import Any

import torch
import torch.nn as nn
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear as TorchaoLinear

from fp8dist import Float8Config, Float8Linear

K, N = 64, 48
DTYPES = [torch.float32, torch.bfloat16]
CONFIGS = {
    "float8 gather": Float8Config(),
    "high precision gather": Float8Config(enable_fsdp_float8_all_gather=False),
    "emulate": Float8Config(emulate=True),
    "rowwise": Float8Config("rowwise"),
    "rowwise_with_gw_hp": Float8Config("rowwise_with_gw_hp"),
}


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain_linear(bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(K, N, bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(seeded(N, K, seed=1) / 8)
        if bias:
            layer.bias.copy_(seeded(N, seed=2))
    return layer


def pair(
    config: Float8Config | None = None, bias: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Float8Linear, nn.Module]:
    """The same layer here and in torchao."""
    config = config or Float8Config()
    theirs = dataclasses.replace(
        Float8LinearConfig.from_recipe_name(config.recipe_name),
        emulate=True,
        # torchao's rowwise_with_gw_hp does not round, here it must: see `fp8dist.config`.
        round_scales_to_power_of_2=config.recipe.scale_format == "power_of_2",
    )
    return (
        Float8Linear.from_float(plain_linear(bias, dtype), config),
        TorchaoLinear.from_float(plain_linear(bias, dtype), theirs),
    )


def run(
    layer: nn.Module, input: torch.Tensor, grad_output: torch.Tensor
) -> dict[str, torch.Tensor | None]:
    """Output and gradients of one forward and backward."""
    layer.zero_grad()
    input = input.detach().requires_grad_(input.requires_grad)
    output = layer(input)
    output.backward(grad_output)
    return {
        "output": output.detach(),
        "grad_input": input.grad,
        "grad_weight": layer.weight.grad,
        "grad_bias": layer.bias.grad if layer.bias is not None else None,
    }


def check_bitwise(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
            continue
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name
        assert type(found[name]) is torch.Tensor, name
