"""On a GPU: scales from the bits of amaxes are those of `numerics`, for all exponents."""

import pytest
import torch

from fp8dist import numerics

triton = pytest.importorskip("triton", reason="needs Triton")
if not torch.backends.cuda.is_built():
    pytest.skip("needs torch built for GPUs", allow_module_level=True)

import triton.language as tl  # noqa: E402  # where there is Triton

from fp8dist.kernels.launch import FLOAT8_EXPONENT  # noqa: E402  # where there is Triton
from fp8dist.kernels.triton_kernels import amax_to_scale  # noqa: E402  # where there is Triton

pytestmark = pytest.mark.gpu


@triton.jit
def scales_of(bits_ptr, scale_ptr, N, EXPONENT: tl.constexpr, FORMAT: tl.constexpr):
    i = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    scale = amax_to_scale(tl.load(bits_ptr + i, mask=i < N), EXPONENT, FORMAT)
    tl.store(scale_ptr + i, scale, mask=i < N)


def bits_of_amaxes() -> torch.Tensor:
    """Every exponent with mantissas about 0, 0.75 and 1, the smallest numbers, and 1e-12."""
    near = torch.arange(-3, 4)
    mantissas = torch.cat([near % 2**23, 0x600000 + near, torch.randint(0, 2**23, (1000,))])
    every = (torch.arange(256)[:, None] * 2**23 + mantissas).flatten()
    return torch.cat([every, torch.arange(1000), 0x2B8CBCCC + near]).int()


@pytest.mark.parametrize("scale_format", ["exact", "power_of_2", "e8m0"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_amax_to_scale(dtype, scale_format):
    bits = bits_of_amaxes().cuda()
    got = torch.empty(len(bits), device="cuda")
    grid = (triton.cdiv(len(bits), 1024),)
    scales_of[grid](bits, got, len(bits), FLOAT8_EXPONENT[dtype], scale_format)
    want = numerics.amax_to_scale(bits.view(torch.float32), dtype, scale_format)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
