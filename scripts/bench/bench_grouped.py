"""Time experts, forward and backward, against bfloat16: their matmuls, or a layer under FSDP2.

    python scripts/bench/bench_grouped.py --json outputs/grouped.json
    torchrun --nproc-per-node 1 scripts/bench/bench_grouped.py --layer --json outputs/layer.json

Without --layer: one grouped matmul of tokens (M, K) and weights (E, N, K), its two of the backward,
and all casts of tokens and gradients; the weights are there already, as FSDP2 leaves them:

    bf16                   F.grouped_mm
    torchao:rowwise        torchao's, which casts weights in forward and in backward; on GPUs only
    fp8dist:RECIPE[-fa]    fp8dist, weights as they arrive from a float8 all-gather; -fa: without
                           the fast accumulation that torchao's and fp8dist's have
    alone:RECIPE           of fp8dist the three matmuls, of operands that are cast already

With --layer: router, shuffle, SwiGLU experts, compiled; forward, backward and what follows a step,
on the ranks of torchrun; bf16 and fp8dist:RECIPE. Also the ratio that the bytes on the wire alone
would allow; with more ranks than GPUs these weigh as on a slow network, see bench_step.py.

The experts' numbers of tokens are drawn around an equal share, or, with --equal, are that share, in
multiples of 16, which torchao asks for. All results are first checked against those of bf16.
"""

