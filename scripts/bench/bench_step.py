"""Time a training step under FSDP2 for several ways to do its linear layers.

    torchrun --nproc-per-node 1 scripts/bench/bench_step.py --variants bf16,fp8dist:tensorwise

Variants, the first of which is what the others are compared to:

    bf16                        nothing converted
    torchao:RECIPE[+ag]         torchao; +ag: with its float8 all-gather (tensorwise only)
    fp8dist:RECIPE[-ag][+fa]    fp8dist; -ag: gather in high precision, +fa: fast accumulation in
                                all three matmuls

and at the end of a name, to need less memory:

    -cache        (fp8dist without -ag) cast at each gather, keep no payload
    +recompute    compute the outputs of the layers of --recompute again in backward, as activation
                  checkpointing of each of them does
    +offload      (fp8dist without -ag) keep --offload GiB of activations in host memory until
                  backward

A row is the median tokens/s of a rank, the ratio to the first row, the peaks of allocated memory
and of what the allocator held for it, the last loss, and what the first step took, compilation
included. (The first variant's has the device's start-up too;
TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 compiles everything anew.) A variant is timed only if its first
loss is that of the first variant, to 1 %, and falls. The output layer is never converted. With more
ranks than GPUs NCCL takes each rank for a host of its own and talks over loopback sockets, so bytes
weigh as on a slow network:

    torchrun --nproc-per-node 4 scripts/bench/bench_step.py \\
        --layers 4 --dim 2048 --ffn 7168 --seq 2048 --vocab 2048

Where a machine is not as fast all the time, as when ranks take turns on a GPU, --rounds 3 measures
all variants three times, in turns, and prints last what each has of the first one's speed in the
same round: the median, the least and the most.
"""

import argparse
import math
import re
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench_model import Decoder, Shape
from harness import (
    CUDA,
    DEVICE,
    check,
    compare,
    init_distributed,
    kernels_of,
    timed,
)
from idle import idle_of
from offload import Offload
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fp8dist.tensors.groups import groups_of
from fp8dist.tensors.one_rank import keep_gradients_in_place

DEFAULT_VARIANTS = (
    "bf16,torchao:tensorwise,torchao:tensorwise+ag,torchao:rowwise,fp8dist:tensorwise"
)
WARM_UP_STEPS = 4
# Of the first loss, about ln(vocab): what float8 rounds differently moves it by a tenth of this.
LOSS_TOLERANCE = 0.01
ATTENTION = [f"attention.w{x}" for x in "qkvo"]


@dataclass(frozen=True)
class Variant:
    """One way to do the linear layers, from its name on the command line."""

    name: str
    library: str
    recipe: str
    gather: bool
    fast_accum: bool

    @classmethod
    def parse(cls, name: str) -> "Variant":
        if name == "bf16":
            return cls(name, "bf16", "", gather=False, fast_accum=False)
        if match := re.fullmatch(r"torchao:(\w+)(\+ag)?", name):
            if match[2] and match[1] != "tensorwise":
                raise ValueError(f"{name}: torchao gathers in float8 for tensorwise only")
            return cls(name, "torchao", match[1], gather=bool(match[2]), fast_accum=False)
        if match := re.fullmatch(r"fp8dist:(\w+)(-ag)?(\+fa)?", name):
            return cls(name, "fp8dist", match[1], gather=not match[2], fast_accum=bool(match[3]))
        raise ValueError(f"{name}: neither bf16, torchao:RECIPE[+ag] nor fp8dist:RECIPE[-ag][+fa]")

    def convert(
        self, model: nn.Module, cache_payload: bool = True
    ) -> Callable[[nn.Module], None] | None:
        """Convert in place; returns what to call after each optimizer step."""
        if self.library == "torchao":
            import torchao.float8 as library

            config = library.Float8LinearConfig.from_recipe_name(self.recipe)
            if self.gather:
                config = library.Float8LinearConfig(enable_fsdp_float8_all_gather=True)
        elif self.library == "fp8dist":
            import fp8dist as library

            config = library.Float8Config(
                recipe_name=self.recipe,
                enable_fsdp_float8_all_gather=self.gather,
                cache_payload=cache_payload,
                fast_accum=True if self.fast_accum else None,
            )
        else:
            return None
        library.convert_to_float8_training(
            model, config=config, module_filter_fn=lambda module, fqn: "output" not in fqn
        )
        return library.precompute_float8_dynamic_scale_for_fsdp if self.gather else None


