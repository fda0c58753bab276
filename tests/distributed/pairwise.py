"""Cases in which any two values of any two axes meet, far fewer than all combinations."""

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence

Axes = Mapping[str, Sequence[str]]
Case = dict[str, str]
Value = tuple[str, str]  # (axis, value)
Pair = frozenset[Value]  # of two axes


def pair(first: Value, second: Value) -> Pair:
    return frozenset((first, second))


def pairs_of(axes: Axes) -> set[Pair]:
    """Every value of an axis with every value of every other axis."""
    return {
        pair((axis, value), (other, other_value))
        for axis, other in itertools.combinations(axes, 2)
        for value in axes[axis]
        for other_value in axes[other]
    }


def pairs_in(case: Case) -> set[Pair]:
    return {pair(*values) for values in itertools.combinations(case.items(), 2)}


def pairwise(axes: Axes, excluded: Iterable[Pair] = (), tries: int = 8) -> list[Case]:
    """Cases that together hold every pair of values but the excluded, of which they hold none.

    Greedy: each case starts from a pair that is still missing, and takes on every other axis the
    value that adds most missing pairs; of equals the first in the list, where the cheap ones are.
    The same arguments give the same cases.

    Raises:
        AssertionError: a pair that is not excluded is in no possible case.
    """
    forbidden = set(excluded)
    missing = sorted(pairs_of(axes) - forbidden, key=sorted)
    cases: list[Case] = []
    generator = random.Random(0)
    while missing:
        starts = [missing[0], *generator.choices(missing, k=tries - 1)]
        orders = [generator.sample(list(axes), len(axes)) for _ in starts]
        left = set(missing)
        built = [
            _complete(dict(start), axes, order, forbidden, left)
            for start, order in zip(starts, orders, strict=True)
        ]
        possible = [case for case in built if case is not None]
        if built[0] is None and not any(missing[0] in pairs_in(case) for case in possible):
            possible = [
                case
                for _ in range(200)
                if (
                    case := _complete(
                        dict(missing[0]),
                        axes,
                        generator.sample(list(axes), len(axes)),
                        forbidden,
                        left,
                    )
                )
            ]
            if not possible:
                raise AssertionError(f"no case can hold {sorted(missing[0])}: exclude it by name")
        best = max(possible, key=lambda case: len(pairs_in(case) & left))
        cases.append({axis: best[axis] for axis in axes})
        missing = [one for one in missing if one not in pairs_in(best)]
    return cases


def _complete(
    case: Case, axes: Axes, order: list[str], forbidden: set[Pair], missing: set[Pair]
) -> Case | None:
    """The case with a value on every axis, or None if what it has leaves none on some axis."""
    for axis in order:
        if axis in case:
            continue
        best, most = None, -1
        for value in axes[axis]:
            new = {pair((axis, value), taken) for taken in case.items()}
            if new & forbidden:
                continue
            if len(new & missing) > most:
                best, most = value, len(new & missing)
        if best is None:
            return None
        case[axis] = best
    return case
