"""Float8 weights for inference engines: safetensors, in the layout of compressed-tensors."""

import ctypes
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fp8dist import kernels, numerics
from fp8dist.config import ROW, TENSOR, Block, Recipe
from fp8dist.linear import Float8Linear
from fp8dist.tensors.sharded_weight import weights_of

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"

# Parts of names that wrappers of activation checkpointing and of the compiler put in, and that
# state dicts of torch leave out.
_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")


def export_float8(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model for inference: what its float8 layers multiply with, and the rest as it is.

    `path` gets `model.safetensors`, with the names of the model's state dict, and `config.json`.
    A float8 weight is its bytes, `weight` (N, K), as they are gathered in training, and
    `weight_scale`, what to multiply them with: float32, (1,) for tensorwise, (N, 1) for rowwise,
    (N / 128, K / 128) for blockwise; for mxfp8 e8m0 exponents, uint8, (N, K / 32). Of a
    `config.json` that is there already, `quantization_config` is replaced and the rest kept.
    Weights of experts are written in high precision: the layout has none of three dimensions.

    All ranks call it; rank 0 gets the whole model in host memory, and writes it. Files that are
    there stay as they are until the new ones are complete.

    Args:
        model: converted, sharded or not.
        path: a folder; made if it is missing.

    Raises:
        ValueError: on all ranks: the model has no float8 linear layer, or one whose weight is not
            in its state dict, or something there that is no plain tensor; rank 0 cannot write, or
            `config.json` is not that of a model.
    """
    # Imported here, as it takes a while and training has no use for it.
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if isinstance(model, DistributedDataParallel):  # names in a state dict are without it
        model = model.module
    layers = _float8_layers(model)
    if not layers:
        raise ValueError(
            "export_float8: the model has no float8 linear layer: call it on one that "
            "convert_to_float8_training has converted"
        )
    folder = Path(path)
    config = _on_rank_0(lambda: _read_config(folder))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state_dict = get_model_state_dict(
        model, options=options
    )  # on rank 0 alone, if there are others
    tensors = cast(dict[str, torch.Tensor], state_dict)
    quantization = _quantization_config(model, layers)

    def write() -> None:
        if config is None:
            raise AssertionError("rank 0 has not read its config")
        _write(folder / WEIGHTS_FILE, lambda file: _save(_quantized(tensors, layers), file))
        text = json.dumps({**config, "quantization_config": quantization}, indent=2) + "\n"
        _write(folder / CONFIG_FILE, lambda file: file.write(text.encode()))

    _on_rank_0(write)


def _float8_layers(model: nn.Module) -> dict[str, Float8Linear]:
    """By the name in a state dict; a layer with two names under both."""
    return {
        _plain_name(fqn): module
        for fqn, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Float8Linear)
    }


def _plain_name(fqn: str) -> str:
    return ".".join(part for part in fqn.split(".") if part not in _WRAPPERS)


def _on_rank_0(work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0, and None elsewhere; what it raises there, on all ranks."""
    result, error = None, None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = work()
        except Exception as caught:  # the others wait to hear of it, whatever it is
            error = f"export_float8: {type(caught).__name__}: {caught}"
    if dist.is_initialized():
        errors = [error]
        dist.broadcast_object_list(errors, src=0)
        (error,) = errors
    if error is not None:
        raise ValueError(error)
    return result


def _read_config(folder: Path) -> dict[str, Any]:
    """What `config.json` holds already. Makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / CONFIG_FILE
    if not file.exists():
        return {}
    config = json.loads(file.read_text())  # what it raises is a ValueError
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}: it should be a model's config")
    return config


def _quantized(
    state_dict: Mapping[str, torch.Tensor], layers: Mapping[str, Float8Linear]
) -> dict[str, torch.Tensor]:
    if missing := [fqn for fqn in layers if f"{fqn}.weight" not in state_dict]:
        raise ValueError(
            f"the state dict has no weight of {', '.join(missing)}: export the model without what "
            "wraps it"
        )
    tensors = {}
    for name, value in state_dict.items():
        fqn, _, parameter = name.rpartition(".")
        layer = layers.get(fqn) if parameter == "weight" else None
        if layer is None:
            tensors[name] = value
        else:
            tensors[name], tensors[f"{name}_scale"] = _bytes_and_scale(value, layer)
    return tensors


def _bytes_and_scale(
    weight: torch.Tensor, layer: Float8Linear
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast where the layer computes, which is many times faster than on the host."""
    recipe = layer.config.recipe
    parameter = layer.weight
    device = (
        parameter.device_mesh.device_type if isinstance(parameter, DTensor) else parameter.device
    )
    scaled, _ = kernels.quantize_both(
        weight.to(device), recipe.weight, None, recipe.weight_dtype, recipe.scale_format
    )
    scaled = numerics.wanted(scaled)
    if recipe.scale_format == "e8m0":
        scale = numerics.scale_to_exponent(scaled.scale)
    else:
        scale = scaled.scale.reciprocal()
    return scaled.data.cpu(), (scale.flatten() if recipe.weight == TENSOR else scale).cpu()


# --- config.json: https://github.com/vllm-project/compressed-tensors, `QuantizationConfig`

_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
_WEIGHTS: dict[Block, dict[str, Any]] = {
    TENSOR: {"strategy": "tensor"},
    ROW: {"strategy": "channel"},
    (128, 128): {"strategy": "block", "block_structure": [128, 128]},
    (1, 32): {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
}
_INPUTS: dict[Block, dict[str, Any]] = {
    TENSOR: {"strategy": "tensor"},
    ROW: {"strategy": "token"},
    (1, 128): {"strategy": "group", "group_size": 128},
    (1, 32): {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
}


def _format(recipe: Recipe) -> str:
    return "mxfp8-quantized" if recipe.scale_format == "e8m0" else "float-quantized"


def _group(recipe: Recipe, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "format": _format(recipe),
        "weights": {**_FLOAT8, **_WEIGHTS[recipe.weight], "dynamic": False},
        "input_activations": {**_FLOAT8, **_INPUTS[recipe.input], "dynamic": True},
        "output_activations": None,
    }


def _quantization_config(model: nn.Module, layers: Mapping[str, Float8Linear]) -> dict[str, Any]:
    # Recipes that differ in backward only are one here.
    recipes = {
        (layer.config.recipe.weight, layer.config.recipe.input): layer.config.recipe
        for layer in layers.values()
    }
    groups = {}
    for i, (blocks, recipe) in enumerate(recipes.items()):
        names = [
            fqn
            for fqn, layer in layers.items()
            if (layer.config.recipe.weight, layer.config.recipe.input) == blocks
        ]
        groups[f"group_{i}"] = _group(recipe, ["Linear"] if len(recipes) == 1 else names)
    formats = {_format(recipe) for recipe in recipes.values()}
    others = [
        _plain_name(fqn)
        for fqn, module in model.named_modules()
        if not isinstance(module, Float8Linear)
        and (isinstance(module, nn.Linear) or next(weights_of(module), None) is not None)
    ]
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": others,
        "kv_cache_scheme": None,
    }


# --- safetensors: https://github.com/huggingface/safetensors, "Format"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def _save(tensors: Mapping[str, torch.Tensor], file: BinaryIO) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or is_traceable_wrapper_subclass(tensor):
            kind = type(tensor).__name__
            raise ValueError(f"{name} is a {kind}, which safetensors does not have")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}, which safetensors does not have")
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # what follows is aligned then
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        data = tensor.contiguous()
        nbytes = data.numel() * data.dtype.itemsize
        if nbytes:
            file.write((ctypes.c_char * nbytes).from_address(data.data_ptr()))


def _write(file: Path, save: Callable[[BinaryIO], Any]) -> None:
    """Under another name first: a file with this one is complete."""
    unfinished = file.with_name(file.name + ".tmp")
    try:
        with open(unfinished, "wb") as opened:
            save(opened)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
