"""A converted layer that FSDP2 shards over one rank."""

from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import fp8dist
from fp8dist import Float8Config

N, K = 48, 32
INPUT = torch.randn(5, K, generator=torch.Generator().manual_seed(9))


def hp_weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def sharded(
    mesh: DeviceMesh, config: Float8Config | None = None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    layer = nn.Linear(K, N, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(hp_weight())
    fp8dist.convert_to_float8_training(layer, config=config)
    return fully_shard(layer, mesh=mesh)


def shard_of(layer: nn.Module) -> torch.Tensor:
    return layer.weight._local_tensor._tensor


def converted(mesh: DeviceMesh | None = None, **config: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K, bias=False))
    fp8dist.convert_to_float8_training(model, config=Float8Config(**config))
    return model if mesh is None else fully_shard(model, mesh=mesh)
