"""amaxes -> one all-reduce -> scales -> payloads, on plain tensors."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchao.float8.config import ScalingGranularity
from torchao.float8.float8_utils import tensor_to_scale

from fp8dist import numerics, precompute
from fp8dist.config import RECIPES
from fp8dist.precompute import CastPass
from fp8dist.shard import Shard, payload_columns
from tests.unit.shards import CPU, TENSORWISE, Group, K, N, grid, hp_weight, part, run_pass, whole


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the other rank holds; it reduces as gloo does, which loses a float NaN."""
    other: dict[str, Any] = {"amaxes": None, "calls": 0}

    def all_reduce(tensor: torch.Tensor, op: Any, group: Any) -> None:
        assert op == dist.ReduceOp.MAX
        other["calls"] += 1
        theirs = other["amaxes"].view(tensor.dtype)
        larger = torch.fmax if tensor.is_floating_point() else torch.maximum
        tensor.copy_(larger(tensor, theirs))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return other


def test_all_reduce_takes_the_largest_and_keeps_nan(peer: dict[str, Any]) -> None:
    nan, inf = math.nan, math.inf
    ours = torch.tensor([1.0, 2.0, 0.0, nan, 3.0, inf, 1e-40, inf, 0.0])
    peer["amaxes"] = torch.tensor([2.0, 1.0, 0.0, 3.0, nan, 1.0, 1e-39, nan, 5.0])
    expected = torch.tensor([2.0, 2.0, 0.0, nan, nan, inf, 1e-39, nan, 5.0])
    precompute.all_reduce_amaxes(ours, Group(2))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    assert peer["calls"] == 1


def test_a_group_of_one_communicates_nothing(peer: dict[str, Any]) -> None:
    amaxes = torch.tensor([1.0, math.nan])
    precompute.all_reduce_amaxes(amaxes, Group(1))
    assert peer["calls"] == 0
    assert amaxes[0] == 1


