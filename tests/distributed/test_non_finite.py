"""A rank names the first NaN or Inf that it meets itself, and waits for nobody."""

import math

import pytest
import torch
import torch.distributed as dist

import fp8dist
from tests.distributed.composition import batch_for, sharded
from tests.distributed.composition_axes import AXES
from tests.distributed.harness import run_on_ranks
from tests.distributed.toy import loss_of, warnings_of_the_library


def named(mesh: str, checkpointing: str) -> list[list[str]]:
    """What is told of a step where nothing is bad, and of one with a bad weight."""
    case = {axis: values[0] for axis, values in AXES.items()}
    case |= {"mesh": mesh, "recipe": "rowwise", "checkpointing": checkpointing}
    model = sharded(case)
    told = []
    for bad in (False, True):
        if bad and dist.get_rank() < dist.get_world_size() // 2:  # the first shard's ranks
            with torch.no_grad():
                model.second.layer.norm.weight.to_local()[0] = math.inf
        with warnings_of_the_library() as messages, fp8dist.detect_non_finite(model):
            loss_of(model, batch_for(0, 0, 0, 1)).backward()
        told.append(messages)
    return told


@pytest.mark.parametrize(
    "mesh, checkpointing",
    [("fsdp 2", "full in FSDP"), ("fsdp 2", "full around FSDP"), ("fsdp x tp 2x2", "none")],
)
def test_the_first_is_named(mesh: str, checkpointing: str) -> None:
    world = 2 if mesh == "fsdp 2" else 4
    inside = "" if checkpointing == "none" else "_checkpoint_wrapped_module."
    name = f"the output of second.layer.{inside}norm"
    for nothing, messages in run_on_ranks(world, named, mesh, checkpointing):
        assert nothing == []
        assert [text.partition(" has ")[0] for text in messages] == [name]
