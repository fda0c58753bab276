"""Known harmless messages are dropped, and nothing else."""

import logging

import pytest

from fp8dist.train.noise import HARMLESS, quiet


@pytest.fixture(autouse=True)
def restore_filters():
    loggers = [logging.getLogger(name) for name in HARMLESS]
    before = [list(logger.filters) for logger in loggers]
    yield
    for logger, filters in zip(loggers, before, strict=True):
        logger.filters[:] = filters


def test_only_the_known_messages_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    quiet()
    logging.getLogger("torchao").warning("Failed to load /x/_C.so: wrong version")
    logging.getLogger("torchao").warning("something else")
    logging.getLogger("torch.utils._pytree").warning("%s is an Enum subclass and so on", "E")
    logging.getLogger("torch.utils._pytree").warning("%s is odd", "tree")
    logging.getLogger("elsewhere").warning("Failed to load data")
    assert caplog.messages == ["something else", "tree is odd", "Failed to load data"]
