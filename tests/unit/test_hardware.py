"""What counts as hardware with float8 matmuls, and what is said where there is none."""

import logging
import sys
from collections.abc import Iterator

import pytest
import torch

from fp8dist import hardware
from fp8dist.config import RECIPES

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TENSORWISE = RECIPES["tensorwise"]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Answers are remembered for the life of a process."""
    for cached in (hardware._capability, hardware._has_float8_casts, hardware._log_emulation):
        cached.cache_clear()
    yield
    for cached in (hardware._capability, hardware._has_float8_casts, hardware._log_emulation):
        cached.cache_clear()


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, tuple[int, int]]]:
    """The compute capability of each CUDA device, to be filled in."""
    by_index: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr(torch.cuda, "get_device_capability", by_index.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100")
    monkeypatch.setattr(torch.version, "hip", None)
    yield by_index


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ((7, 5), False),
        ((8, 0), False),
        ((8, 6), False),
        ((8, 9), True),
        ((9, 0), True),
        ((10, 0), True),
        ((12, 0), True),
    ],
)
def test_float8_matmul_by_capability(
    capability: dict[int, tuple[int, int]], found: tuple[int, int], expected: bool
) -> None:
    capability[0] = found
    assert hardware.has_matmul(CUDA, TENSORWISE) is expected
    assert hardware.multiplies(CUDA, TENSORWISE, emulate=False) is expected


def test_maxima_of_pairs_are_of_hopper_and_newer(
    capability: dict[int, tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    capability.update(enumerate([(8, 9), (9, 0), (10, 0)]))
    devices = [CPU, *(torch.device("cuda", index) for index in capability)]
    assert [hardware.has_maxima_of_pairs(x) for x in devices] == [False, False, True, True]
    monkeypatch.setattr(torch.version, "hip", "6.4")  # whose capability (9, 4) is another's
    assert not hardware.has_maxima_of_pairs(devices[2])


def test_hopper_units_are_those_of_one_capability(
    capability: dict[int, tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    capability.update(enumerate([(8, 9), (9, 0), (10, 0), (12, 0)]))
    devices = [CPU, *(torch.device("cuda", index) for index in capability)]
    assert [hardware.has_hopper_units(x) for x in devices] == [False, False, True, False, False]
    monkeypatch.setattr(torch.version, "hip", "6.0")  # where (9, 0) is another device
    assert not hardware.has_hopper_units(devices[2])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # The first and last compute capability whose float8 units take the recipe's scales.
        ("tensorwise", {(8, 9), (9, 0), (10, 0), (12, 0)}),
        ("rowwise", {(8, 9), (9, 0), (10, 0), (12, 0)}),
        ("rowwise_with_gw_hp", {(8, 9), (9, 0), (10, 0), (12, 0)}),
        ("blockwise", {(9, 0)}),
        ("mxfp8_rceil", {(10, 0), (12, 0)}),
        ("mxfp8_rceil_wgrad_with_hp", {(10, 0), (12, 0)}),
    ],
)
def test_every_recipe_has_its_hardware(
    capability: dict[int, tuple[int, int]], name: str, expected: set[tuple[int, int]]
) -> None:
    all_of_them = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]
    capability |= dict(enumerate(all_of_them))
    found = {
        one
        for i, one in enumerate(all_of_them)
        if hardware.has_matmul(torch.device("cuda", i), RECIPES[name])
    }
    assert found == expected


@pytest.mark.parametrize(
    ("name", "expected"), [("rowwise", {(9, 0), (10, 0)}), ("mxfp8_rceil", {(10, 0), (10, 3)})]
)
@pytest.mark.parametrize("torchao", [True, False])
def test_grouped_matmuls(
    capability: dict[int, tuple[int, int]],
    name: str,
    expected: set[tuple[int, int]],
    torchao: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MXFP8's scales are arranged by torchao."""
    all_of_them = [(8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
    capability |= dict(enumerate(all_of_them))
    monkeypatch.setattr(hardware, "_torchao_arranges_scales", lambda: torchao)
    found = {
        one
        for i, one in enumerate(all_of_them)
        if hardware.has_grouped_matmul(torch.device("cuda", i), RECIPES[name])
    }
    assert found == (expected if torchao or name == "rowwise" else set())


def test_torchao_is_asked_for_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prototypes may change, or move, and without Triton they are stubs."""
    from torchao.prototype.moe_training.kernels import mxfp8

    arranges = hardware._torchao_arranges_scales.__wrapped__
    monkeypatch.setattr(hardware, "has_triton", lambda: False)
    assert not arranges()
    monkeypatch.setattr(hardware, "has_triton", lambda: True)
    assert arranges()
    for name in "2d_M_groups", "2d_K_groups", "per_group_3d":
        with monkeypatch.context() as changed:
            changed.delattr(mxfp8, f"triton_mx_block_rearrange_{name}")
            assert not arranges()
    monkeypatch.setitem(sys.modules, "torchao.prototype.moe_training.kernels", None)
    assert not arranges()


def test_each_device_is_asked(capability: dict[int, tuple[int, int]]) -> None:
    capability |= {0: (8, 0), 1: (9, 0)}
    assert not hardware.has_matmul(torch.device("cuda", 0), TENSORWISE)
    assert hardware.has_matmul(torch.device("cuda", 1), TENSORWISE)


def test_emulate_overrides_the_hardware(capability: dict[int, tuple[int, int]]) -> None:
    capability[0] = (9, 0)
    assert not hardware.multiplies(CUDA, TENSORWISE, emulate=True)


@pytest.mark.parametrize("device", [CPU, torch.device("meta")])
def test_only_cuda_devices_have_it(device: torch.device) -> None:
    assert not hardware.has_matmul(device, TENSORWISE)


def test_rocm_is_not_taken_for_cuda(
    capability: dict[int, tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There "cuda" devices have capabilities of another numbering (9.4 is an MI300)."""
    capability[0] = (9, 4)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert not hardware.has_matmul(CUDA, TENSORWISE)


def test_matmuls_are_assumed_until_it_ends() -> None:
    with hardware.assume_matmuls():
        assert hardware.multiplies(CPU, TENSORWISE, emulate=False)
        assert not hardware.multiplies(CPU, TENSORWISE, emulate=True)
        assert hardware.multiplies(CPU, RECIPES["rowwise"], emulate=False, grouped=True)
        assert hardware.multiplies(CPU, RECIPES["mxfp8_rceil"], emulate=False, grouped=True)
    assert not hardware.multiplies(CPU, TENSORWISE, emulate=False)


def test_emulation_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fp8dist"):
        for _ in range(3):
            assert not hardware.multiplies(CPU, TENSORWISE, emulate=False)
    assert [record.getMessage() for record in caplog.records] == [
        "tensorwise matmuls are emulated on cpu: the operands are dequantized and multiplied"
    ]


def test_emulation_is_logged_for_each_recipe(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fp8dist"):
        for _ in range(2):
            for recipe in RECIPES.values():
                hardware.multiplies(CPU, recipe, emulate=False)
    assert [record.getMessage().split()[0] for record in caplog.records] == list(RECIPES)


def test_the_log_names_the_gpu(
    capability: dict[int, tuple[int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    capability[0] = (8, 0)
    with caplog.at_level(logging.INFO, logger="fp8dist"):
        hardware.multiplies(CUDA, TENSORWISE, emulate=False)
    assert "NVIDIA A100" in caplog.text


def test_emulation_that_was_asked_for_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fp8dist"):
        hardware.multiplies(CPU, TENSORWISE, emulate=True)
    assert not caplog.records


def test_hardware_with_float8_logs_nothing(
    capability: dict[int, tuple[int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    capability[0] = (9, 0)
    with caplog.at_level(logging.INFO, logger="fp8dist"):
        hardware.multiplies(CUDA, TENSORWISE, emulate=False)
    assert not caplog.records


@pytest.mark.gpu
def test_this_gpu_agrees_with_its_capability() -> None:
    expected = torch.cuda.get_device_capability() >= (8, 9)
    assert hardware.has_matmul(torch.device("cuda"), TENSORWISE) is expected
