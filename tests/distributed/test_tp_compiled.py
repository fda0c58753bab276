"""Modules of a plan that are compiled alone: the compiler calls their hooks before it traces."""

from typing import Any

import pytest
import torch
import torch.nn as nn
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

import fp8dist
from fp8dist import (
    Float8ColwiseParallel,
    Float8Config,
    Float8RowwiseParallel,
    PrepareFloat8ModuleInput,
)
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.tp_block import (
    Block,
    batch,
    block_of,
    least_db,
    part,
    plan,
    sqnr,
    tp_mesh,
)

c10d = torch.ops._c10d_functional

PREPARE = {
    "": PrepareFloat8ModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
    "wq": Float8ColwiseParallel(),
}
EACH = {"wq": Float8ColwiseParallel(input_layouts=Shard(1))}


def compiled(recipe: str, whole: bool) -> list[float]:
    """SQNR of output and gradients of attention, against eager.

    Args:
        whole: all of it is compiled, whose hook prepares the input; else layers, that gather.
    """
    found, mesh = [], tp_mesh()
    styles = (PREPARE if whole else EACH) | {"wk": Float8ColwiseParallel(input_layouts=Shard(1))}
    styles["wo"] = Float8RowwiseParallel(output_layouts=Shard(1))
    for names in ([], [""] if whole else ["wq", "wo"]):
        torch._dynamo.reset()
        attention = parallelize_module(block_of(recipe).attention, mesh, styles)
        for name in names:
            attention.get_submodule(name).compile(fullgraph=True, backend="aot_eager")
        x = part(batch(1), mesh).requires_grad_()
        output = attention(x)
        output.backward(part(batch(2), mesh))
        gradients = [p.grad.full_tensor() for p in attention.parameters() if p.dim() == 2]
        found.append([output.detach(), x.grad, *gradients])
    return [sqnr(*pair) for pair in zip(*found, strict=True)]


@pytest.mark.parametrize(
    ("recipe", "whole"),
    [("tensorwise", False), ("tensorwise", True), ("rowwise_with_gw_hp", True), ("rowwise", False)],
)
def test_modules_that_are_compiled_alone(recipe: str, whole: bool) -> None:
    for found in run_on_ranks(2, compiled, recipe, whole):
        assert min(found) > least_db(recipe)


def needless_waits(recipe: str) -> list[str]:
    """In the graphs of a block, forward and backward: for what no collective gives, or for an amax
    again. (torch's DTensors wait for their sums twice, and gloo's bytes are waited for before.)"""
    found: list[str] = []

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if node.target is not c10d.wait_tensor.default:
                continue
            (source,) = node.all_input_nodes
            if source.target is c10d.wait_tensor.default:
                if source.meta["val"].dtype == torch.int32:
                    found.append(f"{node} for {source}")
            while source.target is torch.ops.aten.view.dtype:
                source = source.all_input_nodes[0]
            if getattr(source.target, "namespace", "") != "_c10d_functional":
                found.append(f"{node} for {source}")
        return make_boxed_func(graph.forward)

    mesh = tp_mesh()
    torch._dynamo.reset()
    block = parallelize_module(block_of(recipe), mesh, plan())
    block.compile(fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
    block(part(batch(1), mesh)).sum().backward()
    return found


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_nothing_is_waited_for_needlessly(recipe: str) -> None:
    """A wait takes the host as long as a cast; no result would show it."""
    assert run_on_ranks(2, needless_waits, recipe) == [[], []]


def graphs_of_blocks(recipe: str) -> int:
    model = nn.Sequential(*(Block() for _ in range(3))).to(DEVICE)
    fp8dist.convert_to_float8_training(model, config=Float8Config(recipe, emulate=True))
    mesh = tp_mesh()
    torch._dynamo.reset()
    counters.clear()
    for block in model:
        parallelize_module(block, mesh, plan()).compile(fullgraph=True, backend="eager")
    model(part(batch(1), mesh).requires_grad_()).sum().backward()
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise_with_gw_hp"])
def test_blocks_share_a_graph(recipe: str) -> None:
    """Torch compiles one function eight times at most, and large models have more blocks."""
    assert run_on_ranks(2, graphs_of_blocks, recipe) == [1, 1]
