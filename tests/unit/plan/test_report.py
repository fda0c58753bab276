"""The tables of a plan made up for it, to the letter."""

from expecttest import assert_expected_inline

from fp8dist.plan.figures import Machine
from fp8dist.plan.observe import Collective
from fp8dist.plan.report import NOTES, Plan, as_dict, as_text
from fp8dist.plan.step import MEMORY, Observed, Passes
from fp8dist.train.config import parse_config

HP = Collective("forward", "all_gather", "", "bfloat16", "dp_shard", 3)
FLOAT8 = Collective("forward", "all_gather", "", "uint8", "dp_shard", 3)
SCALES = Collective("scales", "all_reduce", "MAX", "int32", "dp_shard", 3)


def observed(handed: dict[Collective, int], payloads: int, passes: int) -> Observed:
    memory = dict.fromkeys(MEMORY, 2_000_000) | {"payloads": payloads, "scales": payloads // 100}
    return Observed(
        calls=dict.fromkeys(handed, 4),
        handed=handed,
        gathered=3 * sum(handed.values()),
        memory=memory,
        passes=Passes(copies=passes, shards=0, operands=0),
        parameters=7_000_000,
        microbatches=2,
    )


PLAN = Plan(
    job=parse_config([]),
    layers=4,
    mesh={"dp_replicate": 2, "dp_shard": 3},
    machine=Machine(link=1e9, tp_link=None, memory=100e9),
    base="bfloat16",
    variants={
        "bfloat16": observed({HP: 40_000_000}, 0, 0),
        "rowwise": observed({FLOAT8: 20_000_000, SCALES: 30_000}, 1_000_000, 400_000_000),
    },
    impossible={"blockwise": "no reason"},
)


def test_text() -> None:
    assert_expected_inline(
        as_text(PLAN).removesuffix(NOTES).rstrip(),
        """\
debugmodel: 4 layers, 7.00 million parameters in float32, gathered in bfloat16
6 ranks: 2 dp_replicate x 3 dp_shard; a data-parallel rank takes 2 times 8 x 2048 tokens per step

A rank sends per step, and receives as much (rings)
          weights  gradients  activations   scales  rest    total  of bfloat16  collectives
bfloat16  80.0 MB        0 B          0 B      0 B   0 B  80.0 MB        1.000            4
rowwise   40.0 MB        0 B          0 B  40.0 kB   0 B  40.0 MB        0.500            8

Memory per rank, of the rank that needs most
          parameters  gradients  optimizer  payloads   scales  unsharded   total  activations
bfloat16      2.0 MB     2.0 MB     2.0 MB       0 B      0 B     2.0 MB  8.0 MB      ~2.0 MB
rowwise       2.0 MB     2.0 MB     2.0 MB    1.0 MB  10.0 kB     2.0 MB  9.0 MB      ~2.0 MB

Communication and casts per step, were none of it hidden, at 1 GB/s per rank, 100 GB/s of memory
             link  memory    total  of bfloat16  takes less time
bfloat16  80.0 ms  0.0 ms  80.0 ms        1.000
rowwise   40.0 ms  4.0 ms  44.0 ms        0.550  below 9.99 GB/s

blockwise is not possible: no reason""",
    )


def test_values_for_json() -> None:
    values = as_dict(PLAN)
    assert values["ranks"] == 6
    rowwise = values["variants"]["rowwise"]
    assert rowwise["gathered"] == 3 * 20_030_000
    assert rowwise["takes_less_time"]["above"] == 0
    # 39.96 MB less over the link, for 4 ms more.
    assert rowwise["takes_less_time"]["below"] == (80e6 - 40.04e6) / 4e-3
    assert values["variants"]["bfloat16"]["takes_less_time"] == {"above": "inf", "below": "inf"}
