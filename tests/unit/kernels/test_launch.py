"""On a GPU: what is launched, and where."""

from typing import Any

import pytest
import torch

from fp8dist import kernels, numerics
from fp8dist.config import COLUMN, ROW
from fp8dist.numerics import AmaxPart, CastPart
from tests.unit.kernels.contents import assert_same_bytes, make

pytest.importorskip("triton", reason="needs Triton")
if not torch.backends.cuda.is_built():
    pytest.skip("needs torch built for GPUs", allow_module_level=True)

from triton.knobs import HookChain, runtime  # noqa: E402  # where there is Triton

from fp8dist.kernels import launch  # noqa: E402  # where there is Triton

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("first", [0, 1])
def test_each_launch_is_of_what_fits_its_arguments(first: int) -> None:
    """What was compiled for addresses that are multiples of 16 is not launched on others, nor what
    was for one dtype, or for one number of columns, on another."""
    launch._compiled.clear()
    flat = make((257, 128), "wide", torch.float32).flatten()
    for dtype in (torch.bfloat16, torch.float32):
        values = flat.to(dtype)
        for columns in (128, 96):
            for start in (first, 1 - first, first):
                x = values[start : start + 256 * columns].view(256, columns)
                found = kernels.quantize_both(x, ROW, COLUMN, torch.float8_e4m3fn, "power_of_2")
                expected = numerics.quantize_both(x, ROW, COLUMN, torch.float8_e4m3fn, "power_of_2")
                for got, want in zip(found, expected, strict=True):
                    assert_same_bytes(got.data, want.data)
                    assert got.scale.equal(want.scale)
    # Two kernels, of two dtypes, two numbers and two alignments each.
    assert len(launch._compiled) == 16


def test_hooks_are_told_of_every_launch() -> None:
    """Of what is launched for the first time and of what is known, by either of them alone."""
    names: list[str] = []

    def hook(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    launch._compiled.clear()
    x = make((256, 128), "wide", torch.float32)
    for chain in (runtime.launch_enter_hook, runtime.launch_enter_hook, runtime.launch_exit_hook):
        chain.add(hook)
        try:
            kernels.quantize_both(x, ROW, COLUMN, torch.float8_e4m3fn, "power_of_2")
        finally:
            chain.remove(hook)
    kernels.quantize_both(x, ROW, COLUMN, torch.float8_e4m3fn, "power_of_2")
    assert names == 3 * ["amax_kernel", "quantize_kernel"]


def test_what_a_hook_may_be() -> None:
    """Triton takes none, one and, as it comes, an empty chain."""
    assert not launch._is_set(None) and not launch._is_set(HookChain())
    assert launch._is_set(print)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_where_the_tensors_are() -> None:
    """Which need not be the current device, on which Triton launches."""
    launch._compiled.clear()
    x = make((256, 128), "wide", torch.float32).to("cuda:1")
    amax = numerics.amax(x, ROW)
    scale = numerics.amax_to_scale(amax, torch.float8_e4m3fn, "exact")
    want_both = numerics.quantize_both(x, ROW, COLUMN, torch.float8_e4m3fn, "power_of_2")
    want = numerics.cast(x, scale, torch.float8_e4m3fn)
    for current in (0, 1, 0):
        with torch.cuda.device(current):
            found = kernels.quantize_both(x, ROW, COLUMN, torch.float8_e4m3fn, "power_of_2")
            amaxes, out = torch.zeros_like(amax), torch.empty_like(want)
            kernels.prepare_fill_amaxes([AmaxPart(x, (0, 0), [ROW], [amaxes])])()
            kernels.prepare_cast_into([CastPart(x, (0, 0), ROW, scale, out)])()
            assert torch.cuda.current_device() == current
        for got, expected in zip(found, want_both, strict=True):
            assert_same_bytes(got.data, expected.data)
        assert_same_bytes(amaxes, amax)
        assert_same_bytes(out, want)
