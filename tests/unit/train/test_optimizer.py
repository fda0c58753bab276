"""The learning rate at every step, worked out by hand."""

import pytest
import torch

from fp8dist.train.config import JobConfig
from fp8dist.train.optimizer import build_optimizer, lr_factor, set_learning_rate


def factors(decay_type: str, decay_ratio: float | None, steps: int = 8, warmup: int = 4):
    return [
        lr_factor(
            step,
            steps=steps,
            warmup_steps=warmup,
            decay_ratio=decay_ratio,
            decay_type=decay_type,
        )
        for step in range(1, steps + 1)
    ]


@pytest.mark.parametrize(
    ("decay_type", "decay"),
    [
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("sqrt", [1.0, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5]),
        ("cosine", [1.0, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5]),
    ],
)
def test_warmup_then_decay(decay_type: str, decay: list[float]) -> None:
    assert factors(decay_type, None) == pytest.approx([0.25, 0.5, 0.75, 1.0, *decay])


def test_decay_ratio_holds_the_peak_before() -> None:
    assert factors("linear", 0.25) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.5])
    assert factors("linear", 0.0) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])


def test_decay_never_starts_within_the_warmup() -> None:
    assert factors("linear", 0.9) == factors("linear", None)


def test_no_warmup_and_warmup_longer_than_the_run() -> None:
    assert factors("linear", None, steps=4, warmup=0) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert factors("linear", None, steps=4, warmup=100) == pytest.approx([0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize(
    ("name", "kind"), [("AdamW", torch.optim.AdamW), ("Adam", torch.optim.Adam)]
)
def test_optimizer_takes_its_constants_from_the_job(name: str, kind: type) -> None:
    job = JobConfig()
    job.optimizer.name = name
    job.optimizer.lr, job.optimizer.beta1, job.optimizer.beta2 = 0.5, 0.8, 0.7
    job.optimizer.eps, job.optimizer.weight_decay = 1e-3, 0.25
    job.training.steps, job.lr_scheduler.warmup_steps = 8, 4
    optimizer = build_optimizer(torch.nn.Linear(2, 2), job)
    assert type(optimizer) is kind
    [group] = optimizer.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.7), 1e-3, 0.25)
    assert set_learning_rate(optimizer, job, 3) == group["lr"] == pytest.approx(0.375)
