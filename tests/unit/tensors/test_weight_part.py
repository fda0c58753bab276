"""`cast_part`: on one rank, whose part is the weight; test_tensor_parallel.py has several."""

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from fp8dist import numerics
from fp8dist.config import RECIPES
from fp8dist.tensors.weight_part import cast_part


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", RECIPES)
def test_the_only_part_is_the_weight(name: str, dim: int, mesh: DeviceMesh) -> None:
    recipe = RECIPES[name]
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    found = cast_part(weight, dim, recipe, mesh.get_group().group_name)
    want = numerics.quantize(weight, recipe.weight, recipe.weight_dtype, recipe.scale_format)
    got = found.unpack(recipe.weight)
    assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8))
    assert torch.equal(got.scale, want.scale)
    if recipe.scale_format == "power_of_2" and recipe.weight != recipe.weight_for_grad_input:
        amax = numerics.amax(weight, recipe.weight_for_grad_input)
        scale = numerics.amax_to_scale(amax, recipe.weight_dtype, recipe.scale_format)
        assert torch.equal(found._scales_for_grad_input, torch.stack([1 / scale, scale]))
    else:
        assert found._scales_for_grad_input is None
