"""With tensor parallelism too: torchrun --nproc-per-node 4 scripts/train_tp_fsdp2.py"""

import torch
import torch.distributed as dist
import torch.distributed.tensor.parallel as tp
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard

import fp8dist


class Block(nn.Module):
    def __init__(self, dim=128):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):  # a head's q, k and v are side by side, so that ranks get whole heads
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (-1, 3, 32)).permute(3, 0, 2, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.proj(mixed.flatten(2))
        return x + self.down(F.silu(self.up(self.norm2(x))))


device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group()
mesh = dist.init_device_mesh(device, (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
torch.set_default_device(device)
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(256, 128), Block(), Block(), nn.Linear(128, 256))
keep_output = fp8dist.float8_module_filter("rowwise", ["3"])
fp8dist.convert_to_float8_training(model, config="rowwise", module_filter_fn=keep_output)
norm = tp.SequenceParallel(use_local_output=True)  # ranks share the tokens between the layers,
columns = fp8dist.Float8ColwiseParallel(input_layouts=Shard(1))  # which are gathered in float8
rows = fp8dist.Float8RowwiseParallel(output_layouts=Shard(1))
plan = {"norm1": norm, "qkv": columns, "proj": rows, "norm2": norm, "up": columns, "down": rows}
whole = {"0": tp.RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))}
whole["3"] = tp.ColwiseParallel(input_layouts=Shard(1), use_local_output=False)
tp.parallelize_module(model, mesh["tp"], whole)
for block in model[1:3]:
    fully_shard(tp.parallelize_module(block, mesh["tp"], plan), mesh=mesh["dp"])
fully_shard(model, mesh=mesh["dp"])
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
fp8dist.register_precompute_hook(optimizer, model)
text = torch.tensor(list(open(__file__, "rb").read()))  # it learns this file
for step in range(31):
    starts = torch.randint(len(text) - 64, (mesh["dp"].size(), 8, 1))[mesh["dp"].get_local_rank()]
    tokens = text[starts + torch.arange(65)]  # the same on the ranks of tensor parallelism
    with tp.loss_parallel():  # of logits that are cut along the vocabulary
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0 and step % 10 == 0:
        print(f"step {step}  loss {loss.item():.3f}", flush=True)
dist.destroy_process_group()
