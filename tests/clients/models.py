"""Tiny models of transformers, and their conversion."""

from typing import Any

import torch
from torch import nn

import fp8dist

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
ROUTED = {"num_experts_per_tok": 2, "experts_implementation": "grouped_mm"}


def new_model(name: str) -> Any:
    """Weights are the same in each process."""
    import transformers

    torch.manual_seed(0)
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    if name == "mixtral":
        config = transformers.MixtralConfig(**SIZES, **ROUTED, num_local_experts=4)
        return transformers.MixtralForCausalLM(config)
    if name == "qwen3_moe":
        sizes = {"num_experts": 4, "moe_intermediate_size": 32}
        config = transformers.Qwen3MoeConfig(**SIZES, **ROUTED, **sizes)
        return transformers.Qwen3MoeForCausalLM(config)
    config = transformers.GptOssConfig(**SIZES, **ROUTED, num_local_experts=4)
    return transformers.GptOssForCausalLM(config)


def convert(model: Any) -> Any:
    """All linear layers but the head, and the experts if there are any."""
    if any("experts" in fqn for fqn, _ in model.named_modules()):
        fp8dist.convert_moe_to_float8_training(model, config="rowwise", fqns=["experts"])
    keep_head = fp8dist.float8_module_filter("rowwise", ["lm_head"])
    return fp8dist.convert_to_float8_training(model, config="rowwise", module_filter_fn=keep_head)


def to_be_float8(model: nn.Module) -> set[str]:
    """By name, of a model that is not converted: weights of linear layers, and of experts."""
    layers = {
        f"{fqn}.weight"
        for fqn, module in model.named_modules()
        if isinstance(module, nn.Linear) and fqn != "lm_head"
    }
    return layers | {name for name, param in model.named_parameters() if param.dim() == 3}
