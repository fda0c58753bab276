"""Float8 communication for FSDP2 and tensor parallelism. See the README."""

from typing import TYPE_CHECKING, Any

from fp8dist.config import FastAccum, Float8Config
from fp8dist.convert import convert_to_float8_training, float8_module_filter
from fp8dist.convert_moe import convert_moe_to_float8_training
from fp8dist.export import export_float8
from fp8dist.fsdp import precompute_float8_dynamic_scale_for_fsdp, register_precompute_hook
from fp8dist.linear import Float8Linear
from fp8dist.tensor_parallel import (
    Float8ColwiseParallel,
    Float8RowwiseParallel,
    PrepareFloat8ModuleInput,
)

if TYPE_CHECKING:
    from torchao.float8 import (
        CastConfig,
        Float8GemmConfig,
        Float8LinearConfig,
        Float8LinearRecipeName,
        ScalingGranularity,
        ScalingType,
    )

__all__ = [
    "CastConfig",
    "FastAccum",
    "Float8ColwiseParallel",
    "Float8Config",
    "Float8GemmConfig",
    "Float8Linear",
    "Float8LinearConfig",
    "Float8LinearRecipeName",
    "Float8RowwiseParallel",
    "PrepareFloat8ModuleInput",
    "ScalingGranularity",
    "ScalingType",
    "convert_moe_to_float8_training",
    "convert_to_float8_training",
    "export_float8",
    "float8_module_filter",
    "precompute_float8_dynamic_scale_for_fsdp",
    "register_precompute_hook",
]


# Of which a `Float8LinearConfig` is made: torchao's own, so that its scripts change their imports.
_TORCHAO = (
    "CastConfig",
    "Float8GemmConfig",
    "Float8LinearConfig",
    "Float8LinearRecipeName",
    "ScalingGranularity",
    "ScalingType",
)


def __getattr__(name: str) -> Any:
    if name in _TORCHAO:  # importing torchao takes seconds and prints; most need not
        import torchao.float8

        return getattr(torchao.float8, name)
    raise AttributeError(f"module 'fp8dist' has no attribute {name!r}")
