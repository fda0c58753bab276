"""A weight's unshard under FSDP2, in parts that are timed."""

import itertools
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist
from bench_step import Variant
from harness import (
    CUDA,
    DEVICE,
    Mark,
    check,
    check_same_bytes,
    host_seconds,
    mark,
    median_seconds,
    occupy,
    seconds_between,
    sqnr,
    synchronize,
)
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fp8dist import numerics
from fp8dist.config import recipe as recipe_of
from fp8dist.train.wire import CountingAllGather

WARM_UP_CALLS = 2
LOWEST_SQNR = 25.0
"""dB that an unsharded weight keeps to its shards' values; float8 leaves 31 (sqnr.py)."""


class TimedAllGather(CountingAllGather):
    """FSDP2's all-gather, as bytes, which marks its begin and end, and when its buffer is made.

    Without `communicates` the buffer is left as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.communicates = True
        self.marks: list[Mark] = []
        self.gathered: torch.Tensor | None = None

    def allocate(
        self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        self.marks = [mark()]
        return super().allocate(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        self.marks.append(mark())
        work = None
        if self.communicates:
            # gloo takes no float8, which torchao gathers as such.
            sent, self.gathered = input_tensor.view(torch.uint8), output_tensor.view(torch.uint8)
            work = super().__call__(self.gathered, sent, group, async_op)
        self.marks.append(mark())
        return work


def expected_bytes(variant: Variant, weight: torch.Tensor) -> torch.Tensor:
    """What all ranks' payloads are together: 1-D, uint8."""
    if variant.library == "bf16":
        return weight.bfloat16().flatten().view(torch.uint8)
    recipe = recipe_of(variant.recipe)
    data, scale, *_ = numerics.quantize(
        weight, recipe.weight, recipe.weight_dtype, recipe.scale_format
    )
    payload = data.view(torch.uint8)
    if recipe.scale_format == "e8m0":
        payload = torch.cat([payload, numerics.scale_to_exponent(scale)], dim=1)
    return payload.flatten()


def check_unsharded(unsharded: torch.Tensor, weight: torch.Tensor) -> None:
    """That what was unsharded is `weight`, as far as float8 keeps it."""
    if hasattr(unsharded, "to_original_precision"):  # torchao's has no other way
        unsharded = unsharded.to_original_precision()
    decibels = sqnr(unsharded, weight)
    check(decibels >= LOWEST_SQNR, f"SQNR of the unsharded weight is {decibels:.1f} dB")


class Ranks:
    """All ranks as one mesh, each as a mesh of its own, and as a group that waits on the CPU."""

    def __init__(self) -> None:
        self.count = dist.get_world_size()
        self.mesh = init_device_mesh(DEVICE, (self.count,))
        grid = init_device_mesh(DEVICE, (self.count, 1), mesh_dim_names=("ranks", "alone"))
        self.alone = grid["alone"]
        self.host_group = dist.new_group(backend="gloo")
        self.share_a_gpu = CUDA and self.count > torch.cuda.device_count()

    def in_turn(self, function: Callable[[], list[float]]) -> list[float]:
        """What a function that does not communicate returns, each rank calling it alone."""
        result: list[float] = []
        for rank in range(self.count):
            if rank == dist.get_rank():
                result = function()
                synchronize()
            dist.barrier(group=self.host_group)
        return result

    def reduce(self, values: list[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        everywhere = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(everywhere, op, group=self.host_group)
        return everywhere.tolist()


def model_of(
    variant: Variant, n: int, k: int, weights: int, mesh: DeviceMesh
) -> tuple[nn.Sequential, Callable[[nn.Module], None] | None]:
    """Weights (n, k), the same on all ranks, each sharded by itself; and variant's precompute."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(k, n, bias=False, device=DEVICE) for _ in range(weights)))
    after_step = variant.convert(model)
    for layer in model:
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    return model, after_step


class Unsharding:
    """A weight to unshard."""

    def __init__(self, variant: Variant, n: int, k: int, ranks: Ranks) -> None:
        self.variant, self.ranks = variant, ranks
        model, after_step = model_of(variant, n, k, 1, ranks.mesh)
        if after_step is not None:
            after_step(model)
        self.layer = model[0]
        self.all_gather = TimedAllGather()
        self.layer.set_custom_all_gather(self.all_gather)

    def unshard(self) -> list[Mark]:
        """Unshard and reshard; returns the marks between the parts of the first."""
        self.all_gather.marks = []
        start = mark()
        self.layer.unshard()
        end = mark()
        self.layer.reshard()
        return [start, *self.all_gather.marks, end]

    def check(self, weight: torch.Tensor) -> None:
        """That the gathered bytes and the unsharded weight are those of `weight`, (N, K)."""
        self.layer.unshard()
        if self.ranks.count > 1:
            gathered = self.all_gather.gathered
            check(gathered is not None, "nothing was gathered")
            if gathered is not None:
                check_same_bytes(gathered, expected_bytes(self.variant, weight), "gathered")
        check_unsharded(self.layer.weight.detach(), weight)
        self.layer.reshard()
        self.all_gather.gathered = None

    def stages(self, calls: int) -> list[float]:
        """Median seconds of cast, copy-in, collective and copy-out."""
        if self.ranks.count == 1:
            return [median_seconds(self.unshard), 0.0, 0.0, 0.0]
        self.all_gather.communicates = False
        local = self.ranks.in_turn(lambda: self._medians(calls, ahead=True))
        cast, copy_in, _, copy_out = self.ranks.reduce(local, dist.ReduceOp.MAX)
        self.all_gather.communicates = True
        # A GPU that one rank keeps busy would keep the others from communicating.
        together = self._medians(calls, ahead=not self.ranks.share_a_gpu)
        _, _, collective, _ = self.ranks.reduce(together, dist.ReduceOp.MIN)
        return [cast, copy_in, collective, copy_out]

    def _medians(self, calls: int, ahead: bool) -> list[float]:
        """Median seconds between the marks; `ahead`: the host queues a call before it runs."""
        for _ in range(WARM_UP_CALLS):
            self.unshard()
        launch = host_seconds(self.unshard)
        all_marks = []
        for _ in range(calls):
            if ahead:
                occupy(min(1.5 * launch + 50e-6, 0.01))
            all_marks.append(self.unshard())
        synchronize()
        seconds = [
            [seconds_between(start, end) for start, end in itertools.pairwise(marks)]
            for marks in all_marks
        ]
        return [statistics.median(stage) for stage in zip(*seconds, strict=True)]


def precompute_seconds(variant: Variant, n: int, k: int, weights: int, ranks: Ranks) -> float:
    """Seconds of precompute for each weight, without its all-reduce, on the slowest rank.

    Each rank has weights as large as its shards, to itself.
    """
    model, after_step = model_of(variant, n // ranks.count, k, weights, ranks.alone)
    if after_step is None:
        return 0.0
    local = ranks.in_turn(lambda: [median_seconds(lambda: after_step(model))])
    (seconds,) = ranks.reduce(local, dist.ReduceOp.MAX)
    return seconds / weights
