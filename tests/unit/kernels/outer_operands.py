"""What grad_weight of experts is multiplied of, and torch's own product."""

import torch

from fp8dist import grouped_numerics
from fp8dist.config import COLUMN
from fp8dist.grouped_numerics import ScaledGroups

E4M3 = torch.float8_e4m3fn


def groups_of(counts: list[int], columns: int) -> ScaledGroups:
    ends = torch.tensor(counts, device="cuda").cumsum(0, dtype=torch.int32)
    x = torch.randn(sum(counts), columns, device="cuda")
    return grouped_numerics.quantize_groups(x, ends, COLUMN, E4M3, "power_of_2")


def outer(a: ScaledGroups, b: ScaledGroups) -> torch.Tensor:
    inverses = a.scale.reciprocal().flatten(), b.scale.reciprocal().flatten()
    return torch.ops.fp8dist.scaled_grouped_outer(a.data, b.data, *inverses, a.ends)


def outer_of_torch(a: ScaledGroups, b: ScaledGroups) -> torch.Tensor:
    return torch._scaled_grouped_mm(
        a.data.contiguous(),
        b.data.contiguous().t(),
        a.scale.reciprocal().flatten(),
        b.scale.reciprocal().flatten(),
        offs=a.ends,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
