"""From a configuration to a sharded model: convert, cut, checkpoint, compile, shard, initialise."""

import functools
import logging
from collections.abc import Callable
from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fp8dist
from fp8dist.train.config import JobConfig
from fp8dist.train.model import Llama, ModelShape, TransformerBlock
from fp8dist.train.tensor_parallel import check_shape, cut

logger = logging.getLogger(__name__)

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits, targets) -> their mean cross entropy."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# With option "op" the results of these are kept, and everything else is computed again.
KEPT_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.fp8dist.scaled_mm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_grouped_mm.default,
    torch.ops.fp8dist.scaled_grouped_mm.default,
    torch.ops.fp8dist.scaled_grouped_mm_rows.default,
    torch.ops.fp8dist.mx_grouped_mm.default,
    torch.ops.fp8dist.grouped_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def build_mesh(job: JobConfig, device: torch.device, world_size: int) -> DeviceMesh:
    """All ranks: dp_shard for FSDP, after dp_replicate for HSDP, before tp with tensor parallelism.

    Raises:
        ValueError: the degrees do not multiply to the number of ranks.
    """
    sizes = {"dp_shard": job.parallelism.shard_degree(world_size)}
    if (replicas := job.parallelism.data_parallel_replicate_degree) > 1:
        sizes = {"dp_replicate": replicas, **sizes}
    if (degree := job.parallelism.tensor_parallel_degree) > 1:
        sizes["tp"] = degree
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    if degree > 1:
        # DTensor finds it by itself: the norm of gradients, which both cut, is one all-reduce then.
        mesh["dp_shard", "tp"]._flatten("dp_shard_tp")
    return mesh


def data_parallel(mesh: DeviceMesh) -> DeviceMesh:
    """The part of `build_mesh`'s mesh whose ranks have batches of their own: FSDP's or HSDP's."""
    names = tuple(name for name in mesh.mesh_dim_names or () if name != "tp")
    return mesh[names]


def build_model(job: JobConfig, shape: ModelShape, mesh: DeviceMesh, device: torch.device) -> Llama:
    """The sharded, initialised model of `job` on `device`; collective-free until its forward.

    With CPU offload its shards are in main memory and its buffers on `device`.

    Raises:
        ValueError: tensor parallelism does not fit the model, its float8 layers or the sequence.
    """
    compiled = job.compile.enable and "model" in job.compile.components
    model = assemble(job, shape, mesh, compiled=compiled)
    model.to_empty(device="cpu" if job.training.enable_cpu_offload else device)
    model.init_weights(job.debug.seed or 0, device)
    return model


def assemble(job: JobConfig, shape: ModelShape, mesh: DeviceMesh, *, compiled: bool) -> Llama:
    """The sharded model of `job` on the meta device; see `build_model`."""
    check_shape(job, shape)
    _check_experts(job, shape)
    with torch.device("meta"):
        model = Llama(shape, _longest(job)).to(DTYPES[job.training.dtype])
    if job.float8_enabled:
        convert(model, job)
    if job.parallelism.tensor_parallel_degree > 1:
        cut(model, job, mesh["tp"])
    checkpoint_activations(model, job)
    if compiled:
        for block in model.layers:
            block.compile(fullgraph=True)
    shard(model, job, data_parallel(mesh))
    return model


def _longest(job: JobConfig) -> int:
    """Tokens of the longest sequence that the model is given."""
    validation = job.validation.seq_len if job.validation.enable else None
    return max(job.training.seq_len, validation or 0)


