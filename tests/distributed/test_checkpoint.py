"""Weights saved under one recipe, mesh and world load under another, bitwise, and the reverse."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)

import fp8dist
from tests.distributed.composition import sharded, world_of
from tests.distributed.composition_axes import AXES
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.pairwise import Case
from tests.distributed.toy import (
    Llama,
    float8_model,
    full,
    local_batch,
    loss_of,
    mesh_of,
    same_bits,
)


@dataclass(frozen=True)
class Side:
    recipe: str  # or "none": not converted
    mesh: str
    offload: str = "none"
    dtype: str = "float32"  # of the shards

    def case(self) -> Case:
        first = {axis: values[0] for axis, values in AXES.items()}
        return first | vars(self)


BF16 = "bfloat16"
# Each recipe, "none" and each mesh are on both sides.
ROUTES = [
    (Side("tensorwise", "fsdp 3"), Side("none", "fsdp 2")),
    (Side("none", "fsdp 2"), Side("rowwise", "fsdp x tp 2x2")),
    (Side("rowwise", "fsdp x tp 2x2"), Side("mxfp8_rceil", "fsdp 3")),
    (Side("mxfp8_rceil", "fsdp 3"), Side("tensorwise", "hsdp 2x2")),
    (Side("rowwise_with_gw_hp", "hsdp 2x2"), Side("blockwise", "fsdp 4", "pageable")),
    (Side("blockwise", "fsdp 4", "pageable"), Side("mxfp8_rceil_wgrad_with_hp", "fsdp 1")),
    (Side("mxfp8_rceil_wgrad_with_hp", "fsdp 1"), Side("rowwise_with_gw_hp", "fsdp 3")),
    (Side("rowwise", "fsdp x tp 2x2", dtype=BF16), Side("none", "fsdp 3", dtype=BF16)),
    (Side("none", "hsdp 2x2", dtype=BF16), Side("mxfp8_rceil", "fsdp 3", "pageable", BF16)),
]
# How what is saved is taken and set; and whether a file of rank 0 holds all.
SHARDED = StateDictOptions()
SHARDED_ON_CPU = StateDictOptions(cpu_offload=True)
FULL = StateDictOptions(full_state_dict=True)
FULL_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
WAYS: dict[str, tuple[StateDictOptions, StateDictOptions, bool]] = {
    "dcp": (SHARDED, SHARDED, False),
    "dcp, on the CPU": (SHARDED_ON_CPU, SHARDED_ON_CPU, False),
    "a file": (FULL, FULL, True),
    "a file, on the CPU": (FULL_ON_CPU, FROM_RANK_0, True),
}


def values_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: full(param).clone() for name, param in model.named_parameters()}


def save(side: Side, way: str, path: str) -> dict[str, torch.Tensor]:
    """Of weights that no other process starts with; the values."""
    model = sharded(side.case())
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.mul_(1 + 0.1 * i)
    options, _, in_one_file = WAYS[way]
    state_dict = get_model_state_dict(model, options=options)
    if not in_one_file:
        dcp.save(state_dict, checkpoint_id=path)
    elif dist.get_rank() == 0:
        torch.save(state_dict, f"{path}/file.pt")
    return values_of(model)


def load(side: Side, way: str, path: str) -> dict[str, torch.Tensor]:
    model = sharded(side.case())
    _, options, in_one_file = WAYS[way]
    if in_one_file:
        device = "cpu" if side.offload != "none" else DEVICE
        state_dict = torch.load(f"{path}/file.pt", weights_only=True, map_location=device)
        if options is FROM_RANK_0 and dist.get_rank() > 0:
            state_dict = {}
    else:
        state_dict = get_model_state_dict(model, options=options)
        dcp.load(state_dict, checkpoint_id=path)
    set_model_state_dict(model, state_dict, options=options)
    return values_of(model)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("source, target", ROUTES, ids=lambda side: f"{side.recipe} {side.mesh}")
def test_values_are_bitwise_those_saved(
    source: Side, target: Side, way: str, tmp_path: Any
) -> None:
    saved = run_on_ranks(world_of(source.case()), save, source, way, str(tmp_path))
    loaded = run_on_ranks(world_of(target.case()), load, target, way, str(tmp_path))
    assert {value.dtype for value in saved[0].values()} == {getattr(torch, source.dtype)}
    assert all(same_bits(values, saved[0]) for values in [*saved, *loaded])


def async_save_then_train(folder: str) -> tuple[dict[str, Any], bool]:
    """Weights and moments when the save began, and whether the steps since have changed them."""
    model = float8_model(mesh_of(dist.get_world_size()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-1)
    fp8dist.register_precompute_hook(optimizer, model)
    step(model, optimizer, 0)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    before = {"model": values_of(model), "moments": moments(optimizer)}
    # Of its own, so that its messages do not meet those of training.
    group = dist.new_group(backend="gloo")
    future = dcp.async_save(state, checkpoint_id=folder, process_group=group)
    for number in (1, 2, 3):
        step(model, optimizer, number)
    future.result()
    return before, not same_bits(values_of(model), before["model"])


def step(model: Llama, optimizer: torch.optim.Optimizer, number: int) -> None:
    loss_of(model, local_batch(number)).backward()
    optimizer.step()
    optimizer.zero_grad()


def moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [full(state["exp_avg"]).clone() for state in optimizer.state.values()]


def load_async_saved(folder: str) -> dict[str, Any]:
    model = float8_model(mesh_of(dist.get_world_size()), "rowwise")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-1)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(state, checkpoint_id=folder)
    values = {name: full(value) for name, value in state["model"].items()}
    by_name = {name: full(entry["exp_avg"]) for name, entry in state["optimizer"]["state"].items()}
    return {"model": values, "moments": [by_name[name] for name, _ in model.named_parameters()]}


def test_an_asynchronous_save_is_of_one_moment(tmp_path: Any) -> None:
    saved = run_on_ranks(3, async_save_then_train, str(tmp_path))
    assert all(changed for _, changed in saved)
    for found in run_on_ranks(2, load_async_saved, str(tmp_path)):
        assert same_bits(found, saved[0][0])
