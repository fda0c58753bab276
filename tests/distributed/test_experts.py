"""Experts under FSDP2: what is gathered and at how many bytes, and what it is good for."""

import functools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import fp8dist
from fp8dist import Float8Config
from fp8dist.config import RECIPES
from fp8dist.experts import Float8Experts, Float8ShardedExperts
from tests.distributed.experts_model import (
    DIM,
    HIDDEN,
    VOCAB,
    Model,
    batches,
    local_batch,
    loss_of,
    new_model,
    placed_on,
    shard,
)
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.test_placement import quantized
from tests.distributed.toy import full, mesh_of, same_bits
from tests.distributed.wire import collectives
from tests.unit.moe import FusedExperts, StackedExperts

RECIPE_NAMES = ["rowwise", "mxfp8_rceil"]

# --- placement


def weight_of(shape: tuple[int, int, int]) -> torch.Tensor:
    """Rows, columns and experts of different sizes, and a row of zeros."""
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator)
    weight *= torch.logspace(-2, 2, shape[0])[:, None, None]
    weight *= torch.logspace(-3, 2, shape[1])[:, None] * torch.logspace(1, -1, shape[2])
    weight[0, 0] = 0
    return weight


def unsharded(
    mesh: tuple[int, ...], recipe: str, shapes: list[tuple[int, int, int]], dim: int
) -> list[Any]:
    """(bytes, scales, both by expert) of a weight of every shape."""
    found = []
    for shape in shapes:
        root = nn.Module()
        root.experts = nn.Module()
        root.experts.weight = nn.Parameter(weight_of(shape).to(DEVICE))
        fp8dist.convert_moe_to_float8_training(root, config=Float8Config(recipe))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        fully_shard(
            root.experts, mesh=mesh_of(*mesh), shard_placement_fn=placed_on(dim), mp_policy=policy
        )
        for _ in range(2):  # FSDP2 fills what the first all-gather made again
            root.experts.unshard()
            weight = root.experts.weight
            assert isinstance(weight, Float8Experts)
            assert (weight.dtype, weight.shape) == (torch.bfloat16, torch.Size(shape))
            data, scales, *_ = weight.unpack(RECIPES[recipe].weight)
            assert weight._scales_for_grad_input is None  # of columns there are none
            found_here = (
                data.contiguous().view(torch.uint8).cpu().view(shape).clone(),
                scales.cpu().clone().view(shape[0], shape[1], -1),
            )
            root.experts.reshard()
        found.append(found_here)
    return found


