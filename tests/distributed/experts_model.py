"""A model with experts, its batches, and how it is sharded."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

import fp8dist
from tests.distributed.harness import DEVICE
from tests.distributed.toy import mesh_of
from tests.unit.moe import StackedExperts

DIM, HIDDEN, VOCAB = 64, 96, 48
TOP_K, BATCH, SEQUENCE = 2, 12, 8


class Block(nn.Module):
    """A router and experts, to the best two of which each token goes."""

    def __init__(self, kind: Any, experts: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(DIM)
        self.router = nn.Linear(DIM, experts, bias=False)
        self.experts = kind(experts, DIM, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x).flatten(0, -2)
        weights, chosen = self.router(h).softmax(-1).topk(TOP_K)
        order = chosen.flatten().argsort(stable=True)
        experts = torch.arange(self.router.out_features, device=x.device)
        counts = (chosen.flatten()[:, None] == experts).sum(0)
        # By permutations, which a GPU does in one order always.
        every = h[:, None].expand(-1, TOP_K, -1).flatten(0, 1)
        outputs = self.experts(every[order], counts)[order.argsort()].unflatten(0, (-1, TOP_K))
        return x + (outputs * weights[..., None]).sum(1).type_as(x).view_as(x)


class Model(nn.Module):
    def __init__(self, kind: Any, experts: int, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(Block(kind, experts) for _ in range(2))
        self.output = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return self.output(x)


def new_model(
    config: Any = "rowwise", kind: Any = StackedExperts, experts: int = 4, recompute: bool = False
) -> Model:
    """The same weights in every process; a cast to bfloat16, as `StackedExperts` has it, changes
    none.
    """
    torch.manual_seed(0)
    model = Model(kind, experts, recompute).to(DEVICE)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(param.bfloat16())
    if config is not None:
        fp8dist.convert_moe_to_float8_training(model, config=config)
    return model


def placed_on(dim: int) -> Any:
    return lambda param: Shard(dim if param.dim() == 3 else 0)


def shard(model: Model, *mesh: int, dim: int = 0, **options: Any) -> Any:
    options |= {"mesh": mesh_of(*mesh), "shard_placement_fn": placed_on(dim)}
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def local_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return batches(step, dist.get_world_size())[dist.get_rank()]


def batches(step: int, world: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, targets), by rank."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (BATCH, SEQUENCE + 1), generator=generator).to(DEVICE)
    return [(part[:, :-1], part[:, 1:]) for part in tokens.chunk(world)]


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    tokens, targets = batch
    return F.cross_entropy(model(tokens).float().flatten(0, 1), targets.flatten())
