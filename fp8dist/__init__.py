"""Float8 communication for FSDP2 and tensor parallelism: converted weights cross the network as one
byte per element, all scales of a step in one all-reduce, and forward and backward multiply what
arrives.

```python
fp8dist.convert_to_float8_training(model, config="rowwise")   # nn.Linear -> Float8Linear
for block in model.layers:
    fully_shard(block)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters())
fp8dist.register_precompute_hook(optimizer, model)
```

- Conversion: `convert_to_float8_training` turns `nn.Linear` into `Float8Linear`, those that
  `float8_module_filter` chooses; `convert_moe_to_float8_training` is for experts, whose weights
  have three dimensions.
- Configuration: `Float8Config` with a recipe's name, and `FastAccum`; or torchao's
  `Float8LinearConfig`, which is here by torchao's names.
- After each step: `register_precompute_hook`, or a call of
  `precompute_float8_dynamic_scale_for_fsdp`.
- Tensor parallelism: `Float8ColwiseParallel`, `Float8RowwiseParallel`, `PrepareFloat8ModuleInput`.
- Inference: `export_float8` writes the bytes that are gathered as safetensors.
- Faults: `detect_non_finite` names the module where the first NaN or Inf of a step comes from.

Shapes are input (M, K), weight (N, K) and output (M, N), where M counts tokens, K is `in_features`
and N `out_features`. High precision is the dtype that is trained in: float32, bfloat16 or float16.
An amax is the largest absolute value of elements that share a scale, and the scale is what they are
multiplied by before they are cast. Wrong input is a `ValueError` that says what was found and what
to do, on all ranks alike. The README has the recipes and the hardware.
"""

from typing import TYPE_CHECKING, Any

from fp8dist.config import FastAccum, Float8Config
from fp8dist.convert import convert_to_float8_training, float8_module_filter
from fp8dist.convert_moe import convert_moe_to_float8_training
from fp8dist.export import export_float8
from fp8dist.fsdp import precompute_float8_dynamic_scale_for_fsdp, register_precompute_hook
from fp8dist.linear import Float8Linear
from fp8dist.non_finite import detect_non_finite
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
    "detect_non_finite",
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
