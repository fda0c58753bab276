"""`Float8Tensor`: the value it stands for, and what may be done to it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
from torchao.float8.float8_training_tensor import LinearMMConfig

from fp8dist.tensors.float8_tensor import Float8Tensor

N, K = 48, 32


def hp_weight() -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0))


def float8_weight(dtype: torch.dtype = torch.float32) -> Float8Tensor:
    scale = 448 / hp_weight().abs().max().view(1, 1)
    data = (hp_weight() * scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return Float8Tensor(data, with_inverse(scale), torch.Size((N, K)), dtype)


def with_inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.stack([scale.reciprocal(), scale])


def value(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What it stands for: data / scale, rounded once to float32 and once to dtype."""
    weight = float8_weight()
    return (weight._data.double() / weight._scales[1].double()).float().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_looks_like_a_tensor_of_its_dtype(dtype: torch.dtype) -> None:
    weight = float8_weight(dtype)
    assert weight.dtype == dtype
    assert weight.shape == (N, K)
    assert weight.stride() == (K, 1)
    assert weight.device == weight._data.device
    assert weight.is_contiguous()
    assert not weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize_is_the_value(dtype: torch.dtype) -> None:
    found = float8_weight(dtype).dequantize()
    assert type(found) is torch.Tensor
    assert found.dtype == dtype
    assert torch.equal(found, value(dtype))


def test_dequantize_is_torchaos() -> None:
    theirs = hp_tensor_to_float8_dynamic(hp_weight(), torch.float8_e4m3fn, LinearMMConfig())
    scales = with_inverse(theirs._scale.view(1, 1))
    ours = Float8Tensor(theirs._data, scales, theirs.shape, torch.float32)
    assert torch.equal(ours.dequantize(), theirs.to_original_precision())


@pytest.mark.parametrize("block", [(1, K), (N, 1), (16, 16)], ids=str)
def test_scales_of_blocks_are_spread_over_them(block: tuple[int, int]) -> None:
    scale = torch.rand(N // block[0], K // block[1]) + 0.5
    data = float8_weight()._data
    spread = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    weight = Float8Tensor(data, with_inverse(scale), torch.Size((N, K)), torch.float32)
    found = weight.dequantize()
    assert torch.equal(found, (data.double() / spread.double()).float())


SIZE_OPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros_like": torch.zeros_like,
    "ones_like": lambda w: torch.ones_like(w, dtype=torch.float64),
    "zeros_like elsewhere": lambda w: torch.zeros_like(w, device="meta"),
    "full_like": lambda w: torch.full_like(w, 3.0),
    "empty_like": lambda w: torch.empty_like(w).zero_(),
    "new_zeros": lambda w: w.new_zeros(3, 5),
    "new_ones": lambda w: w.new_ones((2,), dtype=torch.int32),
    "new_full": lambda w: w.new_full((2, 2), 7.0),
    "new_empty": lambda w: w.new_empty(0, 4),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("op", SIZE_OPS.values(), ids=SIZE_OPS)
def test_what_looks_at_no_value_works_when_the_data_is_freed(
    op: Callable[[torch.Tensor], torch.Tensor], inference: bool
) -> None:
    weight = float8_weight(torch.bfloat16)
    weight._data.untyped_storage().resize_(0)
    with torch.inference_mode(inference):
        found, expected = op(weight), op(value(torch.bfloat16))
    assert type(found) is torch.Tensor
    assert (found.dtype, found.device, found.stride()) == (
        expected.dtype,
        expected.device,
        expected.stride(),
    )
    assert found.is_meta or torch.equal(found, expected)


OPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "add": lambda w: w + 1,
    "multiply by itself": lambda w: w * w,
    "sum": lambda w: w.sum(),
    "norm": lambda w: w.norm(),
    "isnan": lambda w: w.isnan(),
    "index": lambda w: w[3],
    "slice": lambda w: w[:, 4:8],
    "transpose": lambda w: w.t(),
    "flatten": lambda w: w.flatten(),
    "to float64": lambda w: w.double(),
    "clone": lambda w: w.clone(),
    "matmul": lambda w: torch.ones(4, N) @ w,
    "linear": lambda w: nn.functional.linear(torch.ones(4, K), w),
    "in a list": lambda w: torch.cat([w, torch.zeros(1, K), w]),
    "as a keyword": lambda w: torch.add(input=torch.ones(N, K), other=w),
    "new_zeros": lambda w: w.new_zeros(3),
    "zeros_like": torch.zeros_like,
    "view as another shape": lambda w: w.view(K, N),
}


