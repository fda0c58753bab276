"""A Llama block cut over ranks: numerics of one device, and float8 on the wire."""

import copy
import functools
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

import fp8dist
from fp8dist import Float8Config, async_tp
from fp8dist.config import RECIPES as RECIPES_BY_NAME
from fp8dist.tensor_parallel import (
    Float8ColwiseParallel,
    Float8RowwiseParallel,
    PrepareFloat8ModuleInput,
)
from fp8dist.tensors import float8_activation
from fp8dist.tensors.float8_activation import cast_activation
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.test_async_tp import gather_bytes
from tests.distributed.tp_block import (
    DIM,
    RECIPES,
    batch,
    block_of,
    least_db,
    part,
    plan,
    sqnr,
    tp_mesh,
    whole,
)
from tests.distributed.wire import collectives


def results(
    recipe: str, dp: int | None, compiled: bool, config: dict[str, Any]
) -> list[tuple[str, float]]:
    """SQNR in dB of output and gradients of the block cut over all ranks, against it on one.

    Args:
        dp: how many ranks FSDP2 shards over; None without it.
    """
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh(DEVICE, (dp or 1, world // (dp or 1)), mesh_dim_names=("dp", "tp"))
    tp = mesh["tp"]
    block = block_of(recipe, **config)
    alone = copy.deepcopy(block)
    input, grad = batch(1).requires_grad_(), batch(2)
    output = alone(input)
    output.backward(grad)

    parallelize_module(block, tp, plan())
    if compiled:
        eager = block(part(batch(1), tp)) if dp is None else None
        # Recipes are compiled one after the other in one process, as of a model that mixes them.
        if dp is not None or recipe == RECIPES[0]:
            torch._dynamo.reset()
        block.compile(fullgraph=True, backend="aot_eager")
    if dp is not None:  # every rank has the whole batch, so that its mean over dp is what one has
        fully_shard(block, mesh=mesh["dp"])
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(block)
    mine = part(batch(1), tp).requires_grad_()
    found = block(mine)
    found.backward(part(grad, tp))
    if compiled and eager is not None:
        assert sqnr(found, eager) > 110

    pairs = [
        ("output", whole(found.detach(), tp), output),
        ("input", whole(mine.grad, tp), input.grad),
    ]
    for (name, parameter), other in zip(block.named_parameters(), alone.parameters(), strict=True):
        got = parameter.grad
        got = got.full_tensor() if isinstance(got, DTensor) else got
        pairs.append((name, got, other.grad))
    return [(name, sqnr(got, want)) for name, got, want in pairs]


MODES: dict[str, tuple[int, int | None, bool, dict[str, Any]]] = {
    "2 ranks": (2, None, False, {}),
    "2 ranks, compiled": (2, None, True, {}),
    "2 ranks, cast where used": (2, None, False, {"enable_fsdp_float8_all_gather": False}),
    "4 ranks": (4, None, False, {}),
    "FSDP2 x 2 ranks": (4, 2, False, {}),
    # The graph takes what FSDP2 has gathered, from however many ranks; test_compose has two.
    "FSDP2 of one rank x 2 ranks, compiled": (2, 1, True, {}),
    "FSDP2 x 2 ranks, gathered in high precision": (
        4,
        2,
        False,
        {"enable_fsdp_float8_all_gather": False},
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_is_what_one_device_computes(recipe: str, mode: str) -> None:
    world, dp, compiled, config = MODES[mode]
    for found in run_on_ranks(world, results, recipe, dp, compiled, config):
        bad = {name: db for name, db in found if not db > least_db(recipe)}
        assert not bad


def grad_weights(recipe: str, again: bool) -> dict[str, torch.Tensor]:
    mesh = tp_mesh()
    block = parallelize_module(block_of(recipe), mesh, plan(again))
    block(part(batch(1), mesh)).backward(part(batch(2), mesh))
    return {n: p.grad.full_tensor().cpu() for n, p in block.named_parameters() if p.dim() == 2}


def test_grad_weight_from_the_float8_copy_has_its_noise() -> None:
    """That of one operand in float8 where it was gathered, some 31 dB; none where it was not."""
    exact, *_ = run_on_ranks(2, grad_weights, "rowwise_with_gw_hp", True)
    for found in run_on_ranks(2, grad_weights, "rowwise_with_gw_hp", False):
        for name, grad in found.items():
            db = sqnr(grad, exact[name])
            assert (29 < db < 34) if name.split(".")[1] in ("wq", "wk", "w1", "w3") else db > 110


class Consumer(nn.Module):
    """Takes a prepared input in ways that a plan does not foresee."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = (nn.Linear(DIM, DIM, bias=False) for _ in range(2))
        self.plain = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w1(x) + self.w1(x * 0.5) + self.plain(x) + self.w2(x).tanh()


def consume(recipe: str) -> float:
    """SQNR of the gradient of the input."""
    mesh = tp_mesh()
    torch.manual_seed(0)
    model = nn.Sequential(Consumer()).to(DEVICE)
    fp8dist.convert_to_float8_training(
        model,
        config=Float8Config(recipe, emulate=True),
        module_filter_fn=lambda module, fqn: "plain" not in fqn,
    )
    alone, input = copy.deepcopy(model), batch(1).requires_grad_()
    alone(input).backward(batch(2))
    whole_output = {"output_layouts": Replicate()}
    parallelize_module(
        model,
        mesh,
        {
            "0": PrepareFloat8ModuleInput(
                input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
            ),
            "0.w1": Float8ColwiseParallel(**whole_output),
            "0.w2": Float8ColwiseParallel(**whole_output),
            "0.plain": ColwiseParallel(**whole_output),
        },
    )
    mine = part(batch(1), mesh).requires_grad_()
    model(mine).backward(batch(2))
    return sqnr(whole(mine.grad, mesh), input.grad)


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_with_gw_hp"])
def test_a_prepared_input_may_be_used_in_any_way(recipe: str) -> None:
    """Where no Float8Linear takes it, it is the value of what was cast, with some 28 dB."""
    assert min(run_on_ranks(2, consume, recipe)) > 25


def refused(style: type[ParallelStyle]) -> str:
    mesh = tp_mesh()
    model = parallelize_module(
        nn.Sequential(block_of("rowwise").attention.wq), mesh, {"0": style()}
    )
    with pytest.raises(ValueError) as error:
        model(batch(1))
    return str(error.value)


@pytest.mark.parametrize("style", [ColwiseParallel, RowwiseParallel])
def test_styles_of_torch_are_refused_for_a_float8_layer(style: type[ParallelStyle]) -> None:
    """They would drop the bias, and scale gradients by their parts."""
    for message in run_on_ranks(2, refused, style):
        assert "attention.wq: " in message and "Float8ColwiseParallel" in message


def one_style_for_several() -> list[float]:
    mesh = tp_mesh()
    blocks = [block_of(recipe).attention for recipe in ("rowwise", "tensorwise")]
    alone = copy.deepcopy(blocks)
    style = plan()["attention"]
    for block in blocks:
        own = {name.removeprefix("attention."): s for name, s in plan().items() if ".w" in name}
        parallelize_module(block, mesh, {k: s for k, s in own.items() if "feed" not in k})
        parallelize_module(block, mesh, style)
    return [
        sqnr(whole(block(part(batch(1), mesh)).detach(), mesh), other(batch(1)))
        for block, other in zip(blocks, alone, strict=True)
    ]


def test_one_style_object_planned_for_modules_of_several_recipes() -> None:
    for rowwise, tensorwise in run_on_ranks(2, one_style_for_several):
        assert rowwise > least_db("rowwise") and tensorwise > least_db("tensorwise")


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


def autocasts() -> tuple[torch.dtype, torch.dtype]:
    mesh = tp_mesh()
    attention = block_of("rowwise").attention
    own = {
        name.removeprefix("attention."): s for name, s in plan().items() if "attention.w" in name
    }
    parallelize_module(attention, mesh, own)
    with torch.autocast(DEVICE, torch.bfloat16):
        query = attention.wq(batch(1))
    query.float().sum().backward()
    return query.dtype, attention.wq.weight.grad.dtype


def test_autocast() -> None:
    assert run_on_ranks(2, autocasts) == [(torch.bfloat16, torch.float32)] * 2


class Viewed(nn.Module):
    """One of its layers takes a view of the input that is not in the order of arrival."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk = (nn.Linear(DIM, DIM, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key = self.wq(x), self.wk(x.flatten(0, 1))
        return query + key.view(query.shape)


def grad_weights_of_views() -> list[float]:
    """SQNR of them, with tokens as they arrive."""
    mesh = tp_mesh()
    model = Viewed().to(DEVICE)
    fp8dist.convert_to_float8_training(
        model, config=Float8Config("rowwise_with_gw_hp", emulate=True)
    )
    columns = {"output_layouts": Replicate()}
    prepare = PrepareFloat8ModuleInput(
        input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
    )
    styles = {"": prepare, "wq": Float8ColwiseParallel(**columns)}
    parallelize_module(model, mesh, styles | {"wk": Float8ColwiseParallel(**columns)})
    gather = functools.partial(gather_bytes, float8_activation.gather_tokens)
    with (
        mock.patch.object(async_tp, "is_on_for", lambda name: True),
        mock.patch.object(float8_activation, "gather_tokens", gather),
    ):
        model(part(batch(1), mesh)).backward(batch(2))
    expected = (batch(2).flatten(0, 1).T @ batch(1).flatten(0, 1)).double()
    return [sqnr(layer.weight.grad.full_tensor(), expected) for layer in (model.wq, model.wk)]


def test_a_view_of_tokens_that_arrived_by_rank_is_gathered_again_in_its_order() -> None:
    """In high precision: what differs is the order of float32 sums."""
    for found in run_on_ranks(2, grad_weights_of_views):
        assert min(found) > least_db("rowwise_with_gw_hp")


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
