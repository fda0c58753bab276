"""The benchmark of one layer runs on any machine; what it says about sizes is in its rows."""

import csv
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fp8dist.small_kn import ANY, OTHER_GPUS, THRESHOLDS, Thresholds
from fp8dist.tensors.float8_tensor import Float8Tensor
from tests.unit.bench.program import load_program, run_program

bench_linear = load_program("bench_linear")
linear_report = load_program("linear_report")
VARIANTS = ["bf16", "torchao:rowwise", "fp8dist:rowwise", "fp8dist:mxfp8_rceil-ag"]


def rows(speedups: dict[tuple[int, int], float], **changes: Any) -> list[Any]:
    """Rows as they are measured, from (K, N) -> speed-up."""
    facts = dict(gpu="NVIDIA H200", torch="2.11.0", torchao="0.18.0", date="2026-11-24", m=8192)
    facts |= dict(variant="fp8dist:rowwise", seconds=1e-3)
    facts |= dict(output_db=28.0, grad_input_db=28.0, grad_weight_db=28.0)
    return [
        bench_linear.Row(**facts | dict(k=k, n=n, speedup=speedup) | changes)
        for (k, n), speedup in speedups.items()
    ]


def test_writes_a_row_and_a_picture_per_variant(tmp_path: Path) -> None:
    run = run_program(
        "bench_linear",
        "--m=64",
        "--n=128,160",
        "--k=128",
        f"--variants={','.join(VARIANTS)}",
        "--no-compile",
        f"--out={tmp_path}/new/linear",
    )
    assert run.returncode == 0, run.stderr
    with (tmp_path / "new" / "linear.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [(row["variant"], row["n"]) for row in found] == [
        (variant, n) for n in ("128", "160") for variant in VARIANTS
    ]
    for n in ("128", "160"):
        bf16, *others = (row for row in found if row["n"] == n)
        for row in others:
            speedup = float(bf16["seconds"]) / float(row["seconds"])
            assert float(row["speedup"]) == pytest.approx(speedup)
            # Of 4 bits, 31.5 dB below an operand and 3 dB more below a product of two.
            assert 27 < float(row["grad_input_db"]) < 32
    pictures = {path.name for path in (tmp_path / "new").glob("*.png")}
    assert pictures == {f"linear_{name.replace(':', '_')}.png" for name in VARIANTS[1:]}
    read = bench_linear.read_rows(tmp_path / "new" / "linear.csv")
    assert [(row.k, row.n, row.variant) for row in read[:1]] == [(128, 128, "bf16")]
    assert '"CPU": {' in run.stdout


def test_no_shape_is_started_after_the_budget(tmp_path: Path) -> None:
    run = run_program(
        "bench_linear",
        "--m=64",
        "--n=128",
        "--k=128,256",
        "--variants=bf16",
        "--no-compile",
        "--budget-seconds=0",
        f"--out={tmp_path}/linear",
    )
    assert run.returncode == 0, run.stderr
    _, _, printed = run.stdout.partition("the 0 s are used up; not measured, MxNxK: ")
    assert printed == "64x128x128, 64x128x256\n"
    assert not list(tmp_path.glob("*"))


@pytest.fixture
def one_rank() -> Any:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["bf16", "fp8dist:rowwise", "fp8dist:rowwise-ag"])
def test_the_weight_arrives_in_float8_or_is_cast_in_forward(name: str, one_rank: None) -> None:
    variant = bench_linear.Variant.parse(name)
    linear = bench_linear.layer_of(variant, 128, 256)
    assert isinstance(linear.weight, Float8Tensor) == (name == "fp8dist:rowwise")
    assert linear.weight.shape == (128, 256)
    # The same values for all: e4m3 keeps 4 bits, so 1/16 is more than it moves an element.
    plain = bench_linear.layer_of(bench_linear.Variant.parse("bf16"), 128, 256).weight
    difference = (linear.weight.detach().float() - plain.detach().float()).abs()
    assert (difference <= plain.abs().float() / 16 + 1e-4).all()


def test_wrong_results_are_told() -> None:
    expected = tuple(torch.randn(64, 64) for _ in range(3))
    found = (expected[0], expected[1] * 2, expected[2])
    with pytest.raises(load_program("harness").WrongResult, match=r"inf, 0\.0, inf dB"):
        bench_linear.check_results(found, expected)


