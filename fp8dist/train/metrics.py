"""What is reported about a run: progress lines, TensorBoard, and the record kept as JSON."""

import importlib.metadata
import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from fp8dist.train.config import JobConfig
from fp8dist.train.documents import ReferenceEntropies

logger = logging.getLogger(__name__)

FINAL_STEPS = 20
"""The final loss is the mean over at most this many last steps; one batch alone is noise."""

HISTORY = (
    "losses",
    "grad_norms",
    "gathered_bytes",
    "expert_loads",
    "validation_steps",
    "validation_losses",
)


@dataclass
class RunRecord:
    """Everything worth keeping of a run; entry i of a list belongs to step i + 1.

    Losses are means over the global batch, in nats per token. `gathered_bytes` is what FSDP's
    all-gathers put out on one rank in a step; `expert_loads`, of mixtures of experts only, the
    load of each layer's busiest expert, 1 being an equal share, as a mean over the layers;
    `validation_losses` are those after each of the `validation_steps`; `tokens_per_second` counts
    all ranks and no time that validation took.
    """

    config: dict[str, Any]
    device: str
    ranks: int
    parameters: int
    versions: dict[str, str] = field(default_factory=lambda: versions())
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gathered_bytes: list[int] = field(default_factory=list)
    expert_loads: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    tokens_per_second: float = math.nan
    training_seconds: float = math.nan
    entropy_of_bytes: float | None = None
    entropy_of_byte_pairs: float | None = None

    @property
    def final_loss(self) -> float:
        """Mean loss of the last steps: `FINAL_STEPS` of them, or a tenth of a shorter run."""
        last = max(1, min(FINAL_STEPS, len(self.losses) // 10))
        return sum(self.losses[-last:]) / last if self.losses else math.nan

    @property
    def gathered_bytes_per_step(self) -> int:
        """Bytes gathered in the last step; every step but the first gathers the same."""
        return self.gathered_bytes[-1] if self.gathered_bytes else 0

    def history(self) -> dict[str, list]:
        """What a checkpoint must hold for a resumed run's record to be whole."""
        return {name: getattr(self, name) for name in HISTORY}

    def restore_history(self, saved: dict[str, Any]) -> None:
        """Take over the steps recorded before the run was resumed."""
        for name in HISTORY:
            setattr(self, name, saved.get(name, []))

    def set_entropies(self, entropies: ReferenceEntropies) -> None:
        """Keep what counting bytes reaches on the training text."""
        self.entropy_of_bytes = entropies.single_bytes
        self.entropy_of_byte_pairs = entropies.byte_pairs

    def summary(self) -> str:
        """The outcome in one line, with what counting bytes would reach beside it."""
        unit = "token" if self.entropy_of_bytes is None else "byte"
        line = f"final loss {self.final_loss:.4f} nats per {unit}"
        if self.entropy_of_bytes is not None:
            line += (
                f" (this text's entropy: {self.entropy_of_bytes:.2f} by single bytes, "
                f"{self.entropy_of_byte_pairs:.2f} by byte pairs)"
            )
        if self.validation_losses:
            line += f", validation loss {self.validation_losses[-1]:.4f}"
        return (
            f"{line}, {self.tokens_per_second:,.0f} tokens/s, "
            f"{readable_bytes(self.gathered_bytes_per_step)} gathered per step and rank, "
            f"{self.training_seconds:.0f} s"
        )

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values; numbers that JSON cannot hold (NaN, Inf) become strings."""
        return json_ready(
            {
                **asdict(self),
                "final_loss": self.final_loss,
                "gathered_bytes_per_step": self.gathered_bytes_per_step,
            }
        )


def new_record(job: JobConfig, device: torch.device, model: nn.Module) -> RunRecord:
    """The record of a run that begins, on all ranks of the process group."""
    return RunRecord(
        config=job.to_dict(),
        device="CPU" if device.type == "cpu" else torch.cuda.get_device_name(device),
        ranks=dist.get_world_size(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    # torch's own version tells the build; that of its package need not.
    found = {"python": sys.version.split()[0], "torch": torch.__version__}
    for package in ("torchao", "fp8dist"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write `content` to `path`, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def json_ready(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def peak_memory(device: torch.device) -> int:
    """Bytes: the most this process held, of GPU memory on a GPU and of main memory elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def readable_bytes(count: float) -> str:
    """3200000 -> '3.2 MB', in powers of ten as network speeds are."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def timed(function: Callable[[], float]) -> tuple[float, float]:
    """What `function` returns, and the seconds that it took."""
    start = time.perf_counter()
    return function(), time.perf_counter() - start


class Reporter:
    """Progress lines, TensorBoard scalars (without a folder: none) and the speed between them.

    Raises:
        ValueError: there is a folder, and the tensorboard package is missing.
    """

    def __init__(self, record: RunRecord, steps: int, device: torch.device, folder: Path | None):
        self._record, self._steps, self._device = record, steps, device
        self._writer = None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError(
                    "metrics.enable_tensorboard needs a package: pip install tensorboard"
                ) from error
            self._writer = SummaryWriter(str(folder))
        self._start = self._last = time.perf_counter()
        self._tokens = self._tokens_at_last = 0

    def count_tokens(self, tokens: int) -> None:
        """Count tokens trained on, over all ranks."""
        self._tokens += tokens

    def report(self, step: int, learning_rate: float) -> None:
        """One progress line, and the scalars, of the step recorded last."""
        now = time.perf_counter()
        speed = (self._tokens - self._tokens_at_last) / (now - self._last)
        self._last, self._tokens_at_last = now, self._tokens
        loss, norm = self._record.losses[-1], self._record.grad_norms[-1]
        memory, gathered = peak_memory(self._device), self._record.gathered_bytes[-1]
        load = self._record.expert_loads[-1] if self._record.expert_loads else None
        logger.info(
            "step %*d/%d  loss %.4f  grad norm %.3f  %7s tokens/s  memory %s  gathered %s%s",
            len(str(self._steps)),
            step,
            self._steps,
            loss,
            norm,
            f"{speed:,.0f}",
            readable_bytes(memory),
            readable_bytes(gathered),
            "" if load is None else f"  busiest expert {load:.2f}x",
        )
        if self._writer is not None:
            scalars = {
                "loss": loss,
                "grad_norm": norm,
                "learning_rate": learning_rate,
                "tokens_per_second": speed,
                "memory_bytes": memory,
                "gathered_bytes": gathered,
            }
            if load is not None:
                scalars["busiest_expert"] = load
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)

    def report_validation(self, step: int, loss: float, seconds: float) -> None:
        """Record the validation loss after `step`; the seconds it took count as no training."""
        self._start += seconds
        self._last += seconds
        self._record.validation_steps.append(step)
        self._record.validation_losses.append(loss)
        width = len(str(self._steps))
        logger.info("step %*d/%d  validation loss %.4f", width, step, self._steps, loss)
        if self._writer is not None:
            self._writer.add_scalar("validation_loss", loss, step)

    def close(self) -> None:
        """Put the overall speed into the record and close the event file."""
        self._record.training_seconds = time.perf_counter() - self._start
        self._record.tokens_per_second = self._tokens / self._record.training_seconds
        if self._writer is not None:
            self._writer.close()
