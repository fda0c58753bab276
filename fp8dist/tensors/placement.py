"""Where a weight's shard lies: which mesh dimensions cut the weight, and who holds the rest."""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fp8dist.config import Recipe
from fp8dist.shard import Shard, Size

# [Note: parts]
# Tensor parallelism cuts a weight into parts, of rows (colwise) or of columns (rowwise), and FSDP2
# shards the part of each rank once more and gathers the part. Scales are those of the full weight:
# amaxes cross both mesh dimensions, then each rank keeps the scales of its part.


class Cut(NamedTuple):
    """The mesh dimensions that cut a weight; None if nothing does.

    Attributes:
        fsdp: over which FSDP2 shards what it gathers.
        tp: over which tensor parallelism has cut the weight into parts.
    """

    fsdp: int | None
    tp: int | None


def cut_of(param: DTensor, gathered: bool = True, fqn: str = "") -> Cut:
    """Which mesh dimensions cut a weight.

    Under HSDP each replica holds the weight whole, so the replicate dimension is left out.

    Args:
        gathered: whether FSDP2 manages the parameter; its mesh dimensions come before those of
            tensor parallelism. Not gathered, all dimensions are of tensor parallelism.
        fqn: the layer, for messages.

    Raises:
        ValueError: the placement is another than FSDP, HSDP, tensor parallelism over one mesh
            dimension, or that under one of those.
    """
    cuts = [i for i, placement in enumerate(param.placements) if not placement.is_replicate()]
    # What FSDP2 shards of a part that is cut along the same dimension is a `_StridedShard`, which
    # is no `Shard`.
    dims = range(len(param.shape))
    shards = [i for i in cuts if getattr(param.placements[i], "dim", None) in dims]
    if cuts != shards or not 1 <= len(cuts) <= (2 if gathered else 1):
        found = "gathered by fully_shard" if gathered else "not gathered by fully_shard"
        raise ValueError(
            f"{fqn or 'a float8 weight'} is placed as {param.placements} on {param.device_mesh} "
            f"and {found}: fp8dist takes weights sharded by fully_shard (FSDP, HSDP), by tensor "
            "parallelism (Shard(0) or Shard(1) over one mesh dimension), or by both. Call "
            "fully_shard after parallelize_module, and shard over no other dimension; or leave "
            "the layer out of convert_to_float8_training"
        )
    if gathered:
        return Cut(cuts[0], cuts[1] if len(cuts) == 2 else None)
    return Cut(None, cuts[0])


def check_part(fqn: str, size: Size, dim: int, ranks: int, recipe: Recipe) -> None:
    """Refuse to cut a weight of `size` along `dim` into parts that a recipe cannot scale.

    Raises:
        ValueError: the parts are not equal multiples of `recipe.dim_multiple`.
    """
    extent, multiple = size[dim], recipe.dim_multiple
    if ranks > 1 and extent % (ranks * multiple):
        name = ("out_features", "in_features")[dim]
        raise ValueError(
            f"{fqn or 'a float8 weight'}: tensor parallelism over {ranks} ranks cuts {name}="
            f"{extent} into parts of {extent / ranks:g}, recipe {recipe.name!r} needs multiples "
            f"of {multiple}: use fewer ranks, or leave the layer out of "
            "convert_to_float8_training or of the plan"
        )


