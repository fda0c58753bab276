"""amaxes -> one all-reduce -> scales -> payloads, on plain tensors."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from fp8dist import numerics
from fp8dist.config import Recipe


def local_amaxes(shards: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """max(abs(shard)) of every shard.

    Args:
        shards: (n, K) each, float32, bfloat16 or float16; an empty shard counts as zeros.
        device: where the result is wanted, the device of the collective.

    Returns:
        (len(shards),), float32.
    """
    amaxes = torch.zeros(len(shards), dtype=torch.float32, device=device)
    filled = [i for i, shard in enumerate(shards) if shard.numel() > 0]
    if not filled:
        return amaxes
    if shards[0].is_cuda:
        # One launch for all shards.
        norms = list(torch._foreach_norm([shards[i] for i in filled], ord=torch.inf))
    else:
        # The CPU's norm kernel is not vectorized.
        norms = [numerics.amax(shards[i], (-1, -1)).view(()) for i in filled]
    values = torch.stack([norm.float() for norm in norms]).to(device)
    if len(filled) == len(shards):
        return values
    amaxes[torch.tensor(filled, device=device)] = values
    return amaxes


def all_reduce_amaxes(amaxes: torch.Tensor, group: dist.ProcessGroup) -> None:
    """MAX over the ranks of `group`, in place; a group of one rank communicates nothing.

    On the int32 view: for floats >= 0 the order is the same, and a NaN, being larger than any
    number there, survives (gloo's float MAX loses it).
    """
    if group.size() > 1:
        dist.all_reduce(amaxes.view(torch.int32), op=dist.ReduceOp.MAX, group=group)


def scales_from_amaxes(amaxes: torch.Tensor, recipes: Sequence[Recipe]) -> list[torch.Tensor]:
    """The scale of every weight.

    Args:
        amaxes: (len(recipes),), float32, reduced over the ranks.

    Returns:
        (1, 1) float32 each, views of one buffer.
    """
    recipe = recipes[0]
    if any(other.weight_dtype != recipe.weight_dtype for other in recipes):
        raise AssertionError("weights of one precompute are cast to one float8 dtype")
    scales = numerics.amax_to_scale(amaxes, recipe.weight_dtype, recipe.power_of_2_scales)
    return list(scales.view(-1, 1, 1).unbind(0))


def cast_payload(
    shard: torch.Tensor, scale: torch.Tensor, recipe: Recipe, payload: torch.Tensor
) -> None:
    """Cast a shard into the bytes that this rank contributes to the all-gather.

    Args:
        shard: (n, K), high precision; n may be less than the payload's rows, also 0.
        scale: float32, the scales of the shard's blocks.
        payload: (padded n, K), uint8; rows from n on are left as they are.
    """
    if shard.numel() > 0:
        data = numerics.cast(shard, scale, recipe.weight_dtype)
        payload[: shard.size(0)].copy_(data.view(torch.uint8))
