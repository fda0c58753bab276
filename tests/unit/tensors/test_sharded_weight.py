"""`Float8ShardedWeight`: an ordinary tensor to everyone, which counts the edits made to it."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_init import _move_states_to_device
from torch.distributed.tensor import DTensor

import fp8dist
from fp8dist import Float8Config
from fp8dist.config import RECIPES
from fp8dist.tensors import sharded_weight
from fp8dist.tensors.float8_tensor import Float8Tensor
from fp8dist.tensors.sharded_weight import Float8ShardedWeight, is_sharded
from tests.unit.tensors.sharded_layer import K, N, hp_weight


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


def converted(mesh: DeviceMesh | None = None, **config: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K, bias=False))
    fp8dist.convert_to_float8_training(model, config=Float8Config(**config))
    return model if mesh is None else fully_shard(model, mesh=mesh)


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


# --- whole models

INPUT = torch.randn(5, K, generator=torch.Generator().manual_seed(9))


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copied_model_computes_the_same_and_is_independent(
    duplicate: Callable[[nn.Module], nn.Module],
) -> None:
    model = converted(cache_payload=False)
    model[2].weight.requires_grad_(False)
    model(INPUT).sum().backward()
    other = duplicate(model)
    assert torch.equal(other(INPUT), model(INPUT))
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert isinstance(theirs, nn.Parameter)
        assert type(theirs) is type(ours)
        assert theirs.requires_grad == ours.requires_grad
    assert other[0].config == model[0].config
    assert other[0].weight_state is not model[0].weight_state
    with torch.no_grad():
        other[0].weight.zero_()
    assert count(model[0].weight) == 0
    assert not model[0].weight._tensor.eq(0).any()


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, through_torch_save], ids=["deepcopy", "torch.save"]
)
def test_a_copied_model_can_be_sharded(
    duplicate: Callable[[nn.Module], nn.Module], mesh: DeviceMesh
) -> None:
    expected = converted()(INPUT)
    model = fully_shard(duplicate(converted()), mesh=mesh)
    assert is_sharded(model[0].weight)
    assert torch.equal(model(INPUT), expected)


@pytest.mark.parametrize(
    "to",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.bfloat16(),
        lambda model: model.to("cpu", torch.bfloat16),
    ],
    ids=["to", "bfloat16", "to device and dtype"],
)
def test_a_converted_model_moves_to_another_dtype(to: Callable[[nn.Module], nn.Module]) -> None:
    model = converted()
    names = [name for name, _ in model.named_parameters()]
    model[2].weight.requires_grad_(False)
    expected = fp8dist.convert_to_float8_training(converted_from(torch.bfloat16))
    to(model)
    assert [name for name, _ in model.named_parameters()] == names
    for param in model.parameters():
        assert isinstance(param, nn.Parameter)
        assert param.dtype == torch.bfloat16
    assert isinstance(model[0].weight, Float8ShardedWeight)
    assert model[0].weight._tensor.dtype == torch.bfloat16
    assert not model[2].weight.requires_grad
    assert torch.equal(model(INPUT.bfloat16()), expected(INPUT.bfloat16()))


def converted_from(dtype: torch.dtype) -> nn.Sequential:
    """The unconverted model, in `dtype`."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K, bias=False)).to(dtype)


def test_gradients_are_zeroed_and_frozen_as_in_any_model() -> None:
    model = converted()
    model(INPUT).sum().backward()
    model.zero_grad(set_to_none=False)
    assert all(param.grad.eq(0).all() for param in model.parameters())
    model.requires_grad_(False)
    assert not model(INPUT).requires_grad


@pytest.mark.parametrize("convert_first", [True, False])
def test_meta_construction_then_to_empty(convert_first: bool) -> None:
    source = converted()
    with torch.device("meta"):
        model = converted() if convert_first else converted_from(torch.float32)
    model.to_empty(device="cpu")
    if not convert_first:
        fp8dist.convert_to_float8_training(model)
    for layer in (model[0], model[2]):
        assert isinstance(layer.weight, Float8ShardedWeight)
        assert isinstance(layer.weight, nn.Parameter)
        assert layer.weight._tensor.device == layer.weight.device == torch.device("cpu")
    model.load_state_dict(source.state_dict())
    assert torch.equal(model(INPUT), source(INPUT))


