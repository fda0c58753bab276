"""Counting the bytes that FSDP's all-gathers move."""

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule

# torch 2.13 renamed the collective and warns about the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class CountingAllGather:
    """FSDP's own all-gather, adding up what it puts out.

    `bytes` is the size of everything gathered so far, this rank's own part included. FSDP does
    not call it for a single shard, so one rank counts 0.
    """

    def __init__(self) -> None:
        self.bytes = 0

    def allocate(
        self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """The buffer FSDP gathers into."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Gather input_tensor of every rank of `group` into output_tensor, and count it."""
        self.bytes += output_tensor.numel() * output_tensor.element_size()
        return _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


def count_all_gathers(model: nn.Module) -> CountingAllGather:
    """Make every FSDP module inside `model` gather through one counter, and return it."""
    counter = CountingAllGather()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The type it names is private; what it needs are the two methods above.
            module.set_custom_all_gather(counter)  # type: ignore[arg-type]
    return counter
