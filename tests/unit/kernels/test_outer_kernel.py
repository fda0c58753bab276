"""On a Hopper GPU: what the kernel of grad_weight of experts is compiled to, and its contract."""

import subprocess
import sys

import pytest

from fp8dist.kernels import grouped
from tests.unit.kernels.compiled import assert_no_calls
from tests.unit.kernels.outer_operands import groups_of, outer, outer_of_torch

if not grouped.HAS_GLUON:
    pytest.skip("needs a Triton whose Gluon is known", allow_module_level=True)

from fp8dist.kernels import outer_kernel  # noqa: E402  # where there is Gluon

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]


def test_it_calls_no_function() -> None:
    a, b = groups_of([300] * 2, 48), groups_of([300] * 2, 32)
    assert outer(a, b).equal(outer_of_torch(a, b))
    assert_no_calls(outer_kernel.outer_groups_kernel)


_GROUPS = """
import torch, fp8dist
x, inverse = torch.ones(32, 192, device="cuda"), torch.ones(64, device="cuda")
a, ends = x.to(torch.float8_e4m3fn), torch.tensor({ends}, device="cuda", dtype=torch.int32)
torch.ops.fp8dist.scaled_grouped_outer(a, a, inverse, inverse, ends)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("ends", [[64, 192], [64, 64], [64, 100], [128, 64]], ids=str)
def test_a_group_without_a_step_ends_it(ends: list[int]) -> None:
    """Where barriers would be counted wrongly; in a process of its own, whose GPU is lost to it."""
    program = [sys.executable, "-c", _GROUPS.format(ends=ends)]
    run = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode == 0) == (ends == [64, 192]), run.stderr
    assert ("CUDA" in run.stderr) == (ends != [64, 192]), run.stderr
