"""A module's parameter: put into a `Float8ShardedWeight`, and as the plain tensor that is in it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor

from fp8dist.tensors.placement import like
from fp8dist.tensors.sharded_weight import Float8ShardedWeight


@torch.no_grad()
def wrap_weight(
    module: nn.Module, name: str, wrap: Callable[[torch.Tensor], Float8ShardedWeight]
) -> None:
    """Make a parameter a `Float8ShardedWeight`, also inside a DTensor, unless it is one."""
    weight: Any = getattr(module, name)
    if isinstance(weight, DTensor):
        if isinstance(weight._local_tensor, Float8ShardedWeight):
            return
        if torch.__future__.get_swap_module_params_on_conversion():
            # Of parameters FSDP2 expects then that they stay the same objects.
            weight._local_tensor = wrap(weight._local_tensor.detach())
            return
        wrapped: torch.Tensor = like(weight, wrap(weight._local_tensor.detach()))
    elif isinstance(weight, Float8ShardedWeight):
        return
    else:
        wrapped = wrap(weight.detach())
    attributes = {} if isinstance(weight, DTensor) else weight.__dict__
    parameter = nn.Parameter(wrapped, requires_grad=weight.requires_grad)
    parameter.__dict__.update(attributes)
    setattr(module, name, parameter)


def plain(weight: torch.Tensor) -> torch.Tensor:
    """The high-precision tensor without its subclass, sharing its storage and its versions."""
    if isinstance(weight, DTensor) and isinstance(weight._local_tensor, Float8ShardedWeight):
        detached: Any = weight.detach()
        detached._local_tensor = weight._local_tensor._tensor.detach()
        return detached
    return (weight._tensor if isinstance(weight, Float8ShardedWeight) else weight).detach()


def make_plain(state_dict: dict[str, Any]) -> None:
    """Take weights out of their wrapper that a parametrization, or pruning, has under a name of its
    own, and saves itself.
    """
    for name, value in state_dict.items():
        if isinstance(value, Float8ShardedWeight) and not isinstance(value, nn.Parameter):
            state_dict[name] = plain(value)
