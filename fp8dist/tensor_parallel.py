"""torch's tensor-parallel styles with float8 on the wire, for `Float8Linear`.

They are used as torch's of the same names without `Float8`, in a plan for `parallelize_module`.
"""

import copy
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
)

from fp8dist.config import HP_DTYPES, RECIPES, TENSOR, Block, Recipe
from fp8dist.linear import Float8Linear, autocast
from fp8dist.tensors.float8_activation import (
    Float8Activation,
    cast_activation,
    gather_activation,
)
from fp8dist.tensors.gathering import Cut
from fp8dist.tensors.placement import check_part, like
from fp8dist.tracing import is_tracing, within_a_graph

# [Note: activations in float8]
# An activation that is cut along its tokens is cast before it is gathered, so that float8 crosses
# the network; scales of tokens travel beside the data. So is the gradient of an output that was
# reduce-scattered, which backward gathers. The operand of grad_weight is derived from what arrived
# as backward's weight is, see `numerics.rescale_transposed`. Sums of partial results are reduced in
# high precision.
#
# One scale for a whole tensor takes an all-reduce of the amax. So that it is that of the tensor on
# one device, what is cut along its features, and not gathered, is cast with it too: at once in both
# orientations, if grad_weight is wanted.

# [Note: high-precision grad_weight]
# Recipes whose grad_weight is computed in high precision need the input and the gradient so. The
# input is gathered in float8 for output, and again in high precision in backward, from the part
# that its rank has kept; or, with `gather_input_again=False`, taken from float8. The gradient is
# gathered once, in high precision, and cast after that, to the same: its scales are of rows.

# [Note: asynchronous tensor parallelism]
# The compiler overlaps an all-gather with the matmuls that take what it gathers, a part at a time.
# It does so for inputs here, see `async_tp` and [Note: tokens by rank] in `tensors.gathering`, and
# not for gradients.


# What these are given by name is a constant to the compiler: the numbers in a `Recipe` are not.
# torch's stubs give `forward` and `backward` any arguments, which mypy takes for an override.


@torch._dynamo.allow_in_graph
class _CastInput(torch.autograd.Function):
    """Cast in forward; the gradient passes."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, recipe_name: str, group_name: str, across: bool
    ) -> torch.Tensor:
        recipe = RECIPES[recipe_name]
        return cast_activation(
            input, recipe.input, recipe.input_dtype, recipe.scale_format, group_name, across
        )

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return grad_output, None, None, None


@torch._dynamo.allow_in_graph
class _GatherInput(torch.autograd.Function):
    """Cast and gather the tokens of all ranks; the gradient goes the way back, from what it is.

    This rank's part is kept to be gathered `again`; see [Note: high-precision grad_weight].
    """

    @staticmethod
    def forward(ctx: Any, input: DTensor, recipe_name: str, cut: Cut, again: bool) -> DTensor:
        ctx.mesh, ctx.placements = input.device_mesh, input.placements
        local, recipe = input._local_tensor, RECIPES[recipe_name]
        cast = cast_activation(
            local, recipe.input, recipe.input_dtype, recipe.scale_format, cut.group_name
        )
        out = gather_activation(cast, cut, local.detach() if again else None)
        if again and not is_tracing() and not local.is_inference():
            out._again.version = local._version
        return DTensor.from_local(out, ctx.mesh, (Replicate(),), run_check=False)

    @staticmethod
    def backward(ctx: Any, grad_output: DTensor) -> tuple[DTensor, None, None, None]:
        return grad_output.redistribute(placements=ctx.placements), None, None, None


@torch._dynamo.allow_in_graph
class _CastGradient(torch.autograd.Function):
    """Cast the gradient in backward; forward passes."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, recipe_name: str, group_name: str, across: bool
    ) -> torch.Tensor:
        recipe = RECIPES[recipe_name]
        ctx.args = (
            recipe.grad_output,
            recipe.grad_output_dtype,
            recipe.scale_format,
            group_name,
            across,
        )
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return cast_activation(grad_output, *ctx.args), None, None, None


