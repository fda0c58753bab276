"""amaxes -> one all-reduce -> scales -> payloads, on plain tensors; see [Note: made ready]."""

import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from fp8dist import kernels, numerics
from fp8dist.buffer import Buffer
from fp8dist.config import Block, ScaleFormat
from fp8dist.numerics import AmaxPart, CastPart, PackPart
from fp8dist.shard import Shard, Size, scales_size

# [Note: made ready]
# All of this is done at every step, for every weight of a model, of which there may be thousands;
# and shards, scales and payloads stay where they are from step to step. So what follows from where
# they are (the table of a launch, the views of a buffer) is found out once, when a pass is made.
# Running it takes as many calls for a thousand weights as for one; only exponents that are
# exchanged as words take some for each weight. A kept pass is run again while it `is_for` what it
# was made for, which is, with noting what was seen of edits, what is left to do for each weight.
#
# Its buffers are as large as the scales of all weights, and nobody needs them between steps: their
# memory is given back after a run and taken again before the next, as FSDP2 does with what it
# gathers. Views of a storage stay what they are. Kernels find amaxes, and scales, from where those
# of the first weight are, so that what is in such a buffer is there for all weights of a launch.


class _Pass:
    """Made ready for shards, with what is read or written for each of them; it keeps all of it.

    Args:
        scales: for each shard, its `shard.empty_scales`.
        payloads: for each shard, (padded n, `shard.payload_columns`), uint8, or None.
        device: where the pass has its buffers.
    """

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
        self._make_ready()

    def _make_ready(self) -> None:
        """What is done once, when the pass is made."""
        raise NotImplementedError  # no `_Pass` is made, but those below, which each have their own

    def _place_now(self) -> tuple[Any, ...]:
        """What may change while tensors are the same: the current stream, see `kernels.Prepared`,
        and where their elements lie, in storages that were freed and taken again, or viewed anew.
        """
        if isinstance(self.shards[0].data, FakeTensor):
            return ()
        accelerator = torch.accelerator.current_accelerator()
        stream = None
        if accelerator is not None and accelerator.type == self.device.type:
            stream = torch.accelerator.current_stream(self.device)
        payloads = [payload.data_ptr() for payload in self.payloads if payload is not None]
        data = [(shard.data.data_ptr(), shard.data.stride()) for shard in self.shards]
        return stream, payloads, data

    def is_for(
        self,
        shards: Sequence[Shard],
        scales: Sequence[list[torch.Tensor] | None],
        payloads: Sequence[torch.Tensor | None],
        device: torch.device,
    ) -> bool:
        """Whether it was made for these, the same objects, shards and payloads where they were."""
        return (
            _are(shards, self.shards)
            and _are(scales, self.scales)
            and _are(payloads, self.payloads)
            and self.device == device
            and self._place == self._place_now()
        )


def _are(these: Sequence[Any], those: Sequence[Any]) -> bool:
    return len(these) == len(those) and all(map(operator.is_, these, those))


class _Region(NamedTuple):
    """The blocks of one kind of a weight, of `reduced_blocks`."""

    shard: Shard
    block: Block

    @property
    def size(self) -> Size:
        return scales_size(self.shard.whole, self.block)

    @property
    def part_size(self) -> Size:
        """Of those that what is gathered has."""
        return scales_size(self.shard.size, self.block)

    @property
    def is_cut(self) -> bool:
        return self.shard.size != self.shard.whole

    def part(self, flat: torch.Tensor) -> torch.Tensor:
        """What belongs to what is gathered, a view, of 1-D with an element per block."""
        return self.shard.of_part(flat.view(self.size), self.block)


