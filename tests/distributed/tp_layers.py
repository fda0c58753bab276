"""Layers cut by tensor parallelism, also under FSDP2, and what each rank must get of a weight."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fp8dist
from fp8dist.config import RECIPES, WHOLE
from fp8dist.tensors.float8_tensor import Float8Tensor
from fp8dist.tensors.weight_state import local_float8
from tests.distributed.harness import DEVICE
from tests.distributed.test_placement import Quantized, quantized, weight_of
from tests.distributed.toy import same_bits

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
