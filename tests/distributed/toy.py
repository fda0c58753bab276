"""A small Llama-like model, and the steps that the tests take with it."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import fp8dist
from fp8dist.config import RECIPES
from fp8dist.tensors import finite, weight_state
from tests.distributed.harness import DEVICE

# Of each recipe added later too.
RECIPE_NAMES = list(RECIPES)
# Multiples of 128, as blockwise asks for. 3 ranks cut them unevenly: 43, 43, 42 and 86, 86, 84.
DIM, HIDDEN, VOCAB = 128, 256, 48
BATCH, SEQUENCE = 12, 8  # the global batch, which 1, 2, 3 and 4 ranks divide


class Block(nn.Module):
    """Attention and SwiGLU; one of its linear layers has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.wq, self.wk, self.wv = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.wo = nn.Linear(DIM, DIM)
        self.w1, self.w3 = (nn.Linear(DIM, HIDDEN, bias=False) for _ in range(2))
        self.w2 = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.attention_norm(x)
        q, k, v = (w(h).unflatten(-1, (2, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(mixed.transpose(1, 2).flatten(2))
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class Llama(nn.Module):
    """tokens (batch, sequence) -> logits (batch, sequence, VOCAB)"""

    def __init__(self, layers: int = 2, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.RMSNorm(DIM)
        self.output = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return self.output(self.norm(x))


def keep_output(module: nn.Module, fqn: str) -> bool:
    """All linear layers but the last, so that a group of high-precision weights is left too."""
    return isinstance(module, nn.Linear) and "output" not in fqn


def new_model(**options: Any) -> Llama:
    """The same weights in every process."""
    torch.manual_seed(0)
    return Llama(**options).to(DEVICE)


def convert(model: nn.Module, config: Any = "tensorwise") -> nn.Module:
    return fp8dist.convert_to_float8_training(model, config=config, module_filter_fn=keep_output)


@functools.cache
def mesh_of(*sizes: int) -> DeviceMesh:
    """(shard,) or (replicate, shard)."""
    return init_device_mesh(DEVICE, sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])


def shard(model: Llama, mesh: DeviceMesh, **options: Any) -> Llama:
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def float8_model(
    mesh: DeviceMesh, config: Any = "tensorwise", layers: int = 2, **options: Any
) -> Llama:
    """Converted and sharded."""
    model = new_model(layers=layers)
    convert(model, config)
    return shard(model, mesh, **options)


def batch_of(step: int, microbatch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, targets) of the global batch, BATCH x SEQUENCE each."""
    generator = torch.Generator().manual_seed(1000 * step + microbatch)
    tokens = torch.randint(VOCAB, (BATCH, SEQUENCE + 1), generator=generator).to(DEVICE)
    return tokens[:, :-1], tokens[:, 1:]


def local_batch(step: int, microbatch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's rows of the global batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    tokens, targets = batch_of(step, microbatch)
    return tokens.chunk(world)[rank], targets.chunk(world)[rank]


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    tokens, targets = batch
    return F.cross_entropy(model(tokens).float().flatten(0, 1), targets.flatten())


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor, on the CPU, with no subclass."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        local = getattr(tensor._local_tensor, "_tensor", tensor._local_tensor)
        plain = DTensor.from_local(
            local.to(tensor.device_mesh.device_type),
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
        tensor = plain.full_tensor()
    return tensor.cpu()


def train(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    first: int = 0,
    microbatches: int = 1,
    after_step: Callable[[], None] = lambda: None,
    clip: float | None = None,
) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    """Per step the losses on this rank, by microbatch, and the whole gradients, by name."""
    history = []
    for step in range(first, first + steps):
        losses = []
        for microbatch in range(microbatches):
            model.set_requires_gradient_sync(microbatch == microbatches - 1)
            loss = loss_of(model, local_batch(step, microbatch))
            loss.backward()
            losses.append(loss.item())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        gradients = {
            name: full(param.grad)
            for name, param in model.named_parameters()
            if param.grad is not None
        }
        history.append((losses, gradients))
        optimizer.step()
        optimizer.zero_grad()
        after_step()
    return history


def same_bits(a: Any, b: Any) -> bool:
    """Whether two results, of tensors, numbers and containers, are bitwise equal; NaN is NaN."""
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and (a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8)))
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def warnings_of_the_library() -> Iterator[list[str]]:
    """Collects what it warns of, in a process that has warned of nothing yet."""
    weight_state._warned_stale = False
    finite._reported = False
    collector, logger = _Collector(), logging.getLogger("fp8dist")
    logger.addHandler(collector)
    try:
        yield collector.messages
    finally:
        logger.removeHandler(collector)
