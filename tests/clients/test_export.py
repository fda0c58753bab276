"""Exported weights in transformers, as scripts/clients/export_to_transformers.py loads them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fp8dist.config import RECIPES
from fp8dist.linear import Float8Linear
from fp8dist.numerics import repeat_blocks
from fp8dist.tensors.float8_tensor import Float8Tensor
from tests.clients.client import float8_of, script
from tests.clients.models import convert, new_model
from tests.distributed.harness import run_on_ranks

pytest.importorskip("compressed_tensors", reason="for .ci/clients")
pytest.importorskip("transformers", reason="for .ci/clients")


def unsharded(model: Any) -> dict[str, torch.Tensor]:
    """What the model multiplies with, by name in a state dict."""
    values = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in model.state_dict().items()
    }
    for i, layer in enumerate(model.model.layers):
        names = float8_of(layer)
        layer.unshard()
        for name in names:
            weight = layer.get_parameter(name)
            assert isinstance(weight, Float8Tensor)
            linear = layer.get_submodule(name.removesuffix(".weight"))
            data, scale, *_ = weight.unpack(linear.config.recipe.weight)
            # Float8 matmuls take the reciprocal of a scale, and multiply with it.
            factor = repeat_blocks(scale.reciprocal(), data.shape)
            values[f"model.layers.{i}.{name}"] = data.float() * factor
        layer.reshard()
    return values


def exported(recipe: str, folder: str) -> None:
    program = script("export_to_transformers")
    model = program.new_model(recipe)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert len(float8_of(model)) == 14
    program.export(model, folder)
    expected = unsharded(model)
    if dist.get_rank() == 0:
        torch.save(expected, f"{folder}/expected")


@pytest.mark.parametrize("recipe", RECIPES)
def test_transformers_loads_the_unsharded_values(recipe: str, tmp_path: Path) -> None:
    run_on_ranks(2, exported, recipe, str(tmp_path))
    expected = torch.load(tmp_path / "expected")
    program = script("export_to_transformers")
    # In this process, which is no rank: where ranks are, compressed-tensors shares its work out.
    for dtype in (torch.float32, torch.bfloat16):
        found = program.load(tmp_path, dtype=dtype).state_dict()
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert value.equal(expected[name].to(dtype)), name
    # Compressed until the first forward; of MXFP8 compressed-tensors makes nothing but bfloat16.
    dtype = torch.bfloat16 if recipe.startswith("mxfp8") else torch.float32
    loaded = program.load(tmp_path, dtype=dtype, dequantize=False)
    tokens = torch.arange(16).reshape(2, 8)
    logits = loaded(tokens).logits
    found = loaded.state_dict()
    for name, value in expected.items():
        assert found[name].equal(value.to(dtype)), name
    if recipe == "tensorwise":
        # compressed-tensors casts inputs by one scale as well; on a CPU fp8dist divides by the
        # scale of a weight instead, which rounds otherwise.
        trained = program.new_model(recipe)(tokens).logits
        torch.testing.assert_close(logits, trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_load_in_high_precision(name: str, tmp_path: Path) -> None:
    program = script("export_to_transformers")
    model = convert(new_model(name))
    program.export(model, tmp_path)
    loaded = program.load(tmp_path).state_dict()
    expected = model.state_dict()
    assert loaded.keys() == expected.keys()
    layers = {f"{fqn}.weight" for fqn, m in model.named_modules() if isinstance(m, Float8Linear)}
    changed = {name for name, value in loaded.items() if not value.equal(expected[name])}
    assert len(layers) == 8 and changed == layers
