"""Whether the compiler is at work, and what it is told of what it traces."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.eval_frame import skip_code
from torch._guards import TracingContext
from torch.fx.traceback import get_current_meta
from torch.utils.checkpoint import CheckpointPolicy


def is_tracing() -> bool:
    """Whether the compiler is tracing ops, also in a function that it takes as it is.

    There `torch.compiler.is_compiling` is False, in torch 2.11 at least.
    """
    return TracingContext.try_get() is not None


# [Note: cast again in backward]
# The compiler keeps what an op makes of an input in forward, beside what the input was computed
# from, which it mostly keeps for other gradients: SwiGLU's two factors, the input of a norm, the
# output of attention. Of eight layers of Llama 3 8B with 8192 tokens that is 1.6 GiB. So for
# grad_weight an input is cast apart, by an op that forward has no other use for, and which is
# marked, as `torch.utils.checkpoint` marks what it recomputes, lest it is kept all the same.
#
# The compiler would also keep an input that backward has to write to memory for such an op, which
# is more than what the op makes of it. What it can fuse with the input it need not write, as far as
# it knows; so the op is given `copied(input)`, which selects the input or the input.
#
# Where nothing else keeps an input or what it is computed from, as that of a linear layer right
# after another, this keeps more than its bytes in float8: the input.
#
# What is computed again is computed from what it was computed from, if that is still what it was.
# Of an argument or a buffer of the graph that its end writes to, a state or a running mean, the
# compiler reads what was written (as it does for what it computes again of its own accord, torch
# 2.11 and 2.13). What needs a gradient it does not let be written to; so an input is cast again if
# it needs one. That leaves what is computed from both, as x - mean.


def copied(x: torch.Tensor) -> torch.Tensor:
    """x, computed by something that the compiler can fuse with it and does not see through."""
    return torch.where(x == x, x, x)


@contextmanager
def not_kept() -> Iterator[None]:
    """What is traced in here is computed in backward; see [Note: cast again in backward]."""
    before = get_current_meta().get("recompute")  # a user's own mark
    get_current_meta()["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    try:
        yield
    finally:
        if before is None:
            get_current_meta().pop("recompute", None)
        else:
            get_current_meta()["recompute"] = before


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
