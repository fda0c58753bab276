"""Asynchronous tensor parallelism: the compiler fuses the float8 all-gather of an input with the
matmuls that take it."""

import functools
import os
import re
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch._inductor import config
from torch._inductor.utils import run_and_get_code
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

import fp8dist
from fp8dist import async_tp, hardware
from fp8dist.tensors import float8_activation
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.tp_block import batch, block_of, part, plan, sqnr, tp_mesh

OVERLAPPED = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
COLWISE = ["attention.wk", "attention.wq", "feed_forward.w1", "feed_forward.w3"]
COMPILES = 300.0  # seconds; each of two compilations of forward and backward, nothing cached
FUSED = torch.ops.symm_mem.fused_all_gather_scaled_matmul


class Graphs:
    """The matmuls of each graph of forward that the compiler is about to generate code for."""

    def __init__(self) -> None:
        self.fused: list[int] = []  # of each fused all-gather, how many matmuls
        self.alone: list[str] = []  # the layers of the others

    def __call__(self, graph: torch.fx.Graph) -> None:
        if any(node.name.startswith("tangents") for node in graph.find_nodes(op="placeholder")):
            return
        for node in graph.nodes:
            if node.target is FUSED.default:
                self.fused.append(len(node.args[1]))
            elif node.target is torch.ops.aten._scaled_mm.default:
                modules = node.meta.get("nn_module_stack") or {"": ("no layer", None)}
                self.alone.append(list(modules.values())[-1][0].split("L['self'].")[-1])


class Traced(Exception):
    """Nothing is left to be seen."""


def traced(recipe: str, fsdp: bool) -> Graphs:
    """The graphs of forward on a device that would multiply float8, of which no code is made.

    Args:
        fsdp: FSDP2 (of one rank) gathers the weights in float8; else they are cast where used.
    """
    graphs = Graphs()

    def stop(graph: torch.fx.Graph) -> None:
        graphs(graph)
        raise Traced

    torch._dynamo.reset()
    mesh = init_device_mesh(DEVICE, (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    block = parallelize_module(block_of(recipe).bfloat16(), mesh["tp"], plan())
    block.compile(fullgraph=True)
    if fsdp:
        fully_shard(block, mesh=mesh["dp"])
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(block)
    x = part(batch(1), mesh["tp"]).bfloat16().requires_grad_()
    with (
        mock.patch.object(hardware, "multiplies", lambda *args: True),
        mock.patch.object(dist, "is_nccl_available", lambda: True),
        symmetric_memory._test_mode(),
        config.patch(
            _micro_pipeline_tp=True, post_grad_custom_post_pass=stop, force_disable_caches=True
        ),
        pytest.raises(Exception, match="Traced"),
    ):
        block(x)
    return graphs


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("recipe", OVERLAPPED)
def test_every_colwise_layer_is_fused_with_the_gather(recipe: str, fsdp: bool) -> None:
    for graphs in run_on_ranks(2, traced, recipe, fsdp):
        assert not [name for name in graphs.alone if name in COLWISE]
        assert graphs.fused == [2, 2], "wq and wk, w1 and w3"


def gather_bytes(
    gather: Callable[..., torch.Tensor], part: torch.Tensor, cut: float8_activation.Cut
) -> torch.Tensor:
    """As gloo takes it, which knows no float8."""
    if type(part) is torch.Tensor and part.itemsize == 1:
        return gather(part.view(torch.uint8), cut).view(part.dtype)
    return gather(part, cut)


def by_rank(recipe: str, dim: int) -> list[float]:
    """SQNR of outputs and gradients with tokens that are left as they arrive, against in order."""
    mesh, found = tp_mesh(), []
    for is_on in (False, True):
        block = parallelize_module(block_of(recipe), mesh, plan(dim=dim))
        x, grad = (batch(seed).chunk(mesh.size(), dim)[mesh.get_local_rank()] for seed in (1, 2))
        x = x.contiguous().requires_grad_()
        gather = functools.partial(gather_bytes, float8_activation.gather_tokens)
        with (
            mock.patch.object(async_tp, "is_on_for", lambda name, is_on=is_on: is_on),
            mock.patch.object(float8_activation, "gather_tokens", gather),
        ):
            output = block(x)
            output.backward(grad.contiguous())
        parameters = [p.grad.full_tensor() for p in block.parameters() if p.dim() == 2]
        found.append([output.detach(), x.grad, *parameters])
    return [sqnr(*pair) for pair in zip(*found, strict=True)]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("recipe", OVERLAPPED)
def test_tokens_left_as_they_arrive_give_the_same(recipe: str, dim: int) -> None:
    """Bitwise but for the order of grad_weight's sums of float32. On a GPU a row's sums may depend
    on where it lies, and so a gradient's scale, by a unit in the last place.
    """
    least = float("inf") if DEVICE == "cpu" else 55
    for output, input_grad, *weights in run_on_ranks(2, by_rank, recipe, dim):
        assert min(output, input_grad) >= least
        assert min(weights) > min(least, 110)


def overlapped(recipe: str) -> tuple[list[str], Graphs, list[float]]:
    """The code of forward, the graphs, and what the outputs and gradients differ by."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    mesh, graphs, found, code = tp_mesh(), Graphs(), [], []
    symmetric_memory.enable_symm_mem_for_group(mesh.get_group().group_name)
    for is_on in (False, True):
        torch._dynamo.reset()
        block = block_of(recipe, emulate=False).bfloat16()
        block = parallelize_module(block, mesh, plan())
        block.compile(fullgraph=True)
        x = part(batch(1), mesh).bfloat16().requires_grad_()
        passes = {"post_grad_custom_post_pass": graphs} if is_on else {}
        with config.patch(_micro_pipeline_tp=is_on, force_disable_caches=True, **passes):
            output, code = run_and_get_code(block, x)
            output.backward(part(batch(2), mesh).bfloat16())
        found.append([output.detach(), x.grad])
    return code, graphs, [sqnr(*pair) for pair in zip(*found, strict=True)]


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", OVERLAPPED)
def test_overlapped_on_a_gpu(recipe: str) -> None:
    """Two ranks may share it. What is multiplied is the same, and so is the output, but for the
    order in which the partial sums of a matmul of fewer rows are added, then rounded to bfloat16:
    8 bits are 48 dB.
    """
    for code, graphs, db in run_on_ranks(2, overlapped, recipe, timeout=COMPILES):
        call = r"= torch\.ops\.symm_mem\.fused_all_gather_scaled_matmul\."
        assert len(re.findall(call, "".join(code))) == 2
        assert not [name for name in graphs.alone if name in COLWISE]
        assert graphs.fused == [2, 2], "wq and wk, w1 and w3"
        assert min(db) > 40
