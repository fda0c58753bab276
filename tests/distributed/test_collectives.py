"""Which collectives a training step issues: one all-reduce for all scales, and no other."""

import math

import pytest
import torch
from expecttest import assert_expected_inline

import fp8dist
from fp8dist.config import RECIPES
from tests.distributed.harness import run_on_ranks
from tests.distributed.toy import (
    DIM,
    HIDDEN,
    RECIPE_NAMES,
    convert,
    local_batch,
    loss_of,
    mesh_of,
    new_model,
    shard,
)
from tests.distributed.wire import Collective, collectives


def step(
    mesh: tuple[int, ...], recipe: str, layers: int, precompute: bool
) -> dict[str, list[Collective]]:
    """The collectives of the second training step, by phase."""
    model = shard(convert(new_model(layers=layers), recipe), mesh_of(*mesh))
    optimizer = torch.optim.AdamW(model.parameters())
    for number in range(2):
        with collectives() as forward:
            loss = loss_of(model, local_batch(number))
        with collectives() as backward:
            loss.backward()
        with collectives() as after:
            optimizer.step()
            optimizer.zero_grad()
            if precompute:
                fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
    return {"forward": forward, "backward": backward, "optimizer step": after}


def text(mesh: tuple[int, ...], recipe: str, precompute: bool) -> str:
    phases, *others = run_on_ranks(math.prod(mesh), step, mesh, recipe, 1, precompute)
    assert others == [phases] * len(others)
    lines = []
    for phase, issued in phases.items():
        lines += [phase, *(f"  {collective}" for collective in issued)]
    return "\n".join(lines)


# Of one block and the root on 2 ranks that shard them: the root's embedding, output and norm have
# 2 * 48 * 128 + 128 = 2 * 6208 elements; the block's 7 weights 163840, one byte each, and its norms
# and bias 384, four bytes each: 163840 / 2 + 4 * 384 / 2 = 82688.


def test_fsdp_step() -> None:
    assert_expected_inline(
        text((2,), "tensorwise", True),
        """\
forward
  all_gather float32[6208] over 2 ranks
  all_gather uint8[82688] over 2 ranks
backward
  all_gather uint8[82688] over 2 ranks
  reduce_scatter AVG float32[164224] over 2 ranks
  reduce_scatter AVG float32[12416] over 2 ranks
optimizer step
  all_reduce MAX int32[7] over 2 ranks""",
    )


def test_hsdp_step() -> None:
    assert_expected_inline(
        text((2, 2), "tensorwise", True),
        """\
forward
  all_gather float32[6208] over 2 ranks
  all_gather uint8[82688] over 2 ranks
backward
  all_gather uint8[82688] over 2 ranks
  reduce_scatter AVG float32[164224] over 2 ranks
  all_reduce AVG float32[82112] over 2 ranks
  reduce_scatter AVG float32[12416] over 2 ranks
  all_reduce AVG float32[6208] over 2 ranks
optimizer step
  all_reduce MAX int32[7] over 2 ranks""",
    )


def test_fsdp_step_without_precompute() -> None:
    assert_expected_inline(
        text((2,), "tensorwise", False),
        """\
forward
  all_gather float32[6208] over 2 ranks
  all_reduce MAX int32[1] over 2 ranks
  all_reduce MAX int32[1] over 2 ranks
  all_reduce MAX int32[1] over 2 ranks
  all_reduce MAX int32[1] over 2 ranks
  all_reduce MAX int32[1] over 2 ranks
  all_reduce MAX int32[1] over 2 ranks
  all_reduce MAX int32[1] over 2 ranks
  all_gather uint8[82688] over 2 ranks
backward
  all_gather uint8[82688] over 2 ranks
  reduce_scatter AVG float32[164224] over 2 ranks
  reduce_scatter AVG float32[12416] over 2 ranks
optimizer step""",
    )


def scales_travel_with_payload(recipe: str, ranks: int) -> bool:
    """As MXFP8's many scales do where every rank has as many rows."""
    return RECIPES[recipe].scale_format == "e8m0" and DIM % ranks == HIDDEN % ranks == 0


@pytest.mark.parametrize("mesh", [(2,), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_precompute_is_one_all_reduce(recipe: str, mesh: tuple[int, ...]) -> None:
    ranks, reduced = mesh[-1], {}
    for layers in (1, 2):
        for phases in run_on_ranks(math.prod(mesh), step, mesh, recipe, layers, True):
            reductions = phases["optimizer step"]
            if scales_travel_with_payload(recipe, ranks):
                assert reductions == []
            else:
                # Over the ranks that shard a weight: each replica of HSDP has the whole.
                (reduction,) = reductions
                assert (reduction.name, reduction.reduction) == ("all_reduce", "MAX")
                assert (reduction.dtype, reduction.ranks) == (torch.int32, ranks)
                reduced[layers] = reduction.numel
            # Per unshard one all-gather, which the scales have none of their own beside.
            assert [c.name for c in phases["forward"]] == ["all_gather"] * (1 + layers)
            gradients = ["reduce_scatter", "all_reduce"] if len(mesh) == 2 else ["reduce_scatter"]
            names = [c.name for c in phases["backward"] if c.name not in gradients]
            assert names == ["all_gather"] * layers
            assert {c.reduction for c in phases["backward"]} == {"", "AVG"}
    if reduced:
        assert reduced[2] == 2 * reduced[1]


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_precompute_of_one_rank_communicates_nothing(recipe: str) -> None:
    assert run_on_ranks(1, step, (1,), recipe, 1, True)[0]["optimizer step"] == []


def parts() -> list[str]:
    """Precompute of two models at once, as pipeline stages give them."""
    models = [shard(convert(new_model(layers=n)), mesh_of(2)) for n in (1, 2)]
    with collectives() as issued:
        fp8dist.precompute_float8_dynamic_scale_for_fsdp(models)
    return [str(collective) for collective in issued]


def test_parts_of_a_model_share_the_all_reduce() -> None:
    assert run_on_ranks(2, parts) == [["all_reduce MAX int32[21] over 2 ranks"]] * 2
