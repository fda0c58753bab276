"""What a module keeps about its sharded weight between optimizer steps, and when it is outdated."""

import logging
import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor, Shard

from fp8dist import precompute
from fp8dist.config import Float8Config

logger = logging.getLogger("fp8dist")

# [Note: noticing edits]
# The scales and the payload of a shard are computed once per optimizer step and must not be used
# after the shard was edited. No single signal sees every edit:
#   - `Float8ShardedWeight.__torch_dispatch__` sees eager optimizers (for-loop, foreach, fused),
#     `copy_`, edits through `.data` and `load_state_dict`. It counts them on an `Edits` object
#     that all views of a parameter share.
#   - a compiled optimizer step moves the `_version` of the DTensor parameter only;
#   - code that edits the plain tensors of a state dict in place (`dcp.load`) moves the `_version`
#     of the inner tensor only.
# An all-gather compares all three with what `Seen` recorded when the scales were computed.
#
# Whether to communicate must not depend on the rank. FSDP2's lazy initialisation moves the shard
# to a padded buffer on the ranks whose shard is short, and on those only. That copy stays within
# the family of one `Edits` object and changes no value, so it does not count, and the versions are
# compared on the tensor that was seen, whether or not it is still the parameter's.


def local_shard(param: DTensor) -> Any:
    """This rank's `Float8ShardedWeight` of a parameter."""
    return param._local_tensor


class Edits:
    """Counts in-place writes to one parameter, shared by all views of it."""

    def __init__(self) -> None:
        self.count = 0


@dataclass
class Seen:
    """A parameter as it was when its scales were computed."""

    param: DTensor
    param_version: int
    inner: torch.Tensor  # the plain shard
    inner_version: int
    edits: Edits
    edit_count: int

    @classmethod
    def now(cls, param: DTensor) -> "Seen":
        inner, edits = local_shard(param)._tensor, local_shard(param)._edits
        return cls(param, param._version, inner, inner._version, edits, edits.count)

    def still_holds(self, param: DTensor) -> bool:
        return (
            self.param is param
            and self.param_version == param._version
            and self.inner_version == self.inner._version
            and self.edits is local_shard(param)._edits
            and self.edit_count == self.edits.count
        )


class WeightState:
    """What a `Float8Linear` keeps about its sharded weight between optimizer steps.

    It lives on the module and not on the local tensor, which FSDP2 replaces (padding) and copies
    (CPU offload). Copies and pickles of a module start with an empty state.
    """

    def __init__(self, config: Float8Config, fqn: str, root: nn.Module | None = None) -> None:
        self.config = config
        self.fqn = fqn
        self.root = weakref.ref(root) if root is not None else lambda: None
        self.seen: Seen | None = None
        # (1, 1) float32 in a storage of its own: compiled graphs hold on to it.
        self.scale: torch.Tensor | None = None
        self.payload: torch.Tensor | None = None  # (padded n, K) uint8
        self.payload_is_current = False
        self.finite: _Finite | None = None

    def __reduce__(self) -> Any:
        return WeightState, (self.config, self.fqn)

    def set_scale(self, scale: torch.Tensor, param: DTensor) -> None:
        if self.scale is None or self.scale.device != scale.device:
            self.scale = torch.empty(scale.shape, dtype=scale.dtype, device=scale.device)
        # What an earlier forward saved for backward is not used any more.
        with torch.autograd._unsafe_preserve_version_counter(self.scale):
            self.scale.copy_(scale)
        self.seen = Seen.now(param)
        self.payload_is_current = False

    def current_payload(self, shard: torch.Tensor, param: DTensor) -> torch.Tensor:
        """The bytes this rank contributes, cast if the cached ones are not current.

        Args:
            shard: (n, K), high precision, on the device that communicates.
            param: the parameter it is a shard of.

        Returns:
            (padded n, K), uint8: the size of the largest shard, zeros after n.
        """
        if self.scale is None:
            raise AssertionError(f"{self.fqn}: no scale to cast the payload with")
        payload = self.payload
        if payload is not None and self.payload_is_current:
            return payload
        size = padded_shard_size(param)
        if payload is None or payload.shape != size or payload.device != shard.device:
            payload = torch.zeros(size, dtype=torch.uint8, device=shard.device)
        precompute.cast_payload(shard, self.scale, self.config.recipe, payload)
        if self.config.cache_payload:
            self.payload, self.payload_is_current = payload, True
        return payload


