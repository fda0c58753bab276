"""What all benchmarks share: the setting, checks, timing, and how results are written.

A benchmark checks the result of what it is about to time (`check`, `check_same_bytes`), times it
(`median_seconds`, `kernels_of`), prints Markdown (`markdown_table`) and writes files (`write_json`,
`write_csv`) with the `setting` in them. What gives a wrong result is said and not timed; the rest
is, and the benchmark exits with 1.
"""

import argparse
import csv
import datetime
import functools
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

WARM_UP_CALLS = 3
LONGEST_LAUNCH = 0.02  # seconds that a host which falls behind is given, at most
# How long one thing is timed, within these numbers of calls.
TIMED_SECONDS = 0.2
FEWEST_CALLS, MOST_CALLS = (10, 100) if CUDA else (3, 10)


def init_distributed() -> None:
    """Join the process group that torchrun describes, or one of a single rank."""
    if "RANK" not in os.environ:
        backend = "nccl" if CUDA else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    if not CUDA:
        dist.init_process_group("gloo")
        return
    gpus = torch.cuda.device_count()
    if int(os.environ["LOCAL_WORLD_SIZE"]) > gpus:
        # NCCL refuses two ranks on one GPU unless it takes them for two hosts.
        os.environ.setdefault("NCCL_HOSTID", f"host{os.environ['RANK']}")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % gpus)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)


def setting() -> dict[str, Any]:
    """Where and when: the GPU, the ranks of a distributed benchmark, the versions, the date."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("torchao", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if CUDA:
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "gpu": torch.cuda.get_device_name() if CUDA else None,
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "versions": versions,
    }


def print_once(text: str) -> None:
    """Print on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


def describe(facts: Mapping[str, Any]) -> str:
    """A `setting` as the line that stands below a table."""
    names = [f"{name} {version}" for name, version in facts["versions"].items()]
    ranks = f"{facts['ranks']} rank{'' if facts['ranks'] == 1 else 's'}"
    return " · ".join([str(facts["gpu"] or "CPU"), ranks, *names, str(facts["date"])])


# --- Checks


class WrongResult(Exception):
    """What was about to be timed gives a wrong result; the message says which."""


def check(holds: bool, what: str) -> None:
    """Raise WrongResult on all ranks unless `holds` on all of them. All ranks must call it."""
    everywhere = holds
    if dist.is_initialized() and dist.get_world_size() > 1:
        flag = torch.tensor(int(holds), device=DEVICE)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        everywhere = bool(flag.item())
    if not everywhere:
        raise WrongResult(f"{what}{' (on another rank)' if holds else ''}")


