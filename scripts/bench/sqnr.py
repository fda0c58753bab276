"""Signal to quantization noise of every recipe, in dB: what float8 costs in a linear layer.

    python scripts/bench/sqnr.py --out outputs/sqnr

Prints two tables, and writes OUT.json and OUT.png:

1. output, grad_input and grad_weight of one linear layer against float64, for fp8dist under FSDP2
   (one rank, so that backward multiplies the weight derived from what was gathered), for torchao's
   recipes of the same name, and for bfloat16. On a CPU all but the last compute on float32
   tensors, on a GPU on bfloat16, as one trains there and its matmuls write; so is the grad_weight
   that a recipe leaves in high precision. "quiet" is what a tenth of a tensor's columns stay
   below: where outliers set the scale, it tells what the others get.
2. the weight of grad_input, derived from the copy that was gathered for output, against the
   weight cast for grad_input directly, and against deriving it between scales that are not powers
   of two.
"""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from harness import DEVICE, init_distributed, markdown_table, setting, sqnr, write_json
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fp8dist
from fp8dist import numerics
from fp8dist.config import COLUMN, RECIPES, ROW, TENSOR, Block, ScaleFormat

E4M3 = torch.float8_e4m3fn
RESULTS = ("output", "grad_input", "grad_weight")
TORCHAO_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
QUIET = 0.1
HIGH_PRECISION_DB = 40
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # input, weight, grad_output


def student_t(rows: int, columns: int, degrees: float, generator: torch.Generator) -> torch.Tensor:
    """Heavy tails: the fewer degrees of freedom the heavier; (rows, columns), float32."""
    normal = torch.randn(rows, columns, generator=generator)
    chi2 = 2 * torch._standard_gamma(torch.full((rows, columns), degrees / 2), generator)
    return normal / (chi2 / degrees).sqrt()


def spread(x: torch.Tensor, dim: int, sigma: float, generator: torch.Generator) -> torch.Tensor:
    """Give every row (dim 0) or column (dim 1) a magnitude of its own, log-normal."""
    factors = (sigma * torch.randn(x.size(dim), generator=generator)).exp()
    return x * (factors[:, None] if dim == 0 else factors)


def outliers(x: torch.Tensor, dim: int, generator: torch.Generator) -> torch.Tensor:
    """Make one in 256 rows (dim 0) or columns (dim 1) 50 to 100 times as large."""
    count = max(1, x.size(dim) // 256)
    chosen = torch.randperm(x.size(dim), generator=generator)[:count]
    x = x.clone()
    factors = 50 + 50 * torch.rand(count, generator=generator)
    if dim == 0:
        x[chosen] *= factors[:, None]
    else:
        x[:, chosen] *= factors
    return x


def trained_like(tokens: int, k: int, n: int, generator: torch.Generator) -> Operands:
    """Channels of somewhat different magnitudes, activations and gradients with heavier tails."""
    weight = 0.02 * torch.randn(n, k, generator=generator)
    weight = spread(spread(weight, 0, 0.3, generator), 1, 0.3, generator)
    input = spread(student_t(tokens, k, 5, generator), 1, 0.5, generator)
    grad_output = 1e-5 * spread(student_t(tokens, n, 5, generator), 0, 1.0, generator)
    return input, weight, grad_output


def outlier_heavy(tokens: int, k: int, n: int, generator: torch.Generator) -> Operands:
    """Student-t(3) everywhere, and a few channels 50 to 100 times as large."""
    weight = 0.02 * student_t(n, k, 3, generator)
    weight = outliers(outliers(weight, 0, generator), 1, generator)
    input = outliers(student_t(tokens, k, 3, generator), 1, generator)
    grad_output = 1e-5 * outliers(student_t(tokens, n, 3, generator), 1, generator)
    return input, weight, grad_output


TENSORS = {"trained-like": trained_like, "outlier-heavy": outlier_heavy}


def quiet_sqnr(found: torch.Tensor, truth: torch.Tensor) -> float:
    """`sqnr` of each column; the one that a tenth of the columns stay below."""
    error = (found.double() - truth).square().sum(0)
    return torch.quantile(10 * torch.log10(truth.square().sum(0) / error), QUIET).item()


def run_layer(linear: nn.Module, input: torch.Tensor, grad_output: torch.Tensor) -> Operands:
    """Output, grad_input and grad_weight of a layer called with (M, K) and (M, N)."""
    input = input.clone().requires_grad_()
    output = linear(input)
    output.backward(grad_output)
    grad_weight = linear.weight.grad
    if isinstance(grad_weight, DTensor):
        grad_weight = grad_weight.full_tensor()
    return output.detach(), input.grad, grad_weight


def truth_of(input: torch.Tensor, weight: torch.Tensor, grad_output: torch.Tensor) -> Operands:
    input, weight, grad_output = input.double(), weight.double(), grad_output.double()
    return input @ weight.t(), grad_output @ weight, grad_output.t() @ input


def fp8dist_layer(linear: nn.Linear, recipe: str) -> nn.Module:
    fp8dist.convert_to_float8_training(linear, config=recipe)
    fully_shard(linear, mesh=init_device_mesh(DEVICE, (1,)))
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(linear)
    return linear


def torchao_layer(linear: nn.Linear, recipe: str) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)
    # Where this machine multiplies float8 itself, torchao's layer does so too, as fp8dist's.
    object.__setattr__(config, "emulate", DEVICE == "cpu")
    return convert_to_float8_training(nn.Sequential(linear), config=config)[0]


