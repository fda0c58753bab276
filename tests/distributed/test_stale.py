"""An edited weight is gathered with scales of its new values, whichever way it was edited."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard

import fp8dist
from tests.distributed.harness import DEVICE, needs_compiler, run_on_ranks
from tests.distributed.toy import (
    RECIPE_NAMES,
    Llama,
    float8_model,
    full,
    local_batch,
    loss_of,
    mesh_of,
    same_bits,
    warnings_of_the_library,
)
from tests.distributed.wire import collectives

Edit = Callable[[Llama, Any], None]


def optimizer_step(**options: Any) -> Edit:
    def edit(model: Llama, folder: Any) -> None:
        loss_of(model, local_batch(7)).backward()
        torch.optim.AdamW(model.parameters(), lr=1e-2, **options).step()
        model.zero_grad()

    return edit


def compiled_optimizer_step(backend: str) -> Edit:
    def edit(model: Llama, folder: Any) -> None:
        torch._dynamo.reset()
        loss_of(model, local_batch(7)).backward()
        # Compiling a step takes seconds per parameter.
        weights = [model.layers[0].wq.weight, model.layers[0].w2.weight]
        optimizer = torch.optim.SGD(weights, lr=1.0)
        torch.compile(optimizer.step, backend=backend)()
        model.zero_grad()

    return edit


def torchao_optimizer_step(model: Llama, folder: Any) -> None:
    from torchao.optim import AdamW8bit

    loss_of(model, local_batch(7)).backward()
    weights = [model.layers[0].wq.weight, model.layers[0].w2.weight]
    # It compiles its steps, for seconds per parameter.
    with torch.compiler.set_stance("force_eager"):
        AdamW8bit(weights, lr=1e-2).step()
    model.zero_grad()


def other_model() -> Llama:
    other = float8_model(mesh_of(dist.get_world_size()), layers=1)
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(1.5)
    return other


def other_weights() -> dict[str, Any]:
    return other_model().state_dict()


def load_from_rank_0(model: Llama, folder: Any) -> None:
    everything = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state_dict = get_model_state_dict(other_model(), options=everything)
    from_rank_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state_dict, options=from_rank_0)


def load(model: Llama, folder: Any) -> None:
    model.load_state_dict(other_weights())


def load_assigning(model: Llama, folder: Any) -> None:
    model.load_state_dict(other_weights(), assign=True)


def dcp_load_in_place(model: Llama, folder: Any) -> None:
    dcp.save(other_weights(), checkpoint_id=folder)
    dcp.load(model.state_dict(), checkpoint_id=folder)


def by_weight(edit: Callable[[nn.Parameter], object]) -> Edit:
    @torch.no_grad()
    def edit_all(model: Llama, folder: Any) -> None:
        for module in model.modules():
            if isinstance(module, fp8dist.Float8Linear):
                edit(module.weight)

    return edit_all


ROUTES: dict[str, Edit] = {
    "for-loop": optimizer_step(foreach=False),
    "foreach": optimizer_step(foreach=True),
    "fused": optimizer_step(fused=True),
    # Inductor writes to the shard where no tensor's own version sees it.
    "aot_eager": compiled_optimizer_step("aot_eager"),
    "inductor": compiled_optimizer_step("inductor"),
    "AdamW8bit": torchao_optimizer_step,
    "load_state_dict": load,
    "load_state_dict(assign=True)": load_assigning,
    "dcp.load": dcp_load_in_place,
    "broadcast from rank 0": load_from_rank_0,
    "data": by_weight(lambda weight: weight.data.mul_(1.5)),
    "mul_": by_weight(lambda weight: weight.mul_(1.5)),
    "copy_": by_weight(lambda weight: weight.copy_(weight.detach().clone() * 1.5)),
    "to_local": by_weight(lambda weight: weight.to_local().mul_(1.5)),
    "to_local, compiled": by_weight(
        lambda weight: torch.compile(torch.Tensor.mul_, backend="aot_eager")(weight.to_local(), 1.5)
    ),
    "view": by_weight(lambda weight: weight.to_local()[:, 0].mul_(1.5)),
    "init": by_weight(lambda weight: nn.init.constant_(weight, 0.5)),
}


def edited(route: str, recipe: str, folder: Any) -> tuple[list[Any], list[str], list[list[str]]]:
    """Of a model with precompute after the edit and of one without: the loss and gradients of the
    next step, the warnings, and the reductions of amaxes in its forward."""
    results, warned, reductions = [], [], []
    for precompute in (True, False):
        model = float8_model(mesh_of(dist.get_world_size()), recipe, layers=1)
        loss_of(model, local_batch(0)).backward()
        model.zero_grad()
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
        before = full(model.layers[0].w2.weight)
        with warnings_of_the_library() as messages:
            ROUTES[route](model, f"{folder}/{precompute}")
            assert not same_bits(full(model.layers[0].w2.weight), before)
            if precompute:
                fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
            with collectives() as forward:
                loss = loss_of(model, local_batch(1))
            loss.backward()
        gradients = {name: full(param.grad) for name, param in model.named_parameters()}
        results.append((loss.item(), gradients))
        warned.append(messages)
        reductions.append([str(c) for c in forward if c.reduction == "MAX"])
    assert same_bits(results[0], results[1]), (results[0][0], results[1][0])
    return results[0][0], warned, reductions


@pytest.mark.parametrize(
    "route",
    [pytest.param(r, marks=needs_compiler) if r == "inductor" else r for r in ROUTES],
)
def test_noticed(route: str, tmp_path: Any) -> None:
    compiled = route in ("aot_eager", "inductor")
    # torch 2.11 cannot compile the step of a subclass whose gradient is a part of a larger one, as
    # on a short rank: an AssertionError of its own.
    ranks = 2 if compiled and torch.__version__ < "2.12" else 3
    results = run_on_ranks(ranks, edited, route, "tensorwise", str(tmp_path))
    for loss, warned, reductions in results:
        assert math.isfinite(loss)
        # Told, it neither warns nor communicates; untold, it warns once and reduces each weight.
        assert warned[0] == [] and reductions[0] == []
        (message,) = warned[1]
        assert message.startswith("layers.0.wq ")
        assert "precompute_float8_dynamic_scale_for_fsdp" in message
        reduction = f"all_reduce MAX int32[1] over {ranks} ranks"
        edited_weights = 2 if compiled or route == "AdamW8bit" else 7
        assert reductions[1] == [reduction] * edited_weights


def loaded_in_place(recipe: str, folder: str, rows_of_last: int) -> list[bool]:
    """Whether a model computes what was loaded into it, right after it was and one gather later."""

    def model_of(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 16)).to(DEVICE)
        fp8dist.convert_to_float8_training(model, config=recipe)
        return fully_shard(model, mesh=mesh_of(dist.get_world_size()))

    model, other = model_of(0), model_of(1)
    x = torch.ones(16, 32, device=DEVICE)
    if dist.get_rank() == dist.get_world_size() - 1:
        assert len(model[0].weight.to_local()) == rows_of_last
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
    before = model(x)
    dcp.save(other.state_dict(), checkpoint_id=folder)
    dcp.load(model.state_dict(), checkpoint_id=folder)
    return [not torch.equal(before, other(x)), *(torch.equal(model(x), other(x)) for _ in range(2))]


def loaded_again_in_place(precompute: bool, folder: str) -> str | bool:
    """Of a load into a state dict that was there at the last gather: what is raised where there
    are rows; or, after precompute, whether the model computes what was loaded.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16)).to(DEVICE)
    fp8dist.convert_to_float8_training(model, config="rowwise")
    fully_shard(model, mesh=mesh_of(dist.get_world_size()))
    x = torch.ones(16, 32, device=DEVICE)
    first = model(x)
    model.reshard()
    state_dict = model.state_dict()
    dcp.save(state_dict, checkpoint_id=folder)
    with torch.no_grad():
        model[0].weight.mul_(2)
    model(x)
    model.reshard()
    dcp.load(state_dict, checkpoint_id=folder)
    if precompute:
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
        return torch.equal(model(x), first)
    if model[0].weight.to_local().numel() == 0:
        return "nothing noticed"
    with pytest.raises(ValueError) as error:
        model(x)
    return str(error.value)


