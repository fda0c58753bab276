"""A state dict is the unconverted model's, and no way of loading one ends the float8 gather."""

import io
from collections.abc import Callable
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
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

import fp8dist
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.toy import (
    RECIPE_NAMES,
    Llama,
    convert,
    float8_model,
    full,
    keep_output,
    local_batch,
    loss_of,
    mesh_of,
    new_model,
    same_bits,
    shard,
)
from tests.distributed.wire import collectives

FULL = StateDictOptions(full_state_dict=True)
FULL_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)
SHARDED_ON_CPU = StateDictOptions(cpu_offload=True)
FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def mesh() -> Any:
    return mesh_of(dist.get_world_size())


def unconverted() -> Llama:
    return shard(new_model(layers=1), mesh())


def scaled(model: Llama, factor: float) -> Llama:
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(factor)
    return model


def signature(state_dict: dict[str, Any]) -> dict[str, Any]:
    return {
        name: (value.shape, value.dtype, value.placements, type(value.to_local()))
        for name, value in state_dict.items()
    }


def plain_and_aliasing(recipe: str) -> None:
    model = float8_model(mesh(), recipe, layers=1)
    expected = signature(unconverted().state_dict())
    assert {kind for *_, kind in expected.values()} == {torch.Tensor}
    for used in (False, True):
        if used:  # FSDP2 has put the padded shards in
            loss_of(model, local_batch(0)).backward()
        for state_dict in (model.state_dict(), get_model_state_dict(model)):
            assert signature(state_dict) == expected
        for name, param in model.named_parameters():
            held = model.state_dict()[name].to_local().untyped_storage().data_ptr()
            local = param.to_local()
            local = getattr(local, "_tensor", local)
            assert held == local.untyped_storage().data_ptr(), name
    # A file that any reader may open, without this library.
    file = io.BytesIO()
    torch.save(get_model_state_dict(model, options=FULL_ON_CPU), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    # Only the first rank is given the full state dict.
    weights = new_model(layers=1).cpu().state_dict() if dist.get_rank() == 0 else {}
    assert same_bits(dict(loaded), dict(weights))
    assert all(type(value) is torch.Tensor for value in loaded.values())


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_it_is_that_of_the_unconverted_model(recipe: str, world: int) -> None:
    run_on_ranks(world, plain_and_aliasing, recipe)


Load = Callable[[Llama, Llama, str], Llama | None]


def load_state_dict(target: Llama, source: Llama, folder: str) -> None:
    target.load_state_dict(source.state_dict())


def load_state_dict_assign(target: Llama, source: Llama, folder: str) -> None:
    target.load_state_dict(source.state_dict(), assign=True)


def set_full(target: Llama, source: Llama, folder: str) -> None:
    set_model_state_dict(target, everywhere(source), options=FULL)


def set_sharded(target: Llama, source: Llama, folder: str) -> None:
    set_model_state_dict(target, get_model_state_dict(source))


def set_from_cpu(target: Llama, source: Llama, folder: str) -> None:
    state_dict = get_model_state_dict(source, options=SHARDED_ON_CPU)
    set_model_state_dict(target, state_dict, options=SHARDED_ON_CPU)


def set_from_rank_0(target: Llama, source: Llama, folder: str) -> None:
    state_dict = get_model_state_dict(source, options=FULL_ON_CPU)
    set_model_state_dict(target, state_dict, options=FROM_RANK_0)


def dcp_in_place(target: Llama, source: Llama, folder: str) -> None:
    dcp.save(source.state_dict(), checkpoint_id=folder)
    dcp.load(target.state_dict(), checkpoint_id=folder)


def dcp_and_set(target: Llama, source: Llama, folder: str) -> None:
    dcp.save({"model": get_model_state_dict(source)}, checkpoint_id=folder)
    state_dict = {"model": get_model_state_dict(target)}
    dcp.load(state_dict, checkpoint_id=folder)
    set_model_state_dict(target, state_dict["model"])


def meta_from_rank_0(target: Llama, source: Llama, folder: str) -> Llama:
    target = on_meta()
    set_from_rank_0(target, source, folder)
    return target


def meta_assign(target: Llama, source: Llama, folder: str) -> Llama:
    target = on_meta()
    load_state_dict_assign(target, source, folder)
    return target


def meta_to_empty_then_dcp(target: Llama, source: Llama, folder: str) -> Llama:
    target = on_meta().to_empty(device=DEVICE)
    dcp_in_place(target, source, folder)
    return target


def on_meta() -> Llama:
    with torch.device("meta"):
        model = Llama(layers=1)
    return shard(convert(model), mesh())


def everywhere(model: Llama) -> dict[str, torch.Tensor]:
    """The full state dict, on every rank."""
    return {name: full(value).to(DEVICE) for name, value in model.state_dict().items()}


WAYS: list[Load] = [
    load_state_dict,
    load_state_dict_assign,
    set_full,
    set_sharded,
    set_from_cpu,
    set_from_rank_0,
    dcp_in_place,
    dcp_and_set,
    meta_from_rank_0,
    meta_assign,
    meta_to_empty_then_dcp,
]


def gathers_and_loss(model: Llama, number: int = 1) -> tuple[list[str], float]:
    with collectives() as issued:
        loss = loss_of(model, local_batch(number))
    loss.backward()
    model.zero_grad()
    return [str(c) for c in issued if c.name == "all_gather"], loss.item()


def loaded(way: Load, folder: str) -> None:
    """Into a model that has trained, from one without float8 layers."""
    expected = gathers_and_loss(scaled(float8_model(mesh(), layers=1), 1.5))
    assert expected[0] != gathers_and_loss(unconverted())[0]
    target = float8_model(mesh(), layers=1)
    optimizer = torch.optim.AdamW(target.parameters())
    fp8dist.register_precompute_hook(optimizer, target)
    loss_of(target, local_batch(0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    target = way(target, scaled(unconverted(), 1.5), folder) or target
    assert gathers_and_loss(target) == expected
    # And it goes on as a float8 model does: the optimizer's edits are seen.
    optimizer = torch.optim.AdamW(target.parameters(), lr=1e-2)
    fp8dist.register_precompute_hook(optimizer, target)
    loss_of(target, local_batch(2)).backward()
    optimizer.step()
    optimizer.zero_grad()
    gathers, loss = gathers_and_loss(target)
    fresh = float8_model(mesh(), layers=1)
    fresh.load_state_dict(target.state_dict())
    assert (gathers, loss) == gathers_and_loss(fresh)
    assert gathers == expected[0] and loss != expected[1]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_loading_keeps_the_float8_gather(way: Load, tmp_path: Any) -> None:
    run_on_ranks(3, loaded, way, str(tmp_path))


def train_and_save(recipe: str, folder: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """A step, a checkpoint, and the losses of the two steps after it."""
    model = float8_model(mesh(), recipe, layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fp8dist.register_precompute_hook(optimizer, model)
    take_step(model, optimizer, 0)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.save(state, checkpoint_id=folder)
    return everywhere(model), [take_step(model, optimizer, number) for number in (1, 2)]


def take_step(model: Llama, optimizer: torch.optim.Optimizer, number: int) -> float:
    loss = loss_of(model, local_batch(number))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def resume(recipe: str | None, folder: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """What has been loaded, and the losses of two steps."""
    model = unconverted() if recipe is None else float8_model(mesh(), recipe, layers=1)
    scaled(model, 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if recipe is not None:
        fp8dist.register_precompute_hook(optimizer, model)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return everywhere(model), [take_step(model, optimizer, number) for number in (1, 2)]


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_checkpoint_resumes_bitwise(recipe: str, tmp_path: Any) -> None:
    saved = run_on_ranks(3, train_and_save, recipe, str(tmp_path))
    assert same_bits(run_on_ranks(3, resume, recipe, str(tmp_path)), saved)


def test_checkpoint_of_another_world_and_recipe(tmp_path: Any) -> None:
    (weights, _), *_ = run_on_ranks(3, train_and_save, "tensorwise", str(tmp_path))
    for recipe in (None, "tensorwise", "rowwise"):
        for found, _ in run_on_ranks(2, resume, recipe, str(tmp_path)):
            assert same_bits(found, weights), recipe


def conversion_keeps() -> None:
    model = new_model()
    model.layers[0].wq.weight.requires_grad_(False)
    model.layers[1].w2.weight.requires_grad_(False)
    model.layers[1].wo.bias.requires_grad_(False)
    model.to(torch.bfloat16)
    expected = {n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()}
    fp8dist.convert_to_float8_training(model, module_filter_fn=keep_output)
    shard(model, mesh())
    loss_of(model, local_batch(0)).backward()
    for name, param in model.named_parameters():
        assert isinstance(param, DTensor)
        assert (param.shape, param.dtype, param.requires_grad) == expected[name], name
        assert (param.grad is not None) == param.requires_grad, name


def test_conversion_keeps_dtypes_and_frozen_parameters() -> None:
    run_on_ranks(3, conversion_keeps)
