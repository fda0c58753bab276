"""What a device can multiply: the only place that asks."""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._triton import has_triton

from fp8dist.config import ROW, Recipe

logger = logging.getLogger("fp8dist")


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _has_float8_casts(index: int) -> bool:
    return torch.version.hip is None and _capability(index) >= (8, 9)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def has_float8_casts(device: torch.device) -> bool:
    """Whether the device converts to and from float8 itself, as Triton's casts need it to."""
    return device.type == "cuda" and _has_float8_casts(_index(device))


def has_maxima_of_pairs(device: torch.device) -> bool:
    """Whether the device has the larger of two pairs of 16 bits in one step, PTX's `max.u16x2`."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return _capability(_index(device)) >= (9, 0)


def has_matmul(device: torch.device, recipe: Recipe) -> bool:
    """Whether `torch._scaled_mm` or `F.scaled_mm` runs the recipe on the device's own float8 units.

    A CPU has the function too, but no units: there it is orders of magnitude slower than
    dequantizing.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    capability = _capability(_index(device))
    last = recipe.max_capability
    return recipe.min_capability <= capability and (last is None or capability <= last)


def has_grouped_matmul(device: torch.device, recipe: Recipe) -> bool:
    """Whether `torch._scaled_grouped_mm` runs the recipe on the device."""
    if not has_matmul(device, recipe):
        return False
    major, minor = _capability(_index(device))
    if recipe.scale_format == "e8m0":
        return major == 10 and _torchao_arranges_scales()  # 10.3 too, as torchao has it
    return recipe.weight == ROW and (major, minor) in ((9, 0), (10, 0))


@functools.cache
def _torchao_arranges_scales() -> bool:
    """Whether torchao has the kernels of its MX prototypes, which may move or change, and are
    stubs of these names without Triton.
    """
    try:
        from torchao.prototype.moe_training.kernels import mxfp8
    except ImportError:
        return False
    of = ("2d_M_groups", "2d_K_groups", "per_group_3d")
    return has_triton() and all(hasattr(mxfp8, f"triton_mx_block_rearrange_{x}") for x in of)


def has_hopper_units(device: torch.device) -> bool:
    """Whether the device has the tensor cores for which experts have matmuls of our own."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return _capability(_index(device)) == (9, 0)


@functools.cache
def _log_emulation(device_type: str, recipe_name: str) -> None:
    name = torch.cuda.get_device_name() if device_type == "cuda" else device_type
    logger.info(
        "%s matmuls are emulated on %s: the operands are dequantized and multiplied",
        recipe_name,
        name,
    )


_assumed = False


@contextmanager
def assume_matmuls() -> Iterator[None]:
    """While it is open, devices count as having every recipe's matmuls, as a GPU that has them: for
    fake tensors.
    """
    global _assumed
    before, _assumed = _assumed, True
    try:
        yield
    finally:
        _assumed = before


def matmuls_are_assumed() -> bool:
    return _assumed


def multiplies(device: torch.device, recipe: Recipe, emulate: bool, grouped: bool = False) -> bool:
    """Whether to use the device's float8 matmul; says once in the log when it has none."""
    if emulate:
        return False
    if _assumed:
        return True
    if (has_grouped_matmul if grouped else has_matmul)(device, recipe):
        return True
    if not torch.compiler.is_compiling():
        _log_emulation(device.type, recipe.name)
    return False
