"""The step benchmark runs on any machine; its times mean something on a GPU only."""

import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from tests.distributed.harness import DEVICE, run_on_ranks
from tests.unit.bench.program import load_program, run_program

SIZES = (
    "--layers=1 --dim=128 --ffn=256 --vocab=256 --seq=32 --steps=2 --microbatches=2 --no-compile"
)
SMALL = "--layers=1 --dim=128 --ffn=256 --vocab=256 --seq=32".split()


def test_prints_and_saves_a_row_per_variant(tmp_path: Path) -> None:
    variants = ["bf16", "torchao:tensorwise", "fp8dist:tensorwise", "fp8dist:tensorwise-ag+fa"]
    saved = tmp_path / "rows.json"
    run = run_program(
        "bench_step",
        *SIZES.split(),
        f"--variants={','.join(variants)}",
        f"--json={saved}",
        "--profile",
        ranks=2,
    )
    assert run.returncode == 0, run.stderr
    printed = [line.split() for line in run.stdout.splitlines() if "tok/s/rank" in line]
    report = json.loads(saved.read_text())
    assert [row[0] for row in printed] == [row["variant"] for row in report["rows"]] == variants
    assert [row[3] for row in printed][0] == "x1.000"
    assert run.stdout.count(" kernels, ") == len(variants)
    assert report["ranks"] == 2
    # Same weights, tokens and number of steps: what the rounding of float8 leaves apart in the
    # loss, some 5.5 nats, is far below a tenth.
    losses = [row["loss"] for row in report["rows"]]
    assert losses == pytest.approx([losses[0]] * len(losses), abs=0.1)


def test_measures_in_turns(tmp_path: Path) -> None:
    saved = tmp_path / "step.json"
    run = run_program(
        "bench_step",
        *SMALL,
        "--steps=1",
        "--no-compile",
        "--variants=bf16,fp8dist:rowwise",
        "--rounds=2",
        f"--json={saved}",
    )
    assert run.returncode == 0, run.stderr
    saved_rows = json.loads(saved.read_text())["rows"]
    for first, second in (saved_rows[:2], saved_rows[2:]):
        assert first["ratio"] == 1
        rates = second["tokens_per_second"], first["tokens_per_second"]
        assert second["ratio"] == pytest.approx(rates[0] / rates[1])
    lines = [line.split() for line in run.stdout.splitlines()]
    rows = [line for line in lines if "tok/s/rank" in line]
    assert [row[0] for row in rows] == ["bf16", "fp8dist:rowwise"] * 2
    title, first, second = lines[-3:]
    assert title[:3] == ["of", "2", "rounds:"]
    assert first == ["bf16", "x1.000", "1.000", "to", "1.000"]
    assert second[0] == "fp8dist:rowwise"


def test_rounds_are_put_together_by_variant() -> None:
    program = load_program("bench_step")

    def measured(variant: str, ratio: float) -> Any:
        row = program.Row(variant, 100.0, ratio, None, None, 0.0, 0.0)
        return program.Measured(row, "", torch.zeros(1))

    ratios = {"a": [1.0, 1.0, 1.0], "b": [1.2, 1.3, 1.4], "a again": [1.0, 1.0, 0.9]}
    found = [measured(name, ratios[name][i]) for i in range(3) for name in ratios]
    lines = program.of_rounds(found, 3).splitlines()
    assert lines[0].startswith("of 3 rounds")
    assert [line.split("  ")[-1] for line in lines[1:]] == [
        "1.000 to 1.000",
        "1.200 to 1.400",
        "0.900 to 1.000",
    ]
    assert [line.split("x")[1][:5] for line in lines[1:]] == ["1.000", "1.300", "1.000"]


