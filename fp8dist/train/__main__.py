"""`torchrun ... -m fp8dist.train [--compare] [--section.key value ...]`: run a training job."""

import logging
import os
import signal
import sys

from fp8dist.train.noise import quiet

quiet()

# E402: torchao, which these import, is to be quiet by then.
import torch.distributed as dist  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import record  # noqa: E402

from fp8dist.train.compare import compare  # noqa: E402
from fp8dist.train.config import JobConfig, parse_config  # noqa: E402
from fp8dist.train.distributed import agree, init_distributed  # noqa: E402
from fp8dist.train.loop import Trainer  # noqa: E402

COMPARE = "--compare"
COMPARE_HELP = f"""\
{COMPARE}: train twice on the same data, unconverted and in float8, and draw both loss curves in
one picture with the bytes on the wire. It goes with all of these:
"""


def set_up_logging() -> None:
    """Rank 0 tells what happens; the other ranks speak only of errors."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("fp8dist")
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)


@record
def main() -> None:
    """Parse the command line, join the other ranks, train.

    Raises:
        ValueError: on every rank, naming what was found and what to do.
    """
    set_up_logging()
    arguments = [argument for argument in sys.argv[1:] if argument != COMPARE]
    if {"--help", "-h"}.intersection(arguments):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nothing to say when `| head` has enough
        print(COMPARE_HELP)
    job, error = JobConfig(), None
    try:
        job = parse_config(arguments)
    except ValueError as caught:
        # Raised below: a file may be missing on one machine only, and the others wait for it.
        error = caught

    def raise_error() -> None:
        if error is not None:
            raise error

    device = init_distributed(job)
    agree(raise_error)
    if COMPARE in sys.argv[1:]:
        compare(job, device)
    else:
        Trainer(job, device).train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
