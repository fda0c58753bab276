"""FSDP2's groups of parameters: what is refused of them, and done to them, before they gather."""

import weakref
from typing import Any

import torch.nn as nn
from torch.distributed.fsdp import FSDPModule

from fp8dist.tensors.edits import is_sharded
from fp8dist.tensors.one_rank import keep_gradients_in_place

_prepared_roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def groups_of(module: nn.Module) -> list[Any]:
    """FSDP2's groups of the parameters of a module that `fully_shard` was called for.

    One, or none; with torch newer than 2.11 several where `shard_placement_fn` gives some of the
    parameters a mesh of their own.
    """
    if not isinstance(module, FSDPModule):
        return []
    state = module._get_fsdp_state()  # FSDP2 has no public getter
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def prepare_groups(root: nn.Module | None) -> None:
    """Once, of a model that has float8 weights: see to FSDP2's groups of parameters.

    `reshard_after_forward=<int>` is refused, for which FSDP2 has no extension hooks, and gradients
    of a rank alone stay in place, see [Note: gradients of one rank] in `one_rank`.

    Raises:
        ValueError: a module under root that FSDP2 reshards to a smaller mesh, or whose parameters
            lie on a mesh of more than data parallelism.
    """
    if root is None or root in _prepared_roots:
        return
    groups, has_float8 = [], False
    for fqn, module in root.named_modules():
        for group in groups_of(module):
            groups.append(group)
            if not any(is_sharded(p.sharded_param) for p in group.fsdp_params):
                continue
            has_float8 = True
            name = fqn or type(module).__name__
            if group.post_forward_mesh_info not in (None, group.mesh_info):
                raise ValueError(
                    f"{name}: fully_shard(reshard_after_forward=<int>) does not work with weights "
                    "gathered in float8: use reshard_after_forward=True or False, or "
                    "Float8Config(enable_fsdp_float8_all_gather=False)"
                )
            if getattr(group.mesh_info, "is_spmd_mesh", False):  # torch 2.11 has no dp_mesh_dims
                raise ValueError(
                    f"{name}: fully_shard(dp_mesh_dims=...) does not work with float8 layers: give "
                    "fully_shard the mesh of data parallelism, and parallelize_module the other"
                )
    if has_float8:  # before fully_shard there was nothing to see yet
        for group in groups:
            keep_gradients_in_place(group)
        _prepared_roots.add(root)
