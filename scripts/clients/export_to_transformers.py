"""From training to inference by transformers: python scripts/clients/export_to_transformers.py

It takes transformers and compressed-tensors. After a training on several ranks all of them call
export_float8, and any one loads.
"""

import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import fp8dist


def new_model(recipe):
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes, **heads))
    keep_head = fp8dist.float8_module_filter(recipe, ["lm_head"])
    return fp8dist.convert_to_float8_training(model, config=recipe, module_filter_fn=keep_head)


def export(model, folder):
    # export_float8 adds its quantization_config to it, on rank 0, where nobody else may write it.
    if not dist.is_initialized() or dist.get_rank() == 0:
        model.config.save_pretrained(folder)
    fp8dist.export_float8(model, folder)


def load(folder, dtype=torch.float32, dequantize=True):
    """Multiplied in dtype if it is dequantized, else by compressed-tensors, inputs cast too."""
    config = CompressedTensorsConfig(dequantize=dequantize)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)


if __name__ == "__main__":
    model = new_model("rowwise")
    export(model, "outputs/exported")
    loaded = load("outputs/exported")
    tokens = torch.tensor([list(b"float8")])
    print("trained ", model(tokens).logits[0, -1, :4])
    print("exported", loaded(tokens).logits[0, -1, :4])
