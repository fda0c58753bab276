"""The training job with a mixture of experts: losses, bytes, balance, checkpoints, refusals."""

import functools
import logging
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fp8dist.train import model
from fp8dist.train.config import parse_config
from fp8dist.train.loop import Trainer
from fp8dist.train.model import ModelShape
from fp8dist.train.moe import MoEShape
from tests.distributed.harness import DEVICE, needs_compiler, run_on_ranks
from tests.distributed.test_train import arguments, write_text

EXPERTS = MoEShape(experts=4, top_k=2, hidden_dim=96)
TINY = ModelShape(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=256, moe=EXPERTS
)
LINEAR, GROUPED = "quantize.linear.float8", "quantize.grouped_mm.float8"
BOTH = f"--model.converters={LINEAR},{GROUPED}"
MX = "--model.converters=quantize.grouped_mm.mx"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Any]:
    """The record of two ranks in float32."""
    (record, _), _ = run_on_ranks(2, train, arguments(tmp_path_factory.mktemp("plain"), text))
    return record


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Any]:
    """That of two ranks with linear layers and experts in float8."""
    (record, _), _ = run_on_ranks(2, train, arguments(tmp_path_factory.mktemp("both"), text, BOTH))
    return record


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def train(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """On every rank: one run of the tiny model; its record and what it printed."""
    model.FLAVORS["tiny"] = TINY
    device = torch.device(DEVICE, torch.cuda.current_device() if DEVICE == "cuda" else None)
    handler, logger = _Lines(), logging.getLogger("fp8dist")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        return Trainer(parse_config(argv), device).train().to_dict(), handler.lines
    finally:
        logger.removeHandler(handler)


def refusal(argv: list[str]) -> str:
    with pytest.raises(ValueError) as caught:
        train(argv)
    return str(caught.value)


def gathered_bytes(converters: str, microbatches: int, router_rows: int = 4) -> int:
    """Bytes that a step's all-gathers put out, both passes, with float32 as `param_dtype`."""
    attention = 2 * 64 * 64 + 2 * 64 * 32
    shared, experts = 3 * 64 * 96, 4 * 3 * 64 * 96
    high = 2 * 64 + router_rows * 64  # norms and router
    of_linear = 1 if LINEAR in converters else 4
    of_experts = 1 if GROUPED in converters else 1 + 1 / 32 if converters == MX else 4
    block = (attention + shared) * of_linear + experts * of_experts + 4 * high
    # The root's embedding, output (16 384 each) and norm are gathered once.
    output = 256 * 64 * of_linear
    return round(microbatches * (2 * 2 * block + output + 4 * (256 * 64 + 64)))


@pytest.mark.parametrize("converters", ["--model.converters=", BOTH, MX])
def test_losses_and_bytes(
    tmp_path: Path, text: Path, plain: dict[str, Any], converters: str
) -> None:
    (found, lines), (other, _) = run_on_ranks(2, train, arguments(tmp_path, text, converters))
    assert found["losses"] == other["losses"]
    # Six steps in which float8's noise of 1 in 16 per element averages out to less than 1 %.
    assert found["losses"] == pytest.approx(plain["losses"], rel=0.01)
    assert (found["losses"] == plain["losses"]) == (converters == "--model.converters=")
    assert found["gathered_bytes_per_step"] == gathered_bytes(converters, 2)
    assert len(found["expert_loads"]) == len(found["losses"])
    assert all(1 <= load <= EXPERTS.experts / EXPERTS.top_k for load in found["expert_loads"])
    (line,) = [line for line in lines if line.startswith("step 6/6")]
    assert line.endswith(f"  busiest expert {found['expert_loads'][-1]:.2f}x")


def test_resume_goes_on_bitwise(tmp_path: Path, text: Path) -> None:
    argv = arguments(tmp_path, text, BOTH, "--checkpoint.enable", "--checkpoint.interval=3")
    (whole, _), _ = run_on_ranks(2, train, argv)
    shutil.rmtree(tmp_path / "checkpoint" / "step-6")
    (resumed, _), _ = run_on_ranks(2, train, argv)
    for history in ("losses", "grad_norms", "expert_loads"):
        assert resumed[history] == whole[history]


def test_fewer_experts_than_ranks(tmp_path: Path, text: Path, both: dict[str, Any]) -> None:
    """On 8 ranks 4 experts are cut by rows; the losses are those of 2 ranks."""
    (many, _), *_ = run_on_ranks(
        8, train, arguments(tmp_path, text, BOTH, "--training.local_batch_size=1")
    )
    # Activations are scaled over other batches: float8's noise.
    assert many["losses"] == pytest.approx(both["losses"], rel=0.01)
    assert many["gathered_bytes_per_step"] == gathered_bytes(BOTH, 1, router_rows=8)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputing_activations_changes_nothing(
    tmp_path: Path, text: Path, both: dict[str, Any], mode: str
) -> None:
    flags = [
        f"--activation_checkpoint.mode={mode}",
        "--activation_checkpoint.selective_ac_option=op",
    ]
    (found, _), _ = run_on_ranks(2, train, arguments(tmp_path, text, BOTH, *flags))
    assert found["losses"] == both["losses"]
    assert found["expert_loads"] == pytest.approx(both["expert_loads"])


def train_compiled(argv: list[str], backend: str) -> tuple[dict[str, Any], list[str]]:
    compiled = functools.partialmethod(torch.nn.Module.compile, backend=backend)
    with mock.patch.object(torch.nn.Module, "compile", compiled):
        return train([*argv, "--compile.enable"])


# Some 40 kernels are generated, for a C++ compiler to work on for a minute, where nothing is
# recomputed. aot_eager runs its graphs, with what they recompute in backward, as they are; the loss
# would be compiled by inductor all the same.
@pytest.mark.parametrize(
    ("mode", "backend", "components"),
    [
        pytest.param("none", "inductor", "model,loss", marks=needs_compiler),
        ("full", "aot_eager", "model"),
    ],
)
def test_compiled(tmp_path: Path, text: Path, mode: str, backend: str, components: str) -> None:
    flags = [
        "--training.mixed_precision_param=bfloat16",
        "--training.steps=2",
        "--training.global_batch_size=2",
        f"--activation_checkpoint.mode={mode}",
        f"--compile.components={components}",
    ]
    [(eager, _)] = run_on_ranks(1, train, arguments(tmp_path, text, BOTH, *flags))
    argv = arguments(tmp_path, text, BOTH, *flags)
    [(found, _)] = run_on_ranks(1, train_compiled, argv, backend, timeout=400)
    # bfloat16's roundings (2^-9) in other places.
    assert found["losses"] == pytest.approx(eager["losses"], rel=5e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            [BOTH, f"--{GROUPED}.fqns=moe"],
            r"'moe', which is in no module's name: .*layers.\*.feed_forward.experts",
        ),
        ([BOTH, "--model.flavor=debugmodel"], "'experts', which is in no module's name.* none"),
        (["--parallelism.tensor_parallel_degree=2"], "does not cut the experts"),
        (["--compile.enable"], "mixed_precision_param is 'float32': compiled, the experts"),
    ],
)
def test_refusals(tmp_path: Path, text: Path, flags: list[str], message: str) -> None:
    messages = run_on_ranks(2, refusal, arguments(tmp_path, text, *flags))
    assert messages[0] == messages[1]
    assert re.search(message, messages[0]), messages[0]
