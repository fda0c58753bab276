"""`Offload`: the first activations of a forward, in host memory until backward comes near them."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from harness import CUDA, DEVICE
from torch.autograd.graph import saved_tensors_hooks

# Smaller ones are not worth a copy of their own.
SMALLEST = 2**24 if CUDA else 2**10
# By how many saved tensors, those of two and a half compiled layers of Llama's, a copy back
# precedes its use.
AHEAD = 20

# [Note: activations in host memory]
# torch's `save_on_cpu` has the device wait for every copy. Here a stream of their own makes them
# while later layers run, which needs an order between it and the stream that computes:
# - A tensor is freed when the forward has ended, after the computing stream was told to wait for
#   its copy: what is allocated there next may be written only then.
# - Tensors to copy back to are allocated by the computing stream, and copied to when what it had
#   been given until then is done, as their memory may still be in use by that.
# Host memory is torch's, which knows what was copied there and gives it away no earlier.


@dataclass
class _Saved:
    """A saved tensor, on the device or in host memory."""

    index: int  # in forward's order
    on_device: torch.Tensor | None
    on_host: torch.Tensor | None = None
    copied: Any = None  # an event, of the last copy


def _is_activation(tensor: torch.Tensor) -> bool:
    """Not a view of a weight, which FSDP2 frees, nor one in float8, which calls itself bfloat16."""
    of_parameter = isinstance(tensor._base, torch.nn.Parameter)
    return type(tensor) is torch.Tensor and tensor.dtype == torch.bfloat16 and not of_parameter


class Offload:
    """Keeps the first activations in host memory, see [Note: activations in host memory].

    For layers whose weights are saved in float8: of others not every one can be told from an
    activation. What is saved twice, as by layers that are not compiled, is copied twice.

    Args:
        size: bytes, that the activations have at most.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._module = torch.get_device_module(DEVICE)
        self._stream = self._module.Stream()
        self._reset()

    def _reset(self) -> None:
        self._left = self._size
        self._count = 0
        self._away: list[_Saved] = []  # in host memory alone, in forward's order

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward. Before the next its backward must run, once, and ask for all it saved:
        what has been brought back for nothing might be freed while it is written.
        """
        self._reset()
        with saved_tensors_hooks(self._pack, self._unpack):
            yield
        for saved in self._away:
            self._module.current_stream().wait_event(saved.copied)
            saved.on_device = None

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Saved:
        if not _is_activation(tensor) or tensor.nbytes < SMALLEST:
            return tensor
        saved = _Saved(self._count, tensor)
        self._count += 1
        # Of what has gaps the memory is others', too, and would not be freed.
        if tensor.nbytes <= self._left and torch.ops.aten.is_non_overlapping_and_dense(tensor):
            self._left -= tensor.nbytes
            self._stream.wait_stream(self._module.current_stream())
            with self._module.stream(self._stream):
                saved.on_host = torch.empty_like(tensor, device="cpu", pin_memory=CUDA)
                saved.on_host.copy_(tensor, non_blocking=True)
                saved.copied = self._stream.record_event()
            self._away.append(saved)
        return saved

    def _unpack(self, saved: torch.Tensor | _Saved) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        while self._away and self._away[-1].index >= saved.index - AHEAD:
            self._bring_back(self._away.pop())
        if saved.on_host is not None:
            self._module.current_stream().wait_event(saved.copied)
            saved.on_host = None
        tensor, saved.on_device = saved.on_device, None
        if tensor is None:
            raise AssertionError(f"activation {saved.index} is asked for twice")
        return tensor

    def _bring_back(self, saved: _Saved) -> None:
        """Have the copy made; `copied` is when it is there."""
        saved.on_device = torch.empty_like(saved.on_host, device=DEVICE)
        self._stream.wait_stream(self._module.current_stream())
        with self._module.stream(self._stream):
            saved.on_device.copy_(saved.on_host, non_blocking=True)
            saved.copied = self._stream.record_event()
