"""Experts under FSDP2: casts that are used again, and edits that are noticed."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.fsdp import CPUOffloadPolicy

import fp8dist
from fp8dist import Float8Config
from tests.distributed.experts_model import local_batch, loss_of, new_model, shard
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.toy import full, same_bits, warnings_of_the_library
from tests.distributed.wire import collectives

RECIPE_NAMES = ["rowwise", "mxfp8_rceil"]


def trained(recipe: str, options: dict[str, Any], config: dict[str, Any], recompute: bool) -> Any:
    model = new_model(Float8Config(recipe, **config), recompute=recompute)
    model = shard(model, dist.get_world_size(), **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    fp8dist.register_precompute_hook(optimizer, model)
    losses = []
    for step in range(3):
        loss = loss_of(model, local_batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: full(param) for name, param in model.named_parameters()}


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
@pytest.mark.parametrize("world", [2, 3])
def test_reuse_changes_nothing(recipe: str, world: int) -> None:
    variants = [
        ({}, {}, False),
        ({"reshard_after_forward": False}, {}, False),
        ({}, {"cache_payload": False}, False),
        ({}, {}, True),
        ({"offload_policy": CPUOffloadPolicy(pin_memory=False)}, {}, False),
    ]
    first, *others = (run_on_ranks(world, trained, recipe, *variant) for variant in variants)
    for (options, config, recompute), other in zip(variants[1:], others, strict=True):
        told = (options, config, recompute)
        if "offload_policy" in options and DEVICE != "cpu":
            # AdamW on the CPU rounds otherwise: before its first step all is the same.
            assert [losses[0] for losses, _ in other] == [losses[0] for losses, _ in first], told
        else:
            assert same_bits(other, first), told


@torch.no_grad()
def scale_all(model: nn.Module, folder: str) -> None:
    for param in model.parameters():
        param.mul_(1.5)


@torch.no_grad()
def scale_one_expert(model: nn.Module, folder: str) -> None:
    for layer in model.layers:
        for param in layer.experts.parameters():
            param.to_local()[:1].mul_(1.5)


def step_foreach(model: nn.Module, folder: str) -> None:
    torch.optim.SGD(model.parameters(), lr=1.0, foreach=True).step()


def other_weights(experts: int = 4) -> dict[str, Any]:
    model = shard(new_model(experts=experts), dist.get_world_size())
    scale_all(model, "")
    return model.state_dict()


def load(model: nn.Module, folder: str) -> None:
    model.load_state_dict(other_weights())


def load_assigning(model: nn.Module, folder: str) -> None:
    model.load_state_dict(other_weights(), assign=True)


def dcp_load_in_place(model: nn.Module, folder: str) -> None:
    dcp.save(other_weights(experts=6), checkpoint_id=folder)
    dcp.load(model.state_dict(), checkpoint_id=folder)


EDITS = {
    edit.__name__: edit
    for edit in (
        scale_all,
        scale_one_expert,
        step_foreach,
        load,
        load_assigning,
        dcp_load_in_place,
    )
}


def edited(name: str, folder: str) -> tuple[list[list[str]], list[int]]:
    results, warned, reductions = [], [], []
    # Of 4 experts the last of 3 ranks has none; it would not notice a load that writes to nothing.
    experts = 6 if name == "dcp_load_in_place" else 4
    for precompute in (True, False):
        model = shard(new_model(experts=experts), dist.get_world_size())
        loss_of(model, local_batch(0)).backward()
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
        before = full(model.layers[1].experts.w2)
        with warnings_of_the_library() as messages:
            EDITS[name](model, f"{folder}/{precompute}")
            model.zero_grad()
            assert not same_bits(full(model.layers[1].experts.w2), before)
            if precompute:
                fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
            with collectives() as forward:
                loss = loss_of(model, local_batch(1))
            loss.backward()
        results.append((loss.item(), {n: full(p.grad) for n, p in model.named_parameters()}))
        warned.append(messages)
        reductions.append(len([c for c in forward if c.reduction == "MAX"]))
    assert same_bits(results[0], results[1])
    return warned, reductions


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", EDITS)
def test_edits_are_noticed(name: str, world: int, tmp_path: Any) -> None:
    for warned, reductions in run_on_ranks(world, edited, name, str(tmp_path)):
        assert warned[0] == []
        (message,) = warned[1]
        assert message.startswith("layers.0.experts.w1 was edited")
        assert reductions == [0, 6]  # 2 blocks of 3 weights


def precompute_first(recipe: str, experts: int) -> list[str]:
    """Before anything has run, when short ranks have not yet padded their shards."""
    losses = []
    for precompute in (True, False):
        model = shard(new_model(recipe, experts=experts), dist.get_world_size())
        if precompute:
            fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
        with collectives() as forward:
            loss = loss_of(model, local_batch(0))
        loss.backward()
        losses.append(loss.item())
        if precompute:
            issued = [c.name for c in forward]
    assert losses[0] == losses[1]
    return issued


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_precompute_before_the_first_forward(recipe: str) -> None:
    # Of 3 ranks two have 2 of 4 experts, and the last has none.
    assert run_on_ranks(3, precompute_first, recipe, 4) == [["all_gather"] * 3] * 3
