"""What a module keeps about its sharded weight between optimizer steps, and when it is outdated."""

import logging
import math
import weakref
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

from fp8dist.config import Float8Config
from fp8dist.precompute import CastPass, ScalePass
from fp8dist.shard import Shard, empty_scales, payload_columns
from fp8dist.tensors import finite
from fp8dist.tensors.edits import Seen, local_shard
from fp8dist.tensors.float8_tensor import Float8Tensor, gathered_weight
from fp8dist.tensors.placement import (
    Groups,
    as_matrix,
    cut_of,
    groups_of,
    known_groups,
    shard_of,
    share_storage,
)

logger = logging.getLogger("fp8dist")

# [Note: offloaded shards]
# Under `CPUOffloadPolicy` FSDP2 keeps the shard in host memory and calls `to(device)` on it before
# each all-gather, then the hook on the result. The payload, of a quarter or half the bytes, is in
# host memory too, pinned if the shard is, and all that needs to move. So `to` of the parameter's
# own local tensor, once the hook has marked it, only notes the device, and the hook moves the
# payload there. A view has no mark: what users get from `to_local()` moves as any tensor does.


class WeightState:
    """What a module keeps about a sharded float8 weight between optimizer steps.

    It lives on the module and not on the local tensor, which FSDP2 replaces (padding) and copies
    (CPU offload). Copies and pickles of a module start with an empty state, a pickle's without the
    root.
    """

    def __init__(self, config: Float8Config, fqn: str, root: nn.Module | None = None) -> None:
        self.config = config
        self.fqn = fqn
        self.root = weakref.ref(root) if root is not None else lambda: None
        # Whether FSDP2 gathers the weight; otherwise it is over tensor parallelism alone. None
        # until something uses the weight or can tell.
        self.gathered: bool | None = None
        self.first_gathered_in_inference: bool | None = None
        self.seen: Seen | None = None
        self.taken = False  # by a state dict, since the scales were computed
        # One tensor per `reduced_blocks`, in storages of their own: compiled graphs hold on to
        # them, and the compiler mishandled views at an offset (pytorch#155690). The first is for
        # casting; None if there are no scales yet. (2, ...), float32, see [Note: reciprocals], or
        # (1, ...), e8m0, uint8.
        self.scales: list[torch.Tensor] | None = None
        # Of which parameter and, last, of which plain tensor in it; see `shard_now`.
        self.shard: tuple[DTensor, Shard, torch.Tensor] | None = None
        self.groups: Groups = ()  # who hold the weight together, set with `shard`
        self.payload: torch.Tensor | None = None  # uint8
        self.payload_is_current = False
        self.cast_by_rows = False  # whether it would be in the pass that found the amaxes
        self.moving: torch.Event | None = None  # the payload's last move from host memory
        # What `precompute` keeps, of the weights of which this is the first: the passes, and by
        # what it was found whether they are finite.
        self.scale_pass: ScalePass | None = None
        self.cast_pass: CastPass | None = None
        self.finite: dict[str, finite.Finite | None] = {}

    def __reduce__(self) -> Any:
        return WeightState, (self.config, self.fqn)

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeightState":
        """Of the copy of the root, if this is a part of it."""
        return WeightState(self.config, self.fqn, memo.get(id(self.root())))

    def shard_now(self, param: DTensor) -> Shard:
        """`shard_of(param)`, without asking the mesh again for a shard that has not moved."""
        data = local_shard(param)._tensor
        if (
            self.shard is None
            or self.shard[0] is not param
            or self.shard[2] is not data
            # A view, where `data` is 3-D.
            or (self.shard[1].data is not data and not share_storage(self.shard[1].data, data))
        ):
            gathered = self.gathered is not False
            self.shard = param, shard_of(param, self.config.recipe, gathered, self.fqn), data
            self.groups = groups_of(param, cut_of(param, gathered, self.fqn))
            self.scale_pass = self.cast_pass = None
        return self.shard[1]

    def set_gathered(self, gathered: bool) -> None:
        """Learn whether FSDP2 gathers the weight; what was computed otherwise is forgotten."""
        if self.gathered is not gathered:
            self.gathered = gathered
            self.seen = self.scales = self.shard = self.payload = None
            self.scale_pass = self.cast_pass = None
            self.payload_is_current = False

    def check_buffer(self) -> None:
        """Refuse to train with a weight that was first gathered in inference mode.

        Raises:
            ValueError: on all ranks.
        """
        inference = torch.is_inference_mode_enabled()
        if self.first_gathered_in_inference is None:
            self.first_gathered_in_inference = inference
        elif self.first_gathered_in_inference and not inference:
            raise ValueError(
                f"{self.fqn} was first gathered inside torch.inference_mode, in a buffer that "
                "FSDP2 keeps and cannot write to outside of it: build the model again, and let "
                "its first forward be a training step or one under torch.no_grad(); "
                "inference_mode works after that"
            )

    def check_noticed_everywhere(self, param: DTensor) -> None:
        """Refuse an edit of an old state dict's tensor, see [Note: noticing edits].

        Raises:
            ValueError: on the ranks that notice it, for which those with empty shards would wait.
        """
        if self.seen is None or self.taken or not self.shard_now(param).some_are_empty:
            return
        if self.seen.inner_alone_was_edited(param):
            raise ValueError(
                f"{self.fqn} was edited in place through a state dict that was taken before its "
                "float8 scales were computed, which ranks that have no rows of it do not notice: "
                "take a state dict for each load in place, or call "
                "fp8dist.precompute_float8_dynamic_scale_for_fsdp(model) after it"
            )

    def current_payload(self, data: torch.Tensor, param: DTensor) -> torch.Tensor:
        """The bytes this rank contributes, cast if the cached ones are not current.

        Args:
            data: the shard, high precision, on the device that communicates.
            param: the parameter it is a shard of.

        Returns:
            uint8, of the size of the largest shard, rank 0's, with zeros after the shard's rows;
            packed, a row has its e8m0 scales after its elements. 2-D, see `as_matrix`.
        """
        if self.payload is None or not self.payload_is_current:
            shard = self.shard_now(param)
            if local_shard(param)._tensor is not data:
                shard = replace(shard, data=as_matrix(data))
            (payload,) = cast_payloads([self], [shard])
            return payload
        return self.payload

    def payload_on(self, device: torch.device, param: DTensor) -> torch.Tensor:
        """`current_payload` of an offloaded shard, moved to `device`; pinned, asynchronously."""
        payload = self.current_payload(local_shard(param)._tensor, param)
        moved = payload.to(device, non_blocking=True)
        if payload.is_pinned():
            self.moving = torch.Event(device.type)
            self.moving.record()
        return moved