# [Note: no names in a graph]
# Layers share a graph as long as it depends on nothing that differs between them, as names do. So
# what may have to name a layer takes the layer, and asks for its name in an error only.
_Named = Float8Linear | PrepareModuleInput


def _name_of(user: _Named) -> str:
    return user._name() if isinstance(user, Float8Linear) else type(user).__name__


def _as_dtensor(
    input: torch.Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...], user: _Named
) -> DTensor:
    if isinstance(input, DTensor) and input.device_mesh != mesh:
        raise ValueError(
            f"{_name_of(user)}: its input is a DTensor on {input.device_mesh}, tensor parallelism "
            f"is over {mesh}: pass a DTensor on that, or the local part"
        )
    if not isinstance(input, DTensor):
        input = DTensor.from_local(input, mesh, placements, run_check=False)
    if isinstance(input._local_tensor, Float8Activation) or input.dtype not in HP_DTYPES:
        return input
    out: Any = autocast(input)
    return out


def _cast_input(input: DTensor, recipe: Recipe, across: bool = False) -> DTensor:
    """Cast the local part, unless it arrives cast; `across`: in both orientations."""
    local, group_name = input.to_local(), input.device_mesh.get_group().group_name
    if isinstance(local, Float8Activation):
        return input
    return like(input, _CastInput.apply(local, recipe.name, group_name, across))


def _gather_input(input: DTensor, recipe: Recipe, again: bool, user: _Named) -> DTensor:
    """All tokens, of this rank's; `again`, see [Note: high-precision grad_weight]."""
    mesh, (placement,) = input.device_mesh, input.placements
    dim = getattr(placement, "dim", 0) % input.dim()
    uneven = input.size(dim) % mesh.size() != 0
    arrives_cast = isinstance(input._local_tensor, Float8Activation)
    again = again and recipe.input_for_grad_weight is None and not arrives_cast
    if uneven and again:
        raise ValueError(
            f"{_name_of(user)}: dimension {dim} of its input of {tuple(input.shape)} is cut into "
            f"{mesh.size()} parts of several sizes, which recipe {recipe.name!r} cannot gather "
            f"again for grad_weight: pass a multiple of {mesh.size()}, or gather_input_again=False"
        )
    if uneven or arrives_cast:
        return _cast_input(input, recipe).redistribute(placements=(Replicate(),))
    cut = Cut(dim, mesh.size(), mesh.get_group().group_name)
    return _GatherInput.apply(input, recipe.name, cut, again)


def _cast_gradient(output: DTensor, recipe: Recipe, across: bool = False) -> DTensor:
    group_name = output.device_mesh.get_group().group_name
    return like(output, _CastGradient.apply(output.to_local(), recipe.name, group_name, across))


def _in_both(layer: Float8Linear, block: Block, transposed_block: Block | None) -> bool:
    """Whether an operand of blocks `block` is wanted in both orientations, with one scale."""
    wanted = torch.is_grad_enabled() and layer.weight.requires_grad
    return wanted and block == transposed_block == TENSOR


def _check_input(layer: Float8Linear, input: DTensor) -> None:
    """That it is what the layer takes and, if it arrives cast, what its recipe multiplies."""
    local, recipe = input._local_tensor, layer.config.recipe
    if local.dtype not in HP_DTYPES or input.size(-1) != layer.in_features:
        raise ValueError(
            f"{layer._name()}: the whole input is {tuple(input.shape)} of {local.dtype}: pass "
            f"in_features={layer.in_features} last, in float32, bfloat16 or float16"
        )
    if isinstance(local, Float8Activation) and local._block != recipe.input:
        raise ValueError(
            f"{layer._name()}: its input was cast for another recipe than {recipe.name!r}: give "
            "the layers that share a PrepareFloat8ModuleInput one recipe"
        )


