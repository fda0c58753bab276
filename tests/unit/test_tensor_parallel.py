"""Plans that cannot be honoured are refused by name, before anything is communicated."""

import functools
import weakref
from collections import Counter

import pytest
import torch
import torch.nn as nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.utils.checkpoint import (
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

import fp8dist
from fp8dist import Float8Config, Float8Linear, kernels
from fp8dist.config import RECIPES, Block
from fp8dist.numerics import Scaled
from fp8dist.tensor_parallel import (
    Float8ColwiseParallel,
    Float8RowwiseParallel,
    PrepareFloat8ModuleInput,
    _check,
)
from fp8dist.tensors import gathering
from fp8dist.tensors.float8_activation import Float8Activation, cast_activation
from fp8dist.tensors.gathering import Cut, gather_tokens


class Mesh:
    """As many ranks as a test wants."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def size(self) -> int:
        return self.ranks


def layer(recipe: str, inputs: int, outputs: int) -> Float8Linear:
    config = Float8Config(recipe, emulate=True)
    return Float8Linear.from_float(nn.Linear(inputs, outputs), config, "blocks.0.wq")


@pytest.mark.parametrize("style", [Float8ColwiseParallel, Float8RowwiseParallel])
def test_a_module_that_is_not_float8(style: type[ParallelStyle], mesh: DeviceMesh) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(
        ValueError, match=f"{style.__name__} was planned for a torch.*Linear: .* convert"
    ):
        parallelize_module(model, mesh, {"0": style()})
    assert type(model[0].weight) is nn.Parameter


@pytest.mark.parametrize(
    "recipe, inputs, outputs, ranks, dim, name",
    [
        ("tensorwise", 64, 96, 4, 0, "out_features=96"),
        ("rowwise", 96, 64, 4, 1, "in_features=96"),
        ("blockwise", 256, 384, 2, 0, "out_features=384"),
        ("mxfp8_rceil", 96, 64, 2, 1, "in_features=96"),
    ],
)
def test_parts_that_the_recipe_cannot_multiply(
    recipe: str, inputs: int, outputs: int, ranks: int, dim: int, name: str
) -> None:
    with pytest.raises(ValueError, match=rf"blocks\.0\.wq: .* over {ranks} ranks cuts {name} "):
        _check("style", layer(recipe, inputs, outputs), Mesh(ranks), dim)
    _check("style", layer(recipe, inputs, outputs), Mesh(1), dim)


def test_an_input_prepared_for_several_recipes_or_none(mesh: DeviceMesh) -> None:
    style = PrepareFloat8ModuleInput(
        input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
    )
    with pytest.raises(ValueError, match="has Float8Linear layers none"):
        parallelize_module(nn.Sequential(nn.Linear(64, 64)), mesh, style)
    model = nn.Sequential(layer("tensorwise", 64, 64), layer("rowwise", 64, 64))
    with pytest.raises(ValueError, match="of recipes tensorwise, rowwise"):
        parallelize_module(model, mesh, style)


def test_an_input_prepared_for_a_layer_that_is_not_there(mesh: DeviceMesh) -> None:
    style = PrepareFloat8ModuleInput(
        input_layouts=(Shard(1),),
        desired_input_layouts=(Replicate(),),
        fwd_config_submodule_fqn="w4",
    )
    with pytest.raises(ValueError, match="ModuleDict has no module 'w4', .*: it has w1"):
        parallelize_module(nn.ModuleDict({"w1": layer("rowwise", 64, 64)}), mesh, style)


def test_another_float8_dtype() -> None:
    with pytest.raises(ValueError, match="float8_e5m2"):
        PrepareFloat8ModuleInput(float8_dtype=torch.float8_e5m2)


def columns_and_rows(recipe: str, mesh: DeviceMesh) -> nn.Sequential:
    """Two layers: one gathers its input, the other the gradient of its output."""
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(2)))
    fp8dist.convert_to_float8_training(model, config=Float8Config(recipe, emulate=True))
    styles = {
        "0": Float8ColwiseParallel(input_layouts=Shard(0)),
        "1": Float8RowwiseParallel(output_layouts=Shard(0)),
    }
    return parallelize_module(model, mesh, styles)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise", "mxfp8_rceil"])
def test_nothing_is_dequantized_on_its_way_to_a_matmul(
    recipe: str, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would read and write all of it, and no result would show that."""
    model = columns_and_rows(recipe, mesh)
    monkeypatch.setattr(Float8Activation, "dequantize", None)
    # As on a GPU, where weights of all recipes are transposed by ops.
    monkeypatch.setattr(kernels.ops, "has_kernels", lambda x: x.dtype == torch.float8_e4m3fn)
    monkeypatch.setattr(kernels.ops, "in_kernels", lambda _: False)
    x = torch.randn(32, 128, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None


class Counting:
    """Of casts, in one orientation or two, and of transposes."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def casts(self, x: torch.Tensor, block: Block | None, transposed_block: Block | None) -> None:
        self.found[f"casts in {sum(b is not None for b in (block, transposed_block))}"] += 1

    def transposes(self, weight: Scaled, block: Block, new_scale: torch.Tensor | None) -> None:
        self.found["transposes"] += 1


@pytest.mark.parametrize("frozen", [False, True])
def test_what_has_one_scale_is_transposed_only_if_it_was_gathered(
    frozen: bool, mesh: DeviceMesh
) -> None:
    """Neither kind of work shows in a result."""
    model, counting = columns_and_rows("tensorwise", mesh), Counting()
    for linear in model:
        linear.weight.requires_grad_(not frozen)
    x = torch.randn(32, 128, requires_grad=True)
    with kernels.watched(counting):
        model(x).sum().backward()
    # Two activations and two gradients, one each gathered; both weights are transposed.
    if frozen:
        assert counting.found == {"casts in 1": 4, "transposes": 2}
    else:
        assert counting.found == {"casts in 1": 2, "casts in 2": 2, "transposes": 2 + 2}


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_rank_gives_what_the_layer_gives(recipe: str, mesh: DeviceMesh) -> None:
    """2-D and 3-D inputs, with and without bias, DTensors kept or not."""
    for shape in ((32, 128), (2, 16, 128)):
        for use_local_output in (True, False):
            model = nn.Sequential(
                nn.Linear(128, 256), nn.Identity(), nn.Linear(256, 128, bias=False)
            )
            fp8dist.convert_to_float8_training(model, config=Float8Config(recipe, emulate=True))
            x = torch.randn(shape)
            expected = model(x)
            tokens = len(shape) - 2
            parallel = parallelize_module(
                model,
                mesh,
                {
                    "0": Float8ColwiseParallel(
                        input_layouts=Shard(tokens), use_local_output=use_local_output
                    ),
                    "2": Float8RowwiseParallel(
                        output_layouts=Shard(tokens), use_local_output=use_local_output
                    ),
                },
            )
            found = parallel(x)
            assert isinstance(found, torch.Tensor)
            found = found if use_local_output else found.full_tensor()
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", [Shard(0), Replicate()], ids=str)
def test_tokens_of_any_number(layout: Placement, mesh: DeviceMesh) -> None:
    """Of the operands of grad_weight, what has arrived is not padded, and what is cast here is."""
    styles = [
        Float8ColwiseParallel(input_layouts=layout),
        Float8RowwiseParallel(input_layouts=Replicate(), output_layouts=layout),
    ]
    for style in styles:
        model = nn.Sequential(layer("tensorwise", 128, 128))
        x = torch.randn(10, 128)
        model(x).square().sum().backward()
        expected = model[0].weight.grad
        model.zero_grad()
        parallelize_module(model, mesh, {"0": style})(x).square().sum().backward()
        torch.testing.assert_close(model[0].weight.grad.full_tensor(), expected, rtol=0, atol=0)


def parallel(recipe: str, mesh: DeviceMesh) -> nn.Module:
    model = nn.Sequential(layer(recipe, 128, 128))
    return parallelize_module(model, mesh, {"0": Float8ColwiseParallel(input_layouts=Shard(0))})


def test_an_input_that_was_cast_for_another_recipe(mesh: DeviceMesh) -> None:
    model = parallel("rowwise", mesh)
    group_name = mesh.get_group().group_name
    args = ((-1, -1), torch.float8_e4m3fn, "exact", group_name)
    with pytest.raises(ValueError, match=r"blocks\.0\.wq: its input was cast for another recipe"):
        model(cast_activation(torch.randn(16, 128), *args))


def test_an_input_that_was_edited_before_it_is_gathered_again(mesh: DeviceMesh) -> None:
    model, x = parallel("rowwise_with_gw_hp", mesh), torch.randn(16, 128)
    loss = model(x).sum()
    x.mul_(100)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # autograd's own
        loss.backward()


def prepared(model: nn.Module, mesh: DeviceMesh, *layers: str) -> nn.Module:
    """Its layers, which share what was gathered for it."""
    style = PrepareFloat8ModuleInput(input_layouts=Shard(0), desired_input_layouts=Replicate())
    columns = {name: Float8ColwiseParallel() for name in layers}
    return parallelize_module(model, mesh, {"": style} | columns)


def test_an_input_that_was_edited_after_it_was_cast(mesh: DeviceMesh) -> None:
    model, x = nn.Sequential(layer("rowwise_with_gw_hp", 128, 128)), torch.randn(16, 128)
    prepared(model, mesh, "0")

    def edit(module: nn.Module, inputs: object) -> None:
        x.mul_(100)

    model[0].register_forward_pre_hook(edit)
    with pytest.raises(RuntimeError, match="modified in place after it was cast"):
        model(x)


def test_an_input_that_was_edited_before_it_was_cast_may_be_moved(mesh: DeviceMesh) -> None:
    """As offloading of activations does, after which there is another tensor, never edited."""
    model, x = parallel("rowwise_with_gw_hp", mesh), torch.randn(16, 128).mul_(2)
    with saved_tensors_hooks(torch.clone, lambda saved: saved):
        model(x).sum().backward()
    assert torch.equal(model[0].weight.grad.full_tensor(), x.sum(0).expand(128, 128))


class Recomputed(nn.Module):
    """One of two layers that take the same input is recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk = (layer("rowwise_with_gw_hp", 128, 128) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.wq, x, use_reentrant=False) + self.wk(x)


def test_recomputed_layers_keep_nothing_that_was_gathered_again(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One gather serves both, and ends with backward, though the graph lives."""
    gathered = []

    def gather(part: torch.Tensor, cut: Cut) -> torch.Tensor:
        found = gather_tokens(part, cut)
        if type(part) is torch.Tensor:
            gathered.append(weakref.ref(found))
        return found

    monkeypatch.setattr(gathering, "gather_tokens", gather)
    loss = prepared(Recomputed(), mesh, "wq", "wk")(batch_of_one_rank()).sum()
    assert gathered == []
    loss.backward()
    assert [gathered_again() for gathered_again in gathered] == [None]


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise_with_gw_hp", "mxfp8_rceil"])
def test_inference_before_training(recipe: str, mesh: DeviceMesh) -> None:
    model, x = parallel(recipe, mesh), torch.randn(16, 128)
    with torch.inference_mode():
        expected = model(x)
    found = model(x)
    assert torch.equal(found, expected)
    found.sum().backward()
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
    assert torch.equal(model(x), expected)


def test_selective_checkpointing_of_a_first_forward(mesh: DeviceMesh) -> None:
    """What is cast once is not cast again when the layer is recomputed."""
    policy = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.amax.default])
    gradients = []
    for context in (noop_context_fn, policy):
        torch.manual_seed(0)
        model = nn.Sequential(parallel("tensorwise", mesh), parallel("tensorwise", mesh))
        x = batch_of_one_rank()
        checkpoint(model, x, use_reentrant=False, context_fn=context).sum().backward()
        gradients.append([x.grad, *(p.grad.full_tensor() for p in model.parameters())])
    for found, expected in zip(*gradients, strict=True):
        assert torch.equal(found, expected)


def batch_of_one_rank() -> torch.Tensor:
    return torch.randn(16, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
