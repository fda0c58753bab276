"""The float8 weights of tensor parallelism, alone and under FSDP2: parts of the full weight's, bit
for bit, with one all-reduce for all."""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn as nn
from expecttest import assert_expected_inline
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import fp8dist
from fp8dist.config import RECIPES, WHOLE
from fp8dist.tensors import weight_state
from fp8dist.tensors.float8_tensor import Float8Tensor
from fp8dist.tensors.weight_state import local_float8
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.test_placement import Quantized, quantized, weight_of
from tests.distributed.toy import RECIPE_NAMES, full, same_bits, warnings_of_the_library
from tests.distributed.wire import collectives

# (N, K) of each layer, and the dimension that tensor parallelism over 4 ranks cuts, if it does:
# into whole blocks of 128.
SHAPES = {"colwise": (512, 128), "rowwise": (128, 512), "plain": (256, 128)}
CUTS = {"colwise": 0, "rowwise": 1}


class Layers(nn.Module):
    """Layers by name, of which the weights matter and not what they compute."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def __getitem__(self, name: str) -> Any:
        return self.get_submodule(name)

    def items(self) -> Iterator[tuple[str, Any]]:
        return self.named_children()

    def forward(self) -> None:
        """FSDP2 takes no modules without one."""


@functools.cache
def mesh_of(*sizes: int) -> DeviceMesh:
    """(tp,), (dp, tp) or (replicate, dp, tp)."""
    names = ("replicate", "dp", "tp")[-len(sizes) :]
    return init_device_mesh(DEVICE, sizes, mesh_dim_names=names)


def new_model(
    mesh: DeviceMesh,
    recipe: str = "tensorwise",
    dtype: torch.dtype = torch.float32,
    fsdp_dim: int = 0,
    **options: Any,
) -> Layers:
    """Converted, cut by torch's own styles, and sharded if the mesh has more than tp."""
    model = Layers(
        {
            name: nn.Linear(shape[1], shape[0], bias=False, device=DEVICE, dtype=dtype)
            for name, shape in SHAPES.items()
        }
    )
    with torch.no_grad():
        for name, shape in SHAPES.items():
            model[name].weight.copy_(weight_of(shape, dtype))
    fp8dist.convert_to_float8_training(model, config=fp8dist.Float8Config(recipe, emulate=True))
    plan = {"colwise": ColwiseParallel(), "rowwise": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    if mesh.ndim > 1:
        names = mesh.mesh_dim_names[:-1]
        dp = mesh[names if len(names) > 1 else names[0]]
        if "cp" in names:
            dp = dp._flatten("dp_cp")
        fully_shard(model, mesh=dp, shard_placement_fn=lambda p: Shard(fsdp_dim), **options)
    return model


def unshard(model: Layers) -> dict[str, Float8Tensor]:
    """Each rank's part of the weights in float8; all of those that are not cut."""
    if hasattr(model, "unshard"):
        model.unshard()
        weights = {name: layer.weight for name, layer in model.items()}
        return {
            name: w._local_tensor if isinstance(w, DTensor) else w for name, w in weights.items()
        }
    return {
        name: local_float8(model[name].weight_state, model[name].weight, torch.float32)
        for name in CUTS
    }


def read(weight: Float8Tensor, recipe: str) -> Any:
    """(bytes, scales, scales of the backward operand or None)"""
    for scales in (weight._scales, weight._scales_for_grad_input):
        if scales is not None and scales.dtype == torch.float32:
            assert scales.is_contiguous() and scales.storage_offset() == 0
            assert scales.untyped_storage().nbytes() == scales.nbytes, "in a storage of its own"
            assert same_bits(scales[0], scales[1].reciprocal())
    data, scales, *_ = weight.unpack(RECIPES[recipe].weight)
    backward = weight._scales_for_grad_input
    return (
        data.contiguous().view(torch.uint8).cpu().clone(),
        scales.cpu().clone(),
        None if backward is None else backward[1].cpu().clone(),
    )


def unsharded(mesh: tuple[int, ...], recipe: str, dtype: torch.dtype, fsdp_dim: int) -> list[Any]:
    """Of a model with precompute and of one without: what each rank gets of each layer."""
    found = []
    for precompute in (True, False):
        model = new_model(mesh_of(*mesh), recipe, dtype, fsdp_dim)
        if precompute:
            fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
        found.append({name: read(weight, recipe) for name, weight in unshard(model).items()})
    return found


@functools.cache
def expected(name: str, recipe: str, dtype: torch.dtype, factor: float = 1) -> list[Quantized]:
    """Bytes and scales of the full weight on one device, for both matmuls."""
    weight, of = weight_of(SHAPES[name], dtype) * factor, RECIPES[recipe]
    return [quantized(weight, block, of) for block in (of.weight, of.weight_for_grad_input)]


def check(
    found: dict[str, Any], recipe: str, dtype: torch.dtype, rank: int, tp: int, factor: float = 1
) -> None:
    of = RECIPES[recipe]
    for name, (data, scales, backward) in found.items():

        def part(x: torch.Tensor, block: tuple[int, int], dim: int | None) -> torch.Tensor:
            cut = dim is not None and block[dim] != WHOLE
            return x.chunk(tp, dim)[rank % tp] if cut else x

        (own_data, own_scales), (_, other_scales) = expected(name, recipe, dtype, factor)
        dim = CUTS.get(name)
        assert same_bits(data, part(own_data, (1, 1), dim))
        assert same_bits(scales, part(own_scales, of.weight, dim))
        exchanged = of.weight != of.weight_for_grad_input and of.scale_format != "e8m0"
        assert (backward is not None) == exchanged
        if exchanged:
            assert same_bits(backward, part(other_scales, of.weight_for_grad_input, dim))


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


# --- collectives


def phases(mesh: tuple[int, ...], recipe: str) -> tuple[str, list[str], Any]:
    """The collectives of some steps, what was warned of, and the weights after the edit."""
    model, lines = new_model(mesh_of(*mesh), recipe), []

    def gather(phase: str) -> dict[str, Float8Tensor]:
        # `local_float8` hides from dispatch modes, the recorder of collectives among them.
        seen = mock.patch.object(weight_state, "_disable_current_modes", contextlib.nullcontext)
        with collectives() as issued, seen:
            weights = unshard(model)
        lines.extend([phase, *(f"  {collective}" for collective in issued)])
        return weights

    with warnings_of_the_library() as messages:
        for phase in ("first precompute", "second precompute"):
            with collectives() as issued:
                fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
            lines += [phase, *(f"  {collective}" for collective in issued)]
        for phase in ("gather", "once more"):
            gather(phase)
            model.reshard() if len(mesh) > 1 else None
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(1.5)
        weights = gather("gather of edited weights")
    return "\n".join(lines), messages, {name: read(w, recipe) for name, w in weights.items()}


def text(mesh: tuple[int, ...], recipe: str, warns: bool = True) -> str:
    results = run_on_ranks(math.prod(mesh), phases, mesh, recipe)
    lines, messages, _ = results[0]
    for rank, (of_rank, warned, edited) in enumerate(results):
        assert of_rank == lines
        assert warned == messages
        assert [message.split(" after")[0] for message in warned] == ["colwise was edited"] * warns
        check(edited, recipe, torch.float32, rank, mesh[-1], 1.5)
    return lines


# Payloads: 512 * 128 / 2 / 2 bytes of each of the layers in the plan, 256 * 128 / 2 of the other.


def test_collectives_of_fsdp_and_tp() -> None:
    assert_expected_inline(
        text((2, 2), "tensorwise"),
        """\
first precompute
  all_reduce MAX int32[3] over 4 ranks
second precompute
  all_reduce MAX int32[3] over 4 ranks
gather
  all_gather uint8[49152] over 2 ranks
once more
  all_gather uint8[49152] over 2 ranks
gather of edited weights
  all_reduce MAX int32[1] over 4 ranks
  all_reduce MAX int32[1] over 4 ranks
  all_reduce MAX int32[1] over 2 ranks
  all_gather uint8[49152] over 2 ranks""",
    )


# Amaxes: of 512 rows and 128 columns or the other way round, and of 256 rows and 128 columns.


def test_collectives_of_fsdp_and_tp_rowwise() -> None:
    assert_expected_inline(
        text((2, 2), "rowwise"),
        """\
first precompute
  all_reduce MAX int32[1664] over 4 ranks
second precompute
  all_reduce MAX int32[1664] over 4 ranks
gather
  all_gather uint8[49152] over 2 ranks
once more
  all_gather uint8[49152] over 2 ranks
gather of edited weights
  all_reduce MAX int32[640] over 4 ranks
  all_reduce MAX int32[640] over 4 ranks
  all_reduce MAX int32[384] over 2 ranks
  all_gather uint8[49152] over 2 ranks""",
    )


# MXFP8's scales travel with the payload: a byte for every 32. Edits cost no collective.


def test_collectives_of_fsdp_and_tp_mxfp8() -> None:
    assert_expected_inline(
        text((2, 2), "mxfp8_rceil", warns=False),
        """\
first precompute
second precompute
gather
  all_gather uint8[50688] over 2 ranks
once more
  all_gather uint8[50688] over 2 ranks
gather of edited weights
  all_gather uint8[50688] over 2 ranks""",
    )


def test_collectives_of_tp_alone() -> None:
    assert_expected_inline(
        text((4,), "tensorwise"),
        """\
first precompute
  all_reduce MAX int32[2] over 4 ranks
second precompute
  all_reduce MAX int32[2] over 4 ranks
gather
once more
gather of edited weights
  all_reduce MAX int32[1] over 4 ranks
  all_reduce MAX int32[1] over 4 ranks""",
    )


def first_gather() -> list[str]:
    """Without any precompute: in forward the ranks of other pipeline stages may be elsewhere."""
    # The ranks in another order than in other tests, which have made their group.
    model = new_model(DeviceMesh(DEVICE, [[0, 2], [1, 3]], mesh_dim_names=("dp", "tp")))
    with collectives() as issued:
        unshard(model)
    return [str(collective) for collective in issued]


def test_a_gather_before_any_precompute_makes_no_group() -> None:
    both = ["all_reduce MAX int32[1] over 2 ranks"] * 2  # along dp, then along tp
    payload = "all_gather uint8[49152] over 2 ranks"
    assert run_on_ranks(4, first_gather) == [[*both, *both, both[0], payload]] * 4


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