def layer_rows(operands: Operands) -> dict[str, dict[str, list[float]]]:
    """Variant -> "all" and "quiet" -> dB of output, grad_input and grad_weight."""
    input, weight, grad_output = operands
    truth = truth_of(*operands)

    def row(make: Callable[[nn.Linear], nn.Module], dtype: torch.dtype = DTYPE) -> dict:
        linear = nn.Linear(weight.size(1), weight.size(0), bias=False, device=DEVICE, dtype=dtype)
        with torch.no_grad():
            linear.weight.copy_(weight)
        found = run_layer(make(linear), input.to(dtype), grad_output.to(dtype))
        return {
            "all": [sqnr(a, b) for a, b in zip(found, truth, strict=True)],
            "quiet": [quiet_sqnr(a, b) for a, b in zip(found, truth, strict=True)],
        }

    rows = {"bfloat16": row(lambda linear: linear, torch.bfloat16)}
    for recipe in RECIPES:
        rows[f"fp8dist {recipe}"] = row(lambda linear, name=recipe: fp8dist_layer(linear, name))
        if recipe in TORCHAO_RECIPES:
            rows[f"torchao {recipe}"] = row(lambda linear, name=recipe: torchao_layer(linear, name))
    return rows


def normal_weight(n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(n, k, generator=generator)


def student_weight(n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    return student_t(n, k, 3, generator)


def column_outlier_weight(n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    return outliers(normal_weight(n, k, generator), 1, generator)


def many_magnitudes_weight(n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    return spread(spread(normal_weight(n, k, generator), 0, 1, generator), 1, 1, generator)


WEIGHTS = {
    "normal": normal_weight,
    "Student-t(3)": student_weight,
    "column outliers": column_outlier_weight,
    "rows and columns of many magnitudes": many_magnitudes_weight,
}
# For output -> for grad_input, and whether the new scales are known from the weight itself.
DERIVED: dict[str, tuple[Block, Block]] = {
    "rows to columns (rowwise)": (ROW, COLUMN),
    "rows to tensor (rowwise_with_gw_hp)": (ROW, TENSOR),
    "1x32 to 32x1 (mxfp8)": ((1, 32), (32, 1)),
}


def derived_row(weight: torch.Tensor, first: Block, second: Block) -> dict[str, float]:
    """dB against the weight of its copy for grad_input, cast directly and derived."""
    mx = first == (1, 32)
    scale_format: ScaleFormat = "e8m0" if mx else "power_of_2"
    direct = numerics.quantize(weight, second, E4M3, scale_format)
    gathered = numerics.quantize(weight, first, E4M3, scale_format)
    new_scale = None if mx else direct.scale  # MX scales of columns are taken from what arrived
    derived = numerics.rescale_transposed(gathered, second, new_scale, scale_format).t()
    inexact = numerics.quantize(weight, first, E4M3, "exact")
    # What arrived, dequantized, and cast once more: two roundings, at different places.
    inexact_direct = numerics.quantize(weight, second, E4M3, "exact")
    again = numerics.dequantize(inexact.data, inexact.scale)
    inexact_derived = numerics.cast(again, inexact_direct.scale, E4M3)

    def db(data: torch.Tensor, scale: torch.Tensor) -> float:
        return sqnr(numerics.dequantize(data, scale), weight.double())

    values = [numerics.dequantize(x.data, x.scale) for x in (direct, derived)]
    differ = values[0] != values[1]
    return {
        "direct": db(direct.data, direct.scale),
        "derived": db(derived.data, derived.scale),
        "elements that differ (%)": 100 * differ.double().mean().item(),
        "not powers of two, direct": db(inexact_direct.data, inexact_direct.scale),
        "not powers of two, derived": db(inexact_derived, inexact_direct.scale),
    }


def draw(layers: dict, weights: dict, path: Path) -> None:
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 3, sharex="row", height_ratios=(5, 4))
    for column, result in enumerate(RESULTS):
        rows = {
            name: {variant: row["all"][column] for variant, row in rows.items()}
            for name, rows in layers.items()
        }
        bars(axes[0, column], rows)
        axes[0, column].set(title=result, xlabel="SQNR (dB)", xlim=(20, 33))
    kinds = ("direct", "derived", "not powers of two, derived")
    for column, (pair, rows) in enumerate(weights.items()):
        bars(axes[1, column], {k: {name: row[k] for name, row in rows.items()} for k in kinds})
        axes[1, column].set_title(f"weight for grad_input:\n{pair}", fontsize="medium")
        axes[1, column].set(xlabel="SQNR (dB)", xlim=(20, 36))
    for row in axes:
        row[1].set_yticklabels([])
        row[2].set_yticklabels([])
        row[2].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=80)


def bars(axes: Axes, groups: dict[str, dict[str, float]]) -> None:
    """Horizontal bars, one colour per group, the first at the top; what passes the edge says so."""
    height = 0.8 / len(groups)
    for index, (name, values) in enumerate(groups.items()):
        places = [row + (index - (len(groups) - 1) / 2) * height for row in range(len(values))]
        axes.barh(places, list(values.values()), height, label=name)
    axes.set_yticks(range(len(values)), list(values), fontsize="small")
    axes.invert_yaxis()
    for row, value in enumerate(values.values()):
        if value > HIGH_PRECISION_DB:
            text = f"high precision: {value:.0f} dB"
            axes.text(20.3, row, text, fontsize="small", va="center", color="white")


def print_tables(layers: dict, weights: dict) -> None:
    for tensors, by_variant in layers.items():
        rows = [
            [
                variant,
                *(f"{a:.1f} ({b:.1f})" for a, b in zip(row["all"], row["quiet"], strict=True)),
            ]
            for variant, row in by_variant.items()
        ]
        print("\n" + markdown_table([tensors, *(f"{name}, dB (quiet)" for name in RESULTS)], rows))
    header = (
        "weight for grad_input",
        "direct, dB",
        "from the gathered copy",
        "elements that differ",
        "not powers of 2: direct",
        "from the gathered copy",
    )
    rows = []
    for pair, by_name in weights.items():
        for name, row in by_name.items():
            a, b, differ, c, d = row.values()
            values = (f"{a:.2f}", f"{b:.2f}", f"{differ:.4f} %", f"{c:.2f}", f"{d:.2f}")
            rows.append([f"{pair}, {name}", *values])
    print("\n" + markdown_table(header, rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("tokens", "k", "n"):
        parser.add_argument(f"--{name}", type=int, default=1024, help="a multiple of 128")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/sqnr"), help="without suffix")
    options = parser.parse_args()
    sizes = (options.tokens, options.k, options.n)
    if any(size % 128 or size <= 0 for size in sizes):
        parser.error(f"tokens, k and n are {sizes}; each must be a multiple of 128")
    logging.getLogger("fp8dist").setLevel(logging.WARNING)
    init_distributed()

    layers = {}
    for name, make in TENSORS.items():
        input, weight, grad_output = make(*sizes, torch.Generator().manual_seed(options.seed))
        layers[name] = layer_rows((input.to(DEVICE), weight.to(DEVICE), grad_output.to(DEVICE)))
    weights = {
        pair: {
            name: derived_row(
                make(options.n, options.k, torch.Generator().manual_seed(options.seed)).to(DEVICE),
                *blocks,
            )
            for name, make in WEIGHTS.items()
        }
        for pair, blocks in DERIVED.items()
    }
    here = setting()
    facts = {
        "device": here["gpu"] or "CPU",
        **{name: here["versions"][name] for name in ("torch", "torchao")},
        "date": here["date"],
        **{name: getattr(options, name) for name in ("tokens", "k", "n", "seed")},
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print_tables(layers, weights)
    report = {**facts, "layers": layers, "weights": weights}
    write_json(options.out.with_suffix(".json"), report)
    draw(layers, weights, options.out.with_suffix(".png"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
