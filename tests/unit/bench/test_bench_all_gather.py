"""The benchmark of the all-gather runs on any machine, and knows what should cross the wire."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fp8dist import kernels
from fp8dist.config import RECIPES
from tests.unit.bench.program import load_program, run_program

unsharding = load_program("unsharding")
bench_step = load_program("bench_step")
N, K = 256, 128


@pytest.fixture
def ranks() -> Iterator[object]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield unsharding.Ranks()
    dist.destroy_process_group()


def payload_bytes(variant: str, elements: int) -> int:
    if variant == "bf16":
        return 2 * elements
    return elements + elements // 32 if "mxfp8" in variant else elements


def test_times_and_bytes_of_every_part_on_two_ranks(tmp_path: Path) -> None:
    saved = tmp_path / "rows.json"
    run = run_program(
        "bench_all_gather",
        f"--rows={N},{2 * N}",
        f"--columns={K}",
        "--calls=2",
        "--weights=1",
        "--unshards=4",
        f"--json={saved}",
        ranks=2,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(saved.read_text())
    names = ["bf16", "torchao:tensorwise+ag", *(f"fp8dist:{name}" for name in RECIPES)]
    assert [(row["n"], row["variant"]) for row in report["rows"]] == [
        (n, name) for n in (N, 2 * N) for name in names
    ]
    for row in report["rows"]:
        elements = row["n"] * K
        payload = payload_bytes(row["variant"], elements) // 2
        assert row["collective_bytes"] == payload
        assert row["copy_in_bytes"] == 2 * payload
        assert row["copy_out_bytes"] == 4 * payload
        # A shard of float32 is read to be cast, either here or there, and for amaxes before that,
        # but for those of blocks within rows.
        casts = 2 * elements + payload
        before = any(name in row["variant"] for name in ("tensorwise", "blockwise"))
        amaxes = 2 * elements if before else 0
        ours = row["variant"].startswith("fp8dist")
        assert row["precompute_bytes"] == amaxes + (casts if ours else 0)
        assert row["cast_bytes"] == (0 if ours else casts)
        parts = [row[name] for name in ("cast", "copy_in", "collective", "copy_out")]
        assert min(parts) > 0
        assert row["per_unshard"] == pytest.approx(sum(parts) + row["precompute"] / 4)
    assert "| net win for messages (MB in bfloat16) | here, " in run.stdout
    assert run.stdout.count("| fp8dist:rowwise |") == 3

    picture = tmp_path / "phases.png"
    drawn = run_program("plot_phases", str(saved), str(picture))
    assert drawn.returncode == 0, drawn.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "recipe, columns, expected",
    [
        ("tensorwise", 128, True),
        ("blockwise", 128, True),
        ("rowwise", kernels.WIDEST_ROWS, False),
        ("rowwise", kernels.WIDEST_ROWS + 16, True),
        ("mxfp8", kernels.WIDEST_ROWS + 128, False),
    ],
)
def test_what_is_read_before_it_is_cast(recipe: str, columns: int, expected: bool) -> None:
    assert load_program("bench_all_gather").amaxes_are_found_before(recipe, columns) == expected


def test_one_rank_copies_no_payload(ranks: object) -> None:
    options = argparse.Namespace(calls=1, weights=1, unshards=2)
    rows = [
        load_program("bench_all_gather").measure(
            bench_step.Variant.parse(name), N, K, options, ranks
        )
        for name in ("bf16", "fp8dist:rowwise")
    ]
    # In bfloat16 the shard is cast, and that is copied.
    assert [row.cast_bytes for row in rows] == [(4 + 2 + 4) * N * K, 0]


def test_bars_are_as_long_as_an_unshard_takes() -> None:
    parts = {
        "precompute": 40e-6,
        "cast": 1e-6,
        "copy_in": 2e-6,
        "collective": 3e-6,
        "copy_out": 4e-6,
    }
    row = {"variant": "bf16", "n": N, "k": K, "per_unshard": 20e-6, **parts}
    other = row | {"variant": "fp8dist:rowwise", "cast": 6e-6, "per_unshard": 25e-6}
    report = {
        "gpu": None,
        "ranks": 2,
        "versions": {},
        "date": "2026-11-24",
        "arguments": {"unshards": 4},
        "rows": [row, other, *({**of_size, "n": 2 * N} for of_size in (row, other))],
    }
    panels = load_program("plot_phases").draw(report).axes
    assert len(panels) == 2
    for axes in panels:
        widths = [bar.get_width() for bar in axes.patches]
        assert widths == pytest.approx([10, 1, 2, 3, 4, 10, 6, 2, 3, 4])
        ends = [axes.patches[last].get_x() + widths[last] for last in (4, 9)]
        assert ends == pytest.approx([20, 25])
        assert [text.get_text() for text in axes.texts] == ["20", "25 (1.25)"]


def test_refuses_shards_that_a_recipe_cannot_cast() -> None:
    # The one that torchrun starts: a program that imports too little would fail.
    run = run_program("bench_all_gather", "--rows=200", "--columns=128", ranks=1, fork=False)
    assert run.returncode != 0
    assert "--rows is 200 and --columns 128" in run.stderr


@pytest.mark.parametrize("recipe", RECIPES)
def test_expected_bytes_are_those_of_the_recipe(recipe: str) -> None:
    variant = bench_step.Variant.parse(f"fp8dist:{recipe}")
    found = unsharding.expected_bytes(variant, torch.randn(N, K))
    assert found.dtype == torch.uint8
    assert found.numel() == payload_bytes(variant.name, N * K)


@pytest.mark.parametrize("name", ["bf16", "torchao:tensorwise+ag", "fp8dist:rowwise"])
def test_another_weight_is_wrong(name: str, ranks: object) -> None:
    variant = bench_step.Variant.parse(name)
    torch.manual_seed(0)
    weight = torch.nn.Linear(K, N, bias=False).weight.detach()
    unshard = unsharding.Unsharding(variant, N, K, ranks)
    unshard.check(weight)
    with pytest.raises(load_program("harness").WrongResult, match=r"unsharded weight is 6\.0 dB"):
        unshard.check(2 * weight)


def test_one_rank_has_one_part(ranks: object) -> None:
    variant = bench_step.Variant.parse("fp8dist:rowwise")
    seconds = unsharding.Unsharding(variant, N, K, ranks).stages(calls=2)
    assert seconds[0] > 0
    assert seconds[1:] == [0, 0, 0]
    assert unsharding.precompute_seconds(variant, N, K, 2, ranks) > 0
