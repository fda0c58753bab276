"""On a GPU: transposes, and those to other scales, of every byte, by the kernel they are for."""

import pytest
import torch

from fp8dist import kernels, numerics
from fp8dist.config import COLUMN, ROW, TENSOR
from fp8dist.numerics import Scaled
from tests.unit.kernels.contents import assert_same_bytes
from tests.unit.kernels.launched import launched

pytest.importorskip("triton", reason="needs Triton")
if not torch.backends.cuda.is_built():
    pytest.skip("needs torch built for GPUs", allow_module_level=True)

from fp8dist.kernels import launch  # noqa: E402  # where there is Triton

pytestmark = pytest.mark.gpu

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# (M, N): whole tiles, parts of one in either direction, less than one.
IN_FOURS = [(256, 384), (132, 260), (4, 8), (128, 4)]
IN_BYTES = [(130, 256), (256, 130), (7, 5)]
SHAPES = [*IN_FOURS, *IN_BYTES, (1, 128), (8, 1), (8, 0)]
FOURS, BYTES = ["transpose_kernel"], ["transpose_bytes_kernel"]


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


def transposed(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.fp8dist.transpose(x, None, None, None)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_transposed(shape: tuple[int, int]) -> None:
    x = every_byte(shape)
    with launched() as names:
        found = transposed(x)
    assert found.equal(x.t()) and found.is_contiguous()
    assert names == (FOURS if shape in IN_FOURS else BYTES if shape in IN_BYTES else [])


@pytest.mark.parametrize("block", [COLUMN, TENSOR], ids=["column", "tensor"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_other_scales_are_those_of_the_reference(
    shape: tuple[int, int], dtype: torch.dtype, block: tuple[int, int]
) -> None:
    """What is not in fours, or not e4m3, is left to the reference."""
    x, scale = every_byte(shape).view(dtype), powers_of_two((shape[0], 1))
    one = torch.full((1, 1), 2.0**-9, device="cuda")
    new_scale = one if block == TENSOR else powers_of_two((1, shape[1]))
    for inverse in (None, scale.reciprocal()):
        weight = Scaled(x, scale, ROW, inverse)
        with launched() as names:
            found = kernels.rescale_transposed(weight, block, new_scale, "power_of_2")
        expected = numerics.rescale_transposed(weight, block, new_scale, "power_of_2")
        assert_same_bytes(found.data, expected.data)
        assert found.data.is_contiguous() and found.block == expected.block
        assert names == (FOURS if shape in IN_FOURS and dtype == E4M3 else [])


def test_views_are_taken_as_they_are() -> None:
    """Of rows that are further apart, that begin within a word, and of columns, which are rows of
    the transpose."""
    whole = every_byte((256, 640))
    for x, expected_names in (
        (whole[:, 128:640], FOURS),
        (whole[::2], FOURS),
        (whole[:, 4:132], FOURS),
        (whole[:, 3:131], BYTES),
        (whole.t(), []),
    ):
        with launched() as names:
            assert transposed(x).equal(x.t())
        assert names == expected_names
        scale, new_scale = powers_of_two((x.size(0), 1)), powers_of_two((1, x.size(1)))
        apart = scale.expand(-1, 3).contiguous()[:, :1]  # as some are laid out
        for weight in (
            Scaled(x.view(E4M3), scale, ROW),
            Scaled(x.view(E4M3), apart, ROW, (1 / apart).expand(-1, 3).contiguous()[:, :1]),
        ):
            with launched() as names:
                found = kernels.rescale_transposed(weight, COLUMN, new_scale, "power_of_2")
            expected = numerics.rescale_transposed(weight, COLUMN, new_scale, "power_of_2")
            assert_same_bytes(found.data, expected.data)
            assert names == (FOURS if expected_names == FOURS else [])


def test_what_no_kernel_shifts() -> None:
    x = every_byte((256, 640)).view(E4M3)
    by_row, by_column = powers_of_two((256, 1)), powers_of_two((1, 640))
    one = torch.ones(1, 1, device="cuda")
    assert launch.can_shift(x, by_row, by_column) and launch.can_shift(x, by_row, one)
    assert not launch.can_shift(x, one, one) and not launch.can_shift(x, by_row, by_row)
    assert not launch.can_shift(x, by_row.double(), one)
    assert not launch.can_shift(x, by_row, one.bfloat16())
    assert not launch.can_shift(x, by_row, by_column.repeat_interleave(2, 1)[:, ::2])
    assert not launch.in_fours(torch.zeros(8, 8, dtype=torch.bfloat16, device="cuda"))
