"""On a GPU a step of training never waits for the device."""

import pytest
import torch

import fp8dist
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.toy import RECIPE_NAMES, float8_model, local_batch, loss_of, mesh_of

pytestmark = pytest.mark.skipif(DEVICE != "cuda", reason="a CPU has nothing to wait for")


def steps(recipe: str) -> float:
    model = float8_model(mesh_of(torch.distributed.get_world_size()), recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    fp8dist.register_precompute_hook(optimizer, model)
    batches = [local_batch(number) for number in range(4)]
    for number, batch in enumerate(batches):
        # By the third everything that lasts has been made.
        torch.cuda.set_sync_debug_mode("error" if number >= 2 else "default")
        try:
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return loss.item()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_no_step_waits_for_the_device(recipe: str, world: int) -> None:
    run_on_ranks(world, steps, recipe)
