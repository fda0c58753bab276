"""From which message, up to which link, gathering in float8 is a net win over bfloat16.

A weight of E elements costs a variant `fixed + slope * E` seconds on the device for each unshard,
and a link of B bytes per second `bytes * E / B` for what a rank receives. Float8 is a net win where
what it adds on the device is less than what it saves on the link.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness import markdown_table

LINKS = (1e9, 5e9, 25e9, 50e9, 100e9, 200e9, 400e9)  # bytes per second


@dataclass(frozen=True)
class Line:
    """y = fixed + slope * x."""

    fixed: float
    slope: float

    @classmethod
    def fit(cls, xs: Sequence[float], ys: Sequence[float]) -> "Line":
        """Least squares of the relative error, so that small messages count as much as large."""
        weights = [1 / y**2 for y in ys]
        total = sum(weights)
        mean_x = sum(w * x for w, x in zip(weights, xs, strict=True)) / total
        mean_y = sum(w * y for w, y in zip(weights, ys, strict=True)) / total
        points = list(zip(weights, xs, ys, strict=True))
        covariance = sum(w * (x - mean_x) * (y - mean_y) for w, x, y in points)
        slope = covariance / sum(w * (x - mean_x) ** 2 for w, x, _ in points)
        return cls(mean_y - slope * mean_x, slope)


@dataclass(frozen=True)
class Gain:
    """What float8 adds on the device and saves on the link, against bfloat16.

    Args:
        added: seconds per unshard, over elements.
        saved_bytes: per element, of what a rank receives.
    """

    added: Line
    saved_bytes: float

    @property
    def fastest_link(self) -> float:
        """Bytes per second up to which large messages are a net win."""
        return self.saved_bytes / self.added.slope if self.added.slope > 0 else math.inf

    def elements(self, link: float) -> tuple[float, float]:
        """The numbers of elements between which float8 is a net win on a link."""
        won = self.saved_bytes / link - self.added.slope
        if won > 0:
            return max(0.0, self.added.fixed / won), math.inf
        if self.added.fixed < 0:
            return 0.0, self.added.fixed / won if won < 0 else math.inf
        return math.inf, math.inf


def link_of(rows: Sequence[Any]) -> float:
    """Bytes per second, from the collectives of all rows, less what each takes to begin."""
    seconds_per_byte = Line.fit(
        [row.collective_bytes for row in rows], [row.collective for row in rows]
    ).slope
    return 1 / seconds_per_byte if seconds_per_byte > 0 else math.inf


def gains(rows: Sequence[Any]) -> dict[str, Gain]:
    """By variant, against the first row's; rows of at least two sizes each."""
    by_variant: dict[str, list[Any]] = {}
    for row in rows:
        by_variant.setdefault(row.variant, []).append(row)
    lines = {
        name: Line.fit([row.n * row.k for row in group], [row.on_device for row in group])
        for name, group in by_variant.items()
        if len(group) > 1
    }
    received = {
        name: group[-1].collective_bytes / (group[-1].n * group[-1].k)
        for name, group in by_variant.items()
    }
    first, *others = lines
    return {
        name: Gain(
            Line(lines[name].fixed - lines[first].fixed, lines[name].slope - lines[first].slope),
            received[first] - received[name],
        )
        for name in others
    }


def break_even_table(rows: Sequence[Any]) -> str:
    """For each variant the messages for which it is a net win, on the link that was measured and
    on others, and the fastest link on which large ones are.
    """
    measured = link_of(rows)
    links = [measured, *LINKS]
    header = [
        "net win for messages (MB in bfloat16)",
        f"here, {measured / 1e9:.2f} GB/s",
        *(f"{link / 1e9:.0f} GB/s" for link in LINKS),
        "large ones up to",
    ]
    table = []
    for name, gain in gains(rows).items():
        fastest = gain.fastest_link
        table.append(
            [
                name,
                *(messages(*gain.elements(link)) for link in links),
                "any link" if fastest == math.inf else f"{fastest / 1e9:.1f} GB/s",
            ]
        )
    return markdown_table(header, table)


def messages(smallest: float, largest: float) -> str:
    if smallest == math.inf:
        return "none"
    if smallest == 0 and largest == math.inf:
        return "all"
    if largest < math.inf:
        return f"to {2 * largest / 1e6:.2f}"
    return f"from {2 * smallest / 1e6:.2f}"
