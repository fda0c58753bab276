"""A rank that is not like the others is found before training, and named on every rank."""

import dataclasses
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fp8dist.train import loop, model, same_run
from tests.distributed.harness import run_on_ranks
from tests.distributed.test_train import FLOAT8, TINY, arguments, refusal, train, write_text

ODD_RANK = 1


def argv_of_ranks(argv: list[str], odd: str) -> list[str]:
    return [*argv, odd] if dist.get_rank() == ODD_RANK else argv


def refused_config(argv: list[str], odd: str) -> str:
    return refusal(argv_of_ranks(argv, odd))


@pytest.fixture(scope="module")
def argv(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    text = write_text(tmp_path_factory.mktemp("text"))
    return arguments(tmp_path_factory.mktemp("run"), text, FLOAT8, "--training.steps=1")


@pytest.mark.parametrize(
    "flag, found",
    [
        ("--training.seq_len=64", "training.seq_len is 32 on ranks 0, 2, 64 on rank 1"),
        ("--optimizer.lr=1.0", "optimizer.lr is 0.003 on ranks 0, 2, 1.0 on rank 1"),
        ("--quantize.linear.float8.recipe_name=rowwise", "'rowwise' on rank 1"),
        ("--model.converters=", "model.converters is"),
        ("--parallelism.fsdp_reshard_after_forward=never", "'never' on rank 1"),
    ],
)
def test_config(argv: list[str], flag: str, found: str) -> None:
    messages = run_on_ranks(3, refused_config, [*argv, "--training.global_batch_size=12"], flag)
    assert len(set(messages)) == 1
    assert messages[0].startswith("the ranks do not run the same: ")
    assert found in messages[0]


def refused_torch(argv: list[str]) -> str:
    odd = dist.get_rank() == ODD_RANK
    with mock.patch.object(torch, "__version__", "2.0.0" if odd else torch.__version__):
        return refusal(argv)


def refused_code(argv: list[str]) -> str:
    odd = dist.get_rank() == ODD_RANK
    code = "0123456789ab" if odd else same_run.hash_of_source()
    with mock.patch.object(same_run, "hash_of_source", lambda: code):
        return refusal(argv)


def refused_model(argv: list[str]) -> str:
    hidden = 128 if dist.get_rank() == ODD_RANK else TINY.hidden_dim
    odd_shape = dataclasses.replace(TINY, hidden_dim=hidden)
    with mock.patch.object(model, "FLAVORS", {"tiny": TINY}):
        with mock.patch.object(loop, "model_shape", lambda *_: odd_shape):
            return refusal(argv)


@pytest.mark.parametrize(
    "body, found",
    [
        (refused_torch, "torch is "),
        (refused_code, "fp8dist is "),
        (refused_model, "layers.0.feed_forward.w1.weight is (96, 64)"),
    ],
    ids=["torch", "code", "model"],
)
def test_what_computes(argv: list[str], body: object, found: str) -> None:
    messages = run_on_ranks(2, body, argv)
    assert messages[0] == messages[1]
    assert found in messages[0] and "on rank 1" in messages[0]


def with_paths_of_its_own(argv: list[str], texts: list[str]) -> int:
    record = train([*argv, f"--training.dataset_path={texts[dist.get_rank()]}"])
    return len(record["losses"])


def test_paths_may_differ(argv: list[str], tmp_path: Path) -> None:
    """Machines keep the same text in different places."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    texts = [str(write_text(tmp_path / name)) for name in ("a", "b")]
    assert run_on_ranks(2, with_paths_of_its_own, argv, texts) == [1, 1]
