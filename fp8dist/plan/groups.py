"""Experts in float32 without contents, which torch multiplies with contents only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from fp8dist.experts import Float8Experts


class _Product(torch.autograd.Function):
    """A grouped matmul of tokens (M, K) by weights (E, K, N), as far as sizes go."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(tokens, weights)
        return tokens.new_empty(tokens.size(0), weights.size(2))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        tokens, weights = ctx.saved_tensors
        return torch.empty_like(tokens), torch.empty_like(weights)


@contextmanager
def float32_groups() -> Iterator[None]:
    """While it is open, `F.grouped_mm` takes fake tensors of float32, as it does real ones."""
    grouped_mm = F.grouped_mm

    def of_any_dtype(a: torch.Tensor, b: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if a.dtype == torch.float32 and not isinstance(b, Float8Experts):
            return _Product.apply(a, b)
        return grouped_mm(a, b, **kwargs)

    with mock.patch.object(F, "grouped_mm", of_any_dtype):
        yield