class ScalePass(_Pass):
    """Computes the scales of all weights, with one all-reduce.

    Scales are on its device, where the collective runs. Payloads are those that are cast in the
    pass that finds amaxes, as `CastPass` does: of a shard that is `cast_by_rows`, of which no rank
    that takes part has a copy.

    Attributes:
        ends: for each weight, where its amaxes end in what `run` returns.
    """

    def _make_ready(self) -> None:
        shards, scales, device = self.shards, self.scales, self.device
        self.ends = list(accumulate(sum(map(math.prod, shard.amax_sizes)) for shard in shards))
        regions = [_Region(shard, block) for shard in shards for block in shard.reduced_blocks]
        counts = [math.prod(region.size) for region in regions]
        word_counts = [math.prod(shard.exponent_words) for shard in shards]
        total = sum(counts)
        buffer = Buffer([total, sum(word_counts), total, total], device)
        self._buffers = [buffer, *self._ready_to_fill(regions, buffer, counts)]
        self._amaxes, words, inverses, found = buffer.parts
        self._found = inverses, found
        with buffer:  # without memory there are no views
            self._reduced = buffer.whole[: total + sum(word_counts)]
            self._words = words.view(torch.int32)
            self._words_of = [
                (shard, part.view(shard.exponent_words), mine[0].data[0])
                for shard, part, mine in zip(
                    shards, self._words.split(word_counts), scales, strict=True
                )
                if shard.exchanges_words
            ]
            # Of weights that are cut, the scales of a part; all others are copied flat.
            self._sources = [
                region.part(flat) if region.is_cut else flat
                for each in self._found
                for region, flat in zip(regions, each.split(counts), strict=True)
            ]
        blocks = zip(shards, scales, strict=True)
        mine = [each for shard, of in blocks for each in of[: len(shard.reduced_blocks)]]
        self._targets = [
            # `data`: what an earlier forward saved for backward is not used any more.
            target.data[i] if region.is_cut else target.data[i].flatten()
            for i in (0, 1)
            for region, target in zip(regions, mine, strict=True)
        ]
        self._formats = _by_format(regions, counts, device)

    def _ready_to_fill(
        self, regions: Sequence[_Region], buffer: Buffer, counts: list[int]
    ) -> list[Buffer]:
        """What writes the shards' amaxes, and what they are in before that, if not in `buffer`."""
        others: dict[torch.device, Buffer] = {}
        if any(region.is_cut or region.shard.data.device != self.device for region in regions):
            # A kernel writes whole rows of amaxes, where the shard is: under CPU offload that is
            # not where they are reduced. What a device has is in one storage for all, see
            # [Note: made ready].
            for device in {region.shard.data.device for region in regions}:
                sizes = [math.prod(r.part_size) for r in regions if r.shard.data.device == device]
                others[device] = Buffer(sizes, device)
        with ExitStack() as stack:
            for each in (buffer, *others.values()):
                stack.enter_context(each)
            amaxes = [
                r.part(x) for r, x in zip(regions, buffer.parts[0].split(counts), strict=True)
            ]
            filled = amaxes
            if others:
                left = {device: iter(other.parts) for device, other in others.items()}
                filled = [next(left[r.shard.data.device]).view(r.part_size) for r in regions]
            self._copies = (amaxes, filled) if others else ([], [])
            parts: list[AmaxPart] = []
            of_weights = iter(filled)
            for shard, payload in zip(self.shards, self.payloads, strict=True):
                blocks = shard.reduced_blocks
                mine = [next(of_weights) for _ in blocks]
                if shard.data.numel() == 0 or not blocks:
                    continue
                own = [
                    AmaxPart(shard.data[first : first + count], (row, shard.start[1]), blocks, mine)
                    for first, row, count in shard.spans
                ]
                parts += own if payload is None else _to_be_cast(own, shard, payload)
            self._fill = kernels.prepare_fill_amaxes(parts)
        return list(others.values())

    def run(self, groups: Sequence[dist.ProcessGroup]) -> torch.Tensor:
        """
        Args:
            groups: the ranks that together hold the weights; one group, or where there is none of
                all of them, the groups along each mesh dimension, at an all-reduce each.

        Returns:
            1-D, float32: all amaxes of the full weights.
        """
        with ExitStack() as stack:
            for buffer in self._buffers:
                stack.enter_context(buffer)
            for written in (self._reduced, *(buffer.whole for buffer in self._buffers[1:])):
                written.zero_()
            self._words.fill_(_FLIP)
            self._fill()
            if self._copies[0]:
                torch._foreach_copy_(*self._copies)
            for shard, words, _ in self._words_of:
                _fill_exponents(shard, words)
            if self._reduced.numel() > 0:
                for group in groups:
                    all_reduce_amaxes(self._reduced, group)
            for shard, words, exponents in self._words_of:
                exponents.copy_(_exponents(shard, words))
            if self._targets:
                inverses, found = self._found
                for dtype, scale_format, mask in self._formats:
                    scale = numerics.amax_to_scale(self._amaxes, dtype, scale_format)
                    found.copy_(scale if mask is None else torch.where(mask, scale, found))
                torch.reciprocal(found, out=inverses)
                torch._foreach_copy_(self._targets, self._sources)
            return self._amaxes.clone()


