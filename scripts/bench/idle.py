"""How long a GPU does nothing, from a profile."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from harness import synchronize
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

LONG_GAP = 10e-6


@dataclass(frozen=True)
class Idle:
    """In how much of some time a GPU does nothing, in seconds, and how much of that is in gaps of
    more than `LONG_GAP`.
    """

    idle: float
    in_long_gaps: float
    time: float

    def __str__(self) -> str:
        milliseconds = [1e3 * x for x in (self.idle, self.time, self.in_long_gaps)]
        return "{:.2f} ms of {:.1f}, {:.2f} in long gaps".format(*milliseconds)


class Event(NamedTuple):
    """Of a profile: a kernel, copy or fill, or what the host did, from when to when, in seconds."""

    name: str
    on_device: bool
    start: float
    end: float


def idle_between(spans: Iterable[tuple[float, float]], start: float, end: float) -> Idle:
    """Between two points in time, of kernels that begin and end at `spans`; all in seconds."""
    gaps, busy_until = [], start
    for begin, finish in sorted(spans):
        if begin < end and finish > busy_until:
            gaps.append(begin - busy_until)
            busy_until = finish
    gaps = [gap for gap in [*gaps, end - busy_until] if gap > 0]
    return Idle(sum(gaps), sum(gap for gap in gaps if gap > LONG_GAP), end - start)


def idle_of_calls(events: Iterable[Event]) -> tuple[Idle, Idle]:
    """What `idle_of` returns, of a profile of four calls. The device was waited for before and
    after the second, and after the last; the first does not count. The last two have as many
    kernels each, and the second no fewer. (It had seven more of 971 once, and no cause was found.)
    """
    events = list(events)
    waits = sorted(event.end for event in events if event.name == "cudaDeviceSynchronize")
    start, end = waits[:2]
    kernels = sorted((x.start, x.end) for x in events if x.on_device and x.start >= start)
    waited = [kernel for kernel in kernels if kernel[1] <= end]
    others = kernels[len(waited) :]
    of_one, left = divmod(len(others), 2)
    if left or not 0 < of_one <= len(waited):
        raise AssertionError(f"{len(waited)} kernels of one call, {len(others)} of two")
    ends = [max(end for _, end in part) for part in (others[:of_one], others)]
    return idle_between(waited, start, end), idle_between(others, *ends)


def idle_of(function: Callable[[], object]) -> tuple[Idle, Idle]:
    """Of a call on a GPU that nothing was queued on, until the host has waited for it; and of one
    that follows another, which the host launches while the GPU is at that, from end to end.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()  # while the profiler starts up
        synchronize()
        function()
        synchronize()
        function()
        function()
        synchronize()
    return idle_of_calls(
        Event(
            event.name,
            # What a name was given to spans the gaps between its kernels.
            event.device_type == DeviceType.CUDA and not event.is_user_annotation,
            event.time_range.start / 1e6,
            event.time_range.end / 1e6,
        )
        for event in profiler.events()
    )
