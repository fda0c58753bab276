"""A script for torchao's float8 all-gather under FSDP2. Only the marked line is not torchao's.

torchrun --nproc-per-node 2 scripts/clients/torchao_fsdp2.py
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fp8dist import (  # <- for torchao.float8
    Float8LinearConfig,
    convert_to_float8_training,
    precompute_float8_dynamic_scale_for_fsdp,
)


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


device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group()
mesh = dist.init_device_mesh(device, (dist.get_world_size(),))
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(256, 64), Block(64), Block(64), nn.Linear(64, 256))
convert_to_float8_training(
    model.to(device),
    config=Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=device == "cpu"),
    module_filter_fn=lambda module, fqn: fqn != "3",  # the logits in high precision
)
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for block in model[1:3]:
    fully_shard(block, mesh=mesh, mp_policy=policy)
fully_shard(model, mesh=mesh, mp_policy=policy)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
text = torch.tensor(list(open(__file__, "rb").read()))  # it learns this file
losses = []
for _ in range(8):
    starts = torch.randint(len(text) - 64, (dist.get_world_size(), 4, 1))[dist.get_rank()]
    tokens = text[starts + torch.arange(65)].to(device)
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    precompute_float8_dynamic_scale_for_fsdp(model)
    losses.append(loss.item())
print(f"rank {dist.get_rank()}: loss {losses[0]:.3f} to {losses[-1]:.3f}")
dist.destroy_process_group()
