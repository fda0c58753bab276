"""What tests of `WeightState` share: warnings from anew, and how often amaxes are computed."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fp8dist.precompute import ScalePass
from fp8dist.tensors import finite, weight_state


@pytest.fixture
def say_it_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Warnings that are given once per process are given once per test."""
    monkeypatch.setattr(finite, "_reported", False)
    monkeypatch.setattr(weight_state, "_warned_stale", False)
    yield


@pytest.fixture
def amaxes_computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each pass over the shards has covered."""
    calls: list[int] = []
    run = ScalePass.run

    def counting(scale_pass: ScalePass, *args: Any) -> torch.Tensor:
        calls.append(len(scale_pass.shards))
        return run(scale_pass, *args)

    monkeypatch.setattr(ScalePass, "run", counting)
    return calls
