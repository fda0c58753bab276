"""Values of configuration keys: text or TOML in, the field's type out, and what numbers may be."""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """`; did you mean 'x'?` with the known name nearest to `name`; empty if none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def without_none(annotation: Any) -> tuple[Any, bool]:
    """`X | None` as (X, True), any other annotation as (itself, False)."""
    if get_origin(annotation) in (Union, types.UnionType):
        (inner,) = (arg for arg in get_args(annotation) if arg is not type(None))
        return inner, True
    return annotation, False


def convert(key: str, annotation: Any, value: Any) -> Any:
    """`value`, as it came from TOML or as text from the command line, in the type of `key`.

    Text becomes a number or a truth value; a list is also accepted as comma-separated text; for
    a key that may be unset, "none" and empty text are None.

    Raises:
        ValueError: the value is not of that type, or no name the key knows.
    """
    annotation, optional = without_none(annotation)
    if optional and (value is None or (isinstance(value, str) and value.lower() in ("", "none"))):
        return None
    if get_origin(annotation) is list:
        (item,) = get_args(annotation)
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, list):
            raise ValueError(f"{key} is {value!r}; expected a list of text")
        return [convert(key, item, element) for element in value]
    if get_origin(annotation) is Literal:
        names = get_args(annotation)
        if value in names:
            return value
        hint = did_you_mean(str(value), names)
        raise ValueError(f"{key} is {value!r}; expected one of {', '.join(names)}{hint}")
    return _CONVERTERS[annotation](key, value)


def _to_bool(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError(f"{key} is {value!r}; expected true or false")


def _to_int(key: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass  # reported below, like a value of another type
    raise ValueError(f"{key} is {value!r}; expected a whole number")


def _to_float(key: str, value: Any) -> float:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass  # reported below, like a value of another type
    raise ValueError(f"{key} is {value!r}; expected a number")


def _to_str(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    # selective_ac_option = 2 is as clear as selective_ac_option = "2".
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{key} is {value!r}; expected text")


_CONVERTERS: dict[Any, Callable[[str, Any], Any]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
}


def text(value: Any) -> str:
    """`value` as it is written on the command line; `convert` reads it back."""
    if isinstance(value, list):
        return ",".join(value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def metavar(annotation: Any) -> str:
    """What `--help` shows in place of a value of this type."""
    annotation, optional = without_none(annotation)
    if annotation is bool:
        return "[true|false]"
    suffix = "|none" if optional else ""
    if get_origin(annotation) is Literal:
        return f"{{{','.join(get_args(annotation))}}}{suffix}"
    if get_origin(annotation) is list:
        return "NAME,NAME,..."
    return {int: "INT", float: "FLOAT", str: "TEXT"}[annotation] + suffix


def text_path_of(section: str, dataset: str, path: str | None, built_in: str) -> Path | None:
    """Where the text of a section of the configuration is; None: it is the one that is built in.

    Raises:
        ValueError: `dataset` names text that is not on this machine, and no path says where it is.
    """
    if path is not None:
        return Path(path).expanduser()
    if dataset == built_in:
        return None
    raise ValueError(
        f"{section}.dataset is {dataset!r}, which needs {section}.dataset_path: nothing is "
        f"downloaded here. Set {section}.dataset_path to a .txt, .jsonl or .parquet file or to a "
        f"folder of them, or {section}.dataset to {built_in!r} (the built-in text)"
    )


def _at_least(minimum: float) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value >= minimum, f"at least {minimum}"


_MINUS_ONE_OR_POSITIVE = (lambda value: value == -1 or value >= 1, "-1 or at least 1")
_BETA = (lambda value: 0 <= value < 1, "from 0 to below 1")

LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "profiling.profile_freq": _at_least(1),
    "profiling.profiler_active": _at_least(1),
    "profiling.profiler_warmup": _at_least(0),
    "metrics.log_freq": _at_least(1),
    "optimizer.lr": _at_least(0),
    "optimizer.beta1": _BETA,
    "optimizer.beta2": _BETA,
    "optimizer.eps": _at_least(0),
    "optimizer.weight_decay": _at_least(0),
    "lr_scheduler.warmup_steps": _at_least(0),
    "lr_scheduler.decay_ratio": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "training.local_batch_size": _at_least(1),
    "training.global_batch_size": _MINUS_ONE_OR_POSITIVE,
    "training.seq_len": _at_least(1),
    "training.max_norm": (lambda value: value > 0, "above 0 (inf: never clip)"),
    "training.steps": _at_least(1),
    "training.dataloader.num_workers": _at_least(0),
    "training.dataloader.prefetch_factor": _at_least(1),
    "parallelism.data_parallel_replicate_degree": _at_least(1),
    "parallelism.data_parallel_shard_degree": _MINUS_ONE_OR_POSITIVE,
    "parallelism.tensor_parallel_degree": _at_least(1),
    "parallelism.pipeline_parallel_degree": _at_least(1),
    "parallelism.context_parallel_degree": _at_least(1),
    "checkpoint.interval": _at_least(1),
    "debug.seed": _at_least(0),
    "comm.train_timeout_seconds": (lambda value: 1 <= value <= 10**9, "from 1 to 1000000000"),
    "validation.local_batch_size": _at_least(1),
    "validation.seq_len": _at_least(1),
    "validation.freq": _at_least(1),
    "validation.steps": _MINUS_ONE_OR_POSITIVE,
}
"""Key -> (test of its value, the words for it). NaN passes none."""
