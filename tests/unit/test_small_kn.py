"""Which layers are too small to gain: by GPU, by recipe."""

import pytest
import torch
import torch.nn as nn

from fp8dist import small_kn
from fp8dist.convert import float8_module_filter
from fp8dist.small_kn import ANY, OTHER_GPUS, THRESHOLDS, Thresholds, thresholds_by_recipe


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
    with pytest.raises(ValueError, match=r"'blockwise' \(it has them for tensorwise, rowwise\)"):
        float8_module_filter("blockwise", ["auto_filter_small_kn"])
