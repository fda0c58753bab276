"""Time forward and backward of "layer norm => linear => sigmoid" over M, N and K, against bfloat16.

    python scripts/bench/bench_linear.py --m 8192 --budget-seconds 500 --out outputs/linear
    python scripts/bench/bench_linear.py --thresholds outputs/linear.csv --picture outputs/all.png

A sweep of all sizes compiles for most of its time. Several processes with --compile-only, each with
some of the sizes, fill the compiler's cache for the one that times.

Input (M, K), weight (N, K), output (M, N), all bfloat16, compiled. Variants are bench_step.py's, of
one layer without FSDP2:

    bf16                   not converted; what the others are compared to
    torchao:RECIPE         torchao, which casts the weight in forward
    fp8dist:RECIPE-ag      fp8dist, casting the weight in forward
    fp8dist:RECIPE[+fa]    fp8dist with the weight as it arrives from a float8 all-gather

By default all of them that the GPU has matmuls for. Each is timed, on a GPU by its kernels, only if
its output and gradients are those of bf16, within the noise of float8. OUT.csv gets a row per shape
and variant, OUT_VARIANT.png the speed-ups as a heat map; --picture has all variants in one.
--thresholds measures nothing: it prints what a file of such rows says about the sizes that are too
small to gain, as `fp8dist.small_kn` has it. --picture then draws the file, and --variants says
which of its variants count.
"""

import argparse
import csv
import gc
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from bench_step import Variant
from harness import (
    CUDA,
    DEVICE,
    WrongResult,
    check,
    describe,
    init_distributed,
    median_seconds,
    setting,
    sqnr,
    write_csv,
)
from linear_report import draw, print_summary, print_thresholds
from sqnr import TORCHAO_RECIPES, torchao_layer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fp8dist
from fp8dist import hardware
from fp8dist.config import RECIPES

SIZES = "1024,2048,4096,8192,16384"
LOWEST_SQNR = 15.0
"""dB that outputs and gradients keep to those of bf16; float8 leaves 24 to 29 (sqnr.py), a scale
that is wrong by a factor of two 6 at most."""

Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # output, grad_input, grad_weight


@dataclass(frozen=True)
class Row:
    """A line of the CSV."""

    gpu: str
    torch: str
    torchao: str
    date: str
    m: int
    n: int
    k: int
    variant: str
    seconds: float
    speedup: float
    output_db: float
    grad_input_db: float
    grad_weight_db: float


class NormLinearSigmoid(nn.Module):
    """(M, K) to (M, N)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(linear.in_features, elementwise_affine=False)
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x)).sigmoid()


def default_variants() -> list[str]:
    """bf16 first; recipes that would be dequantized on a GPU are left out."""
    recipes = [
        name
        for name, recipe in RECIPES.items()
        if not CUDA or hardware.has_matmul(torch.device(DEVICE), recipe)
    ]
    torchao = [f"torchao:{name}" for name in recipes if name in TORCHAO_RECIPES]
    arrived = [f"fp8dist:{name}" for name in recipes]
    return ["bf16", *torchao, *arrived, *(f"{name}-ag" for name in arrived)]


def arrived_weight(linear: nn.Linear, recipe: str) -> nn.Parameter:
    """The weight of a layer as FSDP2 leaves it after its float8 all-gather."""
    fp8dist.convert_to_float8_training(linear, config=recipe)
    fully_shard(linear, mesh=init_device_mesh(DEVICE, (1,)))
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(linear)
    linear.unshard()
    return linear.weight


def layer_of(variant: Variant, n: int, k: int) -> nn.Linear:
    """A linear layer with the same weight for all variants."""
    torch.manual_seed(0)
    linear = nn.Linear(k, n, bias=False, device=DEVICE, dtype=torch.bfloat16)
    if variant.library == "bf16":
        return linear
    if variant.library == "torchao":
        return torchao_layer(linear, variant.recipe)
    weight = None
    if variant.gather:
        gathered = nn.Linear(k, n, bias=False, device="meta", dtype=torch.bfloat16)
        gathered.weight = nn.Parameter(linear.weight.detach())
        weight = arrived_weight(gathered, variant.recipe)
    config = fp8dist.Float8Config(
        recipe_name=variant.recipe,
        enable_fsdp_float8_all_gather=False,
        fast_accum=True if variant.fast_accum else None,
    )
    fp8dist.convert_to_float8_training(linear, config=config)
    if weight is not None:
        linear.weight = weight
    return linear


def forward_and_backward(
    variant: Variant, m: int, n: int, k: int, compiled: bool
) -> Callable[[], Results]:
    """What is timed."""
    torch._dynamo.reset()
    linear = layer_of(variant, n, k)
    model = NormLinearSigmoid(linear)
    if compiled:
        model.compile(fullgraph=True, dynamic=False)
    x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    grad_output = torch.randn(m, n, device=DEVICE, dtype=torch.bfloat16)

    def call() -> Results:
        x.grad = linear.weight.grad = None
        output = model(x)
        output.backward(grad_output)
        return output.detach(), x.grad, linear.weight.grad

    return call


def check_results(found: Results, expected: Results) -> list[float]:
    """dB of output, grad_input and grad_weight against bf16's."""
    decibels = [sqnr(a, b) for a, b in zip(found, expected, strict=True)]
    text = ", ".join(f"{value:.1f}" for value in decibels)
    check(
        all(value >= LOWEST_SQNR for value in decibels),  # False for a NaN
        f"SQNR of output, grad_input, grad_weight to bf16 is {text} dB",
    )
    return decibels


