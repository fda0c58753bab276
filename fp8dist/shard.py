"""`Shard`: a rank's part of a weight, where it lies in it, and what follows from that."""

from dataclasses import dataclass
from functools import cached_property

import torch

from fp8dist import kernels
from fp8dist.config import ROW, WHOLE, Block, Recipe

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

    @property
    def exchanges_words(self) -> bool:
        """Whether there are `exponent_words`."""
        return self.exponent_words[0] > 0

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


def payload_columns(shard: Shard) -> int:
    """Bytes of a payload's row: an element each and, packed, a scale for every 32 of them."""
    columns = shard.data.size(1)
    return columns + columns // shard.recipe.weight[1] if shard.packed else columns


def empty_scales(shard: Shard, device: torch.device) -> list[torch.Tensor]:
    """What the scales of a weight are written to.

    Returns:
        Per `reduced_blocks` (2, *`scales_size` of what is gathered), float32, for the reciprocals
        and the scales; or one (1, N, K / 32), uint8, for exponents; nothing if it is packed. Each
        in a storage of its own.
    """
    if shard.exchanges_words:
        size = (1, *scales_size(shard.size, shard.recipe.weight))
        return [torch.empty(size, dtype=torch.uint8, device=device)]
    sizes = [(2, *scales_size(shard.size, block)) for block in shard.reduced_blocks]
    return [torch.empty(size, dtype=torch.float32, device=device) for size in sizes]
