"""The process group, and facts that one rank alone can see."""

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from fp8dist.train.config import JobConfig

T = TypeVar("T")
logger = logging.getLogger("fp8dist")


def init_distributed(job: JobConfig) -> torch.device:
    """Join the process group torchrun describes, or one of a single rank; returns the device.

    GPUs communicate over NCCL, CPUs over gloo; a gloo group for Python objects is there anyway.

    Raises:
        ValueError: on every rank: a machine has more ranks than GPUs; the port is taken.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    timeout = timedelta(seconds=job.comm.train_timeout_seconds)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    try:
        if "RANK" in os.environ:
            store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                # After a restart torchrun's store still has the addresses of the ranks before, and
                # these would be called. (Of several machines each counts its own restarts.)
                attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                store = dist.PrefixStore(f"attempt {attempt}", store)
            elif shares_store_across_restarts():
                logger.warning(
                    "Ranks that torchrun starts again will fail once more, and may not find each "
                    "other when a machine is gone: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on "
                    "every node, before torchrun"
                )
        else:
            store, rank, world = dist.HashStore(), 0, 1
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except dist.DistNetworkError as error:
        port = os.environ.get("MASTER_PORT")
        raise ValueError(
            f"the ranks could not meet at {os.environ.get('MASTER_ADDR')}:{port}. If the port is "
            f"taken, choose another with MASTER_PORT. ({str(error).splitlines()[0]})"
        ) from error
    device = agree(
        lambda: choose_device(
            gpus, int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        )
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def shares_store_across_restarts() -> bool:
    """Whether torchrun, on several machines, will hand restarted ranks the store of those before.

    The store then lives on one machine, and every torchrun keeps its address, also when that
    machine is gone (torch 2.13, `DynamicRendezvousHandler.next_rendezvous`): no name within the
    store, agreed on by the new ranks, would be enough.
    """
    return (
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1"
    )


def choose_device(gpus: int, local_rank: int, local_world: int) -> torch.device:
    """The device of one of the `local_world` ranks on a machine with `gpus` GPUs.

    Raises:
        ValueError: there are GPUs, but not one for each rank.
    """
    if not gpus:
        return torch.device("cpu")
    # NCCL_HOSTID makes NCCL take ranks for different machines: they may share a GPU then.
    if local_world > gpus and "NCCL_HOSTID" not in os.environ:
        raise ValueError(
            f"{local_world} ranks were started on a machine with {gpus} GPUs: start at most one "
            "per GPU (NGPU, or torchrun's --nproc-per-node), or hide the GPUs "
            "(CUDA_VISIBLE_DEVICES='') to train on the CPU"
        )
    return torch.device("cuda", local_rank % gpus)


def agree(check: Callable[[], T]) -> T:
    """Run `check` on every rank and return this rank's result.

    What fails on one rank fails on all: the first rank's error is raised everywhere. Every rank
    must call this, and `check` must not communicate.

    Raises:
        ValueError: `check` raised a ValueError or an OSError on some rank.
    """
    result, error = None, None
    try:
        result = check()
    except (ValueError, OSError) as caught:
        error = str(caught)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for rank, found in enumerate(errors):
        if found is not None:
            everywhere = all(other == found for other in errors)
            raise ValueError(found if everywhere else f"rank {rank}: {found}")
    return result  # type: ignore[return-value]  # no error, so check returned a T


def same_everywhere(fact: object, what: str) -> None:
    """Raise ValueError on every rank unless all ranks hold an equal `fact`."""
    facts: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(facts, fact)
    for rank, other in enumerate(facts):
        if other != facts[0]:
            raise ValueError(
                f"{what} differs between ranks: {facts[0]} on rank 0, {other} on rank {rank}"
            )