def compute(
    shards: list[Shard], device: torch.device = CPU
) -> tuple[list[list[torch.Tensor]], torch.Tensor, list[int]]:
    """As `run_pass`, without the reciprocals, which are checked here."""
    scales, amaxes, ends = run_pass(shards, [Group(1)], device=device)
    for inverse, scale in sum(scales, []):
        torch.testing.assert_close(inverse, 1 / scale, rtol=0, atol=0, equal_nan=True)
    return [[scale for _, scale in of_weight] for of_weight in scales], amaxes, ends


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensorwise_scales_are_torchaos(dtype: torch.dtype) -> None:
    weights = [hp_weight(seed=i).to(dtype) * (i + 1) for i in range(3)]
    weights += [torch.zeros(16, 16, dtype=dtype), torch.full((16, 16), math.nan, dtype=dtype)]
    scales, amaxes, ends = compute([whole(weight) for weight in weights])
    assert ends == [1, 2, 3, 4, 5]
    assert amaxes.dtype == torch.float32
    assert amaxes[:4].tolist() == [weight.abs().max().item() for weight in weights[:4]]
    for (scale,), weight in zip(scales, weights, strict=True):
        assert scale.shape == (1, 1)
        assert scale.dtype == torch.float32
        expected = tensor_to_scale(weight, torch.float8_e4m3fn).view(1, 1)
        torch.testing.assert_close(scale, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("empty", [(0,), (1,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_an_empty_shard_counts_as_zeros(empty: tuple[int, ...]) -> None:
    weights = [hp_weight(seed=i) for i in range(3)]
    shards = [part(w, slice(48, 48) if i in empty else slice(0, 48)) for i, w in enumerate(weights)]
    expected = [0.0 if i in empty else w.abs().max().item() for i, w in enumerate(weights)]
    assert compute(shards)[1].tolist() == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_amaxes_keep_what_is_not_finite(bad: float) -> None:
    weights = [hp_weight(seed=i) for i in range(3)]
    weights[1][0, 3] = bad
    amaxes = compute([whole(weight) for weight in weights])[1]
    assert amaxes[[0, 2]].isfinite().all()
    assert str(amaxes[1].item()) == str(abs(bad))


def test_rowwise_scales_are_those_of_rows_and_columns() -> None:
    weight = hp_weight()
    ((rows, columns),), _, ends = compute([whole(weight, RECIPES["rowwise"])])
    assert ends == [N + K]
    assert (rows.shape, columns.shape) == ((N, 1), (1, K))
    for scale, dim in ((rows, 1), (columns, 0)):
        expected = tensor_to_scale(
            weight,
            torch.float8_e4m3fn,
            scaling_granularity=ScalingGranularity.AXISWISE,
            axiswise_dim=dim,
            round_scales_to_power_of_2=True,
        )
        assert torch.equal(scale, expected)


@pytest.mark.parametrize("cuts", [(0, 24, 48), (0, 20, 40, 48), (0, 48, 48), (0, 1, 48)], ids=str)
@pytest.mark.parametrize("name", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_the_largest_over_the_shards_is_that_of_the_weight(
    name: str, cuts: tuple[int, ...]
) -> None:
    """However the rows are cut: what MAX over the ranks completes."""
    weight, recipe = hp_weight(), RECIPES[name]
    parts = [
        compute([part(weight, slice(*cut), recipe)])[1] for cut in zip(cuts, cuts[1:], strict=False)
    ]
    expected = compute([whole(weight, recipe)])[1]
    assert torch.equal(torch.stack(parts).amax(0), expected)


@pytest.mark.parametrize("cuts", [(0, 128, 256), (0, 100, 200, 256), (0, 1, 256)], ids=str)
def test_blocks_that_are_cut_are_completed_by_the_other_shards(cuts: tuple[int, ...]) -> None:
    weight, recipe = hp_weight(256, 256), RECIPES["blockwise"]
    blocks = [[weight[i : i + 128, j : j + 128] for j in (0, 128)] for i in (0, 128)]
    expected = [block.abs().max().item() for row in blocks for block in row]
    parts = [
        compute([part(weight, slice(*cut), recipe)])[1] for cut in zip(cuts, cuts[1:], strict=False)
    ]
    assert torch.stack(parts).amax(0).tolist() == expected


def test_recipes_of_several_scale_formats_share_one_pass() -> None:
    weight = hp_weight()
    shards = [whole(weight), whole(weight, RECIPES["rowwise"])]
    together, amaxes, ends = compute(shards)
    assert ends == [1, 1 + N + K] and amaxes.numel() == ends[-1]
    for found, shard in zip(together, shards, strict=True):
        ((*alone,),), _, _ = compute([shard])
        for one, other in zip(found, alone, strict=True):
            assert torch.equal(one, other)


def test_one_all_reduce_for_all_weights(peer: dict[str, Any]) -> None:
    weights = [hp_weight(seed=i) for i in range(3)]
    peer["amaxes"] = torch.tensor([100.0, 0.0, 200.0])
    scales, amaxes, _ = run_pass([whole(w) for w in weights], [Group(2)])
    assert peer["calls"] == 1
    assert amaxes.tolist() == [100.0, weights[1].abs().max().item(), 200.0]
    assert scales[0][0][1].item() == torch.tensor(448 / 100.0).item()


@pytest.mark.gpu
def test_scales_on_a_gpu_are_those_on_the_cpu() -> None:
    weights = [hp_weight(seed=i).bfloat16() for i in range(3)]
    weights[1][0, 3] = math.nan
    for recipe in (TENSORWISE, RECIPES["rowwise"]):
        on_cpu = compute([whole(weight, recipe) for weight in weights])
        on_gpu = compute([whole(w.cuda(), recipe) for w in weights], torch.device("cuda"))
        torch.testing.assert_close(on_gpu[1].cpu(), on_cpu[1], rtol=0, atol=0, equal_nan=True)
        for gpu, cpu in zip(sum(on_gpu[0], []), sum(on_cpu[0], []), strict=True):
            torch.testing.assert_close(gpu.cpu(), cpu, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [slice(0, 0), slice(0, 1), slice(5, 10), slice(42, 48)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tensorwise", "rowwise"])
def test_cast_payloads_fills_the_rows_of_the_shard_and_no_others(
    name: str, dtype: torch.dtype, rows: slice
) -> None:
    weight, recipe = hp_weight().to(dtype), RECIPES[name]
    scale = torch.rand(N if name == "rowwise" else 1, 1) * 100
    shard = part(weight, rows, recipe)
    assert payload_columns(shard) == K
    payload = torch.full((6, K), 77, dtype=torch.uint8)
    cast_pass = CastPass([shard], [[torch.stack([1 / scale, scale])]], [payload], CPU)
    cast_pass.run()
    assert len(cast_pass._cast.parts) == (rows.start < rows.stop), "an empty one is not launched"
    scaled = (weight.float() * scale)[rows].clamp(-448, 448)
    count = rows.stop - rows.start
    assert torch.equal(payload[:count], scaled.to(torch.float8_e4m3fn).view(torch.uint8))
    assert payload[count:].eq(77).all()


def test_rows_that_are_cut_are_not_cast_by_their_own_scales() -> None:
    shard = Shard(hp_weight()[:, :16], (N, K), (0, 0), (N, 16), RECIPES["rowwise"], world=4)
    with pytest.raises(AssertionError, match=r"rows of a shard of \(48, 64\) are cut"):
        run_pass([shard], [], [torch.zeros(N, 16, dtype=torch.uint8)])


# --- parts of a weight


FSDP_BY_TP = [
    *(((ranks, 0), (2, dim)) for ranks in (1, 2, 3, 5) for dim in (0, 1)),
    ((3, 0), (4, 1)),
    ((2, 1), (2, 0)),
    ((2, 1), (2, 1)),
]


@pytest.mark.parametrize(("fsdp", "tp"), FSDP_BY_TP)
@pytest.mark.parametrize("name", RECIPES)
def test_parts_have_the_scales_and_bytes_of_the_full_weight(
    name: str, fsdp: tuple[int, int], tp: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any number of ranks, which take turns: what all of them contribute is reduced."""
    recipe, weight = RECIPES[name], hp_weight(256, 512)
    weight *= torch.logspace(-3, 2, 256)[:, None] * torch.logspace(1, -1, 512)
    other = hp_weight()  # which tensor parallelism leaves alone
    ranks = [[shard, whole(other, recipe)] for shard in grid(weight, recipe, fsdp, tp)]
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(precompute, "all_reduce_amaxes", lambda flat, _: sent.append(flat.clone()))
    for shards in ranks:
        run_pass(shards, [Group(2)])
    assert len(sent) in (0, len(ranks))
    if sent:
        largest = torch.stack(sent).view(torch.int32).amax(0).view(torch.float32)
        monkeypatch.setattr(precompute, "all_reduce_amaxes", lambda flat, _: flat.copy_(largest))
    for shards in ranks:
        (scales, _), _, _ = run_pass(shards, [Group(2)])
        shard = shards[0]
        rows, columns = (
            slice(start, start + extent)
            for start, extent in zip(shard.part_start, shard.size, strict=True)
        )
        e8m0 = recipe.scale_format == "e8m0"
        blocks = [recipe.weight] if e8m0 else shard.reduced_blocks
        of_part = {}
        for block in blocks:
            scale = numerics.amax_to_scale(
                numerics.amax(weight, block), recipe.weight_dtype, recipe.scale_format
            )
            per_element = numerics.repeat_blocks(scale, weight.shape).expand(weight.shape)
            of_part[block] = per_element[rows, columns]
        assert len(scales) == (0 if shard.packed else len(blocks))
        for found, block in zip(scales, blocks[: len(scales)], strict=True):
            scale = numerics.exponent_to_scale(found[-1]) if e8m0 else found[-1]
            repeated = numerics.repeat_blocks(scale, torch.Size(shard.size)).expand(shard.size)
            assert torch.equal(repeated, of_part[block])
        payload = torch.zeros(shard.largest[0], payload_columns(shard), dtype=torch.uint8)
        CastPass([shard], [scales], [payload], CPU).run()
        mine = tuple(
            slice(start, start + extent)
            for start, extent in zip(shard.start, shard.data.shape, strict=True)
        )
        expected = numerics.cast(shard.data, of_part[recipe.weight][mine], recipe.weight_dtype)
        found_bytes = payload[: shard.data.size(0), : shard.data.size(1)]
        assert torch.equal(found_bytes, expected.view(torch.uint8))
        has_rows = shard.data.size(1) == weight.size(1)
        assert shard.cast_by_rows == (has_rows and recipe.weight == (1, -1))
        if shard.cast_by_rows:
            again = torch.zeros_like(payload)
            run_pass(shards, [Group(2)], [again, None])
            assert torch.equal(again, payload)