@pytest.mark.parametrize(
    ("mesh", "dim", "shapes"),
    [
        ((1,), 0, [(4, 64, 96)]),
        ((2,), 0, [(4, 64, 96), (3, 32, 64)]),  # of 3 experts the second rank has one
        ((3,), 0, [(4, 32, 64), (6, 32, 64)]),  # 2, 2 and no expert
        ((4,), 0, [(5, 32, 64)]),  # 2, 2, 1 and none
        ((2, 2), 0, [(4, 32, 64)]),
        ((2,), 1, [(1, 64, 96), (3, 32, 64)]),
        ((4,), 1, [(2, 64, 96)]),
        ((2, 2), 1, [(3, 64, 96)]),
        ((2,), 2, [(3, 32, 128)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_any_placement(
    recipe: str, mesh: tuple[int, ...], dim: int, shapes: list[tuple[int, int, int]]
) -> None:
    of = RECIPES[recipe]
    for results in run_on_ranks(math.prod(mesh), unsharded, mesh, recipe, shapes, dim):
        for shape, (data, scales) in zip(shapes, results, strict=True):
            for e, weight in enumerate(weight_of(shape)):
                expected_data, expected_scales = quantized(weight, of.weight, of)
                assert same_bits(data[e], expected_data)
                assert same_bits(scales[e], expected_scales)


# --- the wire


def traffic(
    recipe: str, experts: int, dim: int
) -> tuple[list[tuple[str, int]], list[str], list[str]]:
    """All-gathers of the second forward and its backward, other collectives there, and what
    precompute issues."""
    world = dist.get_world_size()
    model = shard(new_model(recipe, experts=experts), world, dim=dim)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(2):
        with collectives() as forward:
            loss = loss_of(model, local_batch(step))
        with collectives() as backward:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with collectives() as precompute:
            fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
    gathers = [(str(c.dtype), c.nbytes) for c in forward + backward if c.name == "all_gather"]
    others = [str(c) for c in forward if c.name != "all_gather"]
    return gathers, others, [str(c) for c in precompute]


@pytest.mark.parametrize(
    ("experts", "world", "dim"), [(4, 2, 0), (3, 2, 0), (2, 4, 1), (4, 1, 0)], ids=str
)
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_bytes_and_collectives(recipe: str, experts: int, world: int, dim: int) -> None:
    mine = math.ceil(experts / world) if dim == 0 else experts / world
    elements = round(3 * mine * DIM * HIDDEN)
    packed = recipe == "mxfp8_rceil" and dim == 0 and experts % world == 0
    router = math.ceil(experts / world) * DIM
    of_block = elements + packed * elements // 32 + 4 * (router + math.ceil(DIM / world))
    root = 4 * 2 * math.ceil(VOCAB / world) * DIM
    # The two blocks' weights are gathered for forward and again for backward, the root's once.
    expected = [("torch.float32", root)] + [("torch.uint8", of_block)] * 4
    for gathers, others, precompute in run_on_ranks(world, traffic, recipe, experts, dim):
        if world > 1:
            assert gathers == expected
        assert others == []
        if recipe == "rowwise":
            # Of each of 2 blocks' 3 weights a float per row of each expert.
            numel = 2 * experts * (2 * HIDDEN + DIM)
        else:
            # A byte per 32 elements, in words of four: rows of 64 are padded to 4, as those of 96.
            numel = 0 if packed else 2 * experts * (2 * HIDDEN + DIM)
        all_reduce = f"all_reduce MAX int32[{numel}] over {world} ranks"
        assert precompute == ([all_reduce] if numel and world > 1 else [])


# --- parity


def step_by_step(
    recipe: str, mesh: tuple[int, ...], dim: int, kind: Any
) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """This rank's loss, and the whole gradients, of three batches at the same weights."""
    model = shard(new_model(Float8Config(recipe, emulate=True), kind), *mesh, dim=dim)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
    found = []
    for step in range(3):
        loss = loss_of(model, local_batch(step))
        loss.backward()
        found.append((loss.item(), {n: full(p.grad) for n, p in model.named_parameters()}))
        model.zero_grad()
    return found


@functools.cache
def in_one_process(
    recipe: str, world: int, kind: Any
) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    """Losses by rank and averaged gradients, of experts that are cast where they are used."""
    model = new_model(Float8Config(recipe, emulate=True), kind)
    found = []
    for step in range(3):
        losses = []
        for batch in batches(step, world):
            loss = loss_of(model, batch)
            loss.backward()
            losses.append(loss.item())
        found.append((losses, {n: full(p.grad) / world for n, p in model.named_parameters()}))
        model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("kind", "mesh", "dim"),
    [
        (StackedExperts, (1,), 0),
        (StackedExperts, (2,), 0),
        (StackedExperts, (3,), 0),
        (StackedExperts, (2,), 1),
        (StackedExperts, (2, 2), 0),
        # One of the layouts of ranks on each dimension: test_any_placement has weights on all.
        (FusedExperts, (3,), 0),
        (FusedExperts, (2,), 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_as_in_one_process(recipe: str, mesh: tuple[int, ...], dim: int, kind: Any) -> None:
    world = math.prod(mesh)
    expected = in_one_process(recipe, world, kind)
    # Operands are the same. Gradients are averaged in another order (2^-24). On a GPU products are
    # summed in an order that depends on their number, and float8 rounds what differs.
    tolerance = 1e-6 if DEVICE == "cpu" else 0.02
    results = run_on_ranks(world, step_by_step, recipe, mesh, dim, kind)
    for rank, found in enumerate(results):
        for (loss, gradients), (losses, of_one) in zip(found, expected, strict=True):
            assert loss == pytest.approx(losses[rank], abs=0.0 if DEVICE == "cpu" else 1e-3)
            for name, gradient in of_one.items():
                distance = (gradients[name] - gradient).norm() / gradient.norm()
                assert distance < tolerance, name


# --- state dicts, compile, other modules


def saved_and_loaded() -> None:
    world = dist.get_world_size()
    model, plain = shard(new_model(), world), shard(new_model(None), world)
    saved, expected = model.state_dict(), plain.state_dict()
    assert list(saved) == list(expected)
    for name, value in saved.items():
        assert type(value._local_tensor) is torch.Tensor
        assert same_bits(full(value), full(expected[name]))
    plain.load_state_dict(saved)
    whole = {name: full(value) * 2 for name, value in saved.items()}
    with torch.device("meta"):
        empty = Model(StackedExperts, 4, False)
    fp8dist.convert_moe_to_float8_training(empty, config="mxfp8")
    empty = shard(empty, world)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(empty, dict(whole) if dist.get_rank() == 0 else {}, options=options)
    for name, param in empty.named_parameters():
        assert same_bits(full(param), whole[name].cpu())
    weight = empty.layers[0].experts.w1
    assert isinstance(weight._local_tensor, Float8ShardedExperts)
    with collectives() as forward:
        loss_of(empty, local_batch(0)).backward()
    assert torch.uint8 in [c.dtype for c in forward if c.name == "all_gather"]


def test_state_dicts() -> None:
    run_on_ranks(2, saved_and_loaded)


def compiled(recipe: str) -> list[float]:
    torch._dynamo.reset()
    losses = []
    for compile in (False, True):
        model = new_model(recipe)
        if compile:
            for layer in model.layers:
                layer.compile(fullgraph=True, backend="aot_eager")
        model = shard(model, dist.get_world_size())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fp8dist.register_precompute_hook(optimizer, model)
        for step in range(4):
            with torch._dynamo.config.patch(error_on_recompile=step > 1):
                loss = loss_of(model, local_batch(step))
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_compiled_blocks(recipe: str) -> None:
    for losses in run_on_ranks(2, compiled, recipe):
        eager, of_graph = losses[:4], losses[4:]
        # Compiled casts to bfloat16 and back may be left out: 2^-9 of activations near 1.
        assert of_graph == pytest.approx(eager, abs=5e-3)


def refused() -> str:
    root = nn.Module()
    root.experts = nn.Module()
    root.experts.w = nn.Parameter(torch.randn(2, 32, 32))
    fp8dist.convert_moe_to_float8_training(root, config="mxfp8")
    fully_shard(root.experts, mesh=mesh_of(2), shard_placement_fn=placed_on(2))
    with pytest.raises(ValueError) as error:
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(root)
    return str(error.value)


def test_columns_that_are_scaled_together_are_not_cut() -> None:
    for message in run_on_ranks(2, refused):
        assert message.startswith("experts.w of 2 x 32 x 32 is sharded on dim 2 into 16 columns")
