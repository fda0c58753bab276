"""Where the shards of a weight lie under FSDP2, tensor parallelism and both."""

import itertools
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from fp8dist.config import RECIPES
from fp8dist.tensors import placement
from fp8dist.tensors.placement import Cut, cut_of
from fp8dist.tensors.sharded_weight import Float8ShardedWeight

N, K = 96, 64
ROWWISE = RECIPES["rowwise"]


class Group:
    def __init__(self, name: str) -> None:
        self.group_name = name


class Mesh:
    """A mesh of any size, seen from one of its ranks; it counts the groups that it makes."""

    def __init__(self, sizes: tuple[int, ...], rank: tuple[int, ...] = ()) -> None:
        self.sizes, self.rank = sizes, rank or (0,) * len(sizes)
        self.mesh_dim_names = ("replicate", "dp", "tp")[-len(sizes) :]
        self.groups = [Group(name) for name in self.mesh_dim_names]
        self.made: list[tuple[Any, str]] = []

    def size(self, dim: int) -> int:
        return self.sizes[dim]

    def get_local_rank(self, dim: int) -> int:
        return self.rank[dim]

    def get_group(self, dim: int | None = None) -> Group:
        return self.groups[dim] if dim is not None else Group("joint")

    def __getitem__(self, names: Any) -> "Mesh":
        self.names = names
        return self

    def _flatten(self, name: str) -> "Mesh":
        self.made.append((self.names, name))
        return self


class Param:
    def __init__(
        self,
        mesh: Mesh,
        *placements: Any,
        shape: tuple[int, int] = (N, K),
        shard: torch.Tensor | None = None,
    ) -> None:
        self.device_mesh, self.placements, self.shape = mesh, placements, torch.Size(shape)
        self._local_tensor = Float8ShardedWeight(torch.empty(0) if shard is None else shard)


@pytest.mark.parametrize(
    ("placements", "gathered", "expected"),
    [
        ((Shard(0),), True, Cut(fsdp=0, tp=None)),
        ((Shard(1),), True, Cut(fsdp=0, tp=None)),
        ((Replicate(), Shard(0)), True, Cut(fsdp=1, tp=None)),
        ((_StridedShard(0, split_factor=2), Shard(0)), True, Cut(fsdp=0, tp=1)),
        ((Shard(0), Shard(1)), True, Cut(fsdp=0, tp=1)),
        ((Shard(0), Replicate()), True, Cut(fsdp=0, tp=None)),
        ((Replicate(), Shard(0), Shard(1)), True, Cut(fsdp=1, tp=2)),
        ((Shard(0),), False, Cut(fsdp=None, tp=0)),
        ((Replicate(), Shard(1)), False, Cut(fsdp=None, tp=1)),
    ],
)
def test_which_dimensions_cut_a_weight(
    placements: tuple[Any, ...], gathered: bool, expected: Cut
) -> None:
    mesh = Mesh((2,) * len(placements))
    assert cut_of(Param(mesh, *placements), gathered) == expected


@pytest.mark.parametrize(
    ("placements", "gathered"),
    [
        ((Replicate(),), True),
        ((Partial(),), True),
        ((Shard(0), Partial()), True),
        ((Shard(2),), True),
        ((Shard(0), Shard(0), Shard(1)), True),
        ((Replicate(),), False),
        ((Partial(),), False),
        ((Shard(0), Shard(1)), False),
    ],
)
def test_any_other_placement_is_refused(placements: tuple[Any, ...], gathered: bool) -> None:
    mesh = Mesh((2,) * len(placements))
    with pytest.raises(ValueError, match=r"^layers.0.wq is placed as .* Call fully_shard after"):
        cut_of(Param(mesh, *placements), gathered, "layers.0.wq")


def test_a_real_parameter(mesh: DeviceMesh) -> None:
    square = DeviceMesh("cpu", torch.zeros(1, 1, dtype=torch.int), mesh_dim_names=("rep", "shard"))
    local = Float8ShardedWeight(torch.zeros(N, K))
    param = DTensor.from_local(local, square, (Replicate(), Shard(0)), run_check=False)
    assert cut_of(param) == Cut(1, None)
    assert placement.groups_of(param, cut_of(param)) == ()
    shard = placement.shard_of(param, ROWWISE)
    assert shard.data is param._local_tensor._tensor
    assert shard.size == shard.whole == shard.largest == (N, K)
    assert shard.start == shard.part_start == (0, 0)


