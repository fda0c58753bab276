"""Zeros, denormal, huge and bad numbers in weights, inputs and gradients: what high precision shows
is what shows."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.fsdp import fully_shard

import fp8dist
from fp8dist import Float8Config
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.toy import RECIPE_NAMES, full, mesh_of, warnings_of_the_library

N, K, M = 256, 128, 32
# What a whole tensor is multiplied by.
FACTORS = {"ordinary": 1.0, "zero": 0.0, "denormal": 1e-41, "tiny": 1e-20, "huge": 1e25}
# What one element of it is.
ELEMENTS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
WHERE = ["weight", "input", "grad_output"]

Results = dict[str, torch.Tensor]


def operands(where: str, what: str) -> Results:
    generator = torch.Generator().manual_seed(0)
    found = {
        "weight": torch.randn(N, K, generator=generator),
        "input": torch.randn(M, K, generator=generator),
        "grad_output": torch.randn(M, N, generator=generator),
    }
    if what in FACTORS:
        found[where] *= FACTORS[what]
    else:
        found[where][3, 5] = ELEMENTS[what]
    return {name: tensor.to(DEVICE) for name, tensor in found.items()}


def in_high_precision(where: str, what: str) -> Results:
    x = operands(where, what)
    return {
        "output": x["input"] @ x["weight"].t(),
        "grad_input": x["grad_output"] @ x["weight"],
        "grad_weight": x["grad_output"].t() @ x["input"],
    }


def in_float8(recipe: str, where: str, what: str) -> tuple[Results, list[str]]:
    x = operands(where, what)
    layer = nn.Linear(K, N, bias=False, device=DEVICE)
    with torch.no_grad():
        layer.weight.copy_(x["weight"])
    model = nn.Sequential(nn.Linear(K, K, bias=False, device=DEVICE), layer)
    fp8dist.convert_to_float8_training(model, config=Float8Config(recipe))
    fully_shard(model, mesh=mesh_of(dist.get_world_size()))
    with warnings_of_the_library() as messages:
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
        model.unshard()
        input = x["input"].requires_grad_()
        output = layer(input)
        (grad_input, grad_weight) = torch.autograd.grad(
            output, (input, layer.weight), x["grad_output"]
        )
        model.reshard()
        if DEVICE != "cpu":  # there it is told one call later, if it has been found by then
            torch.cuda.synchronize()
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
    return {
        "output": output.detach().cpu(),
        "grad_input": grad_input.cpu(),
        "grad_weight": full(grad_weight),
    }, messages


def differences(recipe: str, packed: bool) -> list[str]:
    """What float8 shows otherwise than high precision does."""
    found = []
    for where in WHERE:
        for what in [*FACTORS, *ELEMENTS]:
            expected = {n: t.cpu() for n, t in in_high_precision(where, what).items()}
            results, messages = in_float8(recipe, where, what)
            for name, result in results.items():
                if wrong := _difference(result, expected[name], bad=what in ELEMENTS):
                    found.append(f"{name} of {what} {where}: {wrong}")
            named = [message for message in messages if "NaN or Inf" in message]
            holds_it = not packed or dist.get_rank() == 0  # row 3 is in the first shard
            if bool(named) != (where == "weight" and what in ELEMENTS and holds_it):
                found.append(f"{what} {where} is told as {named}")
            if named and not named[0].startswith("1 "):
                found.append(f"{what} {where} is named {named[0]}")
    return found


def _difference(result: torch.Tensor, expected: torch.Tensor, bad: bool) -> str | None:
    if bad:
        missed = int((~expected.isfinite() & result.isfinite()).sum())
        return f"{missed} elements are finite that are not" if missed else None
    if not result.isfinite().all():
        return "not finite"
    # float8 keeps the norm of an error below 1/8 of the result's, e5m2 below 1/4. What is below
    # 1e-12 in all of a block is lost there: its scale ends.
    allowed = 0.25 * expected.norm().item() + 1e-12 * K * math.sqrt(expected.numel())
    error = (result - expected).norm().item()
    return f"the error is {error}, of {expected.norm().item()}" if error > allowed else None


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_what_high_precision_shows_is_what_shows(recipe: str) -> None:
    packed: Any = recipe.startswith("mxfp8")  # scales travel with the payload, and are seen there
    assert run_on_ranks(2, differences, recipe, packed) == [[], []]


def optimizer_steps(recipe: str) -> list[float]:
    """Losses of steps from weights that are all zero, as some layers are initialised."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, K)).to(DEVICE)
    with torch.no_grad():
        model[2].weight.zero_()
    fp8dist.convert_to_float8_training(model, config=Float8Config(recipe))
    fully_shard(model, mesh=mesh_of(dist.get_world_size()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fp8dist.register_precompute_hook(optimizer, model)
    x = operands("input", "ordinary")["input"]
    losses = []
    for _ in range(5):
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_weights_of_zeros_learn(recipe: str) -> None:
    for losses in run_on_ranks(2, optimizer_steps, recipe):
        assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False))
