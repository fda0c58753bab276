"""The passes over the device's memory that casting the operands of float8 matmuls takes."""

from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from fp8dist.config import ROW, WHOLE, Block
from fp8dist.numerics import Scaled


class Operands:
    """Counts the bytes that casts and transposes of operands read and write, as kernels of one pass
    each would: one that reads for amaxes, where a scale needs more than a tile or a row has, and
    one that reads and writes what is wanted. For `kernels.watched`.

    Args:
        merged: an input that several layers share is cast once, as the compiler sees to it.
    """

    def __init__(self, merged: bool) -> None:
        self.merged = merged
        self.bytes = 0
        # Storage -> how what lies in it has been cast.
        self._casts = WeakIdKeyDictionary()

    def casts(self, x: torch.Tensor, block: Block | None, transposed_block: Block | None) -> None:
        """Count a cast of x, by `block` and, transposed, by `transposed_block`."""
        wanted = [b for b in (block, transposed_block) if b is not None]
        key, storage = (x.shape, block, transposed_block), x.untyped_storage()
        done: set[Any] = self._casts.setdefault(storage, set())
        if wanted and not (self.merged and key in done):
            done.add(key)
            passes = 1 if wanted == [ROW] else 1 + _amax_passes(wanted)
            self.bytes += passes * x.nbytes + len(wanted) * x.numel()

    def transposes(self, weight: Scaled, block: Block, new_scale: torch.Tensor | None) -> None:
        """Count the transpose of a weight, scaled anew unless the blocks are the same."""
        known = new_scale is not None or block == weight.block
        self.bytes += (2 if known else 2 + _amax_passes([block])) * weight.data.nbytes


def _amax_passes(blocks: list[Block]) -> int:
    return 1 if any(WHOLE in block for block in blocks) else 0
