"""On a GPU: the kernels that write into a part of a buffer write that part and nothing else."""

import itertools

import pytest
import torch

from fp8dist import kernels, numerics
from fp8dist.numerics import AmaxPart, CastPart, PackPart
from tests.unit.kernels.contents import CONTENTS, SHAPES, assert_same_bytes, make
from tests.unit.kernels.launched import launched

pytest.importorskip("triton", reason="needs Triton")
if not torch.backends.cuda.is_built():
    pytest.skip("needs torch built for GPUs", allow_module_level=True)

from fp8dist.kernels import weight_launch  # noqa: E402  # where there is Triton

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cast_into(dtype, content):
    """Parts of matrices of many sizes at once."""
    for block in [(-1, -1), (1, -1), (1, 128), (128, 128), (1, 32)]:
        parts: dict[str, list[CastPart]] = {"got": [], "want": []}
        payloads: dict[str, list[torch.Tensor]] = {"got": [], "want": []}
        for shape in SHAPES:
            whole = make(shape, content, dtype)
            if whole.size(0) % max(block[0], 1):
                continue
            amax = numerics.amax(whole, block)
            scale = numerics.amax_to_scale(amax, torch.float8_e4m3fn, "exact")
            third = shape[0] // 3
            for start, end in [(0, third), (third, shape[0])]:
                if start == end:
                    continue
                # Poisoned, and with more rows than are to be written.
                payload = torch.full((end - start + 3, shape[1]), 0x55, dtype=torch.uint8).cuda()
                for kind in parts:
                    mine = payload.clone()
                    out = mine[: end - start].view(torch.float8_e4m3fn)
                    part = CastPart(whole[start:end], (start, 0), block, scale, out)
                    parts[kind].append(part)
                    payloads[kind].append(mine)
        kernels.prepare_cast_into(parts["got"])()
        numerics.cast_into(parts["want"])
        for got, want in zip(payloads["got"], payloads["want"], strict=True):
            assert_same_bytes(got.view(torch.float8_e4m3fn), want.view(torch.float8_e4m3fn))


@pytest.mark.parametrize("block", [(-1, -1), (1, -1), (128, 128)], ids=str)
@pytest.mark.parametrize("start, end", [(0, 256), (128, 384), (200, 300), (256, 384)])
def test_cast_into_of_some_columns(block, start, end):
    """What a weight sharded over dim 1 gives, aligned with the blocks or not."""
    whole = make((256, 384), "wide", torch.float32)
    scale = numerics.amax_to_scale(numerics.amax(whole, block), torch.float8_e4m3fn, "exact")
    got, want = (torch.zeros(256, end - start).cuda().to(torch.float8_e4m3fn) for _ in range(2))
    part = CastPart(whole[:, start:end].contiguous(), (0, start), block, scale, got)
    kernels.prepare_cast_into([part])()
    numerics.cast_into([part._replace(out=want)])
    assert_same_bytes(got, want)
    assert want.float().abs().max() > 0


@pytest.mark.parametrize("enough", [1, 20, 10**6])
@pytest.mark.parametrize("cuts", [(50, 51), (16,), (64,), (128,)], ids=str)
@pytest.mark.parametrize("content", CONTENTS)
def test_fill_amaxes(content, cuts, enough, monkeypatch):
    """Shards of matrices, also ones that share a block, fill what the whole would; all at once,
    with programs of all heights, whose rows are in one block, or not."""
    monkeypatch.setattr(weight_launch, "ENOUGH_PROGRAMS", enough)
    weight_launch._table.cache_clear()
    all_blocks = [(-1, -1), (1, -1), (-1, 1), (128, 128)]
    for dtype, blocks in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16),
        (all_blocks, all_blocks[:1], all_blocks[:2], all_blocks[:3], all_blocks[3:]),
    ):
        parts, all_amaxes, expected = [], [], []
        for shape in [(640, 384), (128, 1280), (256, 128)]:
            whole = make(shape, content, torch.float32).to(dtype)
            expected += [numerics.amax(whole, block).float() for block in blocks]
            amaxes = [torch.zeros_like(amax) for amax in expected[-len(blocks) :]]
            all_amaxes += amaxes
            for start, end in itertools.pairwise((0, *(x for x in cuts if x < shape[0]), shape[0])):
                parts.append(AmaxPart(whole[start:end], (start, 0), blocks, amaxes))
        kernels.prepare_fill_amaxes(parts)()
        for got, want in zip(all_amaxes, expected, strict=True):
            assert_same_bytes(got, want)
    weight_launch._table.cache_clear()


@pytest.mark.parametrize("bn, height, programs", [(512, 8, 256), (128, 16, 512), (16, 64, 1008)])
def test_programs_are_as_tall_as_leaves_enough_of_them(bn, height, programs):
    entries = ((1024, 1000, 1000, 0, 5, 6),)
    stream = torch.cuda.current_stream()
    table, matrices, found = weight_launch._table(entries, (64, 16, 8), bn, stream, 512)
    assert (found, matrices.tolist()) == (height, [0] * programs)
    assert table.tolist() == [[1024, 1000, 1000, 0, 0, 5, 6]]


def test_fill_amaxes_keeps_larger_ones():
    x = make((128, 128), "normal", torch.float32)
    blocks = [(-1, -1), (1, -1)]
    amaxes = [torch.full((1, 1), 1e6).cuda(), torch.zeros(128, 1).cuda()]
    kernels.prepare_fill_amaxes([AmaxPart(x, (0, 0), blocks, amaxes)])()
    assert amaxes[0].item() == 1e6
    assert_same_bytes(amaxes[1], x.abs().amax(1, keepdim=True))


def test_what_is_ready_does_the_same_again_with_what_is_there_then():
    """Each kernel, on tensors that were written to since it was made ready."""
    x = make((256, 256), "wide", torch.float32)
    amaxes, scale = torch.zeros(256, 1).cuda(), torch.ones(1, 1).cuda()
    rows, data = (torch.empty(256, 256).cuda().to(torch.float8_e4m3fn) for _ in range(2))
    packed, not_finite = torch.empty(256, 264, dtype=torch.uint8).cuda(), torch.zeros(1).cuda()
    of_rows = AmaxPart(x, (0, 0), [(1, -1)], [amaxes], rows, "power_of_2")
    columns = AmaxPart(x, (0, 0), [(-1, 1)], [torch.zeros(1, 256).cuda()])
    cast = CastPart(x, (0, 0), (-1, -1), scale, data)
    pack = PackPart(x, (1, 32), torch.float8_e4m3fn, packed, not_finite)
    ready = [
        kernels.prepare_fill_amaxes([of_rows, columns]),
        kernels.prepare_cast_into([cast]),
        kernels.prepare_pack_into([pack]),
    ]
    for content, factor in (("wide", 1.0), ("normal", 0.5), ("nan", 2.0)):
        x.copy_(make((256, 256), content, torch.float32))
        scale.fill_(factor)
        written = [amaxes, *columns.amaxes, not_finite, rows, data, packed]
        for each in written[:3]:
            each.zero_()
        with launched() as names:
            for call in ready:
                call()
        assert names == ["fill_amaxes_kernel", "cast_rows_kernel", "cast_kernel", "pack_kernel"]
        got = [each.clone() for each in written]
        for each in written[:3]:
            each.zero_()
        numerics.fill_amaxes([of_rows, columns])
        numerics.cast_into([cast])
        numerics.pack_into([pack])
        for a, b in zip(got, written, strict=True):
            assert_same_bytes(a, b)
