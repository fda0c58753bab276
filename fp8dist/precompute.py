"""amaxes -> one all-reduce -> scales -> payloads, on plain tensors.

All of it is done at every step, for every weight of a model: what follows from a `Shard` alone is
computed once, and what is the same for all weights in one go.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.distributed as dist
import torch.nn.functional as F

from fp8dist import kernels, numerics
from fp8dist.config import ROW, WHOLE, Block, Recipe
from fp8dist.numerics import AmaxPart, CastPart, PackPart

Size = tuple[int, int]

# [Note: experts]
# The (E, R, C) weights of experts are handled as one (E * R, C) matrix, whose rows have scales as
# those of any other. A shard has all rows of some experts, or some columns of all, or some rows of
# each, which lie apart then.


@dataclass(frozen=True)
class Shard:
    """A rank's shard of a weight, or of the part of one that tensor parallelism leaves to it.

    Args:
        data: (n, K) or (N, k), high precision; may be empty.
        size: (N, K) of what is gathered: the weight, or the part of it.
        start: the row and column of that at which the shard begins.
        largest: the size of the largest shard, rank 0's.
        recipe: the weight's recipe.
        world: how many ranks it is sharded over; the last may have nothing.
        weight_size: the size of the weight, if that is more than `size`.
        part_start: the row and column of the weight at which the part begins; like `size`, where
            that is less, a multiple of the recipe's blocks.
        experts: for the weights of experts, which lie one below the other in all of the above, the
            rows of each, and how many of those the shard has; see [Note: experts].
    """

    data: torch.Tensor
    size: Size
    start: Size
    largest: Size
    recipe: Recipe
    world: int = 1
    weight_size: Size | None = None
    part_start: Size = (0, 0)
    experts: Size | None = None

    @property
    def whole(self) -> Size:
        """The size of the weight."""
        return self.weight_size or self.size

    @property
    def some_are_empty(self) -> bool:
        """Whether the last rank's shard has no elements."""
        sizes = zip(self.largest, self.size, strict=True)
        return any(most < extent <= most * (self.world - 1) for most, extent in sizes)

    @cached_property
    def packed(self) -> bool:
        """Whether the scales travel in the payload, each row's after its elements.

        So do e8m0 scales where the payload may have a size of its own: FSDP2 wants that of the
        largest shard where a shard is short, and puts columns, or rows of each expert, together
        itself.
        """
        even_rows = self.size == (self.largest[0] * self.world, self.largest[1])
        even_rows = even_rows and (self.experts is None or self.experts[0] == self.experts[1])
        return self.recipe.scale_format == "e8m0" and even_rows

    @cached_property
    def cast_by_rows(self) -> bool:
        """Whether its payload may be cast in the pass that finds amaxes: by the scales of rows that
        are in the shard whole, and in no other, unless they are exchanged with copies of them.
        """
        columns = self.data.size(1)
        in_kernel = columns <= kernels.WIDEST_ROWS
        return self.recipe.weight == ROW and columns == self.whole[1] and in_kernel

    @cached_property
    def reduced_blocks(self) -> list[Block]:
        """The blocks whose amaxes are exchanged between ranks.

        Blocks for which the backward operand is scaled are among them, as what arrives cannot
        tell the amaxes of the high-precision weight; not those of experts, see [Note: rows that are
        contracted] in `grouped_numerics`. In e8m0 there is one scale per 32 elements,
        too many to send two sets of: there the backward operand is scaled by what arrived, and
        what is exchanged, unless it is packed, are exponents.
        """
        recipe = self.recipe
        if recipe.scale_format == "e8m0":
            return []
        if self.experts is not None or recipe.weight == recipe.weight_for_grad_input:
            return [recipe.weight]
        return [recipe.weight, recipe.weight_for_grad_input]

    @cached_property
    def amax_sizes(self) -> list[Size]:
        """How many amaxes the weight has, along each dimension, for each of `reduced_blocks`."""
        return [scales_size(self.whole, block) for block in self.reduced_blocks]

    @cached_property
    def exponent_words(self) -> tuple[int, int, int]:
        """Rows, chunks of columns and words in which the e8m0 scales are exchanged.

        A word of four scales belongs to one rank: a row's chunk, the columns of one rank, begins
        a new one.
        """
        if self.recipe.scale_format != "e8m0" or self.packed:
            return 0, 0, 0
        scales = self.largest[1] // self.recipe.weight[1]
        return self.whole[0], self.whole[1] // self.largest[1], -(-scales // 4)

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """Rows that lie together in the shard and in the weight: (the first of them in data, in the
        weight, how many).
        """
        if self.experts is None or self.experts[0] == self.experts[1]:
            return [(0, self.start[0], self.data.size(0))]
        rows, count = self.experts
        first, row = divmod(self.start[0], rows)
        return [
            (i * count, (first + i) * rows + row, count) for i in range(self.data.size(0) // count)
        ]

    def of_part(self, per_block: torch.Tensor, block: Block) -> torch.Tensor:
        """What belongs to the part, a view, of a tensor with an element per block of the weight."""
        if self.size == self.whole:
            return per_block
        for dim, side in enumerate(block):
            if side != WHOLE:
                start, extent = self.part_start[dim] // side, self.size[dim] // side
                per_block = per_block.narrow(dim, start, extent)
        return per_block


def scales_size(size: Size, block: Block) -> Size:
    """How many blocks a tensor of `size` has along each dimension."""
    rows, columns = (
        1 if side == WHOLE else extent // side
        for extent, side in ((size[0], block[0]), (size[1], block[1]))
    )
    return rows, columns


def compute_scales(
    shards: Sequence[Shard],
    groups: Sequence[dist.ProcessGroup],
    device: torch.device,
    payloads: Sequence[torch.Tensor | None] | None = None,
) -> tuple[list[list[tuple[torch.Tensor, ...]]], torch.Tensor, list[int]]:
    """The scales of all weights, with one all-reduce.

    Args:
        groups: the ranks that together hold the weights; one group, or where there is none of
            all of them, the groups along each mesh dimension, at an all-reduce each.
        device: where the collective runs.
        payloads: to cast in the pass that finds amaxes, as `cast_payloads` does: for shards that
            are `cast_by_rows`, if `groups` have no other copy of the weight; or None.

    Returns:
        scales: for each weight, per `reduced_blocks` the reciprocals and the scales, float32,
            of `scales_size` of what is gathered, views of two buffers; or (exponents,), uint8,
            (N, K / 32); nothing if it is packed.
        amaxes: 1-D, float32: all amaxes of the full weights.
        ends: for each weight, where its amaxes end in `amaxes`.
    """
    regions = [(shard, block) for shard in shards for block in shard.reduced_blocks]
    sizes = [size for shard in shards for size in shard.amax_sizes]
    amax_count = sum(rows * columns for rows, columns in sizes)
    word_sizes = [shard.exponent_words for shard in shards]
    word_counts = [math.prod(size) for size in word_sizes]
    flat = torch.zeros(amax_count + sum(word_counts), dtype=torch.float32, device=device)
    amaxes, words = flat.split([amax_count, sum(word_counts)])
    all_words = [
        part.view(size)
        for part, size in zip(words.view(torch.int32).split(word_counts), word_sizes, strict=True)
    ]
    parts = [part.view(size) for part, size in zip(_split(amaxes, sizes), sizes, strict=True)]
    _fill_amaxes(shards, parts, payloads or [None] * len(shards))
    for shard, shard_words in zip(shards, all_words, strict=True):
        if shard_words.numel() > 0:
            _fill_exponents(shard, shard_words)
    if flat.numel() > 0:
        for group in groups:
            all_reduce_amaxes(flat, group)
    scales = iter(_scales(amaxes, regions, sizes))
    by_weight: list[list[tuple[torch.Tensor, ...]]] = [
        [(_exponents(shard, shard_words),)]
        if shard_words.numel() > 0
        else [next(scales) for _ in shard.reduced_blocks]
        for shard, shard_words in zip(shards, all_words, strict=True)
    ]
    counts = [sum(rows * columns for rows, columns in shard.amax_sizes) for shard in shards]
    return by_weight, amaxes, list(accumulate(counts))


def _split(flat: torch.Tensor, sizes: list[Size]) -> list[torch.Tensor]:
    return list(flat.split([rows * columns for rows, columns in sizes]))


def _fill_amaxes(
    shards: Sequence[Shard],
    amaxes: list[torch.Tensor],
    payloads: Sequence[torch.Tensor | None],
) -> None:
    parts: list[AmaxPart] = []
    copies, i = [], 0
    for shard, payload in zip(shards, payloads, strict=True):
        blocks = shard.reduced_blocks
        of_weight, i = amaxes[i : i + len(blocks)], i + len(blocks)
        if shard.data.numel() == 0 or not blocks:
            continue
        mine = [shard.of_part(*of_block) for of_block in zip(of_weight, blocks, strict=True)]
        targets = mine
        if shard.size != shard.whole or shard.data.device != mine[0].device:
            # Elsewhere where kernels cannot write to it, and under CPU offload, where the shard is
            # on the CPU and the buffer is not.
            targets = [amax.to(shard.data.device).contiguous() for amax in mine]
            copies += [pair for pair in zip(mine, targets, strict=True) if pair[0] is not pair[1]]
        own = [
            AmaxPart(shard.data[first : first + count], (row, shard.start[1]), blocks, targets)
            for first, row, count in shard.spans
        ]
        parts += own if payload is None else _to_be_cast(own, shard, payload)
    kernels.fill_amaxes(parts)
    for amax, filled in copies:
        amax.copy_(filled)


def _to_be_cast(parts: list[AmaxPart], shard: Shard, payload: torch.Tensor) -> Iterator[AmaxPart]:
    """The parts of a shard, which lie in it one after the other, with where they go."""
    if not shard.cast_by_rows:
        raise AssertionError(f"rows of a shard of {shard.whole} are cut: {shard.data.shape}")
    rows = payload.view(shard.recipe.weight_dtype).split(
        [part.x.size(0) for part in parts] + [payload.size(0) - shard.data.size(0)]
    )
    for part, out in zip(parts, rows, strict=False):
        yield part._replace(out=out, scale_format=shard.recipe.scale_format)


# The order of exponent words as unsigned numbers is kept when they are compared as int32 with
# the sign bit flipped. Then the least number, which MAX passes over, stands for no scales.
_FLIP = -(2**31)


def _fill_exponents(shard: Shard, words: torch.Tensor) -> None:
    """Write a shard's e8m0 scales into its part of `exponent_words`, int32; the rest is least."""
    words.fill_(_FLIP)
    if shard.data.numel() == 0:
        return
    recipe = shard.recipe
    amaxes = numerics.amax(shard.data, recipe.weight)
    scale = numerics.amax_to_scale(amaxes, recipe.weight_dtype, recipe.scale_format)
    exponents = numerics.scale_to_exponent(scale)
    padded = F.pad(exponents, (0, words.size(2) * 4 - exponents.size(1)))
    own_words, chunk = padded.view(torch.int32) ^ _FLIP, shard.start[1] // shard.largest[1]
    of_part = shard.of_part(words, (1, shard.largest[1]))
    for first, row, count in shard.spans:
        of_part[row : row + count, chunk].copy_(own_words[first : first + count])


def _exponents(shard: Shard, words: torch.Tensor) -> torch.Tensor:
    """The e8m0 scales of what is gathered, (N, K / 32), from the weight's words of all ranks."""
    scales = shard.largest[1] // shard.recipe.weight[1]
    mine = shard.of_part(words, (1, shard.largest[1])) ^ _FLIP
    return mine.view(torch.uint8)[:, :, :scales].flatten(1)


def all_reduce_amaxes(amaxes: torch.Tensor, group: dist.ProcessGroup) -> None:
    """MAX over the ranks of `group`, in place; a group of one rank communicates nothing.

    On the int32 view: for floats >= 0 the order is the same, and a NaN, being larger than any
    number there, survives (gloo's float MAX loses it).
    """
    if group.size() > 1:
        dist.all_reduce(amaxes.view(torch.int32), op=dist.ReduceOp.MAX, group=group)


def _scales(
    flat: torch.Tensor, regions: list[tuple[Shard, Block]], sizes: list[Size]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Amaxes as reciprocals and scales: in one go where all weights have one format."""
    formats = {(shard.recipe.weight_dtype, shard.recipe.scale_format) for shard, _ in regions}
    if len(formats) == 1:
        ((dtype, scale_format),) = formats
        scale = numerics.amax_to_scale(flat, dtype, scale_format)
    else:
        scale = torch.empty_like(flat)
        for out, amax, (shard, _) in zip(
            _split(scale, sizes), _split(flat, sizes), regions, strict=True
        ):
            recipe = shard.recipe
            out.copy_(numerics.amax_to_scale(amax, recipe.weight_dtype, recipe.scale_format))
    pairs = zip(_split(scale.reciprocal(), sizes), _split(scale, sizes), strict=True)
    return [
        (shard.of_part(inverse.view(size), block), shard.of_part(part.view(size), block))
        for (inverse, part), size, (shard, block) in zip(pairs, sizes, regions, strict=True)
    ]


def payload_columns(shard: Shard) -> int:
    """Bytes of a payload's row: an element each and, packed, a scale for every 32 of them."""
    columns = shard.data.size(1)
    return columns + columns // shard.recipe.weight[1] if shard.packed else columns


def cast_payloads(
    shards: Sequence[Shard],
    scales: Sequence[torch.Tensor | None],
    payloads: Sequence[torch.Tensor],
) -> None:
    """Cast shards into the bytes that their rank contributes to the all-gathers.

    Args:
        scales: float32, the scales of all of what is gathered; None if a shard is packed.
        payloads: (padded n, `payload_columns`), uint8; rows from n on are left as they are.
    """
    parts, packed = [], []
    for shard, scale, payload in zip(shards, scales, payloads, strict=True):
        if shard.data.numel() == 0:
            continue
        rows, recipe = payload[: shard.data.size(0)], shard.recipe
        if scale is None:
            packed.append(PackPart(shard.data, recipe.weight, recipe.weight_dtype, rows))
        else:
            out = rows.view(recipe.weight_dtype)
            for first, row, count in shard.spans:
                here = slice(first, first + count)
                start = (row, shard.start[1])
                parts.append(CastPart(shard.data[here], start, recipe.weight, scale, out[here]))
    kernels.cast_into(parts)
    kernels.pack_into(packed)
