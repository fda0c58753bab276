"""The address of a wrapper tensor: that of what it wraps, and for torch's own copying none."""

import functools
import threading
from collections.abc import Callable
from typing import Any

# [Note: addresses]
# A tensor subclass that wraps another has no storage, and its `data_ptr` is 0. accelerate tells
# parameters apart by their addresses, so that of all with 0 one would be left to the optimizer. But
# torch copies and pickles a tensor as a wrapper if its address is 0.


class _State(threading.local):
    hidden = False


_state = _State()


def hidden() -> bool:
    """Whether addresses are 0, in a method of `without_address`."""
    return _state.hidden


def without_address(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, in which a wrapper's address is 0; see [Note: addresses]."""

    @functools.wraps(method)
    def hiding(*args: Any) -> Any:
        before, _state.hidden = _state.hidden, True
        try:
            return method(*args)
        finally:
            _state.hidden = before

    return hiding
