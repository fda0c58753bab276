"""Llama 3: a decoder with rotary positions, grouped-query attention, RMSNorm and SwiGLU.

Its feed-forwards may be mixtures of experts.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from fp8dist.train.moe import MoE, MoEShape


@dataclass(frozen=True)
class ModelShape:
    """The sizes of one Llama; everything the architecture leaves open."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden_dim: int
    vocab_size: int
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5
    moe: MoEShape | None = None


FLAVORS = {
    "debugmodel": ModelShape(
        dim=256, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=768, vocab_size=256
    ),
    "8B": ModelShape(
        dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, hidden_dim=14336, vocab_size=128256
    ),
    "70B": ModelShape(
        dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, hidden_dim=28672, vocab_size=128256
    ),
    # 53248 is 1.2 times two thirds of 4 dim, up to a multiple of 4096.
    "405B": ModelShape(
        dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, hidden_dim=53248, vocab_size=128256
    ),
    "debugmoe": ModelShape(
        dim=256,
        n_layers=4,
        n_heads=4,
        n_kv_heads=2,
        hidden_dim=256,
        vocab_size=256,
        moe=MoEShape(experts=8, top_k=2, hidden_dim=256, bias_step=1e-2),
    ),
}


def model_shape(flavor: str, vocab_size: int = 0) -> ModelShape:
    """The sizes of `flavor`, with room for `vocab_size` token ids.

    "8B:4" is 8B with 4 layers. The vocabulary grows to a multiple of 16, which float8 matmuls
    need, and never shrinks.

    Raises:
        ValueError: there is no such flavor.
    """
    name, colon, layers = flavor.partition(":")
    if name not in FLAVORS or (colon and not (layers.isdecimal() and int(layers) >= 1)):
        raise ValueError(
            f"model.flavor {flavor!r} does not exist; choose one of {', '.join(FLAVORS)}, or with "
            "fewer layers, as in 8B:4"
        )
    shape = FLAVORS[name]
    return replace(
        shape,
        n_layers=int(layers) if colon else shape.n_layers,
        vocab_size=max(shape.vocab_size, -(-vocab_size // 16) * 16),
    )


class RotaryEmbedding(nn.Module):
    """Rotates pairs of features by an angle that grows with the position.

    One instance serves every layer. The table is a buffer of this module, and not an argument
    of the blocks, because FSDP casts floating-point arguments to `param_dtype`.
    """

    table: torch.Tensor  # (max_seq_len, head_dim / 2, 2): cosine and sine, float32

    def __init__(self, head_dim: int, max_seq_len: int, theta: float):
        super().__init__()
        self.head_dim, self.max_seq_len, self.theta = head_dim, max_seq_len, theta
        self.register_buffer("table", self.angles("cpu"), persistent=False)

    def angles(self, device: torch.device | str) -> torch.Tensor:
        """The table, computed in float64 and rounded once to float32."""
        pair = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device)
        position = torch.arange(self.max_seq_len, dtype=torch.float64, device=device)
        angle = torch.outer(position, self.theta ** (-pair / self.head_dim))
        return torch.stack((angle.cos(), angle.sin()), dim=-1).float()

    def reset_parameters(self, device: torch.device | None = None) -> None:
        """Recompute the table, which `to_empty` leaves undefined, on `device` or where it is."""
        self.table = self.angles(device or self.table.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate x (batch, seq, heads, head_dim); computes in float32, returns x's dtype."""
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = self.table[: x.shape[1], None].unbind(-1)
        rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        return rotated.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention; several query heads share one key and value head."""

    def __init__(self, shape: ModelShape, rope: RotaryEmbedding):
        super().__init__()
        self.head_dim = shape.dim // shape.n_heads
        self.wq = nn.Linear(shape.dim, shape.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(shape.dim, shape.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(shape.dim, shape.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(shape.n_heads * self.head_dim, shape.dim, bias=False)
        self.rope = rope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, seq, dim) -> (batch, seq, dim)."""
        # The number of heads is read off the projection, so that a sharded one works too.
        query, key, value = (
            linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.wq, self.wk, self.wv)
        )
        query, key = self.rope(query), self.rope(key)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            is_causal=True,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return self.wo(mixed.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: a linear layer gated by the SiLU of another, and back to dim."""

    def __init__(self, shape: ModelShape):
        super().__init__()
        self.w1 = nn.Linear(shape.dim, shape.hidden_dim, bias=False)
        self.w2 = nn.Linear(shape.hidden_dim, shape.dim, bias=False)
        self.w3 = nn.Linear(shape.dim, shape.hidden_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, seq, dim) -> (batch, seq, dim)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each normalized before and added to what came in."""

    def __init__(self, shape: ModelShape, rope: RotaryEmbedding):
        super().__init__()
        self.attention = Attention(shape, rope)
        self.feed_forward: nn.Module = FeedForward(shape)
        if shape.moe is not None:
            shared = FeedForward(replace(shape, hidden_dim=shape.moe.hidden_dim))
            self.feed_forward = MoE(shape.dim, shape.moe, shared)
        self.attention_norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.ffn_norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        # With activation checkpointing: called as recompute(function, x). It belongs inside
        # forward because FSDP's hooks must stay outside what is run a second time.
        self.recompute: Callable[..., torch.Tensor] | None = None

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """The block's own work; (batch, seq, dim) -> (batch, seq, dim)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`compute`, remembering its activations or computing them again in backward."""
        return self.compute(x) if self.recompute is None else self.recompute(self.compute, x)


class Llama(nn.Module):
    """A Llama 3 of the given shape for sequences of up to `max_seq_len` tokens.

    Build it on the meta device, shard it, `to_empty(device=...)` it, then `init_weights`.
    """

    def __init__(self, shape: ModelShape, max_seq_len: int):
        super().__init__()
        self.shape = shape
        rope = RotaryEmbedding(shape.dim // shape.n_heads, max_seq_len, shape.rope_theta)
        self.tok_embeddings = nn.Embedding(shape.vocab_size, shape.dim)
        self.layers = nn.ModuleList(TransformerBlock(shape, rope) for _ in range(shape.n_layers))
        self.norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.output = nn.Linear(shape.dim, shape.vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (batch, seq) -> logits (batch, seq, vocab_size)."""
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))

    @torch.no_grad()
    def init_weights(self, seed: int, device: torch.device | None = None) -> None:
        """Fill every parameter and buffer; the values do not depend on how it is sharded.

        They are drawn on `device`, where buffers then are too; shards stay where they are.
        (None: all of it where the shards are.)

        Each parameter has a random generator of its own, seeded by `seed` and the parameter's
        name. Every rank draws the whole parameter, one at a time, and keeps its shard: that
        costs the memory of the largest parameter for a moment, and no communication.
        """
        for module in self.modules():
            if isinstance(module, RotaryEmbedding):
                module.reset_parameters(device)
            if isinstance(module, MoE):
                module.reset_buffers(device)
        for name, param in self.named_parameters():
            place = device or param.device
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator(place).manual_seed(int.from_bytes(digest[:7], "little"))
            full = torch.empty(param.shape, dtype=torch.float32, device=place)
            self._draw(name, full, generator)
            if isinstance(param, DTensor):
                param.to_local().copy_(_part(full, param))
            else:
                param.copy_(full)

    def _draw(self, name: str, full: torch.Tensor, generator: torch.Generator) -> None:
        """Fill `full` with the initial values of the parameter called `name`."""
        if full.dim() == 1:
            full.fill_(1.0)
            return
        std = 0.02
        if name.endswith(("wo.weight", "w2.weight", "experts.w2")):
            # What each of the 2 n_layers branches adds to the residual stream.
            std /= (2 * self.shape.n_layers) ** 0.5
        elif name == "output.weight":
            std = self.shape.dim**-0.5
        elif name == "tok_embeddings.weight":
            std = 1.0
        nn.init.trunc_normal_(full, std=std, a=-3 * std, b=3 * std, generator=generator)


def _part(full: torch.Tensor, param: DTensor) -> torch.Tensor:
    """What this rank holds of `full` where it is placed as `param` is; nothing is sent."""
    mesh = param.device_mesh
    # From the last dimension of the mesh: FSDP, the first, cuts what tensor parallelism has left.
    for mesh_dim, placement in reversed(list(enumerate(param.placements))):
        dim = getattr(placement, "dim", None)
        if dim is not None:
            parts = full.chunk(mesh.size(mesh_dim), dim)
            rank = mesh.get_local_rank(mesh_dim)
            full = parts[rank] if rank < len(parts) else full.narrow(dim, 0, 0)
    return full
