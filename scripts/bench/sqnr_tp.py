"""Signal to quantization noise of every recipe under tensor parallelism, in dB, and what it sends.

    torchrun --nproc-per-node 2 scripts/bench/sqnr_tp.py --json outputs/sqnr_tp.json

For one layer cut by columns and one cut by rows: output, grad_input and grad_weight against
float64, on one device and on all ranks, of the first tensors of sqnr.py; and the kilobytes that a
rank sends in forward and backward if each collective is a ring, weights' scales left out. "from
float8" is `gather_input_again=False`: grad_weight then has the noise of an input in float8.
"""

import argparse
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import traffic
from harness import (
    DEVICE,
    describe,
    init_distributed,
    markdown_table,
    print_once,
    setting,
    sqnr,
    write_json,
)
from sqnr import DTYPE, RESULTS, Operands, run_layer, trained_like, truth_of
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

import fp8dist
from fp8dist.config import RECIPES

FROM_FLOAT8 = " from float8"
# Recipes of which backward may gather the input again.
AGAIN = [name for name, recipe in RECIPES.items() if recipe.input_for_grad_weight is None]
VARIANTS = [*RECIPES, *(name + FROM_FLOAT8 for name in AGAIN)]


@dataclass(frozen=True)
class Row:
    """dB of output, grad_input and grad_weight; bytes by kind."""

    variant: str
    cut: str
    one_device: list[float]
    parallel: list[float]
    sent: dict[str, int]


def styles(variant: str) -> dict[str, tuple[ParallelStyle, Placement, Placement]]:
    """By how the weight is cut: the style, and how input and output are."""
    again = not variant.endswith(FROM_FLOAT8)
    tokens, features = Shard(0), Shard(1)
    columns = fp8dist.Float8ColwiseParallel(input_layouts=tokens, gather_input_again=again)
    rows = fp8dist.Float8RowwiseParallel(output_layouts=tokens)
    both: dict[str, tuple[ParallelStyle, Placement, Placement]] = {
        "columns": (columns, tokens, features),
        "rows": (rows, features, tokens),
    }
    return both if again else {"columns": both["columns"]}


def layer_of(weight: torch.Tensor, variant: str) -> nn.Linear:
    linear = nn.Linear(weight.size(1), weight.size(0), bias=False, device=DEVICE, dtype=DTYPE)
    with torch.no_grad():
        linear.weight.copy_(weight)
    config = variant.removesuffix(FROM_FLOAT8)
    fp8dist.convert_to_float8_training(linear, config=config)
    return linear


def part(x: torch.Tensor, mesh: DeviceMesh, placement: Placement) -> torch.Tensor:
    """This rank's, contiguous."""
    dim = placement.dim
    return x.chunk(mesh.size(), dim)[mesh.get_local_rank()].contiguous()


def whole(x: torch.Tensor, mesh: DeviceMesh, placement: Placement) -> torch.Tensor:
    return DTensor.from_local(x, mesh, (placement,), run_check=False).full_tensor()


def measure(operands: Operands, variant: str, mesh: DeviceMesh) -> list[Row]:
    truth = truth_of(*operands)
    input, weight, grad_output = operands
    alone = layer_of(weight, variant)
    fully_shard(alone, mesh=mesh["one"])
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(alone)
    results = run_layer(alone, input.to(DTYPE), grad_output.to(DTYPE))
    one_device = [sqnr(*pair) for pair in zip(results, truth, strict=True)]
    rows = []
    for cut, (style, input_is, output_is) in styles(variant).items():
        tp = mesh["tp"]
        layer = layer_of(weight, variant)
        parallelize_module(layer, tp, style)
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(layer)
        x, grad = part(input.to(DTYPE), tp, input_is), part(grad_output.to(DTYPE), tp, output_is)
        x.requires_grad_()
        with traffic.recorded() as sent:
            output = layer(x)
            output.backward(grad)
        found = (
            whole(output.detach(), tp, output_is),
            whole(x.grad, tp, input_is),
            layer.weight.grad.full_tensor(),
        )
        parallel = [sqnr(*pair) for pair in zip(found, truth, strict=True)]
        rows.append(Row(variant, cut, one_device, parallel, dict(sent)))
    return rows


def table(rows: list[Row]) -> str:
    def cells(row: Row) -> list[str]:
        kinds = [f"{kind} {sent / 1e3:.1f}" for kind, sent in sorted(row.sent.items())]
        return [
            f"{row.variant}, cut by {row.cut}",
            " / ".join(f"{db:.2f}" for db in row.one_device),
            " / ".join(f"{db:.2f}" for db in row.parallel),
            f"{sum(row.sent.values()) / 1e3:.1f}",
            ", ".join(kinds),
        ]

    name = " / ".join(RESULTS)
    header = ["", f"one device, dB: {name}", f"all ranks: {name}", "sent, kB", "by kind"]
    return markdown_table(header, map(cells, rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1024, help="tokens, K and N: of 128s per rank")
    parser.add_argument("--json", type=Path, help="write rows, GPU, versions and date there")
    args = parser.parse_args()
    logging.getLogger("fp8dist").setLevel(logging.WARNING)
    init_distributed()
    world = dist.get_world_size()
    if args.size <= 0 or args.size % (128 * world):
        parser.error(f"--size is {args.size}: {world} ranks need a multiple of {128 * world}")
    mesh = init_device_mesh(DEVICE, (world, 1), mesh_dim_names=("tp", "one"))
    size, generator = args.size, torch.Generator().manual_seed(0)
    input, weight, grad_output = (x.to(DEVICE) for x in trained_like(size, size, size, generator))
    rows = [
        row for variant in VARIANTS for row in measure((input, weight, grad_output), variant, mesh)
    ]
    print_once(table(rows) + "\n\n" + describe(setting()))
    if args.json is not None and dist.get_rank() == 0:
        write_json(args.json, setting() | {"size": args.size, "rows": [asdict(r) for r in rows]})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
