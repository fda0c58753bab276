"""A plan, as a table to read and as plain values for JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fp8dist.plan.figures import (
    PURPOSES,
    Machine,
    break_even,
    seconds,
    sent_by_purpose,
    total_memory,
)
from fp8dist.plan.step import MEMORY, Observed
from fp8dist.train.config import JobConfig
from fp8dist.train.metrics import json_ready, readable_bytes, versions


@dataclass(frozen=True)
class Plan:
    """Everything that was found out about a job.

    Args:
        job: as it was given; what converts it is not looked at.
        layers: of the model.
        mesh: mesh dimension -> ranks.
        base: the name of the variant in high precision, the first of `variants`.
        impossible: recipe -> why the job does not go with it.
    """

    job: JobConfig
    layers: int
    mesh: Mapping[str, int]
    machine: Machine
    base: str
    variants: Mapping[str, Observed]
    impossible: Mapping[str, str]

    @property
    def ranks(self) -> int:
        count = 1
        for size in self.mesh.values():
            count *= size
        return count


def as_text(plan: Plan) -> str:
    """What `python -m fp8dist.plan` prints."""
    parts = [
        _heading(plan),
        "A rank sends per step, and receives as much (rings)\n" + _table(_bytes_rows(plan)),
        "Memory per rank, of the rank that needs most\n" + _table(_memory_rows(plan)),
        _communication_title(plan) + "\n" + _table(_seconds_rows(plan)),
        *(f"{name} is not possible: {why}" for name, why in plan.impossible.items()),
        NOTES,
    ]
    return "\n\n".join(parts)


NOTES = """\
kB, MB, GB: powers of 1000. unsharded: gathered weights, gradients before they are reduced and
FSDP's buffers, the most at once. activations: an estimate, of what layers that are not compiled
keep for backward, and not in the total; nor is what they use in between, what the allocator loses,
and what NCCL and CUDA take. memory: passes over the device's memory: copies for the gathers, casts
of shards, of activations and of their gradients. Latencies are left out, and what float8 gains in
the matmuls. `--help` says more."""


def _heading(plan: Plan) -> str:
    job, base = plan.job, plan.variants[plan.base]
    mesh = " x ".join(f"{size} {name}" for name, size in plan.mesh.items())
    batch = f"{job.training.local_batch_size} x {job.training.seq_len} tokens"
    times = f"{base.microbatches} times " if base.microbatches > 1 else ""
    return (
        f"{job.model.flavor}: {plan.layers} layers, {_millions(base.parameters)} parameters in "
        f"{job.training.dtype}, gathered in {plan.base}\n"
        f"{plan.ranks} ranks: {mesh}; a data-parallel rank takes {times}{batch} per step"
    )


def _bytes_rows(plan: Plan) -> list[list[str]]:
    base = sum(sent_by_purpose(plan.variants[plan.base]).values())
    rows = [["", *PURPOSES, "total", f"of {plan.base}", "collectives"]]
    for name, observed in plan.variants.items():
        sent = sent_by_purpose(observed)
        total = sum(sent.values())
        cells = [readable_bytes(sent[purpose]) for purpose in PURPOSES]
        calls = str(sum(observed.calls.values()))
        rows.append([name, *cells, readable_bytes(total), _share(total, base), calls])
    return rows


def _memory_rows(plan: Plan) -> list[list[str]]:
    parts = [part for part in MEMORY if part != "activations"]
    rows = [["", *parts, "total", "activations"]]
    for name, observed in plan.variants.items():
        cells = [readable_bytes(observed.memory[part]) for part in parts]
        total = readable_bytes(total_memory(observed))
        rows.append([name, *cells, total, "~" + readable_bytes(observed.memory["activations"])])
    return rows


def _communication_title(plan: Plan) -> str:
    machine = plan.machine
    within = "" if machine.tp_link is None else f", {_rate(machine.tp_link)} within tp"
    return (
        f"Communication and casts per step, were none of it hidden, at {_rate(machine.link)} per"
        f" rank{within}, {_rate(machine.memory)} of memory"
    )


def _seconds_rows(plan: Plan) -> list[list[str]]:
    base = plan.variants[plan.base]
    base_total = seconds(base, plan.machine).total
    rows = [["", "link", "tp link", "memory", "total", f"of {plan.base}", "takes less time"]]
    for name, observed in plan.variants.items():
        took = seconds(observed, plan.machine)
        parts = [_milliseconds(x) for x in (took.link, took.tp_link, took.memory, took.total)]
        where = "" if name == plan.base else str(break_even(observed, base, plan.machine))
        rows.append([name, *parts, _share(took.total, base_total), where])
    if plan.machine.tp_link is None:
        rows = [[cell for i, cell in enumerate(row) if i != 2] for row in rows]
    return rows


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:g} GB/s"


def _milliseconds(value: float) -> str:
    return f"{value * 1e3:.1f} ms"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.3f}" if whole else "-"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns under each other: names to the left, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *cells = row
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join(lines)


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; bytes per second, bytes and seconds."""
    base = plan.variants[plan.base]
    return json_ready(
        {
            "config": plan.job.to_dict(),
            "versions": versions(),
            "layers": plan.layers,
            "parameters": base.parameters,
            "ranks": plan.ranks,
            "mesh": dict(plan.mesh),
            "machine": asdict(plan.machine),
            "microbatches": base.microbatches,
            "base": plan.base,
            "meaning": {"sent": PURPOSES, "memory": MEMORY},
            "variants": {
                name: _variant(plan, observed, base) for name, observed in plan.variants.items()
            },
            "impossible": dict(plan.impossible),
        }
    )


def _variant(plan: Plan, observed: Observed, base: Observed) -> dict[str, Any]:
    took = seconds(observed, plan.machine)
    sent = sent_by_purpose(observed)
    return {
        "sent": sent | {"total": sum(sent.values())},
        "gathered": observed.gathered,
        "memory": dict(observed.memory) | {"total": total_memory(observed)},
        "passes": asdict(observed.passes),
        "seconds": asdict(took) | {"total": took.total},
        "takes_less_time": asdict(break_even(observed, base, plan.machine)),
        "collectives": [
            asdict(kind)
            | {
                "calls": observed.calls[kind],
                "handed": observed.handed[kind],
                "sent": kind.sent(observed.handed[kind]),
            }
            for kind in sorted(observed.calls)
        ],
    }
