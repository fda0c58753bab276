"""What the compiler's cache on disk knows a tensor subclass by."""

import functools
import hashlib
from pathlib import Path

import torch


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