import argparse
import functools
import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import (
    CUDA,
    DEVICE,
    WrongResult,
    check,
    describe,
    init_distributed,
    markdown_table,
    median_seconds,
    print_once,
    setting,
    sqnr,
    write_json,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import fp8dist
from fp8dist.config import RECIPES
from fp8dist.experts import Float8Experts, factor_of, weight_operand
from fp8dist.grouped_matmul import scaled_grouped_matmul, scaled_grouped_outer
from fp8dist.kernels import grouped
from fp8dist.train.moe import MoE, MoEShape
from fp8dist.train.wire import count_all_gathers

# Llama-4 Scout, DeepSeek-V3 with 32 experts on a rank, Qwen3-30B.
SHAPES = "16384x5120x8192x16,16384x7168x2048x32,32768x2048x768x128"
LOWEST_SQNR = 15.0
"""dB to bf16's results: float8 leaves 23 to 29, a scale that is wrong by two 6 at most."""
REDUCED_BYTES = 4  # per element of a gradient: float32

Results = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Shape:
    """tokens (M, K), weights (E, N, K)."""

    m: int
    k: int
    n: int
    e: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        m, k, n, e = map(int, text.split("x"))
        return cls(m, k, n, e)

    def __str__(self) -> str:
        return f"{self.m}x{self.k}x{self.n}x{self.e}"


@dataclass(frozen=True)
class Row:
    """What was measured of a variant, on rank 0."""

    shape: str
    variant: str
    seconds: float
    speedup: float
    decibels: list[float]
    bytes_on_the_wire: int | None = None
    speedup_by_bytes: float | None = None


def ends_of(shape: Shape, equal: bool = False) -> torch.Tensor:
    """Where the experts' tokens end: shares between half and one and a half of an equal one."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.ones(shape.e) if equal else torch.rand(shape.e, generator=generator) + 0.5
    ends = (shares.cumsum(0) / shares.sum() * (shape.m // 16)).round().int() * 16
    return ends.to(DEVICE)


def parse(variant: str) -> tuple[str, str, bool]:
    """Library, recipe, and whether the matmuls accumulate fast."""
    library, _, recipe = variant.partition(":")
    return library, recipe.removesuffix("-fa"), not recipe.endswith("-fa")


def arrived(weight: torch.Tensor, recipe: str, fast_accum: bool = True) -> Float8Experts:
    """Weights of experts as FSDP2 leaves them after its float8 all-gather."""
    root = nn.Module()
    root.experts = nn.Module()
    root.experts.weight = nn.Parameter(weight)
    config = fp8dist.Float8Config(recipe, fast_accum=None if fast_accum else False)
    fp8dist.convert_moe_to_float8_training(root, config=config)
    fully_shard(root.experts, mesh=init_device_mesh(DEVICE, (1,)))
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(root)
    root.experts.unshard()
    return root.experts.weight


def matmul_of(variant: str, weight: torch.Tensor) -> tuple[torch.Tensor, Callable[..., Any]]:
    """The parameter, (E, N, K), and the function of (tokens, parameter, ends)."""
    library, recipe, fast_accum = parse(variant)
    if library == "bf16":
        return nn.Parameter(weight), lambda x, w, ends: F.grouped_mm(x, w.mT, offs=ends)
    if library == "torchao":
        from torchao.prototype.moe_training.fp8_grouped_mm import (
            _to_fp8_rowwise_then_scaled_grouped_mm as theirs,
        )

        ours = functools.partial(theirs, pad_token_groups_for_grouped_mm=False)
        return nn.Parameter(weight), lambda x, w, ends: ours(x, w.mT, ends)
    return arrived(weight, recipe, fast_accum), lambda x, w, ends: F.grouped_mm(x, w.mT, offs=ends)


def forward_and_backward(
    variant: str, ends: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor
) -> Callable[[], Results]:
    """What is timed: gives output, grad_input and grad_weight."""
    if variant.startswith("alone:"):
        return matmuls_alone(variant.removeprefix("alone:"), x, weight, grad, ends)
    parameter, matmul = matmul_of(variant, weight)
    leaf = x.clone().requires_grad_()

    def call() -> Results:
        output = matmul(leaf, parameter, ends)
        return output.detach(), *torch.autograd.grad(output, (leaf, parameter), grad)

    return call


def matmuls_alone(
    name: str, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, ends: torch.Tensor
) -> Callable[[], Results]:
    recipe, w = RECIPES[name], arrived(weight, name)
    cast = functools.partial(grouped.quantize_tokens, ends=ends, scale_format=recipe.scale_format)
    row, column = cast(
        x,
        block=recipe.input,
        transposed_block=recipe.input_for_grad_weight,
        float8_dtype=recipe.input_dtype,
    )
    for_output, for_grad_input = (weight_operand(w, rows, recipe) for rows in (False, True))
    grad_row, grad_column = cast(
        grad,
        block=recipe.grad_output,
        transposed_block=recipe.grad_output_for_grad_weight,
        float8_dtype=recipe.grad_output_dtype,
        factor=factor_of(for_grad_input),
    )
    fast_accum = recipe.has_fast_accum

    def call() -> Results:
        return (
            scaled_grouped_matmul(row, for_output, ends, x.dtype, recipe, fast_accum=fast_accum),
            scaled_grouped_matmul(
                grad_row, for_grad_input, ends, x.dtype, recipe, fast_accum=fast_accum
            ),
            scaled_grouped_outer(grad_column, column, x.dtype, recipe, fast_accum=fast_accum),
        )

    return call


def measure_matmuls(shape: Shape, variants: Sequence[str], equal: bool) -> tuple[list[Row], bool]:
    """The rows of a shape, and whether all results were right."""
    torch.manual_seed(0)
    new = functools.partial(torch.randn, device=DEVICE, dtype=torch.bfloat16)
    x, grad = new(shape.m, shape.k), new(shape.m, shape.n)
    weight = new(shape.e, shape.n, shape.k) * shape.k**-0.5
    rows: list[Row] = []
    expected: Results | None = None
    right = True
    for variant in variants:
        try:
            call = forward_and_backward(variant, ends_of(shape, equal), x, weight, grad)
            found = call()
            expected = expected or found
            decibels = check_results(found, expected)
            del found
            seconds = median_seconds(call)
        except (WrongResult, RuntimeError) as error:
            if not rows:
                raise
            print_once(f"{shape}: {variant} is not timed: {str(error).splitlines()[0]}")
            right = False
            continue
        speedup = (rows[0].seconds if rows else seconds) / seconds
        rows.append(Row(str(shape), variant, seconds, speedup, decibels))
        del call
        gc.collect()
    return rows, right


def check_results(found: Results, expected: Results) -> list[float]:
    """dB of results against those of bf16."""
    decibels = [sqnr(a, b) for a, b in zip(found, expected, strict=True)]
    text = ", ".join(f"{value:.1f}" for value in decibels)
    check(
        all(value >= LOWEST_SQNR for value in decibels),  # False for a NaN
        f"SQNR to bf16 is {text} dB",
    )
    return decibels


# --- A layer under FSDP2


class Layer:
    """Experts as a training job has them, sharded over all ranks, and a batch."""

    def __init__(self, variant: str, shape: Shape, top_k: int, compiled: bool) -> None:
        torch._dynamo.reset()
        sizes = MoEShape(shape.e, top_k, shape.n)
        with torch.device("meta"):
            self.model = nn.Module()
            self.model.moe = MoE(shape.k, sizes, nn.Identity())
        _, recipe, fast_accum = parse(variant)
        if recipe:
            config = fp8dist.Float8Config(recipe, fast_accum=None if fast_accum else False)
            fp8dist.convert_moe_to_float8_training(self.model, config=config)
        if compiled:
            self.model.moe.compile(fullgraph=True, dynamic=False)
        mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        self.moe = fully_shard(
            self.model.moe, mesh=mesh, mp_policy=policy, reshard_after_forward=True
        )
        self.moe.to_empty(device=DEVICE)
        self.moe.reset_buffers()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in self.moe.parameters():
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        self.converted = bool(recipe)
        self.wire = count_all_gathers(self.moe)
        torch.manual_seed(2 + dist.get_rank())
        new = functools.partial(torch.randn, 1, shape.m, shape.k, device=DEVICE)
        self.x = new(dtype=torch.bfloat16, requires_grad=True)
        self.grad = new(dtype=torch.bfloat16)

    def step(self) -> None:
        self.x.grad = None
        self.moe.zero_grad()
        self.output = self.moe(self.x)
        self.output.backward(self.grad)
        if self.converted:
            fp8dist.precompute_float8_dynamic_scale_for_fsdp(self.model)

    def results(self) -> Results:
        experts = self.moe.experts
        grads = [w.grad.to_local().clone() for w in (experts.w1, experts.w2, experts.w3)]
        return self.output.detach() - self.x.detach(), self.x.grad - self.grad, *grads

    def bytes_on_the_wire(self) -> int:
        """What a rank sends in a step: gathers, which it counts, and gradients."""
        before = self.wire.bytes
        self.step()
        ranks = dist.get_world_size()
        reduced = REDUCED_BYTES * sum(parameter.numel() for parameter in self.moe.parameters())
        return (self.wire.bytes - before + reduced) * (ranks - 1) // ranks


def measure_layer(
    shape: Shape, variants: Sequence[str], options: argparse.Namespace
) -> tuple[list[Row], bool]:
    """The rows of a layer, and whether all results were right."""
    rows: list[Row] = []
    expected: Results | None = None
    right = True
    for variant in variants:
        layer = Layer(variant, shape, options.top_k, not options.no_compile)
        layer.step()
        try:
            found = layer.results()
            expected = expected or found
            decibels = check_results(found, expected)
            del found
            sent = layer.bytes_on_the_wire()
            seconds = median_seconds(layer.step, calls=options.calls)
        except WrongResult as error:
            print_once(f"{shape}: {variant} is not timed: {error}")
            right = False
            continue
        speedup, by_bytes = 1.0, None
        if rows:
            speedup = rows[0].seconds / seconds
            by_bytes = rows[0].bytes_on_the_wire / sent if sent else None
        rows.append(Row(str(shape), variant, seconds, speedup, decibels, sent, by_bytes))
        del layer
        gc.collect()
    return rows, right


# --- The command line


def table(rows: Sequence[Row]) -> str:
    header = ["tokens x K x N x E", "variant", "ms", "vs bf16", "dB"]
    layers = any(row.bytes_on_the_wire is not None for row in rows)
    if layers:
        header += ["MB on the wire", "by bytes alone"]
    lines = []
    for row in rows:
        decibels = "/".join(f"{value:.0f}" for value in row.decibels)
        line = [row.shape, row.variant, f"{row.seconds * 1e3:.3f}", f"{row.speedup:.2f}", decibels]
        if layers:
            by_bytes = "" if row.speedup_by_bytes is None else f"{row.speedup_by_bytes:.2f}"
            line += [f"{(row.bytes_on_the_wire or 0) / 1e6:.1f}", by_bytes]
        lines.append(line)
    return markdown_table(header, lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=SHAPES, help=f"tokens x K x N x E; default {SHAPES}")
    parser.add_argument("--variants", help="comma-separated, bf16 first; default: all, or with "
                        "--layer bf16,fp8dist:rowwise")  # fmt: skip
    parser.add_argument("--equal", action="store_true", help="as many tokens for each expert")
    parser.add_argument("--layer", action="store_true", help="a layer under FSDP2")
    parser.add_argument("--top-k", type=int, default=1, help="of --layer; default 1")
    parser.add_argument("--calls", type=int, default=20, help="timed, of --layer; default 20")
    parser.add_argument("--no-compile", action="store_true", help="run --layer eagerly")
    parser.add_argument("--json", type=Path, help="write rows, GPU, versions and date there")
    options = parser.parse_args(arguments)
    if options.variants is None:
        torchao = ["torchao:rowwise"] if CUDA else []
        matmuls = ["bf16", *torchao, "fp8dist:rowwise", "fp8dist:rowwise-fa", "alone:rowwise"]
        options.variants = ["bf16", "fp8dist:rowwise"] if options.layer else matmuls
    else:
        options.variants = options.variants.split(",")
    known = ("bf16", "fp8dist:") if options.layer else ("bf16", "torchao:", "fp8dist:", "alone:")
    for name in options.variants:
        if not name.startswith(known):
            parser.error(f"--variants: {name} is not one of {', '.join(known)}")
    if options.variants[0] != "bf16":
        parser.error(f"--variants begins with {options.variants[0]}; it must begin with bf16")
    options.shapes = [Shape.parse(text) for text in options.shapes.split(",")]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    logging.getLogger("fp8dist").setLevel(logging.WARNING)
    init_distributed()
    rows: list[Row] = []
    right = True
    for shape in options.shapes:
        if options.layer:
            found, ok = measure_layer(shape, options.variants, options)
        else:
            found, ok = measure_matmuls(shape, options.variants, options.equal)
        rows, right = rows + found, right and ok
    print_once(table(rows))
    print_once(f"\n{describe(setting())}")
    if options.json is not None and dist.get_rank() == 0:
        write_json(options.json, setting() | {"rows": [asdict(row) for row in rows]})
    dist.destroy_process_group()
    raise SystemExit(int(not right))


if __name__ == "__main__":
    main()
