"""A Llama block cut over ranks: numerics of one device, and float8 on the wire."""

import copy
import functools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

import fp8dist
from fp8dist import Float8Config, async_tp
from fp8dist.tensor_parallel import Float8ColwiseParallel, PrepareFloat8ModuleInput
from fp8dist.tensors import float8_activation
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
