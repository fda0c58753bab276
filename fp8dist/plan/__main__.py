"""`python -m fp8dist.plan [--section.key value ...]`: a job's bytes, memory and break-even."""

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fp8dist.train.noise import quiet

quiet()

# E402: torchao, which these import, is to be quiet by then.
from fp8dist.plan.dry_run import fake_mesh, observe, shape_of  # noqa: E402
from fp8dist.plan.figures import PURPOSES, Machine  # noqa: E402
from fp8dist.plan.picture import plot  # noqa: E402
from fp8dist.plan.report import Plan, as_dict, as_text  # noqa: E402
from fp8dist.plan.step import MEMORY, Observed  # noqa: E402
from fp8dist.plan.variants import unconverted, with_recipes  # noqa: E402
from fp8dist.train.config import JobConfig, parse_config  # noqa: E402
from fp8dist.train.metrics import write_json  # noqa: E402

DESCRIPTION = """\
Tells what a training job would send, hold and gain with each float8 recipe, before it is started.

    python -m fp8dist.plan --job.config_file scripts/configs/llama3_70b.toml --ranks 1024 \\
        --parallelism.tensor_parallel_degree 8 --link 50 --tp-link 400 --plot plan.png

The job is given as to fp8dist.train: a TOML file in --job.config_file, flags of the form
--section.key value, or both (`python -m fp8dist.train --help` explains each). Its
model.converters are not looked at: the job is planned in high precision and with every recipe,
and filter_fqns says which layers are left out. Nothing is trained and no data is read.

Nothing is computed either: a step of the job - forward, backward, clipping, optimizer, scales - is
run once as rank 0, on tensors without contents and a process group that sends nothing, and what is
handed to that group is counted. Of a deep model two shallow ones are run and the rest follows from
the difference, exactly, since blocks are alike (--all-layers runs it whole).
"""

EPILOG = """\
what a rank sends per step
{sent}

  Each collective counts as a ring of n ranks: what is gathered is sent n - 1 times by the rank that
  has it, what is reduced and scattered is sent (n - 1) / n times, an all-reduce is both. A rank
  receives as much as it sends.

memory per rank
{memory}

  The last is an estimate: compiled layers keep less. It and what comes on top - what an operation
  uses for itself, the allocator's losses, NCCL's and CUDA's own memory - are not in the total.

communication and casts per step
  link     bytes sent, over --link
  tp link  those of tensor parallelism, over --tp-link if it is given
  memory   bytes that passes over the device's memory read and write, over --memory-bandwidth:
           copies into the buffers that are gathered and out of them; casts of shards, to the dtype
           that is gathered at every gather, or to float8 once per step after their amaxes; casts of
           activations and their gradients, once more for amaxes of tensors, rows and columns;
           transposes of float8 weights for grad_input. With --compile.enable layers that share an
           input share its cast.

  None of it is taken to be hidden behind computation. Latencies are left out ("collectives" has
  the number to multiply them with), and so is what float8 gains in the matmuls: "takes less time"
  are the links on which a recipe wins by its bytes alone, all of its casts paid.
"""


@dataclass(frozen=True)
class Options:
    """What the command line says that is not about the job."""

    ranks: int
    recipes: list[str]
    machine: Machine
    all_layers: bool
    json: Path | None
    plot: Path | None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"command line: {message}")


def _rate(text: str) -> float:
    """GB/s as bytes per second."""
    try:
        value = float(text) * 1e9
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number of GB/s above 0")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number, at least 1")
    return int(text)


def _meanings(of: dict[str, str]) -> str:
    width = max(map(len, of))
    return "\n".join(f"  {name.ljust(width)}  {meaning}" for name, meaning in of.items())


def parser() -> argparse.ArgumentParser:
    """The parser of what is not about the job."""
    epilog = EPILOG.format(sent=_meanings(PURPOSES), memory=_meanings(MEMORY))
    flags = _Parser(
        prog="python -m fp8dist.plan",
        usage="python -m fp8dist.plan [options] [--section.key value ...]",
        description=DESCRIPTION,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = flags.add_argument
    add("--ranks", type=_count, default=8, metavar="N", help="ranks of the job; default: 8")
    add(
        "--recipes",
        type=lambda text: [name for name in text.split(",") if name],
        default=[],
        metavar="NAME,NAME,...",
        help="recipes to plan; default: all",
    )
    add(
        "--link",
        type=_rate,
        default=50e9,
        metavar="GB/S",
        help="what a rank sends, and receives at the same time, in GB per second; default: 50, "
        "a network adapter of 400 Gbit/s for each rank",
    )
    add(
        "--tp-link",
        type=_rate,
        metavar="GB/S",
        help="the same between the ranks of tensor parallelism, as over NVLink; default: --link",
    )
    add(
        "--memory-bandwidth",
        type=_rate,
        default=3000e9,
        metavar="GB/S",
        help="what passes over the device's memory reach, reads and writes together; default: "
        "3000, which is about nine tenths of an H100's",
    )
    add("--all-layers", action="store_true", help="run every layer: slower, the same figures")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--plot", type=Path, metavar="FILE", help="draw the bytes per step of each recipe there")
    return flags


def parse(arguments: Sequence[str]) -> tuple[Options, JobConfig]:
    """The command line, without the program's name; `--help` prints and exits.

    Raises:
        ValueError: an unknown flag, a wrong value, or a file that is missing or no TOML.
    """
    own, of_job = parser().parse_known_args(arguments)
    machine = Machine(own.link, own.tp_link, own.memory_bandwidth)
    options = Options(own.ranks, own.recipes, machine, own.all_layers, own.json, own.plot)
    return options, parse_config(of_job)


def make_plan(job: JobConfig, options: Options) -> Plan:
    """Run the job's step in high precision and with each recipe.

    Raises:
        ValueError: the job does not fit the model or the ranks, or goes with none of the recipes.
    """
    shape = shape_of(job)
    base, plain = unconverted(job)
    converted = with_recipes(job, options.recipes, experts=shape.moe is not None)
    impossible: dict[str, str] = {}
    with fake_mesh(job, options.ranks) as mesh:
        names = mesh.mesh_dim_names or ()
        sizes = {name: mesh[name].size() for name in names}
        variants: dict[str, Observed] = {base: observe(plain, mesh, all_layers=options.all_layers)}
        for name, of_recipe in converted.items():
            try:
                variants[name] = observe(of_recipe, mesh, all_layers=options.all_layers)
            except ValueError as error:
                impossible[name] = str(error)
    if impossible.keys() == converted.keys():
        raise ValueError("; ".join(f"{name}: {why}" for name, why in impossible.items()))
    return Plan(job, shape.n_layers, sizes, options.machine, base, variants, impossible)


def main() -> None:
    """Plan the job of the command line; a user's error is one line."""
    try:
        options, job = parse(sys.argv[1:])
        plan = make_plan(job, options)
        if options.json is not None:
            write_json(as_dict(plan), options.json)
        if options.plot is not None:
            plot(plan, options.plot)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(as_text(plan))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nothing to say when `| head` has enough
    main()