@pytest.mark.parametrize("assign", [False, True])
def test_meta_construction_then_sharding_then_to_empty(mesh: DeviceMesh, assign: bool) -> None:
    source = converted()
    with torch.device("meta"):
        model = converted()
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    state = {}
    for name, param in model.state_dict().items():
        assert type(param._local_tensor) is torch.Tensor
        state[name] = DTensor.from_local(
            source.state_dict()[name], param.device_mesh, param.placements
        )
    model.load_state_dict(state, assign=assign)
    assert is_sharded(model[0].weight)
    assert torch.equal(model(INPUT), source(INPUT))


def test_meta_construction_then_sharding_then_init(mesh: DeviceMesh) -> None:
    """What trainers do: materialise, then let each module initialise itself."""
    with torch.device("meta"):
        model = converted()
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    for layer in (model[0], model[2]):
        layer.reset_parameters()
    assert model[0].weight._local_tensor._tensor.std() > 0
    assert model(INPUT).isfinite().all()


# --- FSDP2's hooks


def test_is_sharded(mesh: DeviceMesh) -> None:
    assert not is_sharded(None)
    assert not is_sharded(parameter())
    assert not is_sharded(DTensor.from_local(hp_weight(), mesh))
    assert is_sharded(DTensor.from_local(Float8ShardedWeight(hp_weight()), mesh))
    assert is_sharded(converted(mesh)[0].weight)
    assert not is_sharded(converted(mesh, enable_fsdp_float8_all_gather=False)[0].weight)


