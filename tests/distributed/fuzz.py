"""Random models, shapes, shardings and recipes under FSDP2, against the same in one process."""

import traceback
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from hypothesis import strategies as st
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import fp8dist
from fp8dist import Float8Config, numerics
from fp8dist.config import RECIPES, Recipe
from fp8dist.tensors.float8_tensor import Float8Tensor
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.toy import full, mesh_of

MESHES = ((1,), (2,), (3,), (4,), (2, 2))
STEPS = 2


@dataclass(frozen=True)
class FuzzCase:
    """Its repr is Python that makes it again."""

    recipe: str = "tensorwise"
    mesh: tuple[int, ...] = (1,)
    sizes: tuple[int, ...] = (16, 16)  # of the activations before and after each linear layer
    tokens: int = 1  # of a rank and microbatch
    bias: bool = False
    dtype: str = "float32"
    shard_dim: int = 0
    reshard: bool = True
    groups: bool = False  # whether each layer is a group of its own
    cache_payload: bool = True
    precompute: bool = True
    microbatches: int = 1
    exponent: int = 0  # of ten, which the weights are multiplied by
    seed: int = 0

    @property
    def world(self) -> int:
        return torch.Size(self.mesh).numel()


@st.composite
def cases(draw: Any) -> FuzzCase:
    recipe = draw(st.sampled_from(list(RECIPES)))
    mesh = draw(st.sampled_from(MESHES))
    shard_dim = draw(st.sampled_from([0, 0, 1]))
    multiple = RECIPES[recipe].dim_multiple
    if multiple == 16:  # of the hardware, which is emulated
        multiple, largest = 1, 80
    else:
        largest = {32: 5, 128: 3}[multiple]
    if shard_dim == 1:  # FSDP2 cuts columns evenly, and not where e8m0 scales them together
        multiple *= mesh[-1]
        largest = max(1, largest // mesh[-1])
    size = st.integers(1, largest).map(lambda count: count * multiple)
    return FuzzCase(
        recipe=recipe,
        mesh=mesh,
        sizes=tuple(draw(st.lists(size, min_size=2, max_size=4))),
        tokens=draw(st.integers(1, 40)),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        shard_dim=shard_dim,
        reshard=draw(st.booleans()),
        groups=draw(st.booleans()),
        cache_payload=draw(st.booleans()),
        precompute=draw(st.booleans()),
        microbatches=draw(st.integers(1, 3)),
        exponent=draw(st.integers(-3, 3)),
        seed=draw(st.integers(0, 3)),
    )


def failure_of(case: FuzzCase) -> str | None:
    """What is wrong on the first rank that finds something, or None."""
    return next((found for found in run_on_ranks(case.world, _run, case) if found), None)


def _run(case: FuzzCase) -> str | None:
    try:
        return _compare(case)
    except Exception:
        return traceback.format_exc()


def _model(case: FuzzCase) -> nn.Sequential:
    torch.manual_seed(case.seed)
    layers: list[nn.Module] = []
    for columns, rows in zip(case.sizes[:-1], case.sizes[1:], strict=True):
        layers += [nn.Linear(columns, rows, bias=case.bias), nn.Tanh()]
    model = nn.Sequential(*layers).to(DEVICE, getattr(torch, case.dtype))
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.mul_(10.0**case.exponent)
            layer.weight[layer.weight.size(0) // 2] = 0
    config = Float8Config(case.recipe, cache_payload=case.cache_payload, emulate=True)
    return fp8dist.convert_to_float8_training(
        model, config=config, module_filter_fn=lambda module, _: isinstance(module, nn.Linear)
    )


def _arrived(weight: torch.Tensor, recipe: Recipe) -> Float8Tensor:
    """What an unshard should give, by the specification and from the whole weight.

    Layers derive their backward operand from it. Cast from high precision as in a layer that is not
    sharded, it differs where elements are subnormal in one of the two scalings.
    """
    scaled = numerics.quantize(weight, recipe.weight, recipe.weight_dtype, recipe.scale_format)
    if recipe.scale_format == "e8m0":
        scales = [numerics.scale_to_exponent(scaled.scale)[None]]
    else:
        blocks = dict.fromkeys([recipe.weight, recipe.weight_for_grad_input])
        by_block = (
            numerics.amax_to_scale(
                numerics.amax(weight, block).float(), recipe.weight_dtype, recipe.scale_format
            )
            for block in blocks
        )
        scales = [torch.stack([scale.reciprocal(), scale]) for scale in by_block]
    return Float8Tensor(scaled.data, scales[0], weight.shape, weight.dtype, *scales[1:])


def _placement(case: FuzzCase, param: nn.Parameter) -> Shard:
    return Shard(case.shard_dim if param.dim() == 2 else 0)


def _loss(case: FuzzCase, model: nn.Module, step: int, microbatch: int) -> torch.Tensor:
    seed = 1000 * dist.get_rank() + 10 * step + microbatch
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(case.tokens, case.sizes[0], generator=generator)
    y = torch.randn(case.tokens, case.sizes[-1], generator=generator)
    dtype = getattr(torch, case.dtype)
    return (model(x.to(DEVICE, dtype)) * y.to(DEVICE, dtype)).float().sum()


def _compare(case: FuzzCase) -> str | None:
    reference, model = _model(case), _model(case)
    options: dict[str, Any] = {
        "mesh": mesh_of(*case.mesh),
        "reshard_after_forward": case.reshard,
        "shard_placement_fn": lambda param: _placement(case, param),
    }
    if case.groups:
        for layer in model[::2]:
            fully_shard(layer, **options)
    fully_shard(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    if case.precompute:
        fp8dist.register_precompute_hook(optimizer, model)
    for step in range(STEPS):
        with torch.no_grad():
            for mine, theirs in zip(reference[::2], model[::2], strict=True):
                weight = full(theirs.weight).to(DEVICE)
                mine.weight = nn.Parameter(_arrived(weight, RECIPES[case.recipe]))
                if case.bias:
                    mine.bias.copy_(full(theirs.bias).to(DEVICE))
        for microbatch in range(case.microbatches):
            model.set_requires_gradient_sync(microbatch == case.microbatches - 1)
            losses = []
            for one in (model, reference):
                loss = _loss(case, one, step, microbatch)
                loss.backward()
                losses.append(loss.item())
            # The same numbers are multiplied and added up in the same order.
            if losses[0] != losses[1]:
                return f"step {step}: the loss is {losses[0]}, in one process {losses[1]}"
        for (name, theirs), mine in zip(
            model.named_parameters(), reference.parameters(), strict=True
        ):
            expected = mine.grad.float()
            dist.all_reduce(expected)
            expected = (expected / dist.get_world_size()).cpu()
            error = (full(theirs.grad).float() - expected).norm().item()
            if not error <= _tolerance(case) * _size(expected, mine.grad):
                return f"step {step}: the gradient of {name} is off by {error}"
        optimizer.step()
        optimizer.zero_grad()
        reference.zero_grad()
    return None


def _size(average: torch.Tensor, mine: torch.Tensor) -> float:
    """The largest norm on any rank: an average of what cancels is small, and its error is not."""
    norm = mine.float().norm()
    dist.all_reduce(norm, op=dist.ReduceOp.MAX)
    return max(norm.item(), average.norm().item())


def _tolerance(case: FuzzCase) -> float:
    # Operands are bitwise those of the reference, and so are the gradients of each rank. Ranks'
    # gradients are then added up and divided, here and in the reference in another order: with as
    # many roundings as there are ranks, here in the weights' dtype and there in float32. Each is of
    # half the last bit of a sum that is no larger than the largest gradient times the ranks.
    roundings = (torch.finfo(getattr(torch, case.dtype)).eps + torch.finfo(torch.float32).eps) / 2
    return case.world * roundings
