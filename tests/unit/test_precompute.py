"""amaxes -> one all-reduce -> scales -> payloads, on plain tensors."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchao.float8.float8_utils import tensor_to_scale

from fp8dist import precompute
from fp8dist.config import RECIPES, Recipe

CPU = torch.device("cpu")
TENSORWISE = RECIPES["tensorwise"]


def shards(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(16, 32), (1, 8), (7, 3)]
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_local_amaxes(dtype: torch.dtype) -> None:
    found = precompute.local_amaxes(shards(dtype), CPU)
    assert found.dtype == torch.float32
    assert found.tolist() == [max(map(abs, x.flatten().tolist())) for x in shards(dtype)]


def test_local_amaxes_of_several_dtypes() -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    mixed = [x.to(dtype) for x, dtype in zip(shards(), dtypes, strict=True)]
    found = precompute.local_amaxes(mixed, CPU)
    assert found.tolist() == [x.float().abs().max().item() for x in mixed]


@pytest.mark.parametrize("empty", [(0,), (1,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_an_empty_shard_counts_as_zeros(empty: tuple[int, ...]) -> None:
    some = [x[:0] if i in empty else x for i, x in enumerate(shards())]
    expected = [0.0 if i in empty else x.abs().max().item() for i, x in enumerate(shards())]
    assert precompute.local_amaxes(some, CPU).tolist() == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_local_amaxes_keep_what_is_not_finite(bad: float) -> None:
    some = shards()
    some[1][0, 3] = bad
    found = precompute.local_amaxes(some, CPU)
    assert found[[0, 2]].isfinite().all()
    assert str(found[1].item()) == str(abs(bad))


@pytest.mark.gpu
def test_local_amaxes_on_a_gpu_are_those_on_the_cpu() -> None:
    some = shards(torch.bfloat16)
    some[1][0, 3] = math.nan
    some.append(some[0][:0])
    found = precompute.local_amaxes([x.cuda() for x in some], torch.device("cuda"))
    assert found.is_cuda
    assert torch.equal(
        found.cpu().nan_to_num(-1), precompute.local_amaxes(some, CPU).nan_to_num(-1)
    )


class Group:
    """A process group of two, of which the other rank is simulated."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


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


def test_scales_are_torchaos() -> None:
    weights = [*shards(), torch.zeros(3, 3), torch.full((2, 2), math.nan)]
    amaxes = torch.stack([weight.abs().amax() for weight in weights])
    found = precompute.scales_from_amaxes(amaxes, [TENSORWISE] * len(weights))
    assert len(found) == len(weights)
    for scale, weight in zip(found, weights, strict=True):
        assert scale.shape == (1, 1)
        assert scale.dtype == torch.float32
        expected = tensor_to_scale(weight, torch.float8_e4m3fn).view(1, 1)
        torch.testing.assert_close(scale, expected, rtol=0, atol=0, equal_nan=True)


def test_recipes_of_different_weight_dtypes_do_not_mix() -> None:
    other = Recipe(
        **{**vars(TENSORWISE), "name": "e5m2 weights", "weight_dtype": torch.float8_e5m2}
    )
    with pytest.raises(AssertionError, match="one float8 dtype"):
        precompute.scales_from_amaxes(torch.ones(2), [TENSORWISE, other])


@pytest.mark.parametrize("rows", [0, 1, 5, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cast_payload_fills_the_rows_of_the_shard_and_no_others(
    rows: int, dtype: torch.dtype
) -> None:
    shard = torch.randn(rows, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    payload = torch.full((6, 16), 77, dtype=torch.uint8)
    precompute.cast_payload(shard, torch.full((1, 1), 3.0), TENSORWISE, payload)
    expected = (shard.float() * 3).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(payload[:rows], expected)
    assert payload[rows:].eq(77).all()
