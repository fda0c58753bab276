"""amaxes -> one all-reduce -> scales -> payloads, on plain tensors; see [Note: made ready]."""

import math
import operator
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from fp8dist import kernels, numerics
from fp8dist.config import Block
from fp8dist.numerics import AmaxPart, CastPart, PackPart
from fp8dist.shard import Shard, Size

# [Note: made ready]
# All of this is done at every step, for every weight of a model, of which there may be thousands;
# and shards, scales and payloads stay where they are from step to step. So what follows from where
# they are (the table of a launch, which part of a buffer belongs to which weight) is found out when
# a pass is made. Running it takes as many calls for a thousand weights as for one, and for what is
# copied to each weight a list. Who keeps a pass asks whether it `is_for` these before running it
# again.


class _Pass:
    """Made ready for shards, with what is read or written for each of them; it keeps all of it."""

    def __init__(
        self,
        shards: Sequence[Shard],
        scales: Sequence[list[torch.Tensor]],
        payloads: Sequence[torch.Tensor | None],
        device: torch.device,
    ) -> None:
        self.shards, self.scales, self.payloads = list(shards), list(scales), list(payloads)
        self.device = device
        self._place = self._place_now()

    def _place_now(self) -> tuple[Any, ...]:
        """What may change while tensors are the same: the current stream, see `kernels.Prepared`,
        and where a storage lies that was freed and taken again.
        """
        if isinstance(self.shards[0].data, FakeTensor):
            return ()
        has_streams = self.device.type not in ("cpu", "meta")
        stream = torch.accelerator.current_stream(self.device) if has_streams else None
        payloads = [payload.data_ptr() for payload in self.payloads if payload is not None]
        return stream, payloads, [shard.data.data_ptr() for shard in self.shards]

    @property
    def is_small(self) -> bool:
        """Whether to keep it takes little memory: it has no buffer of scales of 32 elements."""
        return not any(shard.exchanges_words for shard in self.shards)

    def is_for(
        self,
        shards: Sequence[Shard],
        scales: Sequence[list[torch.Tensor] | None],
        payloads: Sequence[torch.Tensor | None],
        device: torch.device,
    ) -> bool:
        """Whether it is for these, the same objects, and they are where they were."""
        return (
            _are(shards, self.shards)
            and _are(scales, self.scales)
            and _are(payloads, self.payloads)
            and self.device == device
            and self._place == self._place_now()
        )


def _are(these: Sequence[Any], those: Sequence[Any]) -> bool:
    return len(these) == len(those) and all(map(operator.is_, these, those))


