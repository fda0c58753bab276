"""On a GPU: amaxes and a cast by those of rows, in one pass."""

import pytest
import torch

from fp8dist import kernels, numerics
from fp8dist.config import COLUMN, ROW, TENSOR
from fp8dist.numerics import AmaxPart
from fp8dist.precompute import scales_size
from tests.unit.kernels.contents import CONTENTS, assert_same_bytes, make

pytest.importorskip("triton", reason="needs Triton")
if not torch.backends.cuda.is_built():
    pytest.skip("needs torch built for GPUs", allow_module_level=True)

from fp8dist.kernels import launch  # noqa: E402  # where there is Triton

pytestmark = pytest.mark.gpu


ROW_BLOCKS = [[ROW], [ROW, COLUMN], [ROW, TENSOR], [COLUMN, TENSOR, ROW]]


@pytest.mark.parametrize("scale_format", ["power_of_2", "exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("content", CONTENTS)
def test_amaxes_and_a_cast_by_rows(content, dtype, scale_format):
    """Shards of matrices, all at once; the last, in one, is too wide for the kernel."""
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
        kernels.fill_amaxes(parts["got"])
        numerics.fill_amaxes(parts["want"])  # the last part's columns are left, not the largest
        for i, shape in enumerate(shapes):
            first = i * (len(blocks) + 1)
            for block, amax in zip(blocks, written["want"][first:], strict=False):
                amax.copy_(numerics.amax(make(shape, content, dtype), block))
        for got, want in zip(written["got"], written["want"], strict=True):
            assert_same_bytes(got, want)


def test_rows_are_cast_in_one_launch_with_their_amaxes() -> None:
    x = make((256, 128), "wide", torch.float32)
    amaxes, out = torch.zeros(256, 1).cuda(), torch.empty(256, 128).cuda().to(torch.float8_e4m3fn)
    launch._compiled.clear()
    kernels.fill_amaxes([AmaxPart(x, (0, 0), [ROW], [amaxes], out, "power_of_2")])
    assert len(launch._compiled) == 1