def check_same_bytes(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """`check` that two tensors have the same dtype, shape and bytes."""
    kinds = [f"{x.dtype} {tuple(x.shape)}" for x in (found, expected)]
    check(kinds[0] == kinds[1], f"{what}: {kinds[0]} instead of {kinds[1]}")
    a, b = (x.contiguous().flatten().view(torch.uint8) for x in (found, expected))
    differ = (a != b).sum().item()
    check(differ == 0, f"{what}: {differ} of {a.numel()} bytes differ")


def sqnr(found: torch.Tensor, truth: torch.Tensor) -> float:
    """10 log10(energy of truth / energy of the error), of all elements, in dB."""
    error = found.double() - truth
    return (10 * torch.log10(truth.double().square().sum() / error.square().sum())).item()


# --- Timing


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


Mark = torch.cuda.Event | float


def mark() -> Mark:
    """A point in the device's work: an event on the current stream, or the time on a CPU."""
    if not CUDA:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def has_passed(point: Mark) -> bool:
    """Whether a GPU has come to a mark; on a CPU nothing is queued, and it is never too early."""
    return not isinstance(point, float) and point.query()


def seconds_between(start: Mark, end: Mark) -> float:
    """Seconds from one mark to the other; the device must have come to both."""
    if isinstance(start, float) or isinstance(end, float):
        if not (isinstance(start, float) and isinstance(end, float)):
            raise AssertionError("one mark is an event and the other is not")
        return end - start
    return start.elapsed_time(end) / 1e3


Result = TypeVar("Result")


def timed(function: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds of a call until the device is done, and its result."""
    start = time.perf_counter()
    result = function()
    synchronize()
    return time.perf_counter() - start, result


def host_seconds(function: Callable[[], object]) -> float:
    """Seconds a call takes the host, without waiting for the device."""
    synchronize()
    start = time.perf_counter()
    function()
    seconds = time.perf_counter() - start
    synchronize()
    return seconds


@functools.cache
def _cycles_per_second() -> float:
    cycles = 10_000_000
    torch.cuda._sleep(cycles)
    start = mark()
    torch.cuda._sleep(cycles)
    end = mark()
    synchronize()
    return cycles / seconds_between(start, end)


def occupy(seconds: float) -> None:
    """Keep the GPU busy, so that the host can queue what is timed before the GPU comes to it.

    Without it, what takes the GPU less time than the host would be timed as the host.
    """
    if CUDA:
        torch.cuda._sleep(int(seconds * _cycles_per_second()))


@functools.cache
def _larger_than_cache() -> torch.Tensor:
    size = 4 * torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return torch.ones(size // 4, dtype=torch.int32, device=DEVICE)


def flush_cache() -> None:
    """Put other data into the GPU's L2 cache, by reading it: nothing is left to be written back."""
    if CUDA:
        _larger_than_cache().sum()


def median_seconds(
    function: Callable[[], object], *, cold: bool = False, calls: int | None = None
) -> float:
    """Seconds of a call: on a GPU of its kernels, from the first to the last, without launching.

    A call that the GPU came to before the host had launched all of it, because the host was slower
    than usual, does not count, unless there is no other; the calls after it have more time.

    Args:
        cold: flush the L2 cache before each call, as what a kernel bound by memory reads was
            not used just before.
        calls: how many are timed; None: what fits `TIMED_SECONDS`. Ranks that communicate in
            `function` must all give the same number.
    """
    for _ in range(WARM_UP_CALLS):
        function()
    launch = host_seconds(function)
    if calls is None:
        start = time.perf_counter()
        function()
        synchronize()
        calls = int(TIMED_SECONDS / max(time.perf_counter() - start, 1e-9))
        calls = min(max(calls, FEWEST_CALLS), MOST_CALLS)
    marks, late = [], []
    for _ in range(calls):
        occupy(1.5 * launch + 50e-6)
        if cold:
            flush_cache()
        start_mark = mark()
        function()
        pair = start_mark, mark()
        if has_passed(start_mark):
            late.append(pair)
            launch = min(2 * launch, LONGEST_LAUNCH)
        else:
            marks.append(pair)
    synchronize()
    return statistics.median(seconds_between(*pair) for pair in marks or late)


@dataclass(frozen=True)
class Kernel:
    """A kernel by its name: how often it ran, and for how long in all."""

    name: str
    count: int
    seconds: float


def kernels_of(function: Callable[[], object]) -> list[Kernel]:
    """The kernels of one call (on a CPU its operators), the longest first."""
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU]) as profiler:
        function()
        synchronize()
    kernels = [
        Kernel(
            event.key,
            event.count,
            (event.self_device_time_total if CUDA else event.self_cpu_time_total) / 1e6,
        )
        for event in profiler.key_averages()
    ]
    return sorted(
        (kernel for kernel in kernels if kernel.seconds > 0),
        key=lambda kernel: kernel.seconds,
        reverse=True,
    )


# --- Results


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; an empty cell is one blank."""
    lines = ["|".join(["", *(f" {cell} " if cell else " " for cell in header), ""])]
    lines.append("|".join(["", *("---" for _ in header), ""]))
    for row in rows:
        lines.append("|".join(["", *(f" {cell} " if cell else " " for cell in row), ""]))
    return "\n".join(lines)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write `content`, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows that all have the columns of the first, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


class Measured(Protocol):
    """Of a variant; as text, what is printed of it."""

    @property
    def row(self) -> Any: ...  # a dataclass, of what is written


M = TypeVar("M", bound=Measured)


def compare(
    names: Sequence[str],
    measure: Callable[[str, M | None], M],
    args: argparse.Namespace,
    summarize: Callable[[Sequence[M]], str] | None = None,
    rounds: int = 1,
) -> None:
    """Measure variants, print them and write `args.json`, leave the process group and exit.

    Args:
        measure: takes a name and what was measured of the first of the round; raises WrongResult.
        args: of the command line.
        summarize: what is printed last, of all that was measured, unless one was wrong.
        rounds: how often the variants are measured, in turns.
    """
    rows, found = [], []
    first, wrong = None, False
    for i, name in enumerate([*names] * rounds):
        if i % len(names) == 0:
            first = None
        try:
            measured = measure(name, first)
        except WrongResult as error:
            print_once(f"{name} is wrong and not timed: {error}")
            wrong = True
            if first is None:  # nothing to compare the others to
                break
            continue
        finally:
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
        first = first or measured
        rows.append(asdict(measured.row))
        found.append(measured)
        print_once(str(measured))
    if summarize is not None and not wrong:
        print_once(summarize(found))
    if args.json is not None and dist.get_rank() == 0:
        arguments = {key: value for key, value in vars(args).items() if key != "json"}
        write_json(args.json, setting() | {"arguments": arguments, "rows": rows})
    dist.destroy_process_group()
    raise SystemExit(int(wrong))
