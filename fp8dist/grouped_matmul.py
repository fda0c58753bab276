"""Grouped float8 matmuls, of tokens by their expert's weight, and their dequantized stand-in."""

import torch
import torch.nn.functional as F
from torch.library import Library, register_fake

from fp8dist import hardware, mx_grouped_matmul, numerics
from fp8dist.config import Recipe
from fp8dist.grouped_numerics import ContractedRows, ScaledGroups, dequantize_groups
from fp8dist.kernels import grouped
from fp8dist.numerics import Scaled

# `torch._scaled_grouped_mm` and `F.scaled_grouped_mm` call the same kernel, but only for the first
# does the compiler tune another, with mode="max-autotune-no-cudagraphs". On Hopper GPUs kernels of
# our own multiply, to the same bits: torch's takes longer for tokens times weights where experts
# have different numbers of tokens, as they have, and for grad_weight, whose sums are short; and it
# takes no weights whose rows are contracted, which would be transposed for it.

_library = Library("fp8dist", "FRAGMENT")
_library.define(
    "grouped_mm(Tensor a, Tensor b, Tensor ends) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`F.grouped_mm`, which the compiler knows in bfloat16 only."""
    return F.grouped_mm(a, b, offs=ends)


_library.impl("grouped_mm", _grouped_mm, "CompositeExplicitAutograd")


@register_fake("fp8dist::grouped_mm", lib=_library)
def _(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    if b.dim() == 2:
        return a.new_empty(ends.size(0), a.size(0), b.size(1))
    return a.new_empty(a.size(0), b.size(2))


def scaled_grouped_matmul(
    a: Scaled,
    b: Scaled | ContractedRows,
    ends: torch.Tensor,
    output_dtype: torch.dtype,
    recipe: Recipe,
    *,
    fast_accum: bool = False,
    emulate: bool = False,
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    """The tokens of each group times the weight of its expert: output and grad_input.

    Args:
        a: (M, K), tokens.
        b: (E * N, K), the weights one below the other; or (E * K, N), whose rows are contracted.
        ends: (E,), int32; see [Note: groups] in `grouped_numerics`.
        after: for a transpose of b, see [Note: only in backward] in `kernels.ops`.

    Returns:
        (M, N), output_dtype; what is in rows of no group is undefined, as it is in `F.grouped_mm`.
    """
    experts = ends.numel()
    if not hardware.multiplies(a.data.device, recipe, emulate, grouped=True):
        a_hp = _in_matmul_dtype(numerics.dequantize(a.data, a.scale))
        weights = _in_matmul_dtype(_dequantized(b, experts))
        return torch.ops.fp8dist.grouped_mm(a_hp, weights, ends).to(output_dtype)
    n = b.data.size(1) if isinstance(b, ContractedRows) else b.data.size(0) // experts
    if a.data.size(0) == 0:
        return a.scale.new_zeros((0, n), dtype=output_dtype)
    if isinstance(b, ContractedRows):
        if fast_accum and grouped.multiplies_in_gluon(a.data):
            operands = a.data, b.data, _inverse(a).flatten(), b.inverse
            output = torch.ops.fp8dist.scaled_grouped_mm_rows(*operands, ends)
            return output.to(output_dtype)
        b = grouped.transposed(b, after)
    if recipe.scale_format == "e8m0":
        return mx_grouped_matmul.tokens_by_weights(a, b, ends).to(output_dtype)
    inverses = _inverse(a).flatten(), _inverse(b).flatten()
    if fast_accum and grouped.multiplies_groups(a.data):
        output = torch.ops.fp8dist.scaled_grouped_mm(a.data, b.data, *inverses, ends)
    else:
        output = torch._scaled_grouped_mm(
            a.data.contiguous(),
            b.data.contiguous().unflatten(0, (experts, -1)).transpose(1, 2),
            inverses[0],
            inverses[1].view(experts, -1),
            offs=ends,
            out_dtype=torch.bfloat16,
            use_fast_accum=fast_accum,
        )
    return output.to(output_dtype)


def scaled_grouped_outer(
    a: ScaledGroups,
    b: ScaledGroups,
    output_dtype: torch.dtype,
    recipe: Recipe,
    *,
    fast_accum: bool = False,
    emulate: bool = False,
) -> torch.Tensor:
    """a @ b^T of each group by itself, tokens contracted: grad_weight.

    Args:
        a: (N, padded rows). b: (K, padded rows).

    Returns:
        (E, N, K), output_dtype; 0 for a group without tokens.
    """
    if not hardware.multiplies(a.data.device, recipe, emulate, grouped=True):
        a_hp, b_hp = (_in_matmul_dtype(dequantize_groups(x)) for x in (a, b))
        # Rows in memory, as torch's grouped matmul wants operands.
        a_hp, b_hp = a_hp.contiguous(), b_hp.contiguous()
        return torch.ops.fp8dist.grouped_mm(a_hp, b_hp.t(), a.ends).to(output_dtype)
    if recipe.scale_format == "e8m0":
        return mx_grouped_matmul.outer(a, b).to(output_dtype)
    inverses = _inverse(a).flatten(), _inverse(b).flatten()
    if fast_accum and grouped.multiplies_in_gluon(a.data):
        output = torch.ops.fp8dist.scaled_grouped_outer(a.data, b.data, *inverses, a.ends)
    else:
        output = torch._scaled_grouped_mm(
            a.data.contiguous(),
            b.data.contiguous().t(),
            *inverses,
            offs=a.ends,
            out_dtype=torch.bfloat16,
            use_fast_accum=fast_accum,
        )
    return output.to(output_dtype)


def _inverse(x: Scaled | ScaledGroups) -> torch.Tensor:
    return x.scale.reciprocal() if x.inverse is None else x.inverse


def _dequantized(b: Scaled | ContractedRows, experts: int) -> torch.Tensor:
    """(E, K, N)."""
    if isinstance(b, ContractedRows):
        return b.data.float().unflatten(0, (experts, -1)) * b.inverse[:, None, None]
    return numerics.dequantize(b.data, b.scale).unflatten(0, (experts, -1)).transpose(1, 2)


def _in_matmul_dtype(x: torch.Tensor) -> torch.Tensor:
    # A GPU's grouped matmuls take bfloat16, in which float8 times a power of two is exact.
    return x.bfloat16() if x.is_cuda or hardware.matmuls_are_assumed() else x
