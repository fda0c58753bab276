"""Linear layers too small to gain from float8, by GPU and recipe, as they were measured.

On a GPU that was not measured there are those that torchao publishes, of two recipes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

ANY = math.inf


@dataclass(frozen=True)
class Thresholds:
    """The sizes for which a recipe is not faster than bfloat16.

    Args:
        boxes: pairs of K (`in_features`) and N (`out_features`). A layer is too small if for one of
            them neither its K nor its N is larger.
        source: how they were measured.
    """

    boxes: tuple[tuple[float, float], ...]
    source: str

    def too_small(self, k: int, n: int) -> bool:
        return any(k <= box_k and n <= box_n for box_k, box_n in self.boxes)


OTHER_GPUS = "other GPUs"
_TORCHAO = "torchao 0.18.0, `_auto_filter_for_recipe`: its benchmarks of linear layers on H100"

# By the name that `torch.cuda.get_device_name` gives. Entries for a GPU are printed by
# scripts/bench/bench_linear.py --thresholds, of H200 from docs/figures/linear.csv.
THRESHOLDS: Mapping[str, Mapping[str, Thresholds]] = {
    OTHER_GPUS: {
        "tensorwise": Thresholds(((4096, 1024),), _TORCHAO),
        "rowwise": Thresholds(((ANY, 2048), (1024, ANY), (2048, 4096)), _TORCHAO),
    },
    "NVIDIA H200": {
        "tensorwise": Thresholds(
            ((2048, 1024),),
            "scripts/bench/bench_linear.py, M 2048/8192/16384, torch 2.11.0+cu130, 2026-12-01",
        ),
        "rowwise": Thresholds(
            ((1024, 2048), (8192, 1024)),
            "scripts/bench/bench_linear.py, M 2048/8192/16384, torch 2.11.0+cu130, 2026-12-01",
        ),
        "rowwise_with_gw_hp": Thresholds(
            ((4096, 1024),),
            "scripts/bench/bench_linear.py, M 2048/8192/16384, torch 2.11.0+cu130, 2026-12-01",
        ),
        "blockwise": Thresholds(
            ((1024, 2048), (8192, 1024)),
            "scripts/bench/bench_linear.py, M 2048/8192/16384, torch 2.11.0+cu130, 2026-12-01",
        ),
    },
}


def thresholds_by_recipe(gpu: str | None) -> dict[str, Thresholds]:
    """Recipe -> thresholds for a GPU, those of other GPUs where it has none of its own.

    Args:
        gpu: its name; None: there is none.
    """
    return {**THRESHOLDS[OTHER_GPUS], **THRESHOLDS.get(gpu or OTHER_GPUS, {})}
