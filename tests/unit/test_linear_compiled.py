"""`Float8Linear` inside a block that is compiled or recomputed: nothing changes but rounding."""

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

import fp8dist
from fp8dist import Float8Config, Float8Linear, kernels, numerics
from fp8dist.config import RECIPES, Recipe
from fp8dist.tensors.float8_tensor import Float8Tensor
from tests.unit.graphs import noting, ops_of_weights, sizes_kept

K = 64
CPP_COMPILER = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++")
CONFIGS = {
    "float8 gather": Float8Config(),
    "high precision gather": Float8Config(enable_fsdp_float8_all_gather=False),
}


def seeded(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sqnr(exact: torch.Tensor, found: torch.Tensor) -> float:
    exact, found = exact.double(), found.double()
    return float(10 * torch.log10(exact.square().sum() / (found - exact).square().sum()))


class Block(nn.Module):
    """What is compiled in training: a transformer's feed-forward, residual and norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.gate = nn.Linear(dim, 2 * dim, bias=False)
        self.down = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(hidden)) * self.up(hidden))


def float8_block(config: Float8Config, dim: int = K, of: type[Block] = Block) -> Block:
    torch.manual_seed(0)
    block = of(dim)
    for name in ("up", "gate", "down"):
        Float8Linear.from_float(getattr(block, name), config, name, block)
    return block


def gradients_of(block: nn.Module, run: Callable[[torch.Tensor], torch.Tensor]) -> list[Any]:
    input = seeded(2, 24, K, seed=3).requires_grad_()
    output = run(input)
    output.backward(seeded(2, 24, K, seed=4))
    return [output.detach(), input.grad, *(param.grad for param in block.parameters())]


@pytest.mark.parametrize("name", CONFIGS)
def test_traced_without_graph_breaks_is_bitwise_eager(name: str) -> None:
    """Only traced: the same kernels in the same order, so not a bit may change."""
    expected = gradients_of(block := float8_block(CONFIGS[name]), block)
    torch._dynamo.reset()
    block = float8_block(CONFIGS[name])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for value, found in zip(expected, gradients_of(block, compiled), strict=True):
        assert torch.equal(found, value)


@pytest.mark.skipif(not CPP_COMPILER, reason="inductor needs a C++ compiler")
def test_compiled_is_eager_up_to_rounding() -> None:
    """Generated code computes norm and activation with other roundings: 1e-7 relative.

    Where such a difference crosses a rounding boundary of float8 an operand moves by one unit,
    2^-3 of itself, which is rare; the rest agrees. So: nearly everything equal to float32 accuracy,
    and an error far below that of float8 itself (28 dB).
    """
    expected = gradients_of(block := float8_block(Float8Config()), block)
    torch._dynamo.reset()
    block = float8_block(Float8Config())
    compiled = torch.compile(block, fullgraph=True)
    for value, found in zip(expected, gradients_of(block, compiled), strict=True):
        assert sqnr(value, found) > 50
    torch._dynamo.reset()


def test_a_second_batch_size_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    block = float8_block(Float8Config())
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for tokens in (16, 24, 40):
        input = seeded(1, tokens, K, seed=tokens)
        assert torch.equal(compiled(input), block(input))
    torch._dynamo.reset()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputing_activations_changes_nothing(use_reentrant: bool) -> None:
    expected = gradients_of(block := float8_block(Float8Config()), block)
    block = float8_block(Float8Config())
    found = gradients_of(block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant))
    for value, other in zip(expected, found, strict=True):
        assert torch.equal(other, value)


@pytest.mark.skipif(not CPP_COMPILER, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tokens, inputs, outputs", [(256, 384, 512), (24, 128, 128)])
def test_every_recipe_compiles(recipe: str, tokens: int, inputs: int, outputs: int) -> None:
    """At the first inductor fails if it is to fuse casts in two orientations.

    Casts have eager's bytes. What is left are the sums of dequantized products in another order:
    far above 100 dB in float32.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = Float8Config(recipe, emulate=True)
    layer = Float8Linear.from_float(nn.Linear(inputs, outputs), config)

    def results(run: Callable[[torch.Tensor], torch.Tensor]) -> list[Any]:
        layer.zero_grad()
        input = seeded(tokens, inputs, seed=3).requires_grad_()
        output = run(input)
        output.backward(seeded(tokens, outputs, seed=4))
        return [output.detach(), input.grad, layer.weight.grad]

    expected = results(layer)
    for value, found in zip(expected, results(torch.compile(layer, fullgraph=True)), strict=True):
        assert sqnr(value, found) > 100 or torch.equal(value, found)


def arrived(linear: nn.Linear, recipe: Recipe) -> nn.Parameter:
    """The weight as an all-gather leaves it."""

    def scales(block: tuple[int, int]) -> torch.Tensor:
        amax = numerics.amax(linear.weight.detach(), block)
        scale = numerics.amax_to_scale(amax, recipe.weight_dtype, recipe.scale_format)
        if recipe.scale_format == "e8m0":
            return numerics.scale_to_exponent(scale)[None]
        return torch.stack([scale.reciprocal(), scale])

    scale = numerics.quantize(
        linear.weight.detach(), recipe.weight, recipe.weight_dtype, recipe.scale_format
    )
    others = recipe.weight_for_grad_input != recipe.weight and recipe.scale_format != "e8m0"
    weight = Float8Tensor(
        scale.data,
        scales(recipe.weight),
        linear.weight.shape,
        torch.float32,
        scales(recipe.weight_for_grad_input) if others else None,
    )
    return nn.Parameter(weight)


class Attention(nn.Module):
    """Layers of several sizes, three of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(512)
        self.wq, self.wo = (nn.Linear(512, 512, bias=False) for _ in range(2))
        self.wk, self.wv = (nn.Linear(512, 128, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(x)
        mixed = (self.wk(hidden) * self.wv(hidden)).repeat(1, 4)
        return x + self.wo(self.wq(hidden) * mixed)


# Those whose weight an op makes ready for grad_input on a CPU, too; others take a view there.
BY_AN_OP = [r.name for r in RECIPES.values() if r.weight != r.weight_for_grad_input]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is given to fuse what it is there; the ops are a CPU's."""
    monkeypatch.setattr(kernels.ops, "has_kernels", lambda _: True)
    monkeypatch.setattr(kernels.ops, "in_kernels", lambda _: False)


@pytest.mark.parametrize("tokens", [96, 0])
@pytest.mark.parametrize(
    "recipe, on_a_gpu", [*((name, True) for name in RECIPES), *((name, False) for name in BY_AN_OP)]
)
def test_nothing_made_of_the_weight_is_kept_from_forward(
    recipe: str, on_a_gpu: bool, tokens: int, request: pytest.FixtureRequest
) -> None:
    """FSDP2 frees the weight in between; what the compiler kept of it would stay allocated."""
    if on_a_gpu:
        request.getfixturevalue("as_on_a_gpu")
    torch._dynamo.reset()
    torch.manual_seed(0)
    block, weights = Attention(), ("wq", "wk", "wv", "wo")
    for name in weights:
        layer = getattr(block, name)
        weight = arrived(layer, RECIPES[recipe])
        Float8Linear.from_float(layer, Float8Config(recipe, emulate=True)).weight = weight
    graphs: dict[str, torch.fx.GraphModule] = {}

    compiled = torch.compile(block, fullgraph=True, backend=noting(graphs))
    compiled(seeded(tokens, 512, seed=1).requires_grad_()).sum().backward()

    assert not ops_of_weights(graphs["forward"])
    of_blocks = {getattr(block, name).weight.numel() // 32 for name in weights}
    assert not of_blocks & set(sizes_kept(graphs["forward"])), "scales of blocks of a weight"
    ops = ops_of_weights(graphs["backward"])
    assert len(ops) == len(weights), "what grad_input multiplies by"
    # What ties them to backward is not a gradient, which the compiler may have to write for that.
    assert all(op.args[-1].meta["val"].numel() <= max(1, tokens * 512 // 32) for op in ops)


class WithRelu(Block):
    """One whose activation is kept for its own gradient, and is an input as it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.relu(self.up(self.norm(x))))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("of", [Block, WithRelu])
def test_nothing_made_of_an_input_is_kept_from_forward(
    of: type[Block], recipe: str, as_on_a_gpu: None
) -> None:
    """Neither what grad_weight multiplies, which is cast again, nor the inputs that are cast then:
    the norm's output and the activation's are computed again.
    """
    torch._dynamo.reset()
    block = float8_block(Float8Config(recipe, emulate=True), dim=128, of=of)
    graphs: dict[str, torch.fx.GraphModule] = {}
    compiled = torch.compile(block, fullgraph=True, backend=noting(graphs))
    tokens = 384  # of which no part of a weight is a multiple
    compiled(seeded(1, tokens, 128, seed=1).requires_grad_()).sum().backward()
    kept = [size for size in sizes_kept(graphs["forward"]) if size % tokens == 0]
    factors = 1 if of is WithRelu else 2
    # Beside a factor of each token, of the norm.
    assert [size for size in kept if size > tokens] == [tokens * 256] * factors


def casts_of(graph: torch.fx.GraphModule, tokens: int) -> list[torch.fx.Node]:
    """What becomes float8, in rows of tokens, of something that is not."""
    casts = []
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and getattr(value, "dtype", None) == torch.float8_e4m3fn:
            of = node.args[0].meta["val"]  # of what an op returns several values
            if value.size(0) == tokens and getattr(of, "dtype", None) != value.dtype:
                casts.append(node)
    return casts


@pytest.mark.parametrize("recipe", RECIPES)
def test_layers_of_one_input_share_its_cast(recipe: str, as_on_a_gpu: None) -> None:
    """Of three two have the same, which forward casts once, by the op or where it is fused."""
    torch._dynamo.reset()
    block = float8_block(Float8Config(recipe, emulate=True), dim=128)
    graphs: dict[str, torch.fx.GraphModule] = {}
    compiled = torch.compile(block, fullgraph=True, backend=noting(graphs))
    tokens = 384  # of which no part of a weight is a multiple
    compiled(seeded(1, tokens, 128, seed=1).requires_grad_()).sum().backward()
    assert sum(isinstance(layer, Float8Linear) for layer in block.modules()) == 3
    inputs = casts_of(graphs["forward"], tokens)
    assert len(inputs) == 2, inputs


def test_backward_casts_by_the_amax_that_forward_has_found(as_on_a_gpu: None) -> None:
    torch._dynamo.reset()
    graphs: dict[str, torch.fx.GraphModule] = {}
    compiled = torch.compile(float8_block(Float8Config()), fullgraph=True, backend=noting(graphs))
    compiled(seeded(1, 32, K, seed=1).requires_grad_()).sum().backward()
    casts = graphs["backward"].graph.find_nodes(
        op="call_function", target=torch.ops.fp8dist.quantize.default
    )
    amaxes = [cast.args[3] for cast in casts if cast.args[0].target == torch.ops.aten.where.self]
    assert [amax.op for amax in amaxes] == ["placeholder"] * 2, "of the norm and of SwiGLU"


class WithState(nn.Module):
    """A layer of a state that forward writes to after the layer has read it."""

    def __init__(self, of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.of, self.read = of, nn.Linear(128, 128, bias=False)
        self.register_buffer("state", seeded(32, 128, seed=5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.read(self.of(self.state)) + x
        with torch.no_grad():
            self.state.copy_(x)
        return out


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("of", [torch.tanh, lambda state: 2 * state], ids=["tanh", "double"])
def test_an_input_of_a_state_that_is_written_to(
    recipe: str, of: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Backward casts no input again that may not be what it was."""
    gradients = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = WithState(of)
        fp8dist.convert_to_float8_training(model, config=recipe)
        run = torch.compile(model, fullgraph=True, backend=noting({})) if compiled else model
        run(torch.zeros(32, 128).requires_grad_()).backward(seeded(32, 128, seed=6))
        gradients.append(model.read.weight.grad)
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_an_exported_program_casts_no_input_for_backward() -> None:
    with torch.no_grad():
        exported = torch.export.export(float8_block(Float8Config()), (seeded(1, 32, K, seed=1),))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert any("fp8dist.quantize" in target for target in targets)
    assert not any("aten.where" in target for target in targets)


@pytest.mark.gpu
def test_amaxes_of_tensors_are_found_where_the_compiler_computes_them() -> None:
    """No kernel reads an activation or a gradient for its amax alone."""
    block = float8_block(CONFIGS["high precision gather"]).cuda().bfloat16()
    x = seeded(2, 128, K, seed=3).cuda().bfloat16().requires_grad_()
    eager = block(x)
    compiled = torch.compile(block, fullgraph=True)

    def step() -> torch.Tensor:
        output = compiled(x)
        output.backward(torch.ones_like(output))
        return output

    # Norm and activation are rounded to bfloat16, 2^-9, in other places: 48 dB; an element of
    # float8 that it moves to its neighbour is off by 2^-4 then, as all are by up to 2^-5 (31 dB).
    assert sqnr(eager, step()) > 30
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    assert any("quantize_kernel" in name for name in names), names
    assert not any("amax_kernel" in name for name in names), names
