"""What precompute keeps from step to step gives what it would give if made anew, and is made anew
where it must be.
"""

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import fp8dist
from fp8dist import kernels, precompute, precompute_float8_dynamic_scale_for_fsdp
from fp8dist.config import RECIPES
from fp8dist.precompute import CastPass, ScalePass
from fp8dist.shard import Shard, empty_scales, payload_columns
from fp8dist.tensors.weight_state import WeightState
from tests.unit.shards import CPU, TENSORWISE, Group, K, N, grid, hp_weight, whole

CUTS = [((1, 0), (1, 0)), ((2, 0), (1, 0)), ((3, 0), (2, 0)), ((2, 1), (2, 1))]

# --- a pass


def passes_for(shards: list[Shard]) -> tuple[ScalePass, CastPass]:
    """By rows shards are cast in the first pass, the others in the second."""
    payloads = [
        torch.zeros(shard.largest[0], payload_columns(shard), dtype=torch.uint8) for shard in shards
    ]
    scales = [empty_scales(shard, CPU) for shard in shards]
    in_pass = [p if s.cast_by_rows else None for s, p in zip(shards, payloads, strict=True)]
    scale_pass = ScalePass(shards, scales, in_pass, CPU)
    rest = [i for i, payload in enumerate(in_pass) if payload is None]
    of_rest = ([of_each[i] for i in rest] for of_each in (shards, scales, payloads))
    return scale_pass, CastPass(*of_rest) if rest else mock.Mock(payloads=[])


def found_by(scale_pass: ScalePass, cast_pass: CastPass) -> list[torch.Tensor]:
    amaxes = scale_pass.run([Group(1)])
    cast_pass.run()
    payloads = [p for p in (*scale_pass.payloads, *cast_pass.payloads) if p is not None]
    return [*sum(scale_pass.scales, []), *payloads, amaxes]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("fsdp", "tp"), CUTS)
def test_what_runs_again_takes_the_weights_as_they_are_then(
    name: str, fsdp: tuple[int, int], tp: tuple[int, int]
) -> None:
    """Smaller ones, of which nothing larger may be left; the last rank's shard."""
    weight, other = hp_weight(256, 512), hp_weight()
    others = [whole(other, recipe) for recipe in (TENSORWISE, RECIPES["rowwise"], TENSORWISE)]
    shards = [others[0], grid(weight, RECIPES[name], fsdp, tp)[-1], *others[1:]]
    kept = passes_for(shards)
    before = [x.clone() for x in found_by(*kept)]
    weight.copy_(hp_weight(256, 512, seed=1) / 1000)
    other.copy_(hp_weight(seed=1) / 1000)
    again = found_by(*kept)
    anew = found_by(*passes_for(shards))
    assert len(again) == len(anew) > 0
    for old, found, expected in zip(before, again, anew, strict=True):
        assert torch.equal(found, expected) and not torch.equal(found, old)


def test_a_pass_is_for_the_same_tensors_in_the_same_place() -> None:
    weights = [hp_weight(seed=i) for i in range(2)]
    shards = [whole(weight, RECIPES["rowwise"]) for weight in weights]
    scales = [empty_scales(shard, CPU) for shard in shards]
    payloads = [torch.zeros(N, K, dtype=torch.uint8) for _ in shards]
    scale_pass = ScalePass(shards, scales, payloads, CPU)

    def is_still(**others: Any) -> bool:
        mine = {"shards": shards, "scales": scales, "payloads": payloads, "device": CPU}
        return scale_pass.is_for(**{**mine, **others})

    assert is_still() and is_still(shards=list(shards))
    assert not is_still(shards=shards[:1], scales=scales[:1], payloads=payloads[:1])
    assert not is_still(shards=[shards[0], whole(weights[1], RECIPES["rowwise"])])
    assert not is_still(scales=[scales[0], list(scales[1])])
    assert not is_still(scales=[scales[0], None])
    assert not is_still(payloads=[payloads[0], payloads[1].clone()])
    assert not is_still(payloads=[payloads[0], None])
    assert not is_still(device=torch.device("meta"))
    square = whole(hp_weight(64, 64))
    of_square = ScalePass([square], [empty_scales(square, CPU)], [None], CPU)
    square.data.t_()
    assert not of_square.is_for([square], of_square.scales, [None], CPU)
    for moved in (shards[1].data, payloads[1]):
        place = moved.untyped_storage()
        moved.set_(moved.clone())
        assert not is_still()
        moved.set_(place, 0, moved.shape, moved.stride())
        assert is_still()


