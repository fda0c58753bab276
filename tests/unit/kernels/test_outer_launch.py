"""On a Hopper GPU: grad_weight of experts has the bits of torch's own kernel."""

import pytest
import torch

from fp8dist.kernels import grouped
from tests.unit.kernels.outer_operands import E4M3, groups_of, outer, outer_of_torch

if not grouped.HAS_GLUON:
    pytest.skip("needs a Triton whose Gluon is known", allow_module_level=True)

from fp8dist.kernels import outer_launch  # noqa: E402  # where there is Gluon

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]


@pytest.mark.parametrize("n, k", [(16, 16), (48, 32), (208, 528), (768, 2048), (2064, 1040)])
@pytest.mark.parametrize(
    "counts",
    [[5], [129], [5, 0, 12], [0, 0, 300], [1000, 0, 3, 2045], [17] * 130, [256] * 8],
    ids=lambda counts: f"{len(counts)} of {counts[0]}",
)
def test_outer_groups(counts: list[int], n: int, k: int) -> None:
    """The bits of torch's own kernel; groups without tokens have 0. Programs with many tiles, with
    one and with none; tiles of one step and of more steps than there are places."""
    a, b = groups_of(counts, n), groups_of(counts, k)
    found = outer(a, b)
    assert found.equal(outer_of_torch(a, b))
    assert [bool(product.any()) for product in found] == [count > 0 for count in counts]


def test_outer_groups_with_few_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = groups_of([300, 0, 1000, 64], 784), groups_of([300, 0, 1000, 64], 1040)
    expected = outer_of_torch(a, b)
    for programs in 1, 2, 5:
        monkeypatch.setattr(outer_launch, "multiprocessors", lambda device, n=programs: n)
        assert outer(a, b).equal(expected)


def test_outer_groups_that_lie_anywhere() -> None:
    """At addresses that are no multiples of 16."""
    a, b = groups_of([100, 20], 48), groups_of([100, 20], 32)
    expected = outer(a, b)

    def moved(x: torch.Tensor) -> torch.Tensor:
        flat = torch.zeros(x.numel() + 1, device="cuda").to(x.dtype)
        flat[1:] = x.contiguous().flatten()
        return flat[1:].view(x.shape)

    a, b = (x._replace(data=moved(x.data)) for x in (a, b))
    inverses = [moved(x.scale.reciprocal().flatten()) for x in (a, b)]
    found = torch.ops.fp8dist.scaled_grouped_outer(a.data, b.data, *inverses, a.ends)
    assert found.equal(expected)


def test_what_the_compiler_is_told_of_the_op() -> None:
    a, b = (torch.ones(rows, 64, device="cuda").to(E4M3) for rows in (48, 96))
    inverses = torch.ones(48, device="cuda"), torch.ones(96, device="cuda")
    ends = torch.tensor([64], device="cuda", dtype=torch.int32)
    # The others multiply what they are given, which float8 tensors cannot.
    torch.library.opcheck(
        torch.ops.fp8dist.scaled_grouped_outer.default,
        (a, b, *inverses, ends),
        test_utils=("test_faketensor", "test_autograd_registration"),
    )
