"""Activations that wait for backward in host memory."""

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from tests.unit.bench.program import load_program

offload = load_program("offload")
STEPS = 60
SIZE = offload.SMALLEST
"""Bytes of every tensor of a chain."""


def start() -> torch.Tensor:
    return torch.linspace(-3, 3, SIZE // 2, device=offload.DEVICE).bfloat16().requires_grad_()


def chain(keep: Any, x: torch.Tensor, steps: int) -> tuple[torch.Tensor, list[StorageWeakRef]]:
    """What comes out at the end of steps that each save what they take, and what they took."""
    memory = []
    with keep.forward():
        for _ in range(steps):
            memory.append(StorageWeakRef(x.untyped_storage()))
            x = x.sin() * 1.5
    return x, memory


@pytest.mark.parametrize("tensors", [0, 1, 10, STEPS])
def test_the_first_are_freed_and_the_gradient_is_the_same(tensors: int) -> None:
    """In every step anew."""
    keep = offload.Offload(tensors * SIZE + SIZE // 2)
    x = start()
    y = x
    for _ in range(STEPS):
        y = y.sin() * 1.5
    (expected,) = torch.autograd.grad(y.sum(), x)
    del y
    for _ in range(2):
        y, memory = chain(keep, x, STEPS)
        # The first is x, which is not freed.
        assert [ref.expired() for ref in memory[1:]] == [i < tensors for i in range(1, STEPS)]
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient.equal(expected)


def tensor_of(value: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.full((SIZE // dtype.itemsize,), value, dtype=dtype, device=offload.DEVICE)


def test_they_come_back_ahead_of_their_use_and_leave_host_memory_after_it() -> None:
    keep = offload.Offload(STEPS * SIZE)
    with keep.forward():
        all_saved = [keep._pack(tensor_of(i)) for i in range(STEPS)]
    assert all(saved.on_device is None for saved in all_saved)
    for i, saved in reversed(list(enumerate(all_saved))):
        assert keep._unpack(saved).equal(tensor_of(i))
        assert len(keep._away) == max(0, i - offload.AHEAD)
        assert saved.on_host is None and saved.on_device is None


def test_what_stays() -> None:
    keep = offload.Offload(STEPS * SIZE)
    weight = nn.Parameter(tensor_of(1).view(2, -1))
    with keep.forward():
        for tensor in (tensor_of(1, torch.float32), tensor_of(1)[1:], weight, weight.t()):
            assert keep._pack(tensor) is tensor
        gaps = torch.cat([tensor_of(1), tensor_of(2)])[::2]
        assert keep._pack(gaps).on_device is gaps
        transposed = keep._pack(tensor_of(1).view(2, -1).t())
    assert keep._away == [transposed]
    assert transposed.on_host.stride() == (1, SIZE // 4)


class Streams:
    """In the place of a device's streams: writes down which waits for what."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []

    def stream_of(self, name: str) -> mock.Mock:
        def record_event() -> str:
            self.calls.append((name, "records"))
            return f"event {len(self.calls)}"

        return mock.Mock(
            wait_stream=lambda other: self.calls.append((name, "waits for", "stream")),
            wait_event=lambda event: self.calls.append((name, "waits for", event)),
            record_event=record_event,
        )


def test_streams_wait_for_each_other() -> None:
    """See [Note: activations in host memory]: copies for what is computed, and that for copies."""
    streams = Streams()
    keep = offload.Offload(SIZE)
    computing, keep._stream = streams.stream_of("computing"), streams.stream_of("copies")
    keep._module = mock.Mock(current_stream=lambda: computing, stream=lambda _: nullcontext())
    there = ("copies", "waits for", "stream"), ("copies", "records")
    with keep.forward():
        saved = keep._pack(tensor_of(1))
        assert streams.calls == [*there]
        assert saved.on_device is not None
    assert streams.calls == [*there, ("computing", "waits for", "event 2")]
    keep._unpack(saved)
    back = [*there, ("computing", "waits for", "event 5")]
    assert streams.calls[3:] == back


def test_a_second_backward_is_an_error() -> None:
    keep = offload.Offload(SIZE)
    x = start()
    y, _ = chain(keep, x, 2)
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    with pytest.raises(AssertionError, match="asked for twice"):
        torch.autograd.grad(y.sum(), x)
