"""A small model, its linear layers by name, and which of them are float8."""

from typing import Any

import torch
import torch.nn as nn

from fp8dist import Float8Linear

WIDTH = 32


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(WIDTH, WIDTH, bias=False)
        self.wo = nn.Linear(WIDTH, WIDTH)


class Model(nn.Module):
    def __init__(self, vocabulary: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.layers = nn.ModuleList(nn.ModuleDict({"attention": Attention()}) for _ in range(3))
        self.output = nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            attention = layer["attention"]
            x = x + attention.wo(attention.wq(x))
        return self.output(x)


TOKENS = torch.arange(24).view(2, 12)


def model(**kwargs: Any) -> Model:
    torch.manual_seed(0)
    return Model(**kwargs)


def converted(module: nn.Module) -> list[str]:
    return [fqn for fqn, m in module.named_modules() if isinstance(m, Float8Linear)]


def everything(module: nn.Module, fqn: str) -> bool:
    return True


ALL = [
    "layers.0.attention.wq",
    "layers.0.attention.wo",
    "layers.1.attention.wq",
    "layers.1.attention.wo",
    "layers.2.attention.wq",
    "layers.2.attention.wo",
    "output",
]