# dp ranks, tp ranks, tp dim, fsdp dim
CUTS = [
    *itertools.product((1, 2, 3, 5, 40), (1, 2, 3), (0, 1), (0,)),
    *itertools.product((2, 4), (2,), (0, 1), (1,)),
]


@pytest.mark.parametrize(("dp", "tp", "tp_dim", "fsdp_dim"), CUTS)
def test_shards_lie_where_their_elements_are(dp: int, tp: int, tp_dim: int, fsdp_dim: int) -> None:
    """Told from the elements: each is its own index. 5 dp ranks have short and 40 empty shards."""
    shape = (96, 96)
    weight = torch.arange(96 * 96).view(shape)
    for i, part in enumerate(weight.chunk(tp, tp_dim)):
        chunks = part.chunk(dp, fsdp_dim)
        for j in range(dp):
            data = chunks[j] if j < len(chunks) else part[:0]
            placements = (Shard(fsdp_dim), Shard(tp_dim))
            param = Param(Mesh((dp, tp), (j, i)), *placements, shape=shape, shard=data)
            shard = placement.shard_of(param, ROWWISE)
            assert shard.whole == shape
            assert shard.size == tuple(part.shape)
            assert divmod(part[0, 0].item(), 96) == shard.part_start
            assert shard.largest == tuple(chunks[0].shape)
            assert shard.world == dp
            if data.numel() > 0:
                row, column = (a + b for a, b in zip(shard.start, shard.part_start, strict=True))
                assert divmod(data[0, 0].item(), 96) == (row, column)
            else:
                assert shard.start == (part.size(0), 0)


def test_over_tensor_parallelism_alone_the_part_is_the_shard() -> None:
    param = Param(Mesh((3,), (2,)), Shard(0))
    shard = placement.shard_of(param, ROWWISE, gathered=False)
    assert shard.size == shard.largest == (32, K)
    assert (shard.start, shard.part_start, shard.world) == ((0, 0), (64, 0), 1)


@pytest.mark.parametrize(
    ("recipe", "dim", "ranks", "parts"),
    [
        ("tensorwise", 0, 4, "24"),
        ("rowwise", 1, 5, "12.8"),
        ("blockwise", 0, 2, "48"),
        ("mxfp8_rceil", 1, 4, "16"),
    ],
)
def test_parts_that_the_recipe_cannot_scale_are_refused(
    recipe: str, dim: int, ranks: int, parts: str
) -> None:
    name = ("out_features=96", "in_features=64")[dim]
    message = rf"layers.0.wq: tensor parallelism over {ranks} ranks cuts {name} into parts of "
    param = Param(Mesh((2, ranks)), Shard(0), Shard(dim))
    with pytest.raises(ValueError, match=message + rf"{parts}, recipe '{recipe}' needs multiples"):
        placement.shard_of(param, RECIPES[recipe], fqn="layers.0.wq")


def test_sizes_that_tensor_parallelism_does_not_cut_are_not_looked_at() -> None:
    param = Param(Mesh((2, 1)), Shard(0), Shard(0), shape=(5, 64))
    assert placement.shard_of(param, ROWWISE).largest == (3, 64)


def test_columns_that_mxfp8_scales_together_are_not_cut() -> None:
    param = Param(Mesh((4, 2)), Shard(1), Shard(0), shape=(128, 64))
    with pytest.raises(ValueError, match="layers.0.wq of 64 x 64 is sharded on dim 1 into 16 col"):
        placement.shard_of(param, RECIPES["mxfp8_rceil"], fqn="layers.0.wq")


def test_groups_run_along_the_dimensions_that_cut() -> None:
    mesh = Mesh((2, 2, 2))
    assert placement.groups_of(Param(mesh), Cut(1, 2)) == tuple(mesh.groups[1:])
    assert placement.groups_of(Param(mesh), Cut(None, 2)) == (mesh.groups[2],)
    assert placement.groups_of(Param(Mesh((2, 1, 2))), Cut(1, None)) == ()


def test_one_group_of_both_dimensions_is_made_once() -> None:
    mesh = Mesh((2, 2, 2))
    param = Param(mesh, Replicate(), Shard(0), Shard(1))
    groups = placement.groups_of(param, Cut(1, 2))
    assert placement.known_groups(groups) == groups
    joint = placement.join(param, groups)
    assert mesh.made == [(("dp", "tp"), "fp8dist_dp_tp")]
    assert placement.known_groups(groups) == (joint,)
    assert placement.join(param, groups) is joint
    assert len(mesh.made) == 1
    assert placement.known_groups(groups[:1]) == groups[:1]