@torch.inference_mode(False)  # what is made here is written to in training
def update_scales(
    states: list[WeightState],
    params: list[DTensor],
    groups: Groups | None = None,
    keep: bool = False,
) -> None:
    """Compute the scales of parameters that one group holds together: one all-reduce for all.

    Args:
        groups: as `ScalePass.run` takes them, if not those of the first parameter.
        keep: the pass, for the next call with these parameters.

    Raises:
        ValueError: on all ranks: a parameter was made in inference mode.
    """
    shards = [state.shard_now(param) for state, param in zip(states, params, strict=True)]
    if groups is None:
        groups = known_groups(states[0].groups)
    device = shards[0].data.device
    if device.type != params[0].device_mesh.device_type:  # CPU offload: reduce where FSDP2 does
        device = torch.empty(0, device=params[0].device_mesh.device_type).device
    ranks = _size(groups)
    for state, shard in zip(states, shards, strict=True):
        state.payload_is_current = False
        # Where more ranks take part than hold the weight once, there are copies of it, which may
        # differ: all are cast by the amaxes of all then, which are not there yet.
        state.cast_by_rows = shard.cast_by_rows and ranks == _size(state.groups)
    scale_pass = _kept_scale_pass(states, shards, device) if keep else None
    if scale_pass is None:
        if keep:
            states[0].scale_pass = None  # what it alone holds is free for the next
        _check_not_in_inference(states, params)
        scale_pass = _new_scale_pass(states, shards, device)
    if keep:
        states[0].scale_pass = scale_pass
    _wait_for_moves(states)
    amaxes = scale_pass.run(groups)
    for state, param, payload in zip(states, params, scale_pass.payloads, strict=True):
        state.seen, state.taken = Seen.now(param), False
        if payload is not None:
            state.payload, state.payload_is_current = payload, True
    _report("scales", states, amaxes, scale_pass.ends)


