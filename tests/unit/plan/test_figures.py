"""Bytes by purpose, seconds and the break-even, of steps made up for it."""

import math
from dataclasses import replace

import pytest

from fp8dist.plan.figures import (
    BreakEven,
    Machine,
    break_even,
    purpose,
    seconds,
    sent_by_purpose,
    total_memory,
)
from fp8dist.plan.observe import Collective
from fp8dist.plan.step import Observed, Passes

WEIGHTS = Collective("forward", "all_gather", "", "uint8", "dp_shard", 4)
GRADIENTS = Collective("backward", "reduce_scatter", "AVG", "float32", "dp_shard", 4)
REPLICAS = Collective("backward", "all_reduce", "AVG", "float32", "dp_replicate", 2)
TP = Collective("backward", "all_gather", "", "uint8", "tp", 2)
SCALES = Collective("scales", "all_reduce", "MAX", "int32", "dp_shard", 4)
NORM = Collective("optimizer", "all_reduce", "SUM", "float32", "dp_shard", 4)


def step_of(handed: dict[Collective, int], passes: int = 0) -> Observed:
    return Observed(
        calls=dict.fromkeys(handed, 1),
        handed=handed,
        gathered=0,
        memory={"parameters": 30, "unsharded": 12, "activations": 100},
        passes=Passes(copies=passes, shards=0, operands=0),
        parameters=1,
        microbatches=1,
    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (WEIGHTS, "weights"),
        (replace(WEIGHTS, phase="backward"), "weights"),
        (GRADIENTS, "gradients"),
        (REPLICAS, "gradients"),
        (TP, "activations"),
        (SCALES, "scales"),
        (replace(SCALES, over="tp"), "scales"),
        (replace(SCALES, phase="forward"), "scales"),
        (replace(SCALES, phase="forward", over="tp"), "activations"),  # amaxes of activations
        (NORM, "rest"),
        (replace(NORM, over="tp"), "rest"),
        (replace(NORM, phase="experts"), "rest"),
    ],
)
def test_purpose(kind: Collective, expected: str) -> None:
    assert purpose(kind) == expected


def test_rings() -> None:
    sent = sent_by_purpose(step_of({WEIGHTS: 10, GRADIENTS: 80, REPLICAS: 6, SCALES: 8, TP: 5}))
    # 3 times 10; 3/4 of 80 and twice 1/2 of 6; once 5; twice 3/4 of 8.
    assert sent == {"weights": 30, "gradients": 66, "activations": 5, "scales": 12, "rest": 0}


def test_a_group_of_one_sends_nothing() -> None:
    for operation in ("all_gather", "reduce_scatter", "all_reduce"):
        assert replace(WEIGHTS, operation=operation, ranks=1).sent(100) == 0


def test_seconds() -> None:
    observed = step_of({WEIGHTS: 100, TP: 40}, passes=600)
    one_link = seconds(observed, Machine(link=10, tp_link=None, memory=200))
    assert (one_link.link, one_link.tp_link, one_link.memory) == (34, 0, 3)
    assert one_link.total == 37
    two_links = seconds(observed, Machine(link=10, tp_link=20, memory=200))
    alone = seconds(step_of({replace(SCALES, over="tp", ranks=2): 40}), Machine(10, 20, 200))
    assert (alone.link, alone.tp_link) == (0, 2)
    assert (two_links.link, two_links.tp_link, two_links.memory) == (30, 2, 3)


# The other step sends 300 bytes and needs no passes, at 1 byte per second of memory.
@pytest.mark.parametrize(
    ("handed", "passes", "expected", "text"),
    [
        (50, 0, BreakEven(0, math.inf), "on any link"),
        (50, 10, BreakEven(0, 15), "below 1.5e-08 GB/s"),  # 150 bytes saved, 10 s added
        (100, 0, BreakEven(math.inf, math.inf), "on no link"),
        (120, 1, BreakEven(math.inf, math.inf), "on no link"),
        (120, -4, BreakEven(15, math.inf), "above 1.5e-08 GB/s"),  # 60 bytes more, 4 s less
    ],
)
def test_break_even(handed: int, passes: int, expected: BreakEven, text: str) -> None:
    base, machine = step_of({WEIGHTS: 100}), Machine(link=7, tp_link=None, memory=1)
    found = break_even(step_of({WEIGHTS: handed}, passes), base, machine)
    assert found.above == pytest.approx(expected.above)
    assert found.below == pytest.approx(expected.below)
    assert str(found) == text


def test_on_the_link_of_the_break_even_both_take_the_same_time() -> None:
    base, other = step_of({WEIGHTS: 100, TP: 30}), step_of({WEIGHTS: 50, TP: 20}, passes=700)
    below = break_even(other, base, Machine(link=3, tp_link=9, memory=40)).below
    there = Machine(link=below, tp_link=9, memory=40)
    assert seconds(other, there).total == pytest.approx(seconds(base, there).total)


def test_activations_are_not_in_the_total() -> None:
    assert total_memory(step_of({})) == 42
