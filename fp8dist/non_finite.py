"""Which module meets or makes the first NaN or Inf of a step."""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

logger = logging.getLogger("fp8dist")


@contextmanager
def detect_non_finite(model: nn.Module) -> Iterator[None]:
    """Name the first module with a NaN or Inf in its input, output or grad_output.

        with fp8dist.detect_non_finite(model):
            loss(model(input)).backward()

    Each rank warns at the end of what it has seen itself; nothing is raised or communicated. The
    device is waited for once, there. Casts to float8 hide no NaN or Inf, so this looks at high
    precision. For finding a fault: every activation is read once more.

    Args:
        model: converted or not, sharded or not.

    Raises:
        ValueError: a module is compiled, whose activations cannot be seen.
    """
    for fqn, module in model.named_modules():
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            raise ValueError(
                f"{fqn or type(module).__name__} is compiled, and what it computes cannot be seen: "
                "take this step without torch.compile"
            )
    seen: list[tuple[str, torch.Tensor]] = []  # in order, (what, whether it is finite)

    def look(what: str, values: Any) -> None:
        for value in pytree.tree_leaves(values):
            local = value.to_local() if isinstance(value, DTensor) else value
            if isinstance(local, torch.Tensor) and local.is_floating_point():
                seen.append((what, local.detach().isfinite().all()))

    def after(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        look(f"the output of {name}", output)
        for value in pytree.tree_leaves(output):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                value.register_hook(functools.partial(look, f"the grad_output of {name}"))

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        look(f"the input of {name}", (args, kwargs))

    handles = []
    for fqn, module in model.named_modules():
        bound = [functools.partial(hook, fqn or type(module).__name__) for hook in (before, after)]
        handles.append(module.register_forward_pre_hook(bound[0], with_kwargs=True))
        handles.append(module.register_forward_hook(bound[1], with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        first = next((what for what, finite in seen if not finite), None)
        if first is not None:
            logger.warning("%s has a NaN or Inf, and nothing before it", first)
