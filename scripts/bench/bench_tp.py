"""Time a training step of Llama blocks under tensor parallelism, for several kinds of layers.

    torchrun --nproc-per-node 2 scripts/bench/bench_tp.py --json outputs/tp.json

Variants, the first of which is what the others are compared to:

    bf16                        torch's styles, nothing converted
    torchao:tensorwise[+ag]     torchao's styles, the only recipe that they know, on GPUs only; +ag:
                                FSDP2 gathers weights in float8
    fp8dist:RECIPE[-again]      fp8dist's styles; -again: recipes whose grad_weight is computed in
                                high precision take the input from float8 in backward

All ranks cut the blocks, sequence-parallel between the linear layers; FSDP2 over one rank casts
weights as in training. Embedding and logits, the same for all, are left out. A row is the median
tokens/s of all ranks together, the ratio to the first row, the peak of allocated memory, the last
loss, and the megabytes that a rank sends in a step (one that is not compiled) if each collective is
a ring, by kind. A variant is timed only if what the blocks compute and how they learn is as the
first variant's, up to the noise of float8. With more ranks than GPUs bytes weigh as on a slow
network; see bench_step.py.
"""

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import traffic
from bench_model import Blocks, Shape
from bench_step import WARM_UP_STEPS, Variant
from harness import (
    CUDA,
    DEVICE,
    check,
    compare,
    init_distributed,
    sqnr,
    timed,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

DEFAULT_VARIANTS = (
    "bf16,torchao:tensorwise,torchao:tensorwise+ag,fp8dist:tensorwise,fp8dist:rowwise,"
    "fp8dist:rowwise_with_gw_hp,fp8dist:rowwise_with_gw_hp-again,fp8dist:blockwise,fp8dist:mxfp8"
)
# Larger weights are trained in smaller steps, or the blocks do not learn; and begin smaller.
LEARNING_RATE, OF_DIM = 1e-3, 2048
# What the blocks add to their input, against the first variant's. One block has 24 dB by any
# recipe, with whose errors the next begins; tokens in another order or a wrong scale leave about 0.
LEAST_DB = 12
# Of how far the loss falls in the warm-up: gradients in float8 are off by 5 %, at random.
FALL_TOLERANCE = 0.1


@dataclass(frozen=True)
class Row:
    """What was measured of a variant, on rank 0."""

    variant: str
    tokens_per_second: float
    ratio: float
    sent: dict[str, int]
    sqnr: float | None  # None: of the first, which the others are compared to
    peak_gib: float | None
    loss: float

    def __str__(self) -> str:
        peak = "n/a" if self.peak_gib is None else f"{self.peak_gib:.2f}"
        kinds = ", ".join(f"{kind} {sent / 1e6:.3f}" for kind, sent in sorted(self.sent.items()))
        first = (
            f"{self.variant:36s} {self.tokens_per_second:9.0f} tok/s  x{self.ratio:.3f}  peak "
            f"{peak} GiB  loss {self.loss:.4f}"
        )
        db = "" if self.sqnr is None else f"  {self.sqnr:.1f} dB"
        return f"{first}{db}\n    sends {sum(self.sent.values()) / 1e6:.3f} MB: {kinds}"


@dataclass(frozen=True)
class Measured:
    """A row, the losses of the steps before it was timed, and what the blocks first added."""

    row: Row
    warm_up: torch.Tensor
    added: torch.Tensor

    def __str__(self) -> str:
        return str(self.row)


def plan(library: str, again: bool) -> dict[str, Any]:
    """The styles of a block: sequence parallel between the linear layers."""
    columns, rows, prepare = ColwiseParallel, RowwiseParallel, PrepareModuleInput
    options: dict[str, Any] = {}
    if library == "torchao":
        from torchao.float8 import float8_tensor_parallel as styles
    elif library == "fp8dist":
        import fp8dist as styles

        options = {"gather_input_again": again}
    if library != "bf16":
        columns, rows = styles.Float8ColwiseParallel, styles.Float8RowwiseParallel
        prepare = styles.PrepareFloat8ModuleInput
    whole: dict[str, Any] = {}
    for half, by_columns, by_rows in (
        ("attention", ("wq", "wk", "wv"), "wo"),
        ("feed_forward", ("w1", "w3"), "w2"),
    ):
        whole[half] = prepare(
            input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), **options
        )
        whole |= {f"{half}.{name}": columns(**options) for name in by_columns}
        whole[f"{half}.{by_rows}"] = rows(output_layouts=Shard(1))
    norms = ("attention_norm", "ffn_norm")
    return whole | {name: SequenceParallel(use_local_output=True) for name in norms}


