"""What the collectives of tensor parallelism send, by kind."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

# How many times what a rank hands over it sends to its neighbour in a ring of n ranks. What an
# all-gather is handed is a rank's part, what the others are handed is of the size of the whole.
_SENT = {
    "all_gather_into_tensor": lambda n: n - 1,
    "reduce_scatter_tensor": lambda n: (n - 1) / n,
    "all_reduce": lambda n: 2 * (n - 1) / n,
}


class _Recorder(TorchDispatchMode):
    def __init__(self, sent: Counter[str]) -> None:
        super().__init__()
        self.sent = sent

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # a subclass first makes of it what it sends
        name = func._schema.name.removeprefix("_c10d_functional::")
        if func.namespace == "_c10d_functional" and name in _SENT:
            given = [argument.name for argument in func._schema.arguments]
            named = dict(zip(given, args, strict=False)) | (kwargs or {})
            ranks = _resolve_process_group(named["group_name"]).size()
            input = named["input"]
            kind = f"{name.split('_into')[0].split('_tensor')[0]} {input.dtype}"
            times = _SENT[name](ranks)
            self.sent[kind.replace("torch.", "")] += round(times * input.numel() * input.itemsize)
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded() -> Iterator[Counter[str]]:
    """Bytes that this rank sends while it is open, were each collective a ring, by its kind: name
    and dtype. Of functional collectives, which are those of tensor parallelism, run eagerly.
    """
    sent: Counter[str] = Counter()
    with _Recorder(sent):
        yield sent
