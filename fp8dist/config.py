"""What the user asks for (`Float8Config`) and what each recipe means (`RECIPES`)."""

import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torchao.float8 import Float8LinearConfig

logger = logging.getLogger("fp8dist")

# What weights and activations may be before they are cast.
HP_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# [Note: blocks]
# The elements that share a scale form a block of (rows, columns) of a 2-D tensor; WHOLE stands
# for the whole dimension. The scales of a (M, N) tensor are a (M / rows, N / columns) tensor, so
# they broadcast (after repeating) over the data and cut along the same dimensions. Transposing a
# tensor transposes its block and its scales.
Block = tuple[int, int]
WHOLE = -1
TENSOR: Block = (WHOLE, WHOLE)
ROW: Block = (1, WHOLE)
COLUMN: Block = (WHOLE, 1)

# How an amax becomes a scale:
#   "exact"        float8_max / amax, float32
#   "power_of_2"   the same, rounded down to a power of two
#   "e8m0"         as power_of_2, over the range of an 8-bit exponent (OCP MX specification 1.0);
#                  one byte on the wire
ScaleFormat = Literal["exact", "power_of_2", "e8m0"]


@dataclass(frozen=True)
class Recipe:
    """How the operands of a linear layer's three matmuls are scaled and cast.

    Blocks are those of the tensors input (M, K), weight (N, K) and grad_output (M, N) as they
    lie. Two of the matmuls contract another dimension of an operand than the first does:

        output      = input       @ weight^T      input, weight
        grad_input  = grad_output @ weight        grad_output, weight_for_grad_input
        grad_weight = grad_output^T @ input       grad_output_for_grad_weight, input_for_grad_weight

    The last two are None where grad_weight is computed in high precision.
    """

    name: str
    input: Block
    weight: Block
    grad_output: Block
    weight_for_grad_input: Block
    input_for_grad_weight: Block | None
    grad_output_for_grad_weight: Block | None
    input_dtype: torch.dtype = torch.float8_e4m3fn
    weight_dtype: torch.dtype = torch.float8_e4m3fn
    grad_output_dtype: torch.dtype = torch.float8_e4m3fn
    scale_format: ScaleFormat = "power_of_2"
    # K and N must be multiples of it: of the block, and of 16 for cuBLAS (its documentation,
    # "FP8 data types").
    dim_multiple: int = 16
    # Whether the hardware's matmul of these scales can accumulate fast.
    has_fast_accum: bool = True
    # Compute capabilities whose float8 units take these scales, first and last (None: no last).
    min_capability: tuple[int, int] = (8, 9)
    max_capability: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.scale_format == "exact" and self.weight != self.weight_for_grad_input:
            raise AssertionError(
                f"{self.name}: from one float8 copy of the weight another scaling comes by powers "
                "of two only, exact scales would round twice"
            )


# tensorwise, rowwise and rowwise_with_gw_hp are torchao's recipes of these names; blockwise is the
# layout of DeepSeek-V3 (arXiv:2412.19437, section 3.3.2); mxfp8_rceil and its _wgrad_with_hp are
# torchao's MX training recipes.
RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="tensorwise",
            input=TENSOR,
            weight=TENSOR,
            grad_output=TENSOR,
            weight_for_grad_input=TENSOR,
            input_for_grad_weight=TENSOR,
            grad_output_for_grad_weight=TENSOR,
            grad_output_dtype=torch.float8_e5m2,
            scale_format="exact",
        ),
        Recipe(
            name="rowwise",
            input=ROW,
            weight=ROW,
            grad_output=ROW,
            weight_for_grad_input=COLUMN,
            input_for_grad_weight=COLUMN,
            grad_output_for_grad_weight=COLUMN,
        ),
        Recipe(
            name="rowwise_with_gw_hp",
            input=ROW,
            weight=ROW,
            grad_output=ROW,
            weight_for_grad_input=TENSOR,
            input_for_grad_weight=None,
            grad_output_for_grad_weight=None,
        ),
        Recipe(
            name="blockwise",
            input=(1, 128),
            weight=(128, 128),
            grad_output=(1, 128),
            weight_for_grad_input=(128, 128),
            input_for_grad_weight=(128, 1),
            grad_output_for_grad_weight=(128, 1),
            dim_multiple=128,
            has_fast_accum=False,
            # cuBLAS has 1x128 and 128x128 scales on Hopper only.
            min_capability=(9, 0),
            max_capability=(9, 0),
        ),
        Recipe(
            name="mxfp8_rceil",
            input=(1, 32),
            weight=(1, 32),
            grad_output=(1, 32),
            weight_for_grad_input=(32, 1),
            input_for_grad_weight=(32, 1),
            grad_output_for_grad_weight=(32, 1),
            scale_format="e8m0",
            dim_multiple=32,
            has_fast_accum=False,
            min_capability=(10, 0),
        ),
        Recipe(
            name="mxfp8_rceil_wgrad_with_hp",
            input=(1, 32),
            weight=(1, 32),
            grad_output=(1, 32),
            weight_for_grad_input=(32, 1),
            input_for_grad_weight=None,
            grad_output_for_grad_weight=None,
            scale_format="e8m0",
            dim_multiple=32,
            has_fast_accum=False,
            min_capability=(10, 0),
        ),
    )
}

