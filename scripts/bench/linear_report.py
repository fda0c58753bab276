"""What bench_linear.py has measured: as heat maps, as a table, and as sizes too small to gain."""

import math
import re
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from harness import markdown_table
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from fp8dist.small_kn import Thresholds

# A row of bench_linear.py: gpu, torch, date, m, n, k, variant, speedup.
Rows = Sequence[Any]
# By two sizes. Those of thresholds: (K, N) -> the median speed-up over all M.
Speedups = dict[tuple[int, int], float]

# One scale for all pictures.
COLORS = mpl.colormaps["RdBu"].with_extremes(bad="lightgray")
NORM = TwoSlopeNorm(vcenter=1.0, vmin=0.4, vmax=1.6)


def draw(rows: Rows) -> Figure:
    """Heat maps of the speed-ups: a line of panels per variant but bf16, a panel per M.

    A size that was not measured is grey.
    """
    variants = [name for name in dict.fromkeys(row.variant for row in rows) if name != "bf16"]
    ms, ns, ks = (sorted({getattr(row, name) for row in rows}) for name in "mnk")
    width = 1.2 + len(ms) * max(2.9, 0.55 * len(ks))
    height = 1.0 + len(variants) * max(1.2, 0.3 + 0.25 * len(ns))
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.03, w_pad=0.03)
    lines = figure.subplots(len(variants), len(ms), squeeze=False, sharex=True, sharey=True)
    for variant, line in zip(variants, lines, strict=True):
        for m, panel in zip(ms, line, strict=True):
            of_panel = [row for row in rows if (row.variant, row.m) == (variant, m)]
            image = _heat_map({(row.n, row.k): row.speedup for row in of_panel}, ns, ks, panel)
            panel.set_title(f"{variant}, M {m}", fontsize="small")
    for panel in lines[-1]:
        panel.set_xlabel("K")
    for panel in lines[:, 0]:
        panel.set_ylabel("N")
    # Two facts of a kind are of files that were put together.
    gpus, torches, torchaos, dates = (
        " and ".join(dict.fromkeys(getattr(row, name) for row in rows))
        for name in ("gpu", "torch", "torchao", "date")
    )
    label = "speed-up over bfloat16"
    figure.colorbar(image, ax=lines, label=label, extend="both", extendfrac=0.02, aspect=50)
    figure.suptitle(
        "layer norm, linear, sigmoid: speed-up of forward and backward over bfloat16\n"
        f"{gpus} · torch {torches} · torchao {torchaos} · {dates}",
        fontsize="medium",
    )
    return figure


def _heat_map(speedups: Speedups, ns: Sequence[int], ks: Sequence[int], panel: Any) -> Any:
    """Fill a panel; speedups by (N, K). Returns the image, for the figure's one colour bar."""
    grid = [[speedups.get((n, k), math.nan) for k in ks] for n in ns]
    image = panel.imshow(grid, cmap=COLORS, norm=NORM, origin="lower", aspect="auto")
    for y, line in enumerate(grid):
        for x, speedup in enumerate(line):
            if not math.isnan(speedup):
                # White on the dark ends of the colours.
                color = "black" if 0.65 < speedup < 1.37 else "white"
                panel.text(x, y, f"{speedup:.2f}", ha="center", va="center", color=color)
    panel.set_xticks(range(len(ks)), [str(k) for k in ks])
    panel.set_yticks(range(len(ns)), [str(n) for n in ns])
    return image


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


def print_summary(rows: Rows) -> None:
    """Print a Markdown table: the median speed-up of each variant, and how many sizes gain."""
    ms = sorted({row.m for row in rows})
    lines = []
    for variant in dict.fromkeys(row.variant for row in rows):
        cells = [variant]
        for m in ms:
            speedups = [row.speedup for row in rows if (row.variant, row.m) == (variant, m)]
            if variant == "bf16" or not speedups:
                cells.append(f"{len(speedups)} sizes")
                continue
            gain = sum(speedup > 1 for speedup in speedups)
            cells.append(f"{statistics.median(speedups):.2f} ({gain} of {len(speedups)} gain)")
        lines.append(cells)
    print(markdown_table(["variant", *(f"M {m}" for m in ms)], lines))


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
