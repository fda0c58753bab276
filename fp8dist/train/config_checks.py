"""Which values of a job's configuration go together."""

from __future__ import annotations

import fp8dist.config
from fp8dist.train.config_sections import (
    DATASETS,
    FETCHED_DATASETS,
    FLOAT8_CONVERTER,
    GROUPED_FLOAT8_CONVERTER,
    GROUPED_MX_CONVERTER,
    MX_CONVERTER,
    VALIDATION_DATASETS,
)
from fp8dist.train.config_values import did_you_mean
from fp8dist.train.job_config import JobConfig


def check_combinations(job: JobConfig) -> None:
    """Whether values that are right one by one, are right together.

    Raises:
        ValueError: names the keys, what was found and what to do.
    """
    _check_degrees(job)
    _check_converters(job)
    _check_recipes(job)
    _check_float8(job)
    _check_activation_checkpoint(job)
    _check_datasets(job)
    _check_dataloader(job)
    _check_profiling(job)


def _check_degrees(job: JobConfig) -> None:
    for kind in ("pipeline", "context"):
        key = f"parallelism.{kind}_parallel_degree"
        if (degree := getattr(job.parallelism, f"{kind}_parallel_degree")) > 1:
            raise ValueError(
                f"{key} is {degree}: {kind} parallelism is not supported by this trainer; set "
                f"it to 1 and use the data_parallel degrees and tensor_parallel_degree"
            )


def _check_converters(job: JobConfig) -> None:
    linear = (FLOAT8_CONVERTER, MX_CONVERTER)
    grouped = (GROUPED_FLOAT8_CONVERTER, GROUPED_MX_CONVERTER)
    for name in job.model.converters:
        if name not in linear + grouped:
            raise ValueError(
                f"model.converters has the unknown {name!r}"
                f"{did_you_mean(name, linear + grouped, cutoff=0)}"
            )
    if set(linear) <= set(job.model.converters):
        raise ValueError(
            f"model.converters has both {' and '.join(linear)}: a job has one recipe, keep one "
            f"of them. From Python, fp8dist.convert_to_float8_training takes a list of "
            f"(filter, recipe) for models that mix recipes"
        )
    if set(grouped) <= set(job.model.converters):
        raise ValueError(
            f"model.converters has both {' and '.join(grouped)}: experts have one recipe, keep "
            f"one of them"
        )


def _check_recipes(job: JobConfig) -> None:
    linear = job.quantize.linear
    named = {FLOAT8_CONVERTER: linear.float8.recipe_name, MX_CONVERTER: linear.mx.recipe_name}
    for section, name in named.items():
        try:
            recipe = fp8dist.config.recipe(name)
        except ValueError as error:
            raise ValueError(f"{section}.recipe_name: {error}") from None
        right = MX_CONVERTER if recipe.scale_format == "e8m0" else FLOAT8_CONVERTER
        if section != right:
            raise ValueError(
                f"{section}.recipe_name is {name!r}, a recipe of {right}: set "
                f"{right}.recipe_name, and model.converters to {right}"
            )
    name = job.quantize.grouped_mm.mx.recipe_name
    if name not in ("mxfp8", "mxfp8_rceil"):
        raise ValueError(
            f"{GROUPED_MX_CONVERTER}.recipe_name is {name!r}; expected mxfp8 or mxfp8_rceil. "
            f"{GROUPED_FLOAT8_CONVERTER} scales experts by rows"
        )


def _check_float8(job: JobConfig) -> None:
    section, float8 = FLOAT8_CONVERTER, job.quantize.linear.float8
    if float8.precompute_float8_dynamic_scale_for_fsdp and not float8.float8_all_gather:
        raise ValueError(
            f"{section}.precompute_float8_dynamic_scale_for_fsdp is true but "
            f"{section}.enable_fsdp_float8_all_gather is false: scales are precomputed only "
            f"for the float8 all-gather. Turn the gather on, or leave precompute unset"
        )


def _check_activation_checkpoint(job: JobConfig) -> None:
    option = job.activation_checkpoint.selective_ac_option
    if option != "op" and not (option.isdecimal() and int(option) >= 1):
        raise ValueError(
            f"activation_checkpoint.selective_ac_option is {option!r}; expected 'op' or a "
            f"whole number of blocks, at least 1"
        )


def _check_datasets(job: JobConfig) -> None:
    training, validation = job.training, job.validation
    _check_dataset("training", training.dataset, training.dataset_path, DATASETS)
    if validation.enable:
        names = VALIDATION_DATASETS
        _check_dataset("validation", validation.dataset, validation.dataset_path, names)


def _check_dataset(section: str, name: str, path: str | None, shipped: tuple[str, ...]) -> None:
    known = shipped + FETCHED_DATASETS
    # With a path the name is a label: torchtitan users register their own.
    if path is None and name not in known:
        raise ValueError(
            f"{section}.dataset is {name!r}; expected {' or '.join(shipped)}, or a file or "
            f"folder in {section}.dataset_path{did_you_mean(name, known)}"
        )


def _check_dataloader(job: JobConfig) -> None:
    section = job.training.dataloader
    if section.prefetch_factor is not None and section.num_workers == 0:
        raise ValueError(
            f"training.dataloader.prefetch_factor is {section.prefetch_factor} and there are no "
            "workers to prefetch: set training.dataloader.num_workers, or leave it unset"
        )


def _check_profiling(job: JobConfig) -> None:
    section = job.profiling
    needed = section.profiler_warmup + section.profiler_active
    if section.enable_profiling and section.profile_freq < needed:
        raise ValueError(
            f"profiling.profile_freq is {section.profile_freq}, fewer steps than the "
            f"{section.profiler_warmup} of profiling.profiler_warmup and the "
            f"{section.profiler_active} of profiling.profiler_active together: set it to at least "
            f"{needed}"
        )
