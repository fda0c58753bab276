"""Memory is there within `with`, for all views, and not after it."""

import pytest
import torch

from fp8dist.buffer import Buffer


@pytest.mark.parametrize("sizes", [[3, 0, 5], [], [0]])
def test_parts_are_of_the_buffer(sizes: list[int]) -> None:
    buffer = Buffer(sizes, torch.device("cpu"))
    assert [part.numel() for part in buffer.parts] == sizes
    storage = buffer.whole.untyped_storage()
    assert storage.nbytes() == 0
    for _ in range(2):
        with buffer:
            assert storage.nbytes() == 4 * sum(sizes)
            for i, part in enumerate(buffer.parts):
                part.fill_(i)
            expected = [float(i) for i, size in enumerate(sizes) for _ in range(size)]
            assert buffer.whole.tolist() == expected
        assert storage.nbytes() == 0


def test_views_are_of_the_memory_that_is_there_then() -> None:
    buffer = Buffer([2, 6], torch.device("cpu"))
    with buffer:
        view = buffer.parts[1].view(2, 3)[:, 1:]
    in_the_way = torch.empty_like(buffer.whole)
    with buffer:
        buffer.whole.copy_(torch.arange(8.0))
        assert view.tolist() == [[3, 4], [6, 7]]
    assert in_the_way.numel() == 8


def test_memory_is_given_back_after_an_error() -> None:
    buffer = Buffer([4], torch.device("cpu"))
    with pytest.raises(ValueError, match="no"), buffer:
        raise ValueError("no")
    assert buffer.whole.untyped_storage().nbytes() == 0
