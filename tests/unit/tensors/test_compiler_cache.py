"""The compiler's cache must not find what another version of this package compiled."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import fp8dist
from fp8dist.experts import Float8ShardedExperts
from fp8dist.tensors import compiler_cache
from fp8dist.tensors.compiler_cache import hash_for_caching, hash_of_source
from fp8dist.tensors.sharded_weight import Float8ShardedWeight


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> Float8ShardedWeight:
    return Float8ShardedWeight(torch.zeros(shape, dtype=dtype))


def test_values_do_not_count_but_all_else_does() -> None:
    first = weight(4, 8)
    assert hash_for_caching(first) == hash_for_caching(Float8ShardedWeight(torch.ones(4, 8)))
    others = [
        weight(8, 4),
        weight(4, 8, dtype=torch.bfloat16),
        Float8ShardedWeight(torch.zeros(8, 4).t()),
        Float8ShardedWeight(torch.zeros(4, 8, requires_grad=True)),
    ]
    assert hash_for_caching(first) not in map(hash_for_caching, others)


def test_the_source_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = hash_for_caching(weight(4, 8))
    copy = tmp_path / "fp8dist"
    for path in Path(fp8dist.__file__).parent.rglob("*.py"):
        target = copy / path.relative_to(Path(fp8dist.__file__).parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    monkeypatch.setattr(compiler_cache, "__file__", str(copy / "tensors" / "compiler_cache.py"))
    for changed in (False, True):
        if changed:
            with (copy / "matmul.py").open("a") as file:
                file.write("# another version\n")
        hash_of_source.cache_clear()
        assert (hash_for_caching(weight(4, 8)) == before) is not changed
    hash_of_source.cache_clear()


@pytest.mark.skipif(
    not hasattr(DTensor, "_stable_hash_for_caching"), reason="torch 2.11 hashes no DTensor"
)
def test_a_dtensor_is_known_by_what_it_holds(mesh: DeviceMesh) -> None:
    """Code that was compiled for plain shards would write to a wrapper's address, which is 0."""

    def known_by(local: torch.Tensor) -> str:
        dtensor = DTensor.from_local(local, mesh, (Shard(0),), run_check=False)
        return str(dtensor._stable_hash_for_caching())

    def experts(recipe: str) -> torch.Tensor:
        return Float8ShardedExperts(torch.zeros(4, 8), fp8dist.Float8Config(recipe), "w1")

    held: list[Callable[[], torch.Tensor]] = [
        lambda: torch.zeros(4, 8),
        lambda: Float8ShardedWeight(torch.zeros(4, 8)),
        lambda: experts("rowwise"),
        lambda: experts("mxfp8_rceil"),
    ]
    assert [known_by(local()) for local in held] == [known_by(local()) for local in held]
    assert len({known_by(local()) for local in held}) == len(held)
