"""The call after `optimizer.step()`, on a mesh of one rank."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import fp8dist
from fp8dist import (
    precompute_float8_dynamic_scale_for_fsdp,
    register_precompute_hook,
)
from fp8dist.tensors import sharded_weight, weight_state
from tests.unit.sharded_model import INPUT, K, check_current, converted, sharded, step


def states(model: nn.Module) -> list[weight_state.WeightState]:
    return [model[0].weight_state, model[2].weight_state]


@pytest.fixture(autouse=True)
def warn_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(weight_state, "_warned_stale", False)
    yield


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The weights of every pass that computes scales: one all-reduce each."""
    calls: list[list[str]] = []
    update_scales = weight_state.update_scales

    def noting(some: list[weight_state.WeightState], *args: Any, **kwargs: Any) -> None:
        calls.append([state.fqn for state in some])
        update_scales(some, *args, **kwargs)

    for module in (fp8dist.fsdp, weight_state):
        monkeypatch.setattr(module, "update_scales", noting)
    return calls


def test_precompute_covers_all_weights_in_one_pass(
    mesh: DeviceMesh, passes: list[list[str]]
) -> None:
    model = sharded(mesh)
    assert precompute_float8_dynamic_scale_for_fsdp(model) is None
    assert passes == [["0", "2"]]  # model[3] has 8 outputs, not a multiple of 16
    check_current(model)


def test_a_gather_after_precompute_computes_no_scales(
    mesh: DeviceMesh, passes: list[list[str]]
) -> None:
    model = sharded(mesh)
    precompute_float8_dynamic_scale_for_fsdp(model)
    model(INPUT).sum().backward()
    assert len(passes) == 1


def test_without_precompute_every_weight_has_a_pass_of_its_own(
    mesh: DeviceMesh, passes: list[list[str]]
) -> None:
    model = sharded(mesh)
    model(INPUT).sum().backward()
    assert passes == [["0"], ["2"]]


