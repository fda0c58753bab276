"""Which device a rank gets, and a meeting point that is taken."""

import socket

import pytest
import torch
import torch.distributed as dist

from fp8dist.train.config import JobConfig
from fp8dist.train.distributed import agree, choose_device, init_distributed, same_everywhere


def test_one_gpu_per_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_HOSTID", raising=False)
    assert choose_device(0, 1, 2) == torch.device("cpu")
    assert choose_device(2, 1, 2) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="3 ranks were started on a machine with 2 GPUs"):
        choose_device(2, 0, 3)
    monkeypatch.setenv("NCCL_HOSTID", "host2")  # how ranks share a GPU on purpose
    assert choose_device(2, 2, 3) == torch.device("cuda", 0)


def test_taken_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_PORT", port)):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with pytest.raises(ValueError, match=rf"127\.0\.0\.1:{port}.*choose another with MASTER_P"):
            init_distributed(JobConfig())


@pytest.mark.parametrize(
    ("changed", "warned"),
    [
        ({}, True),
        ({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, False),
        ({"TORCHELASTIC_MAX_RESTARTS": "0"}, False),
        ({"GROUP_WORLD_SIZE": "1"}, False),  # the store's names differ by attempt then
        ({"TORCHELASTIC_USE_AGENT_STORE": "False"}, False),
    ],
)
def test_restarts_of_several_nodes_want_a_variable(
    changed: dict[str, str],
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    of_torchrun = {"RANK": "0", "WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "2"}
    of_torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    of_torchrun |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}
    if changed.get("TORCHELASTIC_USE_AGENT_STORE") == "False":
        del store  # this rank makes one
    for name, value in (of_torchrun | changed).items():
        monkeypatch.setenv(name, value)
    init_distributed(JobConfig())
    dist.destroy_process_group()
    assert ("export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in caplog.text) == warned


def test_without_torchrun_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert init_distributed(JobConfig()) == torch.device("cpu")
    try:
        assert dist.get_world_size() == 1
        assert agree(lambda: 3) == 3
        same_everywhere(3, "a number")
        with pytest.raises(ValueError, match="^no$"):
            agree(_refuse)
        with pytest.raises(ValueError, match="nowhere"):
            agree(lambda: open("/nowhere"))
    finally:
        dist.destroy_process_group()


def _refuse() -> None:
    raise ValueError("no")
