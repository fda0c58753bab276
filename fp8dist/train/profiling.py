"""Traces of what the CPU and the GPU do in a step."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity

from fp8dist.train.config_sections import ProfilingSection
from fp8dist.train.distributed import agree

logger = logging.getLogger(__name__)


@contextmanager
def traces(section: ProfilingSection, folder: Path, done: int) -> Iterator[Callable[[], None]]:
    """Profile what is run inside, as `section` says; gives what is to be called after each step.

    Every rank writes a Chrome trace of its own, `folder/iteration_N/rankR_trace.json`, when step N
    has ended.

    Args:
        done: steps that were trained before.

    Raises:
        ValueError: on every rank: nothing can be written to `folder`.
    """
    if not section.enable_profiling:
        yield lambda: None
        return
    agree(lambda: folder.mkdir(parents=True, exist_ok=True))

    def write(profiler: torch.profiler.profile) -> None:
        path = (
            folder / f"iteration_{done + profiler.step_num}" / f"rank{dist.get_rank()}_trace.json"
        )
        path.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(path))
        logger.info("wrote %s", path)

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(
        wait=section.profile_freq - section.profiler_warmup - section.profiler_active,
        warmup=section.profiler_warmup,
        active=section.profiler_active,
    )
    with torch.profiler.profile(
        activities=activities, schedule=schedule, on_trace_ready=write, record_shapes=True
    ) as profiler:
        yield profiler.step
