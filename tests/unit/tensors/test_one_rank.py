"""`InPlaceReduceScatter` alone; under FSDP2 in tests/distributed/test_one_rank.py."""

from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

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
