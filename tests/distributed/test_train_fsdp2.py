"""The short script a reader starts from: it stays short, and it trains."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "train_fsdp2.py"


def test_is_under_60_lines() -> None:
    assert len(SCRIPT.read_text().splitlines()) < 60


def test_loss_falls_on_two_ranks() -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    # No GPU: two ranks need two, and the CPU is what every machine has.
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [*launch, "--nproc-per-node", "2", str(SCRIPT)],
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    losses = [float(loss) for loss in re.findall(r"^step \d+  loss (\S+)$", run.stdout, re.M)]
    assert len(losses) == 7, run.stdout
    # From a uniform guess over 256 bytes (5.5 nats) to below the file's own byte frequencies
    # (3.4 nats), which takes learning what follows what.
    assert losses[0] > 5.0
    assert losses[-1] < 2.6
