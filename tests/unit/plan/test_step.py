"""Which parameters are gathered together; the rest of a step is compared in test_dry_run.py with
formulas, and in tests/distributed/test_plan.py with real ranks."""

import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from fp8dist.plan.figures import PURPOSES
from fp8dist.plan.step import MEMORY, Passes, _own_modules


def test_modules_of_a_group(mesh: DeviceMesh) -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = nn.Sequential(inner, nn.Sequential(nn.Linear(4, 4)))
    fully_shard(inner[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert list(_own_modules(model)) == [model, inner, inner[0], model[1], model[1][0]]
    assert list(_own_modules(inner[1])) == [inner[1]]


def test_every_byte_has_a_meaning() -> None:
    assert Passes(copies=1, shards=2, operands=3).total == 6
    assert all(meaning and not meaning.endswith(".") for meaning in (MEMORY | PURPOSES).values())
