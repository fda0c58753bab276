"""The passes over the device's memory that casting the operands of float8 matmuls takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils.weak import WeakIdKeyDictionary

from fp8dist import kernels
from fp8dist.config import ROW, WHOLE, Block
from fp8dist.numerics import Scaled


class Operands:
    """Counts the bytes that casts and transposes of operands read and write, as kernels of one pass
    each would: one that reads for amaxes, where a scale needs more than a tile or a row has, and
    one that reads and writes what is wanted.

    Args:
        merged: an input that several layers share is cast once, as the compiler sees to it.
    """

    def __init__(self, merged: bool) -> None:
        self.merged = merged
        self.bytes = 0
        # Storage -> how what lies in it has been cast.
        self._casts = WeakIdKeyDictionary()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts while it is open."""
        quantize_both, quantize = kernels.quantize_both, kernels.quantize
        rescale_transposed = kernels.rescale_transposed

        def both(x: torch.Tensor, a: Block | None, b: Block | None, *rest: Any) -> Any:
            self._cast(x, a, b)
            return quantize_both(x, a, b, *rest)

        def one(x: torch.Tensor, block: Block, *rest: Any) -> Scaled:
            self._cast(x, block, None)
            return quantize(x, block, *rest)

        def transposed(x: Scaled, block: Block, new_scale: Any, *rest: Any) -> Scaled:
            again = 0 if new_scale is not None or block == x.block else _amax_passes([block])
            self.bytes += (2 + again) * x.data.nbytes
            return rescale_transposed(x, block, new_scale, *rest)

        with mock.patch.multiple(
            kernels, quantize_both=both, quantize=one, rescale_transposed=transposed
        ):
            yield

    def _cast(self, x: torch.Tensor, block: Block | None, transposed_block: Block | None) -> None:
        wanted = [b for b in (block, transposed_block) if b is not None]
        key, storage = (x.shape, block, transposed_block), x.untyped_storage()
        done: set[Any] = self._casts.setdefault(storage, set())
        if wanted and not (self.merged and key in done):
            done.add(key)
            passes = 1 if wanted == [ROW] else 1 + _amax_passes(wanted)
            self.bytes += passes * x.nbytes + len(wanted) * x.numel()


def _amax_passes(blocks: list[Block]) -> int:
    return 1 if any(WHOLE in block for block in blocks) else 0
