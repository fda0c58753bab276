"""accelerate's FSDP2 with float8: torchrun --nproc-per-node 2 scripts/clients/accelerate_fsdp2.py

The lines marked "float8" are all that changes. accelerate shards over GPUs, one per process.
"""

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import fp8dist  # float8


def new_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes, **heads))


def new_data():
    text = torch.tensor(list(open(__file__, "rb").read()))  # it learns this file
    windows = text.unfold(0, 64, 4).split(1)
    return [{"input_ids": window[0], "labels": window[0]} for window in windows]


def prepare(model, accelerator):
    keep = fp8dist.float8_module_filter("rowwise", ["lm_head"])  # float8
    fp8dist.convert_to_float8_training(model, config="rowwise", module_filter_fn=keep)  # float8
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    fp8dist.register_precompute_hook(optimizer, model)  # float8
    return accelerator.prepare(model, optimizer)


def train(model, optimizer, loader, accelerator):
    for step, batch in enumerate(loader):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            accelerator.print(f"step {step}  loss {loss.item():.3f}")


if __name__ == "__main__":
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
    )
    accelerator = Accelerator(fsdp_plugin=plugin)
    model, optimizer = prepare(new_model(), accelerator)
    loader = accelerator.prepare(DataLoader(new_data(), batch_size=8, shuffle=True))
    train(model, optimizer, loader, accelerator)
    accelerator.save_state("outputs/accelerate")  # names and values of the unconverted model
    accelerator.end_training()
