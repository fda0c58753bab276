"""Inputs of layers that are cut over ranks: of any layout, uneven, DTensors, and those refused."""

import copy
import itertools

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

import fp8dist
from fp8dist import Float8Config
from fp8dist.config import RECIPES as RECIPES_BY_NAME
from fp8dist.tensor_parallel import (
    Float8ColwiseParallel,
    Float8RowwiseParallel,
    PrepareFloat8ModuleInput,
)
from fp8dist.tensors.float8_activation import cast_activation
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.tp_block import DIM, batch, block_of, least_db, part, sqnr, tp_mesh
from tests.distributed.wire import collectives


def uneven(recipe: str) -> float:
    """SQNR of the output for a DTensor of 33 tokens on 2 ranks."""
    mesh = tp_mesh()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, DIM)).to(DEVICE)
    fp8dist.convert_to_float8_training(model, config=Float8Config(recipe, emulate=True))
    alone = copy.deepcopy(model)
    x = batch(1)[:, :33]
    styles = {
        "0": Float8ColwiseParallel(),
        "2": Float8RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    parallelize_module(model, mesh, styles)
    for module, other in zip(model, alone, strict=True):
        for mine, theirs in zip(module.parameters(), other.parameters(), strict=True):
            other_whole = mine.full_tensor() if isinstance(mine, DTensor) else mine
            theirs.data.copy_(getattr(other_whole, "_tensor", other_whole))
    output = model(distribute_tensor(x, mesh, [Shard(1)], src_data_rank=None))
    output.sum().backward()
    return sqnr(output.full_tensor(), alone(x))


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "mxfp8_rceil"])
def test_tokens_that_ranks_cannot_share_evenly(recipe: str) -> None:
    assert min(run_on_ranks(2, uneven, recipe)) > least_db(recipe)


def uneven_again(style: ParallelStyle) -> tuple[str, float]:
    """What is said of an input of 33 tokens, and the SQNR of grad_weight from its float8 copy."""

    def layer(again: bool) -> nn.Sequential:
        style.gather_input_again = again
        styles = {"0": Float8ColwiseParallel(output_layouts=Replicate())}
        styles |= {"0" if isinstance(style, Float8ColwiseParallel) else "": style}
        model = nn.Sequential(block_of("rowwise_with_gw_hp").attention.wq)
        return parallelize_module(model, mesh, styles)

    mesh, x = tp_mesh(), batch(1)[:, :33]
    input = distribute_tensor(x, mesh, [Shard(1)], src_data_rank=None)
    model = layer(again=True)
    with collectives() as issued, pytest.raises(ValueError) as error:
        model(input)
    assert issued == []
    model = layer(again=False)
    model(input).sum().backward()
    expected = x.flatten(0, 1).sum(0).expand(DIM, DIM)
    return str(error.value), sqnr(model[0].weight.grad.full_tensor(), expected)


@pytest.mark.parametrize(
    "style",
    [
        Float8ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        PrepareFloat8ModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
    ],
    ids=lambda style: type(style).__name__,
)
def test_uneven_tokens_are_gathered_again_by_no_rank(style: ParallelStyle) -> None:
    for message, db in run_on_ranks(2, uneven_again, style):
        assert message.startswith(("attention.wq: ", "PrepareFloat8ModuleInput: "))
        assert "(2, 33, 512)" in message and "gather_input_again=False" in message
        assert 29 < db < 34  # of one operand in float8


def in_and_out(recipe: str, layout: Placement) -> dict[str, float]:
    """SQNR of outputs and grad_weight of a layer, by how its input comes and its output goes."""
    mesh, found = tp_mesh(), {}
    for flat, whole_dtensor, cast in itertools.product((False, True), repeat=3):
        x, grad = (batch(seed).flatten(0, 1) if flat else batch(seed) for seed in (1, 2))
        if flat and layout == Shard(1):  # features
            continue
        model = nn.Sequential(block_of(recipe).attention.wq)
        alone = copy.deepcopy(model)
        expected = alone(x)
        expected.backward(grad)
        style = Float8ColwiseParallel(
            input_layouts=layout,
            output_layouts=Replicate(),
            use_local_output=not whole_dtensor,
            gather_input_again=not cast,
        )
        parallelize_module(model, mesh, {"0": style})
        local = distribute_tensor(x, mesh, [layout], src_data_rank=None).to_local()
        if cast:
            how = RECIPES_BY_NAME[recipe]
            args = (how.input, how.input_dtype, how.scale_format, mesh.get_group().group_name)
            local = cast_activation(local, *args)
        mine = DTensor.from_local(local, mesh, [layout], run_check=False)
        output = model(mine if whole_dtensor else local)
        assert isinstance(output, DTensor) == whole_dtensor
        output.backward(
            DTensor.from_local(grad, mesh, [Replicate()], run_check=False)
            if whole_dtensor
            else grad
        )
        output = output.full_tensor() if whole_dtensor else output
        db = [sqnr(output.detach(), expected)]
        if not (cast and RECIPES_BY_NAME[recipe].input_for_grad_weight is None):
            db.append(sqnr(model[0].weight.grad.full_tensor(), alone[0].weight.grad))
        found[f"{flat=} {whole_dtensor=} {cast=}"] = min(db)
    return found


