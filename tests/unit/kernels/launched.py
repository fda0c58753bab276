"""What kernels were launched."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def launched() -> Iterator[list[str]]:
    """The names of the Triton kernels that are launched within."""
    from triton.knobs import runtime  # where there is Triton

    names: list[str] = []

    def hook(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    runtime.launch_enter_hook.add(hook)
    try:
        yield names
    finally:
        runtime.launch_enter_hook.remove(hook)
