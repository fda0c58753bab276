"""On a GPU: every kernel gives the bytes of its reference in `fp8dist.numerics`."""

import pytest
import torch

from fp8dist import kernels, numerics
from fp8dist.config import RECIPES, Block
from fp8dist.numerics import Scaled

pytestmark = pytest.mark.gpu

SHAPES = [(256, 512), (1, 128), (130, 384), (1000, 128), (16, 1152), (640, 4224)]
CONTENTS = ["normal", "wide", "zeros", "nan", "inf", "subnormal"]


def make(shape: tuple[int, int], content: str, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0] + len(content))
    x = torch.randn(shape, generator=generator)
    if content == "wide":  # columns and rows of very different size
        x = (
            x
            * torch.logspace(-12, 12, shape[1], base=2)
            * torch.logspace(3, -20, shape[0], base=2)[:, None]
        )
    if content == "zeros":
        x[:, : shape[1] // 2] = 0
        x[: shape[0] // 2] = 0
    if content == "nan":
        x[shape[0] // 2, 5] = torch.nan
    if content == "inf":
        x[shape[0] // 2, 7] = -torch.inf
    if content == "subnormal":
        x = x * 1e-39
    return x.to(dtype).cuda()


def assert_same_bytes(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal bit for bit, except that a NaN may have any sign and payload."""
    assert got.shape == want.shape and got.dtype == want.dtype
    got, want = got.float(), want.float()
    assert torch.equal(got.isnan(), want.isnan())
    numbers = ~want.isnan()
    assert torch.equal(got[numbers].view(torch.int32), want[numbers].view(torch.int32))


def assert_same(got: Scaled | None, want: Scaled | None) -> None:
    assert (got is None) == (want is None)
    if got is not None and want is not None:
        assert got.block == want.block
        assert_same_bytes(got.scale, want.scale)
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
    for shape in SHAPES:
        x = make(shape, content, dtype)
        for block, transposed_block, float8_dtype in pairs:
            if block == (128, 128):  # left to numerics
                continue
            args = (block, transposed_block, float8_dtype, recipe.scale_format)
            got = kernels.quantize_both(x, *args)
            want = numerics.quantize_both(x, *args)
            assert_same(got[0], want[0])
            assert_same(got[1], want[1])
            if got[1] is not None:
                assert got[1].data.is_contiguous()


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cast_into(dtype, content):
    for shape in SHAPES:
        x = make(shape, content, dtype)
        for block in [(-1, -1), (1, -1), (1, 128)]:
            scale = numerics.amax_to_scale(numerics.amax(x, block), torch.float8_e4m3fn, "exact")
            # Poisoned, and with more rows than are to be written.
            got = torch.full((shape[0] + 3, shape[1]), 0x55, dtype=torch.uint8, device="cuda")
            want = got.clone()
            kernels.cast_into(got[: shape[0]].view(torch.float8_e4m3fn), x, scale)
            numerics.cast_into(want[: shape[0]].view(torch.float8_e4m3fn), x, scale)
            assert_same_bytes(got.view(torch.float8_e4m3fn), want.view(torch.float8_e4m3fn))


@pytest.mark.parametrize("content", CONTENTS)
def test_fill_amaxes(content):
    """Shards of one matrix, also ones that share a block, fill what the whole would."""
    whole = make((640, 384), content, torch.float32)
    blocks = [(-1, -1), (1, -1), (-1, 1), (128, 128)]
    for dtype in (torch.float32, torch.bfloat16):
        amaxes = [numerics.amax(whole.to(dtype), block).float() for block in blocks]
        got = [torch.zeros_like(amax) for amax in amaxes]
        for start, end in [(0, 200), (200, 201), (201, 640)]:
            kernels.fill_amaxes(got, whole[start:end].to(dtype), blocks, (start, 0))
        for mine, want in zip(got, amaxes, strict=True):
            assert_same_bytes(mine, want)
