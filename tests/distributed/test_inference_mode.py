"""A model that has not been trained yet computes in inference mode, on all ranks alike."""

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

import fp8dist
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.toy import convert, local_batch, loss_of, mesh_of, new_model, shard
from tests.unit.moe import EXPERTS, FusedExperts, StackedExperts


def first_forward(recipe: str, precompute: bool, offload: bool) -> list[float]:
    """Losses of equal models: under no_grad, then twice in inference mode, then edited there."""
    losses = []
    for mode in (torch.no_grad, torch.inference_mode):
        model, options = convert(new_model(), recipe), {}
        if offload:
            model.cpu()
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        shard(model, mesh_of(dist.get_world_size()), **options)
        if precompute:
            fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
        with mode():
            losses += [loss_of(model, local_batch(0)).item() for _ in range(2)]
            for weight in model.parameters():
                weight.mul_(1.5)
            model.reshard()
            losses.append(loss_of(model, local_batch(0)).item())
        assert not any(layer.w2.weight.to_local().is_inference() for layer in model.layers)
    assert len(set(losses)) == 2
    return losses


# 3 ranks cut the weights unevenly: FSDP2 moves the shard of the last in its first forward.
@pytest.mark.parametrize("precompute", [False, True], ids=["", "precompute"])
@pytest.mark.parametrize("world, offload", [(2, False), (3, False), (3, True)])
@pytest.mark.parametrize("recipe", ["rowwise", "mxfp8_rceil"])
def test_the_first_forward(recipe: str, world: int, offload: bool, precompute: bool) -> None:
    for losses in run_on_ranks(world, first_forward, recipe, precompute, offload):
        assert losses[:3] == losses[3:]


def evaluated(kind: type[nn.Module], recipe: str, train: bool) -> list[torch.Tensor]:
    """Outputs of equal experts, under no_grad and in inference mode."""
    outputs = []
    for mode in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        model = nn.ModuleDict({"experts": kind(EXPERTS).to(DEVICE)})
        fp8dist.convert_moe_to_float8_training(model, config=recipe)
        experts = fully_shard(model["experts"], mesh=mesh_of(dist.get_world_size()))
        x = torch.randn(32, 64, device=DEVICE)
        counts = torch.full((EXPERTS,), 32 // EXPERTS, device=DEVICE)
        if train:
            experts(x, counts).sum().backward()
        with mode():
            outputs.append(experts(x, counts).cpu())
    return outputs


@pytest.mark.parametrize("train", [False, True], ids=["first", "after a step"])
@pytest.mark.parametrize("recipe", ["rowwise", "mxfp8"])
@pytest.mark.parametrize("kind", [StackedExperts, FusedExperts])
def test_experts_compute_in_float8(kind: type[nn.Module], recipe: str, train: bool) -> None:
    """What they do to a weight before they multiply it is one op there, not what it consists of."""
    for expected, found in run_on_ranks(2, evaluated, kind, recipe, train):
        assert found.equal(expected)


def trained_after() -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 16)).to(DEVICE)
    fully_shard(fp8dist.convert_to_float8_training(model), mesh=mesh_of(dist.get_world_size()))
    x = torch.ones(16, 32, device=DEVICE)
    with torch.inference_mode():
        model(x)
        model.reshard()
    with pytest.raises(ValueError) as error:
        model(x)
    return str(error.value)


@pytest.mark.parametrize("world", [2, 3])
def test_training_after_it_is_refused(world: int) -> None:
    first, *others = run_on_ranks(world, trained_after)
    assert first.startswith("0 was first gathered inside torch.inference_mode")
    assert "torch.no_grad()" in first
    assert others == [first] * (world - 1)


def error_of_training_after(case: str) -> str:
    """Of a model with a high-precision group around the blocks: what FSDP2's own buffers raise, or,
    where it can write to the root's, as on a GPU, the refusal of the first block's."""
    options = {"reshard_after_forward": False} if case == "blocks kept" else {}
    model = shard(convert(new_model(), "rowwise"), mesh_of(dist.get_world_size()), **options)
    with torch.inference_mode():
        loss_of(model, local_batch(0))
    if case == "root resharded":
        model.reshard()
    with pytest.raises((RuntimeError, ValueError), match="[Ii]nference[ _]") as error:
        loss_of(model, local_batch(0)).backward()
    return str(error.value)


# 3 ranks cut the weights unevenly.
@pytest.mark.parametrize("case", ["root resharded", "blocks kept"])
def test_where_fsdp2_refuses_it_no_rank_waits(case: str) -> None:
    assert len(set(run_on_ranks(3, error_of_training_after, case))) == 1