class Training:
    """Blocks cut over the ranks, their optimizer, and one batch that they learn by heart."""

    def __init__(self, name: str, args: argparse.Namespace, mesh: DeviceMesh) -> None:
        variant = Variant.parse(name.removesuffix("-again"))
        torch.manual_seed(0)
        with torch.device(DEVICE):
            self.model = Blocks(Shape(0, args.dim, args.layers, args.ffn))
            batch = torch.randn(2, args.batch, args.seq, args.dim, dtype=torch.bfloat16)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=parameter.size(1) ** -0.5)
        self.after_step = variant.convert(self.model)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        dp, tp = mesh["dp"], mesh["tp"]
        for layer in self.model.layers:
            styles = plan(variant.library, not name.endswith("-again"))
            # None: every rank has made the same weights, and keeps its part.
            parallelize_module(layer, tp, styles, src_data_rank=None)
            if not args.no_compile:
                layer.compile(fullgraph=True)
            fully_shard(layer, mesh=dp, mp_policy=policy)
        fully_shard(self.model, mesh=dp, mp_policy=policy)
        lr = LEARNING_RATE * min(1, OF_DIM / args.dim)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, fused=True)
        part = batch.chunk(tp.size(), dim=2)[tp.get_local_rank()]
        # A copy, also of a batch of one: other strides than a layer's output would be dynamic ones.
        self.tokens, self.targets = part.clone(memory_format=torch.contiguous_format).unbind()
        self.added = torch.zeros(())

    def step(self) -> torch.Tensor:
        """One optimizer step; returns the loss of this rank's tokens."""
        output = self.model(self.tokens)
        self.added = output.detach() - self.tokens
        loss = F.mse_loss(output.float(), self.targets.float())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.after_step is not None:
            self.after_step(self.model)
        return loss.detach()


def check_results(losses: torch.Tensor, added: torch.Tensor, first: Measured) -> float:
    """That the blocks compute and learn what the first variant's do; the SQNR of the former.

    Only the first output: the weights differ after that, as does what is learned from them.
    """
    db = sqnr(added.float(), first.added.float())
    check(db > LEAST_DB, f"what the blocks add has {db:.1f} dB against the first variant's")
    fall, expected = (float(x[0] - x[-1]) for x in (losses, first.warm_up))
    check(
        # False for a NaN.
        abs(fall - expected) <= FALL_TOLERANCE * expected,
        f"the loss falls by {fall:.4f}, that of the first variant by {expected:.4f}",
    )
    return db


def measure(
    name: str, args: argparse.Namespace, mesh: DeviceMesh, first: Measured | None
) -> Measured:
    """Check and time a variant. `first`: the one that it is compared to."""
    torch._dynamo.reset()
    training = Training(name, args, mesh)
    warm_up, added = [training.step()], training.added
    warm_up += [training.step() for _ in range(WARM_UP_STEPS - 1)]
    losses = torch.stack(warm_up)
    check(bool(losses[-1] < losses[0]), f"the loss rises, from {losses[0]} to {losses[-1]}")
    db = None
    if first is not None:
        db = check_results(losses, added, first)
    with torch.compiler.set_stance("force_eager"), traffic.recorded() as sent:
        training.step()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    seconds, of_steps = zip(*(timed(training.step) for _ in range(args.steps)), strict=True)
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else None
    rate = args.batch * args.seq / statistics.median(seconds)
    baseline = rate if first is None else first.row.tokens_per_second
    row = Row(name, rate, rate / baseline, dict(sent), db, peak, of_steps[-1].item())
    return Measured(row, losses, added)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", default=DEFAULT_VARIANTS, help="comma-separated")
    for name, default in {
        "layers": 2,
        "dim": 2048,
        "ffn": 7168,
        "batch": 1,
        "seq": 2048,
        "steps": 10,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--no-compile", action="store_true", help="run the blocks eagerly")
    parser.add_argument("--json", type=Path, help="write rows, GPU, versions and date there")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    names = args.variants.split(",")
    for name in names:
        variant = Variant.parse(name.removesuffix("-again"))
        if variant.library == "torchao" and (variant.recipe != "tensorwise" or not CUDA):
            raise ValueError(
                f"{name}: torchao's styles know tensorwise only, and send float8, which gloo "
                "refuses: leave it out, or use tensorwise on GPUs"
            )
    init_distributed()
    mesh = init_device_mesh(DEVICE, (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    compare(names, lambda name, first: measure(name, args, mesh, first), args)


if __name__ == "__main__":
    main()
