"""A sharded model is exported as the whole one is, byte for byte, and has what it gathers."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy

import fp8dist
from fp8dist.config import RECIPES
from fp8dist.tensors.float8_tensor import Float8Tensor
from tests.distributed.composition import converted, sharded
from tests.distributed.composition_axes import AXES
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.toy import RECIPE_NAMES, convert, mesh_of, new_model, shard
from tests.unit.test_export import read


def exported(recipe: str, mesh: tuple[int, ...], offload: bool, folder: str) -> None:
    """Sharded, and by rank 0 a model of its own that never was."""
    model = convert(new_model(), recipe)
    options = {}
    if offload:
        model.cpu()
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    shard(model, mesh_of(*mesh), **options)
    fp8dist.export_float8(model, f"{folder}/sharded")
    model.layers[1].unshard()
    weight = model.layers[1].w2.weight
    assert isinstance(weight, Float8Tensor)
    if dist.get_rank() == 0:
        tensors = read(Path(folder, "sharded", "model.safetensors"))
        arrived = weight.unpack(RECIPES[recipe].weight)
        found = tensors["layers.1.w2.weight"].view(torch.uint8)
        assert found.equal(arrived.data.contiguous().view(torch.uint8).cpu())
        scale, expected = tensors["layers.1.w2.weight_scale"], arrived.scale.reciprocal().cpu()
        if scale.dtype == torch.uint8:  # the exponent of a power of two; see [Note: e8m0]
            scale = torch.exp2(scale.float() - 127)
        assert scale.view(expected.shape).equal(expected)


def alone(recipe: str, folder: str) -> None:
    fp8dist.export_float8(convert(new_model(), recipe), f"{folder}/alone")


@pytest.mark.parametrize(
    "mesh, offload", [((3,), False), ((2, 2), False), ((2,), True)], ids=["3", "2x2", "offload"]
)
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_a_sharded_model(recipe: str, mesh: tuple[int, ...], offload: bool, tmp_path: Path) -> None:
    run_on_ranks(math.prod(mesh), exported, recipe, mesh, offload, str(tmp_path))
    run_on_ranks(1, alone, recipe, str(tmp_path))
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "sharded" / file).read_bytes() == (
            tmp_path / "alone" / file
        ).read_bytes()


def exported_wrapped(case: dict[str, str], folder: str) -> None:
    fp8dist.export_float8(sharded(case), f"{folder}/sharded")


def alone_wrapped(case: dict[str, str], folder: str) -> None:
    fp8dist.export_float8(converted(case, DEVICE), f"{folder}/alone")


@pytest.mark.parametrize("checkpointing", ["full in FSDP", "full around FSDP"])
def test_tensor_parallel_and_wrapped(checkpointing: str, tmp_path: Path) -> None:
    case = {axis: values[0] for axis, values in AXES.items()}
    case |= {"mesh": "fsdp x tp 2x2", "recipe": "rowwise", "checkpointing": checkpointing}
    run_on_ranks(4, exported_wrapped, case, str(tmp_path))
    run_on_ranks(1, alone_wrapped, case, str(tmp_path))
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "sharded" / file).read_bytes() == (
            tmp_path / "alone" / file
        ).read_bytes()


def refused(path: str) -> str:
    model = shard(convert(new_model()), mesh_of(dist.get_world_size()))
    with pytest.raises(ValueError) as error:
        fp8dist.export_float8(model, path)
    return str(error.value)


def test_what_rank_0_cannot_write_is_raised_on_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    first, *others = run_on_ranks(3, refused, str(tmp_path / "file"))
    assert str(tmp_path / "file") in first
    assert others == [first] * 2
