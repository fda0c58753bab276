"""On a GPU: which tokens the chunks of padded groups hold."""

import pytest
import torch

from fp8dist import grouped_numerics

triton = pytest.importorskip("triton", reason="needs Triton")

from fp8dist.kernels.grouped_kernels import chunks_kernel  # noqa: E402  # where there is Triton

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("chunk", [16, 32])
@pytest.mark.parametrize("counts", [[5, 0, 37, 16], [0, 0, 0], [300], [1] * 130], ids=str)
def test_chunks(counts: list[int], chunk: int) -> None:
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32).cuda()
    rows = grouped_numerics.padded_rows(sum(counts), len(counts), chunk)
    count = rows // chunk
    padded_ends = torch.empty_like(ends)
    first, end, group = torch.empty((3, count), dtype=torch.int32, device="cuda").unbind()
    grid = (triton.cdiv(count, 64),)
    tensors, numbers = (ends, padded_ends, first, end, group), (len(counts), count, sum(counts))
    chunks_kernel[grid](*tensors, *numbers, CHUNK=chunk, BG=256, BC=64, sanitize_overflow=False)
    assert padded_ends.equal(grouped_numerics.padded_ends(ends, chunk))
    tokens = torch.arange(1, sum(counts) + 1, device="cuda")[:, None]
    expected = grouped_numerics.pad_groups(tokens, ends, chunk).view(count, chunk)
    held = first[:, None] + torch.arange(chunk, device="cuda")
    assert torch.where(held < end[:, None], held + 1, 0).equal(expected)
    of_rows = grouped_numerics.group_of_rows(padded_ends, rows).view(count, chunk)
    assert group.equal(of_rows[:, 0].int())
