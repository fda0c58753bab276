"""`Float8Activation`: what ops on tokens, and other ops, make of it; its collectives."""

from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from fp8dist import numerics
from fp8dist.config import RECIPES, TENSOR
from fp8dist.tensors import float8_activation
from fp8dist.tensors.float8_activation import (
    Float8Activation,
    cast_activation,
    gather_activation,
)
from fp8dist.tensors.gathering import Cut

B, S, K = 2, 6, 128
NAMES = ["tensorwise", "rowwise", "blockwise", "mxfp8_rceil"]


@pytest.fixture(scope="module")
def group(mesh: DeviceMesh) -> Iterator[str]:
    yield mesh.get_group().group_name


def hp(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (B, S, K), generator=torch.Generator().manual_seed(0))


def activation(name: str, group: str, x: torch.Tensor | None = None) -> Float8Activation:
    recipe = RECIPES[name]
    args = (recipe.input, recipe.input_dtype, recipe.scale_format, group)
    return cast_activation(hp() if x is None else x, *args)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """As float8: bytes and scales, so dequantized values."""
    assert isinstance(found, Float8Activation)
    assert found.shape == expected.shape
    assert torch.equal(found.dequantize(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_cast_is_that_of_the_reference(name: str, group: str) -> None:
    recipe, flat = RECIPES[name], hp().view(-1, K)
    found = activation(name, group)
    want = numerics.quantize(flat, recipe.input, recipe.input_dtype, recipe.scale_format)
    got = found.scaled()
    assert got.block == want.block
    assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8))
    assert torch.equal(got.scale, want.scale)
    assert (found.dtype, found.shape) == (torch.float32, (B, S, K))
    tokens = found._scale.numel() * found._scale.element_size() / (B * S)
    assert tokens <= {"rowwise": 4, "mxfp8_rceil": K / 32}.get(name, 4), "bytes of a token's scales"


ON_TOKENS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "detach": lambda x: x.detach(),
    "clone": lambda x: x.clone(),
    "flatten tokens": lambda x: x.view(-1, K),
    "reshape": lambda x: x.reshape(B * S, K).reshape(S, B, K),
    "permute": lambda x: x.permute(1, 0, 2),
    "permute and reshape": lambda x: x.view(B, 2, S // 2, K).movedim(1, 0).reshape(2, -1, K),
    "first tokens": lambda x: x[:, :2],
    "narrow": lambda x: x.narrow(1, 2, 3),
    "chunk and cat": lambda x: torch.cat(torch.chunk(x, 3, dim=1), dim=0),
    "split and cat": lambda x: torch.cat(x.split([2, 4], dim=1)[::-1], dim=1),
    "pad": lambda x: torch.nn.functional.pad(x, (0, 0, 0, 3)),
}


@pytest.mark.parametrize("op", ON_TOKENS)
@pytest.mark.parametrize("name", NAMES)
def test_ops_on_tokens_keep_float8(name: str, op: str, group: str) -> None:
    x = activation(name, group)
    same(ON_TOKENS[op](x), ON_TOKENS[op](x.dequantize()))


@pytest.mark.parametrize("op", ON_TOKENS)
def test_what_is_cast_in_both_orientations_stays_so_while_its_tokens_do(
    op: str, group: str
) -> None:
    recipe = RECIPES["tensorwise"]
    args = (recipe.input, recipe.input_dtype, recipe.scale_format, group)
    x = cast_activation(hp(), *args, across=True)
    found = ON_TOKENS[op](x)
    same(found, ON_TOKENS[op](x.dequantize()))
    across = found.transposed()
    assert (across is not None) == (op in ("detach", "clone", "flatten tokens", "reshape"))
    if across is not None:
        data = found.scaled().data
        padded = torch.nn.functional.pad(data.t().view(torch.uint8), (0, 4))
        assert torch.equal(across.data.view(torch.uint8), padded)
        assert torch.equal(across.scale, found.scaled().scale)
    assert torch.equal(numerics.wanted(found.scaled().inverse), 1 / found.scaled().scale)


def test_a_gathered_one_keeps_the_reciprocal_of_its_scale(group: str) -> None:
    recipe = RECIPES["tensorwise"]
    args = (recipe.input, recipe.input_dtype, recipe.scale_format, group)
    cast = cast_activation(hp(), *args, across=True)
    for by_rank in (False, True):
        # gloo gathers bytes only; of one rank there is nothing to gather.
        with (
            mock.patch.object(float8_activation.async_tp, "is_on_for", return_value=by_rank),
            mock.patch.object(float8_activation, "gather_tokens", lambda x, _: x.detach()[:]),
        ):
            gathered = gather_activation(cast, Cut(1, 1, group), None)
        assert gathered._by_rank == by_rank
        assert gathered._inverse is cast._inverse is not None
        assert gathered.transposed() is None  # of other ranks' tokens nothing was transposed


OTHERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "add": lambda x: x + 1,
    "sum of itself": lambda x: (x * x).sum(),
    "cut in features": lambda x: x[..., :7],
    "view of other features": lambda x: x.view(B, S, 2, K // 2),
    "cat with a plain one": lambda x: torch.cat([x, torch.zeros(B, S, K)], dim=1),
    "cat along features": lambda x: torch.cat([x, x], dim=-1),
    "matmul": lambda x: x @ torch.ones(K, 3),
    "to bfloat16": lambda x: x.bfloat16(),
}


@pytest.mark.parametrize("op", OTHERS)
@pytest.mark.parametrize("name", NAMES)
def test_other_ops_see_the_value_and_give_plain_tensors(name: str, op: str, group: str) -> None:
    x = activation(name, group)
    found, expected = OTHERS[op](x), OTHERS[op](x.dequantize())
    assert type(found) is torch.Tensor
    assert torch.equal(found, expected)


def by_rank(x: Float8Activation, group: str) -> Float8Activation:
    """As it arrives from two ranks which have half of dimension 1 each."""
    halves = [
        torch.cat([half.reshape(-1, half.size(-1)) for half in inner.chunk(2, dim=1)])
        for inner in (x._data.view(torch.uint8), x._scale)
        if inner.dim() == 3
    ]
    data, scale = halves if len(halves) == 2 else (halves[0], x._scale)
    cut = Cut(1, 2, group)
    data = data.view(x._data.dtype)
    return Float8Activation(data, scale, x._block, x.dtype, None, cut, x.shape)


@pytest.mark.parametrize("op", [*ON_TOKENS, *OTHERS])
@pytest.mark.parametrize("name", NAMES)
def test_ops_put_tokens_in_order_that_are_kept_by_rank(name: str, op: str, group: str) -> None:
    x = activation(name, group)
    do = (ON_TOKENS | OTHERS)[op]
    found, expected = do(by_rank(x, group)), do(x)
    assert type(found) is type(expected)
    if isinstance(found, Float8Activation):
        found, expected = found.dequantize(), expected.dequantize()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_stay_by_rank_on_their_way_to_a_matmul(name: str, group: str) -> None:
    x = by_rank(activation(name, group), group)
    for same_tokens in (x.detach(), x.view(x.shape), x.view_as(x)):
        assert same_tokens._by_rank
        assert same_tokens.by_rank().shape == (B * S, K)
        assert torch.equal(same_tokens.dequantize(), x.dequantize())
    names, meta = x.__tensor_flatten__()
    inner = {name: getattr(x, name) for name in names}
    again = Float8Activation.__tensor_unflatten__(inner, meta, x.shape, x.stride())
    assert again._by_rank and torch.equal(again.dequantize(), x.dequantize())


def test_two_of_one_scale_each_are_put_together_by_their_values(group: str) -> None:
    one, other = activation("tensorwise", group), activation("tensorwise", group, 100 * hp())
    found = torch.cat([one, other])
    assert torch.equal(found, torch.cat([one.dequantize(), other.dequantize()]))


@pytest.mark.parametrize("name", NAMES)
def test_padding_with_another_value_than_zero_is_of_the_value(name: str, group: str) -> None:
    x = activation(name, group)
    found = torch.nn.functional.pad(x, (0, 0, 0, 3), value=2.0)
    expected = torch.nn.functional.pad(x.dequantize(), (0, 0, 0, 3), value=2.0)
    assert torch.equal(found + 0, expected)


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens(name: str, group: str) -> None:
    assert activation(name, group, torch.empty(B, 0, K)).dequantize().shape == (B, 0, K)


@pytest.mark.parametrize("name", NAMES)
def test_a_gather_moves_bytes(name: str, group: str) -> None:
    """One rank: what is gathered is what was there; what is asked of the group is uint8."""
    x = activation(name, group)
    moved = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "all_gather_into_tensor" in str(func) and type(args[0]) is torch.Tensor:
                moved.append((args[0].dtype, args[0].numel()))
            return func(*args, **(kwargs or {}))

    gathered = funcol.all_gather_tensor(x, 1, dist.group.WORLD)
    same(gathered, x.dequantize())
    with Watch():
        gather = torch.ops._c10d_functional.all_gather_into_tensor.default
        torch.ops._c10d_functional.wait_tensor(x._on_tokens(gather, (1, group), {}))
    scales = [] if x._block == TENSOR else [(x._scale.dtype, x._scale.numel())]
    assert moved == [(torch.uint8, x.numel()), *scales]


@pytest.mark.parametrize("name", NAMES)
def test_dtensor_redistributes_it(name: str, mesh: DeviceMesh, group: str) -> None:
    x = activation(name, group)
    sharded = DTensor.from_local(x, mesh, (Shard(1),), run_check=False)
    same(sharded.redistribute(placements=(Replicate(),)).to_local(), x.dequantize())


def test_flatten_and_unflatten(group: str) -> None:
    x = activation("rowwise", group)
    names, meta = x.__tensor_flatten__()
    assert hash(meta) == hash(x.__tensor_flatten__()[1]), "compiled code is keyed by it"
    inner = {name: getattr(x, name) for name in names}
    same(Float8Activation.__tensor_unflatten__(inner, meta, x.shape, x.stride()), x.dequantize())
    assert repr(x) == "Float8Activation(shape=(2, 6, 128), dtype=torch.float32)"
