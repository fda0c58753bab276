"""Whether the compiler is at work."""

import torch
from torch.fx.traceback import get_current_meta
from torch.utils.checkpoint import CheckpointPolicy

from fp8dist.tracing import copied, is_tracing, not_kept

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


def test_what_is_not_kept_is_marked_and_nothing_after_it() -> None:
    def mark() -> object:
        return get_current_meta().get("recompute")

    with not_kept():
        assert mark() == CheckpointPolicy.MUST_RECOMPUTE
    assert "recompute" not in get_current_meta()
    get_current_meta()["recompute"] = CheckpointPolicy.MUST_SAVE
    try:
        with not_kept():
            assert mark() == CheckpointPolicy.MUST_RECOMPUTE
        assert mark() == CheckpointPolicy.MUST_SAVE
    finally:
        del get_current_meta()["recompute"]


def test_a_copy_has_the_same_bits() -> None:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    assert torch.equal(copied(bits.view(torch.bfloat16)).view(torch.int16), bits)
