"""What must be the same on all ranks of a run, compared before training: ranks that differ would
train something that nobody asked for, or wait for each other for ever."""

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from fp8dist.tensors.compiler_cache import hash_of_source
from fp8dist.tensors.sharded_weight import weights_of
from fp8dist.train.config import JobConfig

Facts = dict[str, str]

# Where things are may differ between machines.
_PATHS = {
    "job.config_file",
    "training.dataset_path",
    "validation.dataset_path",
    "model.hf_assets_path",
}
_SHOWN = 3


def facts_of_job(job: JobConfig) -> Facts:
    """Every key of the configuration, and the versions of what computes."""
    facts = {"torch": torch.__version__, "torchao": _version("torchao")}
    # The version number of this package does not tell commits apart.
    facts["fp8dist"] = hash_of_source()[:12]
    return facts | {key: value for key, value in _flat(job.to_dict()).items() if key not in _PATHS}


def _flat(values: dict[str, Any], prefix: str = "") -> Facts:
    flat: Facts = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: repr(value)}
    return flat


def facts_of_model(model: nn.Module) -> Facts:
    """Every parameter, and every float8 layer's config."""
    facts = {
        name: f"{tuple(param.shape)} {param.dtype} "
        + ("trained" if param.requires_grad else "frozen")
        for name, param in model.named_parameters()
    }
    for fqn, module in model.named_modules():
        for state, _ in weights_of(module):
            facts[f"float8 {fqn}"] = repr(state.config)
    return facts


def check_same(facts: Facts) -> None:
    """Raise ValueError on every rank, naming what differs and where, unless all have them."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    if len(set(digests)) == 1:
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, facts)
    names = list(dict.fromkeys(name for theirs in everyone for name in theirs))
    differences = [
        _difference(name, [theirs.get(name, "missing") for theirs in everyone])
        for name in names
        if len({theirs.get(name) for theirs in everyone}) > 1
    ]
    more = len(differences) - _SHOWN
    raise ValueError(
        "the ranks do not run the same: "
        + "; ".join(differences[:_SHOWN])
        + (f"; and {more} more" if more > 0 else "")
        + ". Start all ranks with the same configuration, packages and code"
    )


def _difference(name: str, values: list[str]) -> str:
    by_value: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        by_value.setdefault(value, []).append(str(rank))
    told = [
        f"{value} on rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}"
        for value, ranks in by_value.items()
    ]
    return f"{name} is {', '.join(told)}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
