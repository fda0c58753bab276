"""`Float8ShardedWeight`: an ordinary tensor to everyone, which counts the edits made to it."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard._fsdp_init import _move_states_to_device

from fp8dist.tensors.sharded_weight import Float8ShardedWeight
from tests.unit.tensors.sharded_layer import K, N, converted, hp_weight


def parameter() -> nn.Parameter:
    return nn.Parameter(Float8ShardedWeight(hp_weight()))


def count(weight: torch.Tensor) -> int:
    return weight._edits.count


# --- moves


@pytest.mark.parametrize("trained", [True, False])
def test_fully_shard_moves_it_as_trained_or_frozen_as_it_was(trained: bool) -> None:
    param = parameter().requires_grad_(trained)
    _move_states_to_device([param], [], torch.device("meta"))
    assert isinstance(param, nn.Parameter) and isinstance(param, Float8ShardedWeight)
    assert param.is_meta and param.requires_grad == trained
    for wanted in (not trained, trained):  # afterwards it is as it is told
        param.requires_grad_(wanted)
        assert param.requires_grad == wanted


@pytest.mark.parametrize("trained", [True, False])
def test_a_module_is_moved_as_trained_or_frozen_as_it_was(trained: bool) -> None:
    module = nn.Module()
    module.weight = parameter().requires_grad_(trained)
    module.to("meta")
    assert module.weight.is_meta and module.weight.requires_grad == trained
    assert module.weight.requires_grad_(not trained).requires_grad == (not trained)


def test_only_what_is_moved_and_made_a_parameter_stays_frozen() -> None:
    frozen = parameter().requires_grad_(False)
    assert nn.Parameter(frozen.to(torch.bfloat16)).requires_grad
    moved = frozen.to("meta")
    assert moved.requires_grad_().requires_grad
    assert not nn.Parameter(frozen.to("meta")).requires_grad


# --- what is assigned to `data`


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrapped", [True, False])
def test_assigned_data_take_the_place_of_the_tensor_inside(
    dtype: torch.dtype, wrapped: bool
) -> None:
    param, value = parameter(), hp_weight(1)[:16].to(dtype)
    param.data = Float8ShardedWeight(value) if wrapped else value
    assert param.shape == (16, K) and param.dtype == dtype
    assert isinstance(param, Float8ShardedWeight) and isinstance(param, nn.Parameter)
    assert param._tensor.data_ptr() == value.data_ptr()
    assert torch.equal(param.data._tensor, value)
    assert count(param) == 1


def test_edits_of_what_was_assigned_are_edits_of_the_weight() -> None:
    param, other = parameter(), Float8ShardedWeight(hp_weight(1))
    param.data = other
    before = count(param)
    other.mul_(2)
    assert count(param) == before + 1
    assert torch.equal(param._tensor, 2 * hp_weight(1))


# --- optimizers

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW for-loop": lambda params: torch.optim.AdamW(params, foreach=False),
    "AdamW foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "AdamW fused": lambda params: torch.optim.AdamW(params, fused=True),
    "AdamW amsgrad": lambda params: torch.optim.AdamW(params, amsgrad=True),
    "Adam": torch.optim.Adam,
    "SGD for-loop": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9, foreach=False),
    "SGD foreach": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9, foreach=True),
    "SGD fused": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9, fused=True),
    "SGD plain": lambda params: torch.optim.SGD(params, 0.1),
    "Adafactor": torch.optim.Adafactor,
    "RMSprop": torch.optim.RMSprop,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_does_to_it_what_it_does_to_a_plain_tensor(name: str) -> None:
    ours, plain = parameter(), nn.Parameter(hp_weight())
    optimizers = [OPTIMIZERS[name]([param]) for param in (ours, plain)]
    for step in range(3):
        before = count(ours)
        for param, optimizer in zip((ours, plain), optimizers, strict=True):
            param.grad = hp_weight(seed=step + 1)
            optimizer.step()
        assert count(ours) > before, "the step was noticed"
        assert torch.equal(ours._tensor, plain)
    for state in optimizers[0].state[ours].values():
        assert not isinstance(state, Float8ShardedWeight)


def test_gradients_are_clipped_as_those_of_a_plain_tensor() -> None:
    ours, plain = parameter(), nn.Parameter(hp_weight())
    for param in (ours, plain):
        (param * param).sum().backward()
    norms = [nn.utils.clip_grad_norm_([param], 1.0) for param in (ours, plain)]
    assert norms[0] == norms[1]
    assert type(ours.grad) is torch.Tensor
    assert torch.equal(ours.grad, plain.grad)


# --- edits that count, and reads that do not

EDITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "copy_": lambda w: w.copy_(hp_weight(1)),
    "copy_ of another parameter": lambda w: w.copy_(Float8ShardedWeight(hp_weight(1))),
    "fill_": lambda w: w.fill_(1.0),
    "operator": lambda w: w.__imul__(2),
    "setitem": lambda w: w.__setitem__(0, 0.0),
    ".data": lambda w: w.data.mul_(2),
    ".data.copy_": lambda w: w.data.copy_(hp_weight(1)),
    "init": lambda w: nn.init.normal_(w),
    "uniform_": lambda w: w.uniform_(),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    "foreach with a tensor": lambda w: torch._foreach_add_([w], [hp_weight(1)]),
    "foreach_copy_": lambda w: torch._foreach_copy_([w], [hp_weight(1)]),
    "out": lambda w: torch.mul(hp_weight(1), 2, out=w),
    "through a slice": lambda w: w[:4].zero_(),
    "through a view": lambda w: w.view(-1).mul_(2),
    "through detach": lambda w: w.detach().mul_(2),
    "through split": lambda w: torch.split(w, 16)[1].zero_(),
    "through a transpose": lambda w: w.t().mul_(2),
    "through narrow": lambda w: w.narrow(1, 0, 4).zero_(),
    "through chunk": lambda w: w.chunk(2)[0].zero_(),
    "through an index": lambda w: w[3].zero_(),
    "through a reshape": lambda w: w.reshape(-1).zero_(),
    "through unsqueeze": lambda w: w.unsqueeze(0).zero_(),
    "through unbind": lambda w: w.unbind(0)[0].zero_(),
    "through view_as": lambda w: w.view_as(w).mul_(2),
    "through flatten": lambda w: w.flatten().mul_(2),
    "through diagonal": lambda w: w.diagonal().zero_(),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_change_the_tensor_inside_and_are_counted(name: str) -> None:
    weight, plain = parameter(), nn.Parameter(hp_weight())
    for param in (weight, plain):
        torch.manual_seed(7)
        with torch.no_grad():
            EDITS[name](param)
    assert torch.equal(weight._tensor, plain)
    assert not torch.equal(weight._tensor, hp_weight())
    assert count(weight) > 0


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "detach": lambda w: w.detach(),
    "sum": lambda w: w.sum(),
    "add": lambda w: w + 1,
    "norm": lambda w: w.norm(),
    "foreach_norm": lambda w: torch._foreach_norm([w], 2),
    "slice": lambda w: w[:4],
    "clone": lambda w: w.clone(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "to": lambda w: w.to(torch.bfloat16),
    "item": lambda w: w[0, 0].item(),
    "repr": repr,
    "empty_like": torch.empty_like,
    "copied from": lambda w: torch.empty(N, K).copy_(w),
    "foreach_copied from": lambda w: torch._foreach_copy_([torch.empty(N, K)], [w]),
    "edit of a clone": lambda w: w.detach().clone().zero_(),
    "edit of a deepcopy": lambda w: copy.deepcopy(w).data.zero_(),
    "edit of another dtype": lambda w: w.detach().to(torch.bfloat16).zero_(),
    "edit of a sum": lambda w: (w + 1).zero_(),
}


@pytest.mark.parametrize("name", READS)
def test_reads_are_not_edits(name: str) -> None:
    weight = parameter()
    before = (count(weight), weight._tensor._version)
    with torch.no_grad():
        READS[name](weight)
    assert torch.equal(weight._tensor, hp_weight())
    assert (count(weight), weight._tensor._version) == before


def test_loading_a_state_dict_is_an_edit_and_taking_one_is_not() -> None:
    model = converted()
    weight = model[0].weight
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert count(weight) == 0
    model.load_state_dict(state)
    assert model[0].weight is weight
    assert count(weight) == 1


def test_a_move_to_another_storage_is_not_an_edit() -> None:
    """FSDP2's lazy initialisation does this on ranks whose shard is short: the values stay."""
    weight = Float8ShardedWeight(hp_weight())
    padded = weight.new_zeros(N + 1, K)
    before = count(weight)
    padded.narrow(0, 0, N).copy_(weight)
    moved = padded.narrow(0, 0, N)
    assert count(weight) == before
    assert isinstance(moved, Float8ShardedWeight)
    assert moved._edits.is_same_as(weight._edits)
    assert torch.equal(moved._tensor, hp_weight())
    moved.mul_(2)
    assert not moved._edits.is_same_as(weight._edits)


