"""`float8_module_filter`: by size as torchao decides and as recipes need it, and by name."""

import itertools

import pytest
import torch
import torch.nn as nn
from torchao.float8 import Float8LinearRecipeName
from torchao.float8.float8_linear_utils import _auto_filter_for_recipe

from fp8dist import float8_module_filter


@pytest.fixture
def unmeasured_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own may have thresholds of its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")


@pytest.mark.usefixtures("unmeasured_gpu")
@pytest.mark.parametrize("filter_fqns", [[], ["output"], ["wk", "output"]])
@pytest.mark.parametrize("recipe_name", ["tensorwise", "rowwise"])
def test_auto_filter_decides_as_torchao_does(recipe_name: str, filter_fqns: list[str]) -> None:
    sizes = [16, 1008, 1016, 1024, 1040, 2048, 2064, 4080, 4096, 4104, 4112, 8192, 28672]
    ours = float8_module_filter(recipe_name, [*filter_fqns, "auto_filter_small_kn"])
    theirs = _auto_filter_for_recipe(recipe_name, filter_fqns)
    decisions = set()
    for k, n in itertools.product(sizes, sizes):
        with torch.device("meta"):
            linear = nn.Linear(k, n, bias=False)
        for fqn in ("layers.0.attention.wq", "layers.0.attention.wk", "output"):
            decisions.add(ours(linear, fqn))
            assert ours(linear, fqn) == theirs(linear, fqn), (k, n, fqn)
    assert decisions == {True, False}


@pytest.mark.usefixtures("unmeasured_gpu")
@pytest.mark.parametrize("recipe_name", ["rowwise_with_gw_hp", "blockwise", "mxfp8"])
def test_auto_filter_without_published_thresholds_is_refused(recipe_name: str) -> None:
    with pytest.raises(ValueError, match=f"no thresholds for recipe '{recipe_name}'"):
        float8_module_filter(recipe_name, ["auto_filter_small_kn"])


@pytest.mark.parametrize(
    ("recipe_name", "multiple"), [("rowwise", 16), ("blockwise", 128), ("mxfp8_rceil", 32)]
)
def test_sizes_are_multiples_of_what_the_recipe_scales_together(
    recipe_name: str, multiple: int
) -> None:
    keep = float8_module_filter(recipe_name)
    assert keep(nn.Linear(multiple, multiple), "")
    assert not keep(nn.Linear(multiple, multiple + multiple // 2), "")
    assert not keep(nn.Linear(multiple + multiple // 2, multiple), "")


def test_without_auto_filter_size_does_not_matter() -> None:
    keep = float8_module_filter("tensorwise", [])
    assert keep(nn.Linear(16, 16), "")
    assert not keep(nn.Linear(16, 24), "")
    assert not keep(nn.Linear(24, 16), "")
    assert not keep(nn.Embedding(16, 16), "")


def test_filter_fqns_are_parts_of_names() -> None:
    keep = float8_module_filter("tensorwise", ["attention.wq", "output"])
    linear = nn.Linear(16, 16)
    assert not keep(linear, "layers.3.attention.wq")
    assert not keep(linear, "model.output")
    assert keep(linear, "layers.3.attention.wo")
    assert keep(linear, "layers.3.feed_forward.wq")


def test_filter_fqns_given_as_a_string_is_refused() -> None:
    """It would be taken for a list of single letters."""
    with pytest.raises(ValueError, match="list of names.*'output'"):
        float8_module_filter("tensorwise", "output")


def test_filter_of_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'tensorwise'"):
        float8_module_filter("tensorwize", [])


def test_filters_take_torchao_s_enum_and_refuse_other_types() -> None:
    by_enum = float8_module_filter(Float8LinearRecipeName.ROWWISE, ["output"])
    assert by_enum.recipe.name == "rowwise"
    with pytest.raises(ValueError, match="a recipe's name is a string, not None: tensorwise, "):
        float8_module_filter(None)
    with pytest.raises(ValueError, match="filter_fqns is a list of names, got the NoneType None"):
        float8_module_filter("rowwise", None)
