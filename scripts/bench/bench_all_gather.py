"""Time what an unshard under FSDP2 is made of, and say where gathering in float8 is a net win.

    torchrun --nproc-per-node 2 scripts/bench/bench_all_gather.py --json outputs/all_gather.json

For each size of a float32 weight (N, K) and each of bench_step.py's variants that gathers in
bfloat16 or float8, the time and the bytes of

    precompute    what the call after the optimizer step does on the device: amaxes, scales, and
                  fp8dist's cast. Of --weights weights at once, divided by their number
    cast          what happens to the shard at each unshard before its bytes are copied
    copy-in       into the buffer that is gathered
    collective    the all-gather; bytes that a rank receives
    copy-out      into the unsharded weight

"per unshard" is their sum with precompute's share: a step has --unshards of them. precompute's
all-reduce, one for all weights of a model, is not counted. What a rank does alone is timed while
the others wait, on the slowest rank, as ranks may share a GPU (see bench_step.py); the collective
is timed on the rank that waits least in it. With one rank FSDP2 gathers nothing, and all that it
does is in "cast".

The gathered bytes are first compared with `fp8dist.numerics`. Then comes the break-even: a line in
the number of elements is fitted to each variant's work on the device, and one in the bytes to the
collectives. Float8 is a net win where the wire saves more time than float8 adds on the device,
whatever else a step computes meanwhile.
"""

import argparse
import gc
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from bench_step import Variant
from break_even import break_even_table
from harness import (
    CUDA,
    DEVICE,
    WrongResult,
    describe,
    init_distributed,
    markdown_table,
    print_once,
    setting,
    write_json,
)
from torch import nn
from unsharding import Ranks, Unsharding, expected_bytes, precompute_seconds

from fp8dist import kernels
from fp8dist.config import RECIPES, ROW, recipe

DEFAULT_VARIANTS = ",".join(
    ["bf16", "torchao:tensorwise+ag", *(f"fp8dist:{name}" for name in RECIPES)]
)


@dataclass(frozen=True)
class Row:
    """Seconds and bytes of one variant's unshard of a weight."""

    variant: str
    n: int
    k: int
    precompute: float
    cast: float
    copy_in: float
    collective: float
    copy_out: float
    per_unshard: float
    precompute_bytes: int
    cast_bytes: int
    copy_in_bytes: int
    collective_bytes: int
    copy_out_bytes: int

    @property
    def on_device(self) -> float:
        """Seconds of an unshard that are not the collective's."""
        return self.per_unshard - self.collective

    def cells(self, bf16: "Row") -> list[str]:
        stages = ("precompute", "cast", "copy_in", "collective", "copy_out")
        return [
            self.variant,
            *(
                f"{getattr(self, name) * 1e6:.1f} ({getattr(self, f'{name}_bytes') / 1e6:.2f})"
                for name in stages
            ),
            f"{self.per_unshard * 1e6:.1f}",
            f"{self.per_unshard / bf16.per_unshard:.2f}",
        ]


HEADER = (
    "µs (MB)",
    "precompute",
    "cast",
    "copy-in",
    "collective",
    "copy-out",
    "µs per unshard",
    "vs bf16",
)


def amaxes_are_found_before(name: str, columns: int) -> bool:
    """Whether a weight is read for them before it is cast; not where scales are of elements of one
    row, unless that is too wide for one pass.
    """
    weight = recipe(name).weight
    return weight != (1, 32) and (weight != ROW or columns > kernels.WIDEST_ROWS)


def measure(variant: Variant, n: int, k: int, options: argparse.Namespace, ranks: Ranks) -> Row:
    """Check and time a variant."""
    torch.manual_seed(0)
    weight = nn.Linear(k, n, bias=False, device=DEVICE).weight.detach()
    payload = expected_bytes(variant, weight).numel() // ranks.count
    unsharding = Unsharding(variant, n, k, ranks)
    unsharding.check(weight)
    del weight
    stages = unsharding.stages(options.calls)
    del unsharding
    precompute = precompute_seconds(variant, n, k, options.weights, ranks)
    shard = 4 * n * k // ranks.count
    casts, alone = shard + payload, ranks.count == 1
    ours = variant.library == "fp8dist"  # casts in precompute, the others at each unshard
    found_before = variant.gather and amaxes_are_found_before(variant.recipe, k)
    return Row(
        variant.name,
        n,
        k,
        precompute,
        *stages,
        precompute / options.unshards + sum(stages),
        precompute_bytes=(shard if found_before else 0) + (casts if ours else 0),
        # With one rank FSDP2 copies what is cast, but not our payloads.
        cast_bytes=0 if ours else casts + (2 * payload if alone else 0),
        copy_in_bytes=0 if alone else 2 * payload,
        collective_bytes=payload * (ranks.count - 1),
        copy_out_bytes=0 if alone else 2 * payload * ranks.count,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", default=DEFAULT_VARIANTS, help="comma-separated, bf16 first")
    # Not --n and --k: torchrun takes --n for an option of its own.
    parser.add_argument("--rows", default="512,2048,8192,28672", help="N, comma-separated")
    parser.add_argument("--columns", type=int, default=4096, help="K")
    parser.add_argument("--weights", type=int, default=4, help="that precompute sees; default 4")
    parser.add_argument(
        "--unshards", type=int, default=2, help="of a weight in a step; default 2, both passes"
    )
    parser.add_argument("--calls", type=int, default=10, help="timed; default 10")
    parser.add_argument("--json", type=Path, help="write rows, GPU, versions and date there")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    variants = [Variant.parse(name) for name in options.variants.split(",")]
    if variants[0].name != "bf16" or not all(variant.gather for variant in variants[1:]):
        raise ValueError(
            f"--variants is {options.variants}: bf16 comes first, and the others gather in float8"
        )
    init_distributed()
    ranks = Ranks()
    k, ns = options.columns, [int(n) for n in options.rows.split(",")]
    if k % 128 or any(n % (128 * ranks.count) for n in ns):
        raise ValueError(
            f"--rows is {options.rows} and --columns {k}: the first must be multiples of 128 for "
            f"each of the {ranks.count} ranks, the second of 128"
        )
    print_once(describe(setting()))
    rows: list[Row] = []
    wrong = False
    for n in ns:
        of_size: list[Row] = []
        for variant in variants:
            try:
                of_size.append(measure(variant, n, k, options, ranks))
            except WrongResult as error:
                if variant.name == "bf16":  # nothing to compare the others to
                    raise
                print_once(f"{variant.name} is wrong and not timed for {n}x{k}: {error}")
                wrong = True
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
        print_once(f"\n{n}x{k}: {2 * n * k / 1e6:.1f} MB in bfloat16")
        print_once(markdown_table(HEADER, [row.cells(of_size[0]) for row in of_size]))
        rows += of_size
    if ranks.count > 1 and len(ns) > 1:
        print_once(f"\n{break_even_table(rows)}")
    if options.json is not None and dist.get_rank() == 0:
        arguments = {key: value for key, value in vars(options).items() if key != "json"}
        saved = [asdict(row) for row in rows]
        write_json(options.json, setting() | {"arguments": arguments, "rows": saved})
    dist.destroy_process_group()
    raise SystemExit(int(wrong))


if __name__ == "__main__":
    main()
