"""The bytes of each recipe as bars."""

from pathlib import Path

from fp8dist.plan.figures import PURPOSES, sent_by_purpose
from fp8dist.plan.report import Plan
from fp8dist.train.metrics import readable_bytes

COLORS = dict(zip(PURPOSES, ("#3b6fb6", "#a8b8cc", "#e0a03a", "#b5402f", "#777777"), strict=True))


def plot(plan: Plan, path: Path) -> None:
    """Draw what a rank sends per step, by variant and purpose, into one PNG at `path`.

    Raises:
        ValueError: the matplotlib package is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the picture needs a package: pip install matplotlib") from error

    names = list(plan.variants)
    sent = [sent_by_purpose(observed) for observed in plan.variants.values()]
    totals = [sum(of_variant.values()) for of_variant in sent]
    figure = Figure(figsize=(9, 1.6 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    unit, size = ("GB", 1e9) if max(totals) >= 1e9 else ("MB", 1e6)
    left = [0.0] * len(names)
    for purpose in PURPOSES:
        widths = [of_variant[purpose] / size for of_variant in sent]
        # What is too thin to be seen needs no entry in the legend.
        if max(widths) * size > 0.002 * max(totals):
            axes.barh(names, widths, left=left, color=COLORS[purpose], label=purpose, height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for index, total in enumerate(totals):
        share = f" ({total / totals[0]:.2f} of {plan.base})" if index and totals[0] else ""
        axes.annotate(
            f"{readable_bytes(total)}{share}",
            (total / size, index),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    mesh = " x ".join(f"{size} {name}" for name, size in plan.mesh.items())
    axes.set(
        xlabel=f"{unit} that a rank sends per step",
        title=f"{plan.job.model.flavor} on {plan.ranks} ranks ({mesh})",
    )
    axes.set_xlim(0, max(*totals, 1.0) / size * 1.35)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(PURPOSES), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
