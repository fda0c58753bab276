"""torchdata's workers; where it is not installed, that it is asked for."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from fp8dist.train import packing
from fp8dist.train.config import JobConfig, validate
from fp8dist.train.data import build_dataset, find_data

needs_torchdata = pytest.mark.skipif(
    importlib.util.find_spec("torchdata") is None, reason="torchdata is not installed"
)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobConfig:
    monkeypatch.setattr(packing, "BLOCK_TOKENS", 200)
    for i in range(10):
        (tmp_path / f"{i}.txt").write_bytes(bytes([100 + i]) * 40)
    job = JobConfig()
    job.training.dataset_path = str(tmp_path)
    job.training.seq_len, job.training.local_batch_size = 8, 2
    job.training.dataloader.num_workers = 2
    return job


def build(job: JobConfig, rank: int = 0, world: int = 1):
    return build_dataset(job, *find_data(job), rank=rank, world=world)


def steps(loader, count: int) -> list[torch.Tensor]:
    return [torch.cat([one.tokens for one in loader.next_step()]) for _ in range(count)]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_missing_package_is_named(job: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdata", None)
    monkeypatch.setitem(sys.modules, "torchdata.stateful_dataloader", None)
    with pytest.raises(ValueError, match="num_workers is 2, .*: pip install torchdata. With 0"):
        build(job)


def test_what_does_not_fit_is_refused(job: JobConfig) -> None:
    job.training.dataloader.num_workers = 11
    with pytest.raises(ValueError, match="num_workers is 11, more than the 10 documents"):
        build(job)
    job.training.dataloader.num_workers, job.training.dataloader.prefetch_factor = 0, 2
    with pytest.raises(ValueError, match="prefetch_factor is 2 and there are no workers"):
        validate(job)


@needs_torchdata
@pytest.mark.parametrize("before", [0, 3])
def test_goes_on_where_it_was_saved(job: JobConfig, before: int) -> None:
    original = build(job)
    assert original.tokens_per_step == 16
    seen = steps(original, before)
    saved = json.loads(json.dumps(original.state_dict()))
    expected = steps(original, 6)
    resumed = build(job)
    resumed.load_state_dict(saved)
    assert equal(steps(resumed, 6), expected)
    # Workers take turns, and each has documents of its own: those with even or odd numbers.
    for number, tokens in enumerate(seen + expected):
        ids = set(tokens.flatten().tolist()) - {0}
        assert {one % 2 for one in ids} == {number % 2}

    job.training.dataloader.num_workers = 0
    with pytest.raises(ValueError, match="has 2 workers, this run's 0: resume with the same"):
        build(job).load_state_dict(saved)
    alone = build(job).state_dict()
    job.training.dataloader.num_workers = 2
    with pytest.raises(ValueError, match="has 0 workers, this run's 2: resume with the same"):
        build(job).load_state_dict(alone)


@needs_torchdata
def test_ranks_share_a_global_batch(job: JobConfig) -> None:
    job.training.global_batch_size = 4
    alone = steps(build(job), 3)
    shared = [steps(build(job, rank, 2), 3) for rank in range(2)]
    assert equal([torch.cat(pair) for pair in zip(*shared, strict=True)], alone)
