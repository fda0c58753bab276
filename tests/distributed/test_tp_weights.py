"""The float8 weights of tensor parallelism, alone and under FSDP2: parts of the full weight's, bit
for bit, with one all-reduce for all."""

import math
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import fp8dist
from fp8dist.tensors.weight_state import local_float8
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.test_placement import weight_of
from tests.distributed.toy import RECIPE_NAMES, full, same_bits, warnings_of_the_library
from tests.distributed.tp_layers import (
    CUTS,
    SHAPES,
    Layers,
    check,
    mesh_of,
    new_model,
    read,
    unshard,
)
from tests.distributed.wire import collectives


def unsharded(mesh: tuple[int, ...], recipe: str, dtype: torch.dtype, fsdp_dim: int) -> list[Any]:
    """Of a model with precompute and of one without: what each rank gets of each layer."""
    found = []
    for precompute in (True, False):
        model = new_model(mesh_of(*mesh), recipe, dtype, fsdp_dim)
        if precompute:
            fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
        found.append({name: read(weight, recipe) for name, weight in unshard(model).items()})
    return found


MESHES = [(2,), (4,), (1, 2), (2, 1), (2, 2), (3, 1), (2, 1, 2)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_parts_of_the_full_weight(recipe: str, mesh: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        results = run_on_ranks(math.prod(mesh), unsharded, mesh, recipe, dtype, 0)
        for rank, found in enumerate(results):
            for of_model in found:
                assert of_model.keys() == (SHAPES.keys() if len(mesh) > 1 else CUTS.keys())
                check(of_model, recipe, dtype, rank, mesh[-1])


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_parts_that_fsdp_cuts_by_columns(recipe: str) -> None:
    results = run_on_ranks(4, unsharded, (2, 2), recipe, torch.float32, 1)
    for rank, found in enumerate(results):
        for of_model in found:
            check(of_model, recipe, torch.float32, rank, 2)


def over_flattened_ranks(recipe: str) -> tuple[list[str], Any]:
    """FSDP2 over data and context parallel ranks together, as it is combined with the latter."""
    mesh = init_device_mesh(DEVICE, (1, 2, 2), mesh_dim_names=("dp", "cp", "tp"))
    model = new_model(mesh, recipe)
    with collectives() as issued:
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
    found = {name: read(weight, recipe) for name, weight in unshard(model).items()}
    return [str(collective) for collective in issued], found


def test_fsdp_over_a_flattened_mesh() -> None:
    for rank, (issued, found) in enumerate(run_on_ranks(4, over_flattened_ranks, "rowwise")):
        assert issued == ["all_reduce MAX int32[1664] over 4 ranks"]
        check(found, "rowwise", torch.float32, rank, 2)


def copies_that_differ(recipe: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The first row of a weight that the plan leaves out, as this rank has it and as it arrives.

    Its copies on TP ranks differ in the last bit of an amax about 1.75, which is float8_max / 2^8.
    """
    mesh = mesh_of(2, 2)
    model = new_model(mesh, recipe)
    with torch.no_grad():
        weight = model["plain"].weight
        largest = 1.75 if mesh.get_local_rank("tp") == 0 else 1.7500001
        if mesh.get_local_rank("dp") == 0:
            weight.to_local()[0].fill_(0.5)
            weight.to_local()[0, 0].fill_(largest)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
    own = full(weight)[0]
    return own, unshard(model)["plain"].dequantize()[0]


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_with_gw_hp"])
def test_copies_of_a_weight_that_differ_are_cast_by_the_scales_of_all(recipe: str) -> None:
    for own, found in run_on_ranks(4, copies_that_differ, recipe):
        # e4m3 rounds to 1/16 at most; a scale that is another rank's doubles or halves.
        torch.testing.assert_close(found, own, rtol=1 / 16, atol=0)


# --- what else holds under tensor parallelism


def loaded(mesh: tuple[int, ...], recipe: str) -> tuple[list[str], Any]:
    """State dicts are of plain high-precision tensors; one that is loaded is noticed."""
    model, other = (new_model(mesh_of(*mesh), recipe) for _ in range(2))
    for name, tensor in model.state_dict().items():
        assert type(tensor._local_tensor) is torch.Tensor
        weight = weight_of(SHAPES[name.removesuffix(".weight")], torch.float32)
        assert same_bits(full(tensor), weight)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(1.5)
    model.load_state_dict(other.state_dict())
    with warnings_of_the_library() as messages:
        found = {name: read(weight, recipe) for name, weight in unshard(model).items()}
    return messages, found


def test_state_dicts() -> None:
    for rank, (messages, found) in enumerate(run_on_ranks(4, loaded, (2, 2), "rowwise")):
        assert len(messages) == 1
        check(found, "rowwise", torch.float32, rank, 2, 1.5)


def offloaded(recipe: str) -> Any:
    offload = CPUOffloadPolicy(pin_memory=False)
    model = new_model(mesh_of(2, 2), recipe, offload_policy=offload)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
    with collectives() as issued:
        weights = unshard(model)
    return [c.name for c in issued], {name: read(w, recipe) for name, w in weights.items()}


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise", "mxfp8_rceil"])
def test_cpu_offload(recipe: str) -> None:
    for rank, (issued, found) in enumerate(run_on_ranks(4, offloaded, recipe)):
        assert issued == ["all_gather"]
        check(found, recipe, torch.float32, rank, 2)


def ignored() -> tuple[list[list[str]], Any]:
    """A weight that tensor parallelism cuts and FSDP2 ignores, though it has its module."""
    mesh = mesh_of(2, 2)
    model = Layers({"rowwise": nn.Linear(512, 128, bias=False, device=DEVICE)})
    with torch.no_grad():
        model["rowwise"].weight.copy_(weight_of((128, 512), torch.float32))
    fp8dist.convert_to_float8_training(model, config="mxfp8_rceil")
    parallelize_module(model, mesh["tp"], {"rowwise": RowwiseParallel()})
    layer = model["rowwise"]
    fully_shard(model, mesh=mesh["dp"], ignored_params={layer.weight})
    counts = []
    with warnings_of_the_library() as messages:
        for _ in range(2):
            with collectives() as issued:
                fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
                weight = local_float8(layer.weight_state, layer.weight, torch.float32)
            counts.append([str(collective) for collective in issued])
    assert messages == []
    return counts[1], read(weight, "mxfp8_rceil")


def test_a_weight_that_fsdp_ignores() -> None:
    for rank, (issued, found) in enumerate(run_on_ranks(4, ignored)):
        assert issued == []
        check({"rowwise": found}, "mxfp8_rceil", torch.float32, rank, 2)


def refused(use: str) -> tuple[str, list[Any]]:
    mesh = mesh_of(2, 2)
    model = Layers({"good": nn.Linear(64, 64), "bad": nn.Linear(64, 48)}).to(DEVICE)
    fp8dist.convert_to_float8_training(model, config="rowwise")
    parallelize_module(model, mesh["tp"], {name: ColwiseParallel() for name, _ in model.items()})
    if use != "local_float8":
        fully_shard(model, mesh=mesh["dp"])
    with collectives() as issued, pytest.raises(ValueError) as error:
        if use == "unshard":
            model.unshard()
        elif use == "local_float8":
            local_float8(model["bad"].weight_state, model["bad"].weight, torch.float32)
        else:
            fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
    return str(error.value), [c for c in issued if use != "unshard" or c.name == "all_gather"]


@pytest.mark.parametrize("use", ["precompute", "unshard", "local_float8"])
def test_parts_that_cannot_be_scaled_are_refused_by_all_ranks(use: str) -> None:
    for message, issued in run_on_ranks(4, refused, use):
        assert message.startswith("bad: tensor parallelism over 2 ranks cuts out_features=48 into")
        assert "parts of 24" in message and "multiples of 16" in message
        assert issued == []
