"""From which message and up to which link float8 is a net win, from lines that are known."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.bench.program import load_program

break_even = load_program("break_even")
Gain, Line = break_even.Gain, break_even.Line
COLUMNS = 1024


def row(variant: str, n: int, on_device: float, collective_bytes: float, link: float) -> Any:
    return SimpleNamespace(
        variant=variant,
        n=n,
        k=COLUMNS,
        on_device=on_device,
        collective_bytes=collective_bytes,
        collective=20e-6 + collective_bytes / link,
    )


def rows(link: float, float8_fixed: float, float8_slope: float) -> list[Any]:
    """bf16 with 10 µs and 1 ps per element, two ranks, and float8 with other costs."""
    sizes = [(n, n * COLUMNS) for n in (256, 1024, 8192)]
    plain = [row("bf16", n, 10e-6 + 1e-12 * e, e, link) for n, e in sizes]
    return plain + [
        row("fp8dist:rowwise", n, float8_fixed + float8_slope * e, e / 2, link) for n, e in sizes
    ]


def test_a_line_is_found_again() -> None:
    xs = [1.0, 10.0, 1000.0]
    line = Line.fit(xs, [3 + 0.5 * x for x in xs])
    assert (line.fixed, line.slope) == pytest.approx((3, 0.5))


def test_small_messages_count_as_much_as_large_ones() -> None:
    # Off by 10 % at the largest: without weights the line would miss the smallest by far more.
    line = Line.fit([1.0, 2.0, 1000.0], [11.0, 12.0, 1.1 * 1010.0])
    assert line.fixed + line.slope == pytest.approx(11, rel=0.05)


def test_costs_and_the_link_are_read_off_the_rows() -> None:
    measured = rows(link=5e9, float8_fixed=40e-6, float8_slope=3e-12)
    assert break_even.link_of(measured) == pytest.approx(5e9)
    gain = break_even.gains(measured)["fp8dist:rowwise"]
    assert (gain.added.fixed, gain.added.slope) == pytest.approx((30e-6, 2e-12))
    assert gain.saved_bytes == pytest.approx(0.5)
    # Half a byte less per element, for 2 ps more: even at 250 GB/s.
    assert gain.fastest_link == pytest.approx(250e9)


@pytest.mark.parametrize(
    ("fixed", "slope", "link", "expected"),
    [
        # 0.5 bytes at 1 GB/s: 500 ps saved per element.
        (30e-6, 2e-12, 1e9, (30e-6 / 498e-12, math.inf)),
        (30e-6, 2e-12, 250e9, (math.inf, math.inf)),
        (30e-6, 2e-12, 1e12, (math.inf, math.inf)),
        (-30e-6, 2e-12, 1e9, (0, math.inf)),
        (-30e-6, 2.5e-12, 1e12, (0, 15e6)),
        (30e-6, -1e-12, 1e12, (20e6, math.inf)),
        (-30e-6, -1e-12, 1e12, (0, math.inf)),
    ],
)
def test_float8_wins_where_the_link_saves_more_than_the_device_adds(
    fixed: float, slope: float, link: float, expected: tuple[float, float]
) -> None:
    gain = Gain(Line(fixed, slope), 0.5)
    smallest, largest = gain.elements(link)
    assert (smallest, largest) == pytest.approx(expected)

    def wins(elements: float) -> bool:
        return fixed + slope * elements < 0.5 * elements / link

    for elements in (1e3, 1e5, 1e6, 1e7, 1e8):
        assert wins(elements) == (smallest < elements < largest)


def test_without_more_work_on_the_device_every_link_gains() -> None:
    assert Gain(Line(30e-6, -1e-12), 0.5).fastest_link == math.inf


def test_the_table_says_it_in_megabytes_of_bfloat16() -> None:
    table = break_even.break_even_table(rows(link=5e9, float8_fixed=40e-6, float8_slope=3e-12))
    header, _, line = table.splitlines()
    assert "here, 5.00 GB/s" in header
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    elements = 30e-6 / (0.5 / 5e9 - 2e-12)
    assert cells[0] == "fp8dist:rowwise"
    assert cells[1] == f"from {2 * elements / 1e6:.2f}"
    assert cells[-2:] == ["none", "250.0 GB/s"]
