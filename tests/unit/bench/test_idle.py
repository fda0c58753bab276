"""Idle time, of kernels that were made up."""

import pytest

from tests.unit.bench.program import load_program

idle = load_program("idle")


def test_a_gpu_is_idle_where_no_kernel_runs() -> None:
    """Kernels may overlap, lie within others, and begin before or end after the time asked for."""
    spans = [(0.5, 2.0), (1.5, 3.0), (1.6, 1.7), (3.000009, 4.0), (4.000011, 5.0), (6.0, 9.0)]
    found = idle.idle_between([*spans, (9.5, 10.0)], 1.0, 8.0)
    assert found.time == pytest.approx(7)
    assert found.idle == pytest.approx(1.00002)
    assert found.in_long_gaps == pytest.approx(1.000011)
    before_and_after = idle.idle_between([(2.0, 3.0)], 1.0, 5.0)
    assert before_and_after.idle == before_and_after.in_long_gaps == pytest.approx(3)
    assert idle.idle_between([], 1.0, 5.0).idle == pytest.approx(4)
    assert str(before_and_after) == "3000.00 ms of 4000.0, 3000.00 in long gaps"


def test_of_four_calls_the_second_waits_for_the_host_and_the_last_for_nothing() -> None:
    wait = "cudaDeviceSynchronize"
    host = [(wait, 0, 1), ("cudaLaunchKernel", 1, 2), (wait, 8, 10), (wait, 12, 21)]
    kernels = [(0, 0.2), (0.3, 0.9), (4, 6), (7, 9), (12, 14), (14, 15), (15.5, 17), (17, 20)]
    events = [idle.Event(name, False, *span) for name, *span in host]
    events += [idle.Event("kernel", True, *span) for span in kernels]
    waited, followed = idle.idle_of_calls(reversed(events))
    assert (waited.idle, waited.time) == (5, 9)  # 1 to 4, 6 to 7, 9 to 10
    assert (followed.idle, followed.time) == (0.5, 5)  # of 15 to 20
    with pytest.raises(AssertionError, match="2 kernels of one call, 3 of two"):
        idle.idle_of_calls(events[:-1])
    with pytest.raises(AssertionError, match="1 kernels of one call, 4 of two"):
        idle.idle_of_calls(event for event in events if event.start != 4)