@dataclass(frozen=True)
class Memory:
    """What a variant does to need less memory, from the end of its name on the command line."""

    cache_payload: bool = True
    recompute: bool = False
    offload: bool = False

    @classmethod
    def parse(cls, name: str) -> tuple[Variant, "Memory"]:
        plain = re.sub(r"(-cache|\+recompute|\+offload)+\Z", "", name)
        end = name[len(plain) :]
        variant = replace(Variant.parse(plain), name=name)
        memory = cls("-cache" not in end, "+recompute" in end, "+offload" in end)
        gathers_float8 = variant.library == "fp8dist" and variant.gather
        if not gathers_float8 and (memory.offload or not memory.cache_payload):
            raise ValueError(
                f"{name}: -cache and +offload are for weights that fp8dist gathers in float8, "
                "leave them out, or -ag"
            )
        return variant, memory


@dataclass(frozen=True)
class Row:
    """What was measured of a variant, on rank 0."""

    variant: str
    tokens_per_second: float
    ratio: float
    peak_gib: float | None
    reserved_gib: float | None
    loss: float
    first_step_seconds: float

    def __str__(self) -> str:
        peak, reserved = (
            "   n/a" if gib is None else f"{gib:6.2f}" for gib in (self.peak_gib, self.reserved_gib)
        )
        return (
            f"{self.variant:34s} {self.tokens_per_second:9.0f} tok/s/rank  x{self.ratio:.3f}  "
            f"peak {peak} GiB of {reserved}  loss {self.loss:.4f}  "
            f"first step {self.first_step_seconds:.1f} s"
        )


@dataclass(frozen=True)
class Measured:
    """A row, with --profile its kernels, and the losses of the steps before it was timed."""

    row: Row
    kernels: str
    warm_up: torch.Tensor

    def __str__(self) -> str:
        return "\n".join(filter(None, [str(self.row), self.kernels]))


class Training:
    """A sharded model, its optimizer and one batch."""

    def __init__(self, name: str, args: argparse.Namespace, mesh: DeviceMesh) -> None:
        variant, memory = Memory.parse(name)
        torch.manual_seed(0)
        with torch.device("meta"):
            self.model = Decoder(Shape(args.vocab, args.dim, args.layers, args.ffn))
        self.after_step = variant.convert(self.model, memory.cache_payload)
        self.offload = Offload(int(args.offload * 2**30)) if memory.offload else None
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in self.model.layers:
            for fqn in args.recompute if memory.recompute else ():
                layer.set_submodule(fqn, checkpoint_wrapper(layer.get_submodule(fqn)))
            if not args.no_compile:
                layer.compile(fullgraph=True)
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        if args.split_root:
            fully_shard(self.model.tok_embeddings, mesh=mesh, mp_policy=policy)
            fully_shard(
                [self.model.norm, self.model.output],
                mesh=mesh,
                mp_policy=policy,
                reshard_after_forward=False,  # backward begins with it
            )
        fully_shard(self.model, mesh=mesh, mp_policy=policy)
        if args.in_place:
            for module in self.model.modules():
                for group in groups_of(module):
                    keep_gradients_in_place(group)
        self.model.to_empty(device=DEVICE)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.ndim == 1:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(std=0.02)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.tokens = torch.randint(0, args.vocab, (args.batch, args.seq), device=DEVICE)
        self.labels = self.tokens.roll(-1, dims=1).flatten()
        self.microbatches = args.microbatches

    def step(self) -> torch.Tensor:
        """One optimizer step; returns the loss of its last microbatch."""
        for remaining in reversed(range(self.microbatches)):
            self.model.set_requires_gradient_sync(remaining == 0)
            # The logits have no name here, which would keep them until backward ends.
            loss = F.cross_entropy(self.logits().flatten(0, 1).float(), self.labels)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.after_step is not None:
            self.after_step(self.model)
        return loss.detach()

    def logits(self) -> torch.Tensor:
        with nullcontext() if self.offload is None else self.offload.forward():
            return self.model(self.tokens)


def kernel_report(training: Training) -> str:
    """The kernels of one step, the longest first, and on a GPU how long that does nothing."""
    kernels = kernels_of(training.step)
    total = sum(kernel.seconds for kernel in kernels) * 1e3
    lines = [f"    {sum(kernel.count for kernel in kernels)} kernels, {total:.1f} ms"]
    for kernel in kernels[:25]:
        milliseconds = kernel.seconds * 1e3
        lines.append(f"    {milliseconds:8.2f} ms x{kernel.count:5d} {kernel.name[:110]}")
    if CUDA:
        waited, followed = idle_of(training.step)
        lines.append(
            f"    idle after the host has waited: {waited}; after another step: {followed}"
        )
    return "\n".join(lines)


