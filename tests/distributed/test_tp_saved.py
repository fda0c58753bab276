"""What tensor parallelism keeps between forward and backward; a layer left out of the plan."""

import contextlib
from collections import Counter

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from fp8dist.tensors.float8_activation import Float8Activation
from tests.distributed.harness import run_on_ranks
from tests.distributed.toy import RECIPE_NAMES, same_bits
from tests.distributed.tp_block import batch, block_of, part, plan, tp_mesh
from tests.distributed.wire import collectives


def moved_between_forward_and_backward(recipe: str) -> bool:
    """Whether gradients stay when hooks move what is saved, as offloading of activations does."""

    def elsewhere(x: torch.Tensor) -> torch.Tensor:
        assert not isinstance(x, Float8Activation), "to move it would be to dequantize it"
        return x.clone() if type(x) is torch.Tensor else x

    found = []
    for hooks in (contextlib.nullcontext(), saved_tensors_hooks(elsewhere, lambda x: x)):
        mesh = tp_mesh()
        block = parallelize_module(block_of(recipe), mesh, plan())
        x = part(batch(1), mesh).requires_grad_()
        with hooks:
            output = block(x)
        output.backward(part(batch(2), mesh))
        found.append([x.grad, *(weight.grad.to_local() for weight in block.parameters())])
    return same_bits(*found)


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_hooks_may_move_what_is_saved_for_backward(recipe: str) -> None:
    assert run_on_ranks(2, moved_between_forward_and_backward, recipe) == [True, True]


def recomputed(recipe: str) -> list[Counter[str]]:
    """All-gathers of backward: of a block, and of blocks that are recomputed in both of torch's
    ways; those of forward first. Gradients are the same."""
    mesh, gathers, gradients = tp_mesh(), [], []
    for reentrant in (None, False, True):
        block = parallelize_module(block_of(recipe), mesh, plan())
        x = part(batch(1), mesh).requires_grad_()
        with collectives() as forward:
            output = (
                block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)
            )
        with collectives() as backward:
            output.backward(part(batch(2), mesh))
        for issued in (forward, backward) if reentrant is None else (backward,):
            gathers.append(Counter(str(c) for c in issued if c.name == "all_gather"))
        gradients.append([x.grad, *(weight.grad.to_local() for weight in block.parameters())])
    assert all(same_bits(gradients[0], other) for other in gradients[1:])
    return gathers


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise_with_gw_hp"])
def test_a_recomputed_block_gathers_what_forward_does_once_more(recipe: str) -> None:
    for forward, backward, *recomputing in run_on_ranks(2, recomputed, recipe):
        assert recomputing == [forward + backward] * 2


def unplanned() -> str:
    mesh = tp_mesh()
    some = {name: style for name, style in plan().items() if name != "attention.wq"}
    block = parallelize_module(block_of("rowwise"), mesh, some)
    with pytest.raises(ValueError) as error:
        block(part(batch(1), mesh))
    return str(error.value)


def test_a_layer_left_out_of_the_plan_is_named() -> None:
    for message in run_on_ranks(2, unplanned):
        assert message.startswith("attention.wq: the input is a DTensor")
