"""Pictures of runs: loss curves as PNG."""

from pathlib import Path

from fp8dist.train.metrics import RunRecord, readable_bytes

SMOOTHED_PART = 20
"""The strong line is a running mean over 1/20 of the steps; the faint one is every step."""


def plot_losses(runs: dict[str, RunRecord], title: str, path: Path) -> None:
    """Draw the loss curve of every run into one PNG at `path`, with the bytes each gathered.

    `runs` maps the name in the legend to the run.

    Raises:
        ValueError: the matplotlib package is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the picture needs a package: pip install matplotlib") from error

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, (name, run) in enumerate(runs.items()):
        color, steps = f"C{index}", range(1, len(run.losses) + 1)
        width = max(1, len(run.losses) // SMOOTHED_PART)
        windows = [run.losses[max(0, end - width) : end] for end in steps]
        smooth = [sum(window) / len(window) for window in windows]
        wire = readable_bytes(run.gathered_bytes_per_step)
        label = f"{name}: loss {run.final_loss:.3f}, {wire} gathered per step and rank"
        axes.plot(steps, run.losses, color=color, alpha=0.25, linewidth=0.8)
        # Curves that lie on top of each other stay visible when the later one is dashed.
        axes.plot(steps, smooth, color=color, label=label, linestyle="-" if index == 0 else "--")
        if run.validation_losses:
            axes.plot(
                run.validation_steps,
                run.validation_losses,
                "o" if index == 0 else "x",
                color=color,
                label=f"{name}: validation loss {run.validation_losses[-1]:.3f}",
            )
    first = next(iter(runs.values()))
    references = (("single bytes", first.entropy_of_bytes), ("pairs", first.entropy_of_byte_pairs))
    for name, entropy in references:
        if entropy is not None:
            text = f"entropy of {name}: {entropy:.2f}"
            axes.axhline(entropy, color="gray", linewidth=0.8, linestyle=":")
            axes.annotate(
                text,
                (0.99, entropy),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize="small",
                color="gray",
            )
    unit = "byte" if first.entropy_of_bytes is not None else "token"
    axes.set(xlabel="step", ylabel=f"loss (nats per {unit})", title=title)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
