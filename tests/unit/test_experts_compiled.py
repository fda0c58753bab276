"""Experts in float8 inside what is compiled."""

import pytest
import torch
import torch.nn.functional as F

import fp8dist
from fp8dist import Float8Config, hardware
from fp8dist.experts import Float8ShardedExperts
from fp8dist.kernels import grouped
from tests.unit.graphs import noting, ops_of_weights
from tests.unit.moe import DIM, EXPERTS, HIDDEN, arrived, new_model, tokens, zeros_of_groups

RECIPE_NAMES = ["rowwise", "mxfp8_rceil"]
COUNTS = [5, 0, 37, 16]


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_compiled_in_one_graph(recipe: str) -> None:
    model = new_model()
    fp8dist.convert_moe_to_float8_training(model, config=recipe)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    counts = torch.tensor(COUNTS)
    results = []
    for run in (model, compiled):
        x = tokens(COUNTS).requires_grad_()
        output = run(x, counts)
        output.backward(tokens(COUNTS, seed=1))
        results.append([output.detach(), x.grad, *(p.grad for p in model.parameters())])
        model.zero_grad()
    for eager, of_graph in zip(*results, strict=True):
        torch.testing.assert_close(of_graph, eager)


def test_the_compilers_cache_tells_weights_apart() -> None:
    sharded = Float8ShardedExperts(torch.randn(2, 32, 32), Float8Config("rowwise"), "weight")
    weight = arrived(torch.randn(2, 32, 32), "rowwise")
    others = [
        sharded,
        sharded.bfloat16(),
        Float8ShardedExperts(sharded._tensor, Float8Config("mxfp8"), "weight"),
        weight,
        weight.bfloat16(),
        weight.mT,
        arrived(torch.randn(2, 32, 32), "mxfp8_rceil"),
    ]
    hashes = [other._stable_hash_for_caching() for other in others]
    assert len(set(hashes)) == len(others)
    assert hashes[3] == arrived(torch.randn(2, 32, 32), "rowwise")._stable_hash_for_caching()


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_nothing_made_of_the_weight_is_kept_from_forward(
    recipe: str, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 frees the weight in between; what the compiler kept of it would stay allocated. With
    torch's grouped matmul of rows, which wants transposes, as with another Triton."""
    torch._dynamo.reset()
    monkeypatch.setattr(hardware, "has_grouped_matmul", lambda device, of: of.name == "rowwise")
    monkeypatch.setattr(grouped, "multiplies_in_gluon", lambda a: False)
    # Output contracts columns of what is stored, and grad_input rows, or the other way around.
    inner, outer = (DIM, HIDDEN) if transposed else (HIDDEN, DIM)
    weight = arrived(torch.randn(EXPERTS, HIDDEN, DIM), recipe)
    weight = weight.mT if transposed else weight
    ends = torch.tensor(COUNTS).cumsum(0, dtype=torch.int32)
    graphs: dict[str, torch.fx.GraphModule] = {}

    @torch.compile(fullgraph=True, backend=noting(graphs))
    def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(x, weight, offs=ends)

    with torch.library._scoped_library("aten", "IMPL") as kernels:
        kernels.impl("_scaled_grouped_mm", zeros_of_groups, "CPU", allow_override=True)
        multiply(tokens(COUNTS, inner).requires_grad_(), weight).sum().backward()

    forward, backward = (ops_of_weights(graphs[name]) for name in ("forward", "backward"))
    assert [len(forward), len(backward)] == ([0, 1] if transposed else [1, 0])
    if recipe == "rowwise":  # tied to backward by less than a gradient, as linear layers' are
        assert all(op.args[-1].meta["val"].numel() == sum(COUNTS) for op in backward)
    # What arrived of the weight is kept, and nothing else of that size. (MXFP8's scales are.)
    output, *kept = graphs["forward"].graph.output_node().args[0]
    assert output.meta["val"].shape == (sum(COUNTS), outer)
    tensors = [x.meta["val"] for x in kept if isinstance(x.meta["val"], torch.Tensor)]
    large = [x for x in tensors if x.numel() >= EXPERTS * HIDDEN * DIM]
    assert [x.dtype.itemsize for x in large] == [1]
