"""Traceable collectives: gathers of tokens that ranks have cut, also a second time, and amaxes."""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch

_c10d = torch.ops._c10d_functional

# [Note: tokens by rank]
# An all-gather leaves the tokens of one rank after those of another, which is the order of a batch
# only if its first dimension (or of a batch of one the second) is cut. Asynchronous tensor
# parallelism takes an all-gather of float8 tensors of which nothing but matmuls use the result. So
# for it data and scales are kept as (tokens, ...) in the order in which they arrive, are multiplied
# so, and the output is put in order.


class Cut(NamedTuple):
    """Which dimension of tokens ranks cut, how many ranks, and their group's name."""

    dim: int
    ranks: int
    group_name: str


class Again:
    """What is gathered a second time, once for all layers whose backward will ask for it."""

    def __init__(self) -> None:
        # Those that have not asked yet. Recomputed layers make others, which go without asking.
        self.users: weakref.WeakSet[GatheredAgain] = weakref.WeakSet()
        # Of the part, as it was cast. (Edits after it was saved are noticed by autograd.)
        self.version: int | None = None
        # And how it was cut: what arrived is kept by rank for some layers, in order for others.
        self.gathered: tuple[Cut, torch.Tensor] | None = None


class GatheredAgain:
    """What a layer saves, besides this rank's part, to have all tokens in backward."""

    def __init__(self, again: Again, cut: Cut, shape: torch.Size) -> None:
        self.again, self.cut, self.shape = again, cut, shape
        again.users.add(self)

    def __call__(self, part: torch.Tensor) -> torch.Tensor:
        again = self.again
        if self not in again.users:
            # A second backward, at which ranks may differ in which recomputed layers they still
            # have, must not depend on what is left of the first.
            return gather_tokens(part, self.cut).reshape(self.shape)
        if again.gathered is None or again.gathered[0] != self.cut:
            again.gathered = (self.cut, gather_tokens(part, self.cut))
        _, gathered = again.gathered
        again.users.discard(self)
        if not again.users:
            again.gathered = None
        return gathered.reshape(self.shape)


def gather_tokens(part: torch.Tensor, cut: Cut) -> torch.Tensor:
    """All tokens, from this rank's."""
    gathered = _c10d.wait_tensor.default(
        _c10d.all_gather_into_tensor.default(part.contiguous(), cut.ranks, cut.group_name)
    )
    if cut.dim == 0:
        return gathered
    return torch.cat(torch.chunk(gathered, cut.ranks, dim=0), dim=cut.dim)


def largest(amax_bits: torch.Tensor, group_name: str) -> torch.Tensor:
    """The largest of all ranks, of amaxes as int32: see `precompute.all_reduce_amaxes`.

    `torch.distributed._functional_collectives.all_reduce` waits, when it is traced, and its result
    has to be waited for, when it is not.
    """
    return _c10d.wait_tensor.default(_c10d.all_reduce.default(amax_bits, "max", group_name))


def in_order(x: torch.Tensor, tokens: Sequence[int], cut: Cut | None) -> torch.Tensor:
    """(tokens, ...) as they arrived, in the order of the batch: (*tokens, ...).

    See [Note: tokens by rank].
    """
    if cut is None:
        raise AssertionError("tokens that did not arrive from other ranks")
    part = list(tokens)
    part[cut.dim] //= cut.ranks
    by_rank = x.reshape(cut.ranks, *part, x.size(-1))
    return by_rank.movedim(0, cut.dim).reshape(*tokens, x.size(-1))
