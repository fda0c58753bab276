"""Train the default job once in high precision and once with every recipe: do they learn the same?

    torchrun --nproc-per-node 2 scripts/bench/learning.py --training.steps 300

All runs have the same data, seed and initial weights. The final losses come as a table; --folder
gets learning.json and learning.png, and a folder per run. A run that is there already, of the same
configuration, is not repeated. Flags that are not listed here are the training job's.
"""

import argparse
import copy
import dataclasses
import json
import logging
import statistics
from pathlib import Path

import torch.distributed as dist
from harness import markdown_table, setting, write_json
from matplotlib.figure import Figure

from fp8dist.config import RECIPES
from fp8dist.train.__main__ import set_up_logging
from fp8dist.train.config import SHIPPED_CONFIGS, JobConfig, parse_config, validate
from fp8dist.train.config_sections import FLOAT8_CONVERTER, MX_CONVERTER
from fp8dist.train.distributed import agree, init_distributed
from fp8dist.train.loop import Trainer
from fp8dist.train.metrics import RunRecord, json_ready, readable_bytes

logger = logging.getLogger("fp8dist.learning")

HIGH_PRECISION = "high precision"
SMOOTHED_PART = 15
"""Curves are running means over 1/15 of the steps."""


def variant(job: JobConfig, name: str, folder: Path) -> JobConfig:
    """The job with the recipe called `name`, or unconverted."""
    changed = copy.deepcopy(job)
    changed.job.dump_folder = str(folder / name.replace(" ", "_"))
    if name == HIGH_PRECISION:
        changed.model.converters = []
        return changed
    mx = RECIPES[name].scale_format == "e8m0"
    linear = changed.quantize.linear
    section = linear.mx if mx else linear.float8
    section.recipe_name = name
    section.filter_fqns = job.quantize.linear.float8.filter_fqns
    changed.model.converters = [MX_CONVERTER if mx else FLOAT8_CONVERTER]
    validate(changed)
    return changed


def finished(job: JobConfig) -> RunRecord | None:
    """The record of an earlier run of the same configuration, if there is one."""
    file = Path(job.job.dump_folder) / "run.json"
    if not file.is_file():
        return None
    saved = json.loads(file.read_text())
    if saved["config"] != json_ready(job.to_dict()):
        return None
    names = {one.name for one in dataclasses.fields(RunRecord)}
    return RunRecord(**{name: value for name, value in saved.items() if name in names})


def smooth(losses: list[float]) -> list[float]:
    width = max(1, len(losses) // SMOOTHED_PART)
    ends = range(1, len(losses) + 1)
    return [statistics.fmean(losses[max(0, end - width) : end]) for end in ends]


def draw(runs: dict[str, RunRecord], path: Path) -> None:
    """Losses above, and below by how much each differs from high precision."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    reference = smooth(runs[HIGH_PRECISION].losses)
    steps = range(1, len(reference) + 1)
    for index, (name, run) in enumerate(runs.items()):
        curve, color = smooth(run.losses), "black" if name == HIGH_PRECISION else f"C{index}"
        wire = readable_bytes(run.gathered_bytes_per_step)
        above.plot(
            steps,
            curve,
            color=color,
            label=f"{name}: {run.final_loss:.4f}, {wire} gathered per step and rank",
            linestyle=(0, (6, index)),  # curves on top of each other show through the gaps
        )
        differences = [100 * (a / b - 1) for a, b in zip(curve, reference, strict=True)]
        below.plot(steps, differences, color=color, linewidth=1.2)
    first = runs[HIGH_PRECISION]
    above.set(ylabel="loss (nats per token)", title=f"{first.ranks} ranks on {first.device}")
    above.legend()
    below.axhspan(-1, 1, color="gray", alpha=0.15)
    below.set(xlabel="step", ylabel="difference to high precision (%)", ylim=(-2, 2))
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", default=",".join(RECIPES), help="comma-separated")
    parser.add_argument("--folder", type=Path, default=Path("outputs/learning"))
    options, flags = parser.parse_known_args()
    recipes = options.recipes.split(",")
    if unknown := set(recipes) - RECIPES.keys():
        parser.error(
            f"--recipes: unknown {', '.join(sorted(unknown))}; known: {', '.join(RECIPES)}"
        )
    set_up_logging()
    job = parse_config(["--job.config_file", str(SHIPPED_CONFIGS / "debugmodel.toml"), *flags])
    device = init_distributed(job)
    runs: dict[str, RunRecord] = {}
    for name in (HIGH_PRECISION, *recipes):
        changed = variant(job, name, options.folder)
        # Rank 0 alone writes, so it alone can tell.
        found = [finished(changed) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found)
        (there,) = found
        logger.info("--- %s%s", name, "" if there is None else ": there already")
        runs[name] = Trainer(changed, device).train() if there is None else there

    plain = runs[HIGH_PRECISION]
    table = []
    for name, run in runs.items():
        difference = f"{100 * (run.final_loss / plain.final_loss - 1):+.2f} %"
        gathered = readable_bytes(run.gathered_bytes_per_step)
        row = (name, f"{run.final_loss:.4f}", "" if run is plain else difference, gathered)
        table.append(row)

    def write() -> None:
        if dist.get_rank() == 0:
            content = {
                "date": setting()["date"],
                "runs": {name: run.to_dict() for name, run in runs.items()},
            }
            write_json(options.folder / "learning.json", json_ready(content))
            draw(runs, options.folder / "learning.png")

    agree(write)
    header = ("", "final loss", "vs high precision", "gathered per step and rank")
    logger.info("%s", markdown_table(header, table))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