def check_losses(losses: torch.Tensor, expected: torch.Tensor) -> None:
    """That the first loss of the warm-up is the first variant's, and that it is learned from.

    Only the first: one batch over and over makes the loss fall by a factor of ten per step, and
    what is left then depends on the rounding.
    """
    first = abs(losses[0] - expected[0]) / expected[0]
    found, others = ([f"{x:.4f}" for x in values.tolist()] for values in (losses, expected))
    check(
        # False for a NaN.
        bool(first <= LOSS_TOLERANCE and losses.isfinite().all() and losses[-1] < losses[0]),
        f"losses {', '.join(found)}, of the first variant {', '.join(others)}",
    )


def measure(
    name: str, args: argparse.Namespace, mesh: DeviceMesh, first: "Measured | None"
) -> "Measured":
    """Check and time a variant. `first`: the one that it is compared to."""
    torch._dynamo.reset()
    training = Training(name, args, mesh)
    first_step, loss = timed(training.step)
    warm_up = torch.stack([loss, *(training.step() for _ in range(WARM_UP_STEPS - 1))])
    check_losses(warm_up, warm_up if first is None else first.warm_up)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = zip(*(timed(training.step) for _ in range(args.steps)), strict=True)
    peak, reserved = (
        (torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30)
        if CUDA
        else (None, None)
    )
    rate = args.microbatches * args.batch * args.seq / statistics.median(seconds)
    baseline = rate if first is None else first.row.tokens_per_second
    row = Row(name, rate, rate / baseline, peak, reserved, losses[-1].item(), first_step)
    return Measured(row, kernel_report(training) if args.profile else "", warm_up)


def of_rounds(measured: Sequence[Measured], variants: int) -> str:
    """Of so many variants, measured again and again: the ratios to the first of the same round."""
    rounds = [measured[i : i + variants] for i in range(0, len(measured), variants)]
    lines = [f"of {len(rounds)} rounds: the median, the least and the most"]
    for of_variant in zip(*rounds, strict=True):
        ratios = [each.row.ratio for each in of_variant]
        ends = f"{min(ratios):.3f} to {max(ratios):.3f}"
        lines.append(f"{of_variant[0].row.variant:34s} x{statistics.median(ratios):.3f}  {ends}")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", default=DEFAULT_VARIANTS, help="comma-separated")
    for name, default in {
        "layers": 8,
        "dim": 4096,
        "ffn": 14336,
        "vocab": 32000,
        "batch": 1,
        "seq": 8192,
        "microbatches": 1,
        "steps": 10,
        "rounds": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--no-compile", action="store_true", help="run the layers eagerly")
    parser.add_argument(
        "--recompute",
        nargs="+",
        # No output of w2 is kept.
        choices=[*ATTENTION, *(f"feed_forward.w{x}" for x in "13")],
        help=f"layers of a block, for +recompute; default {' '.join(ATTENTION)}",
    )
    parser.add_argument(
        "--offload", type=float, help="GiB of a rank's activations, for +offload; default 1.5"
    )
    parser.add_argument(
        "--split-root",
        action="store_true",
        help="the embedding, and the last norm with the output layer, in FSDP groups of their own",
    )
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="spare every variant the copy of one rank's gradients, as fp8dist spares itself",
    )
    parser.add_argument(
        "--profile", action="store_true", help="also the kernels of a step, and idle time"
    )
    parser.add_argument("--json", type=Path, help="write rows, GPU, versions and date there")
    return parser.parse_args()


def check_arguments(args: argparse.Namespace, memories: Sequence[Memory]) -> None:
    """Refuse what would do nothing or mislead, and fill in the defaults of the other flags."""
    if args.rounds < 1:
        raise ValueError(f"--rounds: {args.rounds}, must be 1 or more")
    recompute = any(memory.recompute for memory in memories)
    offload = any(memory.offload for memory in memories)
    if recompute and args.no_compile:
        raise ValueError(
            "+recompute: not compiled, outputs of layers are kept by what takes them, leave out "
            "--no-compile"
        )
    if offload and args.profile:
        raise ValueError(
            "+offload: copies run beside kernels, by which a GPU would not seem idle, leave out "
            "--profile"
        )
    for flag, used, default in (("recompute", recompute, ATTENTION), ("offload", offload, 1.5)):
        if getattr(args, flag) is None:
            setattr(args, flag, default)
        elif not used:
            raise ValueError(f"--{flag}: no variant has it, write VARIANT+{flag}")
    if not 0 < args.offload < math.inf:
        raise ValueError(f"--offload: {args.offload} GiB, must be more than none and finite")


def main() -> None:
    args = parse_arguments()
    names = args.variants.split(",")
    check_arguments(args, [Memory.parse(name)[1] for name in names])
    init_distributed()
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    compare(
        names,
        lambda name, first: measure(name, args, mesh, first),
        args,
        (lambda measured: of_rounds(measured, len(names))) if args.rounds > 1 else None,
        args.rounds,
    )


if __name__ == "__main__":
    main()
