"""Lightning with float8: torchrun --nproc-per-node 2 scripts/clients/lightning_fsdp2.py

Its FSDP2 strategy, on GPUs or CPUs. The lines marked "float8" are all that changes.
"""

import os

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

import fp8dist  # float8


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class NextByte(lightning.LightningModule):
    """Guesses a byte from the 8 before it."""

    def __init__(self, dim=128):
        super().__init__()
        first, last = nn.Embedding(256, dim // 8), nn.Linear(dim, 256)
        self.model = nn.Sequential(first, nn.Flatten(), Block(dim), Block(dim), last)

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for block in self.model[2:4]:
            fp8dist.convert_to_float8_training(block, config="rowwise")  # float8
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        fp8dist.register_precompute_hook(optimizer, self)  # float8
        return optimizer

    def training_step(self, batch):
        loss = nn.functional.cross_entropy(self.model(batch[:, :-1]), batch[:, -1])
        self.log("loss", loss, prog_bar=True)
        return loss


if __name__ == "__main__":
    text = torch.tensor(list(open(__file__, "rb").read()))  # it learns this file
    ranks, folder = int(os.environ["WORLD_SIZE"]), "outputs/lightning"
    fsdp = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
    trainer = lightning.Trainer(strategy=fsdp, devices=ranks, max_epochs=3, default_root_dir=folder)
    trainer.fit(NextByte(), DataLoader(text.unfold(0, 9, 1), batch_size=32, shuffle=True))