def test_what_is_wrong_or_fails_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_rank: None
) -> None:
    right = bench_linear.forward_and_backward

    def changed(variant: Any, *arguments: Any) -> Any:
        call = right(bench_linear.Variant.parse("bf16"), *arguments)
        if variant.recipe == "rowwise":
            return lambda: [result + 1 for result in call()]
        if variant.recipe == "blockwise":
            raise RuntimeError("illegal instruction\nmore")
        return call

    monkeypatch.setattr(bench_linear, "forward_and_backward", changed)
    names = ["bf16", "fp8dist:rowwise", "fp8dist:blockwise", "fp8dist:tensorwise"]
    variants = [bench_linear.Variant.parse(name) for name in names]
    found, all_right = bench_linear.measure_shape(variants, 64, 128, 128, compiled=False)
    assert [row.variant for row in found] == ["bf16", "fp8dist:tensorwise"]
    assert not all_right
    printed = capsys.readouterr().out
    assert "fp8dist:rowwise is not timed for M 64, N 128, K 128: SQNR of output" in printed
    assert "fp8dist:blockwise is not timed for M 64, N 128, K 128: illegal instruction\n" in printed


def test_a_picture_has_a_line_per_variant_and_a_panel_per_m() -> None:
    sizes = {(1024, 2048): 0.5, (4096, 2048): 1.25, (4096, 8192): 1.75}  # no (1024, 8192)
    measured = rows(dict.fromkeys(sizes, 1.0), variant="bf16")
    measured += rows({size: s + 0.25 for size, s in sizes.items()}, m=16384)
    measured += rows(sizes)
    measured += rows(sizes, variant="fp8dist:blockwise", date="2026-11-25")
    figure = linear_report.draw(measured)
    *panels, colors = figure.axes
    names = ["fp8dist:rowwise", "fp8dist:blockwise"]
    assert [panel.get_title() for panel in panels] == [
        f"{name}, M {m}" for name in names for m in (8192, 16384)
    ]
    assert {panel.images[0].norm for panel in panels} == {panels[0].images[0].norm}
    expected = {"0.50": (0, 0), "1.25": (1, 0), "1.75": (1, 1)}  # K to the right, N upwards
    higher = {"0.75": (0, 0), "1.50": (1, 0), "2.00": (1, 1)}
    for panel, texts in zip(panels, [expected, higher, expected, {}], strict=True):
        assert {text.get_text(): text.get_position() for text in panel.texts} == texts
        grey = panel.images[0].get_array().mask
        assert {(x, y) for y in (0, 1) for x in (0, 1) if not grey[y, x]} == set(texts.values())
        assert panel.images[0].origin == "lower"
    assert [label.get_text() for label in panels[2].get_xticklabels()] == ["1024", "4096"]
    assert [label.get_text() for label in panels[2].get_yticklabels()] == ["2048", "8192"]
    assert "NVIDIA H200 · torch 2.11.0 · torchao 0.18.0 · 2026-11-24 and" in figure.get_suptitle()


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A CSV of three variants."""
    measured = rows({(1024, 1024): 1.0, (1024, 2048): 1.0}, variant="bf16")
    for name in ("fp8dist:rowwise", "torchao:rowwise"):
        measured += rows({(1024, 1024): 0.75, (1024, 2048): 1.25}, variant=name)
    write_csv = load_program("harness").write_csv
    write_csv(tmp_path / "linear.csv", [dataclasses.asdict(row) for row in measured])
    return str(tmp_path / "linear.csv")


@pytest.mark.parametrize("chosen", [None, "bf16,torchao:rowwise"])
def test_a_file_is_drawn_and_summed_up_by_variants(
    chosen: str | None,
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drawn = []
    draw = bench_linear.draw
    monkeypatch.setattr(bench_linear, "draw", lambda rows: drawn.extend(rows) or draw(rows))
    picture = tmp_path / "new" / "all.png"
    only = [f"--variants={chosen}"] if chosen else []
    bench_linear.main([f"--thresholds={file}", f"--picture={picture}", *only])
    assert picture.read_bytes().startswith(b"\x89PNG")
    names = (
        ["bf16", "torchao:rowwise"] if chosen else ["bf16", "fp8dist:rowwise", "torchao:rowwise"]
    )
    assert [row.variant for row in drawn] == [name for name in names for _ in range(2)]
    table, *thresholds = capsys.readouterr().out.partition('    "NVIDIA H200": {')
    assert table.splitlines() == [
        "| variant | M 8192 |",
        "|---|---|",
        "| bf16 | 2 sizes |",
        *(f"| {name} | 1.00 (1 of 2 gain) |" for name in names[1:]),
    ]
    # They are those of weights that arrived in float8.
    assert ("(ANY, 1024)" in "".join(thresholds)) == (chosen is None)


def test_a_variant_that_a_file_does_not_have_is_refused(file: str) -> None:
    with pytest.raises(ValueError, match="no rows of fp8dist:blockwise; there are bf16, fp8dist"):
        bench_linear.main([f"--thresholds={file}", "--variants=bf16,fp8dist:blockwise"])


def test_what_is_only_compiled_is_compared_and_not_timed(
    one_rank: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_linear, "median_seconds", None)
    variants = [bench_linear.Variant.parse(name) for name in ("bf16", "fp8dist:rowwise")]
    assert bench_linear.measure_shape(variants, 64, 128, 128, False, timed=False) == ([], True)
    monkeypatch.setattr(bench_linear, "LOWEST_SQNR", 100.0)
    assert bench_linear.measure_shape(variants, 64, 128, 128, False, timed=False) == ([], False)
    assert "fp8dist:rowwise is not timed for M 64, N 128, K 128" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--compile-only", "--variants=bf16"])
def test_nothing_to_draw_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_linear.main(["--picture=all.png", flag])
    assert re.search(f"error: .*{flag.partition('=')[0]}.* nothing", capsys.readouterr().err)


@pytest.mark.parametrize("recipe", THRESHOLDS[OTHER_GPUS])
def test_thresholds_follow_from_the_sizes_that_lose(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that lose just where torchao's thresholds say so give torchao's thresholds."""
    sizes = [1024, 2048, 4096, 8192, 16384]
    torchao = THRESHOLDS[OTHER_GPUS][recipe]
    speedups = {(k, n): 0.9 if torchao.too_small(k, n) else 1.1 for k in sizes for n in sizes}
    measured = rows(speedups, variant=f"fp8dist:{recipe}")
    measured += rows(dict.fromkeys(speedups, 0.5), variant=f"fp8dist:{recipe}-ag")
    linear_report.print_thresholds(measured)
    printed = capsys.readouterr().out
    table = eval("{" + printed + "}", {"Thresholds": Thresholds, "ANY": ANY})
    assert list(table) == ["NVIDIA H200"]
    assert list(table["NVIDIA H200"]) == [recipe]
    found = table["NVIDIA H200"][recipe]
    assert set(found.boxes) == set(torchao.boxes)
    assert found.source == "scripts/bench/bench_linear.py, M 8192, torch 2.11.0, 2026-11-24"
    assert "#" not in printed


