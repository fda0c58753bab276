"""On a GPU: the kernels that write into a part of a buffer write that part and nothing else."""

import itertools
from typing import Any

import pytest
import torch

from fp8dist import kernels, numerics
from fp8dist.config import COLUMN, ROW, TENSOR
from fp8dist.numerics import AmaxPart, CastPart
from fp8dist.precompute import scales_size
from tests.unit.kernels.contents import CONTENTS, SHAPES, assert_same_bytes, make

pytest.importorskip("triton", reason="needs Triton")
if not torch.backends.cuda.is_built():
    pytest.skip("needs torch built for GPUs", allow_module_level=True)

from triton.knobs import HookChain, runtime  # noqa: E402  # where there is Triton

from fp8dist.kernels import launch  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cast_into(dtype, content):
    """Parts of matrices of many sizes at once."""
    for block in [(-1, -1), (1, -1), (1, 128), (128, 128), (1, 32)]:
        parts: dict[str, list[CastPart]] = {"got": [], "want": []}
        payloads: dict[str, list[torch.Tensor]] = {"got": [], "want": []}
        for shape in SHAPES:
            whole = make(shape, content, dtype)
            if whole.size(0) % max(block[0], 1):
                continue
            amax = numerics.amax(whole, block)
            scale = numerics.amax_to_scale(amax, torch.float8_e4m3fn, "exact")
            third = shape[0] // 3
            for start, end in [(0, third), (third, shape[0])]:
                if start == end:
                    continue
                # Poisoned, and with more rows than are to be written.
                payload = torch.full((end - start + 3, shape[1]), 0x55, dtype=torch.uint8).cuda()
                for kind in parts:
                    mine = payload.clone()
                    out = mine[: end - start].view(torch.float8_e4m3fn)
                    part = CastPart(whole[start:end], (start, 0), block, scale, out)
                    parts[kind].append(part)
                    payloads[kind].append(mine)
        kernels.cast_into(parts["got"])
        numerics.cast_into(parts["want"])
        for got, want in zip(payloads["got"], payloads["want"], strict=True):
            assert_same_bytes(got.view(torch.float8_e4m3fn), want.view(torch.float8_e4m3fn))


@pytest.mark.parametrize("block", [(-1, -1), (1, -1), (128, 128)], ids=str)
@pytest.mark.parametrize("start, end", [(0, 256), (128, 384), (200, 300), (256, 384)])
def test_cast_into_of_some_columns(block, start, end):
    """What a weight sharded over dim 1 gives, aligned with the blocks or not."""
    whole = make((256, 384), "wide", torch.float32)
    scale = numerics.amax_to_scale(numerics.amax(whole, block), torch.float8_e4m3fn, "exact")
    got, want = (torch.zeros(256, end - start).cuda().to(torch.float8_e4m3fn) for _ in range(2))
    part = CastPart(whole[:, start:end].contiguous(), (0, start), block, scale, got)
    kernels.cast_into([part])
    numerics.cast_into([part._replace(out=want)])
    assert_same_bytes(got, want)
    assert want.float().abs().max() > 0


@pytest.mark.parametrize("enough", [1, 20, 10**6])
@pytest.mark.parametrize("content", CONTENTS)
def test_fill_amaxes(content, enough, monkeypatch):
    """Shards of matrices, also ones that share a block, fill what the whole would; all at once,
    with programs of all heights."""
    monkeypatch.setattr(launch, "_ENOUGH_PROGRAMS", enough)
    launch._table.cache_clear()
    all_blocks = [(-1, -1), (1, -1), (-1, 1), (128, 128)]
    for dtype, blocks in itertools.product(
        (torch.float32, torch.bfloat16),
        (all_blocks, all_blocks[:1], all_blocks[:2], all_blocks[3:]),
    ):
        parts, all_amaxes, expected = [], [], []
        for shape in [(640, 384), (128, 1280), (256, 128)]:
            whole = make(shape, content, torch.float32).to(dtype)
            expected += [numerics.amax(whole, block).float() for block in blocks]
            amaxes = [torch.zeros_like(amax) for amax in expected[-len(blocks) :]]
            all_amaxes += amaxes
            for start, end in [(0, 50), (50, 51), (51, shape[0])]:
                parts.append(AmaxPart(whole[start:end], (start, 0), blocks, amaxes))
        kernels.fill_amaxes(parts)
        for got, want in zip(all_amaxes, expected, strict=True):
            assert_same_bytes(got, want)
    launch._table.cache_clear()


@pytest.mark.parametrize("bn, height, programs", [(512, 8, 256), (128, 16, 512), (16, 64, 1008)])
def test_programs_are_as_tall_as_leaves_enough_of_them(bn, height, programs):
    entries = ((1024, 1000, 1000, 0, 5, 6),)
    stream = torch.cuda.current_stream()
    table, matrices, found = launch._table(entries, (64, 16, 8), bn, stream)
    assert (found, matrices.tolist()) == (height, [0] * programs)
    assert table.tolist() == [[1024, 1000, 1000, 0, 0, 5, 6]]


def test_fill_amaxes_keeps_larger_ones():
    x = make((128, 128), "normal", torch.float32)
    blocks = [(-1, -1), (1, -1)]
    amaxes = [torch.full((1, 1), 1e6).cuda(), torch.zeros(128, 1).cuda()]
    kernels.fill_amaxes([AmaxPart(x, (0, 0), blocks, amaxes)])
    assert amaxes[0].item() == 1e6
    assert_same_bytes(amaxes[1], x.abs().amax(1, keepdim=True))


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
            kernels.fill_amaxes([AmaxPart(x, (0, 0), [ROW], [amaxes])])
            kernels.cast_into([CastPart(x, (0, 0), ROW, scale, out)])
            assert torch.cuda.current_device() == current
        for got, expected in zip(found, want_both, strict=True):
            assert_same_bytes(got.data, expected.data)
        assert_same_bytes(amaxes, amax)
        assert_same_bytes(out, want)
