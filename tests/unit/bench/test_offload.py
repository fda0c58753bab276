"""Activations that wait for backward in host memory."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.unit.bench.program import load_program

offload = load_program("offload")
STEPS = 60


def of_chain(size: int, backwards: int = 1) -> tuple[torch.Tensor, list[bool]]:
    """The gradient of a chain that saves a tensor at each step, with `size` bytes in host memory.

    Returns:
        (elements,) the gradient; which saved tensors were freed when the forward had ended, but the
        first, which is the chain's input.
    """
    keep = offload.Offload(size)
    x = torch.linspace(-3, 3, offload.SMALLEST // 2, dtype=torch.bfloat16, device=offload.DEVICE)
    x.requires_grad_()
    memory = []
    with keep.forward():
        y = x
        for _ in range(STEPS):
            y = y.sin() * 1.5
            memory.append(StorageWeakRef(y.untyped_storage()))
    freed = [ref.expired() for ref in memory[:-1]]  # the last is the result
    for _ in range(backwards):
        (gradient,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    return gradient, freed


def test_what_is_offloaded_is_freed_and_the_gradient_the_same() -> None:
    size = offload.SMALLEST
    expected, freed = of_chain(0)
    assert not any(freed)
    for tensors in (1, 10, STEPS):
        gradient, freed = of_chain(tensors * size + size // 2)
        assert freed == [i < tensors - 1 for i in range(STEPS - 1)]
        assert gradient.equal(expected)


def test_a_second_backward_is_an_error() -> None:
    with pytest.raises(AssertionError, match="asked for twice"):
        of_chain(offload.SMALLEST, backwards=2)
