"""Lightning's FSDP2 strategy, as scripts/clients/lightning_fsdp2.py uses it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

import fp8dist
from tests.clients.client import environment, float8_of, script
from tests.distributed.harness import run_on_ranks
from tests.distributed.wire import collectives

lightning = pytest.importorskip("lightning", reason="for .ci/clients")


class Watched(lightning.Callback):
    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.recorder = collectives()
        self.collectives = self.recorder.__enter__()

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: torch.Tensor, index: int
    ) -> None:
        self.recorder.__exit__(None, None, None)
        self.batches.append(batch)
        self.losses.append(outputs["loss"].item())


def fit(steps: int, watched: Watched, one_file: bool, checkpoint: str | None = None) -> Any:
    """A trainer that has trained a new model, on from a checkpoint."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    torch.manual_seed(0)
    module = script("lightning_fsdp2").NextByte()
    strategy = ModelParallelStrategy(
        data_parallel_size=dist.get_world_size(),
        tensor_parallel_size=1,
        save_distributed_checkpoint=not one_file,
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=dist.get_world_size(),
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=[watched],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.randint(256, (64, 9), generator=torch.Generator().manual_seed(1))
    loader = DataLoader(data, batch_size=4)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


def plain_losses(batches: list[torch.Tensor]) -> list[float]:
    torch.manual_seed(0)
    model = script("lightning_fsdp2").NextByte().model
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model[2:4]:
        fp8dist.convert_to_float8_training(block, config="rowwise")
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    fp8dist.register_precompute_hook(optimizer, model)
    losses = []
    for batch in batches:
        loss = nn.functional.cross_entropy(model(batch[:, :-1]), batch[:, -1])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(one_file: bool, folder: str) -> None:
    watched = Watched()
    with environment():
        trainer = fit(2, watched, one_file)
        model = trainer.lightning_module.model
        assert float8_of(model).keys() == {
            f"{block}.{layer}.weight" for block in (2, 3) for layer in ("up", "down")
        }
        # In the second step 2 blocks, gathered in forward and in backward: a byte per element of
        # their weights, and a norm and two biases in float32.
        sent = [c for c in watched.collectives if c.name == "all_gather" and c.dtype == torch.uint8]
        bytes_of_block = 2 * 128 * 512 + 4 * (128 + 512 + 128)
        assert [c.numel for c in sent] == [bytes_of_block // dist.get_world_size()] * 4
        assert [str(c) for c in watched.collectives if c.dtype == torch.int32] == [
            f"all_reduce MAX int32[{4 * (128 + 512)}] over 2 ranks"
        ]
        path = f"{folder}/checkpoint"
        trainer.save_checkpoint(path)
        fit(4, watched, one_file, path)
    assert len(watched.losses) == 4
    assert watched.losses == plain_losses(watched.batches)
    if one_file and dist.get_rank() == 0:
        saved = torch.load(path, weights_only=False)["state_dict"]
        assert {type(value) for value in saved.values()} == {torch.Tensor}
        script("lightning_fsdp2").NextByte().load_state_dict(saved)


@pytest.mark.parametrize("one_file", [False, True])
def test_losses_are_those_of_the_plain_loop(one_file: bool, tmp_path: Path) -> None:
    run_on_ranks(2, trained, one_file, str(tmp_path))
