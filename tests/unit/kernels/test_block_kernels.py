"""On a GPU: what casts by patches gives the bytes of its reference, and is what is launched."""

from collections.abc import Callable, Iterator

import pytest
import torch

from fp8dist import hardware, kernels, numerics
from fp8dist.config import ScaleFormat
from fp8dist.numerics import Scaled
from tests.unit.kernels.contents import CONTENTS, assert_same_bytes, make
from tests.unit.kernels.launched import launched

pytest.importorskip("triton", reason="needs Triton")
if not torch.backends.cuda.is_built():
    pytest.skip("needs torch built for GPUs", allow_module_level=True)

from fp8dist.kernels import launch  # noqa: E402  # where there is Triton

pytestmark = pytest.mark.gpu

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
PATCHES, TILES = "quantize_blocks_of_128_kernel", "quantize_kernel"


def assert_all_same(got: list[Scaled | None], want: list[Scaled | None]) -> None:
    for one, other in zip(got, want, strict=True):
        if one is None or other is None:
            assert one is other
            continue
        assert one.block == other.block
        assert_same_bytes(one.data, other.data)
        assert_same_bytes(one.scale, other.scale)
        if one.inverse is not None:
            assert_same_bytes(one.inverse, 1 / other.scale)


def check_blocks_of_128(
    x: torch.Tensor,
    kernel: str = PATCHES,
    float8_dtype: torch.dtype = E4M3,
    scale_format: ScaleFormat = "power_of_2",
) -> None:
    """Cast by this kernel, and to the bytes of `numerics`: both orientations, and each alone."""
    for blocks in (((1, 128), (128, 1)), ((1, 128), None), (None, (128, 1))):
        args = (x, *blocks, float8_dtype, scale_format)
        with launched() as names:
            found = kernels.quantize_both(*args)
        assert names == [kernel]
        assert_all_same([*found], [*numerics.quantize_both(*args)])


def check_derived(x: Scaled) -> None:
    """The transpose is that of what arrived, by the amaxes of columns of its values."""
    with launched() as names:
        found = kernels.rescale_transposed(x, (32, 1), None, "e8m0")
    assert names == ["derive_blocks_of_32_kernel"]
    value = numerics.dequantize(x.data, x.scale)
    _, want = numerics.quantize_both(value, None, (32, 1), x.data.dtype, "e8m0")
    assert_all_same([found], [want])


def views(content: str) -> Iterator[tuple[torch.Tensor, bool]]:
    """Matrices, and whether they may be read 16 bytes at a time."""
    whole = make((257, 1024), content, torch.bfloat16)
    yield whole, True
    yield whole[:2], True
    yield whole[:128, :128], True
    yield whole[3:200, 8:648], True
    yield whole[::2], True
    yield whole[:1].expand(130, 1024), True
    yield whole[:, 4:516], False  # begins at a multiple of 8 bytes only
    yield whole.flatten()[: 250 * 1032].view(250, 1032)[:, :896], False  # and its rows do
    yield whole.float(), False
    yield whole.half(), False


@pytest.mark.parametrize("scale_format", ["power_of_2", "exact"])
@pytest.mark.parametrize("content", CONTENTS)
def test_blocks_of_128(content, scale_format):
    for x, by_patches in views(content):
        check_blocks_of_128(x, PATCHES if by_patches else TILES, scale_format=scale_format)


def test_columns_that_fill_no_block_are_cast_by_tiles():
    x = make((256, 200), "wide", torch.bfloat16)
    with launched() as names:
        _, found = kernels.quantize_both(x, None, (128, 1), E4M3, "power_of_2")
    assert names == [TILES]
    assert_all_same([found], [numerics.quantize_both(x, None, (128, 1), E4M3, "power_of_2")[1]])


def test_blocks_of_128_of_e5m2():
    check_blocks_of_128(make((256, 512), "wide", torch.bfloat16), TILES, E5M2)


def test_older_devices_cast_by_tiles(monkeypatch):
    monkeypatch.setattr(hardware, "has_maxima_of_pairs", lambda device: False)
    check_blocks_of_128(make((256, 512), "wide", torch.bfloat16), TILES)


def in_rows(scale: torch.Tensor) -> torch.Tensor:
    return scale.contiguous()


def in_columns(scale: torch.Tensor) -> torch.Tensor:
    return scale.t().contiguous().t()


@pytest.mark.parametrize("lie", [in_rows, in_columns])
@pytest.mark.parametrize("float8_dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("content", CONTENTS)
def test_blocks_of_32_from_blocks_of_32(
    content: str, float8_dtype: torch.dtype, lie: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    for shape in [(256, 512), (2, 32), (33, 96), (1000, 160), (95, 4224)]:
        x = numerics.quantize(make(shape, content, torch.float32), (1, 32), float8_dtype, "e8m0")
        check_derived(x._replace(scale=lie(x.scale)))


@pytest.mark.parametrize("float8_dtype", [E4M3, E5M2], ids=str)
def test_numbers_beside_an_infinity(float8_dtype):
    """The scale of its block, 2^-127, is the one that is subnormal."""
    x = make((64, 64), "normal", torch.float32)
    x[3, :4] = torch.tensor([torch.inf, 2.0**120, -(2.0**118), 1.0])
    check_derived(numerics.quantize(x, (1, 32), float8_dtype, "e8m0"))


@pytest.mark.parametrize("after", [0, 1, 4, 16], ids="{} bytes after each row".format)
def test_of_a_part_of_what_arrived(after):
    """Rows that begin anywhere and are longer than what is cast."""
    x = numerics.quantize(make((130, 512), "wide", torch.float32), (1, 32), E4M3, "e8m0")
    bytes_of_rows = torch.nn.functional.pad(x.data.view(torch.uint8), (0, after))
    for start, stop in [(0, 512), (32, 512), (64, 160), (0, 32)]:
        data = bytes_of_rows.view(E4M3)[:, start:stop]
        check_derived(Scaled(data, x.scale[:, start // 32 : stop // 32], (1, 32)))


@pytest.mark.parametrize(("block", "scale_format"), [((1, 64), "e8m0"), ((1, 32), "power_of_2")])
def test_blocks_that_no_kernel_derives_are_refused(block, scale_format):
    """Of a width that is neither a tile's nor, of e8m0, 32."""
    x = numerics.quantize(make((256, 512), "wide", torch.float32), block, E4M3, scale_format)
    with pytest.raises(AssertionError, match=r"no kernel casts to None and \(32, 1\)"):
        kernels.rescale_transposed(x, (32, 1), None, scale_format)


def test_dims_of_a_tile_in_either_order(monkeypatch):
    """One is for this version of Triton, and fast; the other is for older or newer ones."""
    x = make((200, 384), "wide", torch.bfloat16)
    try:
        for rows in (0, 3):
            monkeypatch.setattr(launch, "_PATCH_ROWS", rows)
            launch._plan.cache_clear()
            check_blocks_of_128(x)
            check_derived(numerics.quantize(x, (1, 32), E4M3, "e8m0"))
    finally:
        launch._plan.cache_clear()


def test_what_is_too_large_for_offsets_of_32_bits_is_cast_by_tiles(monkeypatch):
    monkeypatch.setattr(launch, "_MOST_IN_BLOCKS", 512)
    check_blocks_of_128(make((512, 512), "wide", torch.bfloat16))
    check_blocks_of_128(make((640, 512), "wide", torch.bfloat16), TILES)
