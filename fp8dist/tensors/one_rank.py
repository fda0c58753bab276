"""`InPlaceReduceScatter`: gradients of a rank that shards with no other, which stay in place."""

import math
from collections.abc import Sequence

import torch
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

# [Note: gradients of one rank]
# Where a group of parameters has one rank, and no replicas, FSDP2 lays its gradients out in one
# buffer, copies that to another and gives the parameters views of the copy: 8 bytes an element, in
# memory of its own, since the copy is made on the stream of reductions. Both buffers come from the
# group's reduce-scatter, which FSDP2 lets others replace (`set_custom_reduce_scatter`). Here the
# second is the first, and `copy_` of a tensor to itself does nothing.
#
# The first is allocated on the stream of backward, so no kernel on another stream may use it, as it
# could still do when backward's stream has that memory for something else. Where there would be
# one, because gradients are divided, cast, added to earlier ones, moved to the host or handed to a
# hook of the user's, there are two buffers as before.


class InPlaceReduceScatter(DefaultReduceScatter):
    """FSDP2's reduce-scatter for a group of one rank; see [Note: gradients of one rank].

    Args:
        group: of the parameters whose gradients this allocates; their shard group has one rank.
    """

    def __init__(self, group: FSDPParamGroup) -> None:
        self._group = group
        self._input: torch.Tensor | None = None

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """An empty tensor; on the stream of reductions, the last one that was empty elsewhere."""
        streams = self._group.comm_ctx.device_handle
        is_output = streams.current_stream() == self._group.comm_ctx.reduce_scatter_stream
        if not is_output:
            self._input = super().allocate(size, dtype=dtype, device=device)
            return self._input
        given, self._input = self._input, None
        if given is None or given.numel() != math.prod(size) or self._goes_on(dtype):
            return super().allocate(size, dtype=dtype, device=device)
        return given

    def _goes_on(self, dtype: torch.dtype) -> bool:
        """Whether anything is done to gradients of this dtype before the parameters have them."""
        group = self._group
        return (
            dtype != group._orig_dtype
            or group.gradient_divide_factor is not None
            or group._all_reduce_hook is not None
            or any(
                parameter.offload_to_cpu
                or parameter.sharded_param.grad is not None
                or parameter.sharded_param._post_accumulate_grad_hooks
                for parameter in group.fsdp_params
            )
        )


def keep_gradients_in_place(group: FSDPParamGroup) -> None:
    """Where a group has one rank and FSDP2's own reduce-scatter, spare it the copy."""
    alone = type(group.mesh_info) is FSDPMeshInfo and group.mesh_info.shard_mesh_size == 1
    if alone and type(group._reduce_scatter_comm) is DefaultReduceScatter:
        group._reduce_scatter_comm = InPlaceReduceScatter(group)
