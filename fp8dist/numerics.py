"""The reference numerics in plain torch: amax -> scale -> cast -> dequantize.

This file is the specification. What runs on an accelerator must give the same bytes.
"""

import torch

from fp8dist.config import WHOLE, Block

# A block of zeros has no scale of its own: its amax is taken as this, which keeps the scale finite
# (torchao's `torchao.float8.float8_utils.EPS`, so that both give the same scales).
AMAX_EPS = 1e-12


def amax(x: torch.Tensor, block: Block) -> torch.Tensor:
    """max(abs(x)) over each block; 0 for a tensor with no elements, NaN where a block has one.

    Args:
        x: (M, N), float32, bfloat16 or float16.
        block: see [Note: blocks]; M and N are multiples of it.

    Returns:
        (M / block rows, N / block columns), dtype of x.
    """
    rows, columns = (x.size(dim) if block[dim] == WHOLE else block[dim] for dim in (0, 1))
    if x.numel() == 0:
        return x.new_zeros(x.size(0) // rows if rows else 1, x.size(1) // columns if columns else 1)
    blocks = x.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # 4D
    return blocks.abs().amax(dim=(1, 3))


def amax_to_scale(
    amax: torch.Tensor, float8_dtype: torch.dtype, power_of_2: bool = False
) -> torch.Tensor:
    """scale = float8_max / amax, so that the largest element of a block becomes float8_max.

    The division is in float64: in float32 eager and compiled code round differently.

    Args:
        amax: any shape and floating dtype, >= 0.
        power_of_2: round the scale down to a power of two.

    Returns:
        float32, the shape of amax. 0 where amax is infinite, NaN where it is NaN.
    """
    float8_max = torch.finfo(float8_dtype).max
    scale = (float8_max / amax.double().clamp(min=AMAX_EPS)).float()
    if power_of_2:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return scale


def repeat_blocks(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Scales of blocks, expanded so that they broadcast against a tensor of `shape`.

    A dimension with one scale is left at 1.
    """
    for dim in (0, 1):
        if 1 < scale.size(dim) < shape[dim]:
            scale = scale.repeat_interleave(shape[dim] // scale.size(dim), dim)
    return scale


def cast(x: torch.Tensor, scale: torch.Tensor, float8_dtype: torch.dtype) -> torch.Tensor:
    """x * scale in float32, saturated to +-float8_max and rounded to nearest even.

    Args:
        x: (M, N), float32, bfloat16 or float16.
        scale: float32, one per block of x.

    Returns:
        (M, N), float8_dtype. NaN stays NaN; infinities saturate (their scale is 0: NaN).
    """
    float8_max = torch.finfo(float8_dtype).max
    scaled = x.float() * repeat_blocks(scale, x.shape)
    return scaled.clamp(-float8_max, float8_max).to(float8_dtype)


def quantize(
    x: torch.Tensor, block: Block, float8_dtype: torch.dtype, power_of_2: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and cast a tensor by its own amaxes.

    Returns:
        (data, scale): (M, N) of float8_dtype; float32, one scale per block.
    """
    scale = amax_to_scale(amax(x, block), float8_dtype, power_of_2)
    return cast(x, scale, float8_dtype), scale


def dequantize(data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """data / scale in float32.

    Args:
        data: (M, N), float8.
        scale: float32, one per block of data.
    """
    return data.float() / repeat_blocks(scale, data.shape)