class ScalePass(_Pass):
    """Computes the scales of all weights, with one all-reduce.

    Args:
        scales: for each shard, to be written to: its `shard.empty_scales`.
        payloads: for each shard, to be cast in the pass that finds amaxes, as `CastPass` does, if
            it is `cast_by_rows` and no rank that takes part has a copy of it; or None.
        device: where scales are and the collective runs.

    Attributes:
        amaxes: 1-D, float32: all amaxes of the full weights, once it has run.
        ends: for each weight, where its amaxes end in `amaxes`.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        scales: Sequence[list[torch.Tensor]],
        payloads: Sequence[torch.Tensor | None],
        device: torch.device,
    ) -> None:
        super().__init__(shards, scales, payloads, device)
        counts = [sum(rows * columns for rows, columns in shard.amax_sizes) for shard in shards]
        self.ends = list(accumulate(counts))
        word_sizes = [shard.exponent_words for shard in shards]
        word_counts = [math.prod(size) for size in word_sizes]
        self._flat = torch.empty(sum(counts) + sum(word_counts), device=device)
        self.amaxes, words = self._flat.split([sum(counts), sum(word_counts)])
        all_words = words.view(torch.int32).split(word_counts)
        self._words = [
            (shard, part.view(size), mine[0].data[0])
            for shard, part, size, mine in zip(shards, all_words, word_sizes, scales, strict=True)
            if shard.exchanges_words
        ]
        regions = [
            (shard, block, size)
            for shard in shards
            for block, size in zip(shard.reduced_blocks, shard.amax_sizes, strict=True)
        ]
        self._counts = [rows * columns for _, _, (rows, columns) in regions]
        # Computed in one go: the scales of regions, one after the other, that have one format.
        self._formats = [
            (recipe, sum(rows * columns for _, _, (rows, columns) in of_recipe))
            for recipe, of_recipe in groupby(regions, lambda region: region[0].recipe)
        ]
        # Copied as they are, and flat: those of weights that are not cut.
        self._cut = [
            (i, region) for i, region in enumerate(regions) if region[0].size != region[0].whole
        ]
        # `data`: what an earlier forward saved for backward is not used any more.
        pairs = [
            target.data if shard.size != shard.whole else target.data.flatten(1)
            for shard, mine in zip(shards, scales, strict=True)
            for target in mine[: len(shard.reduced_blocks)]
        ]
        self._targets = [pair[i] for i in (0, 1) for pair in pairs]
        self._fill, self._staged = self._ready_to_fill(regions)

    def _ready_to_fill(
        self, regions: Sequence[tuple[Shard, Block, Size]]
    ) -> tuple[kernels.Prepared, list[tuple[torch.Tensor, torch.Tensor]]]:
        """What writes the shards' amaxes, and what of them is to be copied from elsewhere."""
        amaxes = [
            shard.of_part(part.view(size), block)
            for part, (shard, block, size) in zip(self._split(self.amaxes), regions, strict=True)
        ]
        parts: list[AmaxPart] = []
        staged: list[tuple[torch.Tensor, torch.Tensor]] = []
        i = 0
        for shard, payload in zip(self.shards, self.payloads, strict=True):
            blocks = shard.reduced_blocks
            mine, i = amaxes[i : i + len(blocks)], i + len(blocks)
            if shard.data.numel() == 0 or not blocks:
                continue
            targets = mine
            if shard.size != shard.whole or shard.data.device != self.device:
                # Elsewhere where kernels cannot write to it, and under CPU offload, where the shard
                # is on the CPU and the buffer is not.
                targets = [torch.empty(amax.shape, device=shard.data.device) for amax in mine]
                staged += zip(mine, targets, strict=True)
            own = [
                AmaxPart(shard.data[first : first + count], (row, shard.start[1]), blocks, targets)
                for first, row, count in shard.spans
            ]
            parts += own if payload is None else _to_be_cast(own, shard, payload)
        return kernels.prepare_fill_amaxes(parts), staged

    def _split(self, flat: torch.Tensor) -> Sequence[torch.Tensor]:
        return flat.split(self._counts) if self._counts else ()

    def run(self, groups: Sequence[dist.ProcessGroup]) -> None:
        """
        Args:
            groups: the ranks that together hold the weights; one group, or where there is none of
                all of them, the groups along each mesh dimension, at an all-reduce each.
        """
        self._flat.zero_()
        for _, filled in self._staged:
            filled.zero_()
        self._fill()
        for amax, filled in self._staged:
            amax.copy_(filled)
        for shard, words, _ in self._words:
            _fill_exponents(shard, words)
        if self._flat.numel() > 0:
            for group in groups:
                all_reduce_amaxes(self._flat, group)
        for shard, words, exponents in self._words:
            exponents.copy_(_exponents(shard, words))
        if not self._counts:
            return
        parts = self.amaxes.split([count for _, count in self._formats])
        found = [
            numerics.amax_to_scale(part, recipe.weight_dtype, recipe.scale_format)
            for part, (recipe, _) in zip(parts, self._formats, strict=True)
        ]
        scale = found[0] if len(found) == 1 else torch.cat(found)
        scales = [list(self._split(each)) for each in (scale.reciprocal(), scale)]
        for i, (shard, block, size) in self._cut:
            for each in scales:
                each[i] = shard.of_part(each[i].view(size), block)
        torch._foreach_copy_(self._targets, sum(scales, []))


def _to_be_cast(parts: list[AmaxPart], shard: Shard, payload: torch.Tensor) -> Iterator[AmaxPart]:
    """The parts of a shard, which lie in it one after the other, with where they go."""
    if not shard.cast_by_rows:
        raise AssertionError(f"rows of a shard of {shard.whole} are cut: {shard.data.shape}")
    rows = payload.view(shard.recipe.weight_dtype).split(
        [part.x.size(0) for part in parts] + [payload.size(0) - shard.data.size(0)]
    )
    for part, out in zip(parts, rows, strict=False):
        yield part._replace(out=out, scale_format=shard.recipe.scale_format)