def _with_bias(output: DTensor, layer: Float8Linear) -> DTensor:
    """Added outside of the cast of the gradient, so that the bias gets what is not cast."""
    if layer.bias is None:
        return output
    added: Any = output + layer.bias.to(output.dtype)
    return added


def _on_tokens(placements: tuple[Placement, ...], x: torch.Tensor) -> bool:
    """Whether x is cut along its tokens, and not along its last dimension."""
    placement = placements[0]
    return isinstance(placement, Shard) and placement.dim % x.dim() != x.dim() - 1


def _check(style: str, module: nn.Module, mesh: DeviceMesh, dim: int) -> Float8Linear:
    """That the style can be honoured: on every rank alike, before anything is communicated."""
    if not isinstance(module, Float8Linear):
        kind = type(module)
        raise ValueError(
            f"{style} was planned for a {kind.__module__}.{kind.__name__}: it takes fp8dist's "
            "Float8Linear: convert the model before parallelize_module, or use the style of torch "
            "for this module"
        )
    size = (module.out_features, module.in_features)
    check_part(module._name(), size, dim, mesh.size(), module.config.recipe)
    return module


class Float8ColwiseParallel(ColwiseParallel):
    """`torch.distributed.tensor.parallel.ColwiseParallel` for a `Float8Linear`.

    An input that is cut along its tokens is gathered in float8, one byte per element.

    Args:
        gather_input_again: for recipes whose grad_weight is computed in high precision: backward
            gathers the input once more, in its dtype. False: it takes what arrived in float8.
        kwargs: `input_layouts`, `output_layouts` and `use_local_output`, as in `ColwiseParallel`.

    Raises:
        ValueError: in `parallelize_module`: the module is no `Float8Linear`, or N of a rank is no
            multiple of what the recipe needs.
    """

    def __init__(self, *, gather_input_again: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gather_input_again = gather_input_again

    def prepare_input(self, layer: Float8Linear, input: torch.Tensor, mesh: DeviceMesh) -> DTensor:
        """What the layer multiplies: all tokens."""
        prepared = _as_dtensor(input, mesh, self.input_layouts, layer)
        _check_input(layer, prepared)
        if _on_tokens(prepared.placements, prepared):
            recipe, again = layer.config.recipe, self.gather_input_again
            return _gather_input(prepared, recipe, again, layer)
        if prepared.placements != self.desired_input_layouts:
            prepared = prepared.redistribute(placements=self.desired_input_layouts)
        return prepared

    def prepare_output(self, layer: Float8Linear, output: DTensor) -> torch.Tensor:
        """What the layer gives, of the features that it has multiplied."""
        recipe = layer.config.recipe
        if recipe.grad_output == TENSOR:
            both = _in_both(layer, recipe.grad_output, recipe.grad_output_for_grad_weight)
            output = _cast_gradient(output, recipe, both)
        output = _with_bias(output, layer)
        if output.placements != self.output_layouts:
            output = output.redistribute(placements=self.output_layouts)
        return output.to_local() if self.use_local_output else output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _check(type(self).__name__, module, device_mesh, 0).style = self
        return distribute_module(module, device_mesh, self._partition_linear_fn)


class Float8RowwiseParallel(RowwiseParallel):
    """`torch.distributed.tensor.parallel.RowwiseParallel` for a `Float8Linear`.

    The gradient of an output that is cut along its tokens is gathered in float8; see
    [Note: activations in float8].

    Raises:
        ValueError: as `Float8ColwiseParallel`, with K for N.
    """

    def prepare_input(self, layer: Float8Linear, input: torch.Tensor, mesh: DeviceMesh) -> DTensor:
        """What the layer multiplies: this rank's features."""
        prepared = _as_dtensor(input, mesh, self.input_layouts, layer)
        _check_input(layer, prepared)
        if prepared.placements != (Shard(-1),):
            prepared = prepared.redistribute(placements=(Shard(-1),))
        recipe = layer.config.recipe
        if recipe.input == TENSOR:
            both = _in_both(layer, recipe.input, recipe.input_for_grad_weight)
            prepared = _cast_input(prepared, recipe, both)
        return prepared

    def prepare_output(self, layer: Float8Linear, output: DTensor) -> torch.Tensor:
        """What the layer gives, of the sums that are partial."""
        if output.placements != self.output_layouts:
            output = output.redistribute(placements=self.output_layouts)
        recipe = layer.config.recipe
        if _on_tokens(output.placements, output) and recipe.grad_output_for_grad_weight:
            output = _cast_gradient(output, recipe)
        output = _with_bias(output, layer)
        return output.to_local() if self.use_local_output else output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _check(type(self).__name__, module, device_mesh, 1).style = self
        return distribute_module(module, device_mesh, self._partition_linear_fn)


class PrepareFloat8ModuleInput(PrepareModuleInput):
    """`torch.distributed.tensor.parallel.PrepareModuleInput` that casts before it gathers.

    One gather then serves all `Float8Linear` layers in the module that take the input. Whatever
    else takes it gets the rounded values: give other floating-point inputs no layout here.

    Args:
        float8_dtype: torch.float8_e4m3fn.
        fwd_config_submodule_fqn: the `Float8Linear` whose recipe to cast by; None: that of all in
            the module.
        gather_input_again: see `Float8ColwiseParallel`.

    Raises:
        ValueError: in `parallelize_module`: the module has no `Float8Linear`, or several recipes.
    """

    def __init__(
        self,
        *,
        float8_dtype: torch.dtype = torch.float8_e4m3fn,
        fwd_config_submodule_fqn: str | None = None,
        gather_input_again: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if float8_dtype != torch.float8_e4m3fn:
            raise ValueError(
                f"float8_dtype is {float8_dtype}: only torch.float8_e4m3fn is supported"
            )
        self.fwd_config_submodule_fqn = fwd_config_submodule_fqn
        self.gather_input_again = gather_input_again
        self.recipe: Recipe | None = None

    def _prepare_input_arg(
        self,
        input: Any,
        mesh: DeviceMesh,
        input_layout: Placement | None,
        desired_layout: Placement | None,
    ) -> Any:
        if input_layout is None or self.recipe is None:
            return input
        prepared = _as_dtensor(input, mesh, (input_layout,), self)
        if desired_layout is not None and prepared.placements != (desired_layout,):
            gathered = _on_tokens(prepared.placements, prepared) and desired_layout == Replicate()
            if gathered and prepared.dtype in HP_DTYPES:  # not positions, or masks
                prepared = _gather_input(prepared, self.recipe, self.gather_input_again, self)
            else:
                prepared = prepared.redistribute(placements=(desired_layout,))
        return prepared.to_local() if self.use_local_output else prepared

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        name, named = type(self).__name__, dict(module.named_modules())
        if (fqn := self.fwd_config_submodule_fqn) is not None:
            if fqn not in named:
                raise ValueError(
                    f"{name}: {type(module).__name__} has no module {fqn!r}, which "
                    f"fwd_config_submodule_fqn names: it has {', '.join(filter(None, named))}"
                )
            named = {fqn: named[fqn]}
        recipes = {
            layer.config.recipe.name: layer.config.recipe
            for layer in named.values()
            if isinstance(layer, Float8Linear)
        }
        if len(recipes) != 1:
            found = f"of recipes {', '.join(recipes)}" if recipes else "none"
            raise ValueError(
                f"{name}: {type(module).__name__} has Float8Linear layers {found}: it casts by "
                "the recipe of one, which fwd_config_submodule_fqn names; without any use torch's "
                "PrepareModuleInput"
            )
        style = copy.copy(self)  # one object may be planned for several modules
        (style.recipe,) = recipes.values()

        def prepare(module: nn.Module, inputs: Any, kwargs: dict[str, Any]) -> Any:
            return style._prepare_input_kwarg_fn(inputs, kwargs, device_mesh)

        module.register_forward_pre_hook(within_a_graph(prepare), with_kwargs=True)
        return module
