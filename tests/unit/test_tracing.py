"""Whether the compiler is at work."""

import torch

from fp8dist.tracing import is_tracing

found: list[bool] = []


@torch._dynamo.allow_in_graph
class Ask(torch.autograd.Function):
    """Asks where the compiler traces ops of forward and of backward, not Python."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        found.append(is_tracing())
        return x + 1

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        found.append(is_tracing())
        return grad


def test_is_so_while_a_graph_is_traced_and_not_when_it_runs() -> None:
    torch._dynamo.reset()
    found.clear()
    x = torch.ones(2, requires_grad=True)
    Ask.apply(x).sum().backward()
    assert found == [False, False]
    found.clear()
    compiled = torch.compile(Ask.apply, backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    traced = len(found)
    assert traced >= 2 and all(found)
    compiled(x).sum().backward()
    assert len(found) == traced
