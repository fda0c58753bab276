"""A script for torchao's float8 tensor parallelism. Only the marked lines are not torchao's.

torchrun --nproc-per-node 2 scripts/clients/torchao_tp.py
"""

import torch
import torch.distributed as dist
import torch.distributed.tensor.parallel as tp
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Replicate, Shard

from fp8dist import Float8LinearConfig, convert_to_float8_training  # <- for torchao.float8
from fp8dist.tensor_parallel import (  # <- for torchao.float8.float8_tensor_parallel
    Float8ColwiseParallel,
    Float8RowwiseParallel,
    PrepareFloat8ModuleInput,
)


class FeedForward(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(dim, 4 * dim, bias=False) for _ in range(2))
        self.w2 = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group()
mesh = dist.init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))
torch.manual_seed(0)
blocks = [nn.Sequential(nn.RMSNorm(64), FeedForward(64)) for _ in range(2)]
model = nn.Sequential(nn.Embedding(256, 64), *blocks, nn.Linear(64, 256)).to(device)
config = Float8LinearConfig(emulate=device == "cpu")
convert_to_float8_training(model, config=config, module_filter_fn=lambda _, fqn: fqn != "3")
plan = {"0": tp.RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))}
plan["3"] = tp.ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
for block in ("1", "2"):
    plan[f"{block}.0"] = tp.SequenceParallel()
    plan[f"{block}.1"] = PrepareFloat8ModuleInput(  # one gather for w1 and w3
        input_layouts=Shard(1), desired_input_layouts=Replicate(), fwd_config_submodule_fqn="w1"
    )
    plan[f"{block}.1.w1"] = plan[f"{block}.1.w3"] = Float8ColwiseParallel()
    plan[f"{block}.1.w2"] = Float8RowwiseParallel(output_layouts=Shard(1))
tp.parallelize_module(model, mesh, plan, src_data_rank=None)  # ranks have made the same weights
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
text = torch.tensor(list(open(__file__, "rb").read()))  # it learns this file
losses = []
for _ in range(8):
    tokens = text[torch.randint(len(text) - 64, (4, 1)) + torch.arange(65)].to(device)
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"rank {dist.get_rank()}: loss {losses[0]:.3f} to {losses[-1]:.3f}")
dist.destroy_process_group()
