"""amax, scale, cast and dequantize, against torchao and against arithmetic done here."""

import math

import pytest
import torch
from torchao.float8.float8_training_tensor import hp_tensor_and_scale_to_float8
from torchao.float8.float8_utils import amax_to_scale as torchao_amax_to_scale
from torchao.float8.float8_utils import tensor_to_scale

from fp8dist import numerics
from fp8dist.config import TENSOR, WHOLE, Block, ScaleFormat

HP_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT8_DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2]
BLOCKS: dict[str, Block] = {
    "tensor": TENSOR,
    "rows": (1, WHOLE),
    "columns": (WHOLE, 1),
    "128x128": (128, 128),
    "1x32": (1, 32),
}
M, N = 256, 384


def blocks_of(shape: tuple[int, int], block: Block) -> list[list[tuple[slice, slice]]]:
    """The elements of each block, as a grid of index pairs."""
    rows, columns = (size if b == WHOLE else b for size, b in zip(shape, block, strict=True))
    return [
        [(slice(i, i + rows), slice(j, j + columns)) for j in range(0, shape[1], columns)]
        for i in range(0, shape[0], rows)
    ]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise equality, which tells -0 from 0; but one NaN is as good as another."""
    as_int = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    nan = a.float().isnan()
    return (
        a.dtype == b.dtype
        and torch.equal(nan, b.float().isnan())
        and torch.equal(a.view(as_int)[~nan], b.view(as_int)[~nan])
    )


def tensor_of(kind: str, dtype: torch.dtype, shape: tuple[int, int] = (48, 64)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    info = torch.finfo(dtype)
    if kind == "wide":  # 48 powers of two, so that the casts end in subnormals and zeros
        x = x * torch.exp2(torch.arange(shape[0]).float() % 48 - 24).view(-1, 1)
    elif kind == "zeros":
        x = torch.zeros(shape)
        x[0, 0] = -0.0
    elif kind == "subnormal":  # in the hp dtype itself
        x = (x * info.smallest_normal / 8).clamp(-info.smallest_normal, info.smallest_normal)
    elif kind == "huge":
        x = (x.double() / x.abs().max() * info.max).to(dtype)
    elif kind == "nan":
        x[3, 5] = math.nan
    elif kind == "inf":
        x[3, 5], x[4, 0] = math.inf, -math.inf
    elif kind == "outlier":
        x[7, 7] = 1e4
    return x.to(dtype)


KINDS = ["normal", "wide", "zeros", "subnormal", "huge", "nan", "inf", "outlier"]


@pytest.mark.parametrize("dtype", HP_DTYPES)
@pytest.mark.parametrize("name", BLOCKS)
def test_amax_of_blocks(name: str, dtype: torch.dtype) -> None:
    x = tensor_of("normal", dtype, (M, N))
    expected = [
        [max(map(abs, x[index].flatten().tolist())) for index in row]
        for row in blocks_of((M, N), BLOCKS[name])
    ]
    found = numerics.amax(x, BLOCKS[name])
    assert found.dtype == dtype
    assert found.tolist() == expected


@pytest.mark.parametrize("name", BLOCKS)
def test_amax_is_nan_where_a_block_has_one(name: str) -> None:
    x = tensor_of("nan", torch.float32, (M, N))
    expected = [
        [bool(x[index].isnan().any()) for index in row] for row in blocks_of((M, N), BLOCKS[name])
    ]
    assert numerics.amax(x, BLOCKS[name]).isnan().tolist() == expected


def test_amax_of_a_negative_extreme() -> None:
    assert numerics.amax(torch.tensor([[1.0, -3.0], [2.0, 0.5]]), TENSOR).tolist() == [[3.0]]


def test_amax_of_a_transposed_view() -> None:
    x = tensor_of("normal", torch.float32, (M, N))
    assert torch.equal(numerics.amax(x.t(), (1, WHOLE)).t(), numerics.amax(x, (WHOLE, 1)))


@pytest.mark.parametrize(
    ("shape", "block", "expected"),
    [
        ((0, 32), TENSOR, (1, 1)),
        ((32, 0), TENSOR, (1, 1)),
        ((0, 32), (1, WHOLE), (0, 1)),
        ((0, 64), (1, 32), (0, 2)),
        ((0, 256), (128, 128), (0, 2)),
    ],
)
def test_amax_of_no_elements(
    shape: tuple[int, int], block: Block, expected: tuple[int, int]
) -> None:
    found = numerics.amax(torch.empty(shape), block)
    assert found.shape == expected
    assert found.eq(0).all()


@pytest.mark.parametrize("scale_format", ["exact", "power_of_2"])
@pytest.mark.parametrize("float8_dtype", FLOAT8_DTYPES)
@pytest.mark.parametrize("dtype", HP_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_quantize_is_bitwise_torchaos(
    kind: str, dtype: torch.dtype, float8_dtype: torch.dtype, scale_format: ScaleFormat
) -> None:
    x = tensor_of(kind, dtype)
    expected_scale = tensor_to_scale(
        x, float8_dtype, round_scales_to_power_of_2=scale_format == "power_of_2"
    )
    expected = hp_tensor_and_scale_to_float8(x, expected_scale, float8_dtype)._data
    data, scale, block, _ = numerics.quantize(x, TENSOR, float8_dtype, scale_format)
    assert block == TENSOR
    assert scale.shape == (1, 1)
    assert same(scale.view(()), expected_scale)
    assert same(data, expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_quantize_treats_every_block_as_a_tensor(name: str) -> None:
    x = tensor_of("wide", torch.float32, (M, N))
    data, scale, *_ = numerics.quantize(x, BLOCKS[name], torch.float8_e4m3fn, "exact")
    for i, row in enumerate(blocks_of((M, N), BLOCKS[name])):
        for j, index in enumerate(row):
            expected_scale = tensor_to_scale(x[index], torch.float8_e4m3fn)
            expected = hp_tensor_and_scale_to_float8(x[index], expected_scale, torch.float8_e4m3fn)
            assert scale[i, j] == expected_scale
            assert same(data[index], expected._data)


@pytest.mark.parametrize("float8_dtype", FLOAT8_DTYPES)
def test_scale_takes_the_largest_element_to_float8_max(float8_dtype: torch.dtype) -> None:
    float8_max = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}[float8_dtype]
    amax = torch.tensor([0.5, 3.0, 1e-30, 0.0, math.inf, math.nan, 7e-5])
    # 1e-12 stands in for what is smaller. Python's floats are float64; `tensor` rounds once more.
    expected = torch.tensor(
        [
            float8_max / 0.5,
            float8_max / 3.0,
            float8_max / 1e-12,
            float8_max / 1e-12,
            0.0,
            math.nan,
            float8_max / float(amax[-1]),
        ]
    )
    assert same(numerics.amax_to_scale(amax, float8_dtype, "exact"), expected)


@pytest.mark.parametrize("dtype", HP_DTYPES)
def test_scale_is_float32_whatever_the_amaxes_are(dtype: torch.dtype) -> None:
    amax = torch.tensor([[0.5], [2.0]], dtype=dtype)
    scale = numerics.amax_to_scale(amax, torch.float8_e4m3fn, "exact")
    assert scale.dtype == torch.float32
    assert scale.tolist() == [[896.0], [224.0]]


def test_power_of_2_scales_are_rounded_down() -> None:
    amax = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 100
    exact = [448.0 / a for a in amax.tolist()]
    # frexp gives m * 2**e with m in [0.5, 1): the power of two below is 2**(e - 1).
    expected = [2.0 ** (math.frexp(scale)[1] - 1) for scale in exact]
    found = numerics.amax_to_scale(amax, torch.float8_e4m3fn, "power_of_2")
    assert found.tolist() == expected


def test_power_of_2_scales_that_are_powers_already_stay() -> None:
    exponents = range(-100, 30)
    amax = torch.tensor([448.0 * 2.0**-e for e in exponents], dtype=torch.float64)
    found = numerics.amax_to_scale(amax, torch.float8_e4m3fn, "power_of_2")
    assert found.tolist() == [2.0**e for e in exponents]


def test_power_of_2_scales_just_below_a_power_are_not_rounded_up() -> None:
    """A logarithm in float32 would: that of the largest float below 8 is 3."""
    below = torch.exp2(torch.arange(-20, 20).float()).nextafter(torch.zeros(40))
    amax = 448.0 / below.double()
    assert torch.equal(numerics.amax_to_scale(amax, torch.float8_e4m3fn, "exact"), below)
    found = numerics.amax_to_scale(amax, torch.float8_e4m3fn, "power_of_2")
    assert found.tolist() == [2.0 ** (e - 1) for e in range(-20, 20)]


def test_power_of_2_scales_of_odd_amaxes_are_torchaos() -> None:
    amax = torch.tensor([0.0, math.inf, 1e-30, 3e38])
    assert torch.equal(
        numerics.amax_to_scale(amax, torch.float8_e4m3fn, "power_of_2"),
        torchao_amax_to_scale(amax, torch.float8_e4m3fn, round_scales_to_power_of_2=True),
    )


@pytest.mark.parametrize("float8_dtype", FLOAT8_DTYPES)
def test_e8m0_scales_are_the_largest_powers_of_two_that_do_not_saturate(
    float8_dtype: torch.dtype,
) -> None:
    float8_max = torch.finfo(float8_dtype).max
    amax = torch.cat(
        [
            tensor_of("wide", torch.float32).abs().flatten(),
            float8_max * torch.exp2(torch.arange(-20.0, 20.0)),
        ]
    )
    amax = amax[amax > 0]
    for scale, value in zip(
        numerics.amax_to_scale(amax, float8_dtype, "e8m0").tolist(), amax.tolist(), strict=True
    ):
        assert math.frexp(scale)[0] == 0.5, "a power of two"
        assert value * scale <= float8_max < value * scale * 2


def test_e8m0_scales_of_odd_amaxes() -> None:
    amax = torch.tensor([0.0, 1e-45, math.inf, math.nan, 3.4e38])
    found = numerics.amax_to_scale(amax, torch.float8_e4m3fn, "e8m0").tolist()
    # The range of an 8-bit exponent is 2^-127 to 2^127.
    assert found[:3] == [2.0**127, 2.0**127, 2.0**-127]
    assert math.isnan(found[3])
    assert 3.4e38 * found[4] <= 448 < 3.4e38 * found[4] * 2


def test_e8m0_bytes_are_exponents_of_what_dequantizes() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    scale = numerics.exponent_to_scale(codes)
    # torch's own type of that name: its value is what dequantizes.
    dequantizes = codes.view(torch.float8_e8m0fnu).double()
    assert torch.equal(scale[:255].double(), 1 / dequantizes[:255])
    assert scale[255].isnan() and dequantizes[255].isnan()
    assert torch.equal(numerics.scale_to_exponent(scale), codes)


def float8_values(mantissa_bits: int, bias: int, codes: int) -> list[float]:
    """The non-negative finite values of a float8 format, by its definition, in order of code."""
    values = []
    for code in range(codes):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = mantissa / 2**mantissa_bits
        if exponent == 0:
            values.append(fraction * 2.0 ** (1 - bias))
        else:
            values.append((1 + fraction) * 2.0 ** (exponent - bias))
    return values


@pytest.mark.parametrize(
    ("float8_dtype", "values"),
    [
        # e4m3fn: 0x7F is NaN, all else is finite; e5m2: exponent 31 is Inf and NaN.
        (torch.float8_e4m3fn, float8_values(3, 7, 0x7F)),
        (torch.float8_e5m2, float8_values(2, 15, 31 * 4)),
    ],
)
def test_cast_rounds_to_nearest_even_and_saturates(
    float8_dtype: torch.dtype, values: list[float]
) -> None:
    inputs, expected = [], []
    for code, (low, high) in enumerate(zip(values, values[1:], strict=False)):
        middle = (low + high) / 2  # exact in float32, as the two beside it are
        even = low if code % 2 == 0 else high
        inputs += [low, middle, middle + (high - low) / 1024, middle - (high - low) / 1024]
        expected += [low, even, high, low]
    inputs += [values[-1], values[-1] * 1.001, values[-1] * 8, 3e38]
    expected += [values[-1]] * 4
    x = torch.tensor([inputs, [-value for value in inputs]])
    data = numerics.cast(x, torch.ones(1, 1), float8_dtype)
    assert data.dtype == float8_dtype
    assert torch.equal(data.float(), torch.tensor([expected, [-value for value in expected]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_multiplies_in_float32(dtype: torch.dtype) -> None:
    """Half precision would round x * scale once more before the cast, or overflow."""
    x = tensor_of("normal", dtype, (64, 64))
    scale = torch.tensor([[448 / 3.7]])
    found = numerics.cast(x, scale, torch.float8_e4m3fn)
    assert same(found, (x.float() * scale).clamp(-448, 448).to(torch.float8_e4m3fn))
    rounded_twice = (x * scale.to(dtype)).float().clamp(-448, 448).to(torch.float8_e4m3fn)
    assert not same(found, rounded_twice), "on this input the two orders differ"


def test_cast_keeps_nan_and_saturates_infinity() -> None:
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1.0]])
    found = numerics.cast(x, torch.ones(1, 1), torch.float8_e4m3fn).float()[0]
    assert found[0].isnan()
    assert found[1:].tolist() == [448.0, -448.0, 1.0]


@pytest.mark.parametrize("float8_dtype", FLOAT8_DTYPES)
def test_quantize_of_no_elements(float8_dtype: torch.dtype) -> None:
    data, scale, *_ = numerics.quantize(torch.empty(0, 64), TENSOR, float8_dtype, "exact")
    assert data.shape == (0, 64)
    assert data.dtype == float8_dtype
    assert scale.shape == (1, 1)
    assert scale.isfinite().all()


@pytest.mark.parametrize("name", BLOCKS)
def test_repeat_blocks_broadcasts_every_scale_over_its_block(name: str) -> None:
    grid = blocks_of((M, N), BLOCKS[name])
    scale = torch.arange(1.0, len(grid) * len(grid[0]) + 1).view(len(grid), len(grid[0]))
    spread = numerics.repeat_blocks(scale, torch.Size((M, N))).expand(M, N)
    for i, row in enumerate(grid):
        for j, index in enumerate(row):
            assert spread[index].eq(scale[i, j]).all()


@pytest.mark.parametrize("float8_dtype", FLOAT8_DTYPES)
@pytest.mark.parametrize("name", BLOCKS)
def test_dequantize_divides_by_the_scale_of_the_block(name: str, float8_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(M, N, generator=generator).mul(8).to(float8_dtype)
    grid = blocks_of((M, N), BLOCKS[name])
    scale = torch.rand(len(grid), len(grid[0]), generator=generator) + 0.1
    # The float64 quotient of two float32 numbers, rounded to float32, is the correctly rounded one.
    expected = torch.empty(M, N)
    for i, row in enumerate(grid):
        for j, index in enumerate(row):
            expected[index] = (data[index].double() / scale[i, j].double()).float()
    found = numerics.dequantize(data, scale)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("float8_dtype", "mantissa_bits"), [(torch.float8_e4m3fn, 3), (torch.float8_e5m2, 2)]
)
def test_round_trip_is_within_half_a_unit_in_the_last_place(
    float8_dtype: torch.dtype, mantissa_bits: int
) -> None:
    x = tensor_of("normal", torch.float32, (256, 256))
    data, scale, *_ = numerics.quantize(x, TENSOR, float8_dtype, "exact")
    error = (numerics.dequantize(data, scale) - x).abs()
    # Half a unit is 2^-(mantissa_bits + 1) of the value; below the format's smallest normal number
    # it is half of the smallest subnormal. The factor covers scaling in float32, there and back.
    smallest = torch.finfo(float8_dtype).smallest_normal
    unit = torch.maximum(x.abs(), smallest / scale) * 2.0 ** -(mantissa_bits + 1)
    assert (error <= unit * (1 + 2**-20)).all()
