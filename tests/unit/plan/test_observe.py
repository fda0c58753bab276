"""What is handed to a process group, and what is alive, seen below Python's layers."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from fp8dist.plan.observe import Collective, Observer


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", rank=0, world_size=6, store=FakeStore())
    yield init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp_shard", "tp"))
    dist.destroy_process_group()


def test_collectives_by_kind(mesh: DeviceMesh) -> None:
    shards, tp = mesh.get_group("dp_shard"), mesh.get_group("tp")
    # torch 2.13 has renamed these.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    gather_functional = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
    with Observer(mesh) as observer:
        observer.phase = "forward"
        for size in (4, 6):
            gather(torch.empty(3 * size), torch.empty(size), group=shards)
        observer.phase = "backward"
        scatter(torch.empty(4), torch.empty(12), group=shards)
        dist.all_reduce(torch.ones(5, dtype=torch.int32), dist.ReduceOp.MAX, group=dist.group.WORLD)
        gathered = gather_functional(torch.ones(2, 2, dtype=torch.bfloat16), 0, tp)
        funcol.wait_tensor(gathered)
    assert observer.calls == {
        Collective("forward", "all_gather", "", "float32", "dp_shard", 3): 2,
        Collective("backward", "reduce_scatter", "SUM", "float32", "dp_shard", 3): 1,
        Collective("backward", "all_reduce", "MAX", "int32", "several", 6): 1,
        Collective("backward", "all_gather", "", "bfloat16", "tp", 2): 1,
    }
    assert list(observer.handed.values()) == [40, 48, 20, 8]


def test_what_a_dtensor_sends_inside_of_an_operation(mesh: DeviceMesh) -> None:
    cut = DTensor.from_local(torch.ones(4, 8), mesh["tp"], [Shard(1)], run_check=False)
    whole = DTensor.from_local(torch.ones(16, 8), mesh["tp"], [Replicate()], run_check=False)
    with Observer(mesh) as observer:
        (cut @ whole).full_tensor()  # partial sums
    (kind,) = observer.calls
    assert (kind.operation, kind.reduction, kind.over) == ("all_reduce", "SUM", "tp")


def test_what_is_alive(mesh: DeviceMesh) -> None:
    before = torch.ones(1000)
    with Observer(mesh) as observer:
        kept = before[:10] * 2
        view, gone = kept.view(2, 5), torch.ones(50)
        assert observer.live_bytes() == 4 * (10 + 50)
        del gone, view
        before.add_(1)
        assert observer.live_bytes() == 4 * 10


def test_buffers_count_until_they_are_resized(mesh: DeviceMesh) -> None:
    waiting: list[torch.Tensor] = []
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    with Observer(mesh, lambda: waiting) as observer:

        def gathered() -> torch.Tensor:
            flat = torch.empty(30)
            gather(flat, flat[:10], group=mesh.get_group("dp_shard"))
            return flat

        first = gathered()
        assert observer.peak_of_buffers == 120
        first.untyped_storage().resize_(0)
        second = gathered()
        assert observer.peak_of_buffers == 120
        waiting.append(torch.ones(100))
        third = gathered()
        assert observer.peak_of_buffers == 120 + 120 + 400
        assert observer.live_bytes() == 0
        del second, third


def test_casts_of_experts(mesh: DeviceMesh) -> None:
    """What finds amaxes first reads twice; tokens with a factor read that, too."""
    ops, ends = torch.ops.fp8dist, torch.tensor([40, 64], dtype=torch.int32)
    x, factor = torch.ones(64, 32, dtype=torch.bfloat16), torch.ones(2, 32)
    data, scale = torch.ones(128, 32).to(torch.float8_e4m3fn), torch.ones(128, 1)
    for op, given, reads in (
        (ops.quantize_groups, (x, ends, True, data.dtype, factor), 2),
        (ops.pad_groups, (x, ends, 64), 1),
        (ops.rescale_each, (data, scale, (1, 32), 64, (32, 1), "e8m0", None), 1),
    ):
        with Observer(mesh) as observer:
            out = op.default(*given)
        read, written = (
            sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
            for tensors in (given, out)
        )
        assert observer.casts_of_experts == reads * read + written
