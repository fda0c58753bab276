"""`InPlaceReduceScatter` alone; under FSDP2 in tests/distributed/test_one_rank.py."""

from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_collectives import foreach_reduce_scatter_copy_in
from torch.utils._python_dispatch import TorchDispatchMode

from fp8dist.tensors.one_rank import InPlaceReduceScatter


@dataclass
class Gradient:
    """What is called of a gradient that lies on a device."""

    device: torch.device = torch.device("cuda")
    recorded: list[Any] = field(default_factory=list)

    @property
    def _local_tensor(self) -> "Gradient":
        return self

    def record_stream(self, stream: Any) -> None:
        self.recorded.append(stream)


class Group:
    """Of parameters, whose gradients FSDP2 reduces as they are."""

    def __init__(self, *earlier: Gradient | None) -> None:
        self._orig_dtype, self.gradient_divide_factor = torch.float32, None
        self._all_reduce_hook = None
        self.comm_ctx = mock.Mock(reduce_scatter_stream="reductions")
        self.fsdp_params = [
            mock.Mock(
                offload_to_cpu=False,
                sharded_param=mock.Mock(grad=gradient, _post_accumulate_grad_hooks=None),
            )
            for gradient in earlier
        ]
        self.comm: Any = InPlaceReduceScatter(self)

    def allocate(self, size: int, stream: str) -> torch.Tensor:
        self.comm_ctx.device_handle.current_stream.return_value = stream
        tensor: torch.Tensor = self.comm.allocate(
            (size,), dtype=torch.float32, device=torch.device("cpu")
        )
        assert tensor.shape == (size,)
        return tensor


def test_reductions_share_memory_with_the_last_before_them_of_that_size_only() -> None:
    group = Group(None)
    buffers = [
        group.allocate(size, stream)
        for size, stream in [
            (4, "reductions"),
            (4, "backward"),
            (4, "backward"),
            (4, "reductions"),
            (4, "reductions"),
            (5, "backward"),
            (4, "reductions"),
        ]
    ]
    places = [buffer.data_ptr() for buffer in buffers]
    assert [places.index(place) for place in places] == [0, 1, 2, 2, 4, 5, 6]


def test_gradients_that_are_added_to_are_recorded_as_used() -> None:
    """Else a hook that frees one gives memory away that the stream of reductions is writing to."""
    earlier = [Gradient(), Gradient(torch.device("cpu"))]
    group = Group(*earlier, None)
    laid_out = group.allocate(4, "backward")
    assert [gradient.recorded for gradient in earlier] == [[], []]
    assert group.allocate(4, "reductions").data_ptr() != laid_out.data_ptr()
    assert [gradient.recorded for gradient in earlier] == [["reductions"], []]


class Calls(TorchDispatchMode):
    """The names of ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def odd_gradients() -> list[torch.Tensor]:
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    return [
        numbers.view(256, 256),
        numbers.view(64, 1024).t(),
        numbers[1:8],
        numbers[:0].view(0, 3),
        numbers.view(128, 512)[::3, 1::2],
    ]


def test_gradients_are_laid_out_one_by_one_and_not_copied_again() -> None:
    gradients = odd_gradients()
    expected = torch.cat([gradient.flatten() for gradient in gradients]).float()
    group = Group(None)
    laid_out = group.allocate(expected.numel(), "backward").fill_(7)
    with Calls() as calls:
        foreach_reduce_scatter_copy_in(gradients, laid_out, 1)
        reduced = group.allocate(expected.numel(), "reductions")
        reduced.copy_(laid_out)
    assert type(reduced) is torch.Tensor
    assert torch.equal(reduced.view(torch.int32), expected.view(torch.int32))
    copies = [name for name in calls.names if "copy" in name or "cat" in name]
    assert copies == ["aten::_foreach_copy_"]


def test_gradients_that_are_copied_after_all() -> None:
    group = Group(None)
    laid_out = group.allocate(2, "backward")
    foreach_reduce_scatter_copy_in([torch.tensor([3.0, 5.0])], laid_out, 1)
    elsewhere = torch.zeros(2)
    elsewhere.copy_(laid_out / 2)
    assert elsewhere.tolist() == [1.5, 2.5]
    assert elsewhere.copy_(laid_out).tolist() == [3.0, 5.0]


def test_chunks_of_more_ranks_are_refused() -> None:
    laid_out = Group(None).allocate(4, "backward")
    with pytest.raises(AssertionError, match="cut into 2 chunks"):
        foreach_reduce_scatter_copy_in([torch.zeros(4)], laid_out, 2)
