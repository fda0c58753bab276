"""amaxes -> one all-reduce -> scales -> payloads, on plain tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist

from fp8dist import kernels, numerics
from fp8dist.config import TENSOR, WHOLE, Block, Recipe

Size = tuple[int, int]


@dataclass(frozen=True)
class Shard:
    """A rank's part of a weight.

    Args:
        data: (n, K) or (N, k), high precision; may be empty.
        size: (N, K) of the weight.
        start: the row and column of the weight at which the shard begins.
        recipe: the weight's recipe.
        packed: whether the scales travel in the payload (see `payload_columns`).
    """

    data: torch.Tensor
    size: Size
    start: Size
    recipe: Recipe
    packed: bool = False

    @property
    def reduced_blocks(self) -> list[Block]:
        """The blocks whose amaxes are exchanged between ranks.

        Blocks for which the backward operand is scaled are among them, as what arrives cannot
        tell the amaxes of the high-precision weight. In e8m0 there is one scale per 32 elements,
        too many to send two sets of: there the backward operand is scaled by what arrived.
        """
        if self.packed:
            return []
        recipe = self.recipe
        if recipe.scale_format == "e8m0" or recipe.weight == recipe.weight_for_grad_input:
            return [recipe.weight]
        return [recipe.weight, recipe.weight_for_grad_input]


def scales_size(size: Size, block: Block) -> Size:
    """How many blocks a tensor of `size` has along each dimension."""
    rows, columns = (
        1 if side == WHOLE else extent // side
        for extent, side in ((size[0], block[0]), (size[1], block[1]))
    )
    return rows, columns


def compute_scales(
    shards: Sequence[Shard], group: dist.ProcessGroup, device: torch.device
) -> tuple[list[list[torch.Tensor]], torch.Tensor, list[int]]:
    """The scales of all weights, with one all-reduce.

    Args:
        group: the ranks that together hold the weights.
        device: where the collective runs.

    Returns:
        scales: for each weight one float32 tensor per `reduced_blocks`, of `scales_size`: views
            of one buffer.
        amaxes: 1-D, float32: all amaxes of the full weights.
        ends: for each weight, where its amaxes end in `amaxes`.
    """
    regions = [(shard, block) for shard in shards for block in shard.reduced_blocks]
    sizes = [scales_size(shard.size, block) for shard, block in regions]
    flat = torch.zeros(sum(r * c for r, c in sizes), dtype=torch.float32, device=device)
    parts = [part.view(size) for part, size in zip(_split(flat, sizes), sizes, strict=True)]
    _fill_amaxes(shards, parts)
    if flat.numel() > 0:
        all_reduce_amaxes(flat, group)
    scales = _scales(flat, regions, sizes)
    by_weight, i = [], 0
    for shard in shards:
        count = len(shard.reduced_blocks)
        by_weight.append(scales[i : i + count])
        i += count
    per_weight = [sum(scale.numel() for scale in of_weight) for of_weight in by_weight]
    return by_weight, flat, list(accumulate(per_weight))


def _split(flat: torch.Tensor, sizes: list[Size]) -> list[torch.Tensor]:
    return list(flat.split([rows * columns for rows, columns in sizes]))


def _fill_amaxes(shards: Sequence[Shard], parts: list[torch.Tensor]) -> None:
    batched, i = [], 0
    for shard in shards:
        blocks = shard.reduced_blocks
        mine, i = parts[i : i + len(blocks)], i + len(blocks)
        if shard.data.numel() == 0 or not blocks:
            continue
        if shard.data.is_cuda and blocks == [TENSOR]:
            batched.append((shard.data, mine[0]))
        else:
            kernels.fill_amaxes(mine, shard.data, blocks, shard.start)
    if batched:  # one launch for all weights
        norms = torch._foreach_norm([data for data, _ in batched], ord=torch.inf)
        torch._foreach_copy_([part.view(()) for _, part in batched], list(norms))


def all_reduce_amaxes(amaxes: torch.Tensor, group: dist.ProcessGroup) -> None:
    """MAX over the ranks of `group`, in place; a group of one rank communicates nothing.

    On the int32 view: for floats >= 0 the order is the same, and a NaN, being larger than any
    number there, survives (gloo's float MAX loses it).
    """
    if group.size() > 1:
        dist.all_reduce(amaxes.view(torch.int32), op=dist.ReduceOp.MAX, group=group)


def _scales(
    flat: torch.Tensor, regions: list[tuple[Shard, Block]], sizes: list[Size]
) -> list[torch.Tensor]:
    """Amaxes as scales: in one go where all weights have them in one format."""
    formats = {(shard.recipe.weight_dtype, shard.recipe.scale_format) for shard, _ in regions}
    if len(formats) == 1:
        ((dtype, scale_format),) = formats
        parts = _split(numerics.amax_to_scale(flat, dtype, scale_format), sizes)
    else:
        parts = [
            numerics.amax_to_scale(part, shard.recipe.weight_dtype, shard.recipe.scale_format)
            for part, (shard, _) in zip(_split(flat, sizes), regions, strict=True)
        ]
    return [part.view(size) for part, size in zip(parts, sizes, strict=True)]


def payload_columns(shard: Shard) -> int:
    """Bytes of a payload's row: an element each and, packed, a scale for every 32 of them."""
    columns = shard.data.size(1)
    return columns + columns // shard.recipe.weight[1] if shard.packed else columns


def cast_payload(shard: Shard, scale: torch.Tensor | None, payload: torch.Tensor) -> None:
    """Cast a shard into the bytes that its rank contributes to the all-gather.

    Args:
        scale: the scales of the whole weight; None if the shard is packed.
        payload: (padded n, `payload_columns`), uint8; rows from n on are left as they are.
    """
    data, recipe = shard.data, shard.recipe
    if data.numel() == 0:
        return
    rows = payload[: data.size(0)]
    if scale is None:
        columns = data.size(1)
        scaled, _ = kernels.quantize_both(
            data, recipe.weight, None, recipe.weight_dtype, recipe.scale_format
        )
        if scaled is None:
            raise AssertionError("the operand that was asked for is missing")
        rows[:, :columns].copy_(scaled.data.view(torch.uint8))
        rows[:, columns:].copy_(numerics.scale_to_exponent(scaled.scale))
    else:
        local = _local_scale(scale, recipe.weight, shard)
        kernels.cast_into(rows.view(recipe.weight_dtype), data, local)


def _local_scale(scale: torch.Tensor, block: Block, shard: Shard) -> torch.Tensor:
    """The scales of a shard's elements as `cast_into` takes them: one, or one per row and, along
    the row, one per block of columns.
    """
    for dim in (0, 1):
        side, start, extent = block[dim], shard.start[dim], shard.data.size(dim)
        whole = extent == shard.size[dim]
        if side == WHOLE or (whole and (dim == 1 or side == 1)):
            continue
        if side == 1:
            scale = scale.narrow(dim, start, extent)
        else:
            index = torch.arange(start, start + extent, device=scale.device) // side
            scale = scale.index_select(dim, index)
    return scale