def _size(groups: Groups) -> int:
    """The ranks of a mesh whose dimensions these are the groups of."""
    return math.prod(group.size() for group in groups)


def _check_not_in_inference(states: list[WeightState], params: list[DTensor]) -> None:
    for state, param in zip(states, params, strict=True):
        if param.is_inference():
            raise ValueError(
                f"{state.fqn} was made inside torch.inference_mode, where edits of it cannot be "
                "noticed: build the model, and load it, outside, or under torch.no_grad()"
            )


def _is_cast_with_scales(state: WeightState) -> bool:
    return state.cast_by_rows and state.config.cache_payload


def _kept_scale_pass(
    states: list[WeightState], shards: list[Shard], device: torch.device
) -> ScalePass | None:
    scales = [state.scales for state in states]
    payloads = [state.payload if _is_cast_with_scales(state) else None for state in states]
    kept = states[0].scale_pass
    return kept if kept is not None and kept.is_for(shards, scales, payloads, device) else None


def _new_scale_pass(
    states: list[WeightState], shards: list[Shard], device: torch.device
) -> ScalePass:
    """The pass, and on states that have none there, what it writes scales to."""
    scales, payloads = [], []
    for state, shard in zip(states, shards, strict=True):
        if state.scales is None or any(mine.device != device for mine in state.scales):
            state.scales, state.seen = empty_scales(shard, device), None  # until it has run
        scales.append(state.scales)
        payloads.append(_payload_for(state, shard) if _is_cast_with_scales(state) else None)
    return ScalePass(shards, scales, payloads, device)


_warned_stale = False


def _warn_stale(fqn: str) -> None:
    global _warned_stale
    if not _warned_stale:
        _warned_stale = True
        logger.warning(
            "%s was edited after its float8 scales were computed; they are computed again where "
            "the weight is used, with one more collective per weight. Call "
            "fp8dist.precompute_float8_dynamic_scale_for_fsdp(model) after optimizer.step(), or "
            "fp8dist.register_precompute_hook(optimizer, model) once",
            fqn,
        )


def make_current(state: WeightState, param: DTensor) -> None:
    """Compute the scales of an edited weight; see [Note: noticing edits] in `edits`."""
    if state.seen is None or not state.seen.still_holds(param):
        if state.seen is not None and state.scales:
            state.check_noticed_everywhere(param)
            _warn_stale(state.fqn)
        update_scales([state], [param])
    elif state.taken and state.shard_now(param).some_are_empty:
        update_scales([state], [param])  # as other ranks may have to
    elif state.seen.shard is not local_shard(param):  # lazy initialisation has moved the shard
        state.seen = Seen.now(param)


def _payload_for(state: WeightState, shard: Shard) -> torch.Tensor:
    """The payload that a state keeps, to be written to, or another where that does not fit."""
    size, device = (shard.largest[0], payload_columns(shard)), shard.data.device
    payload = state.payload
    if payload is None or payload.shape != size or payload.device != device:
        pinned = shard.data.is_pinned()
        return torch.zeros(size, dtype=torch.uint8, device=device, pin_memory=pinned)
    return payload


def _wait_for_moves(states: list[WeightState]) -> None:
    """Until payloads that are on their way from host memory may be written to."""
    for state in states:
        if state.moving is not None:
            state.moving.synchronize()


