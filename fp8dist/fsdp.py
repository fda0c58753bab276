"""The call after `optimizer.step()`: all scales of a model in one all-reduce per mesh."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from fp8dist.shard import Shard
from fp8dist.tensors.edits import is_sharded
from fp8dist.tensors.groups import prepare_groups
from fp8dist.tensors.placement import join
from fp8dist.tensors.sharded_weight import weights_of
from fp8dist.tensors.weight_state import WeightState, cast_payloads, update_scales

Weight = tuple[WeightState, DTensor]


def _roots(module: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    if isinstance(module, nn.Module):
        return [module]
    return list(module)


def _sharded_weights(roots: list[nn.Module]) -> Iterator[Weight]:
    seen: set[WeightState] = set()
    for root in roots:
        for module in root.modules():
            for state, param in weights_of(module):
                sharded = is_sharded(param)
                if not sharded and state.seen is not None:
                    # FSDP2 has the unsharded weight in the module now, which keeps its scales, and
                    # its data, which may be the payload: see [Note: one rank] in `sharded_weight`.
                    param, state.scales, state.payload = state.seen.param, None, None
                    sharded = True
                if sharded and isinstance(param, DTensor) and state not in seen:
                    seen.add(state)
                    if state.seen is None or state.seen.param is not param:
                        # FSDP2 says so to the compiler; a weight that it ignores is found out
                        # later.
                        managed = getattr(module, "_is_fsdp_managed_module", False)
                        state.set_gathered(managed)
                    yield state, param


def _by_group(weights: list[Weight]) -> dict[dist.ProcessGroup | None, list[Weight]]:
    """Weights by the group whose ranks hold them together; None: one rank holds all of each.

    Where FSDP2 and tensor parallelism together cut some weights, their ranks form one group, and
    weights that only one of the two cuts go with it.
    """
    joint: dict[dist.ProcessGroup, dist.ProcessGroup] = {}
    for state, param in weights:
        state.shard_now(param)
    for state, param in weights:
        if len(state.groups) == 2:
            joint.update(dict.fromkeys(state.groups, join(param, state.groups)))
    by_group: dict[dist.ProcessGroup | None, list[Weight]] = {}
    for state, param in weights:
        group = state.groups[0] if state.groups else None
        by_group.setdefault(group and joint.get(group, group), []).append((state, param))
    return by_group


# A compiled optimizer step calls it by the hook below.
@torch.compiler.disable(reason="it looks at where tensors are, and keeps what follows from that")
@torch.inference_mode(False)  # what is made here is written to in training
@torch.no_grad()
def precompute_float8_dynamic_scale_for_fsdp(
    module: nn.Module | Iterable[nn.Module],
) -> None:
    """Compute the scales of all float8 weights in one all-reduce, and cast their payloads.

    Call it after `optimizer.step()`, and after any other edit of the weights, on all ranks.
    The all-gathers until the next step then communicate nothing but payloads. Weights on
    disjoint meshes cost one all-reduce per mesh. Under FSDP2 with tensor parallelism it is one over
    the ranks of both, whose group the first call makes: all ranks of the root mesh must make it,
    whatever pipeline stage they have.

    Between a forward and its backward the weights must not be edited, as without float8.
    Not noticed by the next all-gather are edits of a state dict's tensors by foreach functions,
    through `.data` or numpy, or by a collective, and those by a compiled function that is given
    `weight.data` or `weight.detach().to_local()` instead of the parameter: call this after them.
    Call it too after a load in place into a state dict that was there at the last call or gather,
    where a rank has no rows of a weight; there, ranks must also take state dicts together.

    All ranks are assumed to make the same edits to their shards, as FSDP2 assumes throughout.

    Args:
        module: a model, or the parts of one (pipeline stages), after
            `parallelize_module` and `fully_shard`. Modules without float8 weights are passed over.

    Raises:
        ValueError: `fully_shard` was given an int for `reshard_after_forward`; a weight is placed
            in a way that cannot be gathered in float8, or tensor parallelism cuts it into parts
            that its recipe cannot scale.
    """
    roots = _roots(module)
    for root in roots:
        prepare_groups(root)
    for group, weights in _by_group(list(_sharded_weights(roots))).items():
        states = [state for state, _ in weights]
        params = [param for _, param in weights]
        update_scales(states, params, () if group is None else (group,), keep=True)
        cached: dict[torch.device, list[tuple[WeightState, Shard]]] = {}
        for state, param in weights:
            if state.config.cache_payload and not state.payload_is_current:
                shard = state.shard_now(param)
                cached.setdefault(shard.data.device, []).append((state, shard))
        for pairs in cached.values():
            cast_payloads([state for state, _ in pairs], [shard for _, shard in pairs], keep=True)


def register_precompute_hook(
    optimizer: torch.optim.Optimizer, module: nn.Module | Iterable[nn.Module]
) -> RemovableHandle:
    """Call `precompute_float8_dynamic_scale_for_fsdp` after every `optimizer.step()`.

    Args:
        optimizer: of the model's parameters; one of several will do if it steps last.
        module: a model, or the parts of one (pipeline stages), after `parallelize_module` and
            `fully_shard`: what the call after each step is given.

    Returns:
        A handle whose `remove()` undoes it.

    Raises:
        ValueError: `fully_shard` was given an int for `reshard_after_forward`.
    """
    roots = _roots(module)
    for root in roots:
        prepare_groups(root)

    def after_step(*_: Any) -> None:
        precompute_float8_dynamic_scale_for_fsdp(roots)

    return optimizer.register_step_post_hook(after_step)