def measure_shape(
    variants: Sequence[Variant], m: int, n: int, k: int, compiled: bool, timed: bool = True
) -> tuple[list[Row], bool]:
    """The rows of a shape, and whether all results were right. Of what is not timed no rows."""
    facts = setting()
    common = (facts["gpu"] or "CPU", torch.__version__, facts["versions"]["torchao"], facts["date"])
    rows: list[Row] = []
    expected: Results | None = None
    right = True
    for variant in variants:
        try:
            call = forward_and_backward(variant, m, n, k, compiled)
            found = call()
            expected = expected or found
            decibels = check_results(found, expected)
            del found
            seconds = median_seconds(call) if timed else math.nan
        except (WrongResult, RuntimeError) as error:  # the latter from the compiler or the GPU
            if not rows:
                raise
            reason = str(error).splitlines()[0]
            print(f"{variant.name} is not timed for M {m}, N {n}, K {k}: {reason}", flush=True)
            right = False
            continue
        speedup = (rows[0].seconds if rows else seconds) / seconds
        rows.append(Row(*common, m, n, k, variant.name, seconds, speedup, *decibels))
        del call
        gc.collect()
    if not timed:
        print(f"M {m}, N {n}, K {k}: compiled", flush=True)
        return [], right
    print(
        f"M {m}, N {n}, K {k}: {rows[0].variant} {rows[0].seconds * 1e6:.1f} µs; "
        + ", ".join(f"{row.variant} x{row.speedup:.2f}" for row in rows[1:]),
        flush=True,
    )
    return rows, right


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV that this program has written."""
    kinds = {"m": int, "n": int, "k": int, "gpu": str, "torch": str, "torchao": str, "date": str}
    kinds |= {"variant": str}
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(**{name: kinds.get(name, float)(value) for name, value in row.items()})
            for row in csv.DictReader(file)
        ]


def of_variants(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows of the variants called `names`, in their order.

    Raises:
        ValueError: there are none of one of them.
    """
    found = {name: [row for row in rows if row.variant == name] for name in names}
    if missing := [name for name in names if not found[name]]:
        there = ", ".join(dict.fromkeys(row.variant for row in rows))
        raise ValueError(f"no rows of {', '.join(missing)}; there are {there}")
    return list(itertools.chain(*found.values()))


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--m", type=numbers, default="2048,8192,16384", help="comma-separated")
    parser.add_argument("--n", type=numbers, default=SIZES, help="comma-separated")
    parser.add_argument("--k", type=numbers, default=SIZES, help="comma-separated")
    parser.add_argument(
        "--variants", help="comma-separated, bf16 first; default: all, or all of the file's"
    )
    parser.add_argument("--no-compile", action="store_true", help="run the layers eagerly")
    parser.add_argument(
        "--compile-only", action="store_true", help="compile and compare results, time nothing"
    )
    parser.add_argument(
        "--budget-seconds", type=float, help="start no new shape after that many seconds"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/linear"), help="without suffix")
    parser.add_argument(
        "--thresholds", type=Path, metavar="CSV", help="measure nothing; print what a file implies"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="PNG", help="draw the speed-ups of all variants there"
    )
    options = parser.parse_args(arguments)
    if options.compile_only and options.no_compile:
        parser.error("--compile-only and --no-compile leave nothing to do")
    if options.compile_only and options.picture is not None:
        parser.error("--compile-only times nothing, so that there is nothing for --picture")
    if options.picture is not None and options.variants == "bf16":
        parser.error("--picture has speed-ups over bf16, and --variants nothing else")
    if options.variants is None and options.thresholds is not None:
        return options
    options.variants = options.variants.split(",") if options.variants else default_variants()
    if options.variants[0] != "bf16":
        parser.error(f"--variants begins with {options.variants[0]}; it must begin with bf16")
    for name in options.variants:
        variant = Variant.parse(name)
        if variant.library == "torchao" and variant.gather:
            parser.error(f"--variants: {name} gathers, and here is one layer without FSDP2")
    return options


def report(rows: Sequence[Row], picture: Path | None) -> None:
    """Print what rows say, and draw them."""
    if not rows:
        return
    print_summary(rows)
    print_thresholds(rows)
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw(rows).savefig(picture, dpi=100)


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.monotonic()
    options = parse_arguments(arguments)
    if options.thresholds is not None:
        rows = read_rows(options.thresholds)
        report(of_variants(rows, options.variants) if options.variants else rows, options.picture)
        return
    logging.getLogger("fp8dist").setLevel(logging.WARNING)
    init_distributed()
    print(describe(setting()))
    variants = [Variant.parse(name) for name in options.variants]
    shapes = list(itertools.product(options.m, options.n, options.k))
    rows: list[Row] = []
    right = True
    csv_path = options.out.with_suffix(".csv")
    for index, shape in enumerate(shapes):
        if options.budget_seconds is not None and time.monotonic() - start > options.budget_seconds:
            left = ", ".join("x".join(map(str, shape)) for shape in shapes[index:])
            print(f"the {options.budget_seconds:.0f} s are used up; not measured, MxNxK: {left}")
            break
        of_shape, all_right = measure_shape(
            variants, *shape, compiled=not options.no_compile, timed=not options.compile_only
        )
        rows += of_shape
        right = right and all_right
        if rows:
            write_csv(csv_path, [asdict(row) for row in rows])
    for name in options.variants[1:]:
        of_variant = [row for row in rows if row.variant == name]
        if of_variant:
            file = f"{options.out.name}_{name.replace(':', '_')}.png"
            draw(of_variant).savefig(options.out.with_name(file), dpi=100)
    report(rows, options.picture)
    dist.destroy_process_group()
    raise SystemExit(int(not right))


if __name__ == "__main__":
    main()
