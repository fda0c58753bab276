"""Whether the compiler is at work."""

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.eval_frame import skip_code
from torch._guards import TracingContext


def is_tracing() -> bool:
    """Whether the compiler is tracing ops, also in a function that it takes as it is.

    There `torch.compiler.is_compiling` is False, in torch 2.11 at least.
    """
    return TracingContext.try_get() is not None


def within_a_graph(hook: Callable[..., Any]) -> Callable[..., Any]:
    """`hook`, which the compiler takes as a part of what calls it, and never by itself.

    Hooks of the module that is compiled are called outside of its graph. The compiler would make
    one of each, and expect the gradient of a float8 tensor to be one.
    """
    eager = torch._dynamo.disable(hook)

    def either(*args: Any) -> Any:
        return (hook if torch.compiler.is_compiling() else eager)(*args)

    skip_code(either.__code__)
    return either