def test_a_backup_that_is_written_back_is_an_edit() -> None:
    """A buffer made like the weight is no part of it: swapping averaged weights in must count."""
    weight = Float8ShardedWeight(hp_weight())
    backup = torch.empty_like(weight)
    backup.copy_(weight)
    weight.mul_(2)
    before = count(weight)
    backup.mul_(3)
    assert count(weight) == before
    weight.copy_(backup)
    assert count(weight) == before + 1


def test_only_the_first_copy_into_a_new_place_is_a_move() -> None:
    weight = Float8ShardedWeight(hp_weight())
    place = weight.new_zeros(N, K)
    assert not place._edits.is_same_as(weight._edits), "it does not hold the weight yet"
    place.copy_(weight)
    assert place._edits.is_same_as(weight._edits)
    weight.mul_(2)
    place.copy_(weight)
    assert not place._edits.is_same_as(weight._edits)


def test_collectives_write_to_what_they_are_given(mesh: DeviceMesh) -> None:
    weight = Float8ShardedWeight(hp_weight())
    dist.broadcast(weight, src=0)
    assert count(weight) > 0


def test_a_copy_from_one_place_of_a_parameter_to_another_is_an_edit() -> None:
    weight = Float8ShardedWeight(hp_weight())
    weight[:4].copy_(weight[4:8])
    assert count(weight) == 1