@pytest.mark.parametrize("name", ["rowwise", "blockwise", "mxfp8_rceil"])
@pytest.mark.parametrize(("fsdp", "tp"), [((1, 0), (1, 0)), ((5, 0), (2, 0))])
def test_buffers_have_memory_only_while_a_pass_runs(
    name: str, fsdp: tuple[int, int], tp: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = passes_for(grid(hp_weight(256, 256), RECIPES[name], fsdp, tp)[:1])
    buffers = list(kept[0]._buffers)
    if isinstance(kept[1], CastPass):
        buffers.append(kept[1]._buffer)

    def memory() -> list[int]:
        return [buffer.whole.untyped_storage().nbytes() for buffer in buffers]

    during = []
    all_reduce = precompute.all_reduce_amaxes
    monkeypatch.setattr(
        precompute, "all_reduce_amaxes", lambda *x: (during.append(memory()), all_reduce(*x))
    )
    for _ in range(2):
        assert sum(memory()) == 0
        found_by(*kept)
    assert sum(memory()) == 0
    exchanged = name != "mxfp8_rceil" or fsdp[0] > 1
    assert [sum(each) > 0 for each in during] == 2 * [True] * exchanged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_the_default_dtype_does_not_matter(name: str, dtype: torch.dtype) -> None:
    shards = [grid(hp_weight(256, 512), RECIPES[name], *cuts)[0] for cuts in CUTS]
    expected = found_by(*passes_for(shards))
    torch.set_default_dtype(dtype)
    try:
        found = found_by(*passes_for(shards))
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_packed_shard_tells_whether_it_is_finite(bad: float) -> None:
    weights = [hp_weight(seed=i) for i in range(3)]
    shards = [whole(weight, RECIPES["mxfp8_rceil"]) for weight in weights]
    payloads = [torch.zeros(N, payload_columns(shard), dtype=torch.uint8) for shard in shards]
    cast_pass = CastPass(shards, [[], [], []], payloads)
    for i, j in ((1, 40), (2, 0)):
        cast_pass.run()
        assert cast_pass.not_finite.tolist() == [0, 0, 0]
        kept, weights[i][7, j] = weights[i][7, j].item(), bad
        cast_pass.run()
        assert cast_pass.not_finite.tolist() == [math.inf if k == i else 0 for k in range(3)]
        weights[i][7, j] = kept


# --- of a model


KINDS = {
    **{name: [name] for name in RECIPES},
    "mixed": ["tensorwise", "rowwise", "rowwise_with_gw_hp", "mxfp8_rceil"],
}


class Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def calls_of_a_run(shards: list[Shard]) -> int:
    scale_pass, cast_pass = passes_for(shards)
    found_by(scale_pass, cast_pass)
    with Count() as count:
        found_by(scale_pass, cast_pass)
    return count.calls


@pytest.mark.parametrize(
    ("kind", "fsdp", "tp"),
    [
        (kind, *cuts)
        for kind in KINDS
        for cuts in CUTS[:3]
        # Exponents that are exchanged, of shards that are uneven, take some for each weight.
        if cuts[0][0] != 3 or not any(RECIPES[name].scale_format == "e8m0" for name in KINDS[kind])
    ],
)
def test_a_run_calls_no_more_for_more_weights(
    kind: str, fsdp: tuple[int, int], tp: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What launches kernels, and works on each weight on a CPU, is left out."""
    for name in ("prepare_fill_amaxes", "prepare_cast_into", "prepare_pack_into"):
        monkeypatch.setattr(kernels, name, lambda parts: kernels.Prepared(parts, []))
    counts = []
    for times in (1, 3):
        shards = [
            grid(hp_weight(256, 512), RECIPES[name], fsdp, tp)[0]
            for name in times * 2 * KINDS[kind]
        ]
        counts.append(calls_of_a_run(shards))
    assert counts[0] == counts[1] > 0


def test_a_step_calls_no_more_for_more_weights(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("prepare_fill_amaxes", "prepare_cast_into", "prepare_pack_into"):
        monkeypatch.setattr(kernels, name, lambda parts: kernels.Prepared(parts, []))
    counts = []
    for weights in (2, 9):
        layers = [nn.Linear(256, 128, bias=False) for _ in range(weights)]
        model = fp8dist.convert_to_float8_training(nn.Sequential(*layers))
        fully_shard(model, mesh=mesh)
        precompute_float8_dynamic_scale_for_fsdp(model)
        with Count() as count:
            precompute_float8_dynamic_scale_for_fsdp(model)
        counts.append(count.calls)
    assert counts[0] == counts[1] > 0


def sharded(mesh: DeviceMesh) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
    fp8dist.convert_to_float8_training(model)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(5, 32)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def check_current(model: nn.Module) -> None:
    """Scales and payloads are those of the weights, by the definition of tensorwise scaling."""
    for layer in (model[0], model[2]):
        shard, state = layer.weight._local_tensor._tensor, layer.weight_state
        scale = torch.tensor(448 / shard.abs().max().item())
        assert state.scales[0][1].item() == scale.item()
        expected = (shard * scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        assert torch.equal(state.payload, expected)


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
    model[0](torch.randn(5, 32))


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
    model(torch.randn(5, 32)).sum().backward()
    precompute_float8_dynamic_scale_for_fsdp(model)
    old = [weakref.ref(model[i].weight._local_tensor._tensor) for i in (0, 2)]
    if replaced:
        copies = {name: x.detach().clone() for name, x in model.state_dict().items()}
        model.load_state_dict(copies, assign=True)
        model(torch.randn(5, 32))
        precompute_float8_dynamic_scale_for_fsdp(model)
        gc.collect()
    assert [ref() is None for ref in old] == [replaced, replaced]
    passes = [model[i].weight_state.scale_pass for i in (0, 2)]
    assert passes[0] is not None and passes[1] is None


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
