"""The short script a reader starts from: it stays short, and it trains."""

import re

from tests.distributed import programs
from tests.environment import ROOT

SCRIPT = ROOT / "scripts" / "train_fsdp2.py"


def test_is_under_60_lines() -> None:
    assert len(SCRIPT.read_text().splitlines()) < 60


def test_loss_falls_on_two_ranks() -> None:
    run = programs.run(SCRIPT, ranks=2, fork=False)  # as a reader starts it
    assert run.returncode == 0, run.stderr
    losses = [float(loss) for loss in re.findall(r"^step \d+  loss (\S+)$", run.stdout, re.M)]
    assert len(losses) == 4, run.stdout
    # From a uniform guess over 256 bytes (5.5 nats) to below the file's own byte frequencies
    # (3.4 nats), which takes learning what follows what.
    assert losses[0] > 5.0
    assert losses[-1] < 2.6
