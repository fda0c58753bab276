"""The casts' benchmark runs on any machine, and times nothing that is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8dist import numerics
from fp8dist.config import RECIPES
from tests.unit.bench.program import load_program

bench_casts = load_program("bench_casts")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        bench_casts.main(arguments)
    return ended.value.code


def test_times_what_every_recipe_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_casts, "MANY", 3 * 128 * 256)
    saved = tmp_path / "casts.json"
    assert run("--shapes=128x256,256x128", f"--json={saved}") == 0
    report = json.loads(saved.read_text())
    printed = capsys.readouterr().out
    for recipe in RECIPES:
        rows = [row for row in report["rows"] if f"{recipe}:" in row["operands"]]
        for shape in ("128x256", "256x128"):
            named = {row["what"].split(" (")[0] for row in rows if row["shape"] == shape}
            # MXFP8's scales are found within the pass that casts.
            expected = {"amax and cast"} if "mx" in recipe else {"amax", "cast"}
            same_blocks = recipe in ("tensorwise", "blockwise")
            expected |= {"transpose" if same_blocks else "transpose + shift"}
            assert expected <= named
        assert any("grad_output" in row["operands"] for row in rows)
        assert any(row["shape"] == "3 of 128x256" for row in rows)
    for row in report["rows"]:
        seconds = row["microseconds"] / 1e6
        assert row["tb_per_second"] == pytest.approx(row["megabytes"] / 1e6 / seconds)
        at_bandwidth = row["megabytes"] * 1e6 / report["copy_bytes"] * report["copy_seconds"]
        assert row["times_bandwidth"] == pytest.approx(seconds / at_bandwidth)
        assert row["limit"] == (1.6 if row["what"].startswith("transpose (") else 1.3)
        assert row["too_slow"] == (row["times_copy"] > row["limit"])
    assert printed.count(" !") == sum(row["too_slow"] for row in report["rows"])


def test_bytes_are_those_that_must_be_moved(tmp_path: Path) -> None:
    saved = tmp_path / "casts.json"
    recipes = "tensorwise,rowwise,rowwise_with_gw_hp,mxfp8_rceil"
    run("--shapes=128x256", f"--json={saved}", f"--recipes={recipes}")
    report = json.loads(saved.read_text())
    rows = {row["what"]: row["megabytes"] for row in report["rows"] if row["shape"] == "128x256"}
    numbers = 128 * 256 / 1e6
    row, column = 128 * 4 / 1e6, 256 * 4 / 1e6
    one = 4 / 1e6
    expected = {
        "amax (tensor) of float32": 4 * numbers + one,
        "amax (row, column) of bfloat16": 2 * numbers + row + column,
        "cast (row) of float32 to e4m3": 5 * numbers + row,
        "amax (row, column) and cast by rows of float32 to e4m3": 5 * numbers + row + column,
        # Read twice, written in both orientations, each with its scales.
        "amax and cast, two orientations (row, column) of bfloat16 to e4m3": (
            6 * numbers + row + column
        ),
        "amax and cast, two orientations (tensor, tensor) of bfloat16 to e4m3": 6 * numbers
        + 2 * one,
        "amax and cast, transposed (column) of bfloat16 to e4m3": 5 * numbers + column,
        # A row is held until its amax is known.
        "amax and cast (row) of bfloat16 to e4m3": 3 * numbers + row,
        # A byte for each scale.
        "amax and cast (1x32) of float32 to e4m3 and scales": 5 * numbers + numbers / 32,
        "transpose (tensor to tensor)": 2 * numbers,
        "transpose + shift (row to column)": 2 * numbers + row,
    }
    assert {what: rows[what] for what in expected} == pytest.approx(expected)


def test_copies_are_of_whole_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 KiB, as others take longer, and no fewer bytes than are to be moved."""
    copied: list[int] = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda _, source: copied.append(source.nbytes))
    monkeypatch.setattr(bench_casts, "median_seconds", lambda function, **_: function())
    for size in (1, 8192, 8193, 2**20 + 4):
        bench_casts.copy_seconds.__wrapped__(size)
    assert copied == [4096, 4096, 8192, 2**19 + 4096]


@pytest.mark.parametrize("name", ["rowwise", "rowwise_with_gw_hp"])
def test_a_shifted_weight_has_its_reciprocals(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was gathered has, so that they are not timed."""
    cases = load_program("cast_cases")
    (work,) = (work for work, _ in cases.works_of(RECIPES[name]) if work.kind == "rescale")
    case = cases.case_of(work, (128, 256), 1)
    weights: list[numerics.Scaled] = []
    monkeypatch.setattr(
        cases.kernels, "rescale_transposed", lambda weight, *_: weights.append(weight)
    )
    case.call()
    (weight,) = weights
    assert weight.inverse is not None and weight.inverse.equal(1 / weight.scale)


@pytest.mark.parametrize(
    "name, recipe",
    [
        ("prepare_fill_amaxes", "rowwise"),
        ("prepare_cast_into", "rowwise"),
        ("prepare_pack_into", "mxfp8_rceil"),
        ("quantize_both", "rowwise"),
        ("rescale_transposed", "rowwise"),
    ],
)
def test_what_is_wrong_is_not_timed(
    name: str, recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = getattr(numerics, name.removeprefix("prepare_"))

    def flip(x: torch.Tensor) -> torch.Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        x.view(torch.uint8)[-1, -1] ^= 1
        return x

    def prepare_wrong(parts: Any) -> Any:
        written = parts[-1].amaxes[-1] if name == "prepare_fill_amaxes" else parts[-1].out

        def call() -> None:
            right(parts)
            written.copy_(flip(written))

        return call

    def wrong(*arguments: Any) -> Any:
        found = right(*arguments)
        if isinstance(found, numerics.Scaled):
            return found._replace(data=flip(found.data))
        return tuple(x and x._replace(data=flip(x.data)) for x in found)

    replaced = prepare_wrong if name.startswith("prepare_") else wrong
    monkeypatch.setattr(load_program("cast_cases").kernels, name, replaced)
    assert run("--shapes=128x128", f"--recipes={recipe}") == 1
    lines = capsys.readouterr().out.splitlines()
    wrong_lines = [line for line in lines if "is wrong and not timed" in line]
    assert wrong_lines
    assert all("1 of " in line for line in wrong_lines)
    for line in wrong_lines:
        assert not any(other.startswith(f"| {line.split(f', {recipe}:')[0]} |") for other in lines)


def test_refuses_shapes_that_blocks_do_not_divide(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--shapes=128x100") == 2
    assert "multiples of 128" in capsys.readouterr().err
