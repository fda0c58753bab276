"""The forward and the backward that the compiler makes of a function."""

from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes


def noting(graphs: dict[str, torch.fx.GraphModule]) -> Callable[..., Any]:
    """A backend for `torch.compile` that parts them as inductor does, runs both as they are, and
    puts them into graphs, by name.
    """

    def keep(name: str) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            graphs[name] = graph
            return make_boxed_func(graph.forward)

        return compiler

    def part(graph: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        return min_cut_rematerialization_partition(joint_graph_passes(graph), *args, **kwargs)

    return aot_autograd(
        fw_compiler=keep("forward"),
        bw_compiler=keep("backward"),
        decompositions=select_decomp_table,
        partition_fn=part,
    )


def ops_of_weights(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """The calls of fp8dist's ops on a weight, a matrix of bytes."""
    ops = [node for node in graph.graph.nodes if "fp8dist" in str(node.target)]
    return [node for node in ops if node.args[0].meta["val"].dtype.itemsize == 1]


def sizes_kept(graph: torch.fx.GraphModule) -> list[int]:
    """Elements of what a forward computes and keeps for backward, in ascending order."""
    _, *kept = graph.graph.output_node().args[0]
    return sorted(node.meta["val"].numel() for node in kept if node.op == "call_function")
