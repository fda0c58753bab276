"""Shards of weights that ranks would have, and a pass over them."""

from typing import Any

import torch

from fp8dist.config import RECIPES, Recipe
from fp8dist.precompute import ScalePass
from fp8dist.shard import Shard, empty_scales

CPU = torch.device("cpu")
TENSORWISE = RECIPES["tensorwise"]
N, K = 48, 64


def hp_weight(rows: int = N, columns: int = K, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def whole(weight: torch.Tensor, recipe: Recipe = TENSORWISE) -> Shard:
    return part(weight, slice(0, weight.size(0)), recipe)


def part(weight: torch.Tensor, rows: slice, recipe: Recipe = TENSORWISE) -> Shard:
    """Some rows. How many the largest shard has matters to e8m0 only; here it has them all."""
    size = (weight.size(0), weight.size(1))
    return Shard(weight[rows], size, start=(rows.start, 0), largest=size, recipe=recipe)


class Group:
    """A process group of two, of which the other rank is simulated."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


def grid(
    weight: torch.Tensor, recipe: Recipe, fsdp: tuple[int, int], tp: tuple[int, int]
) -> list[Shard]:
    """The shards of all ranks, by the number of ranks and the dimension they cut."""
    (fsdp_ranks, fsdp_dim), (tp_ranks, tp_dim) = fsdp, tp
    shards, size = [], (weight.size(0), weight.size(1))
    for i, part in enumerate(weight.chunk(tp_ranks, tp_dim)):
        chunks = part.chunk(fsdp_ranks, fsdp_dim)
        part_start, start = [0, 0], [0, 0]
        part_start[tp_dim] = i * part.size(tp_dim)
        for j in range(fsdp_ranks):
            data = chunks[j] if j < len(chunks) else part[:0]
            start[fsdp_dim] = min(j * chunks[0].size(fsdp_dim), part.size(fsdp_dim))
            part_size, largest = (tuple(x.shape) for x in (part, chunks[0]))
            where = part_size, tuple(start), largest
            shards.append(Shard(data, *where, recipe, fsdp_ranks, size, tuple(part_start)))
    return shards


def run_pass(
    shards: list[Shard],
    groups: list[Any],
    payloads: list[torch.Tensor | None] | None = None,
    device: torch.device = CPU,
) -> tuple[list[list[torch.Tensor]], torch.Tensor, list[int]]:
    """The scales, the amaxes, and where those of each weight end."""
    scales = [empty_scales(shard, device) for shard in shards]
    scale_pass = ScalePass(shards, scales, payloads or [None] * len(shards), device)
    amaxes = scale_pass.run(groups)
    return scales, amaxes, scale_pass.ends
