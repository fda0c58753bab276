"""A mixture of experts in place of a feed-forward: every token goes to a few of many experts.

No token is dropped, and no loss term asks for balance: an expert that gets too few tokens is
favoured in the choice by a bias that grows a little every step (arXiv:2408.15664).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class MoEShape:
    """The sizes of the experts of one layer."""

    experts: int
    top_k: int
    """How many of the experts each token goes to."""
    hidden_dim: int
    """Of each expert; and of the expert that every token goes to as well."""
    bias_step: float = 1e-3
    """What the bias of an expert changes by in a step, up or down."""


class GroupedExperts(nn.Module):
    """SwiGLU feed-forwards whose weights lie in one tensor, and which take tokens in groups."""

    def __init__(self, dim: int, shape: MoEShape):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(shape.experts, shape.hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(shape.experts, dim, shape.hidden_dim))
        self.w3 = nn.Parameter(torch.empty(shape.experts, shape.hidden_dim, dim))

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Tokens (M, dim), sorted by expert, of which each has (experts,) many -> (M, dim)."""
        ends = counts.cumsum(0, dtype=torch.int32)
        w1, w2, w3 = (weight.transpose(1, 2) for weight in (self.w1, self.w2, self.w3))
        hidden = F.silu(F.grouped_mm(x, w1, offs=ends)) * F.grouped_mm(x, w3, offs=ends)
        return F.grouped_mm(hidden, w2, offs=ends)


class Router(nn.Module):
    """Chooses each token's experts, in float32; no linear layer, so that it is never float8."""

    bias: torch.Tensor  # (experts,), float32: part of the choice, not of the weights

    def __init__(self, dim: int, shape: MoEShape):
        super().__init__()
        self.top_k = shape.top_k
        self.weight = nn.Parameter(torch.empty(shape.experts, dim))
        self.register_buffer("bias", torch.zeros(shape.experts))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (M, dim) -> weights that add up to 1, and experts, (M, top_k) each."""
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        chosen = (scores.detach() + self.bias).topk(self.top_k, sorted=False).indices
        weights = scores.gather(1, chosen)
        return weights / weights.sum(1, keepdim=True), chosen


class MoE(nn.Module):
    """A router, the experts it chooses from, and one that every token goes to."""

    counts: torch.Tensor  # (experts,), float32: tokens of each since the last `balance`

    def __init__(self, dim: int, shape: MoEShape, shared_expert: nn.Module):
        super().__init__()
        self.shape = shape
        self.router = Router(dim, shape)
        self.experts = GroupedExperts(dim, shape)
        self.shared_expert = shared_expert
        self.register_buffer("counts", torch.zeros(shape.experts), persistent=False)

    def reset_buffers(self, device: torch.device | None = None) -> None:
        """Zero what `to_empty` leaves undefined, in float32 whatever the parameters are, on
        `device` or where it is.
        """
        for module, name in ((self.router, "bias"), (self, "counts")):
            place = device or getattr(module, name).device
            setattr(module, name, torch.zeros(self.shape.experts, device=place))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, seq, dim) -> (batch, seq, dim)."""
        tokens = x.flatten(0, -2)
        weights, chosen = self.router(tokens)
        experts = torch.arange(self.shape.experts, device=x.device)
        counts = (chosen.flatten()[:, None] == experts).sum(0)
        if self.training:
            # Twice where activations are recomputed: it is the ratios that count.
            self.counts.add_(counts)
        order = chosen.flatten().argsort(stable=True)
        outputs = self.experts(tokens[order // self.shape.top_k], counts)
        back = outputs[order.argsort()].unflatten(0, (-1, self.shape.top_k))
        mixed = (back * weights[..., None].to(back.dtype)).sum(1)
        return self.shared_expert(x) + mixed.view_as(x)


@torch.no_grad()
def balance(layers: Iterable[MoE], group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Move the biases towards equal loads, after a step; one all-reduce for all layers.

    Args:
        layers: all of a model; at least one.
        group: ranks with batches of their own.

    Returns:
        The load of each layer's busiest expert, 1 being an equal share: the mean over the layers,
        a number on the device.
    """
    layers = list(layers)
    counts = torch.stack([layer.counts for layer in layers])
    dist.all_reduce(counts, group=group)
    mean = counts.mean(1, keepdim=True)
    for layer, missing in zip(layers, (mean - counts).sign(), strict=True):
        layer.router.bias.add_(missing, alpha=layer.shape.bias_step)
        layer.counts.zero_()
    return (counts.amax(1, keepdim=True) / mean).mean()
