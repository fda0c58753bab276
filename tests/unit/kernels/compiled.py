"""What a kernel was compiled to."""

import re
from typing import Any

import torch


def assert_no_calls(kernel: Any) -> None:
    """For a function that might be called ptxas has each product of the tensor cores waited for."""
    compiled, *_ = kernel.device_caches[torch.cuda.current_device()]
    assert compiled
    for known in compiled.values():
        assert "wgmma" in known.asm["ptx"]
        assert not re.search(r"^\s*call", known.asm["ptx"], re.MULTILINE)
