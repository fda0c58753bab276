"""Float8 gathers combined with all that FSDP2 offers, pairwise, against one process without FSDP2.

Losses and gradients of every step are compared, what the optimizer makes of them, and losses of
evaluation. What arrives is float8, and is scaled by what precompute has computed.
"""

import itertools
import math

import pytest
import torch

from tests.distributed.composition import (
    LEARNING_RATE,
    MAX_NORM,
    SLOWLY_TRAINED,
    Step,
    run,
    world_of,
)
from tests.distributed.composition_axes import AXES, EXCLUDED, UNAVAILABLE
from tests.distributed.composition_reference import Reference
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.pairwise import Axes, Case, Pair, pair, pairs_in, pairs_of, pairwise

AVAILABLE: Axes = {
    axis: [value for value in values if (axis, value) not in UNAVAILABLE]
    for axis, values in AXES.items()
}
CASES = pairwise(AVAILABLE, EXCLUDED)


def ident(case: Case) -> str:
    """The values that are not the first of their axis."""
    told = [value for axis, value in case.items() if value != AXES[axis][0]]
    return f"{CASES.index(case)} {', '.join(told)}"


# By the number of a case that was asked for: "" if it has passed, or why it has not run.
outcomes: dict[int, str] = {}


@pytest.mark.parametrize("case", CASES, ids=ident)
def test_composes(case: Case) -> None:
    number = CASES.index(case)
    outcomes[number] = "failed"
    try:
        by_rank = run_on_ranks(world_of(case), run, case)
    except pytest.skip.Exception as skipped:  # another number of ranks was started
        outcomes[number] = str(skipped)
        raise
    reference = Reference(case)
    for step, whole in enumerate(by_rank[0]):
        check_step(case, reference, step, whole, [steps[step] for steps in by_rank])
    outcomes[number] = ""


