"""The optimizer and the learning rate over the steps."""

import math

import torch
import torch.nn as nn

from fp8dist.train.config import JobConfig


def build_optimizer(model: nn.Module, job: JobConfig) -> torch.optim.Optimizer:
    """The optimizer of `job` over all parameters of `model`."""
    kind = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}[job.optimizer.name]
    return kind(
        model.parameters(),
        lr=job.optimizer.lr,
        betas=(job.optimizer.beta1, job.optimizer.beta2),
        eps=job.optimizer.eps,
        weight_decay=job.optimizer.weight_decay,
        fused=True,
    )


def lr_factor(
    step: int, *, steps: int, warmup_steps: int, decay_ratio: float | None, decay_type: str
) -> float:
    """The part of the peak learning rate that step `step` of 1..steps trains with.

    It rises in equal amounts over the warmup steps to 1, stays there, and falls over the last
    `decay_ratio * steps` steps (None: over all that follow the warmup) towards 0, which it
    would reach one step after the last.
    """
    warmup = min(warmup_steps, steps)
    if step <= warmup:
        return step / warmup
    decay = steps - warmup
    if decay_ratio is not None:
        decay = min(decay, round(decay_ratio * steps))
    into_decay = step - 1 - (steps - decay)
    if into_decay <= 0:
        return 1.0
    progress = min(1.0, into_decay / decay)
    match decay_type:
        case "linear":
            return 1.0 - progress
        case "sqrt":
            return 1.0 - math.sqrt(progress)
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
    raise AssertionError(f"unknown decay type {decay_type!r}")


def set_learning_rate(optimizer: torch.optim.Optimizer, job: JobConfig, step: int) -> float:
    """Give every parameter the learning rate of step `step` (from 1); returns it."""
    factor = lr_factor(
        step,
        steps=job.training.steps,
        warmup_steps=job.lr_scheduler.warmup_steps,
        decay_ratio=job.lr_scheduler.decay_ratio,
        decay_type=job.lr_scheduler.decay_type,
    )
    for group in optimizer.param_groups:
        group["lr"] = job.optimizer.lr * factor
    return job.optimizer.lr * factor
