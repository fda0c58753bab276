"""From what a step was observed to do: bytes by purpose, seconds, and the break-even."""

import math
from dataclasses import dataclass

from fp8dist.plan.observe import Collective
from fp8dist.plan.step import Observed

PURPOSES = {
    "weights": "gathered by FSDP",
    "gradients": "reduced by FSDP",
    "activations": "exchanged by tensor parallelism, and their gradients",
    "scales": "the all-reduce of amaxes after the optimizer",
    "rest": "the norm of gradients; loads of experts",
}


@dataclass(frozen=True)
class Machine:
    """Bytes per second: of a rank's link, of that to its tensor-parallel neighbours (None: the
    same), and of the device's memory in a pass that reads and writes.
    """

    link: float
    tp_link: float | None
    memory: float


def purpose(kind: Collective) -> str:
    """The entry of `PURPOSES` that a collective belongs to."""
    if kind.is_of_scales:
        return "scales"
    if kind.phase in ("forward", "backward") and kind.over == "tp":
        return "activations"
    if kind.phase in ("forward", "backward"):
        return "weights" if kind.operation == "all_gather" else "gradients"
    return "rest"


def sent_by_purpose(observed: Observed) -> dict[str, float]:
    """Bytes that a rank sends in a step, by `PURPOSES`."""
    sent = dict.fromkeys(PURPOSES, 0.0)
    for kind, handed in observed.handed.items():
        sent[purpose(kind)] += kind.sent(handed)
    return sent


@dataclass(frozen=True)
class Seconds:
    """A step's communication and casts, were none of it hidden behind computation.

    Attributes:
        link, tp_link: that bytes take on each link; the latter 0 where they are one.
        memory: that passes over the device's memory take.
    """

    link: float
    tp_link: float
    memory: float

    @property
    def total(self) -> float:
        return self.link + self.tp_link + self.memory


def seconds(observed: Observed, machine: Machine) -> Seconds:
    """What a step's communication and casts take on `machine`."""
    sent = {kind: kind.sent(handed) for kind, handed in observed.handed.items()}
    within = 0.0
    if machine.tp_link is not None:
        within = sum(bytes_ for kind, bytes_ in sent.items() if kind.over == "tp")
    return Seconds(
        (sum(sent.values()) - within) / machine.link,
        within / (machine.tp_link or math.inf),
        observed.passes.total / machine.memory,
    )


@dataclass(frozen=True)
class BreakEven:
    """The links, in bytes per second, on which communication and casts take less time than
    another's: those slower than `below` and faster than `above`.
    """

    above: float
    below: float

    def __str__(self) -> str:
        if self.above >= self.below:
            return "on no link"
        if self.above > 0:
            return f"above {self.above / 1e9:.3g} GB/s"
        return "on any link" if self.below == math.inf else f"below {self.below / 1e9:.3g} GB/s"


def break_even(observed: Observed, base: Observed, machine: Machine) -> BreakEven:
    """Where `observed` takes less time than `base`, by the link of a rank."""
    mine, other = seconds(observed, machine), seconds(base, machine)
    saved = (other.link - mine.link) * machine.link  # bytes
    added = mine.tp_link + mine.memory - other.tp_link - other.memory
    if saved > 0:
        return BreakEven(0.0, saved / added if added > 0 else math.inf)
    if added < 0:
        return BreakEven(saved / added, math.inf)
    return BreakEven(math.inf, math.inf)


def total_memory(observed: Observed) -> int:
    """Bytes that a rank needs without activations, which are an estimate."""
    return sum(observed.memory.values()) - observed.memory["activations"]
