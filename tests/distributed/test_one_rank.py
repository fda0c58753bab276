"""Gradients of a rank that shards with no other: the same, and copied only where they must be."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn as nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

import fp8dist
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.toy import (
    batch_of,
    convert,
    float8_model,
    local_batch,
    loss_of,
    mesh_of,
    new_model,
    same_bits,
    shard,
)


class OfTheUser(DefaultReduceScatter):
    """FSDP2's, by another name."""


def groups_of(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def divide(model: nn.Module) -> None:
    for group in groups_of(model):
        group.set_gradient_divide_factor(2.0)


def hook_reductions(model: nn.Module) -> None:
    for group in groups_of(model):
        group.set_all_reduce_hook(lambda gradients: gradients.mul_(3))


def hook_parameters(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: parameter.grad.mul_(5))


def use_their_own(model: nn.Module) -> None:
    for group in groups_of(model):
        group.set_custom_reduce_scatter(OfTheUser())


@dataclass(frozen=True)
class Case:
    in_place: bool
    options: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[nn.Module], None] = lambda model: None
    dtype: torch.dtype = torch.float32


BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
CASES = {
    "float32": Case(True),
    "computed in bfloat16": Case(True, {"mp_policy": BFLOAT16}),
    "cast after the reduction": Case(False, {"mp_policy": BFLOAT16}, dtype=torch.bfloat16),
    "divided": Case(False, prepare=divide),
    "hooks of reductions": Case(False, prepare=hook_reductions),
    "hooks of parameters": Case(False, prepare=hook_parameters),
    "offloaded": Case(False, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    "a reduce-scatter of the user's": Case(False, prepare=use_their_own),
}


def backward(model: nn.Module, batch: Any) -> set[bool]:
    """Whether a group's gradients, reduced, have the memory in which FSDP2 had laid them out."""
    in_place = set()

    def reduce(*args: Any) -> Any:
        comm, buffers = args[4], []

        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            buffers.append(type(comm).allocate(comm, *args, **kwargs))
            return buffers[-1]

        with mock.patch.object(comm, "allocate", allocate):
            results = foreach_reduce(*args)
        laid_out, reduced = buffers
        in_place.add(laid_out.data_ptr() == reduced.data_ptr())
        return results

    foreach_reduce = _fsdp_param_group.foreach_reduce
    with mock.patch.object(_fsdp_param_group, "foreach_reduce", reduce):
        loss_of(model, batch).backward()
    return in_place


def train(name: str, ours: bool = True) -> tuple[list[Any], list[Any]]:
    """Gradients after the first and the second backward of two steps, and `backward` of each."""
    case = CASES[name]
    model = new_model().to(case.dtype)
    convert(model)
    if "offload_policy" in case.options:
        model.cpu()
    shard(model, mesh_of(1), **case.options)
    case.prepare(model)
    if not ours:
        use_their_own(model)
    gradients, in_place = [], []
    for step in range(2):
        for microbatch in range(2):
            in_place.append(backward(model, batch_of(step, microbatch)))
            gradients.append([p.grad.to_local().cpu().clone() for p in model.parameters()])
        model.zero_grad()
    return gradients, in_place


def compare(name: str) -> tuple[bool, list[Any]]:
    (found, in_place), (expected, _) = train(name), train(name, ours=False)
    return same_bits(found, expected), in_place


@pytest.mark.parametrize("name", CASES)
def test_one_rank(name: str) -> None:
    [(same, in_place)] = run_on_ranks(1, compare, name)
    assert same
    # The second backward of a step adds to gradients that lie elsewhere.
    assert in_place == [{CASES[name].in_place}, {False}] * 2


def not_taken_over(model: nn.Module, batch: Any) -> bool:
    in_place = backward(model, batch)
    comms = {
        type(g._get_fsdp_state()._fsdp_param_group._reduce_scatter_comm) for g in groups_of(model)
    }
    return in_place == {False} and comms == {DefaultReduceScatter}


def with_others(*mesh: int) -> bool:
    return not_taken_over(float8_model(mesh_of(*mesh)), local_batch(0))


@pytest.mark.parametrize("mesh", [(2,), (2, 1)], ids=["two ranks", "two replicas"])
def test_more_ranks(mesh: tuple[int, ...]) -> None:
    assert run_on_ranks(2, with_others, *mesh) == [True, True]


def without_float8() -> bool:
    return not_taken_over(shard(new_model(), mesh_of(1)), batch_of(0))


def test_without_float8() -> None:
    assert run_on_ranks(1, without_float8) == [True]


def without_float8_gathers() -> bool:
    config = fp8dist.Float8Config(enable_fsdp_float8_all_gather=False)
    model = float8_model(mesh_of(1), config)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
    return not_taken_over(model, batch_of(0))


def test_without_float8_gathers() -> None:
    assert run_on_ranks(1, without_float8_gathers) == [True]


def precompute_around_sharding() -> set[bool]:
    model = new_model()
    convert(model)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)  # sees no group yet
    shard(model, mesh_of(1))
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
    return backward(model, batch_of(0))


def test_precompute_before_the_first_forward() -> None:
    assert run_on_ranks(1, precompute_around_sharding) == [{True}]


def freed_after_a_failure() -> bool:
    loss = loss_of(float8_model(mesh_of(1)), batch_of(0))
    buffers = []

    def fail(gradients: Any, buffer: torch.Tensor, world: int) -> None:
        buffers.append(weakref.ref(buffer))
        raise torch.OutOfMemoryError

    with mock.patch.object(_fsdp_collectives, "foreach_reduce_scatter_copy_in", fail):
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()
    gc.collect()
    return buffers[0]() is None


def test_a_failure_leaves_no_buffer_behind() -> None:
    assert run_on_ranks(1, freed_after_a_failure) == [True]


def freed_by_a_hook() -> bool:
    """Whether memory of a gradient that a hook frees is given away while it is being written to."""
    model = float8_model(mesh_of(1))
    loss_of(model, batch_of(0)).backward()
    group = model._get_fsdp_state()._fsdp_param_group
    places = {p.grad.to_local().untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {p.grad.to_local().untyped_storage().nbytes() for p in model.parameters()}
    loss = loss_of(model, batch_of(0))
    with torch.cuda.stream(group.comm_ctx.reduce_scatter_stream):
        torch.cuda._sleep(2_000_000_000)  # a second, for all that is to come on this stream

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(drop)
    loss.backward()
    taken = [torch.empty(size, dtype=torch.uint8, device=DEVICE) for size in sizes for _ in "123"]
    return not places.isdisjoint(t.untyped_storage().data_ptr() for t in taken)


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has no streams")
def test_memory_that_a_hook_frees_is_not_given_away() -> None:
    assert run_on_ranks(1, freed_by_a_hook) == [False]
