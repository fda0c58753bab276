"""This library as model converters of torchtitan 0.2, in torchtitan's own trainer.

    --experimental.custom_import=fp8dist.torchtitan --model.converters="fp8dist"

Importing this registers them. Each has the name of one of torchtitan's, with `fp8dist` in place of
`quantize`, and takes the flags of that one; `fp8dist` alone stands for `fp8dist.linear.float8`.
torchtitan's own converters keep their names and stay what they are.
"""

# mypy: disable-error-code="import-not-found"

import inspect
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
)
from torchtitan.protocols.model_converter import register_model_converter
from torchtitan.protocols.train_spec import get_train_spec

from fp8dist.config import Float8Config
from fp8dist.convert import convert_to_float8_training, float8_module_filter
from fp8dist.convert_moe import convert_moe_to_float8_training
from fp8dist.fsdp import precompute_float8_dynamic_scale_for_fsdp
from fp8dist.linear import Float8Linear
from fp8dist.tensor_parallel import (
    Float8ColwiseParallel,
    Float8RowwiseParallel,
    PrepareFloat8ModuleInput,
)

if TYPE_CHECKING:
    from torchtitan.config import JobConfig
    from torchtitan.distributed import ParallelDims

logger = logging.getLogger("fp8dist")

# The defaults of torchtitan's flags, and what they mean here.
_RECIPES = {None: "tensorwise", "mxfp8_cublas": "mxfp8_rceil"}


