"""Under CPU offload it is the payload that moves to the device, not the high-precision shard."""

import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.utils._python_dispatch import TorchDispatchMode

import fp8dist
from fp8dist import Float8Config
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.test_wire import (
    BLOCK_NORMS_AND_BIAS,
    BLOCK_WEIGHTS,
    ROOT,
    float8_bytes,
    padded,
)
from tests.distributed.toy import (
    DIM,
    HIDDEN,
    RECIPE_NAMES,
    Llama,
    convert,
    full,
    local_batch,
    loss_of,
    mesh_of,
    new_model,
    same_bits,
    shard,
)

# Stands for an accelerator where there is none: tensors that move there have sizes and no values.
ELSEWHERE = torch.device("meta")


def offloaded(config: Any, pin_memory: bool = False) -> Llama:
    model = convert(new_model(), config).cpu()
    policy = CPUOffloadPolicy(pin_memory=pin_memory)
    return shard(model, mesh_of(dist.get_world_size()), offload_policy=policy)


class _Moves(TorchDispatchMode):
    """Bytes that move from host memory to `ELSEWHERE`."""

    nbytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            moved = args[-1]
            if moved.device.type == "cpu" and out.device == ELSEWHERE:
                self.nbytes += moved.numel() * moved.dtype.itemsize
        return out


def gathers(recipe: str, cache_payload: bool) -> tuple[list[int], list[bool]]:
    """Bytes moved by two gathers of a weight, as FSDP2 makes them, and whether these were right.

    The weight is that of HIDDEN x DIM, which three ranks cut unevenly.
    """
    model = offloaded(Float8Config(recipe, cache_payload=cache_payload))
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(model)
    loss_of(model, local_batch(0)).backward()
    layer = model.layers[0].w1
    local = layer.weight._local_tensor
    moved, right = [], []
    for _ in range(2):
        with _Moves() as moves:
            there = local.to(ELSEWHERE, non_blocking=True)
            (payload,), _ = there.fsdp_pre_all_gather(
                mesh_of(dist.get_world_size()),
                layer.weight.shape,
                layer.weight.stride(),
                layer,
                MixedPrecisionPolicy(),
            )
        moved.append(moves.nbytes)
        right.append(payload.device == ELSEWHERE and payload.dtype == torch.uint8)
    # What anyone else moves does move.
    right.append(layer.weight.to_local().to(ELSEWHERE, non_blocking=True).device == ELSEWHERE)
    right.append(local.to(torch.float64).dtype == torch.float64)
    right.append(local.device.type == "cpu" and local.to("cpu") is local)
    return moved, right


@pytest.mark.skipif(DEVICE != "cpu", reason="there FSDP2 itself moves; see the test below")
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_each_gather_moves_the_payload_alone(recipe: str) -> None:
    payload = float8_bytes(recipe, [BLOCK_WEIGHTS[4]], 3)
    rows = [86, 86, 84]
    for rank, (moved, right) in enumerate(run_on_ranks(3, gathers, recipe, True)):
        # FSDP2 has moved the shard once before the first hook could say that it need not.
        assert moved == [4 * rows[rank] * DIM + payload, payload]
        assert all(right), right


@pytest.mark.skipif(DEVICE != "cpu", reason="there FSDP2 itself moves")
def test_without_a_cached_payload_the_shard_moves() -> None:
    """It is cast where it has moved to; the one scale is there already on an accelerator."""
    [(moved, right)] = run_on_ranks(1, gathers, "tensorwise", False)
    assert moved == [4 * HIDDEN * DIM + 4] * 2
    assert all(right), right


def htod_bytes(recipe: str, path: str) -> tuple[int, bool, list[float]]:
    """Of one step: bytes copied from host to device in forward and backward; whether payloads are
    pinned; its loss and that of the same step without offload."""
    losses = []
    for offload in (True, False):
        config = Float8Config(recipe)
        model = offloaded(config, pin_memory=True) if offload else plain(config)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        fp8dist.register_precompute_hook(optimizer, model)
        loss_of(model, local_batch(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        batch = local_batch(1)
        torch.cuda.synchronize()
        if offload:
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profile:
                loss = loss_of(model, batch)
                loss.backward()
                torch.cuda.synchronize()
            file = f"{path}/trace-{dist.get_rank()}.json"
            profile.export_chrome_trace(file)
            with open(file) as opened:
                events = json.load(opened)["traceEvents"]
            copies = [event for event in events if "Memcpy HtoD" in event.get("name", "")]
            nbytes = sum(event["args"]["bytes"] for event in copies if "bytes" in event["args"])
            states = [
                m.weight_state for m in model.modules() if isinstance(m, fp8dist.Float8Linear)
            ]
            pinned = all(state.payload.is_pinned() for state in states)
        else:
            loss = loss_of(model, batch)
        losses.append(loss.item())
    return nbytes, pinned, losses


def plain(config: Float8Config) -> Llama:
    return shard(convert(new_model(), config), mesh_of(dist.get_world_size()))


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_a_gpu_is_sent_the_payloads(recipe: str, tmp_path: Any) -> None:
    payloads = float8_bytes(recipe, BLOCK_WEIGHTS, 2)
    # Of the shards in high precision FSDP2 sends what is there, unpadded; two ranks cut all evenly.
    block = payloads + 4 * padded(BLOCK_NORMS_AND_BIAS, 2)
    expected = 2 * 2 * block + 4 * padded(ROOT, 2)  # two blocks, in forward and backward
    for nbytes, pinned, losses in run_on_ranks(2, htod_bytes, recipe, str(tmp_path)):
        assert pinned
        assert losses[0] == losses[1]
        # A few numbers of the all-gather's layout and of the loss come on top; the shards in high
        # precision would be four times as much.
        assert expected <= nbytes < 1.1 * expected


def snapshot_and_edit() -> list[Any]:
    """A copy of an offloaded shard taken before an edit, through what users hold."""
    model = offloaded("tensorwise")
    loss_of(model, local_batch(0)).backward()
    weight = model.layers[0].w1.weight
    before = full(weight).clone()
    with torch.no_grad():
        copy = weight.to(torch.float64)
        weight.mul_(2)
    return [same_bits(full(copy).float(), before), same_bits(full(weight), 2 * before)]


def test_copies_of_offloaded_weights_are_copies() -> None:
    assert run_on_ranks(3, snapshot_and_edit) == [[True, True]] * 3
