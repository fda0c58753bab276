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
    from torchao.float8 import Float8LinearConfig

__all__ = [
    "FastAccum",
    "Float8ColwiseParallel",
    "Float8Config",
    "Float8Linear",
    "Float8LinearConfig",
    "Float8RowwiseParallel",
    "PrepareFloat8ModuleInput",
    "convert_moe_to_float8_training",
    "convert_to_float8_training",
    "export_float8",
    "float8_module_filter",
    "precompute_float8_dynamic_scale_for_fsdp",
    "register_precompute_hook",
]


def __getattr__(name: str) -> Any:
    if name == "Float8LinearConfig":  # importing torchao takes seconds and prints; most need not
        from torchao.float8 import Float8LinearConfig

        return Float8LinearConfig
    raise AttributeError(f"module 'fp8dist' has no attribute {name!r}")
