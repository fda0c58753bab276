"""The Trainer with FSDP2 and float8: torchrun --nproc-per-node 2 scripts/clients/hf_trainer.py

Hugging Face's, on a mixture of experts. The lines marked "float8" are all that changes. The Trainer
shards over GPUs, one per process.
"""

import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import fp8dist  # float8


def new_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "experts_implementation": "grouped_mm"}
    return MixtralForCausalLM(MixtralConfig(num_hidden_layers=2, **sizes, **heads, **experts))


def convert(model):  # float8, all of it; a model without experts goes without the first line
    fp8dist.convert_moe_to_float8_training(model, config="rowwise")
    keep_head = fp8dist.float8_module_filter("rowwise", ["lm_head"])
    return fp8dist.convert_to_float8_training(model, config="rowwise", module_filter_fn=keep_head)


class Precompute(TrainerCallback):  # float8
    def on_optimizer_step(self, args, state, control, model, **kwargs):
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)


def new_data():
    text = torch.tensor(list(open(__file__, "rb").read()))  # it learns this file
    windows = text.unfold(0, 64, 4).split(1)
    return [{"input_ids": window[0], "labels": window[0]} for window in windows]


def new_trainer(model, folder, **options):
    args = TrainingArguments(
        folder, fsdp=True, learning_rate=3e-3, report_to="none", logging_steps=10, **options
    )
    callbacks = [Precompute()]  # float8
    return Trainer(model, args, train_dataset=new_data(), callbacks=callbacks)


if __name__ == "__main__":
    model = convert(new_model())  # float8
    trainer = new_trainer(model, "outputs/hf_trainer")
    trainer.train()
    trainer.save_model()  # names and values of the unconverted model
