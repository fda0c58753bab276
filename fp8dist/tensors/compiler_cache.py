"""What the compiler's cache on disk knows a tensor subclass by."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor


@functools.cache
def hash_of_source() -> str:
    """Of all of this package."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def hash_for_caching(tensor: torch.Tensor) -> str:
    """A `_stable_hash_for_caching`, for subclasses whose torch functions are overridden.

    The compiler's graph has the torch function, and not what it calls in this package: code that
    was compiled from another version of that must not be found.
    """
    names, meta = tensor.__tensor_flatten__()  # type: ignore[attr-defined]  # it is a subclass
    tensors = [tensor, *(getattr(tensor, name) for name in names)]
    facts = [(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors]
    text = repr((hash_of_source(), type(tensor).__name__, names, meta, facts))
    return hashlib.sha256(text.encode()).hexdigest()


# [Note: DTensors in the compiler's cache]
# A DTensor is known to that cache by its spec alone (torch 2.13), whatever its local tensor is:
# code that was compiled for one that holds a plain tensor would be found for one that holds a
# wrapper, take that for memory and write to address 0. So those that hold one of this package are
# known by it, too.


def tell_dtensors_apart(holds: Callable[[object], bool]) -> None:
    """See [Note: DTensors in the compiler's cache].

    Args:
        holds: whether a local tensor is one of this package's.
    """
    by_spec = getattr(DTensor, "_stable_hash_for_caching", None)
    if by_spec is None:  # torch 2.11
        return

    @functools.wraps(by_spec)
    def by_spec_and_local(self: DTensor) -> str:
        known_by: str = by_spec(self)
        local = self._local_tensor
        return known_by + hash_for_caching(local) if holds(local) else known_by

    setattr(DTensor, "_stable_hash_for_caching", by_spec_and_local)  # noqa: B010 - mypy: a method
