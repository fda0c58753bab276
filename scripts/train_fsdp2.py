"""FSDP2 with float8 all-gather: torchrun --nproc-per-node 2 scripts/train_fsdp2.py"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

import fp8dist


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, 32)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.proj(mixed.flatten(2))
        return x + self.down(F.silu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    def __init__(self, dim=128):
        super().__init__()
        self.embedding, self.output = nn.Embedding(256, dim), nn.Linear(dim, 256)
        self.layers = nn.Sequential(Block(dim), Block(dim))

    def forward(self, tokens):
        logits = self.output(self.layers(self.embedding(tokens[:, :-1])))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group()
mesh = dist.init_device_mesh(device, (dist.get_world_size(),))  # this also picks the rank's GPU
torch.set_default_device(device)
torch.manual_seed(0)
model = Decoder()
keep_output = fp8dist.float8_module_filter("tensorwise", ["output"])
fp8dist.convert_to_float8_training(model, config="tensorwise", module_filter_fn=keep_output)
for block in model.layers:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
fp8dist.register_precompute_hook(optimizer, model)
text = torch.tensor(list(open(__file__, "rb").read()))  # it learns this file
for step in range(31):
    starts = torch.randint(len(text) - 64, (dist.get_world_size(), 8, 1))[dist.get_rank()]
    loss = model(text[starts + torch.arange(65)])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0 and step % 10 == 0:
        print(f"step {step}  loss {loss.item():.3f}", flush=True)
dist.destroy_process_group()
