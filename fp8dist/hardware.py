"""What a device can multiply: the only place that asks."""

import functools
import logging

import torch

logger = logging.getLogger("fp8dist")


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def has_float8_matmul(device: torch.device) -> bool:
    """Whether `torch.nn.functional.scaled_mm` runs on the device's own float8 units.

    That is compute capability 8.9 (Ada) and newer, by cuBLAS's documentation. A CPU has the
    function too, but no units: there it is orders of magnitude slower than dequantizing.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return _capability(device.index or 0) >= (8, 9)


@functools.cache
def _log_emulation(device_type: str) -> None:
    name = torch.cuda.get_device_name() if device_type == "cuda" else device_type
    logger.info(
        "float8 matmuls are emulated on %s: operands are dequantized and multiplied in float32",
        name,
    )


def multiplies_float8(device: torch.device, emulate: bool) -> bool:
    """Whether to use the device's float8 matmul; says once in the log when it has none."""
    if emulate:
        return False
    if has_float8_matmul(device):
        return True
    if not torch.compiler.is_compiling():
        _log_emulation(device.type)
    return False
