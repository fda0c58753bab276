"""The jobs that a plan compares."""

import pytest

from fp8dist.config import RECIPES
from fp8dist.plan.variants import unconverted, with_recipes
from fp8dist.train.config import parse_config


def test_without_conversion_the_name_is_what_is_gathered() -> None:
    job = parse_config(["--model.converters=quantize.linear.mx"])
    name, plain = unconverted(job)
    assert (name, plain.float8_enabled) == ("bfloat16", False)
    assert job.float8_enabled, "the job itself is as it was"
    job = parse_config(["--training.mixed_precision_param=float32"])
    assert unconverted(job)[0] == "float32"


def test_every_recipe_by_default() -> None:
    found = with_recipes(parse_config([]), [], experts=False)
    assert list(found) == list(RECIPES)
    for name, job in found.items():
        assert job.conversion is not None
        assert job.conversion.recipe_name == name
        assert job.conversion_of_experts is None


def test_recipes_leave_out_the_same_layers() -> None:
    job = parse_config(["--quantize.linear.float8.filter_fqns=output,wk"])
    for converted in with_recipes(job, [], experts=False).values():
        assert converted.conversion is not None
        assert converted.conversion.filter_fqns == ["output", "wk"]
    job = parse_config(
        ["--quantize.linear.float8.filter_fqns=output", "--quantize.linear.mx.filter_fqns=wv"]
    )
    converted = with_recipes(job, ["rowwise", "mxfp8"], experts=False)
    filters = {
        name: one.conversion and one.conversion.filter_fqns for name, one in converted.items()
    }
    assert filters == {"rowwise": ["output"], "mxfp8_rceil": ["wv"]}


def test_experts() -> None:
    job = parse_config(["--quantize.grouped_mm.mx.fqns=layers.0"])
    converted = with_recipes(job, ["tensorwise", "mxfp8"], experts=True)
    rows, mx = (one.conversion_of_experts for one in converted.values())
    assert rows is not None and (rows.recipe_name, rows.fqns) == ("rowwise", ["experts"])
    assert mx is not None and (mx.recipe_name, mx.fqns) == ("mxfp8", ["layers.0"])


def test_unknown_recipe() -> None:
    with pytest.raises(ValueError, match="unknown float8 recipe 'rowwize': did you mean 'rowwise'"):
        with_recipes(parse_config([]), ["rowwize"], experts=False)
