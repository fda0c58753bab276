"""Which layers are too small to gain: by GPU, by recipe."""

import csv
import re
import statistics
from collections import defaultdict

import pytest
import torch
import torch.nn as nn

from fp8dist import small_kn
from fp8dist.convert import float8_module_filter
from fp8dist.small_kn import ANY, OTHER_GPUS, THRESHOLDS, Thresholds, thresholds_by_recipe
from tests.environment import ROOT


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Thresholds]:
    """Thresholds for a GPU that does not exist."""
    own = {
        "rowwise": Thresholds(((256, 512),), "a test"),
        "blockwise": Thresholds((), "a test"),
    }
    table = {OTHER_GPUS: THRESHOLDS[OTHER_GPUS], "NVIDIA H1": own}
    monkeypatch.setattr(small_kn, "THRESHOLDS", table)
    return own


def on_gpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)


@pytest.mark.parametrize(
    ("k", "n", "expected"),
    [(256, 512, True), (16, 16, True), (257, 16, False), (16, 513, False), (9, 10**6, True)],
)
def test_a_layer_is_too_small_within_a_box(k: int, n: int, expected: bool) -> None:
    thresholds = Thresholds(((256, 512), (9, ANY)), "a test")
    assert thresholds.too_small(k, n) is expected


def test_without_boxes_nothing_is_too_small() -> None:
    assert not Thresholds((), "a test").too_small(1, 1)


def test_every_entry_says_how_it_was_measured() -> None:
    for recipes in THRESHOLDS.values():
        for thresholds in recipes.values():
            assert thresholds.source
            assert all(k > 0 and n > 0 for k, n in thresholds.boxes)


@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3", None])
def test_a_gpu_that_was_not_measured_has_those_of_others(
    gpu: str | None, measured: dict[str, Thresholds]
) -> None:
    assert thresholds_by_recipe(gpu) == THRESHOLDS[OTHER_GPUS]


def test_a_gpu_that_was_measured_has_its_own(measured: dict[str, Thresholds]) -> None:
    assert thresholds_by_recipe("NVIDIA H1") == {
        "tensorwise": THRESHOLDS[OTHER_GPUS]["tensorwise"],
        **measured,
    }


def test_the_filter_asks_for_the_gpu_at_hand(
    measured: dict[str, Thresholds], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = nn.Linear(1024, 1024)  # too small as torchao has it
    on_gpu(monkeypatch, "NVIDIA H1")
    assert float8_module_filter("rowwise", ["auto_filter_small_kn"])(layer, "")
    assert not float8_module_filter("rowwise", ["auto_filter_small_kn"])(nn.Linear(256, 512), "")
    assert float8_module_filter("blockwise", ["auto_filter_small_kn"])(layer, "")
    on_gpu(monkeypatch, "NVIDIA H2")
    assert not float8_module_filter("rowwise", ["auto_filter_small_kn"])(layer, "")
    others = r"'blockwise' on NVIDIA H2 \(it has them for tensorwise, rowwise\)"
    with pytest.raises(ValueError, match=others):
        float8_module_filter("blockwise", ["auto_filter_small_kn"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'blockwise' on a machine without a GPU"):
        float8_module_filter("blockwise", ["auto_filter_small_kn"])


def test_the_readme_has_them_all() -> None:
    """Its table: a line per recipe, H200's column and that of other GPUs."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, section = readme.partition("## When float8 pays")
    lines = re.findall(r"^\| `?(\w+)`? \| (.*) \| (.*) \|$", section.partition("\n## ")[0], re.M)
    found: dict[str, dict[str, set[tuple[float, float]]]] = {"NVIDIA H200": {}, OTHER_GPUS: {}}
    for recipe, *cells in lines[1:]:
        for gpu, cell in zip(found, cells, strict=True):
            if cell == "refused by name":
                continue
            boxes = [dict(re.findall(r"([KN]) <= (\d+)", box)) for box in cell.split(", or ")]
            found[gpu][recipe] = {
                (float(box.get("K", ANY)), float(box.get("N", ANY))) for box in boxes if box
            }
            assert bool(found[gpu][recipe]) == (cell != "never")
    assert found == {
        gpu: {recipe: set(thresholds.boxes) for recipe, thresholds in recipes.items()}
        for gpu, recipes in THRESHOLDS.items()
    }


# --- NVIDIA H200, against the speed-ups that its thresholds were taken from

Size = tuple[int, int]


@pytest.fixture(scope="module")
def on_h200() -> dict[str, dict[Size, float]]:
    """Recipe -> (K, N) -> the median speed-up over M of a layer whose weight arrived in float8."""
    path = ROOT / "docs" / "figures" / "linear.csv"
    of_size = defaultdict(dict)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            assert row["gpu"] == "NVIDIA H200"
            library, _, recipe = row["variant"].partition(":")
            if library == "fp8dist":
                speedups = of_size[recipe, int(row["k"]), int(row["n"])]
                assert row["m"] not in speedups, f"measured twice: {row}"
                speedups[row["m"]] = float(row["speedup"])
    medians: dict[str, dict[Size, float]] = defaultdict(dict)
    for (recipe, k, n), speedups in of_size.items():
        medians[recipe][k, n] = statistics.median(speedups.values())
    return medians


def test_h200_has_the_recipes_that_were_measured(on_h200: dict[str, dict[Size, float]]) -> None:
    assert set(THRESHOLDS["NVIDIA H200"]) == set(on_h200)
    assert set(thresholds_by_recipe("NVIDIA H200")) == set(on_h200)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise"])
def test_h200_leaves_out_what_lost(recipe: str, on_h200: dict[str, dict[Size, float]]) -> None:
    """Left out is a size if it lost, and so did every smaller one that was measured."""
    speedups = on_h200[recipe]
    assert len(speedups) > 20
    thresholds = THRESHOLDS["NVIDIA H200"][recipe]
    for k, n in speedups:
        smaller = [s for (other_k, other_n), s in speedups.items() if other_k <= k and other_n <= n]
        assert thresholds.too_small(k, n) == (max(smaller) < 1), (k, n)
    # Between two sizes nothing is known, so a box ends at one that was measured, and from the
    # largest on it is taken to go on.
    ks, ns = (sorted({size[axis] for size in speedups}) for axis in (0, 1))
    for k, n in thresholds.boxes:
        assert k in [*ks[:-1], ANY]
        assert n in [*ns[:-1], ANY]


def test_h200_converts_more_than_torchao_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """K 4096, N 1024: torchao leaves it out by its times on H100; here it is faster."""
    layer = nn.Linear(4096, 1024, device="meta")
    for gpu, converted in [("NVIDIA H200", True), ("NVIDIA H100 80GB HBM3", False)]:
        on_gpu(monkeypatch, gpu)
        assert float8_module_filter("tensorwise", ["auto_filter_small_kn"])(layer, "") is converted


def test_h200_has_thresholds_that_other_gpus_have_not(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (nn.Linear(1024, n, device="meta") for n in (1024, 8192))
    on_gpu(monkeypatch, "NVIDIA H200")
    keep = float8_module_filter("blockwise", ["auto_filter_small_kn"])
    assert keep.reason(small, "") == "too small to gain (auto_filter_small_kn)"
    assert keep(large, "")
    with pytest.raises(ValueError, match=r"'mxfp8_rceil' on NVIDIA H200 .*\bblockwise\)"):
        float8_module_filter("mxfp8_rceil", ["auto_filter_small_kn"])
