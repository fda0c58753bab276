"""Time what a weight takes the host: at each unshard under FSDP2, and once a step in precompute.

    torchrun --nproc-per-node 1 scripts/bench/bench_host.py --json outputs/host.json

A model of many small layers is bound by what the host does for each. Here it is --groups groups of
--weights weights (N, K), each group sharded by itself, for bf16 and those of bench_step.py's
variants that gather in float8. Microseconds per weight:

    unshard       an unshard and a reshard of its group, of which a step has two. As
                  `FSDPModule.unshard` does it, with FSDP2's look at what was initialised before
    precompute    the call after the optimizer step

by the clock, and, in brackets, by torch's profiler, which takes time itself at every operator. "per
step" is two unshards and precompute, by the clock, and then the ratio to the first variant's.
Nothing waits for the device in between. With one rank FSDP2 gathers nothing: it copies what others
cast, but not fp8dist's payloads. On a CPU the times are the work as well, and with more ranks than
one the communication.
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from bench_all_gather import DEFAULT_VARIANTS
from bench_step import Variant
from harness import (
    CUDA,
    DEVICE,
    compare,
    host_seconds,
    init_distributed,
    print_once,
    synchronize,
)
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.profiler import ProfilerActivity, profile, record_function
from unsharding import check_unsharded

WARM_UP_CALLS = 3
PROFILED_CALLS = 3  # whose thousands of operators it takes seconds to count


@dataclass(frozen=True)
class Row:
    """Microseconds of the host for each weight; `ratio`: of per_step to the first variant's."""

    variant: str
    unshard: float
    unshard_profiled: float
    precompute: float
    precompute_profiled: float
    per_step: float
    ratio: float

    def __str__(self) -> str:
        return (
            f"{self.variant:34s} unshard {self.unshard:6.1f} ({self.unshard_profiled:6.1f})  "
            f"precompute {self.precompute:6.1f} ({self.precompute_profiled:6.1f})  "
            f"per step {self.per_step:6.1f}  x{self.ratio:.2f}"
        )


@dataclass(frozen=True)
class Measured:
    """What `compare` takes: a row."""

    row: Row

    def __str__(self) -> str:
        return str(self.row)


def profiled_seconds(function: Callable[[], object]) -> float:
    """Seconds of a call on the host, as the profiler has it."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED_CALLS):
            with record_function("a call"):
                function()
            synchronize()
    (event,) = (event for event in profiler.key_averages() if event.key == "a call")
    return event.cpu_time_total / event.count / 1e6


def measure(
    name: str, options: argparse.Namespace, mesh: DeviceMesh, first: "Measured | None"
) -> "Measured":
    """Check and time a variant. `first`: the one that it is compared to."""
    torch.manual_seed(0)
    groups = nn.Sequential()
    for _ in range(options.groups):
        layers = (
            nn.Linear(options.columns, options.rows, bias=False, device=DEVICE)
            for _ in range(options.weights)
        )
        groups.append(nn.Sequential(*layers))
    expected = groups[0][0].weight.detach().clone()
    after_step = Variant.parse(name).convert(groups)
    for group in groups:
        fully_shard(group, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))

    def unshard() -> None:
        for group in groups:
            group.unshard()
            group.reshard()

    def precompute() -> None:
        if after_step is not None:
            after_step(groups)

    precompute()
    groups[0].unshard()
    check_unsharded(groups[0][0].weight.detach(), expected)
    groups[0].reshard()
    weights = options.groups * options.weights
    times = []
    for function in (unshard, precompute):
        for _ in range(WARM_UP_CALLS):
            function()
        gc.collect()  # now, and not while a call is timed
        clock = statistics.median(host_seconds(function) for _ in range(options.calls))
        times += [clock / weights * 1e6, profiled_seconds(function) / weights * 1e6]
    per_step = 2 * times[0] + times[2]
    ratio = 1.0 if first is None else per_step / first.row.per_step
    return Measured(Row(name, *times, per_step, ratio))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", default=DEFAULT_VARIANTS, help="comma-separated")
    for name, default in {
        "groups": 16,
        "weights": 16,
        "rows": 256,  # not --n and --k: torchrun takes --n for an option of its own
        "columns": 256,
        "calls": 20,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--json", type=Path, help="write rows, GPU, versions and date there")
    options = parser.parse_args()
    names = options.variants.split(",")
    for variant in map(Variant.parse, names):
        if variant.name != "bf16" and not variant.gather:
            raise ValueError(f"{variant.name}: does not gather in float8, leave it out")
    init_distributed()
    if not CUDA and dist.get_world_size() > 1 and any(n.startswith("torchao") for n in names):
        raise ValueError(
            f"--variants is {options.variants}: gloo cannot gather torchao's float8, leave torchao "
            "out or start one rank"
        )
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    print_once(f"microseconds of the host per weight; {'GPU' if CUDA else 'CPU'}")
    compare(names, lambda name, first: measure(name, options, mesh, first), options)


if __name__ == "__main__":
    main()
