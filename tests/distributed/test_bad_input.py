"""What cannot work is refused on every rank alike; what is merely bad shows and hangs nothing."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.fsdp import fully_shard

import fp8dist
from fp8dist.config import RECIPES
from tests.distributed.harness import run_on_ranks
from tests.distributed.toy import (
    RECIPE_NAMES,
    convert,
    float8_model,
    local_batch,
    loss_of,
    mesh_of,
    new_model,
    shard,
    warnings_of_the_library,
)


def value_error_of(call: object) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("it was not refused")


def reshard_to_two_of_four() -> list[str]:
    def model() -> nn.Module:
        return float8_model(mesh_of(4), reshard_after_forward=2)

    def forward() -> None:
        loss_of(model(), local_batch(0))

    def precompute() -> None:
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(model())

    def register() -> None:
        sharded = model()
        optimizer = torch.optim.AdamW(sharded.parameters())
        fp8dist.register_precompute_hook(optimizer, sharded)

    return [value_error_of(call) for call in (forward, precompute, register)]


def test_int_reshard_after_forward() -> None:
    for messages in run_on_ranks(4, reshard_to_two_of_four):
        for message in messages:
            assert message.startswith("layers.0: ")  # the first with weights in float8
            assert "reshard_after_forward=<int>" in message
            assert "reshard_after_forward=True" in message


def refused_twice() -> list[str]:
    """A caller that catches the refusal and goes on meets it again, and nothing worse."""
    model = float8_model(mesh_of(4), reshard_after_forward=2)

    def precompute() -> None:
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)

    return [value_error_of(precompute) for _ in range(2)]


def refused_twice_behind_a_good_block() -> list[str]:
    model = convert(new_model())
    fully_shard(model.layers[0], mesh=mesh_of(4))
    fully_shard(model.layers[1], mesh=mesh_of(4), reshard_after_forward=2)
    fully_shard(model, mesh=mesh_of(4))

    def precompute() -> None:
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)

    return [value_error_of(precompute) for _ in range(2)]


@pytest.mark.parametrize("body", [refused_twice, refused_twice_behind_a_good_block])
def test_int_reshard_after_forward_is_refused_again(body: Callable[[], list[str]]) -> None:
    for first, second in run_on_ranks(4, body):
        assert first == second


def convert_sharded() -> str:
    model = shard(new_model(), mesh_of(2))
    return value_error_of(lambda: convert(model))


def test_conversion_after_fully_shard() -> None:
    for message in run_on_ranks(2, convert_sharded):
        assert message.startswith("layers.0.wq: ")
        assert "before parallelize_module and fully_shard" in message


def converted_and_left_alone() -> tuple[list[str], list[str]]:
    """A model of which FSDP2 has sharded a part that the filter leaves alone."""
    model = new_model()
    fully_shard(model.output, mesh=mesh_of(2))
    convert(model)
    return (
        [
            name
            for name, module in model.named_modules()
            if isinstance(module, fp8dist.Float8Linear)
        ],
        [type(model.output.weight).__name__],
    )


def test_a_sharded_layer_that_the_filter_leaves_alone() -> None:
    for names, kinds in run_on_ranks(2, converted_and_left_alone):
        assert len(names) == 14
        assert kinds == ["DTensor"]


def train_with(bad: float, recipe: str, precompute: bool) -> tuple[float, float, float, list[str]]:
    """Losses before and after an edit that puts one bad element into the last rank's shard."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model = float8_model(mesh_of(world), recipe)
    with warnings_of_the_library() as messages:
        good = loss_of(model, local_batch(0)).item()
        with torch.no_grad():
            local = model.layers[1].w1.weight.to_local()
            edit = torch.zeros(local.shape, device=local.device)
            edit[-1, -1] = bad if rank == world - 1 else 0.0
        losses = []
        for number in range(2):
            with torch.no_grad():
                local.add_(edit)  # all ranks edit, as they must; on a GPU the next edit tells
            if precompute:
                fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
            loss = loss_of(model, local_batch(number))
            loss.backward()
            losses.append(loss.item())
    bad_messages = [message for message in messages if "NaN" in message]
    return good, losses[0], losses[1], bad_messages


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("world, precompute", [(2, True), (3, False)])
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_a_bad_element_on_one_rank(recipe: str, world: int, precompute: bool, bad: float) -> None:
    # Where the scales travel in the payload nothing else is exchanged, and only the rank that holds
    # the element knows.
    packed = RECIPES[recipe].scale_format == "e8m0" and world == 2
    results = run_on_ranks(world, train_with, bad, recipe, precompute)
    for rank, (good, first, second, messages) in enumerate(results):
        assert math.isfinite(good)
        assert math.isnan(first) and math.isnan(second)
        if packed and rank < world - 1:
            assert not messages
        else:
            (message,) = messages
            assert message.startswith("layers.1.w1 ")
