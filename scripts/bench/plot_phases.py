"""Draw what an unshard's time is made of, from what bench_all_gather.py wrote with --json.

    python scripts/bench/plot_phases.py outputs/all_gather.json outputs/phases.png

A panel for each size of weight, a bar for each variant; precompute, which a step does once, is
shared out over the step's unshards.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from harness import describe
from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart; what a rank does alone is in blues.
PHASES = {
    "precompute": "#0072b2",
    "cast": "#56b4e9",
    "copy_in": "#bbbbbb",
    "collective": "#e69f00",
    "copy_out": "#666666",
}
COLUMNS = 2


def phases(row: dict[str, Any], unshards: int) -> dict[str, float]:
    """Microseconds of each phase of an unshard; they add up to the row's `per_unshard`."""
    shares = {"precompute": unshards}
    return {name: row[name] / shares.get(name, 1) * 1e6 for name in PHASES}


def draw(report: dict[str, Any]) -> Figure:
    """The picture of a report of bench_all_gather.py."""
    sizes = list(dict.fromkeys((row["n"], row["k"]) for row in report["rows"]))
    variants = list(dict.fromkeys(row["variant"] for row in report["rows"]))
    columns = min(COLUMNS, len(sizes))
    lines = -(-len(sizes) // columns)
    figure = Figure(figsize=(9, 1.6 + lines * (0.9 + 0.42 * len(variants))), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for axes, (n, k) in zip(panels, sizes, strict=False):
        rows = [row for row in report["rows"] if (row["n"], row["k"]) == (n, k)]
        bf16 = rows[0]["per_unshard"]
        longest = max(row["per_unshard"] for row in rows) * 1e6
        for row in rows:
            left = 0.0
            for name, width in phases(row, report["arguments"]["unshards"]).items():
                color = PHASES[name]
                axes.barh(row["variant"], width, left=left, height=0.7, color=color, label=name)
                left += width
            share = f" ({row['per_unshard'] / bf16:.2f})" if row is not rows[0] else ""
            axes.text(left + longest / 80, row["variant"], f"{left:.0f}{share}", va="center")
        axes.set_xlim(0, (1.15 + 0.2 * columns) * longest)
        axes.set_xlabel("µs per unshard (share of bf16's)")
        axes.set_title(f"{n} x {k}: {2 * n * k / 1e6:.1f} MB in bfloat16", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(sizes) :]:
        axes.set_visible(False)
    first = figure.axes[0]
    first.invert_yaxis()  # shared by all panels
    handles, names = first.get_legend_handles_labels()
    labels = [name.replace("_", "-") for name in names[: len(PHASES)]]
    figure.legend(handles[: len(PHASES)], labels, loc="outside lower center", ncols=5)
    facts = describe(report).split(" · ")
    figure.suptitle(f"An unshard · {' · '.join(facts[:2])}\n{' · '.join(facts[2:])}", fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="written by bench_all_gather.py --json")
    parser.add_argument("png", type=Path, help="is written")
    options = parser.parse_args()
    options.png.parent.mkdir(parents=True, exist_ok=True)
    draw(json.loads(options.json.read_text(encoding="utf-8"))).savefig(options.png, dpi=110)


if __name__ == "__main__":
    main()
