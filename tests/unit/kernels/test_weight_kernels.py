"""On a GPU: amaxes and casts in one pass, by scales of rows or of blocks of them."""

import pytest
import torch

from fp8dist import kernels, numerics
from fp8dist.config import COLUMN, ROW, TENSOR
from fp8dist.numerics import AmaxPart, PackPart
from fp8dist.shard import scales_size
from tests.unit.kernels.contents import CONTENTS, assert_same_bytes, make
from tests.unit.kernels.launched import launched

pytest.importorskip("triton", reason="needs Triton")
if not torch.backends.cuda.is_built():
    pytest.skip("needs torch built for GPUs", allow_module_level=True)

from fp8dist.kernels import weight_launch  # noqa: E402  # where there is Triton

pytestmark = pytest.mark.gpu


E4M3 = torch.float8_e4m3fn
ROW_BLOCKS = [[ROW], [ROW, COLUMN], [ROW, TENSOR], [COLUMN, TENSOR, ROW]]


@pytest.mark.parametrize("multiprocessors", [1, 128])
@pytest.mark.parametrize("scale_format", ["power_of_2", "exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("content", CONTENTS)
def test_amaxes_and_a_cast_by_rows(content, dtype, scale_format, multiprocessors, monkeypatch):
    """Shards of matrices, all at once, with programs of many rows and of few; the last, in one, is
    too wide for the kernel.
    """
    monkeypatch.setattr(weight_launch, "_MULTIPROCESSORS", multiprocessors)
    widest = kernels.WIDEST_ROWS
    shapes = [
        (640, 384),
        (51, 50),
        (1, 32),
        (300, 1280),
        (70, 8200),
        (33, widest),
        (5, widest + 16),
    ]
    for blocks in ROW_BLOCKS:
        parts: dict[str, list[AmaxPart]] = {"got": [], "want": []}
        written: dict[str, list[torch.Tensor]] = {"got": [], "want": []}
        for shape in shapes:
            whole = make(shape, content, dtype)
            payload = torch.full((shape[0] + 3, shape[1]), 0x55, dtype=torch.uint8).cuda()
            for kind in parts:
                amaxes = [torch.zeros(scales_size(shape, block), device="cuda") for block in blocks]
                mine = payload.clone()
                written[kind] += [*amaxes, mine.view(torch.float8_e4m3fn)]
                third = shape[0] // 3 if shape[1] <= widest else 0
                for start, end in [(0, third), (third, shape[0])]:
                    if start < end:
                        out = written[kind][-1][start:end]
                        place = whole[start:end], (start, 0)
                        parts[kind].append(AmaxPart(*place, blocks, amaxes, out, scale_format))
        kernels.prepare_fill_amaxes(parts["got"])()
        numerics.fill_amaxes(parts["want"])  # the last part's columns are left, not the largest
        for i, shape in enumerate(shapes):
            first = i * (len(blocks) + 1)
            for block, amax in zip(blocks, written["want"][first:], strict=False):
                amax.copy_(numerics.amax(make(shape, content, dtype), block))
        for got, want in zip(written["got"], written["want"], strict=True):
            assert_same_bytes(got, want)


def test_rows_are_cast_in_one_launch_with_their_amaxes() -> None:
    """Of all matrices."""
    parts = []
    for rows in (256, 64, 128):
        x, amaxes = make((rows, 128), "wide", torch.float32), torch.zeros(rows, 1).cuda()
        out = torch.empty(rows, 128).cuda().to(torch.float8_e4m3fn)
        parts.append(AmaxPart(x, (0, 0), [ROW], [amaxes], out, "power_of_2"))
    with launched() as names:
        kernels.prepare_fill_amaxes(parts)()
    assert names == ["cast_rows_kernel"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("content", CONTENTS)
def test_matrices_are_packed_with_their_scales(content, dtype):
    """All at once, in one launch, and no bytes beside them are written; also where what they are a
    part of, or are written into, has them begin anywhere.
    """
    aligned = [(640, 512), (51, 1024), (1, 4608)]
    not_aligned = [(640, 384), (51, 32), (1, 64), (7, 8224)]
    for shapes, offset in [(aligned, 0), (not_aligned, 0), (aligned, 3)]:
        parts: dict[str, list[PackPart]] = {"got": [], "want": []}
        payloads: dict[str, list[torch.Tensor]] = {"got": [], "want": []}
        for rows, columns in shapes:
            x = make((rows, columns + offset), content, dtype)[:, offset:]
            for kind, of_kind in parts.items():
                width = columns + columns // 32
                flat = torch.full(((rows + 3) * width + offset,), 0x55, dtype=torch.uint8).cuda()
                payload = flat[offset:].view(-1, width)
                payloads[kind].append(payload)
                not_finite = torch.zeros(1).cuda()
                of_kind.append(PackPart(x, (1, 32), E4M3, payload[:rows], not_finite))
        with launched() as names:
            kernels.prepare_pack_into(parts["got"])()
        assert names == ["pack_kernel"]
        numerics.pack_into(parts["want"])
        for got, want, part in zip(payloads["got"], payloads["want"], parts["got"], strict=True):
            both = [x.tensor_split([part.x.size(1)], 1) for x in (got, want)]
            for a, b, kind in zip(*both, (E4M3, torch.uint8), strict=True):
                assert_same_bytes(a.contiguous().view(kind), b.contiguous().view(kind))
        for got, want in zip(parts["got"], parts["want"], strict=True):
            assert_same_bytes(got.not_finite, want.not_finite)
            assert want.not_finite.isinf().item() is not want.x.isfinite().all().item()
