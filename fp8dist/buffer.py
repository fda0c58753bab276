"""`Buffer`: memory that is there while it is used; see [Note: made ready] in `precompute`."""

from collections.abc import Sequence

import torch


class Buffer:
    """Float32 elements, which have memory within `with`, and can be viewed there.

    Args:
        sizes: of the `parts` that it consists of, 1-D.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.whole = torch.empty(sum(sizes), dtype=torch.float32, device=device)
        self.parts = self.whole.split(list(sizes))
        self._resize(0)

    def _resize(self, nbytes: int) -> None:
        self.whole.untyped_storage().resize_(nbytes)

    def __enter__(self) -> None:
        self._resize(self.whole.nbytes)

    def __exit__(self, *_: object) -> None:
        self._resize(0)
