"""The collectives that float8 weights cost under tensor parallelism, alone and under FSDP2."""

import contextlib
import math
from typing import Any
from unittest import mock

import torch
from expecttest import assert_expected_inline
from torch.distributed.device_mesh import DeviceMesh

import fp8dist
from fp8dist.tensors import weight_state
from fp8dist.tensors.float8_tensor import Float8Tensor
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.toy import warnings_of_the_library
from tests.distributed.tp_layers import check, mesh_of, new_model, read, unshard
from tests.distributed.wire import collectives


def phases(mesh: tuple[int, ...], recipe: str) -> tuple[str, list[str], Any]:
    """The collectives of some steps, what was warned of, and the weights after the edit."""
    model, lines = new_model(mesh_of(*mesh), recipe), []

    def gather(phase: str) -> dict[str, Float8Tensor]:
        # `local_float8` hides from dispatch modes, the recorder of collectives among them.
        seen = mock.patch.object(weight_state, "_disable_current_modes", contextlib.nullcontext)
        with collectives() as issued, seen:
            weights = unshard(model)
        lines.extend([phase, *(f"  {collective}" for collective in issued)])
        return weights

    with warnings_of_the_library() as messages:
        for phase in ("first precompute", "second precompute"):
            with collectives() as issued:
                fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
            lines += [phase, *(f"  {collective}" for collective in issued)]
        for phase in ("gather", "once more"):
            gather(phase)
            model.reshard() if len(mesh) > 1 else None
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(1.5)
        weights = gather("gather of edited weights")
    return "\n".join(lines), messages, {name: read(w, recipe) for name, w in weights.items()}


def text(mesh: tuple[int, ...], recipe: str, warns: bool = True) -> str:
    results = run_on_ranks(math.prod(mesh), phases, mesh, recipe)
    lines, messages, _ = results[0]
    for rank, (of_rank, warned, edited) in enumerate(results):
        assert of_rank == lines
        assert warned == messages
        assert [message.split(" after")[0] for message in warned] == ["colwise was edited"] * warns
        check(edited, recipe, torch.float32, rank, mesh[-1], 1.5)
    return lines


# Payloads: 512 * 128 / 2 / 2 bytes of each of the layers in the plan, 256 * 128 / 2 of the other.


def test_collectives_of_fsdp_and_tp() -> None:
    assert_expected_inline(
        text((2, 2), "tensorwise"),
        """\
first precompute
  all_reduce MAX int32[3] over 4 ranks
second precompute
  all_reduce MAX int32[3] over 4 ranks
gather
  all_gather uint8[49152] over 2 ranks
once more
  all_gather uint8[49152] over 2 ranks
gather of edited weights
  all_reduce MAX int32[1] over 4 ranks
  all_reduce MAX int32[1] over 4 ranks
  all_reduce MAX int32[1] over 2 ranks
  all_gather uint8[49152] over 2 ranks""",
    )


# Amaxes: of 512 rows and 128 columns or the other way round, and of 256 rows and 128 columns.


def test_collectives_of_fsdp_and_tp_rowwise() -> None:
    assert_expected_inline(
        text((2, 2), "rowwise"),
        """\
first precompute
  all_reduce MAX int32[1664] over 4 ranks
second precompute
  all_reduce MAX int32[1664] over 4 ranks
gather
  all_gather uint8[49152] over 2 ranks
once more
  all_gather uint8[49152] over 2 ranks
gather of edited weights
  all_reduce MAX int32[640] over 4 ranks
  all_reduce MAX int32[640] over 4 ranks
  all_reduce MAX int32[384] over 2 ranks
  all_gather uint8[49152] over 2 ranks""",
    )


# MXFP8's scales travel with the payload: a byte for every 32. Edits cost no collective.


def test_collectives_of_fsdp_and_tp_mxfp8() -> None:
    assert_expected_inline(
        text((2, 2), "mxfp8_rceil", warns=False),
        """\
first precompute
second precompute
gather
  all_gather uint8[50688] over 2 ranks
once more
  all_gather uint8[50688] over 2 ranks
gather of edited weights
  all_gather uint8[50688] over 2 ranks""",
    )


def test_collectives_of_tp_alone() -> None:
    assert_expected_inline(
        text((4,), "tensorwise"),
        """\
first precompute
  all_reduce MAX int32[2] over 4 ranks
second precompute
  all_reduce MAX int32[2] over 4 ranks
gather
once more
gather of edited weights
  all_reduce MAX int32[1] over 4 ranks
  all_reduce MAX int32[1] over 4 ranks""",
    )


def first_gather() -> list[str]:
    """Without any precompute: in forward the ranks of other pipeline stages may be elsewhere."""
    # The ranks in another order than in other tests, which have made their group.
    model = new_model(DeviceMesh(DEVICE, [[0, 2], [1, 3]], mesh_dim_names=("dp", "tp")))
    with collectives() as issued:
        unshard(model)
    return [str(collective) for collective in issued]


def test_a_gather_before_any_precompute_makes_no_group() -> None:
    both = ["all_reduce MAX int32[1] over 2 ranks"] * 2  # along dp, then along tp
    payload = "all_gather uint8[49152] over 2 ranks"
    assert run_on_ranks(4, first_gather) == [[*both, *both, both[0], payload]] * 4