def test_the_median_over_m_decides() -> None:
    sizes = {(1024, 1024): 0.9, (2048, 1024): 0.9}
    measured = rows(sizes) + rows({size: 1.2 for size in sizes}, m=2048)
    measured += rows({(1024, 1024): 0.95, (2048, 1024): 1.1}, m=16384)
    thresholds, outside = linear_report.implied_thresholds(measured)["NVIDIA H200"]["rowwise"]
    assert thresholds.boxes == ((1024, math.inf),)
    assert thresholds.source.startswith("scripts/bench/bench_linear.py, M 2048/8192/16384, ")
    assert not outside


def test_sizes_that_no_box_has_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    speedups = {(1024, 1024): 1.1, (1024, 2048): 1.2, (2048, 1024): 1.2, (2048, 2048): 0.97}
    linear_report.print_thresholds(rows(speedups))
    printed = capsys.readouterr().out
    assert "# in no box, yet slower: K 2048, N 2048 (x0.97)" in printed
    assert (
        eval("{" + printed + "}", {"Thresholds": Thresholds})["NVIDIA H200"]["rowwise"].boxes == ()
    )


def test_a_size_that_was_not_measured_is_not_said_to_lose() -> None:
    speedups = {(1024, 1024): 0.9, (1024, 2048): 0.9, (2048, 1024): 0.9}
    assert set(linear_report.too_small(speedups)) == {(1024, ANY), (ANY, 1024)}
