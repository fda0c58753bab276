"""On a GPU: the kernels that write into a part of a buffer write that part and nothing else."""

import pytest
import torch

from fp8dist import kernels, numerics
from tests.unit.kernels.contents import CONTENTS, SHAPES, assert_same_bytes, make

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cast_into(dtype, content):
    for shape in SHAPES:
        x = make(shape, content, dtype)
        for block in [(-1, -1), (1, -1), (1, 128)]:
            scale = numerics.amax_to_scale(numerics.amax(x, block), torch.float8_e4m3fn, "exact")
            # Poisoned, and with more rows than are to be written.
            got = torch.full((shape[0] + 3, shape[1]), 0x55, dtype=torch.uint8, device="cuda")
            want = got.clone()
            kernels.cast_into(got[: shape[0]].view(torch.float8_e4m3fn), x, scale)
            numerics.cast_into(want[: shape[0]].view(torch.float8_e4m3fn), x, scale)
            assert_same_bytes(got.view(torch.float8_e4m3fn), want.view(torch.float8_e4m3fn))


@pytest.mark.parametrize("content", CONTENTS)
def test_fill_amaxes(content):
    """Shards of one matrix, also ones that share a block, fill what the whole would."""
    whole = make((640, 384), content, torch.float32)
    blocks = [(-1, -1), (1, -1), (-1, 1), (128, 128)]
    for dtype in (torch.float32, torch.bfloat16):
        amaxes = [numerics.amax(whole.to(dtype), block).float() for block in blocks]
        got = [torch.zeros_like(amax) for amax in amaxes]
        for start, end in [(0, 200), (200, 201), (201, 640)]:
            kernels.fill_amaxes(got, whole[start:end].to(dtype), blocks, (start, 0))
        for mine, want in zip(got, amaxes, strict=True):
            assert_same_bytes(mine, want)
