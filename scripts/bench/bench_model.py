"""What bench_step.py and bench_tp.py train: Llama 3's layers without rotary embeddings."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

HEAD_DIM = 128


@dataclass(frozen=True)
class Shape:
    """Sizes of the decoder; heads of 128, four query heads to one of keys and values."""

    vocab: int
    dim: int
    layers: int
    ffn: int

    def __post_init__(self) -> None:
        if self.dim < HEAD_DIM or self.dim % HEAD_DIM or self.heads % self.kv_heads:
            raise ValueError(
                f"dim is {self.dim}, which does not divide into heads of {HEAD_DIM} in groups of "
                "four: use 128, 256 or a multiple of 512"
            )

    @property
    def heads(self) -> int:
        return self.dim // HEAD_DIM

    @property
    def kv_heads(self) -> int:
        return max(1, self.heads // 4)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    """Causal grouped-query attention, (batch, seq, dim) to the same."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.wq = linear(shape.dim, shape.heads * HEAD_DIM)
        self.wk = linear(shape.dim, shape.kv_heads * HEAD_DIM)
        self.wv = linear(shape.dim, shape.kv_heads * HEAD_DIM)
        self.wo = linear(shape.heads * HEAD_DIM, shape.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for project in (self.wq, self.wk, self.wv)
        )
        grouped = q.size(1) != k.size(1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.w1 = linear(shape.dim, shape.ffn)
        self.w2 = linear(shape.ffn, shape.dim)
        self.w3 = linear(shape.dim, shape.ffn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.feed_forward = FeedForward(shape)
        self.attention_norm = nn.RMSNorm(shape.dim)
        self.ffn_norm = nn.RMSNorm(shape.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Blocks(nn.Module):
    """The layers alone, (batch, seq, dim) to the same."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Decoder(nn.Module):
    """Token ids (batch, seq) to logits (batch, seq, vocab)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(shape.vocab, shape.dim)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim)
        self.output = linear(shape.dim, shape.vocab)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))
