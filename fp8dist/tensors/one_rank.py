"""`InPlaceReduceScatter`: gradients of a rank that shards with no other, which stay in place."""

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

# [Note: gradients of one rank]
# Where a group of parameters has one rank, and no replicas, FSDP2 lays its gradients out in one
# buffer, copies that to another and gives the parameters views of the copy: twice the gradients'
# bytes, and memory of its own, since the copy is made on the stream of reductions. Both buffers
# come from the group's reduce-scatter, which FSDP2 lets others replace
# (`set_custom_reduce_scatter`). Here the second is the first, and is not copied to itself. It has
# nothing to do with float8, and takes as long with any recipe.
#
# They are laid out by `fsdp::chunk_cat`, made for gradients that are cut into a chunk for each
# rank: with one chunk it has less than half of an H200's bandwidth, and copies a list of pointers
# to the device for each group. The first buffer is a tensor that has `_foreach_copy_` do it
# instead, the same casts with three quarters of the bandwidth.
#
# The first is memory of backward's stream, as gradients are without FSDP2, which may give it to
# another tensor as soon as it is freed, whatever other streams are still to do with it. So where
# FSDP2 has more to do with new gradients than the copy, because they are divided, cast, added to
# earlier ones, moved to the host or handed to a hook of the user's, there are two buffers as
# before. And earlier ones, which are added to on the stream of reductions, are recorded as used
# there: mostly they are freed after backward's stream has waited for that, but not where a hook
# frees them, or a backward fails.


class _LaidOut(torch.Tensor):
    """(elements,): a buffer of gradients, each of which is copied there by itself."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.fsdp.chunk_cat:
            return _lay_out(*args, **kwargs)
        if function is torch.Tensor.copy_ and args[0].data_ptr() == args[1].data_ptr():
            return args[0]
        return super().__torch_function__(function, types, args, kwargs or {})


def _lay_out(gradients: list[torch.Tensor], *, dim: int, num_chunks: int, out: _LaidOut) -> None:
    """`fsdp::chunk_cat` where there is one chunk: gradients, cast to out's dtype, one by one."""
    if (dim, num_chunks) != (0, 1):
        raise AssertionError(f"gradients of one rank are cut into {num_chunks} chunks of {dim=}")
    parts = _plain(out).view(-1).split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(
        [part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)],
        gradients,
    )


def _plain(x: _LaidOut) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return x.view_as(x)


class InPlaceReduceScatter(DefaultReduceScatter):
    """FSDP2's reduce-scatter for a group of one rank; see [Note: gradients of one rank].

    Args:
        group: of the parameters whose gradients this allocates; its shard group has one rank.
    """

    def __init__(self, group: FSDPParamGroup) -> None:
        self._group = group
        self._input: weakref.ref[torch.Tensor] | None = None  # which FSDP2 holds, unless it failed

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """An empty tensor; on the stream of reductions, the last one that was empty elsewhere."""
        context = self._group.comm_ctx
        if context.device_handle.current_stream() != context.reduce_scatter_stream:
            tensor = super().allocate(size, dtype=dtype, device=device)
            if type(tensor) is torch.Tensor:  # a fake one has a class already
                tensor = tensor.as_subclass(_LaidOut)
            self._input = weakref.ref(tensor)
            return tensor
        given = None if self._input is None else self._input()
        self._input = None
        if given is None or given.numel() != math.prod(size) or self.copies(dtype):
            self._record_earlier()
            return super().allocate(size, dtype=dtype, device=device)
        return _plain(given) if isinstance(given, _LaidOut) else given

    def copies(self, dtype: torch.dtype) -> bool:
        """Whether new gradients of this dtype are copied, as FSDP2 has more to do with them."""
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

    def _record_earlier(self) -> None:
        for parameter in self._group.fsdp_params:
            earlier: Any = parameter.sharded_param.grad
            if earlier is not None and earlier.device.type != "cpu":
                earlier._local_tensor.record_stream(self._group.comm_ctx.reduce_scatter_stream)


def keep_gradients_in_place(group: FSDPParamGroup) -> None:
    """Where a group has one rank and FSDP2's own reduce-scatter, spare it the copy."""
    alone = type(group.mesh_info) is FSDPMeshInfo and group.mesh_info.shard_mesh_size == 1
    if alone and type(group._reduce_scatter_comm) is DefaultReduceScatter:
        group._reduce_scatter_comm = InPlaceReduceScatter(group)
