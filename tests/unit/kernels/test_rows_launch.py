"""On a Hopper GPU: products that contract rows of weights have the bits of torch's own kernel."""

import pytest
import torch

from fp8dist.kernels import grouped
from tests.unit.kernels.rows_operands import E4M3, multiplied, multiplied_by_torch, operands_of

if not grouped.HAS_GLUON:
    pytest.skip("needs a Triton whose Gluon is known", allow_module_level=True)

from fp8dist.kernels import rows_launch  # noqa: E402  # where there is Gluon

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]


@pytest.mark.parametrize("k, n", [(16, 16), (48, 32), (304, 400), (768, 2048), (2064, 1040)])
@pytest.mark.parametrize(
    "counts",
    [
        [1],
        [129],
        [5, 0, 12],
        [0, 0, 300],
        [0, 2000, 0],
        [17, 283, 0, 690],
        [17] * 130,
        [300] * 8,
    ],
    ids=lambda counts: f"{len(counts)} of {counts[0]}",
)
def test_multiply_rows(counts: list[int], k: int, n: int) -> None:
    """Programs with many tiles, with one and with none; one step and more than there are places;
    groups that begin anywhere."""
    x = operands_of(counts, k, n)
    assert multiplied(x).equal(multiplied_by_torch(x))


def test_few_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    x = operands_of([300, 0, 1000, 64], 784, 1040)
    expected = multiplied_by_torch(x)
    for programs in 1, 2, 5:
        monkeypatch.setattr(rows_launch, "multiprocessors", lambda device, n=programs: n)
        assert multiplied(x).equal(expected)


def test_rows_of_no_expert_are_left_alone() -> None:
    x = operands_of([30, 70, 100], 64, 48)
    two = x._replace(b=x.b[: 2 * 64], b_inverse=x.b_inverse[:2], ends=x.ends[:2])
    expected = multiplied(two)[:100]
    x.a[100:] = torch.nan
    torch.full((200, 48), 7.0, device="cuda", dtype=torch.bfloat16)  # its memory is taken next
    found = multiplied(two)
    assert found[:100].equal(expected)
    assert not found[100:].isnan().any()
    none = two._replace(a=x.a[:0], a_inverse=x.a_inverse[:0], ends=two.ends * 0)
    assert multiplied(none).shape == (0, 48)


def test_other_experts_do_not_reach_in() -> None:
    """Where steps go beyond the rows of an expert, the next one's are NaN."""
    x = operands_of([64, 64], 48, 32)
    expected = multiplied(x)[:64]
    x.b[48:] = torch.nan
    assert multiplied(x)[:64].equal(expected)


def test_operands_that_lie_anywhere() -> None:
    """Rows with others between them, and at an address that is no multiple of 16."""
    x = operands_of([10, 54], 32, 48)
    wide = torch.zeros(64, 32 + 16, device="cuda").to(E4M3)
    wide[:, :32] = x.a
    flat = torch.zeros(64 * 48 + 1, device="cuda").to(E4M3)
    flat[1:] = x.b.flatten()
    other = x._replace(a=wide[:, :32], b=flat[1:].view(64, 48))
    assert multiplied(other).equal(multiplied(x))


def test_what_the_compiler_is_told_of_the_op() -> None:
    # The others multiply what they are given, which float8 tensors cannot.
    torch.library.opcheck(
        torch.ops.fp8dist.scaled_grouped_mm_rows.default,
        tuple(operands_of([10, 20, 18], 64, 32)),
        test_utils=("test_faketensor", "test_autograd_registration"),
    )