def test_precompute_follows_the_weights(mesh: DeviceMesh) -> None:
    model = sharded(mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        step(model, optimizer)
        precompute_float8_dynamic_scale_for_fsdp(model)
        check_current(model)


@pytest.mark.parametrize("as_what", [list, tuple, iter], ids=["list", "tuple", "iterator"])
def test_precompute_on_the_parts_of_a_model(
    mesh: DeviceMesh, passes: list[list[str]], as_what: Any
) -> None:
    """Pipeline stages: still one pass over all."""
    parts = [sharded(mesh), sharded(mesh, seed=1)]
    precompute_float8_dynamic_scale_for_fsdp(as_what(parts))
    assert passes == [["0", "2", "0", "2"]]
    for part in parts:
        check_current(part)


def test_a_module_given_twice_is_computed_once(mesh: DeviceMesh, passes: list[list[str]]) -> None:
    model = sharded(mesh)
    precompute_float8_dynamic_scale_for_fsdp([model, model, model[0]])
    assert passes == [["0", "2"]]


def test_weights_of_one_rank_share_a_pass_whatever_their_meshes(
    mesh: DeviceMesh, passes: list[list[str]]
) -> None:
    """Which have nothing to exchange; those of several ranks have a pass for each mesh."""
    other = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
    model = converted()
    fully_shard(model[0], mesh=other)
    fully_shard(model, mesh=mesh)
    precompute_float8_dynamic_scale_for_fsdp(model)
    assert passes == [["0", "2"]]
    check_current(model)


@pytest.mark.parametrize(
    "module",
    [nn.ReLU(), nn.Linear(K, K), converted()],
    ids=["no linear", "not converted", "not sharded"],
)
def test_modules_without_sharded_float8_weights_are_passed_over(
    module: nn.Module, passes: list[list[str]]
) -> None:
    precompute_float8_dynamic_scale_for_fsdp(module)
    precompute_float8_dynamic_scale_for_fsdp([])
    assert not passes


def test_weights_gathered_in_high_precision_are_passed_over(
    mesh: DeviceMesh, passes: list[list[str]]
) -> None:
    model = sharded(mesh, enable_fsdp_float8_all_gather=False)
    precompute_float8_dynamic_scale_for_fsdp(model)
    model(INPUT).sum().backward()
    assert not passes


def test_precompute_while_the_weights_are_unsharded(mesh: DeviceMesh) -> None:
    """With reshard_after_forward=False they still are after backward of a last microbatch."""
    model = converted()
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    model(INPUT)
    before = [layer.weight.dequantize() for layer in (model[0], model[2])]
    with torch.no_grad():
        for state in states(model):
            state.seen.param.add_(1)  # other data, not the same with another scale
    precompute_float8_dynamic_scale_for_fsdp(model)
    for layer, value in zip((model[0], model[2]), before, strict=True):
        assert torch.equal(layer.weight.dequantize(), value)
    model.reshard()
    check_current(model)


def test_precompute_records_nothing_for_autograd(mesh: DeviceMesh) -> None:
    model = sharded(mesh)
    precompute_float8_dynamic_scale_for_fsdp(model)
    for state in states(model):
        assert not state.scales[0].requires_grad
        assert state.scales[0].grad_fn is None


def test_precompute_inside_inference_mode_before_training(mesh: DeviceMesh) -> None:
    model = sharded(mesh)
    with torch.inference_mode():
        precompute_float8_dynamic_scale_for_fsdp(model)
    for _ in range(2):
        model(torch.randn(16, 32)).sum().backward()
        with torch.no_grad():
            model[0].weight.mul_(2)
        precompute_float8_dynamic_scale_for_fsdp(model)
    check_current(model)


def test_a_model_made_in_inference_mode_is_refused(mesh: DeviceMesh) -> None:
    with torch.inference_mode():
        model = sharded(mesh)
        with pytest.raises(ValueError, match="was made inside torch.inference_mode"):
            precompute_float8_dynamic_scale_for_fsdp(model)
        with pytest.raises(ValueError, match="was made inside torch.inference_mode"):
            model[0](torch.randn(16, 32))


# --- the optimizer's hook


def test_the_hook_precomputes_after_every_step(mesh: DeviceMesh, passes: list[list[str]]) -> None:
    model = sharded(mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    register_precompute_hook(optimizer, model)
    model(INPUT)
    passes.clear()  # the first gather came before the first step
    for i in range(1, 4):
        step(model, optimizer)
        assert passes == [["0", "2"]] * i
        check_current(model)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_compiled_step_calls_the_hook(recipe: str, mesh: DeviceMesh) -> None:
    losses = []
    for compiled in (False, True):
        model = sharded(mesh, recipe_name=recipe)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        register_precompute_hook(optimizer, model)
        take_step = optimizer.step
        if compiled:
            take_step = torch.compile(take_step, backend="aot_eager")
        for _ in range(3):
            loss = model(INPUT).square().mean()
            loss.backward()
            take_step()
            assert model[0].weight_state.seen.still_holds(model[0].weight)
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == losses[1]


def test_a_removed_hook_does_no_more(
    mesh: DeviceMesh, passes: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    model = sharded(mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    handle = register_precompute_hook(optimizer, model)
    step(model, optimizer)
    handle.remove()
    passes.clear()
    step(model, optimizer)
    assert not passes
    model(INPUT)
    assert passes == [["0"], ["2"]]
    assert "edited after its float8 scales were computed" in caplog.text


def test_the_hook_takes_parts_also_as_an_iterator(
    mesh: DeviceMesh, passes: list[list[str]]
) -> None:
    parts = [sharded(mesh), sharded(mesh, seed=1)]
    optimizer = torch.optim.SGD([p for part in parts for p in part.parameters()], 0.1)
    register_precompute_hook(optimizer, iter(parts))
    for _ in range(2):
        for part in parts:
            part(INPUT).sum().backward()
        passes.clear()
        optimizer.step()
        assert passes == [["0", "2", "0", "2"]]


# --- checkpoints


def loaded_output(seed: int) -> torch.Tensor:
    return converted(seed)(INPUT)


@pytest.mark.parametrize("get", [nn.Module.state_dict, get_model_state_dict], ids=["module", "api"])
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_a_checkpoint_loaded_in_place_is_what_the_next_forward_uses(
    mesh: DeviceMesh, tmp_path: Path, get: Any, trained: bool
) -> None:
    """`dcp.load` writes into the tensors of the state dict and calls nothing of the model's."""
    dcp_save(get(sharded(mesh)), tmp_path)
    model = sharded(mesh, seed=1)
    if trained:
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        register_precompute_hook(optimizer, model)
        step(model, optimizer)
    else:
        precompute_float8_dynamic_scale_for_fsdp(model)
    dcp_load(get(model), tmp_path)
    assert torch.equal(model(INPUT), loaded_output(0))


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_dict_is_what_the_next_forward_uses(mesh: DeviceMesh, assign: bool) -> None:
    source, model = sharded(mesh), sharded(mesh, seed=1)
    precompute_float8_dynamic_scale_for_fsdp(model)
    model(INPUT)
    model.load_state_dict(source.state_dict(), assign=assign)
    assert sharded_weight.is_sharded(model[0].weight)
    assert torch.equal(model(INPUT), loaded_output(0))


@pytest.mark.parametrize("full", [False, True], ids=["sharded", "full"])
def test_set_model_state_dict(mesh: DeviceMesh, full: bool) -> None:
    options = StateDictOptions(full_state_dict=full)
    state = get_model_state_dict(sharded(mesh), options=options)
    assert all(type(tensor) is torch.Tensor for tensor in state.values()) is full
    model = sharded(mesh, seed=1)
    precompute_float8_dynamic_scale_for_fsdp(model)
    set_model_state_dict(model, state, options=options)
    assert torch.equal(model(INPUT), loaded_output(0))


def test_a_full_state_dict_loads_into_an_unconverted_model(mesh: DeviceMesh) -> None:
    model = sharded(mesh)
    model(INPUT)  # also while weights are unsharded
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(K, 48), nn.ReLU(), nn.Linear(48, K), nn.Linear(K, 8))
    plain.load_state_dict(state)
    for name, tensor in converted().state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor)


def test_a_sharded_state_dict_holds_plain_local_tensors(mesh: DeviceMesh) -> None:
    model = sharded(mesh)
    for name, tensor in model.state_dict().items():
        assert type(tensor._local_tensor) is torch.Tensor, name
        param = model.get_parameter(name)._local_tensor
        inner = getattr(param, "_tensor", param)
        assert tensor._local_tensor.data_ptr() == inner.data_ptr(), name


def dcp_save(state: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a single process
        dcp.save({"model": state}, checkpoint_id=folder, no_dist=True)


def dcp_load(state: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load({"model": state}, checkpoint_id=folder, no_dist=True)


def test_assigning_where_parameters_are_swapped(mesh: DeviceMesh) -> None:
    """FSDP2 expects then that a load leaves the parameters the same objects."""
    model, other = sharded(mesh), sharded(mesh, seed=1)
    precompute_float8_dynamic_scale_for_fsdp(model)
    parameters = list(model.parameters())
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(other.state_dict(), assign=True)
        assert torch.equal(model(INPUT), other(INPUT))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    model.reshard()
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
