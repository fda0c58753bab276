"""Say whether this Python can run fp8dist with one of its extras.

    python scripts/probe_environment.py train

Prints the number of GPUs torch can use and exits with 0, or prints the requirements of
setup.cfg that are missing and exits with 1. Needs nothing but the standard library to say so.
"""

from __future__ import annotations

import configparser
import importlib.metadata
import re
import sys
from pathlib import Path

SETUP_CFG = Path(__file__).resolve().parent.parent / "setup.cfg"


def requirements(extra: str) -> list[str]:
    """Requirement strings of the package and of `extra`, its nested extras expanded."""
    parser = configparser.ConfigParser()
    parser.read(SETUP_CFG)
    extras = parser["options.extras_require"]

    def expand(text: str) -> list[str]:
        found: list[str] = []
        for line in filter(None, map(str.strip, text.splitlines())):
            nested = re.fullmatch(r"fp8dist\[(\w+)\]", line)
            found += expand(extras[nested[1]]) if nested else [line]
        return found

    return expand(parser["options"]["install_requires"]) + expand(extras[extra])


def missing(extra: str) -> list[str]:
    """Those requirements that this environment does not meet."""
    try:
        from packaging.requirements import Requirement
        from packaging.version import Version
    except ImportError:
        # Several of the requirements depend on it, so they cannot all be here.
        return ["packaging"]
    unmet = []
    for text in requirements(extra):
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            found = Version(importlib.metadata.version(requirement.name))
        except importlib.metadata.PackageNotFoundError:
            unmet.append(requirement.name)
            continue
        # Containers carry builds such as 2.11.0a0+git1234, which count as 2.11.
        if not requirement.specifier.contains(found.base_version):
            unmet.append(f"{requirement.name}{requirement.specifier} (has {found})")
    return unmet


def main(extra: str) -> int:
    unmet = missing(extra)
    if unmet:
        print(", ".join(unmet))
        return 1
    try:
        import torch
    except Exception as error:
        print(f"a torch that imports ({error})")
        return 1
    print(torch.cuda.device_count())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
