"""Experts in float32, without contents."""

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8dist.plan.groups import Float32Groups


def test_sizes_are_those_of_tensors_with_contents() -> None:
    def multiplied() -> list[tuple[torch.Size, torch.dtype]]:
        tokens = torch.ones(32, 16, requires_grad=True)
        weights = torch.ones(2, 16, 48, requires_grad=True)
        ends = torch.tensor([16, 32], dtype=torch.int32)
        output = F.grouped_mm(tokens, weights, offs=ends)
        output.square().sum().backward()  # a gradient with rows in memory
        assert tokens.grad is not None and weights.grad is not None
        return [(x.shape, x.dtype) for x in (output, tokens.grad, weights.grad)]

    with Float32Groups(), FakeTensorMode():
        found = multiplied()
    assert found == multiplied()


def test_bfloat16_is_left_to_torch() -> None:
    with Float32Groups(), FakeTensorMode():
        output = F.grouped_mm(
            torch.ones(32, 16, dtype=torch.bfloat16),
            torch.ones(2, 16, 48, dtype=torch.bfloat16),
            offs=torch.ones(2, dtype=torch.int32),
        )
    assert (output.shape, output.dtype) == ((32, 48), torch.bfloat16)
