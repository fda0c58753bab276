"""A small model that varies as a composition's axis "model" says."""

import torch
import torch.nn as nn
import torch.nn.functional as F

# Multiples of 128, as blockwise asks for, also of the parts that tensor parallelism leaves; 3 ranks
# cut HIDDEN unevenly, and all cut DIM evenly, as FSDP2 asks for on dimension 1.
DIM, HIDDEN, VOCAB, RANK = 384, 256, 48, 16


class Block(nn.Module):
    """x -> x + w2(silu(w1(norm(x)))) + mix(x), varied as the case's model says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.RMSNorm(DIM)
        self.w1 = nn.Linear(DIM, HIDDEN, bias=kind == "biases")
        self.w2 = nn.Linear(HIDDEN, DIM, bias=kind == "biases")
        self.mix = nn.Linear(DIM, DIM, bias=kind == "biases")
        if kind == "shared":
            self.mix_again = self.mix
        if kind == "lora":
            self.lora_a = nn.Linear(DIM, RANK, bias=False)
            self.lora_b = nn.Linear(RANK, DIM, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        x = x + self.w2(F.silu(self.w1(h)))
        mixed = self.mix(h)
        if self.kind == "shared":
            mixed = self.mix_again(torch.tanh(mixed))
        if self.kind == "lora":
            mixed = mixed + self.lora_b(self.lora_a(h))
        return x + mixed


class First(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.layer = Block(kind)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.layer(self.embedding(tokens))
        return self.layer(x) if self.kind == "twice" else x


class Second(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = Block(kind)
        self.norm = nn.RMSNorm(DIM)
        self.output = nn.Linear(DIM, VOCAB, bias=False)
        self.calls_layer = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.calls_layer:
            x = self.layer(x)
        return self.output(self.norm(x))


class Model(nn.Module):
    """tokens (batch, sequence) -> logits (batch, sequence, VOCAB), in two parts of a block each."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second = First(kind), Second(kind)
        with torch.no_grad():
            self.first.embedding.weight.mul_(0.1)  # tied, it makes the logits too
        if kind == "tied":
            self.second.output.weight = self.first.embedding.weight
        if kind == "frozen":
            self.first.layer.w1.requires_grad_(False)
            self.second.layer.mix.requires_grad_(False)
        if kind == "lora":
            self.first.layer.mix.requires_grad_(False)
            self.second.layer.mix.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(tokens))
