"""On a GPU: one launch finds the amaxes of all weights, one casts them, and none does in a pass."""

from collections import Counter

import pytest

import fp8dist
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.toy import float8_model, local_batch, loss_of, mesh_of
from tests.unit.kernels.launched import launched

pytestmark = pytest.mark.skipif(DEVICE != "cuda", reason="a CPU launches nothing")

OF_WEIGHTS = {"fill_amaxes_kernel", "cast_kernel", "cast_rows_kernel", "pack_kernel"}


def launches(recipe: str) -> tuple[Counter[str], Counter[str]]:
    """Kernels for weights that precompute launches, and that two microbatches do after it."""
    model = float8_model(mesh_of(1), recipe, layers=3)
    assert sum(isinstance(layer, fp8dist.Float8Linear) for layer in model.modules()) == 21
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
    found = []
    with launched() as names:
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
    found.append(Counter(name for name in names if name in OF_WEIGHTS))
    with launched() as names:
        for microbatch in range(2):
            model.set_requires_gradient_sync(microbatch == 1)
            loss_of(model, local_batch(0, microbatch)).backward()
    assert names, "inputs are cast"
    found.append(Counter(name for name in names if name in OF_WEIGHTS))
    return found[0], found[1]


TWO = {"fill_amaxes_kernel": 1, "cast_kernel": 1}
ROWS = {"cast_rows_kernel": 2}  # one for all weights of a width, of which the toy has two


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("tensorwise", TWO),
        ("rowwise", ROWS),
        ("rowwise_with_gw_hp", ROWS),
        ("blockwise", TWO),
        ("mxfp8_rceil", {"pack_kernel": 1}),
        ("mxfp8_rceil_wgrad_with_hp", {"pack_kernel": 1}),
    ],
)
def test_weights_are_cast_together_and_once(recipe: str, expected: dict[str, int]) -> None:
    """Of 21 weights."""
    assert run_on_ranks(1, launches, recipe) == [(expected, {})]