@pytest.mark.parametrize("name", OPS)
def test_other_ops_see_the_value_and_give_plain_tensors(name: str) -> None:
    found, expected = OPS[name](float8_weight()), OPS[name](value())
    assert type(found) is torch.Tensor
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "same",
    [
        lambda w: w.detach(),
        lambda w: w.view(N, K),
        lambda w: w.view_as(w),
        lambda w: w.as_strided((N, K), (K, 1)),
        lambda w: torch.ops.aten.alias(w),
        lambda w: nn.Parameter(w),
        lambda w: nn.Parameter(w, requires_grad=False),
    ],
    ids=["detach", "view", "view_as", "as_strided", "alias", "parameter", "frozen parameter"],
)
def test_passing_it_along_keeps_the_float8_data(
    same: Callable[[torch.Tensor], Float8Tensor],
) -> None:
    weight = float8_weight(torch.bfloat16)
    found = same(weight)
    assert isinstance(found, Float8Tensor)
    assert found.dtype == torch.bfloat16
    assert found._scales is weight._scales
    assert found._data.data_ptr() == weight._data.data_ptr()
    assert torch.equal(found.dequantize(), value(torch.bfloat16))


def test_a_view_sees_data_that_arrives_later() -> None:
    """Autograd saves the weight in forward; FSDP2 refills its storage before backward."""
    weight = float8_weight()
    saved = weight.detach()
    weight._data.view(torch.uint8).zero_()
    assert saved.dequantize().eq(0).all()


def test_gradients_are_plain_and_of_its_dtype() -> None:
    weight = nn.Parameter(float8_weight(torch.bfloat16))
    (weight * 3).sum().backward()
    assert type(weight.grad) is torch.Tensor
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.eq(3).all()


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1),
        lambda w: w.zero_(),
        lambda w: w.copy_(torch.zeros(N, K)),
        lambda w: w.fill_(2.0),
        lambda w: w.__setitem__(slice(None), 0.0),
        lambda w: torch._foreach_mul_([w], 2.0),
        lambda w: torch.add(torch.ones(N, K), 1, out=w),
        lambda w: nn.init.zeros_(w),
    ],
    ids=["add_", "zero_", "copy_", "fill_", "setitem", "foreach", "out", "init"],
)
def test_writing_to_it_is_refused(write: Callable[[torch.Tensor], object]) -> None:
    """The value would go into a dequantized copy and be lost."""
    weight = float8_weight()
    with pytest.raises(AssertionError, match="edit the sharded parameter"):
        write(weight)
    assert torch.equal(weight.dequantize(), value())


def test_it_may_be_written_from() -> None:
    target = torch.empty(N, K)
    target.copy_(float8_weight())
    assert torch.equal(target, value())


def test_flatten_and_unflatten() -> None:
    weight = float8_weight(torch.bfloat16)
    names, meta = weight.__tensor_flatten__()
    assert hash(meta) == hash(weight.__tensor_flatten__()[1]), "compiled code is keyed by it"
    inner = {name: getattr(weight, name) for name in names}
    assert set(inner) == {"_data", "_scales"}
    again = Float8Tensor.__tensor_unflatten__(inner, meta, weight.shape, weight.stride())
    assert again.dtype == torch.bfloat16
    assert again._data is weight._data
    assert again._scales is weight._scales


def test_repr() -> None:
    assert repr(float8_weight(torch.bfloat16)) == (
        "Float8Tensor(shape=(48, 32), dtype=torch.bfloat16)"
    )
