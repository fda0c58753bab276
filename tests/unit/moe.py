"""Experts as models write them, and what one plain float8 layer per expert makes of them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from fp8dist import Float8Config, numerics
from fp8dist.config import RECIPES
from fp8dist.experts import Float8Experts
from fp8dist.linear import Float8Linear

EXPERTS, DIM, HIDDEN = 4, 64, 96


class StackedExperts(nn.Module):
    """Weights (E, N, K), cast and transposed where they are used, as torchtitan's experts do."""

    def __init__(self, experts: int = EXPERTS, dim: int = DIM, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.w1, self.w3 = (
            nn.Parameter(torch.randn(experts, hidden, dim) / dim**0.5) for _ in range(2)
        )
        self.w2 = nn.Parameter(torch.randn(experts, dim, hidden) / hidden**0.5)

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        offs = counts.cumsum(0, dtype=torch.int32)
        w1, w2, w3 = (w.bfloat16().transpose(-2, -1) for w in (self.w1, self.w2, self.w3))
        h = x.bfloat16()
        gate, up = (torch._grouped_mm(h, w, offs=offs) for w in (w1, w3))
        return torch._grouped_mm(F.silu(gate) * up, w2, offs=offs).type_as(x)


class FusedExperts(nn.Module):
    """Weights (E, K, N) used as they are, gate and up in one, and biases, as some of transformers'
    experts have them.
    """

    def __init__(self, experts: int = EXPERTS, dim: int = DIM, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, dim, 2 * hidden) / dim**0.5)
        self.gate_up_proj_bias = nn.Parameter(torch.randn(experts, 2 * hidden))
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, dim) / hidden**0.5)

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        offs = counts.cumsum(0, dtype=torch.int32)
        bias = self.gate_up_proj_bias.repeat_interleave(counts, 0)
        weight = self.gate_up_proj
        h = F.grouped_mm(x.to(weight.dtype), weight, offs=offs) + bias.to(weight.dtype)
        gate, up = h.chunk(2, dim=-1)
        return F.grouped_mm(F.silu(gate) * up, self.down_proj, offs=offs).to(x.dtype)


def arrived(weight: torch.Tensor, recipe_name: str) -> Float8Experts:
    """What FSDP2's hook makes, of a weight (E, R, C)."""
    recipe = RECIPES[recipe_name]
    matrix = weight.flatten(0, 1)
    scaled = numerics.quantize(matrix, recipe.weight, recipe.weight_dtype, recipe.scale_format)
    config = Float8Config(recipe_name)
    if recipe.scale_format == "e8m0":
        scales = numerics.scale_to_exponent(scaled.scale)[None]
    else:
        scales = torch.stack([scaled.scale.reciprocal(), scaled.scale])
    return Float8Experts(scaled.data, scales, weight.shape, weight.dtype, config)


def zeros_of_groups(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    offs: torch.Tensor,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    """In the place of `torch._scaled_grouped_mm`."""
    size = (a.size(0), b.size(2)) if b.dim() == 3 else (offs.numel(), a.size(0), b.size(1))
    return torch.zeros(size, dtype=torch.bfloat16)


class Model(nn.Module):
    """Experts within a model, beside a linear layer whose name also says experts."""

    def __init__(self, kind: Callable[[], nn.Module] = StackedExperts) -> None:
        super().__init__()
        self.shared_experts = nn.Linear(DIM, DIM, bias=False)
        self.experts = kind()

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return self.shared_experts(x) + self.experts(x, counts)


def new_model(kind: Callable[[], nn.Module] = StackedExperts, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model(kind)


def tokens(counts: list[int], dim: int = DIM, seed: int = 0) -> torch.Tensor:
    """Rows and columns of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), dim, generator=generator)
    return x * torch.rand(sum(counts), 1, generator=generator) * torch.logspace(-1, 1, dim)


def one_linear_per_expert(
    x: torch.Tensor, weight: torch.Tensor, counts: list[int], recipe: str, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, grad_input and grad_weight, each expert being a `Float8Linear` of its own.

    Args:
        x: (M, K).
        weight: (E, N, K).
        counts: how many of the rows of x each expert has.
        grad: (M, N), the gradient of the output.
    """
    outputs, grad_inputs, grad_weights = [], [], []
    parts = zip(weight, x.split(counts), grad.split(counts), strict=True)
    for of_expert, own, own_grad in parts:
        linear = nn.Linear(weight.size(2), weight.size(1), bias=False, dtype=weight.dtype)
        linear.weight = nn.Parameter(of_expert.detach().clone())
        layer = Float8Linear.from_float(linear, Float8Config(recipe))
        if own.size(0) == 0:
            outputs.append(own_grad)
            grad_inputs.append(own)
            grad_weights.append(torch.zeros_like(of_expert))
            continue
        leaf = own.detach().clone().requires_grad_()
        output = layer(leaf)
        output.backward(own_grad)
        outputs.append(output.detach())
        grad_inputs.append(leaf.grad)
        grad_weights.append(layer.weight.grad)
    return torch.cat(outputs), torch.cat(grad_inputs), torch.stack(grad_weights)
