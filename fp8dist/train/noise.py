"""Keeping known, harmless messages of other packages off the screen."""

import logging

# torchao tries extensions built for other hardware and Python versions, and registers enums in
# a way that torch 2.13 calls deprecated. Compiled selective checkpointing asks for blocks without
# in-place operations, and the model's have none. None of this says anything about the job.
HARMLESS = {
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    "torch.utils._pytree": ("%s is an Enum subclass",),
    "torch._higher_order_ops.wrap": ("\nDetected that context_fn is passed",),
}


def quiet() -> None:
    """Drop the messages in `HARMLESS`; call it before the first import of torchao."""
    for name, beginnings in HARMLESS.items():
        logging.getLogger(name).addFilter(_DropMessages(beginnings))


class _DropMessages(logging.Filter):
    def __init__(self, beginnings: tuple[str, ...]):
        super().__init__()
        self._beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self._beginnings)
