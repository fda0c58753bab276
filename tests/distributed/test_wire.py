"""Bytes on the wire: one per padded element of a float8 weight, `param_dtype` for the rest."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from fp8dist import Float8Config
from fp8dist.config import RECIPES
from tests.distributed.harness import run_on_ranks
from tests.distributed.toy import (
    DIM,
    HIDDEN,
    RECIPE_NAMES,
    VOCAB,
    float8_model,
    local_batch,
    loss_of,
    mesh_of,
)
from tests.distributed.wire import collectives

# (rows, elements per row) of a block's parameters and of the root's.
Shapes = Sequence[tuple[int, int]]
BLOCK_WEIGHTS = [(DIM, DIM)] * 4 + [(HIDDEN, DIM)] * 2 + [(DIM, HIDDEN)]
BLOCK_NORMS_AND_BIAS = [(DIM, 1)] * 3
ROOT = [(VOCAB, DIM)] * 2 + [(DIM, 1)]  # embedding, output, norm

# Of the all-gathers of a step, in their order: (bytes that this rank sends, ranks).
Gathers = list[tuple[int, int]]


def padded(shapes: Shapes, ranks: int) -> int:
    """Elements that each rank sends: its rows, padded to those of the first rank."""
    return sum(math.ceil(rows / ranks) * columns for rows, columns in shapes)


def float8_bytes(recipe: str, shapes: Shapes, ranks: int) -> int:
    """One byte per element; MXFP8 adds one per 32 where the ranks' rows are equal in number."""
    sent = padded(shapes, ranks)
    if RECIPES[recipe].scale_format == "e8m0":
        sent += padded([shape for shape in shapes if shape[0] % ranks == 0], ranks) // 32
    return sent


def gathered(
    mesh: tuple[int, ...],
    config: Float8Config,
    policies: list[torch.dtype | None],
    reshard: bool | None = None,
) -> list[tuple[Gathers, Gathers]]:
    """For each param_dtype, the all-gathers of the second forward and of its backward."""
    found = []
    for param_dtype in policies:
        policy = MixedPrecisionPolicy(param_dtype=param_dtype)
        model = float8_model(
            mesh_of(*mesh), config, mp_policy=policy, reshard_after_forward=reshard
        )
        loss_of(model, local_batch(0)).backward()
        with collectives() as forward:
            loss = loss_of(model, local_batch(1))
        with collectives() as backward:
            loss.backward()
        found.append(
            tuple(
                [(c.nbytes, c.ranks) for c in phase if c.name == "all_gather"]
                for phase in (forward, backward)
            )
        )
    return found


# Which dtype the rest is gathered in has nothing to do with who gathers.
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
@pytest.mark.parametrize(
    ("mesh", "policies"),
    [((2,), [None, torch.bfloat16, torch.float32]), ((3,), [torch.bfloat16]), ((2, 2), [None])],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_a_group_moves_one_byte_per_element_of_float8_weights(
    mesh: tuple[int, ...], policies: list[torch.dtype | None], recipe: str
) -> None:
    ranks = mesh[-1]
    expected = []
    for param_dtype in policies:
        itemsize = (param_dtype or torch.float32).itemsize
        block = float8_bytes(recipe, BLOCK_WEIGHTS, ranks)
        block += itemsize * padded(BLOCK_NORMS_AND_BIAS, ranks)
        root = itemsize * padded(ROOT, ranks)
        # The root group stays unsharded until backward.
        forward = [(root, ranks), (block, ranks), (block, ranks)]
        expected.append((forward, [(block, ranks)] * 2))
    results = run_on_ranks(math.prod(mesh), gathered, mesh, Float8Config(recipe), policies)
    assert results == [expected] * math.prod(mesh)


@pytest.mark.parametrize("cache_payload", [True, False])
@pytest.mark.parametrize("reshard", [True, False])
def test_it_does_so_once_per_unshard(reshard: bool, cache_payload: bool) -> None:
    block = padded(BLOCK_WEIGHTS, 2) + 4 * padded(BLOCK_NORMS_AND_BIAS, 2)
    forward = [(4 * padded(ROOT, 2), 2), (block, 2), (block, 2)]
    backward = [(4 * padded(ROOT, 2), 2), (block, 2), (block, 2)] if reshard else []
    config = Float8Config("tensorwise", cache_payload=cache_payload)
    results = run_on_ranks(2, gathered, (2,), config, [None], reshard)
    assert [sorted(phase) for phase in results[0][0]] == [sorted(forward), sorted(backward)]
    assert results[1] == results[0]


def test_high_precision_gather_moves_param_dtype() -> None:
    config = Float8Config("tensorwise", enable_fsdp_float8_all_gather=False)
    block = 2 * padded(BLOCK_WEIGHTS + BLOCK_NORMS_AND_BIAS, 2)
    root = 2 * padded(ROOT, 2)
    results = run_on_ranks(2, gathered, (2,), config, [torch.bfloat16])
    assert results == [[([(root, 2), (block, 2), (block, 2)], [(block, 2)] * 2)]] * 2


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_one_rank_sends_nothing(recipe: str) -> None:
    assert run_on_ranks(1, gathered, (1,), Float8Config(recipe), [None]) == [[([], [])]]
