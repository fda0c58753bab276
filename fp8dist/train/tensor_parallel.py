"""How tensor parallelism cuts a Llama over ranks, and what has to divide for it."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from fp8dist import (
    Float8ColwiseParallel,
    Float8Linear,
    Float8RowwiseParallel,
    PrepareFloat8ModuleInput,
)
from fp8dist.train.config import JobConfig
from fp8dist.train.model import Llama, ModelShape

# The linear layers of each half of a block: those cut by output features, all of which take what
# the half takes, and the one that is cut by input features.
HALVES = {"attention": (("wq", "wk", "wv"), "wo"), "feed_forward": (("w1", "w3"), "w2")}


def check_shape(job: JobConfig, shape: ModelShape) -> None:
    """Whether the tensor-parallel degree divides what it cuts.

    Raises:
        ValueError: it does not divide the model's sizes or the sequence.
    """
    degree = job.parallelism.tensor_parallel_degree
    sizes = {
        "heads": shape.n_heads,
        "kv heads": shape.n_kv_heads,
        "features of the feed-forward": shape.hidden_dim,
        "entries of the vocabulary": shape.vocab_size,
    }
    for what, size in sizes.items():
        if size % degree:
            largest = math.gcd(*sizes.values())
            fitting = [str(n) for n in range(1, largest + 1) if largest % n == 0]
            raise ValueError(
                f"parallelism.tensor_parallel_degree={degree} does not divide the {size} {what} of "
                f"model.flavor {job.model.flavor!r}: choose one of {', '.join(fitting)}"
            )
    lengths = {"training.seq_len": job.training.seq_len}
    if job.validation.enable and job.validation.seq_len is not None:
        lengths["validation.seq_len"] = job.validation.seq_len
    for key, length in lengths.items():
        if length % degree:
            raise ValueError(
                f"parallelism.tensor_parallel_degree={degree} does not divide {key}={length}, "
                "which is cut between the linear layers: choose another degree or length"
            )


def cut(model: Llama, job: JobConfig, mesh: DeviceMesh) -> None:
    """Cut `model`, converted and not sharded yet, over the ranks of the 1-D `mesh`.

    It takes whole sequences of token ids, the same on all these ranks. Its logits are a DTensor
    that is cut along the vocabulary. Nothing is communicated.

    Raises:
        ValueError: a float8 layer's part is of a size that its recipe does not take.
    """
    _check_layers(model, job)
    # src_data_rank=None: each rank keeps its part of its own weights, which have no values yet.
    parallelize_module(model, mesh, plan(model), src_data_rank=None)


def loss_context(job: JobConfig) -> AbstractContextManager[None]:
    """For loss and backward, so that the loss of logits cut along the vocabulary gathers none."""
    return loss_parallel() if job.parallelism.tensor_parallel_degree > 1 else nullcontext()


def plan(model: Llama) -> dict[str, ParallelStyle]:
    """The style of each module, by name: sequence parallel wherever there is no matmul."""
    styles: dict[str, ParallelStyle] = {
        "tok_embeddings": _Embedding(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "output": _by_columns(model.output)(
            input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False
        ),
    }
    for index, block in enumerate(model.layers):
        name = f"layers.{index}"
        for norm in ("attention_norm", "ffn_norm"):
            styles[f"{name}.{norm}"] = SequenceParallel(use_local_output=True)
        for half, (by_columns, by_rows) in HALVES.items():
            layers = [block.get_submodule(f"{half}.{layer}") for layer in by_columns]
            # One gather for all. It is of high precision if only some of them are converted: the
            # others must not be given rounded numbers.
            converted = all(isinstance(layer, Float8Linear) for layer in layers)
            prepare = PrepareFloat8ModuleInput if converted else PrepareModuleInput
            styles[f"{name}.{half}"] = prepare(
                input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
            )
            for layer, module in zip(by_columns, layers, strict=True):
                styles[f"{name}.{half}.{layer}"] = _by_columns(module)()
            last = f"{half}.{by_rows}"
            styles[f"{name}.{last}"] = _by_rows(block.get_submodule(last))(output_layouts=Shard(1))
    return styles


class _Embedding(RowwiseParallel):
    """Whose output has arrived.

    torch returns one that is still on its way, and the gradient of such an input ends where
    compiled code, the first block, begins.
    """

    @staticmethod
    def _prepare_output_fn(
        output_layouts: tuple[Placement, ...],
        use_local_output: bool,
        mod: nn.Module,
        outputs: DTensor,
        device_mesh: DeviceMesh,
    ) -> torch.Tensor:
        output = RowwiseParallel._prepare_output_fn(
            output_layouts, use_local_output, mod, outputs, device_mesh
        )
        return output.clone()


def _by_columns(layer: nn.Module) -> type[ColwiseParallel]:
    return Float8ColwiseParallel if isinstance(layer, Float8Linear) else ColwiseParallel


def _by_rows(layer: nn.Module) -> type[RowwiseParallel]:
    return Float8RowwiseParallel if isinstance(layer, Float8Linear) else RowwiseParallel


def _check_layers(model: Llama, job: JobConfig) -> None:
    degree = job.parallelism.tensor_parallel_degree
    rows_are_cut = {f"{half}.{layer}" for half, (layers, _) in HALVES.items() for layer in layers}
    for name, layer in model.named_modules():
        if not isinstance(layer, Float8Linear):
            continue
        short = ".".join(name.split(".")[-2:])
        rows, columns = layer.out_features, layer.in_features
        by_columns = short in rows_are_cut or name == "output"
        part = rows // degree if by_columns else columns // degree
        recipe = layer.config.recipe
        if part % recipe.dim_multiple:
            section = " and ".join(job.model.converters)
            raise ValueError(
                f"{name}: its weight is {rows} x {columns}, of which "
                f"parallelism.tensor_parallel_degree={degree} leaves a rank {part} "
                f"{'rows' if by_columns else 'columns'}, and {recipe.name} takes multiples of "
                f"{recipe.dim_multiple}: add {short} to {section}.filter_fqns, or choose a smaller "
                "degree"
            )
