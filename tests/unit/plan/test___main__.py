"""`python -m fp8dist.plan`: its flags, what it prints and writes, and its errors."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fp8dist.plan.__main__ import main, parse
from fp8dist.plan.figures import PURPOSES, Machine
from fp8dist.plan.step import MEMORY

SMALL = [
    "--model.flavor=debugmodel:1",
    "--training.seq_len=32",
    "--training.local_batch_size=1",
    "--quantize.linear.float8.filter_fqns=output",
]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["fp8dist.plan", *SMALL, *arguments])
    main()


def test_flags() -> None:
    options, job = parse(
        ["--ranks=16", "--link", "25", "--tp-link=400", "--recipes=rowwise,mxfp8", *SMALL]
    )
    assert (options.ranks, options.recipes) == (16, ["rowwise", "mxfp8"])
    assert options.machine == Machine(25e9, 400e9, 3000e9)
    assert job.training.seq_len == 32


def test_a_file_and_flags() -> None:
    _, job = parse(["--job.config_file=scripts/configs/llama3_70b.toml", "--training.seq_len=64"])
    assert (job.model.flavor, job.training.seq_len) == ("70B", 64)


def test_what_is_printed_and_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = {"--json": tmp_path / "plans" / "plan.json", "--plot": tmp_path / "plan.png"}
    written = [text for flag, file in files.items() for text in (flag, str(file))]
    run(
        monkeypatch,
        "--ranks=4",
        "--recipes=rowwise,blockwise",
        # wk has 128 rows, half of which are no block of 128.
        "--parallelism.tensor_parallel_degree=2",
        "--tp-link=100",
        *written,
    )
    printed = capsys.readouterr().out
    assert "4 ranks: 2 dp_shard x 2 tp; a data-parallel rank takes 1 x 32 tokens" in printed
    assert "100 GB/s within tp" in printed
    assert "blockwise is not possible: " in printed
    for word in (*PURPOSES, *MEMORY, "tp link", "takes less time"):
        assert word in printed
    assert files["--plot"].read_bytes().startswith(b"\x89PNG")

    plan: dict[str, Any] = json.loads(files["--json"].read_text())
    assert (plan["ranks"], plan["mesh"], plan["base"]) == (4, {"dp_shard": 2, "tp": 2}, "bfloat16")
    assert list(plan["variants"]) == ["bfloat16", "rowwise"]
    assert list(plan["impossible"]) == ["blockwise"]
    for variant in plan["variants"].values():
        sent = dict(variant["sent"])
        total = sent.pop("total")
        assert sum(sent.values()) == total == sum(one["sent"] for one in variant["collectives"])
    rowwise = plan["variants"]["rowwise"]
    assert rowwise["sent"]["weights"] < 0.6 * plan["variants"]["bfloat16"]["sent"]["weights"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks=0"], "argument --ranks: '0'; expected a whole number, at least 1"),
        (["--link=fast"], "argument --link: 'fast'; expected a number of GB/s above 0"),
        (["--memory-bandwidth=inf"], "expected a number of GB/s above 0"),
        (["--rank=4"], "unknown key 'rank'"),
        (["--model.flavour=8B"], "did you mean 'model.flavor'"),
        (["--recipes=rowwize"], "did you mean 'rowwise'"),
        (["--ranks=3", "--parallelism.tensor_parallel_degree=2"], "do not fit 3 ranks"),
        (["--training.global_batch_size=9", "--ranks=2"], "is not a multiple of"),
    ],
)
def test_an_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments)
    message = str(caught.value)
    assert message.startswith("error: ") and words in message and "\n" not in message


def test_without_any_possible_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="error: blockwise: layers.0.attention"):
        run(
            monkeypatch,
            "--recipes=blockwise",
            "--ranks=2",
            "--parallelism.tensor_parallel_degree=2",
        )


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "--help")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert all(meaning in printed for meaning in (MEMORY | PURPOSES).values())