# The order of exponent words as unsigned numbers is kept when they are compared as int32 with
# the sign bit flipped. Then the least number, which MAX passes over, stands for no scales.
_FLIP = -(2**31)


def _fill_exponents(shard: Shard, words: torch.Tensor) -> None:
    """Write a shard's e8m0 scales into its part of `exponent_words`, int32; the rest is least."""
    words.fill_(_FLIP)
    if shard.data.numel() == 0:
        return
    recipe = shard.recipe
    amaxes = numerics.amax(shard.data, recipe.weight)
    scale = numerics.amax_to_scale(amaxes, recipe.weight_dtype, recipe.scale_format)
    exponents = numerics.scale_to_exponent(scale)
    padded = F.pad(exponents, (0, words.size(2) * 4 - exponents.size(1)))
    own_words, chunk = padded.view(torch.int32) ^ _FLIP, shard.start[1] // shard.largest[1]
    of_part = shard.of_part(words, (1, shard.largest[1]))
    for first, row, count in shard.spans:
        of_part[row : row + count, chunk].copy_(own_words[first : first + count])


def _exponents(shard: Shard, words: torch.Tensor) -> torch.Tensor:
    """The e8m0 scales of what is gathered, (N, K / 32), from the weight's words of all ranks."""
    scales = shard.largest[1] // shard.recipe.weight[1]
    mine = shard.of_part(words, (1, shard.largest[1])) ^ _FLIP
    return mine.view(torch.uint8)[:, :, :scales].flatten(1)


def all_reduce_amaxes(amaxes: torch.Tensor, group: dist.ProcessGroup) -> None:
    """MAX over the ranks of `group`, in place; a group of one rank communicates nothing.

    On the int32 view: for floats >= 0 the order is the same, and a NaN, being larger than any
    number there, survives (gloo's float MAX loses it).
    """
    if group.size() > 1:
        dist.all_reduce(amaxes.view(torch.int32), op=dist.ReduceOp.MAX, group=group)


class CastPass(_Pass):
    """Casts shards into the bytes that their rank contributes to the all-gathers.

    Args:
        scales: for each shard, as `ScalePass` writes them; nothing if it is packed.
        payloads: for each shard, (padded n, `shard.payload_columns`), uint8; rows from n on are
            left as they are.

    Attributes:
        not_finite: (how many are packed,), float32, once it has run: Inf for a shard with a NaN or
            Inf, else 0.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        scales: Sequence[list[torch.Tensor]],
        payloads: Sequence[torch.Tensor],
    ) -> None:
        super().__init__(shards, scales, payloads, shards[0].data.device)
        self.not_finite = torch.empty(sum(shard.packed for shard in shards), device=self.device)
        not_finite = iter(self.not_finite.split(1))
        self._converted: list[tuple[torch.Tensor, torch.Tensor]] = []
        parts, packed = [], []
        for shard, mine, payload in zip(shards, scales, payloads, strict=True):
            rows, recipe = payload[: shard.data.size(0)], shard.recipe
            if shard.packed:
                of_shard = recipe.weight, recipe.weight_dtype, rows, next(not_finite)
                packed.append(PackPart(shard.data, *of_shard))
            elif shard.data.numel() > 0:
                scale, out = (
                    self._scale_for(shard, mine[0].data[-1]),
                    rows.view(recipe.weight_dtype),
                )
                for first, row, count in shard.spans:
                    here = slice(first, first + count)
                    start = (row, shard.start[1])
                    parts.append(CastPart(shard.data[here], start, recipe.weight, scale, out[here]))
        self._cast = kernels.prepare_cast_into(parts)
        self._pack = kernels.prepare_pack_into(packed)

    def _scale_for(self, shard: Shard, scale: torch.Tensor) -> torch.Tensor:
        """The scales, float32, on the shard's device, if need be written at each run."""
        if scale.dtype == torch.float32 and scale.device == shard.data.device:
            return scale
        converted = torch.empty(scale.shape, device=shard.data.device)
        self._converted.append((converted, scale))
        return converted

    def run(self) -> None:
        for converted, scale in self._converted:
            e8m0 = scale.dtype == torch.uint8
            converted.copy_(numerics.exponent_to_scale(scale) if e8m0 else scale)
        self.not_finite.zero_()
        self._cast()
        self._pack()