@torch.inference_mode(False)
def cast_payloads(
    states: list[WeightState], shards: list[Shard], keep: bool = False
) -> list[torch.Tensor]:
    """Cast the payloads of shards on one device, into those that their states keep if they do.

    Args:
        keep: the pass, for the next call with these shards; all states must keep their payloads.
    """
    scales = [state.scales for state in states]
    kept, device = [state.payload for state in states], shards[0].data.device
    cast_pass = states[0].cast_pass if keep else None
    if cast_pass is None or not cast_pass.is_for(shards, scales, kept, device):
        cast_pass = None
        if keep:
            states[0].cast_pass = None  # what it alone holds is free for the next
        known = []
        for state in states:
            if state.scales is None:
                raise AssertionError(f"{state.fqn}: no scales to cast the payload with")
            known.append(state.scales)
        to = [_payload_for(state, shard) for state, shard in zip(states, shards, strict=True)]
        cast_pass = CastPass(shards, known, to, device)
    if keep:
        states[0].cast_pass = cast_pass
    _wait_for_moves(states)
    cast_pass.run()
    payloads = [payload for payload in cast_pass.payloads if payload is not None]
    for state, payload in zip(states, payloads, strict=True):
        if state.config.cache_payload:
            state.payload, state.payload_is_current = payload, True
    if cast_pass.not_finite.numel() > 0:
        _report("packed", states, cast_pass.not_finite, list(range(1, len(states) + 1)))
    _report_exponents(states)
    return payloads


@torch.inference_mode(False)
@torch.no_grad()
def local_float8(state: WeightState, param: DTensor, dtype: torch.dtype) -> Float8Tensor:
    """This rank's part, in float8, of a weight over tensor parallelism alone: nothing is gathered.

    It is cast once per optimizer step, by `precompute_float8_dynamic_scale_for_fsdp`. After an
    edit since then it is cast here, with one all-reduce over the TP ranks and one warning; the
    first time, without a precompute before, with the all-reduce and no warning. All ranks call it
    at the same point, as they do for the all-gather of FSDP2.

    Args:
        state: the `weight_state` of the layer.
        param: its weight, a DTensor whose `_local_tensor` is a `Float8ShardedWeight`, cut by
            Shard(0) or Shard(1) over one mesh dimension.
        dtype: the high-precision dtype that the result stands for, in which the layer computes.

    Returns:
        (N / ranks, K) or (N, K / ranks), no gradient. Its data are overwritten at the next
        precompute if the payload is cached, its scales always: they are for one step.

    Raises:
        ValueError: see `placement.cut_of` and `placement.check_part`; before any collective.
    """
    state.set_gathered(False)
    # What selective checkpointing recomputes must not depend on whether this was up to date.
    with _disable_current_modes():
        make_current(state, param)
        shard = state.shard_now(param)
        payload = state.current_payload(shard.data, param)
    if state.scales is None:
        raise AssertionError(f"{state.fqn}: no scales of a weight that was just looked at")
    return gathered_weight(payload, state.scales, torch.Size(shard.size), dtype)


def _report(by: str, states: list[WeightState], amaxes: torch.Tensor, ends: list[int]) -> None:
    """See `finite.report`. `by`: what tells it, as one step may look in several places."""
    last = states[0].finite.get(by)
    states[0].finite[by] = finite.report([state.fqn for state in states], amaxes, ends, last)


def _report_exponents(states: list[WeightState]) -> None:
    """Report those whose exponents are exchanged: 255 is NaN and 254 an amax of Inf."""
    found = [s for s in states if s.scales and s.scales[0].dtype == torch.uint8]
    if found and not finite.was_reported():
        largest = torch.stack([s.scales[0].max() for s in found if s.scales])
        amaxes = torch.where(largest >= 254, torch.inf, 0.0)
        _report("exponents", found, amaxes, list(range(1, len(found) + 1)))
