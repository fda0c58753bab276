"""What selective recomputation keeps."""

import functools
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fp8dist
from fp8dist import hardware
from fp8dist.kernels import grouped
from fp8dist.train import parallelize
from tests.unit.moe import DIM, EXPERTS, FusedExperts, StackedExperts, zeros_of_groups


class Matmuls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "mm" in func.name() or "outer" in func.name():
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def zeros(a: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.zeros(a.size(0), b.size(1), dtype=torch.bfloat16)


def zeros_of_tokens(a: torch.Tensor, b: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    return torch.zeros(a.size(0), b.size(0) // others[-1].numel(), dtype=torch.bfloat16)


def zeros_of_rows(a: torch.Tensor, b: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    return torch.zeros(a.size(0), b.size(1), dtype=torch.bfloat16)


def zeros_of_experts(a: torch.Tensor, b: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    return torch.zeros(others[-1].numel(), a.size(0), b.size(0), dtype=torch.bfloat16)


def matmuls_of(module: nn.Module, *args: torch.Tensor) -> Counter[str]:
    """Those of a forward and a backward, where the job's choice of operations is kept."""
    contexts = functools.partial(
        create_selective_checkpoint_contexts, parallelize._keep_or_recompute
    )
    with Matmuls() as matmuls:
        checkpoint(
            module, *args, use_reentrant=False, context_fn=contexts
        ).square().sum().backward()
    return matmuls.counts


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("tensorwise", {"aten::_scaled_mm": 6}),
        ("rowwise", {"aten::_scaled_mm": 6}),
        ("rowwise_with_gw_hp", {"aten::_scaled_mm": 4, "aten::mm": 2}),
        ("blockwise", {"fp8dist::scaled_mm": 6}),
        (None, {"aten::mm": 6}),
    ],
)
def test_no_matmul_is_done_twice(
    recipe: str | None, expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers, three matmuls each, as the hardware would run them."""
    monkeypatch.setattr(hardware, "has_matmul", lambda device, recipe: True)
    monkeypatch.setattr(F, "scaled_mm", zeros)
    layers = [nn.Linear(128, 128, bias=False, dtype=torch.bfloat16) for _ in range(2)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    if recipe is not None:
        model = fp8dist.convert_to_float8_training(model, config=recipe)
    x = torch.randn(32, 128, dtype=torch.bfloat16, requires_grad=True)
    # A CPU multiplies no rows in torch 2.11.
    with torch.library._scoped_library("aten", "IMPL") as kernels:
        kernels.impl("_scaled_mm", zeros, "CPU", allow_override=True)
        assert matmuls_of(model, x) == expected


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.parametrize(
    ("recipe", "gpu", "expected"),
    [
        (
            "rowwise",
            "H200",
            {f"fp8dist::scaled_grouped_{n}": 1 for n in ("mm", "mm_rows", "outer")},
        ),
        ("rowwise", "B200", {"aten::_scaled_grouped_mm": 3}),
        ("mxfp8_rceil", "B200", {"fp8dist::mx_grouped_mm": 2, "fp8dist::mx_grouped_outer": 1}),
        ("mxfp8_rceil", "", {"fp8dist::grouped_mm": 3}),
        (None, "", {"aten::_grouped_mm": 3}),
    ],
)
@pytest.mark.parametrize(("kind", "weights"), [(StackedExperts, 3), (FusedExperts, 2)])
def test_no_matmul_of_experts_is_done_twice(
    kind: type[nn.Module],
    weights: int,
    recipe: str | None,
    gpu: str,
    expected: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Grouped matmuls, each with two of its backward."""
    monkeypatch.setattr(hardware, "has_grouped_matmul", lambda device, recipe: bool(gpu))
    for ours in "multiplies_groups", "multiplies_in_gluon":
        monkeypatch.setattr(grouped, ours, lambda a: gpu == "H200")
    model = nn.Module()
    model.experts = kind()
    if recipe is not None:
        fp8dist.convert_moe_to_float8_training(model, config=recipe)
    x, tokens = torch.randn(EXPERTS * 32, DIM, requires_grad=True), torch.full((EXPERTS,), 32)
    with (
        torch.library._scoped_library("aten", "IMPL") as torchs,
        torch.library._scoped_library("fp8dist", "IMPL") as fp8dists,
    ):
        torchs.impl("_scaled_grouped_mm", zeros_of_groups, "CPU", allow_override=True)
        fp8dists.impl("scaled_grouped_mm", zeros_of_tokens, "CPU")
        fp8dists.impl("scaled_grouped_mm_rows", zeros_of_rows, "CPU")
        fp8dists.impl("scaled_grouped_outer", zeros_of_experts, "CPU")
        fp8dists.impl("mx_grouped_mm", zeros_of_tokens, "CPU")
        fp8dists.impl("mx_grouped_outer", zeros_of_experts, "CPU")
        found = matmuls_of(model.experts, x, tokens)
    assert {op: found[op] for op in expected} == {op: n * weights for op, n in expected.items()}
