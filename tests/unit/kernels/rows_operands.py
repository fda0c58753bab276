"""Tokens, and weights of experts whose rows are contracted, and torch's own product."""

from typing import NamedTuple

import torch

from fp8dist import numerics
from fp8dist.config import ROW

E4M3 = torch.float8_e4m3fn


class Operands(NamedTuple):
    """As `fp8dist::scaled_grouped_mm_rows` takes them."""

    a: torch.Tensor
    b: torch.Tensor
    a_inverse: torch.Tensor
    b_inverse: torch.Tensor
    ends: torch.Tensor


def operands_of(counts: list[int], k: int, n: int) -> Operands:
    """Any bytes but NaN as weights, so that each is told from each."""
    a = numerics.quantize(torch.randn(sum(counts), k, device="cuda"), ROW, E4M3, "power_of_2")
    b = torch.randint(256, (len(counts) * k, n), device="cuda", dtype=torch.uint8)
    b[(b & 0x7F) == 0x7F] = 1
    b_inverse = 2.0 ** torch.randint(-3, 4, (len(counts),), device="cuda")
    ends = torch.tensor(counts, device="cuda").cumsum(0, dtype=torch.int32)
    return Operands(a.data, b.view(E4M3), a.scale.reciprocal().flatten(), b_inverse, ends)


def multiplied(x: Operands) -> torch.Tensor:
    return torch.ops.fp8dist.scaled_grouped_mm_rows(*x)


def multiplied_by_torch(x: Operands) -> torch.Tensor:
    experts, n = x.ends.numel(), x.b.size(1)
    transposed = x.b.view(torch.uint8).view(experts, -1, n).transpose(1, 2).contiguous()
    return torch._scaled_grouped_mm(
        x.a,
        transposed.view(E4M3).transpose(1, 2),
        x.a_inverse,
        x.b_inverse[:, None].expand(-1, n).contiguous(),
        offs=x.ends,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
