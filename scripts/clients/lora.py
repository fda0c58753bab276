"""LoRA by peft on frozen float8 weights: torchrun --nproc-per-node 2 scripts/clients/lora.py"""

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import fp8dist  # float8: all that changes is marked so


def new_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes, **heads)).bfloat16()


def add_adapters(model, config="rowwise"):
    lora = LoraConfig(r=16, target_modules="all-linear")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)  # in bfloat16, as the model
    keep = fp8dist.float8_module_filter("rowwise", ["lora_", "lm_head"])  # float8
    return fp8dist.convert_to_float8_training(model, config=config, module_filter_fn=keep)  # float8


def shard(model):
    mesh = dist.init_device_mesh(model.device.type, (dist.get_world_size(),))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)  # float8: once, as nothing edits them
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def save(model, folder):
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    adapters = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=adapters)


if __name__ == "__main__":
    dist.init_process_group()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = add_adapters(new_model().to(device))
    optimizer = shard(model)
    text = torch.tensor(list(open(__file__, "rb").read()))  # it learns this file
    for step in range(61):
        starts = torch.randint(len(text) - 64, (dist.get_world_size(), 8, 1))[dist.get_rank()]
        batch = text[starts + torch.arange(64)].to(device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and step % 10 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    save(model, "outputs/lora")
    dist.destroy_process_group()