def test_no_rank_waits_for_one_that_notices_nothing(tmp_path: Any) -> None:
    *found, last = run_on_ranks(5, loaded_again_in_place, False, str(tmp_path))
    assert last == "nothing noticed"
    assert len(set(found)) == 1 and "0 was edited in place through a state dict" in found[0]
    assert run_on_ranks(5, loaded_again_in_place, True, str(tmp_path)) == [True] * 5


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_loaded_in_place_where_a_rank_has_nothing(recipe: str, tmp_path: Any) -> None:
    # 16 rows on 5 ranks: 4 for each, and none for the last.
    assert run_on_ranks(5, loaded_in_place, recipe, str(tmp_path), 0) == [[True] * 3] * 5


def test_loaded_in_place_where_a_rank_has_less(tmp_path: Any) -> None:
    """16 rows on 3 ranks: 6, 6 and 4, which FSDP2 moves to a buffer of 6 after the precompute."""
    assert run_on_ranks(3, loaded_in_place, "rowwise", str(tmp_path), 4) == [[True] * 3] * 3


@pytest.mark.parametrize("recipe", [name for name in RECIPE_NAMES if name != "tensorwise"])
def test_noticed_whatever_the_recipe(recipe: str, tmp_path: Any) -> None:
    for loss, warned, reductions in run_on_ranks(3, edited, "foreach", recipe, str(tmp_path)):
        assert math.isfinite(loss)
        assert warned[0] == [] and reductions[0] == []
        assert len(warned[1]) == 1 and len(reductions[1]) == 7