_SHORT_NAMES = {"mxfp8": "mxfp8_rceil"}
# Names that torchao has dropped.
_RENAMED = {
    "mxfp8_cublas": "mxfp8_rceil",
    "mxfp8_cublas_rceil": "mxfp8_rceil",
    "mxfp8_emulated": "mxfp8_rceil",
}
_TORCHAO_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


def nearest(name: str, known: Mapping[str, object] | list[str]) -> str:
    """`name`'s closest match among `known`, as the end of an error message."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(known)}"


def recipe(name: str | Enum) -> Recipe:
    """The recipe called `name`, or as torchao's enum of recipes has it.

    Raises:
        ValueError: there is no such recipe; the message names the nearest.
    """
    name = name.value if isinstance(name, Enum) else name
    if not isinstance(name, str):
        raise ValueError(f"a recipe's name is a string, not {name!r}: {', '.join(RECIPES)}")
    if name in _RENAMED:
        raise ValueError(f"recipe {name!r} is called {_RENAMED[name]!r} now")
    name = _SHORT_NAMES.get(name, name)
    if name not in RECIPES:
        raise ValueError(f"unknown float8 recipe {name!r}: {nearest(name, RECIPES)}")
    return RECIPES[name]


@dataclass(frozen=True)
class FastAccum:
    """Which matmuls accumulate in the tensor cores' shorter registers: faster, less exact.

    It is `use_fast_accum` of `torch._scaled_mm` and `F.scaled_mm`. Shapes: input (M, K), weight
    (N, K), grad_output (M, N).

    Args:
        output: input @ weight^T, sums of K products.
        grad_input: grad_output @ weight, sums of N.
        grad_weight: grad_output^T @ input, sums of M.
    """

    output: bool = True
    grad_input: bool = False
    grad_weight: bool = False


@dataclass(frozen=True)
class Float8Config:
    """How `convert_to_float8_training` makes a linear layer compute and communicate.

    Args:
        recipe_name: a name in `fp8dist.config.RECIPES`, or "mxfp8", short for "mxfp8_rceil".
        enable_fsdp_float8_all_gather: FSDP2 gathers the weight as float8, one byte per
            element. Off, FSDP2 gathers `MixedPrecisionPolicy.param_dtype` and every forward
            and backward casts the gathered weight.
        cache_payload: keep each shard's float8 bytes between optimizer steps (one byte per
            element of the shard), so that forward, backward and all microbatches reuse one
            cast. Off, each all-gather casts the shard again: the same bytes, less memory.
        fast_accum: None accumulates fast where torchao does (the output matmul, and all three
            of experts); True in all three matmuls; False in none; or a `FastAccum`. Only for
            hardware with float8 matmuls. blockwise and mxfp8 have none: they take None or False.
        emulate: dequantize and multiply in float32, also on hardware with float8 matmuls.

    Raises:
        ValueError: unknown recipe name; fast accumulation asked of a recipe that has none.
    """

    recipe_name: str = "tensorwise"
    enable_fsdp_float8_all_gather: bool = True
    cache_payload: bool = True
    fast_accum: bool | FastAccum | None = None
    emulate: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.recipe_name, str):
            raise ValueError(f"Float8Config(recipe_name={self.recipe_name!r}): a recipe's name")
        if not recipe(self.recipe_name).has_fast_accum and self.fast_accum:
            raise ValueError(
                f"Float8Config(fast_accum={self.fast_accum}): the matmuls of recipe "
                f"{self.recipe_name!r} cannot accumulate fast: leave fast_accum out"
            )

    @property
    def recipe(self) -> Recipe:
        """What `recipe_name` stands for, an entry of `fp8dist.config.RECIPES`: for each operand of
        the three matmuls which elements share a scale and its float8 dtype, how an amax becomes a
        scale, the number that N and K must be multiples of, and the hardware that multiplies it.
        """
        return recipe(self.recipe_name)

    @property
    def fast_accum_by_matmul(self) -> FastAccum:
        """`fast_accum` for each of the three matmuls. None is fast in output alone, as in
        torchao's recipes, and in none where the recipe's matmuls cannot be (blockwise, mxfp8).
        """
        if isinstance(self.fast_accum, FastAccum):
            return self.fast_accum
        if self.fast_accum is None:
            return FastAccum(output=self.recipe.has_fast_accum)
        return FastAccum(self.fast_accum, self.fast_accum, self.fast_accum)

    @property
    def fast_accum_of_experts(self) -> FastAccum:
        """`fast_accum` for each of the three grouped matmuls of experts. None is fast in all, as in
        torchao's `_to_fp8_rowwise_then_scaled_grouped_mm`: torch's kernel for the exact sums takes
        1.2 to 3 times as long (H200).
        """
        if self.fast_accum is not None:
            return self.fast_accum_by_matmul
        fast = self.recipe.has_fast_accum
        return FastAccum(fast, fast, fast)


def from_torchao(config: "Float8LinearConfig") -> Float8Config:
    """The `Float8Config` that computes what a torchao `Float8LinearConfig` asks for.

    Raises:
        ValueError: the config matches no recipe; the message names the first field that
            differs from the recipe that is closest.
    """
    from torchao.float8 import Float8LinearConfig

    if config.pad_inner_dim:
        raise ValueError(
            "Float8LinearConfig.pad_inner_dim=True is not supported: leave layers whose "
            "dimensions are not multiples of 16 out with module_filter_fn"
        )
    oracles = {name: Float8LinearConfig.from_recipe_name(name) for name in _TORCHAO_RECIPES}
    differing = {name: _differing_fields(config, oracle) for name, oracle in oracles.items()}
    name = min(differing, key=lambda candidate: len(differing[candidate]))
    if differing[name]:
        field = differing[name][0]
        raise ValueError(
            f"the Float8LinearConfig matches no recipe of fp8dist ({', '.join(oracles)}); nearest "
            f"is {name!r}, from which it differs in {field}={getattr(config, field)!r} (there "
            f"{getattr(oracles[name], field)!r}): use Float8LinearConfig.from_recipe_name({name!r})"
        )
    gather = config.enable_fsdp_float8_all_gather
    if not gather and RECIPES[name].weight != TENSOR:
        logger.info(
            "Float8LinearConfig cannot ask for a float8 all-gather of %s weights: they get one. "
            "fp8dist.Float8Config(enable_fsdp_float8_all_gather=False) turns it off",
            name,
        )
        gather = True
    return Float8Config(
        recipe_name=name,
        enable_fsdp_float8_all_gather=gather,
        fast_accum=FastAccum(
            output=config.gemm_config_output.use_fast_accum,
            grad_input=config.gemm_config_grad_input.use_fast_accum,
            grad_weight=config.gemm_config_grad_weight.use_fast_accum,
        ),
        emulate=config.emulate,
    )


# The fields of torchao's config in which recipes differ; the rest is mapped or has no effect.
_RECIPE_FIELDS = (
    "cast_config_input",
    "cast_config_input_for_grad_weight",
    "cast_config_weight",
    "cast_config_weight_for_grad_input",
    "cast_config_grad_output",
    "cast_config_grad_output_for_grad_weight",
    "round_scales_to_power_of_2",
)


def _differing_fields(a: "Float8LinearConfig", b: "Float8LinearConfig") -> list[str]:
    return [field for field in _RECIPE_FIELDS if getattr(a, field) != getattr(b, field)]
