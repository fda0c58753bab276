"""Whether an all-gather that is being traced will be overlapped."""

import pytest
import torch
import torch.distributed._symmetric_memory as symmetric_memory
from torch._inductor import config

from fp8dist import async_tp

found: list[tuple[bool, bool, bool]] = []


@torch._dynamo.allow_in_graph
class Ask(torch.autograd.Function):
    """Asks where the compiler traces ops."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        groups = [async_tp.is_on_for(name) for name in ("overlapped", "other")]
        found.append((async_tp.is_on(), *groups))
        return x + 1

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        return grad


@pytest.mark.parametrize("enabled", [True, False])
def test_is_on_where_a_graph_is_traced_for_a_group_with_symmetric_memory(enabled: bool) -> None:
    torch._dynamo.reset()
    found.clear()
    x = torch.ones(2, requires_grad=True)
    with config.patch(_micro_pipeline_tp=enabled), symmetric_memory._test_mode({"overlapped"}):
        Ask.apply(x)
        assert found == [(False, False, False)]
        torch.compile(Ask.apply, backend="aot_eager", fullgraph=True)(x)
    assert len(found) > 1
    assert set(found[1:]) == {(enabled, enabled, False)}