def run_main(*arguments: str, compare: Any = None) -> None:
    """The program in this process, which may begin to compare if it is said how."""
    program = load_program("bench_step")
    refused = AssertionError("these arguments are not refused")
    with (
        mock.patch.object(sys, "argv", ["bench_step", *arguments]),
        mock.patch.object(program, "init_distributed", side_effect=None if compare else refused),
        mock.patch.object(program, "compare", compare),
    ):
        program.main()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "fp8",
        "torchao:rowwise+ag",
        "fp8dist:tensorwise+fa-ag",
        "fp8dist:tensorwise-cache+fa",
        "bf16-cache",
        "bf16+offload",
        "torchao:tensorwise+ag+offload",
        "fp8dist:tensorwise-ag+offload",
        "fp8dist:tensorwise-ag-cache",
    ],
)
def test_refuses_a_variant_that_does_not_exist(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(name)}: "):
        run_main(f"--variants=bf16,{name}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rounds 0", "--rounds: 0, must be"),
        ("--variants bf16,bf16+recompute --no-compile", "outputs of layers are kept"),
        ("--variants fp8dist:rowwise+offload --profile", "not seem idle"),
        ("--variants bf16+recompute --offload 1", "--offload: no variant has it"),
        ("--variants fp8dist:rowwise+offload --recompute attention.wq", "--recompute: no variant"),
        ("--variants fp8dist:rowwise+offload --offload 0", "0.0 GiB, must be"),
        ("--variants fp8dist:rowwise+offload --offload nan", "nan GiB, must be"),
        ("--variants fp8dist:rowwise+offload --offload inf", "inf GiB, must be"),
    ],
)
def test_refuses_flags_that_would_do_nothing(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_main(*flags.split())


def test_refuses_layers_that_do_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_main("--recompute", "attention.wq", "w3")
    assert "choose from" in capsys.readouterr().err


def what_flags_do(variant: str, flags: str) -> dict[str, Any]:
    """Also how many parameters each module that was sharded holds, with its reduce-scatter."""
    program = load_program("bench_step")
    made: dict[str, Any] = {}

    def compare(names: list[str], measure: Any, args: Any, *_: Any) -> None:
        mesh = init_device_mesh(DEVICE, (1,))
        training = program.Training(variant, args, mesh)
        layer = training.model.layers[0]
        if hasattr(layer.attention.wq, "config"):
            made["cached"] = layer.attention.wq.config.cache_payload
        again = [n for n, m in layer.named_modules() if isinstance(m, CheckpointWrapper)]
        if again:
            made["again"] = again
        for name, module in training.model.named_modules():
            if isinstance(module, FSDPModule) and (
                group := module._get_fsdp_state()._fsdp_param_group
            ):
                comm = type(group._reduce_scatter_comm).__name__
                made[name] = (len(group.fsdp_params), comm.removesuffix("ReduceScatter"))
                if name in SPLIT.keys() - GROUPS.keys():
                    made[f"{name} is resharded"] = group.post_forward_mesh_info is not None
        if training.offload is not None:
            training.logits()
            made["away"] = sum(saved.on_host.nbytes for saved in training.offload._away)

    with mock.patch.object(load_program("offload"), "SMALLEST", 2**10):
        run_main(*SMALL, f"--variants={variant}", *flags.split(), compare=compare)
    return made


TWO = ["attention.wq", "feed_forward.w3"]
ALL_OF_ATTENTION = [f"attention.w{x}" for x in "qkvo"]
GROUPS = {"": (3, "Default"), "layers.0": (9, "Default")}
SPLIT = {"tok_embeddings": 1, "layers.0": 9, "norm": 2, "output": 2}  # these two are one group
RESHARDED = {
    f"{name} is resharded": name == "tok_embeddings"  # backward begins with the others
    for name in ("tok_embeddings", "norm", "output")
}


@pytest.mark.parametrize(
    ("variant", "flags", "expected"),
    [
        ("bf16", "", GROUPS),
        ("bf16+recompute", "", GROUPS | {"again": ALL_OF_ATTENTION}),
        ("bf16+recompute", f"--recompute {' '.join(TWO)}", GROUPS | {"again": TWO}),
        ("bf16", "--in-place", {name: (n, "InPlace") for name, (n, _) in GROUPS.items()}),
        ("bf16", "--split-root", RESHARDED | {name: (n, "Default") for name, n in SPLIT.items()}),
        (
            "bf16",
            "--split-root --in-place",
            RESHARDED | {name: (n, "InPlace") for name, n in SPLIT.items()},
        ),
        ("fp8dist:rowwise", "", GROUPS | {"cached": True}),
        ("fp8dist:rowwise-cache", "", GROUPS | {"cached": False}),
        (
            "fp8dist:rowwise+fa-cache+recompute",
            "",
            GROUPS | {"cached": False, "again": ALL_OF_ATTENTION},
        ),
        # What attention takes and gives has 8192 bytes each, and is what is kept first.
        (
            "fp8dist:rowwise-cache+offload",
            "--no-compile --offload 2e-5",
            GROUPS | {"cached": False, "away": 2 * 8192},
        ),
        (
            "fp8dist:rowwise+offload",
            "--no-compile --offload 3e-5",
            GROUPS | {"cached": True, "away": 3 * 8192},
        ),
    ],
)
def test_flags(variant: str, flags: str, expected: dict[str, Any]) -> None:
    assert run_on_ranks(1, what_flags_do, variant, flags) == [expected]


def losses_of(variants: list[str]) -> list[list[float]]:
    """Of three steps, for each variant."""
    program = load_program("bench_step")
    losses: list[list[float]] = []

    def compare(names: list[str], measure: Any, args: Any, *_: Any) -> None:
        mesh = init_device_mesh(DEVICE, (2,))
        for name in names:
            training = program.Training(name, args, mesh)
            losses.append([training.step().item() for _ in range(3)])

    torch.use_deterministic_algorithms(True)
    try:
        with mock.patch.object(load_program("offload"), "SMALLEST", 2**10):
            flags = "--no-compile --microbatches=2 --split-root".split()
            run_main(*SMALL, f"--variants={','.join(variants)}", *flags, compare=compare)
    finally:
        torch.use_deterministic_algorithms(False)
    return losses


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise_with_gw_hp"])
def test_offloaded_activations_train_as_others_do(recipe: str) -> None:
    """Bit for bit, though all of them are away."""
    variants = [f"fp8dist:{recipe}", f"fp8dist:{recipe}+offload"]
    for here, away in run_on_ranks(2, losses_of, variants):
        assert here == away
        assert len(set(here)) == 3


def test_other_losses_than_the_first_variants_are_wrong() -> None:
    bench_step = load_program("bench_step")
    first = torch.tensor([9.0, 8.5])
    bench_step.check_losses(torch.tensor([9.01, 8.4]), first)
    bench_step.check_losses(torch.tensor([9.01, 0.4]), first)
    for losses in ([9.2, 8.5], [8.8, 8.5], [9.0, 9.1], [9.0, float("nan")], [float("inf"), 8.5]):
        with pytest.raises(load_program("harness").WrongResult, match=r"of the first .* 8\.5000"):
            bench_step.check_losses(torch.tensor(losses), first)


def test_a_first_variant_without_a_loss_is_wrong() -> None:
    bench_step = load_program("bench_step")
    losses = torch.tensor([9.0, float("nan")])
    with pytest.raises(load_program("harness").WrongResult):
        bench_step.check_losses(losses, losses)