class Converter:
    """What torchtitan calls: `convert` once, `post_optimizer_hook` after each optimizer step.

    Args:
        job_config: the whole job's.
        parallel_dims: how the ranks are shared out.
    """

    names: ClassVar[tuple[str, ...]]

    def __init__(self, job_config: "JobConfig", parallel_dims: "ParallelDims") -> None:
        self.job, self.dims = job_config, parallel_dims
        wanting = [kind for kind in _asked_for(job_config) if kind.wants_scales(job_config)]
        self.is_cut = parallel_dims.fsdp_enabled or parallel_dims.tp_enabled
        # Of several converters one computes the scales, which are those of all weights.
        self.precomputes = self.is_cut and wanting[:1] == [type(self)]

    @staticmethod
    def wants_scales(job_config: "JobConfig") -> bool:
        """Whether scales are to be computed after the optimizer, and not at each all-gather."""
        return True

    def convert(self, model: nn.Module) -> None:
        """Turn layers of `model`, which is not cut yet, into float8 ones, in place."""
        raise NotImplementedError

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Compute the scales of the model, or of its pipeline stages, in one all-reduce."""
        if self.precomputes:
            precompute_float8_dynamic_scale_for_fsdp(model)

    def _convert_linear(self, model: nn.Module, config: Float8Config, fqns: list[str]) -> None:
        keep = float8_module_filter(config.recipe_name, fqns)
        convert_to_float8_training(model, config=config, module_filter_fn=keep)
        if self.dims.tp_enabled:
            _use_float8_styles(get_train_spec(self.job.model.name).parallelize_fn)


class LinearFloat8(Converter):
    """Linear layers, by the flags of `quantize.linear.float8`."""

    names = ("fp8dist", "fp8dist.linear.float8")

    @staticmethod
    def wants_scales(job_config: "JobConfig") -> bool:
        flags = job_config.quantize.linear.float8
        return (
            flags.enable_fsdp_float8_all_gather and flags.precompute_float8_dynamic_scale_for_fsdp
        )

    def convert(self, model: nn.Module) -> None:
        flags = self.job.quantize.linear.float8
        config = Float8Config(
            recipe_name=_RECIPES.get(flags.recipe_name, flags.recipe_name),
            # DDP takes plain parameters.
            enable_fsdp_float8_all_gather=flags.enable_fsdp_float8_all_gather and self.is_cut,
            emulate=flags.emulate,
        )
        self._convert_linear(model, config, flags.filter_fqns)
        if self.dims.fsdp_enabled and not self.wants_scales(self.job):
            gathers = flags.enable_fsdp_float8_all_gather
            logger.info(
                "%s: turn --quantize.linear.float8.%s on",
                "scales are computed at each all-gather"
                if gathers
                else "weights are gathered in high precision",
                "precompute_float8_dynamic_scale_for_fsdp"
                if gathers
                else "enable_fsdp_float8_all_gather",
            )


class LinearMX(Converter):
    """Linear layers in MXFP8, by the flags of `quantize.linear.mx`."""

    names = ("fp8dist.linear.mx",)

    def convert(self, model: nn.Module) -> None:
        flags = self.job.quantize.linear.mx
        config = Float8Config(
            recipe_name=_RECIPES.get(flags.recipe_name, flags.recipe_name),
            enable_fsdp_float8_all_gather=self.is_cut,
        )
        self._convert_linear(model, config, flags.filter_fqns)


class Grouped(Converter):
    """Experts.

    Raises:
        ValueError: experts would be cut by anything but FSDP.
    """

    def __init__(self, job_config: "JobConfig", parallel_dims: "ParallelDims") -> None:
        super().__init__(job_config, parallel_dims)
        if parallel_dims.ep_enabled or parallel_dims.tp_enabled:
            raise ValueError(
                f"{self.names[0]}: experts are converted under FSDP alone: set "
                "parallelism.expert_parallel_degree and parallelism.tensor_parallel_degree to 1, "
                f"or take {self.names[0]} out of model.converters"
            )


class GroupedFloat8(Grouped):
    """Experts, scaled by rows, by the flags of `quantize.grouped_mm.float8`."""

    names = ("fp8dist.grouped_mm.float8",)

    def convert(self, model: nn.Module) -> None:
        fqns = self.job.quantize.grouped_mm.float8.fqns
        convert_moe_to_float8_training(model, config="rowwise", fqns=_listed(fqns))


class GroupedMX(Grouped):
    """Experts in MXFP8, by the flags of `quantize.grouped_mm.mx`."""

    names = ("fp8dist.grouped_mm.mx",)

    def convert(self, model: nn.Module) -> None:
        flags = self.job.quantize.grouped_mm.mx
        convert_moe_to_float8_training(model, config=flags.recipe_name, fqns=_listed(flags.fqns))


CONVERTERS: tuple[type[Converter], ...] = (LinearFloat8, LinearMX, GroupedFloat8, GroupedMX)


def _asked_for(job_config: "JobConfig") -> list[type[Converter]]:
    return [
        kind for name in job_config.model.converters for kind in CONVERTERS if name in kind.names
    ]


def _listed(fqns: str | Iterable[str]) -> list[str] | None:
    """torchtitan takes one name for a list of one, and has no default."""
    return [fqns] if isinstance(fqns, str) else list(fqns) or None


# [Note: plans]
# A model's `parallelize` in torchtitan makes its plan of torch's styles, or, for a converter called
# "float8", which there is no longer, of torchao's. The styles below stand in for torch's in that
# module: each looks, when it is applied, at what it is applied to.


class _Colwise(ColwiseParallel):
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, Float8Linear):
            return _like(self, Float8ColwiseParallel())._apply(module, device_mesh)
        return super()._apply(module, device_mesh)


class _Rowwise(RowwiseParallel):
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, Float8Linear):
            return _like(self, Float8RowwiseParallel())._apply(module, device_mesh)
        return super()._apply(module, device_mesh)


class _PrepareInput(PrepareModuleInput):
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        converted = [layer for layer in layers if isinstance(layer, Float8Linear)]
        # Layers that are not converted, or of another recipe, must not be given its rounded input.
        if converted == layers and len({layer.config.recipe_name for layer in converted}) == 1:
            return _like(self, PrepareFloat8ModuleInput())._apply(module, device_mesh)
        return super()._apply(module, device_mesh)


def _like(given: ParallelStyle, style: Any) -> Any:
    """`style` with the layouts of the given one."""
    vars(style).update(vars(given))
    return style


def _use_float8_styles(parallelize: Any) -> None:
    """Let the plans that a model's `parallelize` makes be in float8; see [Note: plans].

    Models of experts have functions of other models make a part of the plan.
    """
    own = parallelize.__globals__
    helpers = [value for value in own.values() if inspect.isfunction(value)]
    namespaces = [own] + [
        f.__globals__ for f in helpers if f.__module__.startswith("torchtitan.models.")
    ]
    stand_ins = {
        "ColwiseParallel": _Colwise,
        "RowwiseParallel": _Rowwise,
        "PrepareModuleInput": _PrepareInput,
    }
    for namespace in namespaces:
        namespace.update({name: style for name, style in stand_ins.items() if name in namespace})


for kind in CONVERTERS:
    for name in kind.names:
        register_model_converter(kind, name)
