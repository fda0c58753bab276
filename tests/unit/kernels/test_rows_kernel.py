"""On a Hopper GPU: what the kernel that contracts rows is compiled to, and its contract."""

import re
import subprocess
import sys

import pytest
import torch

from fp8dist.kernels import grouped
from tests.unit.kernels.compiled import assert_no_calls
from tests.unit.kernels.rows_operands import multiplied, multiplied_by_torch, operands_of

if not grouped.HAS_GLUON:
    pytest.skip("needs a Triton whose Gluon is known", allow_module_level=True)

from fp8dist.kernels import rows_kernel  # noqa: E402  # where there is Gluon

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]


def test_it_transposes_on_the_way_and_calls_no_function() -> None:
    """See [Note: transposed on the way]: as few instructions as that says."""
    x = operands_of([300] * 2, 48, 32)
    assert multiplied(x).equal(multiplied_by_torch(x))
    assert_no_calls(rows_kernel.multiply_rows_kernel)
    compiled, *_ = rows_kernel.multiply_rows_kernel.device_caches[torch.cuda.current_device()]
    for known in compiled.values():
        ptx = known.asm["ptx"]
        # Of 64 x 128 bytes, twice in a step, and in each half: 4 loads of 512 pairs a warp.
        assert len(re.findall(r"ldmatrix\S*x4\.trans\S*b16", ptx)) == 4 * 2 * 2
        assert len(re.findall(r"prmt\.b32 .*0x6420", ptx)) == 8 * 2 * 2


_CALL = """
import torch, fp8dist
x, inverse = torch.ones(64, 32, device="cuda"), torch.ones(64, device="cuda")
a, ends = x.to(torch.float8_e4m3fn), torch.tensor({ends}, device="cuda", dtype=torch.int32)
torch.ops.fp8dist.scaled_grouped_mm_rows(a, a, inverse, inverse[:2], ends)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("ends", [[20, 200], [40, 24], [20, 64]], ids=str)
def test_bad_offsets_are_noticed_on_the_device(ends: list[int]) -> None:
    """In a process of its own, whose GPU is lost to it. The cast before it has the message."""
    program = [sys.executable, "-c", _CALL.format(ends=ends)]
    run = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert (run.returncode == 0) == (ends == [20, 64]), run.stderr
    assert ("CUDA" in run.stderr) == (ends != [20, 64]), run.stderr
