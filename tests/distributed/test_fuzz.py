"""A quick set of the random cases; `scripts/fuzz.py` runs as many as wanted."""

import pytest
from hypothesis import HealthCheck, example, given, settings

from tests.distributed import fuzz
from tests.distributed.fuzz import FuzzCase, cases, failure_of
from tests.distributed.harness import DEVICE, UNDER_TORCHRUN

pytestmark = [
    pytest.mark.skipif(UNDER_TORCHRUN, reason="cases say how many ranks they need"),
    pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's matmul of other strides rounds otherwise"),
]


@settings(
    max_examples=20,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(case=cases())
# Its backward operand is not what high precision would be cast to.
@example(case=FuzzCase("rowwise", sizes=(73, 10, 3, 3), tokens=6, bias=True, exponent=3))
def test_random_cases(case: FuzzCase) -> None:
    # A failure shrinks to a case that can be pasted: scripts/fuzz.py --case "FuzzCase(...)"
    assert failure_of(case) is None


def test_a_wrong_gather_is_found() -> None:
    """The comparison sees what it is to see: a reference that is another."""
    case = FuzzCase(mesh=(2,), sizes=(32, 48, 16), tokens=5)
    assert failure_of(case) is None
    found = fuzz.run_on_ranks(2, run_with_other_weights, case)
    assert all("the loss is" in text for text in found)


def run_with_other_weights(case: FuzzCase) -> str | None:
    original = fuzz.full
    fuzz.full = lambda tensor: original(tensor) * 1.25  # of what is copied to the reference
    try:
        return fuzz._run(case)
    finally:
        fuzz.full = original