def _check_experts(job: JobConfig, shape: ModelShape) -> None:
    if shape.moe is None:
        return
    if job.parallelism.tensor_parallel_degree > 1:
        raise ValueError(
            f"parallelism.tensor_parallel_degree is {job.parallelism.tensor_parallel_degree}: "
            f"tensor parallelism does not cut the experts of model.flavor {job.model.flavor!r}; "
            "set it to 1"
        )
    compiled = job.compile.enable and "model" in job.compile.components
    if compiled and job.training.mixed_precision_param != "bfloat16":
        raise ValueError(
            f"training.mixed_precision_param is {job.training.mixed_precision_param!r}: compiled, "
            f"the experts of model.flavor {job.model.flavor!r} are multiplied in bfloat16 only; "
            "set it to bfloat16, or turn compile.enable off"
        )


def convert(model: nn.Module, job: JobConfig) -> None:
    """Turn linear layers and experts of `model` into float8 ones, as the job's converters say.

    Raises:
        ValueError: experts are to be converted that the model does not have.
    """
    if (experts := job.conversion_of_experts) is not None:
        fp8dist.convert_moe_to_float8_training(model, config=experts.recipe_name, fqns=experts.fqns)
    section = job.conversion
    if section is None:
        return
    fp8dist.convert_to_float8_training(
        model,
        config=fp8dist.Float8Config(
            recipe_name=section.recipe_name,
            enable_fsdp_float8_all_gather=section.float8_all_gather,
            emulate=section.emulate,
        ),
        module_filter_fn=fp8dist.float8_module_filter(section.recipe_name, section.filter_fqns),
    )


def checkpoint_activations(model: Llama, job: JobConfig) -> None:
    """Make blocks recompute their activations in backward, as `activation_checkpoint` says."""
    mode, option = job.activation_checkpoint.mode, job.activation_checkpoint.selective_ac_option
    if mode == "none":
        return
    recompute = functools.partial(checkpoint, use_reentrant=False)
    every = 1
    if mode == "selective" and option == "op":
        recompute = functools.partial(
            checkpoint,
            use_reentrant=False,
            context_fn=functools.partial(create_selective_checkpoint_contexts, _keep_or_recompute),
        )
    elif mode == "selective":
        every = int(option)
    for block in list(model.layers)[every - 1 :: every]:
        cast(TransformerBlock, block).recompute = recompute


def _keep_or_recompute(context, op, *args, **kwargs) -> CheckpointPolicy:
    """torch's selective checkpointing asks this about every operation in a block."""
    return CheckpointPolicy.MUST_SAVE if op in KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def shard(model: Llama, job: JobConfig, mesh: DeviceMesh) -> None:
    """Apply FSDP2 to every block and to what is left of `model`."""
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[job.training.mixed_precision_param], reduce_dtype=torch.float32
    )
    offload = OffloadPolicy()
    if job.training.enable_cpu_offload:
        # There is nothing to copy faster from where main memory is the device's own.
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    reshard = job.parallelism.fsdp_reshard_after_forward != "never"
    ranks = mesh.size(mesh.ndim - 1)

    def placement(param: nn.Parameter) -> Shard | None:
        """With fewer experts than ranks, part of each of them on every rank."""
        few = param.dim() == 3 and param.size(0) < ranks and param.size(1) % ranks == 0
        return Shard(1) if few else None

    for block in model.layers:
        fully_shard(
            block,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=reshard,
            shard_placement_fn=placement,
        )
    # Backward starts where forward ended: resharding the root would gather it twice in a row.
    last = job.parallelism.fsdp_reshard_after_forward == "always"
    fully_shard(
        model, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=last
    )


def build_loss(job: JobConfig) -> Loss:
    """The function (logits, targets) -> mean cross entropy in nats, compiled if asked.

    Not so with tensor parallelism: compiled, torch's loss of logits that are cut along the
    vocabulary comes out multiplied by the ranks.
    """
    if job.compile.enable and "loss" in job.compile.components:
        if job.parallelism.tensor_parallel_degree == 1:
            return torch.compile(cross_entropy)
        logger.info("the loss is not compiled: tensor parallelism shares its vocabulary")
    return cross_entropy


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats of (batch, seq, vocab) logits and (batch, seq) ids, float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(0, 1))
