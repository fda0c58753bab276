"""What precompute keeps of a model is kept where it is right, and made anew where it is not."""

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import fp8dist
from fp8dist import numerics, precompute_float8_dynamic_scale_for_fsdp
from fp8dist.precompute import CastPass, ScalePass
from fp8dist.shard import empty_scales
from fp8dist.tensors.weight_state import WeightState
from tests.unit.calls import Calls, leave_out_kernels
from tests.unit.moe import StackedExperts
from tests.unit.sharded_model import INPUT, check_current, sharded, step
from tests.unit.shards import hp_weight, whole


def test_a_step_calls_no_more_for_more_weights(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out_kernels(monkeypatch)
    counts = []
    for weights in (2, 9):
        layers = [nn.Linear(256, 128, bias=False) for _ in range(weights)]
        model = fp8dist.convert_to_float8_training(nn.Sequential(*layers))
        fully_shard(model, mesh=mesh)
        precompute_float8_dynamic_scale_for_fsdp(model)
        with Calls() as calls:
            precompute_float8_dynamic_scale_for_fsdp(model)
        counts.append(calls.count)
    assert counts[0] == counts[1] > 0


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that were made ready."""
    found: list[str] = []
    for kind in (ScalePass, CastPass):

        def make(self: Any, *args: Any, init: Any = kind.__init__, name: str = kind.__name__):
            found.append(name)
            init(self, *args)

        monkeypatch.setattr(kind, "__init__", make)
    return found


def _leave(model: nn.Module) -> None: ...


def _assign(model: nn.Module) -> None:
    local = model[2].weight._local_tensor
    local.data = local._tensor * 2


def _move(model: nn.Module) -> None:
    """What is left behind is not what is cast."""
    inner = model[2].weight._local_tensor._tensor
    inner.set_(inner * 2)


def _drop_payload(model: nn.Module) -> None:
    model[2].weight_state.payload = None


def _use_first_alone(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.mul_(2)
    model[0](INPUT)


def _scales_elsewhere(model: nn.Module) -> None:
    state = model[2].weight_state
    state.scales = [each.to("meta") for each in state.scales]


@pytest.mark.parametrize(
    "change, again",
    [
        (_leave, []),
        (_assign, ["ScalePass", "CastPass"]),
        (_move, ["ScalePass", "CastPass"]),
        (_drop_payload, ["CastPass"]),
        (_scales_elsewhere, ["ScalePass", "CastPass"]),
        (_use_first_alone, []),
    ],
)
def test_passes_are_made_again_where_something_has_moved(
    change: Callable[[nn.Module], None], again: list[str], mesh: DeviceMesh, made: list[str]
) -> None:
    model = sharded(mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        step(model, optimizer)
        precompute_float8_dynamic_scale_for_fsdp(model)
    assert made == 3 * ["ScalePass", "CastPass"], "each weight for its first gather, then both"
    change(model)
    made.clear()
    precompute_float8_dynamic_scale_for_fsdp(model)
    assert made == again
    check_current(model)


def test_experts_that_have_moved_are_found_where_they_are(mesh: DeviceMesh) -> None:
    model = nn.Sequential(OrderedDict(experts=StackedExperts()))
    fp8dist.convert_moe_to_float8_training(model)
    fully_shard(model, mesh=mesh)
    precompute_float8_dynamic_scale_for_fsdp(model)
    state = model.experts.expert_states["w1"]
    before, inner = state.scales[0].clone(), model.experts.w1._local_tensor._tensor
    inner.set_(inner * 2)
    precompute_float8_dynamic_scale_for_fsdp(model)
    assert torch.equal(state.scales[0][1], before[1] / 2)


def test_what_is_made_ready_goes_with_the_model(mesh: DeviceMesh) -> None:
    model = sharded(mesh)
    precompute_float8_dynamic_scale_for_fsdp(model)
    data = weakref.ref(model[2].weight._local_tensor._tensor)
    del model
    gc.collect()
    assert data() is None


@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("replaced", [False, True])
def test_what_was_replaced_is_kept_by_nothing(
    precomputed: bool, replaced: bool, mesh: DeviceMesh
) -> None:
    """By no pass of a weight that was gathered before the first precompute either."""
    model = sharded(mesh)
    if precomputed:
        precompute_float8_dynamic_scale_for_fsdp(model)
    model(INPUT).sum().backward()
    precompute_float8_dynamic_scale_for_fsdp(model)
    old = [weakref.ref(model[i].weight._local_tensor._tensor) for i in (0, 2)]
    if replaced:
        copies = {name: x.detach().clone() for name, x in model.state_dict().items()}
        model.load_state_dict(copies, assign=True)
        model(INPUT)
        passes = [model[0].weight_state.scale_pass, model[0].weight_state.cast_pass]
        assert passes == [None, None], "of weights that are gone"
        precompute_float8_dynamic_scale_for_fsdp(model)
        gc.collect()
    assert [ref() is None for ref in old] == [replaced, replaced]
    passes = [model[i].weight_state.scale_pass for i in (0, 2)]
    assert passes[0] is not None and passes[1] is None


@pytest.mark.parametrize("unsharded", [False, True])
def test_after_a_step_that_failed_scales_are_computed_again(
    unsharded: bool, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New ones, which nothing was written to, are not taken for those of the weight; nor are those
    of a weight that was edited."""
    model = sharded(mesh)
    precompute_float8_dynamic_scale_for_fsdp(model)
    if unsharded:  # which makes scales anew
        model[0].unshard()
        model[2].unshard()
    else:
        with torch.no_grad():
            for i in (0, 2):
                model[i].weight.mul_(2)
    with monkeypatch.context() as patch:
        patch.setattr(numerics, "amax_to_scale", mock.Mock(side_effect=RuntimeError("no")))
        with pytest.raises(RuntimeError, match="no"):
            precompute_float8_dynamic_scale_for_fsdp(model)
    kept = model[0].weight_state.scale_pass
    assert all(buffer.whole.untyped_storage().nbytes() == 0 for buffer in kept._buffers)
    for i in (0, 2):
        model[i].reshard()
        for scales in model[i].weight_state.scales:
            scales.fill_(torch.nan)
    model(INPUT).sum().backward()
    check_current(model)


def test_payloads_that_are_on_their_way_are_waited_for(mesh: DeviceMesh) -> None:
    """From host memory, before they are written to: by the pass that finds amaxes, and the next."""
    model = sharded(mesh)
    precompute_float8_dynamic_scale_for_fsdp(model)
    state: WeightState = model[2].weight_state
    waits: list[str] = []
    state.moving = mock.Mock(synchronize=lambda: waits.append("waited"))
    precompute_float8_dynamic_scale_for_fsdp(model)
    assert waits == ["waited", "waited"]


@pytest.mark.gpu
def test_a_pass_is_for_the_stream_on_which_it_was_made() -> None:
    """On which its tables are."""
    device = torch.device("cuda", torch.cuda.current_device())
    shard = whole(hp_weight().cuda())
    scale_pass = ScalePass([shard], [empty_scales(shard, device)], [None], device)
    same = [shard], scale_pass.scales, [None], device
    assert scale_pass.is_for(*same)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert not scale_pass.is_for(*same)
