"""On a GPU: transposes, and those to other scales, of every byte, in words and where none fit."""

import pytest
import torch

from fp8dist import kernels, numerics
from fp8dist.config import COLUMN, ROW, TENSOR
from fp8dist.numerics import Scaled
from tests.unit.kernels.contents import assert_same_bytes

pytest.importorskip("triton", reason="needs Triton")
if not torch.backends.cuda.is_built():
    pytest.skip("needs torch built for GPUs", allow_module_level=True)

from fp8dist.kernels import launch  # noqa: E402  # where there is Triton

pytestmark = pytest.mark.gpu

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# (M, N): whole tiles, parts of one in either direction, less than one, and no words.
SHAPES = [(256, 384), (132, 260), (4, 8), (128, 4), (130, 256), (256, 130), (7, 5)]


def every_byte(shape: tuple[int, int]) -> torch.Tensor:
    """Each of the 256, NaNs among them, in rows that begin with different ones."""
    rows, columns = (torch.arange(size, device="cuda") for size in shape)
    return (rows[:, None] * 37 + columns).to(torch.uint8)


def powers_of_two(shape: tuple[int, int]) -> torch.Tensor:
    """From 2^-119 to 2^119, and of an infinite amax 0, and NaN."""
    numbers = torch.arange(shape[0] * shape[1], device="cuda", dtype=torch.float32)
    scales = torch.exp2(numbers * 17 % 239 - 119)
    scales[7::31], scales[11::41] = 0, torch.nan
    return scales.view(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_transposed(shape: tuple[int, int]) -> None:
    x = every_byte(shape)
    assert kernels.ops._transpose(x, None, None, None).equal(x.t())


@pytest.mark.parametrize("block", [COLUMN, TENSOR], ids=["column", "tensor"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_other_scales_are_those_of_the_reference(
    shape: tuple[int, int], dtype: torch.dtype, block: tuple[int, int]
) -> None:
    x, scale = every_byte(shape).view(dtype), powers_of_two((shape[0], 1))
    one = torch.full((1, 1), 2.0**-9, device="cuda")
    new_scale = one if block == TENSOR else powers_of_two((1, shape[1]))
    for inverse in (None, scale.reciprocal()):
        weight = Scaled(x, scale, ROW, inverse)
        found = kernels.rescale_transposed(weight, block, new_scale, "power_of_2")
        expected = numerics.rescale_transposed(weight, block, new_scale, "power_of_2")
        assert_same_bytes(found.data, expected.data)
        assert found.data.is_contiguous() and found.block == expected.block


def test_views_are_taken_as_they_are() -> None:
    """Of rows that are further apart, that begin within a word, and of columns."""
    whole = every_byte((256, 640))
    for x in (whole[:, 128:640], whole[::2], whole[:, 4:132], whole[:, 3:131], whole.t()):
        scale, new_scale = powers_of_two((x.size(0), 1)), powers_of_two((1, x.size(1)))
        assert kernels.ops._transpose(x, None, None, None).equal(x.t())
        wide = scale.expand(-1, 3).contiguous()[:, :1]  # as some are laid out
        arguments = (COLUMN, new_scale, "power_of_2")
        for weight in (Scaled(x.view(E4M3), scale, ROW), Scaled(x.view(E4M3), wide, ROW, 1 / wide)):
            found = kernels.rescale_transposed(weight, *arguments)
            assert_same_bytes(found.data, numerics.rescale_transposed(weight, *arguments).data)


def test_what_is_in_words_is_transposed_by_the_kernel() -> None:
    """And what cannot be, and scales that are not of rows, by the reference."""
    whole = every_byte((256, 640))
    in_fours = [launch.in_fours(x) for x in (whole, whole[:, 4:132], whole[:, 3:131], whole.t())]
    assert in_fours == [True, True, False, False]
    assert [launch.in_fours(every_byte(shape)) for shape in SHAPES] == 4 * [True] + 3 * [False]
    x, by_row, by_column = whole.view(E4M3), powers_of_two((256, 1)), powers_of_two((1, 640))
    one = torch.ones(1, 1, device="cuda")
    assert launch.can_shift(x, by_row, by_column) and launch.can_shift(x, by_row, one)
    assert not launch.can_shift(x.view(E5M2), by_row, one)
    assert not launch.can_shift(x[:, 3:131], by_row, one)
    assert not launch.can_shift(x, one, one) and not launch.can_shift(x, by_row, by_row)
    assert not launch.can_shift(x, by_row, by_column.repeat_interleave(2, 1)[:, ::2])
