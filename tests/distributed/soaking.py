"""A long training of a small model: its losses, memory and step times."""

import gc
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

import fp8dist
from tests.distributed.harness import DEVICE
from tests.distributed.toy import convert, local_batch, loss_of, mesh_of, new_model, shard

EVERY = 20  # steps between looks at the memory


@dataclass
class Soaked:
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # by step
    # By look: bytes that the device has allocated (on a CPU those in Python's tensors), how many
    # tensors Python has, and bytes of the process.
    allocated: list[int] = field(default_factory=list)
    tensors: list[int] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)


def soak(recipe: str, steps: int, every: int = EVERY) -> Soaked:
    """On every rank: AdamW, clipping, two microbatches, recomputed activations, an evaluation and a
    state dict now and then. With deterministic algorithms, for a repetition to be one."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return _soak(recipe, steps, every)
    finally:
        torch.use_deterministic_algorithms(deterministic)


def _soak(recipe: str, steps: int, every: int) -> Soaked:
    model = convert(new_model(layers=1, recompute=True), recipe)
    shard(model, mesh_of(dist.get_world_size()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    fp8dist.register_precompute_hook(optimizer, model)
    found = Soaked()
    for step in range(steps):
        started = time.perf_counter()
        total = 0.0
        for microbatch in range(2):
            model.set_requires_gradient_sync(microbatch == 1)
            loss = loss_of(model, local_batch(step % 8, microbatch))
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.losses.append(total / 2)
        found.seconds.append(time.perf_counter() - started)
        if step % every == every - 1:
            with torch.no_grad():
                loss_of(model, local_batch(0))
            model.state_dict()
            _look(found)
    return found


def _look(found: Soaked) -> None:
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    if DEVICE == "cuda":
        found.allocated.append(torch.cuda.memory_allocated())
    else:
        found.allocated.append(sum(one.numel() * one.element_size() for one in tensors))
    found.tensors.append(len(tensors))
    pages = Path("/proc/self/statm")
    found.resident.append(int(pages.read_text().split()[1]) * 4096 if pages.exists() else 0)


def faults(first: Soaked, second: Soaked, warm_up: int) -> list[str]:
    """What a run and its repetition should not show.

    Args:
        warm_up: looks at the memory that do not count yet.
    """
    wrong = []
    if first.losses != second.losses:
        step = next(
            i
            for i, pair in enumerate(zip(first.losses, second.losses, strict=True))
            if pair[0] != pair[1]
        )
        wrong.append(f"the losses differ from step {step} on")
    for number, run in enumerate((first, second)):
        for name in ("allocated", "tensors"):
            values = getattr(run, name)[warm_up:]
            if max(values) > values[0]:
                wrong.append(f"run {number}: {name} grows from {values[0]} to {max(values)}")
    return wrong
