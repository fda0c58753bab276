"""How many operators are called, without the kernels."""

from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from fp8dist import kernels


class Calls(TorchDispatchMode):
    """Counts the operators that are called within."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def leave_out_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made ready for weights does nothing: on a CPU it calls operators for each of them."""
    for name in ("prepare_fill_amaxes", "prepare_cast_into", "prepare_pack_into"):
        monkeypatch.setattr(kernels, name, lambda parts: kernels.Prepared(parts, []))
