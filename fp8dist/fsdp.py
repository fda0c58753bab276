"""The call after `optimizer.step()`: all scales of a model in one all-reduce per mesh."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from fp8dist.linear import Float8Linear
from fp8dist.tensors.sharded_weight import check_reshard, is_sharded
from fp8dist.tensors.weight_state import (
    WeightState,
    cast_payloads,
    local_shard,
    shard_group,
    update_scales,
)


def _roots(module_or_modules: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    if isinstance(module_or_modules, nn.Module):
        return [module_or_modules]
    return list(module_or_modules)


def _sharded_weights(roots: list[nn.Module]) -> Iterator[tuple[WeightState, DTensor]]:
    seen: set[WeightState] = set()
    for root in roots:
        for module in root.modules():
            if not isinstance(module, Float8Linear) or module.weight_state is None:
                continue
            state, param = module.weight_state, module.weight
            if not is_sharded(param) and state.seen is not None:
                # FSDP2 has the unsharded weight in the module now, which keeps its scales.
                param, state.scales = state.seen.param, None
            if isinstance(param, DTensor) and is_sharded(param) and state not in seen:
                seen.add(state)
                yield state, param


@torch.no_grad()
def precompute_float8_dynamic_scale_for_fsdp(
    module_or_modules: nn.Module | Iterable[nn.Module],
) -> None:
    """Compute the scales of all float8 weights in one all-reduce, and cast their payloads.

    Call it after `optimizer.step()`, and after any other edit of the weights, on all ranks.
    The all-gathers until the next step then communicate nothing but payloads. Weights on
    disjoint meshes cost one all-reduce per mesh.

    Between a forward and its backward the weights must not be edited, as without float8.
    Edits of a state dict's tensors by foreach functions, through `.data` or numpy, or by a
    collective are not noticed by the next all-gather: call this after them.

    All ranks are assumed to make the same edits to their shards, as FSDP2 assumes throughout.

    Args:
        module_or_modules: a model, or the parts of one (pipeline stages), after `fully_shard`.
            Modules without float8 weights are passed over.

    Raises:
        ValueError: `fully_shard` was given an int for `reshard_after_forward`.
    """
    roots = _roots(module_or_modules)
    for root in roots:
        check_reshard(root)
    by_group: dict[dist.ProcessGroup, list[tuple[WeightState, DTensor]]] = {}
    for state, param in _sharded_weights(roots):
        by_group.setdefault(shard_group(param), []).append((state, param))
    for weights in by_group.values():
        states = [state for state, _ in weights]
        params = [param for _, param in weights]
        update_scales(states, params)
        # Under CPU offload FSDP2 moves the shard to the device at each all-gather, and it is cast
        # there.
        cached = [
            (state, state.shard_now(param))
            for state, param in weights
            if state.config.cache_payload
            and local_shard(param).device.type == param.device_mesh.device_type
        ]
        cast_payloads([state for state, _ in cached], [shard for _, shard in cached])


def register_precompute_hook(
    optimizer: torch.optim.Optimizer, module_or_modules: nn.Module | Iterable[nn.Module]
) -> RemovableHandle:
    """Call `precompute_float8_dynamic_scale_for_fsdp` after every `optimizer.step()`.

    Returns:
        A handle whose `remove()` undoes it.

    Raises:
        ValueError: `fully_shard` was given an int for `reshard_after_forward`.
    """
    roots = _roots(module_or_modules)
    for root in roots:
        check_reshard(root)

    def after_step(*_: Any) -> None:
        precompute_float8_dynamic_scale_for_fsdp(roots)

    return optimizer.register_step_post_hook(after_step)