@pytest.mark.parametrize("param_dtype", [None, torch.bfloat16])
def test_the_unsharded_weight_is_float8_in_the_dtype_of_the_policy(
    mesh: DeviceMesh, param_dtype: torch.dtype | None
) -> None:
    model = fully_shard(
        converted(), mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=param_dtype)
    )
    shard = model[0].weight._local_tensor._tensor.clone()
    model.unshard()
    weight = model[0].weight
    assert isinstance(weight, Float8Tensor)
    assert isinstance(weight, nn.Parameter)
    assert weight.dtype == (param_dtype or torch.float32)
    assert weight.shape == (N, K)
    scale = 448 / shard.abs().max().double()
    expected = (shard * scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(weight._data.view(torch.uint8), expected.view(torch.uint8))
    assert weight._scales[1].item() == scale.float()
    assert type(model[0].bias) is nn.Parameter
    model.reshard()
    assert is_sharded(model[0].weight)


@pytest.mark.parametrize("reshard", [True, False])
def test_training_under_fsdp_equals_training_without(mesh: DeviceMesh, reshard: bool) -> None:
    """One rank: FSDP2 gathers a weight of one shard, and nothing may change."""
    alone, sharded = converted(), fully_shard(converted(), mesh=mesh, reshard_after_forward=reshard)
    optimizers = [torch.optim.AdamW(model.parameters()) for model in (alone, sharded)]
    fp8dist.register_precompute_hook(optimizers[1], sharded)
    for step in range(4):
        losses = []
        for model, optimizer in zip((alone, sharded), optimizers, strict=True):
            loss = model(INPUT + step).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == losses[1], step
    for ours, theirs in zip(alone.parameters(), sharded.parameters(), strict=True):
        local = theirs._local_tensor
        assert torch.equal(getattr(local, "_tensor", local), getattr(ours, "_tensor", ours))


def test_what_autograd_saved_is_refilled(mesh: DeviceMesh) -> None:
    """A forward saves the unsharded weight, resharding frees it, and backward gathers it again."""
    model = converted(mesh, cache_payload=False)
    model.unshard()
    weight = model[0].weight
    saved, before = weight.detach(), weight.dequantize()
    model.reshard()
    assert saved._data.untyped_storage().size() == 0, "its memory was freed"
    with torch.no_grad():
        model[0].weight.mul_(2)
    model.unshard()
    assert model[0].weight is weight
    # Twice the weight is the same float8 data with half the scale.
    assert torch.equal(saved.dequantize(), before * 2)


# --- one rank, whose payload is the weight


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_payload_of_one_rank_is_not_copied(mesh: DeviceMesh, recipe: str) -> None:
    def one_layer(**config: Any) -> nn.Module:
        torch.manual_seed(0)
        layer = nn.Linear(256, 128, bias=False)
        fp8dist.convert_to_float8_training(layer, config=Float8Config(recipe, **config))
        return fully_shard(layer, mesh=mesh)

    layer, copied = one_layer(), one_layer(cache_payload=False)
    for _ in range(2):
        layer.unshard()
        copied.unshard()
        payload = layer.weight_state.payload
        assert layer.weight._data.data_ptr() == payload.data_ptr()
        assert torch.equal(layer.weight.dequantize(), copied.weight.dequantize())
        layer.reshard()
        copied.reshard()
        assert payload.untyped_storage().size() == payload.nbytes, "FSDP2 has freed it"
    (param,) = layer._get_fsdp_state()._fsdp_param_group.fsdp_params
    assert sum(tensor.numel() for tensor in param.all_gather_outputs) == 0


def test_an_edit_of_one_rank_reaches_the_weight(mesh: DeviceMesh) -> None:
    model = converted(mesh)
    model.unshard()
    weight = model[0].weight
    saved, before = weight.detach(), weight.dequantize()
    model.reshard()
    with torch.no_grad():
        model[0].weight.mul_(2)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
    model.unshard()
    assert model[0].weight is weight
    assert torch.equal(weight.dequantize(), before * 2)
    assert torch.equal(saved.dequantize(), before * 2)


def test_one_rank_with_another_payload_has_that_one(mesh: DeviceMesh) -> None:
    model = converted(mesh)
    model.unshard()
    before = model[0].weight.dequantize()
    model.reshard()
    state = model[0].weight_state
    lost, state.payload = state.payload.zero_(), None
    model.unshard()
    assert state.payload is not lost
    assert model[0].weight._data.data_ptr() == state.payload.data_ptr()
    assert torch.equal(model[0].weight.dequantize(), before)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_one_rank_goes_backward_after_an_edit_as_fsdp_does(
    mesh: DeviceMesh, compiled: bool, first: bool
) -> None:
    """With the weight as it is then: FSDP2 tells autograd of no unshard, and we of no cast.

    Args:
        first: whether it has the payload that it was first gathered with.
    """

    def grad_input(edited: bool, **config: Any) -> torch.Tensor:
        model = converted(mesh, **config)
        x = INPUT.clone().requires_grad_()
        model.unshard()
        if not first:
            model.reshard()
            model[2].weight_state.payload = None
            model.unshard()
        forward = nn.Sequential(*model)  # without FSDP2's hooks
        loss = (torch.compile(forward, backend="aot_eager") if compiled else forward)(x).sum()
        model.reshard()
        if edited:
            with torch.no_grad():
                model[2].weight.mul_(2)
            fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
        model.unshard()
        loss.backward()
        return x.grad

    found = grad_input(edited=True)
    assert torch.equal(found, 2 * grad_input(edited=False))
    assert torch.equal(found, grad_input(edited=True, cache_payload=False))


def test_a_weight_in_another_module_is_refused(mesh: DeviceMesh) -> None:
    layer = nn.Linear(K, N)
    layer.weight = nn.Parameter(Float8ShardedWeight(layer.weight.detach()))
    fully_shard(layer, mesh=mesh)
    layer.weight_state = None
    with pytest.raises(ValueError, match="FSDPLinear holds the weight.*tie weights before"):
        layer(torch.randn(2, K))


def test_reshard_to_a_part_of_the_mesh_is_looked_for_once_per_root(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted(mesh)
    sharded_weight.prepare_groups(model)
    monkeypatch.setattr(nn.Module, "named_modules", lambda *_: pytest.fail("looked again"))
    sharded_weight.prepare_groups(model)
    sharded_weight.prepare_groups(None)
