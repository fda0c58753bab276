"""What a training step hands to the communication backend, and the memory that stays for it."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils.weak import WeakIdKeyDictionary

# The operators that hand tensors to NCCL or gloo, and their functional kind.
_OPERATIONS = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
}

# How often they read what they are given: the second one for amaxes first.
_READS_OF_GROUPS = {
    "fp8dist::pad_groups": 1,
    "fp8dist::quantize_groups": 2,
    "fp8dist::rescale_each": 1,
}


@dataclass(frozen=True, order=True)
class Collective:
    """A kind of collective.

    Attributes:
        phase: of the step in which it is issued.
        operation: all_gather, reduce_scatter or all_reduce.
        reduction: SUM, MAX, ...; empty for those that reduce nothing.
        dtype: of what is sent, as in "uint8".
        over: the mesh dimensions whose ranks take part.
        ranks: how many these are.
    """

    phase: str
    operation: str
    reduction: str
    dtype: str
    over: str
    ranks: int

    @property
    def is_of_scales(self) -> bool:
        """Whether it reduces amaxes of weights: after the optimizer, or if they are not precomputed
        at the first gather. Those over tensor parallelism in forward are of activations.
        """
        at_gather = self.reduction == "MAX" and self.over != "tp"
        return self.phase == "scales" or at_gather

    def sent(self, handed: float) -> float:
        """Bytes that a rank sends, and receives, where the ranks form a ring.

        Args:
            handed: the bytes that the rank hands over: its part for an all-gather, for the others
                a tensor of the size of the whole.
        """
        n = self.ranks
        times = {"all_gather": n - 1, "reduce_scatter": (n - 1) / n, "all_reduce": 2 * (n - 1) / n}
        return handed * times[self.operation]


class Observer(TorchDispatchMode):
    """Records collectives, and the sizes of what is alive, below all of Python's layers.

    Set `phase` before each part of a step.

    Attributes:
        calls, handed: by kind, how often it was called and the bytes this rank handed over.
        peak_of_buffers: the most bytes that gathered weights, gradients that are not reduced yet
            and FSDP's buffers had at once.
        casts_of_experts: bytes that casts and transposes of experts' operands read and write.

    Args:
        unreduced: gives the gradients that wait for others, to be reduced with them.
        in_place: says whether gradients that are reduced in a dtype become the gradients' shards
            where FSDP2 lays them out.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        unreduced: Callable[[], Iterable[torch.Tensor]] = tuple,
        in_place: Callable[[torch.dtype], bool] = lambda dtype: False,
    ) -> None:
        super().__init__()
        self.unreduced = unreduced
        self.in_place = in_place
        self.phase = ""
        self.calls: Counter[Collective] = Counter()
        self.handed: Counter[Collective] = Counter()
        self.peak_of_buffers = self.casts_of_experts = 0
        self._over = _names_of_groups(mesh)
        # Storages by what they are for; they leave these when they are freed.
        self._buffers = WeakIdKeyDictionary()
        self._others = WeakIdKeyDictionary()

    def live_bytes(self) -> int:
        """Of what was made while this was open and still is, without FSDP's buffers."""
        others = (storage for storage in self._others if storage not in self._buffers)
        return sum(storage.nbytes() for storage in others)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # a subclass first makes of it what it computes or sends
        kwargs = kwargs or {}
        if func.namespace in ("c10d", "_c10d_functional"):
            self._record(func, args, kwargs)
        out = func(*args, **kwargs)
        if _makes_storage(func):
            for tensor in _tensors(out):
                self._others[tensor.untyped_storage()] = None
        if (times := _READS_OF_GROUPS.get(func._schema.name)) is not None:
            read, written = (sum(t.nbytes for t in _tensors(tree)) for tree in (args, out))
            self.casts_of_experts += times * read + written
        if func.namespace in ("c10d", "fsdp"):
            self._look_at_buffers(func, args, kwargs)
        return out

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        operation = _OPERATIONS.get(func._schema.name.split("::")[1])
        if operation is None:
            return  # waits for one, or is a part of one
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        if func.namespace == "c10d":
            group = dist.ProcessGroup.unbox(given["process_group"])
            reduction = ""
            if "reduce_op" in given:
                reduction = dist.ReduceOp.RedOpType(given["reduce_op"].op()).name
        else:
            group = given["group_name"]
            group = _resolve_process_group(GroupName(group)) if isinstance(group, str) else group
            reduction = given.get("reduce_op", "").upper()
        # `tensors` is both what a rank sends and what it receives.
        sent = given.get("input_tensor", given.get("tensors", given.get("input")))
        (tensor,) = _tensors(sent)
        kind = Collective(
            self.phase,
            operation,
            reduction,
            str(tensor.dtype).removeprefix("torch."),
            self._over.get(group.group_name, "several"),
            group.size(),
        )
        self.calls[kind] += 1
        self.handed[kind] += tensor.nbytes

    def _look_at_buffers(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """FSDP gathers into, copies out to and reduces from memory that is not an activation."""
        name = func._schema.name.split("::")[1]
        used: Any = (args, kwargs)
        if name in ("all_gather_copy_in", "allreduce_"):
            used = ()  # shards; gradients' shards
        elif name == "_reduce_scatter_base_":
            used = args[1]  # args[0] becomes the gradients' shards
        elif name == "chunk_cat" and self.in_place(kwargs["out"].dtype):
            used = args  # as does `out`
        for tensor in (*_tensors(used), *self.unreduced()):
            self._buffers[tensor.untyped_storage()] = None
        # FSDP resizes storages to 0, which no operator tells.
        live = sum(storage.nbytes() for storage in self._buffers)
        self.peak_of_buffers = max(self.peak_of_buffers, live)


@functools.cache
def _makes_storage(func: Any) -> bool:
    """Whether the result is no view of an argument, and none of the arguments."""
    returns = [returned.alias_info for returned in func._schema.returns]
    return func.namespace != "c10d" and not any(alias is not None for alias in returns)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _names_of_groups(mesh: DeviceMesh) -> dict[str, str]:
    """Name of a process group -> the dimensions of `mesh` over which it goes."""
    names = mesh.mesh_dim_names or ()
    return {mesh.get_group(name).group_name: name for name in names}
