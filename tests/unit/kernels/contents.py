"""Matrices that a kernel may get wrong, and what it means to give the same bytes."""

import torch

SHAPES = [(256, 512), (1, 128), (130, 384), (1000, 128), (16, 1152), (640, 4224)]
CONTENTS = ["normal", "wide", "zeros", "nan", "inf", "subnormal", "boundaries"]


def make(shape: tuple[int, int], content: str, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0] + len(content))
    x = torch.randn(shape, generator=generator)
    if content == "wide":  # columns and rows of very different size
        x = (
            x
            * torch.logspace(-12, 12, shape[1], base=2)
            * torch.logspace(3, -20, shape[0], base=2)[:, None]
        )
    if content == "zeros":
        x[:, : shape[1] // 2] = 0
        x[: shape[0] // 2] = 0
    if content == "nan":
        x[shape[0] // 2, 5] = torch.nan
    if content == "inf":
        x[shape[0] // 2, 7] = -torch.inf
    if content == "subnormal":
        x = x * 1e-39
    if content == "boundaries":
        # Amaxes of rows about m * 2^e for m around 1.75, which float8_max / amax turns into a power
        # of two, and for numbers from which on that is subnormal, 0 or infinite.
        m = torch.tensor([1, 1.75, 1.75 + 2**-23, 1.75 - 2**-23, 1 + 2**-23, 2 - 2**-23])
        e = torch.arange(-150, 128, dtype=torch.float32).repeat_interleave(len(m))
        amaxes = (m.double().repeat(278) * torch.pow(2.0, e.double())).float()
        picked = amaxes[torch.arange(shape[0]) * 37 % len(amaxes)]
        x = x.sign() * picked[:, None] * torch.rand(shape, generator=generator).round()
    return x.to(dtype).cuda()


def assert_same_bytes(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal bit for bit, except that a NaN may have any sign and payload."""
    assert got.shape == want.shape and got.dtype == want.dtype
    got, want = got.float(), want.float()
    assert torch.equal(got.isnan(), want.isnan())
    numbers = ~want.isnan()
    assert torch.equal(got[numbers].view(torch.int32), want[numbers].view(torch.int32))