# --- one parameter, or another


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.detach(),
        lambda w: w.view(N, K),
        lambda w: w[:4],
        lambda w: torch.split(w, 16)[0],
        lambda w: w.as_strided((4, 4), (K, 1)),
        lambda w: w.data,
    ],
    ids=["detach", "view", "slice", "split", "as_strided", "data"],
)
def test_views_share_the_edits(
    view: Callable[[torch.Tensor], Float8ShardedWeight],
) -> None:
    weight = parameter()
    with torch.no_grad():
        found = view(weight)
    assert isinstance(found, Float8ShardedWeight)
    assert found._edits is weight._edits


@pytest.mark.parametrize(
    "make",
    [
        lambda w: w.detach().clone(),
        copy.deepcopy,
        lambda w: pickle.loads(pickle.dumps(w)),
        lambda w: w.detach().to(torch.bfloat16),
    ],
    ids=["clone", "deepcopy", "pickle", "to"],
)
def test_copies_have_edits_of_their_own(
    make: Callable[[torch.Tensor], Float8ShardedWeight],
) -> None:
    weight = parameter()
    found = make(weight)
    assert isinstance(found, Float8ShardedWeight)
    assert found._edits is not weight._edits
    assert found._tensor.data_ptr() != weight._tensor.data_ptr()
    assert torch.equal(found._tensor, hp_weight().to(found.dtype))


def test_results_of_other_ops_are_plain() -> None:
    weight = parameter().detach()
    for found in (weight + 1, weight * weight, weight.sum(), weight @ weight.t(), weight > 0):
        assert type(found) is torch.Tensor
    assert torch.equal(weight @ weight.t(), hp_weight() @ hp_weight().t())


def test_an_in_place_op_returns_the_parameter() -> None:
    weight = Float8ShardedWeight(hp_weight())
    assert weight.mul_(2) is weight
    assert torch.equal(weight._tensor, hp_weight() * 2)


def test_it_looks_like_the_tensor_inside() -> None:
    inner = hp_weight().bfloat16()[:, 1:]
    weight = Float8ShardedWeight(inner)
    assert (weight.shape, weight.stride(), weight.dtype, weight.device) == (
        inner.shape,
        inner.stride(),
        inner.dtype,
        inner.device,
    )
    assert weight.storage_offset() == inner.storage_offset()


def test_flatten_and_unflatten() -> None:
    weight = Float8ShardedWeight(hp_weight())
    names, meta = weight.__tensor_flatten__()
    assert names == ["_tensor"]
    assert hash(meta) == hash(weight.__tensor_flatten__()[1]), "compiled code is keyed by it"
    again = Float8ShardedWeight.__tensor_unflatten__(
        {"_tensor": weight._tensor}, meta, weight.shape, weight.stride()
    )
    assert again._tensor is weight._tensor
