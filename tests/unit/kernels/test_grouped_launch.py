"""On a GPU: the kernels for experts give the bytes of `grouped_numerics`, also at large sizes."""

import pytest
import torch

from fp8dist import grouped_numerics, numerics
from fp8dist.config import COLUMN, ROW

pytest.importorskip("triton", reason="needs Triton")
if not torch.backends.cuda.is_built():
    pytest.skip("needs torch built for GPUs", allow_module_level=True)

from fp8dist.kernels import grouped_launch  # noqa: E402

pytestmark = pytest.mark.gpu
E4M3 = torch.float8_e4m3fn


def bytes_of(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("counts", [[1000, 0, 3, 2045], [17] * 128, [4096] + [0] * 7], ids=len)
@pytest.mark.parametrize("rows", [False, True])
def test_quantize_groups(counts: list[int], rows: bool) -> None:
    x = torch.randn(sum(counts), 1040, device="cuda").bfloat16()
    x *= torch.logspace(-3, 3, 1040, device="cuda").bfloat16()
    ends = torch.tensor(counts, device="cuda").cumsum(0, dtype=torch.int32)
    data, scale, t_data, t_scale, new_ends = grouped_launch.quantize_groups(x, ends, rows, E4M3)
    of = grouped_numerics.quantize_groups(x, ends, COLUMN, E4M3, "power_of_2")
    assert new_ends.equal(of.ends)
    assert bytes_of(t_data).equal(bytes_of(of.data))
    assert t_scale.equal(torch.stack([of.scale.reciprocal(), of.scale]))
    if rows:
        of_rows = numerics.quantize(x, ROW, E4M3, "power_of_2")
        assert bytes_of(data).equal(bytes_of(of_rows.data))
        assert scale.equal(torch.stack([of_rows.scale.reciprocal(), of_rows.scale]))


def test_transpose_each() -> None:
    rows, n = 784, 1040
    w = torch.randn(5 * rows, n, device="cuda") * torch.logspace(-3, 3, n, device="cuda")
    of_rows = numerics.quantize(w, ROW, E4M3, "power_of_2")
    amaxes = w.unflatten(0, (5, rows)).abs().amax(1)
    new_scale = numerics.amax_to_scale(amaxes, E4M3, "power_of_2")
    inverse = of_rows.scale.reciprocal()
    found = grouped_launch.transpose_each(of_rows.data, inverse, rows, new_scale)
    of = grouped_numerics.transpose_each(of_rows, rows, COLUMN, new_scale, "power_of_2")
    assert bytes_of(found).equal(bytes_of(of.data))
