"""Grouped matmuls of MXFP8 on Blackwell GPUs: torch's, of scales that torchao's kernels arrange."""

import torch
from torch.library import Library, register_fake

from fp8dist import grouped_numerics, numerics
from fp8dist.grouped_numerics import GROUP_MULTIPLE, ScaledGroups, padded_ends
from fp8dist.kernels.grouped import empty_outer, empty_product
from fp8dist.numerics import Scaled

# As torchao does for these matmuls, groups of tokens are padded to multiples of 32 on their way in,
# and what was padded is left out of what comes back. Ops, as not every compiler has a type for
# exponents.
_library = Library("fp8dist", "FRAGMENT")
for _name in "mx_grouped_mm", "mx_grouped_outer":
    _library.define(
        f"{_name}(Tensor a, Tensor b, Tensor a_exponents, Tensor b_exponents, Tensor ends) "
        "-> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )


def tokens_by_weights(a: Scaled, b: Scaled, ends: torch.Tensor) -> torch.Tensor:
    """See `grouped_matmul.scaled_grouped_matmul`; scaled in blocks of 1x32. bfloat16."""
    exponents = (numerics.scale_to_exponent(x.scale) for x in (a, b))
    return torch.ops.fp8dist.mx_grouped_mm.default(a.data, b.data, *exponents, ends)


def outer(a: ScaledGroups, b: ScaledGroups) -> torch.Tensor:
    """See `grouped_matmul.scaled_grouped_outer`; 32 tokens share a scale. bfloat16."""
    exponents = (numerics.scale_to_exponent(x.scale) for x in (a, b))
    return torch.ops.fp8dist.mx_grouped_outer.default(a.data, b.data, *exponents, a.ends)


def _mx_grouped_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_exponents: torch.Tensor,
    b_exponents: torch.Tensor,
    ends: torch.Tensor,
) -> torch.Tensor:
    """a (M, K), tokens, times b (E * N, K), by group: (M, N); exponents are uint8, (.., K / 32)."""
    from torchao.prototype.moe_training.kernels import mxfp8

    experts = ends.numel()
    data, exponents = (
        grouped_numerics.pad_groups(x.view(torch.uint8), ends, GROUP_MULTIPLE)
        for x in (a, a_exponents)
    )
    new_ends = padded_ends(ends, GROUP_MULTIPLE)
    of_weights = b_exponents.unflatten(0, (experts, -1))
    product = torch._scaled_grouped_mm(
        data.view(a.dtype),
        b.contiguous().unflatten(0, (experts, -1)).transpose(1, 2),
        mxfp8.triton_mx_block_rearrange_2d_M_groups(_e8m0(exponents), _of_kernels(new_ends)),
        mxfp8.triton_mx_block_rearrange_per_group_3d(_e8m0(of_weights)),
        offs=new_ends,
        out_dtype=torch.bfloat16,
    )
    return grouped_numerics.unpad_groups(product, ends, GROUP_MULTIPLE, a.size(0))


def _mx_grouped_outer(
    a: torch.Tensor,
    b: torch.Tensor,
    a_exponents: torch.Tensor,
    b_exponents: torch.Tensor,
    ends: torch.Tensor,
) -> torch.Tensor:
    """a (N, padded rows) times b^T, of b (K, padded rows), of each group by itself: (E, N, K);
    exponents are uint8, (.., padded rows / 32)."""
    from torchao.prototype.moe_training.kernels import mxfp8

    of_a, of_b = (
        mxfp8.triton_mx_block_rearrange_2d_K_groups(_e8m0(x.contiguous()), _of_kernels(ends // 32))
        for x in (a_exponents, b_exponents)
    )
    return torch._scaled_grouped_mm(
        a.contiguous(), b.contiguous().t(), of_a, of_b, offs=ends, out_dtype=torch.bfloat16
    )


def _of_kernels(ends: torch.Tensor) -> torch.Tensor:
    """torchao's kernels compile for powers of two of groups: with empty ones after the last."""
    missing = (1 << (ends.numel() - 1).bit_length()) - ends.numel()
    return torch.cat([ends, ends[-1:].expand(missing)])


def _e8m0(exponents: torch.Tensor) -> torch.Tensor:
    return exponents.view(torch.float8_e8m0fnu)


_library.impl("mx_grouped_mm", _mx_grouped_mm, "CompositeExplicitAutograd")
_library.impl("mx_grouped_outer", _mx_grouped_outer, "CompositeExplicitAutograd")
register_fake("fp8dist::mx_grouped_mm", empty_product, lib=_library)
register_fake("fp8dist::mx_grouped_outer", empty_outer, lib=_library)
