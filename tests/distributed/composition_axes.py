"""What can be combined with a float8 gather."""

import torch

from tests.distributed.pairwise import Axes, Pair, Value, pair
from tests.distributed.toy import RECIPE_NAMES

# On each axis the cheap values first; they are taken where it does not matter.
AXES: Axes = {
    "mesh": ["fsdp 2", "fsdp 1", "fsdp 3", "fsdp 4", "hsdp 2x2", "hsdp 2x1", "fsdp x tp 2x2"],
    "recipe": RECIPE_NAMES,
    "model": ["plain", "biases", "frozen", "lora", "tied", "shared", "twice", "not called"],
    "dtype": ["float32", "bfloat16", "bfloat16 of float32 shards"],
    "optimizer": ["foreach", "fused", "for-loop", "SGD", "8 bits", "compiled"],
    "checkpointing": [
        "none",
        "full in FSDP",
        "full around FSDP",
        "selective in FSDP",
        "selective around FSDP",
    ],
    "reshard": ["after forward", "after backward"],
    "prefetch": ["implicit", "explicit"],
    "unshard": ["implicit", "async_op"],
    "accumulation": ["none", "with sync", "without sync"],
    "clipping": ["none", "by norm"],
    "offload": ["none", "pageable", "pinned"],
    "shard_dim": ["0", "1"],
    "init": ["values", "meta"],
    "parts": ["one", "two"],
    "evaluation": ["none", "no_grad", "inference_mode"],
    "compile": ["no", "a block"],
    "precompute": ["hook", "call", "never"],
}

# Values that this machine does not have.
UNAVAILABLE: dict[Value, str] = {}
if not torch.cuda.is_available():
    UNAVAILABLE["offload", "pinned"] = "memory is pinned for an accelerator"

# Pairs that cannot be had, with or without float8.
EXCLUDED: dict[Pair, str] = {
    pair(("model", "tied"), ("parts", "two")): "FSDP2: two roots cannot share a parameter",
    pair(("optimizer", "8 bits"), ("dtype", "bfloat16")): (
        "torchao: its 8-bit AdamW, not compiled, takes no DTensor of bfloat16"
    ),
}
