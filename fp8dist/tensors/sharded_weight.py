"""`Float8ShardedWeight`: the high-precision shard of a weight that FSDP2 gathers in float8."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from fp8dist.tensors import addresses
from fp8dist.tensors.compiler_cache import tell_dtensors_apart
from fp8dist.tensors.edits import Edits, is_sharded, local_shard
from fp8dist.tensors.float8_tensor import (
    Float8Tensor,
    gathered_data,
    gathered_weight,
    is_view,
    scales_by_use,
)
from fp8dist.tensors.groups import prepare_groups
from fp8dist.tensors.placement import matrix_size, share_storage
from fp8dist.tensors.weight_state import WeightState, make_current

aten = torch.ops.aten


def weights_of(module: nn.Module) -> Iterator[tuple[WeightState, torch.Tensor]]:
    """The float8 weights of a module itself: of a `Float8Linear`, or of experts."""
    own = vars(module)  # where a module has not what is asked for, `getattr` takes long to say so
    if (state := own.get("weight_state")) is not None:
        yield state, module.weight  # type: ignore[misc]  # may be a submodule, to mypy
    for name, state in own.get("expert_states", {}).items():
        yield state, getattr(module, name)


# Ops whose result is a new place for the parameter: FSDP2 and `to_empty` move one with them.
_MOVE_OPS = {aten.new_zeros.default, aten.empty_like.default, aten._pin_memory.default}
# Ops whose result is another parameter with the same values.
_COPY_OPS = {aten.clone.default, aten._to_copy.default}


class Float8ShardedWeight(torch.Tensor):
    """A linear weight, or FSDP2's shard of it: a high-precision tensor with FSDP2's two hooks.

    Optimizers, gradient clipping and initialisation see and edit the plain tensor inside. What the
    hooks need beside it is in the module's `WeightState`; see [Note: noticing edits] in `edits`.

    Args:
        tensor: (n, K), float32, bfloat16 or float16.
    """

    _tensor: torch.Tensor
    _edits: Edits
    # See [Note: offloaded shards] in `weight_state`.
    _stays_on_host: bool = False
    _wanted_on: torch.device | None = None
    # See [Note: moved and frozen].
    _moved_frozen: bool = False
    _stays_frozen: bool = False

    @staticmethod
    def __new__(cls, tensor: torch.Tensor, edits: Edits | None = None) -> "Float8ShardedWeight":
        trained = torch.is_inference_mode_enabled() and not tensor.is_inference()
        with torch.inference_mode(False) if trained else nullcontext():  # as a plain view would be
            self = torch.Tensor._make_wrapper_subclass(
                cls,
                tensor.size(),
                strides=tensor.stride(),
                storage_offset=tensor.storage_offset(),
                dtype=tensor.dtype,
                layout=tensor.layout,
                device=tensor.device,
                requires_grad=tensor.requires_grad,
            )
        self._tensor = tensor
        self._edits = edits or Edits()
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # no classmethod in torch's stubs
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable or func.namespace == "c10d":
            _count_edits(func, args, kwargs)
        inner_args = [_inner(value) for value in args]
        inner_kwargs = {name: _inner(value) for name, value in kwargs.items()}
        # FSDP2's lazy initialisation, which moves short ranks' shards, may be in inference mode.
        with torch.inference_mode(False) if func in _MOVE_OPS else nullcontext():
            out = func(*inner_args, **inner_kwargs)
        if is_view(func):
            views = _wrap_all(out, lambda tensor: args[0]._like(tensor, args[0]._edits))
            if func is aten.detach.default:
                views._stays_frozen = args[0]._moved_frozen
            return views
        if func in _MOVE_OPS:
            edits = Edits(moved_from=args[0]._edits)
            if func is aten._pin_memory.default:  # it copies, too
                edits.fill(args[0]._edits)
            return args[0]._like(out, edits)
        if func in _COPY_OPS:
            return _wrap_all(out, args[0]._like)
        if isinstance(args[0], cls) and func._schema.arguments[0].is_write:
            return args[0]  # an in-place op returns what it was called on
        return out

    # What torch offers for this has no types.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def _like(self, tensor: torch.Tensor, edits: Edits | None = None) -> "Float8ShardedWeight":
        """Another tensor in the place of this one's."""
        return Float8ShardedWeight(tensor, edits)

    def _of_module(self, module: nn.Module) -> tuple[WeightState | None, Any]:
        """What the module that FSDP2 gathers this for keeps about it, and its parameter."""
        return getattr(module, "weight_state", None), getattr(module, "weight", None)

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As any tensor's; FSDP2's own move of an offloaded shard is put off, for the hook to move
        the payload instead. See [Note: offloaded shards] in `weight_state`.
        """
        if self._stays_on_host and kwargs == {"non_blocking": True} and len(args) == 1:
            device = torch.device(args[0])
            if device.type != self.device.type:
                stand_in = self._like(self._tensor, self._edits)
                stand_in._wanted_on = device
                return stand_in
        moved = super().to(*args, **kwargs)
        if isinstance(moved, Float8ShardedWeight) and moved.device != self.device:
            moved._moved_frozen = isinstance(self, nn.Parameter) and not self.requires_grad
        return moved

    # [Note: moved and frozen]
    # `fully_shard` moves a model to the mesh's device. Of a tensor subclass it makes the parameter
    # anew, as nn.Parameter(weight.to(device)): one that is trained, also where the weight was
    # frozen. What `to` another device returns for a frozen parameter therefore stays frozen when a
    # parameter is made of it, which is `detach` and one call of `requires_grad_`. (Also of what a
    # user has moved: the two cannot be told apart.)

    def requires_grad_(self, requires_grad: bool = True) -> torch.Tensor:
        requires_grad = requires_grad and not self._stays_frozen
        self._stays_frozen = False
        return super().requires_grad_(requires_grad)

    @property
    def data(self) -> torch.Tensor:
        """As any tensor's; what is assigned takes the place of the plain tensor inside."""
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]  # a descriptor

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        inner = value._tensor if isinstance(value, Float8ShardedWeight) else value.detach()
        # This sets the size, dtype and device outside, and nothing else.
        torch.Tensor.data.__set__(self, self._like(inner))  # type: ignore[attr-defined]
        self._tensor = inner
        if isinstance(value, Float8ShardedWeight):
            self._edits = value._edits  # what is edited there is edited here
        self._edits.count += 1

    def data_ptr(self) -> int:
        """The address of the plain tensor inside; see [Note: addresses] in `addresses`."""
        return 0 if addresses.hidden() else self._tensor.data_ptr()

    __deepcopy__ = addresses.without_address(torch.Tensor.__deepcopy__)
    __reduce_ex__ = addresses.without_address(torch.Tensor.__reduce_ex__)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["_tensor"], None

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], meta: Any, outer_size: Any, outer_stride: Any
    ) -> "Float8ShardedWeight":
        return Float8ShardedWeight(inner["_tensor"])

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes tensor_contents
        return f"Float8ShardedWeight({self._tensor!r})"

    @property
    def fsdp_pre_all_gather(self) -> Callable[..., tuple[tuple[torch.Tensor], Any]]:
        """FSDP2's hook before the all-gather, `_before_all_gather`.

        FSDP2 asks for its signature at every all-gather. Of a method `inspect` would put it
        together each time.
        """
        hook = functools.partial(self._before_all_gather)
        # `inspect` looks for it on any callable; typeshed's `partial` has no such attribute.
        hook.__signature__ = _SIGNATURE  # type: ignore[attr-defined]
        return hook

    def _before_all_gather(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: MixedPrecisionPolicy,
    ) -> tuple[tuple[torch.Tensor], Any]:
        """`self` is the shard on the device that communicates, or under CPU offload a copy of the
        parameter's local tensor, or what `to` returns for it, which is why edits are looked for on
        the parameter.

        Returns:
            ((payload,), (scales, outer_size, None)): see `WeightState`; the metadata stays here.
            Of one rank that keeps its payload, see [Note: one rank]:
            ((no rows of it,), (scales, outer_size, payload)).
        """
        state, param = self._of_module(module)
        if not isinstance(state, WeightState):
            raise ValueError(
                f"a {type(module).__name__} holds the weight of another module that was converted "
                "to float8, which it cannot gather: tie or parametrize weights before the "
                "conversion, which leaves them alone"
            )
        if not isinstance(param, DTensor) or not is_sharded(param):
            raise ValueError(
                f"{state.fqn}: its weight was replaced, by another parameter after fully_shard or "
                "by pruning, and the one that was there is gathered: edit that in place or load a "
                "state dict, and prune before the conversion, which leaves the layer alone"
            )
        if state.seen is None:
            prepare_groups(state.root())
        state.check_buffer()
        state.set_gathered(True)
        make_current(state, param)
        if state.shard_now(param).size != matrix_size(outer_size):
            raise AssertionError(
                f"{state.fqn}: FSDP2 gathers {tuple(outer_size)} of a weight placed as "
                f"{param.placements}"
            )
        device, local = self._wanted_on or self.device, local_shard(param)
        if state.config.cache_payload and device.type != local.device.type:
            local._stays_on_host = True  # from the next gather on
            payload = state.payload_on(device, param)
        else:
            payload = state.current_payload(self._tensor, param)
        kept = payload if mesh.size() == 1 and payload is state.payload else None
        if kept is not None:
            payload = payload[:0]
        if len(outer_size) == 3:
            payload = payload.view(-1, self.size(1), payload.size(1))
        return (payload,), (state.scales, outer_size, kept)

    # [Note: one rank]
    # A rank that shards with no other (one GPU, or HSDP that only replicates) has all of the weight
    # in its payload, and FSDP2 would copy it at each unshard. So where the payload is kept it is
    # handed past FSDP2, which copies and frees no bytes, and the unsharded weight is the payload
    # itself. The next `precompute` writes to it; as where FSDP2 unshards again, what an earlier
    # forward saved for backward then has the new bytes, and its version does not tell autograd:
    # FSDP2 makes a parameter of the weight, whose data count for themselves, as `data` do.

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[torch.Tensor, ...],
        metadata: Any,
        param_dtype: torch.dtype,
        *,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None:
        """FSDP2's hook after the all-gather.

        Args:
            all_gather_outputs: the payloads of all ranks, uint8; their first bytes are the
                weight in row-major order.
            metadata: what the other hook returned.
            param_dtype: the dtype in which the layer computes.
            out: the unsharded weight of the first all-gather, whose data FSDP2 has refilled.

        Returns:
            The unsharded weight and the tensors in it that FSDP2 frees when it reshards.
        """
        (payload,) = all_gather_outputs
        scales, size, kept = metadata
        if out is not None:
            unsharded = out._local_tensor if isinstance(out, DTensor) else out
            if not isinstance(unsharded, Float8Tensor):
                raise AssertionError(f"expected a Float8Tensor, got {type(unsharded).__name__}")
            unsharded._scales, unsharded._scales_for_grad_input = scales_by_use(scales)
            if kept is not None and not share_storage(kept, unsharded._data):
                unsharded._data = gathered_data(kept, not scales, size).data
            return None
        if kept is not None:
            return self._unsharded(kept, scales, size, param_dtype), ()
        return self._unsharded(payload, scales, size, param_dtype), (payload,)

    def _unsharded(
        self, payload: torch.Tensor, scales: Any, size: torch.Size, dtype: torch.dtype
    ) -> Float8Tensor:
        return gathered_weight(payload, scales, size, dtype)


