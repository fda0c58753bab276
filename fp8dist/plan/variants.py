"""The jobs that are compared: one without conversion, and one for each recipe."""

import copy
from collections.abc import Sequence

from fp8dist.config import RECIPES, recipe
from fp8dist.train.config import JobConfig, validate
from fp8dist.train.config_sections import (
    FLOAT8_CONVERTER,
    GROUPED_FLOAT8_CONVERTER,
    GROUPED_MX_CONVERTER,
    MX_CONVERTER,
)


def unconverted(job: JobConfig) -> tuple[str, JobConfig]:
    """The job in high precision, called by the dtype that it gathers."""
    plain = copy.deepcopy(job)
    plain.model.converters = []
    return plain.training.mixed_precision_param, plain


def with_recipes(job: JobConfig, names: Sequence[str], *, experts: bool) -> dict[str, JobConfig]:
    """The job with each of the recipes called `names`, by their full names; none: every recipe.

    What `filter_fqns` of the recipe's section leaves out is left out. The section of MXFP8, if it
    has none, takes those of `quantize.linear.float8`, so that the recipes convert the same layers.

    Args:
        experts: whether the model has experts, which are converted too: to MXFP8 with recipes of
            that, by rows with any other.

    Raises:
        ValueError: there is no such recipe, or the job's other values do not go with one.
    """
    found = {}
    for name in names or RECIPES:
        chosen = recipe(name)
        mx = chosen.scale_format == "e8m0"
        converted = copy.deepcopy(job)
        converted.model.converters = [MX_CONVERTER if mx else FLOAT8_CONVERTER]
        if experts:
            grouped = GROUPED_MX_CONVERTER if mx else GROUPED_FLOAT8_CONVERTER
            converted.model.converters.append(grouped)
        linear = converted.quantize.linear
        if mx:
            linear.mx.recipe_name = chosen.name
            linear.mx.filter_fqns = linear.mx.filter_fqns or linear.float8.filter_fqns
        else:
            linear.float8.recipe_name = chosen.name
        validate(converted)
        found[chosen.name] = converted
    return found
