"""Time the kernels that find amaxes, cast and transpose, against copying as many bytes.

    python scripts/bench/bench_casts.py --json outputs/casts.json

For every recipe and shape: amax and cast of a weight (float32 and bfloat16), small ones also many
at once; both orientations of an input and an output gradient (bfloat16), on a GPU with each kernel
of it; and the weight of grad_input from the one that was gathered. Each is first compared, byte by
byte, with `fp8dist.numerics`.

"bytes" are what must be read and written, an input twice where its amaxes are known only after it
was read. "x bandwidth" is the time over that of these bytes at the bandwidth of a large copy;
"x copy" is the time over that of a copy of these bytes (see `copy_seconds`), timed in the same way,
which for a small matrix is mostly the launch. The L2 cache is flushed before every call. What is
above its limit, 1.3 times a copy (1.6 for a transpose alone), is marked with "!".
"""

import argparse
import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from cast_cases import Case, Work, all_works, case_of
from harness import (
    CUDA,
    DEVICE,
    WrongResult,
    describe,
    flush_cache,
    kernels_of,
    markdown_table,
    median_seconds,
    setting,
    write_json,
)

from fp8dist.config import RECIPES

DEFAULT_SHAPES = "8192x14336,4096x14336,8192x4096,1024x2048,512x512" if CUDA else "512x512"
SMALL = 2**22
"""Elements below which a weight is also timed as one of many, of together `MANY` elements."""
MANY = 2**25 if CUDA else 2**16
COPY_BYTES = 2**30 if CUDA else 2**24
LIMIT, TRANSPOSE_LIMIT = 1.3, 1.6
PROFILED_CALLS = 10


@functools.cache
def copy_seconds(size: int) -> float:
    """Seconds of a copy that reads and writes `size` bytes in all, and up to 4 KiB more each:
    torch's copies of sizes that are no multiples of those take up to half as long again.
    """
    source = torch.ones(-(-size // 8192) * 4096, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return median_seconds(lambda: target.copy_(source), cold=True)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    operands: str
    shape: str
    microseconds: float
    megabytes: float
    tb_per_second: float
    times_bandwidth: float
    times_copy: float
    limit: float

    @property
    def too_slow(self) -> bool:
        return self.times_copy > self.limit

    def cells(self) -> list[str]:
        return [
            self.what,
            self.operands,
            self.shape,
            f"{self.microseconds:.1f}",
            f"{self.megabytes:.2f}",
            f"{self.tb_per_second:.2f}",
            f"{self.times_bandwidth:.2f}",
            f"{self.times_copy:.2f}{' !' if self.too_slow else ''}",
        ]


HEADER = ("kernel", "for", "shape", "µs", "MB", "TB/s", "x bandwidth", "x copy")


def row_of(what: str, operands: str, shape: str, seconds: float, size: int, limit: float) -> Row:
    at_bandwidth = size / COPY_BYTES * copy_seconds(COPY_BYTES)
    return Row(
        what,
        operands,
        shape,
        seconds * 1e6,
        size / 1e6,
        size / seconds / 1e12,
        seconds / at_bandwidth,
        seconds / copy_seconds(size),
        limit,
    )


def passes(case: Case) -> list[tuple[str, float, int]]:
    """The kernels of a call: name, seconds, bytes. Those under 5 % of it are left out."""

    def calls() -> None:
        for _ in range(PROFILED_CALLS):
            flush_cache()
            case.call()

    flushing = {kernel.name for kernel in kernels_of(flush_cache)}
    found = [kernel for kernel in kernels_of(calls) if kernel.name not in flushing]
    total = sum(kernel.seconds for kernel in found)
    return [
        (
            kernel.name,
            kernel.seconds / PROFILED_CALLS,
            case.reads // 2 + (0 if "amax" in kernel.name else case.writes),
        )
        for kernel in found
        if kernel.seconds > 0.05 * total
    ]


def measure(work: Work, operands: str, shape: tuple[int, int], count: int) -> list[Row]:
    """Check and time work on `count` matrices of a shape."""
    case = case_of(work, shape, count)
    case.check()
    text = f"{shape[0]}x{shape[1]}" if count == 1 else f"{count} of {shape[0]}x{shape[1]}"
    seconds = median_seconds(case.call, cold=True)
    limit = TRANSPOSE_LIMIT if work.is_transpose else LIMIT
    rows = [row_of(work.name, operands, text, seconds, case.reads + case.writes, limit)]
    if CUDA and work.reads_twice:
        rows += [
            row_of(f"- {name[:40]}", operands, text, seconds, size, LIMIT)
            for name, seconds, size in passes(case)
        ]
    return rows


def parse_shape(text: str) -> tuple[int, int]:
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdigit() and int(size) % 128 == 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text}: a shape is ROWSxCOLUMNS, multiples of 128")
    return int(sizes[0]), int(sizes[1])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", default=DEFAULT_SHAPES, help=f"comma-separated, default {DEFAULT_SHAPES}"
    )
    parser.add_argument("--recipes", default=",".join(RECIPES), help="comma-separated")
    parser.add_argument("--json", type=Path, help="write rows, GPU, versions and date there")
    options = parser.parse_args(arguments)
    try:
        shapes = [parse_shape(text) for text in options.shapes.split(",")]
    except argparse.ArgumentTypeError as error:
        parser.error(f"--shapes: {error}")
    if unknown := set(options.recipes.split(",")) - RECIPES.keys():
        parser.error(f"--recipes: unknown {', '.join(unknown)}; known: {', '.join(RECIPES)}")
    torch.manual_seed(0)
    print(f"{describe(setting())}; copy {COPY_BYTES / copy_seconds(COPY_BYTES) / 1e12:.2f} TB/s")
    rows: list[Row] = []
    wrong = 0
    for shape in shapes:
        counts = [1]
        if shape[0] * shape[1] < SMALL:
            counts.append(max(2, MANY // (shape[0] * shape[1])))
        of_shape = []
        for work, operands in all_works(options.recipes.split(",")).items():
            for count in counts if work.is_of_many else (1,):
                try:
                    of_shape += measure(work, operands, shape, count)
                except WrongResult as error:
                    wrong += 1
                    print(f"{work.name}, {operands}, {shape} is wrong and not timed: {error}")
        print(f"\n{markdown_table(HEADER, [row.cells() for row in of_shape])}", flush=True)
        rows += of_shape
    slow = sum(row.too_slow for row in rows)
    print(f"\n{slow} of {len(rows)} rows above their limit, {wrong} results wrong")
    if options.json is not None:
        saved = [asdict(row) | {"too_slow": row.too_slow} for row in rows]
        copies = {"copy_bytes": COPY_BYTES, "copy_seconds": copy_seconds(COPY_BYTES)}
        write_json(options.json, setting() | copies | {"rows": saved})
    raise SystemExit(int(wrong > 0))


if __name__ == "__main__":
    main()
