"""`Finite`: whether weights are finite; the first that is not is named once."""

import bisect
import logging

import torch
from torch._subclasses.fake_tensor import FakeTensor

logger = logging.getLogger("fp8dist")


class Finite:
    """The first weight of one pass that is not finite, on its way from the device."""

    def __init__(self, fqns: list[str], amaxes: torch.Tensor, ends: list[int]) -> None:
        self.fqns, self.ends = fqns, ends
        bad = ~amaxes.isfinite()
        # (whether there is one, the index of the first)
        self.found = torch.stack([bad.any().int(), bad.int().argmax().int()]).to(
            "cpu", non_blocking=True
        )
        self.event = torch.Event(amaxes.device.type) if amaxes.device.type != "cpu" else None
        if self.event is not None:
            self.event.record()

    def arrived(self) -> bool:
        return self.event is None or self.event.query()

    def first_bad(self) -> str | None:
        found, index = self.found.tolist()
        return self.fqns[bisect.bisect_right(self.ends, index)] if found else None


_reported = False


def was_reported() -> bool:
    """Whether one was named, which is the only one."""
    return _reported


def report(
    fqns: list[str], amaxes: torch.Tensor, ends: list[int], last: Finite | None
) -> Finite | None:
    """Name the first weight with a NaN or Inf, once, without waiting for the device.

    On an accelerator the answer is read one call later. The values go on as they are: the
    scale of such a weight makes its elements NaN, and the loss shows it. Fake tensors have none.

    Args:
        fqns: of the weights.
        amaxes: 1-D, of weights' elements, or what is not finite where they are not.
        ends: for each weight, where its amaxes end in `amaxes`.
        last: what the last call for these weights returned.

    Returns:
        What the next call is to be given.
    """
    global _reported
    if _reported or amaxes.numel() == 0 or isinstance(amaxes, FakeTensor):
        return None
    if last is not None and not last.arrived():
        return last
    now = Finite(fqns, amaxes, ends)
    known = now if now.event is None else last
    if known is not None and (fqn := known.first_bad()) is not None:
        _reported = True
        logger.warning("%s has a NaN or Inf in its weight; training goes on with it", fqn)
    return now
