"""The same run with and without float8, side by side."""

import copy
import logging
from pathlib import Path

import torch
import torch.distributed as dist

from fp8dist.train.config import JobConfig
from fp8dist.train.config_sections import FLOAT8_CONVERTER
from fp8dist.train.distributed import agree
from fp8dist.train.loop import Trainer
from fp8dist.train.metrics import RunRecord, json_ready, readable_bytes, write_json
from fp8dist.train.plot import plot_losses

logger = logging.getLogger(__name__)


def compare(job: JobConfig, device: torch.device) -> dict[str, RunRecord]:
    """Train `job` unconverted and then in float8, on the same data from the same weights.

    Each run writes to a folder of its own inside the dump folder; rank 0 adds `compare.json`
    and `compare.png`. Returns the two records by name.
    """
    # Not "bf16": what the unconverted run gathers and computes in is the job's own choice.
    plain_name = job.training.mixed_precision_param
    runs: dict[str, RunRecord] = {}
    for name, converters in (
        (plain_name, []),
        ("float8", job.model.converters or [FLOAT8_CONVERTER]),
    ):
        logger.info("--- %s", name)
        variant = copy.deepcopy(job)
        variant.model.converters = converters
        variant.job.dump_folder = str(Path(job.job.dump_folder) / name)
        runs[name] = Trainer(variant, device).train()
    plain, float8 = runs[plain_name], runs["float8"]
    difference = 100 * (float8.final_loss / plain.final_loss - 1)
    folder = Path(job.job.dump_folder)

    def write() -> None:
        if dist.get_rank() == 0:
            content = {
                "loss_difference_percent": difference,
                "runs": {name: run.to_dict() for name, run in runs.items()},
            }
            write_json(json_ready(content), folder / "compare.json")
            plot_losses(runs, job.job.description, folder / "compare.png")

    agree(write)
    logger.info(
        "final loss: %s %.4f, float8 %.4f, a difference of %+.2f %%; gathered per step and rank: "
        "%s %s, float8 %s",
        plain_name,
        plain.final_loss,
        float8.final_loss,
        difference,
        plain_name,
        readable_bytes(plain.gathered_bytes_per_step),
        readable_bytes(float8.gathered_bytes_per_step),
    )
    logger.info("wrote %s and %s", folder / "compare.json", folder / "compare.png")
    return runs
