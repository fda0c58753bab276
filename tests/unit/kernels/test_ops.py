"""On a GPU: every kernel gives the bytes of its reference in `fp8dist.numerics`."""

import pytest
import torch

from fp8dist import kernels, numerics
from fp8dist.config import RECIPES, Block
from fp8dist.numerics import Scaled
from tests.unit.kernels.contents import CONTENTS, SHAPES, assert_same_bytes, make

pytestmark = pytest.mark.gpu

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def assert_same(got: Scaled | None, want: Scaled | None) -> None:
    assert (got is None) == (want is None)
    if got is not None and want is not None:
        assert got.block == want.block
        assert_same_bytes(got.scale, want.scale)
        if got.inverse is not None:
            assert_same_bytes(got.inverse, 1 / want.scale)
        assert_same_bytes(got.data, want.data)


def fits(shape: tuple[int, int], *blocks: Block | None) -> bool:
    return all(b is None or shape[1] % max(b[1], 1) == 0 for b in blocks)


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_quantize_both(name, dtype, content):
    recipe = RECIPES[name]
    pairs = [
        (recipe.input, recipe.input_for_grad_weight, recipe.input_dtype),
        (recipe.grad_output, recipe.grad_output_for_grad_weight, recipe.grad_output_dtype),
        (None, recipe.grad_output_for_grad_weight, recipe.grad_output_dtype),
        (recipe.weight, None, recipe.weight_dtype),
    ]
    for shape in [*SHAPES, (33, 96), (31, 160)]:
        x = make(shape, content, dtype)
        for block, transposed_block, float8_dtype in pairs:
            # Square ones are left to numerics.
            if block == (128, 128) or not fits(shape, block, transposed_block):
                continue
            args = (block, transposed_block, float8_dtype, recipe.scale_format)
            got = kernels.quantize_both(x, *args)
            want = numerics.quantize_both(x, *args)
            assert_same(got[0], want[0])
            assert_same(got[1], want[1])
            if got[1] is not None:
                assert got[1].data.is_contiguous()


@pytest.mark.parametrize("scale_format", ["power_of_2", "exact"])
@pytest.mark.parametrize("columns", [1, 100, 4096, 4100, 16384, 16400, 40000])
def test_rows_of_any_width(columns, scale_format):
    """Those that are held in registers, and wider ones."""
    for content, rows in [("wide", 7), ("nan", 2), ("boundaries", 64)]:
        if content == "nan" and columns < 6:  # that one has its NaN in
            continue
        x = make((rows, columns), content, torch.bfloat16)
        args = (x, (1, -1), torch.float8_e4m3fn, scale_format)
        assert_same(kernels.quantize(*args), numerics.quantize(*args))


def test_quantize_both_of_a_strided_view():
    recipe = RECIPES["rowwise"]
    whole = make((256, 1024), "normal", torch.bfloat16)
    for x in (whole[:, 128:640], whole[::2], whole.t()):
        args = (recipe.input, recipe.input_for_grad_weight, torch.float8_e4m3fn, "power_of_2")
        for got, want in zip(
            kernels.quantize_both(x, *args), numerics.quantize_both(x, *args), strict=True
        ):
            assert_same(got, want)


@pytest.mark.parametrize("content", ["normal", "wide", "zeros", "nan"])
@pytest.mark.parametrize("name", RECIPES)
def test_rescale_transposed(name, content):
    recipe = RECIPES[name]
    for shape in [(256, 512), (128, 384), (640, 4224), (1152, 128)]:
        w = make(shape, content, torch.float32)
        quantized = numerics.quantize(w, recipe.weight, recipe.weight_dtype, recipe.scale_format)
        new_scale = None
        if recipe.scale_format == "power_of_2" and recipe.weight != recipe.weight_for_grad_input:
            amax = numerics.amax(w, recipe.weight_for_grad_input)
            new_scale = numerics.amax_to_scale(amax, recipe.weight_dtype, recipe.scale_format)
        args = (quantized, recipe.weight_for_grad_input, new_scale, recipe.scale_format)
        got, want = kernels.rescale_transposed(*args), numerics.rescale_transposed(*args)
        assert got.data.is_contiguous()
        assert_same(got, want)


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("float8_dtype", [E4M3, E5M2], ids=str)
def test_blocks_of_32_are_rescaled(float8_dtype, content):
    """Also from the smallest and the largest scale, 2^-127 and 2^127."""
    for shape in [(256, 512), (64, 96), (32, 32)]:
        w = make(shape, content, torch.float32) * (1e-3 if content == "subnormal" else 1)
        args = (numerics.quantize(w, (1, 32), float8_dtype, "e8m0"), (32, 1), None, "e8m0")
        assert_same(kernels.rescale_transposed(*args), numerics.rescale_transposed(*args))


def test_what_no_kernel_does_is_refused():
    """A tile has a whole number of the blocks of either orientation."""
    x = make((256, 512), "normal", torch.bfloat16)
    with pytest.raises(AssertionError, match=r"no kernel casts to \(1, 128\) and \(32, 1\)"):
        kernels.quantize_both(x, (1, 128), (32, 1), E4M3, "power_of_2")


@pytest.mark.parametrize("content", ["normal", "wide", "zeros", "nan"])
@pytest.mark.parametrize("name", ["tensorwise", "rowwise", "blockwise", "mxfp8_rceil"])
def test_an_activation_that_arrived_is_derived(name, content):
    """From scales of tokens to scales of features, by the amaxes of what arrived."""
    recipe = RECIPES[name]
    for shape in SHAPES:
        x = make(shape, content, torch.bfloat16)
        arrived = kernels.quantize(x, recipe.input, recipe.input_dtype, recipe.scale_format)
        got = kernels.rescale_transposed(
            arrived, recipe.input_for_grad_weight, None, recipe.scale_format
        )
        if recipe.input == recipe.input_for_grad_weight:
            want = arrived.t()
        else:
            value = numerics.dequantize(arrived.data, arrived.scale)
            args = (recipe.input_for_grad_weight, recipe.input_dtype, recipe.scale_format)
            _, want = numerics.quantize_both(value, None, *args)
        assert_same(got, want)


@pytest.mark.parametrize("rows", [130, 0])
@pytest.mark.parametrize("t_block", [None, (-1, -1)])
def test_one_scale_from_an_amax_that_is_known(t_block, rows):
    x = make((130, 384), "normal", torch.bfloat16)[:rows]
    amax = torch.full((1, 1), 7.0).cuda()
    args = (x, (-1, -1), t_block, torch.float8_e5m2, "exact")
    got = kernels.quantize_both(*args, amax=amax.view(torch.int32))
    for one, want in zip(got, numerics.quantize_both(*args, amax), strict=True):
        assert (one is None) == (want is None)
        if want is not None:
            assert_same(one, want)
    scale = numerics.amax_to_scale(amax, torch.float8_e5m2, "exact")
    assert_same(got[0], Scaled(numerics.cast(x, scale, torch.float8_e5m2), scale, (-1, -1)))
