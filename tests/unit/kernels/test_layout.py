"""The ops of casts give what the compiler was told they give, and what the reference does."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8dist import kernels, numerics
from fp8dist.config import RECIPES, Recipe
from fp8dist.kernels import ops
from fp8dist.kernels.layout import Cast, cast_named, contiguous_strides, name_of, sizes_of

M, N = 24, 128
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RECIPES)
def test_sizes_dtypes_and_strides_are_those_of_the_fake(name: str, device: str) -> None:
    recipe = RECIPES[name]
    for block, t_block in [
        (recipe.input, recipe.input_for_grad_weight),
        (recipe.input, None),
        (None, recipe.grad_output_for_grad_weight),
    ]:
        cast = Cast(block, t_block, torch.float8_e4m3fn, recipe.scale_format)
        args = (name_of(cast), None, None, None)
        real = torch.ops.fp8dist.quantize(torch.randn(M, N, device=device), *args)
        with FakeTensorMode():
            fake = torch.ops.fp8dist.quantize(torch.empty(M, N, device=device), *args)
        for got, told in zip(real, fake, strict=True):
            assert (got.shape, got.stride(), got.dtype) == (told.shape, told.stride(), told.dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(M, N), (1, N), (M, 1), (0, N), (M, 0)], ids=str)
def test_a_derived_weight_is_as_the_fake(shape: tuple[int, int], device: str) -> None:
    weight = torch.randn(shape, device=device).to(torch.float8_e4m3fn)
    inverse = torch.ones(shape[0], 1, device=device)
    new_scale = torch.ones(1, shape[1], device=device)
    for args in ((inverse, new_scale, None), (None, None, None)):
        real = torch.ops.fp8dist.transpose(weight, *args)
        assert real.shape == shape[::-1], "rows of a weight are not padded"
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = torch.ops.fp8dist.transpose(weight, *args)
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["rowwise", "mxfp8_rceil"])
def test_a_derived_weight_is_that_of_the_reference(name: str, device: str) -> None:
    """From reciprocals of scales, or, as e8m0 has none, from the scales."""
    recipe = RECIPES[name]
    w = torch.randn(64, N, device=device) * torch.logspace(-9, 9, N, base=2, device=device)
    args = (recipe.weight_dtype, recipe.scale_format)
    weight = numerics.quantize(w, recipe.weight, *args)
    amax = numerics.amax(w, recipe.weight_for_grad_input)
    for new_scale in (None, numerics.amax_to_scale(amax, *args)):
        derivation = (recipe.weight_for_grad_input, new_scale, args[1])
        found = kernels.rescale_transposed(weight, *derivation)
        expected = numerics.rescale_transposed(weight, *derivation)
        assert torch.equal(found.data.float(), expected.data.float())
        assert torch.equal(found.scale, expected.scale)


def test_a_transpose_has_old_and_new_scales_or_neither() -> None:
    weight, scales = torch.zeros(8, 4).to(torch.float8_e4m3fn), torch.ones(1, 1)
    for one in ((scales, None), (None, scales)):
        with pytest.raises(AssertionError, match="old and new scales, or neither"):
            torch.ops.fp8dist.transpose(weight, *one, None)


@pytest.mark.parametrize("shape", [(24, 128), (1, 128), (32, 1), (0, 128)], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_the_op_keeps_what_it_promises(name: str, shape: tuple[int, int]) -> None:
    """Among it that outputs share no storage, with each other or the input."""
    recipe = RECIPES[name]
    if shape[1] % max(recipe.input[1], 1):
        return
    for block, t_block in [
        (recipe.input, recipe.input_for_grad_weight),
        (recipe.input, None),
        (None, None),
    ]:
        cast = Cast(block, t_block, torch.float8_e4m3fn, recipe.scale_format)
        args = (name_of(cast), None, None, None)
        torch.library.opcheck(torch.ops.fp8dist.quantize.default, (torch.randn(shape), *args))
    for x in (torch.zeros(shape, dtype=torch.uint8), torch.zeros(5, 1, dtype=torch.uint8)):
        torch.library.opcheck(torch.ops.fp8dist.transpose.default, (x, None, None, None))


def test_kernels_get_several_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "has_kernels", lambda _: True)
    assert [ops.in_kernels(torch.empty(rows, 4)) for rows in range(3)] == [False, False, True]


def test_scales_of_blocks_are_written_column_by_column() -> None:
    cast = Cast((1, 128), (128, 1), torch.float8_e4m3fn, "power_of_2")
    sizes, m_padded, amaxes = sizes_of(100, 256, cast)
    assert sizes == ((100, 256), (2, 2, 100), (256, 128), (2, 1, 256))
    assert (m_padded, amaxes) == (128, 0)


def test_amaxes_of_rows_columns_and_the_tensor_are_counted_once() -> None:
    for block, t_block, expected in [
        ((-1, -1), (-1, -1), 1),
        ((1, -1), (-1, 1), 24 + 128),
        ((1, -1), (-1, -1), 24 + 1),
        ((1, -1), None, 0),
        (None, (-1, 1), 128),
    ]:
        cast = Cast(block, t_block, torch.float8_e4m3fn, "power_of_2")
        assert sizes_of(M, N, cast)[2] == expected


@pytest.mark.parametrize("size", [(5,), (3, 4), (2, 1, 7), (0, 0), (0, 4), (4, 0), (2, 0, 3)])
def test_strides_are_those_of_an_empty_tensor(size: tuple[int, ...]) -> None:
    assert contiguous_strides(size) == torch.empty(size).stride()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_name_says_all_of_a_cast(recipe: Recipe) -> None:
    for cast in (
        Cast(recipe.input, recipe.input_for_grad_weight, recipe.input_dtype, recipe.scale_format),
        Cast(recipe.grad_output, None, recipe.grad_output_dtype, recipe.scale_format),
        Cast(None, recipe.weight_for_grad_input, recipe.weight_dtype, recipe.scale_format),
    ):
        assert cast_named(name_of(cast)) == cast
    cast = Cast((1, -1), None, torch.float8_e5m2, "exact")
    assert name_of(cast) == "1x-1 none float8_e5m2 exact"