def _by_format(
    regions: Sequence[_Region], counts: Sequence[int], device: torch.device
) -> list[tuple[torch.dtype, ScaleFormat, torch.Tensor | None]]:
    """The ways from amaxes to scales, and for which of all amaxes each is: 1-D, bool; of the first
    None, as it is for those for which no other is.
    """
    recipes = [region.shard.recipe for region in regions]
    formats = list(dict.fromkeys((r.weight_dtype, r.scale_format) for r in recipes))
    if len(formats) < 2:
        return [(*each, None) for each in formats]
    which = torch.cat(
        [
            torch.full((count,), formats.index((r.weight_dtype, r.scale_format)), device=device)
            for r, count in zip(recipes, counts, strict=True)
        ]
    )
    return [(*each, which == i if i > 0 else None) for i, each in enumerate(formats)]


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
    """Write a shard's e8m0 scales into its part of `exponent_words`, int32, all of them least."""
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
    """Casts shards, which are on its device, into the bytes that their rank contributes to the
    all-gathers. Rows of a payload after those of its shard are left as they are.

    Attributes:
        not_finite: if any is packed, (how many shards,), float32, once it has run: Inf for a packed
            one with a NaN or Inf, else 0; otherwise empty.
    """

    def _make_ready(self) -> None:
        count = len(self.shards) if any(shard.packed for shard in self.shards) else 0
        self.not_finite = torch.empty(count, dtype=torch.float32, device=self.device)
        of_shards = list(zip(self.shards, self.scales, self.payloads, strict=True))
        # Exponents, and scales on another device, are converted at each run.
        given = {
            i: scales[0]
            for i, (shard, scales, _) in enumerate(of_shards)
            if not shard.packed
            and (scales[0].dtype == torch.uint8 or scales[0].device != self.device)
        }
        self._buffer = Buffer([scales[-1].numel() for scales in given.values()], self.device)
        parts, packed = [], []
        with self._buffer:
            pairs = zip(given.items(), self._buffer.parts, strict=True)
            converted = {i: part.view(scales[-1].shape) for (i, scales), part in pairs}
            self._converted = [(converted[i], scales) for i, scales in given.items()]
            for i, (shard, scales, payload) in enumerate(of_shards):
                if payload is None:
                    raise AssertionError(f"a shard of {shard.whole} is cast to nowhere")
                if shard.data.numel() == 0:
                    continue
                rows, recipe = payload[: shard.data.size(0)], shard.recipe
                if shard.packed:
                    where = rows, self.not_finite[i : i + 1]
                    packed.append(PackPart(shard.data, recipe.weight, recipe.weight_dtype, *where))
                    continue
                scale = converted[i] if i in converted else scales[0][-1]
                out = rows.view(recipe.weight_dtype)
                for first, row, rows_count in shard.spans:
                    here = slice(first, first + rows_count)
                    start = (row, shard.start[1])
                    parts.append(CastPart(shard.data[here], start, recipe.weight, scale, out[here]))
            self._cast = kernels.prepare_cast_into(parts)
            self._pack = kernels.prepare_pack_into(packed)
        # Of one block, and so of one launch, all scales stay where they are or none does.
        kinds = {(s.recipe.weight, i in given) for i, s in enumerate(self.shards) if not s.packed}
        if len(kinds) > len({block for block, _ in kinds}):
            raise AssertionError(f"of blocks {kinds}, of one launch, some scales are converted")

    def run(self) -> None:
        with self._buffer:
            for converted, scales in self._converted:
                e8m0 = scales.dtype == torch.uint8
                converted.copy_(numerics.exponent_to_scale(scales[-1]) if e8m0 else scales[-1])
            self.not_finite.zero_()
            self._cast()
            self._pack()
