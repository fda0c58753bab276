"""Whether the compiler is at work."""

from torch._guards import TracingContext


def is_tracing() -> bool:
    """Whether the compiler is tracing ops, also in a function that it takes as it is.

    There `torch.compiler.is_compiling` is False, in torch 2.11 at least.
    """
    return TracingContext.try_get() is not None
