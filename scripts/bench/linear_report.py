"""What bench_linear.py has measured: as heat maps, and as the sizes that are too small to gain."""

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from fp8dist.small_kn import Thresholds

# A row of bench_linear.py: gpu, torch, date, m, n, k, variant, speedup.
Rows = Sequence[Any]
# (K, N) -> the median speed-up over all M.
Speedups = dict[tuple[int, int], float]


def draw(rows: Rows, path: Path) -> None:
    """A heat map of the speed-ups of one variant, a panel per M."""
    ms, ns, ks = (sorted({getattr(row, name) for row in rows}) for name in "mnk")
    width = 1.5 + len(ms) * max(3.0, 0.85 * len(ks) + 0.8)
    figure = Figure(figsize=(width, max(3.0, 0.6 * len(ns) + 1.8)), layout="constrained")
    panels = figure.subplots(1, len(ms), squeeze=False)[0]
    colors = mpl.colormaps["RdBu"].with_extremes(bad="lightgray")
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.4, vmax=1.6)
    for m, panel in zip(ms, panels, strict=True):
        speedups = {(row.n, row.k): row.speedup for row in rows if row.m == m}
        grid = [[speedups.get((n, k), math.nan) for k in ks] for n in ns]
        image = panel.imshow(grid, cmap=colors, norm=norm, origin="lower", aspect="auto")
        for y, line in enumerate(grid):
            for x, speedup in enumerate(line):
                if not math.isnan(speedup):
                    # White on the dark ends of the colours.
                    color = "black" if 0.6 < speedup < 1.4 else "white"
                    panel.text(x, y, f"{speedup:.2f}", ha="center", va="center", color=color)
        panel.set_xticks(range(len(ks)), [str(k) for k in ks])
        panel.set_yticks(range(len(ns)), [str(n) for n in ns])
        panel.set(title=f"M {m}", xlabel="K", ylabel="N")
    figure.colorbar(image, ax=list(panels), label="speed-up over bfloat16", extend="both")
    first = rows[0]
    figure.suptitle(
        f"{first.variant}: layer norm, linear, sigmoid, forward and backward\n"
        f"{first.gpu}, torch {first.torch}, {first.date}",
        fontsize="medium",
    )
    figure.savefig(path, dpi=100)


def too_small(speedups: Speedups) -> tuple[tuple[float, float], ...]:
    """The largest boxes of (K, N) in which nothing gains.

    A box reaches from the smallest sizes to its (K, N); at the largest size that was measured it
    is taken to go on.
    """
    ks, ns = (sorted({size[axis] for size in speedups}) for axis in (0, 1))

    def all_slow(k: int, n: int) -> bool:
        return all(
            speedups.get((other_k, other_n), math.inf) < 1
            for other_k in ks
            for other_n in ns
            if other_k <= k and other_n <= n
        )

    slow = [(k, n) for k in ks for n in ns if all_slow(k, n)]
    largest = [
        (k, n) for k, n in slow if not any((k, n) != (a, b) and k <= a and n <= b for a, b in slow)
    ]
    return tuple(
        (math.inf if k == ks[-1] else k, math.inf if n == ns[-1] else n) for k, n in largest
    )


def implied_thresholds(rows: Rows) -> dict[str, dict[str, tuple[Thresholds, Speedups]]]:
    """GPU -> recipe -> thresholds, and the sizes outside them that were slower than bfloat16.

    They are taken from weights that arrived in float8, the median over M.
    """
    groups: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        if match := re.fullmatch(r"fp8dist:(\w+)", row.variant):
            groups.setdefault((row.gpu, match[1]), []).append(row)
    found: dict[str, dict[str, tuple[Thresholds, Speedups]]] = {}
    for (gpu, recipe), group in groups.items():
        sizes = {(row.k, row.n) for row in group}
        speedups = {
            size: statistics.median(row.speedup for row in group if (row.k, row.n) == size)
            for size in sizes
        }
        ms = "/".join(str(m) for m in sorted({row.m for row in group}))
        source = f"scripts/bench/bench_linear.py, M {ms}, torch {group[0].torch}, {group[0].date}"
        thresholds = Thresholds(too_small(speedups), source)
        outside = {
            size: speedup
            for size, speedup in speedups.items()
            if speedup < 1 and not thresholds.too_small(*size)
        }
        found.setdefault(gpu, {})[recipe] = (thresholds, outside)
    return found


def print_thresholds(rows: Rows) -> None:
    """Print what rows imply as entries of `fp8dist.small_kn.THRESHOLDS`."""
    for gpu, recipes in implied_thresholds(rows).items():
        print(f'    "{gpu}": {{')
        for recipe, (thresholds, outside) in recipes.items():
            for (k, n), speedup in sorted(outside.items()):
                print(f"        # in no box, yet slower: K {k}, N {n} (x{speedup:.2f})")
            boxes = ", ".join(f"({_size(k)}, {_size(n)})" for k, n in thresholds.boxes)
            print(f'        "{recipe}": Thresholds(')
            print(f"            ({boxes}{',' if len(thresholds.boxes) == 1 else ''}),")
            print(f'            "{thresholds.source}",')
            print("        ),")
        print("    },")


def _size(size: float) -> str:
    return "ANY" if size == math.inf else str(size)