def shard_mesh_dim(param: DTensor) -> int:
    """The mesh dimension whose ranks together hold the parameter.

    Under HSDP each replica holds it whole, so the mesh's replicate dimension is left out.
    """
    sharded = [i for i, placement in enumerate(param.placements) if not placement.is_replicate()]
    if len(sharded) != 1:
        raise ValueError(
            f"a float8 weight is placed as {param.placements} on {param.device_mesh}: fp8dist "
            "gathers weights that fully_shard has sharded over one mesh dimension (FSDP, HSDP), "
            "without tensor parallelism"
        )
    return sharded[0]


def shard_group(param: DTensor) -> dist.ProcessGroup:
    return param.device_mesh.get_group(shard_mesh_dim(param))


def padded_shard_size(param: DTensor) -> torch.Size:
    """The size of every rank's all-gather input: that of the largest shard, rank 0's."""
    mesh_dim = shard_mesh_dim(param)
    placement = param.placements[mesh_dim]
    if not isinstance(placement, Shard):
        raise AssertionError(f"FSDP2 shards parameters, found {placement}")
    size = list(param.shape)
    size[placement.dim] = -(-size[placement.dim] // param.device_mesh.size(mesh_dim))
    return torch.Size(size)


def update_scales(states: list[WeightState], params: list[DTensor]) -> None:
    """Compute the scales of parameters sharded over one group: one all-reduce for all."""
    shards = [local_shard(param)._tensor for param in params]
    device = shards[0].device
    if device.type != params[0].device_mesh.device_type:  # CPU offload: reduce where FSDP2 does
        device = torch.device(params[0].device_mesh.device_type)
    amaxes = precompute.local_amaxes(shards, device)
    precompute.all_reduce_amaxes(amaxes, shard_group(params[0]))
    scales = precompute.scales_from_amaxes(amaxes, [state.config.recipe for state in states])
    for state, scale, param in zip(states, scales, params, strict=True):
        state.set_scale(scale, param)
    _report_non_finite(states, amaxes)


class _Finite:
    """Which weights of one `update_scales` are finite, on its way from the device."""

    def __init__(self, amaxes: torch.Tensor, fqns: list[str]) -> None:
        self.fqns = fqns
        self.finite = amaxes.isfinite().to("cpu", non_blocking=True)
        self.event = torch.Event(amaxes.device.type) if amaxes.device.type != "cpu" else None
        if self.event is not None:
            self.event.record()

    def arrived(self) -> bool:
        return self.event is None or self.event.query()

    def first_bad(self) -> str | None:
        bad = (~self.finite).nonzero()
        return self.fqns[int(bad[0])] if len(bad) else None


_reported_non_finite = False


def _report_non_finite(states: list[WeightState], amaxes: torch.Tensor) -> None:
    """Name the first weight with a NaN or Inf, once, without waiting for the device.

    On an accelerator the answer is read one call later. The values go on as they are: the
    scale of such a weight makes its elements NaN, and the loss shows it.
    """
    global _reported_non_finite
    if _reported_non_finite:
        return
    waiting = states[0].finite
    if waiting is None or waiting.event is None:
        waiting = states[0].finite = _Finite(amaxes, [state.fqn for state in states])
    if not waiting.arrived():
        return
    states[0].finite = None
    if (fqn := waiting.first_bad()) is not None:
        _reported_non_finite = True
        logger.warning("%s has a NaN or Inf in its weight; training goes on with it", fqn)