def precompute_first(recipe: str) -> tuple[list[str], list[str], bool]:
    """Precompute before anything has run, when short ranks have not yet padded their shards."""
    losses = []
    with warnings_of_the_library() as messages:
        for precompute in (True, False):
            model = float8_model(mesh_of(dist.get_world_size()), recipe)
            if precompute:
                fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
            with collectives() as forward:
                loss = loss_of(model, local_batch(0))
            loss.backward()
            if precompute:
                issued = [c.name for c in forward]
            losses.append(loss.item())
    return issued, messages, losses[0] == losses[1]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_precompute_before_the_first_forward(recipe: str, world: int) -> None:
    results = run_on_ranks(world, precompute_first, recipe)
    assert results == [(["all_gather"] * 3, [], True)] * world


def microbatches_and_evaluation() -> list[int]:
    """Reductions in forwards that no edit came between."""
    model = float8_model(mesh_of(dist.get_world_size()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fp8dist.register_precompute_hook(optimizer, model)
    loss_of(model, local_batch(0)).backward()
    optimizer.step()
    counts = []
    with warnings_of_the_library() as messages:
        for number in range(3):
            with collectives() as issued:
                loss_of(model, local_batch(number)).backward()
                with torch.no_grad():
                    loss_of(model, local_batch(number))
                model.state_dict()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            counts.append(len([c for c in issued if c.reduction == "MAX"]))
    assert messages == []
    return counts


def test_what_edits_nothing_costs_nothing() -> None:
    assert run_on_ranks(3, microbatches_and_evaluation) == [[0, 0, 0]] * 3


def compiled_looks_where_shards_have_moved() -> list[list[str]]:
    """Reductions of forwards after compiled code has read the parameters, where FSDP2 has moved the
    shards of short ranks, to buffers, since their scales were computed.
    """

    @torch.compile(backend="aot_eager", dynamic=False)
    def norms(weights: list[torch.Tensor]) -> list[torch.Tensor]:
        return [weight.square().sum() for weight in weights]

    torch._dynamo.reset()
    reduced = []
    model = float8_model(mesh_of(dist.get_world_size()), layers=1)
    for number in range(2):
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
        if number == 0:
            model._get_fsdp_state()._lazy_init()
        else:  # FSDP2 looks at every shard again
            kept = {name: value for name, value in model.state_dict().items() if "norm" in name}
            model.load_state_dict(kept, strict=False)
        with torch.no_grad():
            norms([layer.weight for layer in (model.layers[0].wq, model.layers[0].w2)])
            with collectives() as issued:
                loss_of(model, local_batch(number))
        model.reshard()
        reduced.append([c.name for c in issued if c.reduction == "MAX"])
    return reduced


def test_a_compiled_look_at_the_weights_edits_nothing_on_short_ranks() -> None:
    """Where a rank alone took it for an edit, it would wait for the others in an all-reduce."""
    assert run_on_ranks(3, compiled_looks_where_shards_have_moved) == [[[], []]] * 3