def shard_of(param: DTensor, recipe: Recipe, gathered: bool = True, fqn: str = "") -> Shard:
    """A parameter's shard on this rank, and where it lies in the weight; see [Note: parts].

    Args:
        gathered, fqn: as `cut_of` takes them.

    Raises:
        ValueError: as `cut_of` and `check_part` do, or FSDP2 cuts columns that are scaled together.
    """
    if len(param.shape) == 3:
        return _shard_of_experts(param, recipe, gathered, fqn)
    cut, mesh = cut_of(param, gathered, fqn), param.device_mesh
    whole = part = (param.shape[0], param.shape[1])
    part_start = (0, 0)
    if cut.tp is not None and mesh.size(cut.tp) > 1:
        dim, ranks = _tensor_dim(param, cut.tp), mesh.size(cut.tp)
        check_part(fqn, whole, dim, ranks, recipe)
        extent = whole[dim] // ranks
        part = _with(part, dim, extent)
        part_start = _with(part_start, dim, mesh.get_local_rank(cut.tp) * extent)
    largest, start, world = part, (0, 0), 1
    if cut.fsdp is not None:
        dim, world = _tensor_dim(param, cut.fsdp), mesh.size(cut.fsdp)
        extent = -(-part[dim] // world)
        largest = _with(part, dim, extent)
        start = _with(start, dim, min(mesh.get_local_rank(cut.fsdp) * extent, part[dim]))
    _check_columns(part, largest[1], recipe, fqn)
    data = param._local_tensor._tensor  # type: ignore[attr-defined]  # a Float8ShardedWeight
    return Shard(data, part, start, largest, recipe, world, whole, part_start)


def _check_columns(size: Sequence[int], columns: int, recipe: Recipe, fqn: str) -> None:
    if recipe.scale_format == "e8m0" and columns % recipe.weight[1]:
        raise ValueError(
            f"{fqn or 'a weight'} of {' x '.join(map(str, size))} is sharded on dim "
            f"{len(size) - 1} into {columns} columns, not a multiple of the {recipe.weight[1]} "
            f"that recipe {recipe.name!r} scales together: shard it on dim 0"
        )


def _shard_of_experts(param: DTensor, recipe: Recipe, gathered: bool, fqn: str) -> Shard:
    """`shard_of` a weight (E, R, C), see [Note: experts] in `shard`."""
    cut, mesh = cut_of(param, gathered, fqn), param.device_mesh
    if cut.fsdp is None or cut.tp is not None:
        raise ValueError(
            f"{fqn}: the weights of experts are placed as {param.placements}: in float8 they can "
            "be sharded by fully_shard alone. Leave tensor and expert parallelism away from them, "
            "or leave them out of convert_moe_to_float8_training"
        )
    dim, world, rank = (
        _tensor_dim(param, cut.fsdp),
        mesh.size(cut.fsdp),
        mesh.get_local_rank(cut.fsdp),
    )
    extent = -(-param.shape[dim] // world)
    first = min(rank * extent, param.shape[dim])
    local = list(param.shape)
    local[dim] = extent
    experts, rows, columns = local
    _check_columns(param.shape, columns, recipe, fqn)
    of_expert = param.shape[1]
    return Shard(
        as_matrix(param._local_tensor._tensor),  # type: ignore[attr-defined]  # a Float8ShardedWeight
        matrix_size(param.shape),
        (first * of_expert, 0) if dim == 0 else _with((0, 0), dim - 1, first),
        (experts * rows, columns),
        recipe,
        world,
        experts=(of_expert, rows),
    )


def like(whole: DTensor, local: torch.Tensor) -> DTensor:
    """Another local part of a tensor of the same size and placements."""
    return DTensor.from_local(
        local,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def matrix_size(size: torch.Size) -> Size:
    """Of the matrix of experts' weights one below the other; of a matrix, its own."""
    return size[:-1].numel(), size[-1]


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """Experts' weights one below the other, a view; a matrix as it is."""
    return x if x.dim() == 2 else x.view(matrix_size(x.shape))


def share_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch._C._is_alias_of(a, b))  # type: ignore[attr-defined]  # not in torch's stubs


def _tensor_dim(param: DTensor, mesh_dim: int) -> int:
    return param.placements[mesh_dim].dim  # type: ignore[attr-defined]  # a Shard


def _with(size: Size, dim: int, extent: int) -> Size:
    return (extent, size[1]) if dim == 0 else (size[0], extent)


Groups = tuple[dist.ProcessGroup, ...]

# By the group along an FSDP dimension and the name of that along a TP dimension: that of both.
_joint: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[str, dist.ProcessGroup]] = (
    weakref.WeakKeyDictionary()
)


def groups_of(param: DTensor, cut: Cut) -> Groups:
    """The groups along the mesh dimensions that cut a weight, those of one rank left out."""
    mesh = param.device_mesh
    dims = [dim for dim in cut if dim is not None]
    return tuple(mesh.get_group(dim) for dim in dims if mesh.size(dim) > 1)


def known_groups(groups: Groups) -> Groups:
    """The one group that spans `groups`, if `join` has made it; else `groups`.

    Not made here, where a rank may be alone with its pipeline stage: other stages would have to
    help making it. An all-reduce along one dimension after the other gives the same.
    """
    if len(groups) < 2:
        return groups
    fsdp, tp = groups
    joint = _joint.get(fsdp, {}).get(tp.group_name)
    return groups if joint is None else (joint,)


def join(param: DTensor, groups: Groups) -> dist.ProcessGroup:
    """The group that spans both `groups` of a weight that FSDP2 and tensor parallelism cut.

    The first call makes it, on all ranks of the root mesh.
    """
    known = known_groups(groups)
    if len(known) == 2:
        fsdp, tp = known
        flattened = _flattened(param.device_mesh, cut_of(param))
        _joint.setdefault(fsdp, {})[tp.group_name] = flattened.get_group()
        known = known_groups(groups)
    return known[0]


def _flattened(mesh: DeviceMesh, cut: Cut) -> DeviceMesh:
    names = [(mesh.mesh_dim_names or ())[dim] for dim in cut if dim is not None]
    # A name of its own: the user may have given the default one to something else.
    return mesh[tuple(names)]._flatten("_".join(["fp8dist", *names]))