def check_step(
    case: Case, reference: Reference, number: int, whole: Step, by_rank: list[Step]
) -> None:
    """One step of the ranks; `whole` is that of rank 0, which has weights and gradients."""
    loss_tolerance, gradient_tolerance = tolerances(case)
    losses, gradients, norm = reference.losses_and_gradients(number, whole.before)
    tp = len(by_rank) // reference.ranks
    for rank, step in enumerate(by_rank):
        assert all(math.isfinite(loss) for loss in step.losses)
        assert step.losses == pytest.approx(losses[rank // tp], abs=loss_tolerance), (number, rank)
    assert whole.gradients.keys() == gradients.keys()
    for name, expected in gradients.items():
        assert expected.norm() > 0, name
        error = (whole.gradients[name].float() - expected).norm() / expected.norm()
        assert error.item() <= gradient_tolerance, (number, name)
    if case["clipping"] == "by norm":
        assert norm > MAX_NORM
        assert [step.norm for step in by_rank] == pytest.approx(
            [norm] * len(by_rank), rel=gradient_tolerance
        )
    if case["optimizer"] == "8 bits":
        for step, after in zip(by_rank, reference.shards_after(by_rank), strict=True):
            assert step.shard[2].equal(after) and not after.equal(step.shard[0]), number
    for name, expected in reference.weights_after(whole).items():
        error = (whole.after[name].float() - expected.float()).abs().max().item()
        assert error <= weight_tolerance(case, name, expected), (number, name)
        # A step may be too small for bfloat16, but not everywhere in a large weight.
        if name not in gradients or expected.dim() == 2:
            assert whole.after[name].equal(whole.before[name]) == (name not in gradients)
    if case["evaluation"] != "none":
        evaluated = reference.evaluation(number, whole.after)
        for rank, step in enumerate(by_rank):
            assert step.evaluation == pytest.approx(evaluated[rank // tp], abs=loss_tolerance)
    for step in by_rank:
        check_gathers(case, number, step)


def check_gathers(case: Case, number: int, step: Step) -> None:
    """Float8 weights are gathered as such, and scales are computed at a gather only where nobody
    has called precompute."""
    assert step.arrived and set(step.arrived.values()) == {"Float8Tensor"}, (number, step.arrived)
    if case["precompute"] == "call" or (case["precompute"] == "hook" and number > 0):
        assert step.computed == [], number
    elif number == 0:
        assert set(step.computed) == step.arrived.keys()
    else:
        assert step.computed, number


def tolerances(case: Case) -> tuple[float, float]:
    """Of losses, absolute; of gradients, of the norm of the difference to that of the whole."""
    low = "bfloat16" in case["dtype"]
    if "tp" in case["mesh"] or DEVICE != "cpu":
        # The sums over parts of rows are added up in another order, and so are a GPU's of operands
        # that lie otherwise in memory. Where that moves an amax past a power of two, its block is
        # rounded by twice or half the step, of 1/16. In bfloat16 the parts are rounded before:
        # activations differ by 1/256, and many round to a neighbour in float8, which is 1/8 away,
        # or in tensorwise gradients 1/4: noise like the recipe's own. In float32 few elements do,
        # of which one moves a loss, a mean over tens of tokens of sums over tens of features, by
        # about 1e-5 (seen on a GPU: 1.3e-5).
        return (2e-2, 0.15) if low else (5e-5, 1e-2)
    # Losses are sums of the same numbers in the same order; a compiler may reorder, at float32's
    # last bits of a loss of 4 (5e-7).
    # Gradients are averaged over ranks in another order, after which up to three roundings to
    # bfloat16, of 1/256 each, may go the other way. In float32 a sum that differs in the last bits
    # may round an element of float8 to its neighbour: 1/16 of one of 100 products.
    return (1e-6, 1.2e-2) if low else (1e-6, 1e-3)


def weight_tolerance(case: Case, name: str, weight: torch.Tensor) -> float:
    """Absolute. Otherwise than here, the same operations are done on each element."""
    if name == SLOWLY_TRAINED and case["optimizer"] == "compiled":
        # It keeps in float32 what else is rounded to bfloat16, and what else is a number of Python:
        # a step differs by less than 1e-4 of itself, and by last bits of the largest weight.
        last_bits = 4 * torch.finfo(weight.dtype).eps * weight.abs().max().item()
        return 1e-4 * LEARNING_RATE + last_bits
    return 0.0


def test_every_pair_is_covered(capsys: pytest.CaptureFixture[str]) -> None:
    by_design = {one for case in CASES for one in pairs_in(case)}
    not_here = {one for one in pairs_of(AXES) if one & UNAVAILABLE.keys()}
    assert pairs_of(AXES) - by_design == EXCLUDED.keys() | not_here
    assert all(EXCLUDED.values()) and all(UNAVAILABLE.values())
    # Of the cases that this run was asked for, a pair is covered by one that has passed.
    asked = {one for number in outcomes for one in pairs_in(CASES[number])}
    passed = {one for n, why in outcomes.items() if not why for one in pairs_in(CASES[n])}
    reasons = {
        one: why
        for n, why in outcomes.items()
        if why and why != "failed"
        for one in pairs_in(CASES[n])
    }
    with capsys.disabled():
        print("\n" + "\n".join(report(passed, reasons)))
    missing = asked - passed - reasons.keys()
    assert not missing, sorted(sorted(one) for one in missing)


def report(passed: set[Pair], reasons: dict[Pair, str]) -> list[str]:
    """Pairs of each two axes: covered of all; then what is not, and why."""
    lines = [f"{len(passed)} of {len(pairs_of(AXES))} pairs covered by {len(outcomes)} cases"]
    for first in AXES:
        counts = []
        for second in list(AXES)[list(AXES).index(first) + 1 :]:
            both = pairs_of({axis: AXES[axis] for axis in (first, second)})
            counts.append(f"{second} {len(both & passed)}/{len(both)}")
        if counts:
            lines.append(f"  {first} with {', '.join(counts)}")
    why_not = {**{one: reasons[one] for one in reasons if one not in passed}, **EXCLUDED}
    lines += [f"  not here, {why}: {axis} {value}" for (axis, value), why in UNAVAILABLE.items()]
    for reason in sorted(set(why_not.values())):
        pairs = [one for one, why in why_not.items() if why == reason]
        shown = "; ".join(" x ".join(f"{a}: {v}" for a, v in sorted(one)) for one in pairs[:3])
        more = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
        lines.append(f"  not covered, {reason}: {shown}{more}")
    return lines


TOY: Axes = {"a": ["1", "2", "3"], "b": ["1", "2"], "c": ["1", "2"], "d": ["1", "2", "3", "4"]}


def test_pairwise_meets_every_pair_and_no_excluded_one() -> None:
    excluded = {pair(("a", "1"), ("d", "4")), pair(("b", "2"), ("c", "2"))}
    cases = pairwise(TOY, excluded)
    met = {one for case in cases for one in pairs_in(case)}
    every = {
        frozenset({(first, x), (second, y)})
        for first, second in itertools.combinations(TOY, 2)
        for x in TOY[first]
        for y in TOY[second]
    }
    assert met == every - excluded
    assert all(case.keys() == TOY.keys() for case in cases)
    # 3 x 4 values of the two longest axes need as many cases; all combinations are 48.
    assert 11 <= len(cases) <= 16
    assert cases == pairwise(TOY, excluded)


def test_pairwise_names_a_pair_that_no_case_can_hold() -> None:
    excluded = {pair(("a", "1"), ("b", value)) for value in TOY["b"]}
    with pytest.raises(AssertionError, match=r"\('a', '1'\)"):
        pairwise(TOY, excluded)
