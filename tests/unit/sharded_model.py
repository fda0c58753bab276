"""A small model, layers 0 and 2 of which are float8 and shards of their own, and what is right."""

from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import fp8dist
from fp8dist import Float8Config

K = 32
INPUT = torch.randn(5, K, generator=torch.Generator().manual_seed(9))


def converted(seed: int = 0, **config: Any) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(K, 48), nn.ReLU(), nn.Linear(48, K), nn.Linear(K, 8))
    return fp8dist.convert_to_float8_training(model, config=Float8Config(**config))


def sharded(mesh: DeviceMesh, seed: int = 0, **config: Any) -> nn.Sequential:
    model = converted(seed, **config)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check_current(model: nn.Module) -> None:
    """Scales and payloads are those of the weights, by the definition of tensorwise scaling."""
    for layer in (model[0], model[2]):
        shard, state = layer.weight._local_tensor._tensor, layer.weight_state
        scale = torch.tensor(448 / shard.abs().max().item())
        assert state.scales[0][1].item() == scale.item()
        expected = (shard * scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        assert torch.equal(state.payload, expected)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(INPUT).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
