"""Experts in float32 without contents, which torch multiplies with contents only."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fp8dist.experts import Float8Experts


class _Product(torch.autograd.Function):
    """A grouped matmul of tokens (M, K) by weights (E, K, N), as far as sizes go."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens, weights)
        return tokens.new_empty(tokens.size(0), weights.size(2))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, weights = ctx.saved_tensors
        return torch.empty_like(tokens), torch.empty_like(weights)


class Float32Groups(TorchFunctionMode):
    """While it is open, `F.grouped_mm` takes fake tensors of float32, as it does real ones."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.__name__ == "_grouped_mm":  # which `F.grouped_mm` calls
            tokens, weights = args
            if tokens.dtype == torch.float32 and not isinstance(weights, Float8Experts):
                return _Product.apply(tokens, weights)
        return func(*args, **(kwargs or {}))