@pytest.mark.parametrize("layout", [Shard(0), Shard(1), Replicate()], ids=str)
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise_with_gw_hp", "mxfp8_rceil"])
def test_inputs_of_any_layout_and_kind(recipe: str, layout: Placement) -> None:
    """2-D and 3-D, DTensors or local parts, cast by the caller or not."""
    for found in run_on_ranks(2, in_and_out, recipe, layout):
        assert not {kind: db for kind, db in found.items() if not db > least_db(recipe)}


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        self.w(x)
        return other


def prepared_beside(other: torch.Tensor) -> torch.Tensor:
    """`other`, of which every rank has its rows, as the module gets it beside its activation."""
    mesh = tp_mesh()
    model = Positions().to(DEVICE)
    fp8dist.convert_to_float8_training(model, config=Float8Config("rowwise", emulate=True))
    style = PrepareFloat8ModuleInput(
        input_layouts=(Shard(1), Shard(0)), desired_input_layouts=(Replicate(), Replicate())
    )
    parallelize_module(model, mesh, {"": style, "w": Float8ColwiseParallel()})
    mine = other.to(DEVICE).chunk(mesh.size())[mesh.get_local_rank()].contiguous()
    with torch.autocast(DEVICE, torch.bfloat16):
        return model(part(batch(1), mesh), mine).to_local().cpu()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_inputs_that_are_no_activations_are_prepared_as_they_are(dtype: torch.dtype) -> None:
    other = (torch.arange(64 * 32).view(64, 32) % 1000).to(dtype)
    for found in run_on_ranks(2, prepared_beside, other):
        assert found.dtype == dtype and torch.equal(found, other)


STYLES: dict[str, ParallelStyle] = {
    "by columns": Float8ColwiseParallel(input_layouts=Shard(1)),
    "by rows": Float8RowwiseParallel(input_layouts=Shard(2), output_layouts=Shard(1)),
}


def layer_and_input(style: ParallelStyle, recipe: str = "rowwise") -> tuple[nn.Module, DTensor]:
    mesh = tp_mesh()
    model = parallelize_module(nn.Sequential(block_of(recipe).attention.wo), mesh, {"0": style})
    input = distribute_tensor(batch(1), mesh, style.input_layouts, src_data_rank=None)
    return model, input


def autocasts_dtensors(style: ParallelStyle) -> torch.dtype:
    model, input = layer_and_input(style)
    with torch.autocast(DEVICE, torch.bfloat16):
        return model(input).dtype


@pytest.mark.parametrize("kind", STYLES)
def test_autocast_of_dtensors(kind: str) -> None:
    assert run_on_ranks(2, autocasts_dtensors, STYLES[kind]) == [torch.bfloat16] * 2


def bad_inputs(style: ParallelStyle) -> list[str]:
    model, input = layer_and_input(style)
    local, mesh = input.to_local(), input.device_mesh
    other = init_device_mesh(DEVICE, (2, 1), mesh_dim_names=("dp", "tp"))
    how = RECIPES_BY_NAME["tensorwise"]
    args = (how.input, how.input_dtype, how.scale_format, mesh.get_group().group_name)
    messages = []
    for bad in (
        local.long(),
        local.double(),
        local[..., : local.size(-1) // 2],
        cast_activation(local, *args),
        DTensor.from_local(local, other["tp"], input.placements, run_check=False),
        DTensor.from_local(local, other, (Replicate(), *input.placements), run_check=False),
    ):
        with pytest.raises(ValueError) as error:
            model(bad)
        messages.append(str(error.value))
    return messages


@pytest.mark.parametrize("kind", STYLES)
def test_inputs_that_a_layer_does_not_take(kind: str) -> None:
    for messages in run_on_ranks(2, bad_inputs, STYLES[kind]):
        assert all(message.startswith("attention.wo: ") for message in messages)
        whole_long, whole_double, half, cast, one_rank, two_dims = messages
        assert "int64" in whole_long and "float64" in whole_double
        assert "256) of" in half and f"in_features={DIM}" in half
        assert "'rowwise'" in cast
        assert "DTensor on" in one_rank and "DTensor on" in two_dims
