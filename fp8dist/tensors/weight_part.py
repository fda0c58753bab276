"""A rank's part of a weight that tensor parallelism cuts, cast where it is used."""

import math
from typing import Any

import torch

from fp8dist import numerics
from fp8dist.config import RECIPES, WHOLE, Block, Recipe
from fp8dist.tensors.float8_tensor import Float8Tensor
from fp8dist.tensors.gathering import largest
from fp8dist.tensors.sharded_weight import Float8ShardedWeight


def cast_part(weight: torch.Tensor, dim: int, recipe: Recipe, group_name: str) -> Float8Tensor:
    """The part in float8, by the scales of the whole weight: traceable, and one all-reduce at most.

    For weights that are not cast once per step: gathered in high precision, or without FSDP2 in
    compiled code, which cannot look at what a layer keeps.

    Args:
        weight: (n, K) or (N, k), high precision; n and k are multiples of the recipe's blocks.
        dim: the dimension that is cut.
        group_name: the ranks that hold the other parts.
    """
    if recipe.scale_format == "e8m0":  # blocks of single rows
        part = numerics.quantize(weight, recipe.weight, recipe.weight_dtype, recipe.scale_format)
        exponents = numerics.scale_to_exponent(part.scale)[None]
        return Float8Tensor(part.data, exponents, weight.shape, weight.dtype)
    blocks = [recipe.weight]
    if recipe.weight_for_grad_input != recipe.weight:
        blocks.append(recipe.weight_for_grad_input)
    amaxes = _amaxes_of_whole(weight, dim, blocks, group_name)
    scales = [
        numerics.amax_to_scale(amax, recipe.weight_dtype, recipe.scale_format) for amax in amaxes
    ]
    pairs = [torch.stack([scale.reciprocal(), scale]) for scale in scales]
    data = numerics.cast(weight, scales[0], recipe.weight_dtype)
    return Float8Tensor(data, pairs[0], weight.shape, weight.dtype, *pairs[1:])


def _amaxes_of_whole(
    weight: torch.Tensor, dim: int, blocks: list[Block], group_name: str
) -> list[torch.Tensor]:
    """Float32 amaxes of the blocks that the part touches, of all their elements."""
    amaxes = [numerics.amax(weight, block).float() for block in blocks]
    cut = [i for i, block in enumerate(blocks) if block[dim] == WHOLE]
    if cut:
        # On the int32 view, see `precompute.all_reduce_amaxes`. None is negative, but torch 2.11's
        # compiler fails to communicate a view of that kind with nothing done to it.
        flat = torch.cat([amaxes[i].flatten() for i in cut]).view(torch.int32).clamp(min=0)
        flat = largest(flat, group_name).view(torch.float32)
        counts = [math.prod(amaxes[i].shape) for i in cut]
        for i, part in zip(cut, flat.split(counts), strict=True):
            amaxes[i] = part.view(amaxes[i].shape)
    return amaxes


def high_precision(weight: torch.Tensor) -> torch.Tensor:
    """The weight in high precision: a `Float8ShardedWeight` is met where nothing gathers it."""
    return weight._tensor if isinstance(weight, Float8ShardedWeight) else weight


# torch's stubs give `forward` and `backward` any arguments, which mypy takes for an override.


class StandIn(torch.autograd.Function):
    """A weight's part in float8, whose gradient is that of the part in high precision."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, cast: Float8Tensor) -> Float8Tensor:
        return cast

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


@torch._dynamo.allow_in_graph
class CastPart(torch.autograd.Function):
    """`cast_part`; the gradient passes."""

    @staticmethod
    def forward(
        ctx: Any, part: torch.Tensor, dim: int, recipe_name: str, group_name: str
    ) -> Float8Tensor:
        return cast_part(high_precision(part), dim, RECIPES[recipe_name], group_name)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return grad, None, None, None
