"""On a GPU: the kernels for experts give the bytes of `grouped_numerics`, also at large sizes."""

import subprocess
import sys

import pytest
import torch

from fp8dist import grouped_numerics, numerics
from fp8dist.config import COLUMN, ROW
from fp8dist.numerics import Scaled
from tests.unit.kernels.compiled import assert_no_calls

pytest.importorskip("triton", reason="needs Triton")
if not torch.backends.cuda.is_built():
    pytest.skip("needs torch built for GPUs", allow_module_level=True)

from fp8dist.kernels import grouped_kernels, grouped_launch  # noqa: E402  # where there is Triton

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


def test_quantize_groups_times_a_factor() -> None:
    counts = [1000, 0, 3, 2045]
    x = torch.randn(sum(counts), 1040, device="cuda").bfloat16()
    ends = torch.tensor(counts, device="cuda").cumsum(0, dtype=torch.int32)
    factor = 2.0 ** torch.randint(-30, 1, (4, 1040), device="cuda")
    data, scale, t_data, _, _ = grouped_launch.quantize_groups(x, ends, True, E4M3, factor)
    product = grouped_numerics.by_factor(x, ends, factor)
    of_rows = numerics.quantize(product, ROW, E4M3, "power_of_2")
    assert bytes_of(data).equal(bytes_of(of_rows.data))
    assert scale.equal(torch.stack([of_rows.scale.reciprocal(), of_rows.scale]))
    of = grouped_numerics.quantize_groups(x, ends, COLUMN, E4M3, "power_of_2")
    assert bytes_of(t_data).equal(bytes_of(of.data))


def test_transpose_each() -> None:
    rows, n = 784, 1040
    w = torch.randint(256, (5 * rows, n), device="cuda", dtype=torch.uint8)
    found = grouped_launch.transpose_each(w.view(E4M3), rows)
    assert bytes_of(found).equal(w.view(5, rows, n).transpose(1, 2).reshape(5 * n, rows))


def multiplied(a: Scaled, b: Scaled, ends: torch.Tensor) -> torch.Tensor:
    inverses = a.scale.reciprocal().flatten(), b.scale.reciprocal().flatten()
    return torch.ops.fp8dist.scaled_grouped_mm(a.data, b.data, *inverses, ends)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("n, k", [(48, 32), (272, 144), (768, 2048), (2064, 1040)])
@pytest.mark.parametrize(
    "counts",
    [
        [1],
        [129],
        [600],
        [5, 0, 12],
        [0, 0, 300],
        [0, 2000, 0],
        [1000, 0, 3, 2045],
        [17] * 130,
        [300] * 8,
    ],
    ids=lambda counts: f"{len(counts)} of {counts[0]}",
)
def test_multiply_groups(counts: list[int], n: int, k: int) -> None:
    """The bits of torch's own kernel; small groups and large ones have other tiles."""
    ends = torch.tensor(counts, device="cuda").cumsum(0, dtype=torch.int32)
    a = numerics.quantize(torch.randn(sum(counts), k, device="cuda"), ROW, E4M3, "power_of_2")
    b = numerics.quantize(torch.randn(len(counts) * n, k, device="cuda"), ROW, E4M3, "power_of_2")
    expected = torch._scaled_grouped_mm(
        a.data,
        b.data.unflatten(0, (len(counts), n)).transpose(1, 2),
        a.scale.reciprocal().flatten(),
        b.scale.reciprocal().view(len(counts), n),
        offs=ends,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    assert multiplied(a, b, ends).equal(expected)


@pytest.mark.usefixtures("hopper")
def test_rows_of_no_expert_are_left_alone() -> None:
    a = numerics.quantize(torch.randn(200, 64, device="cuda"), ROW, E4M3, "power_of_2")
    b = numerics.quantize(torch.randn(2 * 48, 64, device="cuda"), ROW, E4M3, "power_of_2")
    ends = torch.tensor([30, 100], device="cuda", dtype=torch.int32)
    fewer = multiplied(Scaled(a.data[:100], a.scale[:100], ROW), b, ends)
    a.data[100:] = torch.nan
    torch.full((200, 48), 7.0, device="cuda", dtype=torch.bfloat16)  # its memory is taken next
    found = multiplied(a, b, ends)
    assert found[:100].equal(fewer)
    assert not found[100:].isnan().any()
    assert multiplied(Scaled(a.data[:0], a.scale[:0], ROW), b, ends * 0).shape == (0, 48)


_BAD_OFFSETS = """
import torch, fp8dist
x = torch.ones(64, 32, device="cuda")
a, inverse = x.to(torch.float8_e4m3fn), torch.ones(64, device="cuda")
ends = torch.tensor({ends}, device="cuda", dtype=torch.int32)
{call}
torch.cuda.synchronize()
"""
_CALLS = {
    "cast": "torch.ops.fp8dist.quantize_groups(x, ends, True, a.dtype, None)",
    "multiply": "torch.ops.fp8dist.scaled_grouped_mm(a, a, inverse, inverse, ends)",
}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("ends", [[20, 200], [40, 24], [20, 64]], ids=str)
@pytest.mark.parametrize("call", _CALLS)
def test_bad_offsets_are_noticed_on_the_device(call: str, ends: list[int]) -> None:
    """As torch's own kernel does; in a process of its own, whose GPU is lost to it then. The matmul
    itself has no message, see there."""
    program = [sys.executable, "-c", _BAD_OFFSETS.format(ends=ends, call=_CALLS[call])]
    run = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    bad = ends != [20, 64]
    assert (run.returncode != 0) == bad, run.stderr
    if bad:
        said = "offsets of experts go down, or beyond the tokens" in run.stdout + run.stderr
        assert said == (call == "cast"), run.stderr
        assert "CUDA" in run.stderr


@pytest.mark.usefixtures("hopper")
def test_the_matmul_calls_no_function() -> None:
    test_multiply_groups([300] * 2, 48, 32)
    assert_no_calls(grouped_kernels.multiply_groups_kernel)


@pytest.mark.usefixtures("hopper")
def test_multiply_groups_that_lie_anywhere() -> None:
    """Rows with others between them, and at an address that is no multiple of 16."""
    (m, n, k), ends = (64, 32, 48), torch.tensor([10, 64], device="cuda", dtype=torch.int32)
    a = numerics.quantize(torch.randn(m, k, device="cuda"), ROW, E4M3, "power_of_2")
    b = numerics.quantize(torch.randn(2 * n, k, device="cuda"), ROW, E4M3, "power_of_2")
    wide = torch.zeros(m, k + 16, device="cuda").to(E4M3)
    wide[:, :k] = a.data
    flat = torch.zeros(2 * n * k + 1, device="cuda").to(E4M3)
    flat[1:] = b.data.flatten()
    other_a, other_b = a._replace(data=wide[:, :k]), b._replace(data=flat[1:].view(2 * n, k))
    assert multiplied(other_a, other_b, ends).equal(multiplied(a, b, ends))


@pytest.mark.usefixtures("hopper")
def test_what_the_compiler_is_told_of_the_op() -> None:
    a, b = (torch.ones(rows, 64, device="cuda").to(E4M3) for rows in (48, 96))
    inverses = torch.ones(48, device="cuda"), torch.ones(96, device="cuda")
    ends = torch.tensor([10, 30, 48], device="cuda", dtype=torch.int32)
    # The others multiply what they are given, which float8 tensors cannot.
    torch.library.opcheck(
        torch.ops.fp8dist.scaled_grouped_mm.default,
        (a, b, *inverses, ends),
        test_utils=("test_faketensor", "test_autograd_registration"),
    )
