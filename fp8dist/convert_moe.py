"""Turn the weights of a model's experts into float8 ones, or say by name why not."""

import functools
import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor

from fp8dist.config import HP_DTYPES, Float8Config
from fp8dist.convert import (
    as_config,
    log_converted_before,
    of_own_class,
    parameter_owners,
    patch_inductor,
    summary,
)
from fp8dist.experts import Float8ShardedExperts
from fp8dist.tensors.parameters import make_plain, plain, wrap_weight
from fp8dist.tensors.weight_state import WeightState

logger = logging.getLogger("fp8dist")

RECIPES_OF_EXPERTS = ("rowwise", "mxfp8_rceil")


def convert_moe_to_float8_training(
    module: nn.Module, *, config: Any = None, fqns: Sequence[str] | None = None
) -> nn.Module:
    """Make the experts of a model compute and, under FSDP2, communicate in float8.

    The modules stay as they are, and go on multiplying their 3-D weights by
    `torch.nn.functional.grouped_mm` or `torch._grouped_mm`, also after `.bfloat16()`, `.to(dtype)`
    and an exchange of the last two dimensions. Any other op on such a weight sees its value.

    Call it before `fully_shard` and before the optimizer is made: each weight becomes a new
    parameter with the attributes, but not the hooks, of the old one. Weights that it has converted
    before keep their config; a warning tells if that is another.

    Args:
        module: a model; changed in place.
        config: a `Float8Config` of recipe "rowwise" or "mxfp8" (`enable_fsdp_float8_all_gather`
            cannot be turned off), or the name of one of these; None for "rowwise".
        fqns: parts of fully qualified names of modules; those whose name contains one have their
            3-D parameters converted, (E, N, K) or (E, K, N) for E experts. Their other parameters
            stay in high precision. None stands for ["experts"].

    Returns:
        module.

    Raises:
        ValueError: a recipe that is not for experts; an entry of fqns that matches no module, or
            none with a 3-D parameter; a weight that is sharded already, or whose last two
            dimensions are not multiples of 16 (mxfp8: of 32).
    """
    float8_config = _config_of_experts(config)
    if isinstance(fqns, str):
        raise ValueError(f"fqns is a list of names, got the string {fqns!r}")
    owners = parameter_owners(module)
    chosen: dict[str, tuple[nn.Module, str]] = {}
    left_alone: dict[str, list[str]] = defaultdict(list)
    before: dict[str, bool] = {}
    for part in ("experts",) if fqns is None else fqns:
        for fqn, owner, name in _weights_under(module, part):
            if state := vars(owner).get("expert_states", {}).get(name):
                before[fqn] = state.config == float8_config
                continue
            if reason := _cannot_convert(getattr(owner, name), owners):
                if fqn not in left_alone[reason]:
                    left_alone[reason].append(fqn)
                continue
            _check_convertible(getattr(owner, name), fqn, float8_config)
            chosen[fqn] = owner, name
    for fqn, (owner, name) in chosen.items():
        _convert(owner, name, float8_config, fqn, module)
    if chosen:
        patch_inductor()
        logger.info("float8 %s experts: %s", float8_config.recipe_name, summary(list(chosen)))
    for reason, names in left_alone.items():
        logger.info("experts left in high precision, %s: %s", reason, summary(names))
    log_converted_before(before)
    if not chosen and not before:
        logger.warning("no experts were converted to float8")
    return module


def _config_of_experts(config: Any) -> Float8Config:
    float8_config = as_config("rowwise" if config is None else config)
    if float8_config.recipe.name not in RECIPES_OF_EXPERTS:
        raise ValueError(
            f"recipe {float8_config.recipe_name!r} is not for experts: use "
            f"{' or '.join(RECIPES_OF_EXPERTS)}"
        )
    if not float8_config.enable_fsdp_float8_all_gather:
        raise ValueError(
            "Float8Config(enable_fsdp_float8_all_gather=False) is not for experts, whose weights "
            "are gathered in float8: leave it out"
        )
    return float8_config


def _weights_under(root: nn.Module, part: str) -> list[tuple[str, nn.Module, str]]:
    """(fully qualified name, module, name in it) of the 3-D parameters that an entry of fqns means.

    Raises:
        ValueError: there are none.
    """
    matched = [(fqn, module) for fqn, module in root.named_modules() if part in fqn]
    if not matched:
        raise ValueError(
            f"fqns has {part!r}, which is in no module's name: the modules with 3-D parameters are "
            f"{_modules_with_3d(root)}"
        )
    found, others = [], []
    for fqn, module in matched:
        for name, param in module.named_parameters(recurse=False):
            full_name = f"{fqn}.{name}" if fqn else name
            if param.dim() == 3:
                found.append((full_name, module, name))
            else:
                others.append(f"{full_name} {tuple(param.shape)}")
    if not found:
        raise ValueError(
            f"fqns has {part!r}, where no weight is 3-D ({', '.join(others[:3]) or 'nor any'}): "
            "experts have weights (E, N, K) or (E, K, N) for grouped_mm; linear layers are for "
            "convert_to_float8_training"
        )
    return found


def _modules_with_3d(root: nn.Module) -> str:
    names = [
        fqn
        for fqn, module in root.named_modules()
        if any(param.dim() == 3 for param in module.parameters(recurse=False))
    ]
    return summary(names) or "none"


def _cannot_convert(weight: torch.Tensor, owners: Counter[int]) -> str | None:
    """Why a weight that fqns mean is left alone all the same, or None."""
    if owners[id(weight)] > 1:
        return "tied to another module's weight"
    if weight.dtype not in HP_DTYPES:
        return f"of {weight.dtype}"
    if of_own_class(weight):
        return f"a {type(weight).__name__}"
    return None


def _check_convertible(weight: torch.Tensor, fqn: str, float8_config: Float8Config) -> None:
    if isinstance(weight, DTensor):
        raise ValueError(
            f"{fqn} is already a DTensor ({weight.placements}): call "
            "convert_moe_to_float8_training before parallelize_module and fully_shard"
        )
    multiple = float8_config.recipe.dim_multiple
    if any(extent % multiple for extent in weight.shape[1:]):
        raise ValueError(
            f"{fqn} is {' x '.join(map(str, weight.shape))}, and {float8_config.recipe_name} takes "
            f"experts whose last two dimensions are multiples of {multiple}: leave it out of fqns"
        )


def _convert(owner: Any, name: str, float8_config: Float8Config, fqn: str, root: nn.Module) -> None:
    states = owner.__dict__.setdefault("expert_states", {})
    if not states:
        owner.register_state_dict_post_hook(_save_plain)
        owner.register_load_state_dict_post_hook(_wrap_weights)
    states[name] = WeightState(float8_config, fqn, root)
    _wrap_weights(owner)


def _wrap_weights(module: Any, _: Any = None) -> None:
    """Make the weights of `expert_states` float8 ones, also inside DTensors, which loading with
    assign=True has replaced by plain ones.
    """
    for name, state in module.expert_states.items():
        if name not in module._parameters:  # a parametrization, or pruning, has its own there
            continue
        wrap = functools.partial(Float8ShardedExperts, config=state.config, name=name)
        wrap_weight(module, name, wrap)


def _save_plain(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """A state dict holds what the module would have without float8."""
    for name, state in module.expert_states.items():
        saved = state_dict.get(prefix + name)
        if saved is not None and not isinstance(saved, nn.Parameter):  # not keep_vars
            state_dict[prefix + name] = plain(getattr(module, name))
            state.taken = True
    make_plain(state_dict)
