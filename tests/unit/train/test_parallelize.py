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
from fp8dist.train.parallelize import KEPT_OPS


class Matmuls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "mm" in func.name():
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def zeros(a: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.zeros(a.size(0), b.size(1), dtype=torch.bfloat16)


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
    # A CPU multiplies no rows in torch 2.11.
    kernel = torch.library.Library("aten", "IMPL")
    kernel.impl("_scaled_mm", zeros, "CPU", allow_override=True)
    layers = [nn.Linear(128, 128, bias=False, dtype=torch.bfloat16) for _ in range(2)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    if recipe is not None:
        model = fp8dist.convert_to_float8_training(model, config=recipe)
    x = torch.randn(32, 128, dtype=torch.bfloat16, requires_grad=True)
    contexts = functools.partial(create_selective_checkpoint_contexts, list(KEPT_OPS))
    with Matmuls() as matmuls:
        checkpoint(model, x, use_reentrant=False, context_fn=contexts).sum().backward()
    assert matmuls.counts == expected
