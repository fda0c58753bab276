"""A pass that runs again gives what one made anew would, and knows when it would not."""

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from fp8dist import precompute
from fp8dist.config import RECIPES
from fp8dist.precompute import CastPass, ScalePass
from fp8dist.shard import Shard, empty_scales, payload_columns
from tests.unit.calls import Calls, leave_out_kernels
from tests.unit.shards import CPU, TENSORWISE, Group, K, N, grid, hp_weight, whole

CUTS = [((1, 0), (1, 0)), ((2, 0), (1, 0)), ((3, 0), (2, 0)), ((2, 1), (2, 1))]


def passes_for(shards: list[Shard]) -> tuple[ScalePass, CastPass]:
    """By rows shards are cast in the first pass, the others in the second."""
    device = shards[0].data.device
    payloads = [
        torch.zeros(shard.largest[0], payload_columns(shard), dtype=torch.uint8, device=device)
        for shard in shards
    ]
    scales = [empty_scales(shard, device) for shard in shards]
    in_pass = [p if s.cast_by_rows else None for s, p in zip(shards, payloads, strict=True)]
    scale_pass = ScalePass(shards, scales, in_pass, device)
    rest = [i for i, payload in enumerate(in_pass) if payload is None]
    of_rest = ([of_each[i] for i in rest] for of_each in (shards, scales, payloads))
    return scale_pass, CastPass(*of_rest, device) if rest else mock.Mock(payloads=[])


def buffers_of(scale_pass: ScalePass, cast_pass: CastPass) -> list[torch.Tensor]:
    """Which have no memory between runs."""
    found = [buffer.whole for buffer in scale_pass._buffers]
    return [*found, cast_pass._buffer.whole] if isinstance(cast_pass, CastPass) else found


def found_by(scale_pass: ScalePass, cast_pass: CastPass) -> list[torch.Tensor]:
    amaxes = scale_pass.run([Group(1)])
    cast_pass.run()
    payloads = [p for p in (*scale_pass.payloads, *cast_pass.payloads) if p is not None]
    return [*sum(scale_pass.scales, []), *payloads, amaxes]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("fsdp", "tp"), CUTS)
def test_what_runs_again_takes_the_weights_as_they_are_then(
    name: str, fsdp: tuple[int, int], tp: tuple[int, int], device: str
) -> None:
    """Smaller ones, of which nothing larger may be left; the last rank's shard, among whole ones.
    Its buffers are elsewhere then.
    """
    weight, other = hp_weight(256, 512).to(device), hp_weight().to(device)
    recipes = [TENSORWISE, *(RECIPES[other] for other in ("rowwise", "mxfp8_rceil", "tensorwise"))]
    others = [whole(other, recipe) for recipe in recipes]
    shards = [others[0], grid(weight, RECIPES[name], fsdp, tp)[-1], *others[1:]]
    kept = passes_for(shards)
    before = [x.clone() for x in found_by(*kept)]
    in_the_way = [torch.empty_like(buffer) for buffer in buffers_of(*kept)]
    weight.copy_(hp_weight(256, 512, seed=1) / 1000)
    other.copy_(hp_weight(seed=1) / 1000)
    again = found_by(*kept)
    anew = found_by(*passes_for(shards))
    assert len(again) == len(anew) > 0 and in_the_way
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

    def memory() -> list[int]:
        return [buffer.untyped_storage().nbytes() for buffer in buffers_of(*kept)]

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


def test_scales_of_one_launch_are_in_one_place() -> None:
    """Exponents are converted into a buffer that moves, where float32 scales stay."""
    of_words = grid(hp_weight(), RECIPES["mxfp8_rceil"], (5, 0), (1, 0))[0]
    other = whole(hp_weight(), replace(RECIPES["rowwise"], weight=(1, 32)))
    assert of_words.exchanges_words and not other.packed
    with pytest.raises(AssertionError, match="of one launch"):
        passes_for([of_words, other])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_packed_shard_tells_whether_it_is_finite(bad: float) -> None:
    weights = [hp_weight(seed=i) for i in range(3)]
    shards = [whole(weight, RECIPES["mxfp8_rceil"]) for weight in weights]
    payloads = [torch.zeros(N, payload_columns(shard), dtype=torch.uint8) for shard in shards]
    cast_pass = CastPass(shards, [[], [], []], payloads, CPU)
    for i, j in ((1, 40), (2, 0)):
        cast_pass.run()
        assert cast_pass.not_finite.tolist() == [0, 0, 0]
        kept, weights[i][7, j] = weights[i][7, j].item(), bad
        cast_pass.run()
        assert cast_pass.not_finite.tolist() == [math.inf if k == i else 0 for k in range(3)]
        weights[i][7, j] = kept


KINDS = {
    **{name: [name] for name in RECIPES},
    "mixed": ["tensorwise", "rowwise", "rowwise_with_gw_hp", "mxfp8_rceil"],
}


def calls_of_a_run(shards: list[Shard]) -> int:
    scale_pass, cast_pass = passes_for(shards)
    found_by(scale_pass, cast_pass)
    with Calls() as calls:
        found_by(scale_pass, cast_pass)
    return calls.count


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
    leave_out_kernels(monkeypatch)
    counts = []
    for times in (1, 3):
        shards = [
            grid(hp_weight(256, 512), RECIPES[name], fsdp, tp)[0]
            for name in times * 2 * KINDS[kind]
        ]
        counts.append(calls_of_a_run(shards))
    assert counts[0] == counts[1] > 0
