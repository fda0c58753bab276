"""The package's shape: what may import what, and that every module has its tests."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fp8dist"

# A module imports from its own layer or from one before it.
LAYERS = [
    "config",
    "numerics",
    "grouped_numerics",
    "hardware",
    "tracing",
    "non_finite",
    "async_tp",
    "kernels",
    "matmul",
    "mx_grouped_matmul",
    "grouped_matmul",
    "buffer",
    "shard",
    "precompute",
    "tensors",
    "linear",
    "experts",
    "small_kn",
    "convert",
    "convert_moe",
    "fsdp",
    "export",
    "tensor_parallel",
    "torchtitan",
    "train",
    "plan",
]

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(name: str, source: str, is_package: bool) -> set[str]:
    """Modules of fp8dist that the source of module `name` imports, in functions too."""
    package = name if is_package else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            submodules = {f"{base}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules or {base}
    return {module for module in found if module.split(".")[0] == "fp8dist"}


def imports_of(name: str) -> set[str]:
    path = MODULES[name]
    return imports(name, path.read_text(), is_package=path.name == "__init__.py")


def layer(name: str) -> int:
    """Position of the module's layer. The root package imports the library, so only the job may
    import it."""
    _, _, inner = name.partition("fp8dist.")
    return LAYERS.index(inner.split(".")[0] or "train")


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_its_own_layer_or_one_before(name: str) -> None:
    assert name.split(".")[1] in LAYERS, f"{name}: say in LAYERS where it belongs"
    late = sorted(other for other in imports_of(name) if layer(other) > layer(name))
    assert not late, f"{name} imports {late}, which come after it"


def test_no_import_cycles() -> None:
    graph = {name: imports_of(name) - {name} for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' <- '.join(error.args[1])}")


def test_importing_it_makes_no_tensors() -> None:
    """Which may be on a device that a rank has not chosen yet."""
    program = "import torch; torch.set_default_device('cuda'); import fp8dist, fp8dist.train.loop"
    program += "; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_every_module_has_its_tests() -> None:
    missing = []
    for path in (path.relative_to(PACKAGE) for path in FILES):
        # The job is tested by what it does, not file by file.
        if path.parts[0] == "train" or path.name == "__init__.py":
            continue
        mirror = Path("tests", "unit", path.parent, f"test_{path.name}")
        if not (ROOT / mirror).is_file():
            missing.append(f"{mirror} for fp8dist/{path}")
    assert not missing


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import fp8dist", {"fp8dist"}),
        ("import fp8dist.config as c, torch", {"fp8dist.config"}),
        ("from fp8dist import config", {"fp8dist.config"}),
        ("from fp8dist.config import Float8Config", {"fp8dist.config"}),
        ("def f():\n    from .. import config", {"fp8dist.config"}),
        ("from ..config import Float8Config", {"fp8dist.config"}),
        ("from . import sharded_weight", {"fp8dist.tensors.sharded_weight"}),
        ("from torch import nn", set()),
    ],
)
def test_sees_every_way_to_import(source: str, expected: set[str]) -> None:
    assert imports("fp8dist.tensors.float8_tensor", source, is_package=False) == expected
