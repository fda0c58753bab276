"""Every layout of inputs and outputs, for both styles; what redistributing a DTensor sends."""

import copy
import itertools
import math

import pytest
import torch.nn as nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from fp8dist import Float8ColwiseParallel, Float8RowwiseParallel
from fp8dist.config import RECIPES
from fp8dist.tensors.float8_activation import Float8Activation, cast_activation
from tests.distributed.harness import run_on_ranks
from tests.distributed.tp_block import batch, block_of, least_db, sqnr, tp_mesh
from tests.distributed.wire import collectives

LAYOUTS = [Shard(0), Shard(1), Shard(-1), Replicate()]
STYLES = {"wq": Float8ColwiseParallel, "wo": Float8RowwiseParallel}


def results(recipe: str, layer: str) -> dict[str, float]:
    """The least SQNR of output and gradients, against one device, by what comes and what goes."""
    mesh, found = tp_mesh(), {}
    for i, j in itertools.product(range(4), repeat=2):
        comes, goes = LAYOUTS[i], LAYOUTS[j]
        flat, as_dtensor = (i + j) % 2 == 1, (i // 2 + j) % 2 == 1  # with each output all four
        x, grad = (batch(seed).flatten(0, 1) if flat else batch(seed) for seed in (1, 2))
        model = nn.Sequential(getattr(block_of(recipe).attention, layer))
        alone, whole_x = copy.deepcopy(model), x.clone().requires_grad_()
        expected = alone(whole_x)
        expected.backward(grad)

        layouts = {"input_layouts": comes, "output_layouts": goes}
        style = STYLES[layer](**layouts, use_local_output=not as_dtensor)
        parallelize_module(model, mesh, {"0": style})
        mine = distribute_tensor(x, mesh, [comes], src_data_rank=None)
        mine = (mine if as_dtensor else mine.to_local()).detach().clone().requires_grad_()
        output = model(mine)
        assert isinstance(output, DTensor) == as_dtensor
        grad = distribute_tensor(grad, mesh, [goes], src_data_rank=None)
        output.backward(grad if as_dtensor else grad.to_local())

        pairs = [(output.detach(), goes, expected), (mine.grad, comes, whole_x.grad)]
        pairs += [
            (parameter.grad, Replicate(), other.grad)
            for parameter, other in zip(model.parameters(), alone.parameters(), strict=True)
        ]
        for got, layout, want in pairs:
            if not isinstance(got, DTensor):
                got = DTensor.from_local(got, mesh, [layout], run_check=False)
            kind = f"{comes} to {goes}, {flat=} {as_dtensor=}"
            found[kind] = min(found.get(kind, math.inf), sqnr(got.full_tensor(), want))
    return found


@pytest.mark.parametrize("layer", STYLES)
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_any_layout_comes_and_goes(recipe: str, layer: str) -> None:
    for found in run_on_ranks(2, results, recipe, layer):
        assert len(found) == 16
        assert not {kind: db for kind, db in found.items() if not db > least_db(recipe)}


def redistributed(recipe: str, flat: bool, dim: int) -> tuple[list[str], bool, bool]:
    """What is sent, whether it is float8 still, and of the value that was cast."""
    mesh, how = tp_mesh(), RECIPES[recipe]
    x = distribute_tensor(
        batch(1).flatten(0, 1) if flat else batch(1), mesh, [Shard(dim)], src_data_rank=None
    )
    args = (how.input, how.input_dtype, how.scale_format, mesh.get_group().group_name)
    local = cast_activation(x.to_local().contiguous(), *args)
    cast = DTensor.from_local(local, mesh, [Shard(dim)], run_check=False)
    with collectives() as issued:
        whole = cast.redistribute(placements=[Replicate()]).to_local()
    value = DTensor.from_local(local.dequantize(), mesh, [Shard(dim)], run_check=False)
    same = (whole.dequantize() == value.full_tensor()).all().item()
    return [str(collective) for collective in issued], isinstance(whole, Float8Activation), same


SCALES = {
    "tensorwise": [],
    "rowwise": ["float32[64]"],
    "blockwise": ["float32[256]"],
    "mxfp8_rceil": ["uint8[1024]"],
}


@pytest.mark.parametrize(("flat", "dim"), [(False, 0), (False, 1), (True, 0)])
@pytest.mark.parametrize("recipe", SCALES)
def test_a_dtensor_of_float8_is_sent_as_its_bytes(recipe: str, flat: bool, dim: int) -> None:
    sent = [f"all_gather {what} over 2 ranks" for what in ["uint8[32768]", *SCALES[recipe]]]
    for found in run_on_ranks(2, redistributed, recipe, flat, dim):
        assert found == (sent, True, True)
