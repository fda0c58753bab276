"""What the communication backend is handed, recorded below all of Python's layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from fp8dist.tensors.float8_activation import Float8Activation

_NAMES = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
}


@dataclass(frozen=True)
class Collective:
    """One collective, by what this rank contributes to it."""

    name: str
    reduction: str  # "" for those that reduce nothing
    dtype: torch.dtype
    numel: int
    ranks: int  # of its group

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        operation = f"{self.name} {self.reduction}".strip()
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{operation} {dtype}[{self.numel}] over {self.ranks} ranks"


class _Recorder(TorchDispatchMode):
    def __init__(self, collectives: list[Collective]) -> None:
        super().__init__()
        self.collectives = collectives

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if args and isinstance(args[0], Float8Activation):
            with self:  # what is sent are the tensors inside
                return Float8Activation.__torch_dispatch__(func, types, args, kwargs)
        # The operators that hand tensors to NCCL or gloo, and their functional kind.
        if func.namespace == "c10d":
            self.collectives.append(_read(func, args))
        elif func.namespace == "_c10d_functional" and len(func._schema.arguments) > 1:
            self.collectives.append(_read_functional(func, args))
        return func(*args, **(kwargs or {}))


def _read(func: Any, args: tuple[Any, ...]) -> Collective:
    # By the names in its schema: `input_tensor(s)` is what this rank sends, `tensors` is both
    # what it sends and what it receives.
    given = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False))
    sent = given.get("input_tensor", given.get("input_tensors", given.get("tensors")))
    sent = sent if isinstance(sent, list) else [sent]
    if len(sent) != 1 or not isinstance(sent[0], torch.Tensor):
        raise AssertionError(f"a collective of an unknown kind: {func._schema}")
    reduction = ""
    if "reduce_op" in given:
        reduction = dist.ReduceOp.RedOpType(given["reduce_op"].op()).name
    name = func._schema.name.removeprefix("c10d::")
    ranks = dist.ProcessGroup.unbox(given["process_group"]).size()
    return Collective(_NAMES.get(name, name), reduction, sent[0].dtype, sent[0].numel(), ranks)


def _read_functional(func: Any, args: tuple[Any, ...]) -> Collective:
    given = dict(zip([argument.name for argument in func._schema.arguments], args, strict=True))
    names = {
        "all_gather_into_tensor": "all_gather",
        "reduce_scatter_tensor": "reduce_scatter",
        "all_reduce": "all_reduce",
    }
    name = names[func._schema.name.removeprefix("_c10d_functional::")]
    ranks = _resolve_process_group(given["group_name"]).size()
    sent, reduction = given["input"], given.get("reduce_op", "").upper()
    return Collective(name, reduction, sent.dtype, sent.numel(), ranks)


@contextmanager
def collectives() -> Iterator[list[Collective]]:
    """Records the collectives of this rank while it is open, in their order."""
    recorded: list[Collective] = []
    with _Recorder(recorded):
        yield recorded
