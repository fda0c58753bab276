"""Which module meets or makes the first NaN or Inf of a step."""

import functools
import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

logger = logging.getLogger("fp8dist")


@contextmanager
def detect_non_finite(model: nn.Module) -> Iterator[None]:
    """Name the first module with a NaN or Inf in its input, output or grad_output.

        with fp8dist.detect_non_finite(model):
            loss(model(input)).backward()

    Each rank warns at the end of what it has seen itself; nothing is raised or communicated. The
    device is waited for once, there. Casts to float8 hide no NaN or Inf, so this looks at high
    precision. For finding a fault: every activation is read once more.

    Looked at are dense tensors of real numbers, also inside lists, tuples, dicts and other pytrees.
    -Inf in an input, without a NaN or +Inf, is taken for an attention mask: it is named where a
    module puts it out.

    Args:
        model: converted or not, sharded or not.

    Raises:
        ValueError: a module is compiled, by torch.compile or torch.jit.script, and its activations
            cannot be seen.
    """
    for fqn, module in model.named_modules():
        if (
            isinstance(module, torch.jit.ScriptModule)
            or module._compiled_call_impl is not None
            or hasattr(module, "_orig_mod")
        ):
            raise ValueError(
                f"{fqn or type(module).__name__} is compiled, and what it computes cannot be seen: "
                "take this step without torch.compile or torch.jit.script"
            )
    seen: list[tuple[str, torch.Tensor]] = []  # in order, (what, whether it is finite)

    # What selective checkpointing recomputes must not depend on whether this looks.
    @torch.no_grad()
    def look(what: str, values: Any, masks: bool = False) -> None:
        with _disable_current_modes():
            for value in pytree.tree_leaves(values):
                if isinstance(value, torch.Tensor) and (ends := _ends(value)) is not None:
                    low, high = ends
                    largest = high if masks else torch.maximum(high, -low)
                    seen.append((what, largest < math.inf))  # False of NaN, too

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        look(f"the input of {name}", (args, kwargs), masks=True)

    def after(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        look(f"the output of {name}", output)
        for value in pytree.tree_leaves(output):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                hook = functools.partial(look, f"the grad_output of {name}")
                # It may be a parameter, which outlives the step.
                hooks.callback(value.register_hook(hook).remove)

    with ExitStack() as hooks:
        for fqn, module in model.named_modules():
            name = fqn or type(module).__name__
            for register, hook in (
                (module.register_forward_pre_hook, functools.partial(before, name)),
                (module.register_forward_hook, functools.partial(after, name)),
            ):
                hooks.callback(register(hook, with_kwargs=True).remove)
        try:
            yield
        finally:
            if (first := _first_bad(seen)) is not None:
                logger.warning("%s has a NaN or Inf, and nothing before it", first)
    if not seen:
        logger.warning(
            "%s was not seen to compute anything: call it inside detect_non_finite, and from no "
            "function that is compiled",
            type(model).__name__,
        )


def _ends(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The smallest and the largest element, both NaN if there is one; None if not looked at."""
    local = (value.to_local() if isinstance(value, DTensor) else value).detach()
    if not local.is_floating_point() or local.layout != torch.strided or local.numel() == 0:
        return None
    low, high = (local.float() if local.element_size() == 1 else local).aminmax()
    return low, high


def _first_bad(seen: list[tuple[str, torch.Tensor]]) -> str | None:
    """The first that is not finite."""
    if not seen:
        return None
    flags = [finite for _, finite in seen]
    # One transfer, and so one wait, for all that is on the accelerator.
    device = next((flag.device for flag in flags if flag.device.type != "cpu"), flags[0].device)
    finite = torch.stack([flag.to(device) for flag in flags]).tolist()
    return next((what for (what, _), fine in zip(seen, finite, strict=True) if not fine), None)