tell_dtensors_apart(lambda local: isinstance(local, Float8ShardedWeight | Float8Tensor))

_OF_METHOD = inspect.signature(Float8ShardedWeight._before_all_gather)
_SIGNATURE = _OF_METHOD.replace(parameters=[*_OF_METHOD.parameters.values()][1:])  # without self


def _inner(value: Any) -> Any:
    """An argument of an op with the plain tensors: it is one, or a list, or lists of a collective.

    `pytree` takes ten times as long for the lists that foreach optimizers pass, of all parameters.
    """
    if isinstance(value, Float8ShardedWeight):
        return value._tensor
    if type(value) in (list, tuple):
        return [_inner(element) for element in value]
    return value


def _count_edits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if func.namespace == "c10d":  # collectives do not say in their schemas what they write to
        for tensor in pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, Float8ShardedWeight):
                tensor._edits.count += 1
        return
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if isinstance(tensor, Float8ShardedWeight) and not _moves(func, args):
                tensor._edits.count += 1


def _moves(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether this copy fills the place that was made for a parameter: no value changes."""
    if func is not aten.copy_.default or not isinstance(args[1], Float8ShardedWeight):
        return False
    return bool(args[0]._edits.fill(args[1]._edits))


def _wrap_all(out: Any, wrap: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return pytree.tree_map_only(torch.Tensor, wrap, out)
