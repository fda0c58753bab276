"""On a GPU: amaxes by programs of many rows, as they are of large matrices."""

import pytest
import torch

from fp8dist import kernels, numerics
from fp8dist.config import RECIPES
from tests.unit.kernels.contents import assert_same_bytes, make

pytest.importorskip("triton", reason="needs Triton")
if not torch.backends.cuda.is_built():
    pytest.skip("needs torch built for GPUs", allow_module_level=True)

from fp8dist.kernels import launch  # noqa: E402  # where there is Triton

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("content", ["wide", "nan", "subnormal"])
@pytest.mark.parametrize("name", ["tensorwise", "rowwise"])
def test_scales_of_what_several_programs_read(name, content, dtype, monkeypatch):
    """A program takes as many rows as leave enough of them; here some below one another do."""
    monkeypatch.setattr(launch, "ENOUGH_PROGRAMS", 1)
    launch._plan.cache_clear()
    recipe = RECIPES[name]
    args = (recipe.input, recipe.input_for_grad_weight, recipe.input_dtype, recipe.scale_format)
    for shape in [(640, 128), (1000, 300)]:
        x = make(shape, content, dtype)
        results = (kernels.quantize_both(x, *args), numerics.quantize_both(x, *args))
        for got, want in zip(*results, strict=True):
            assert_same_bytes(got.scale, want.scale)
            assert_same_bytes(got.data, want.data)
    launch._plan.cache_clear()
