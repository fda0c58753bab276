import pytest
import torch

from fp8dist import hardware


@pytest.fixture
def hopper() -> None:
    if not hardware.has_hopper_units(torch.device("cuda")):
        pytest.skip("needs a GPU of compute capability 9.0")
