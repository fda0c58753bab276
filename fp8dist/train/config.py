"""Reading a `JobConfig` from a TOML file and the command line."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from fp8dist.train.config_checks import check_combinations
from fp8dist.train.config_values import (
    LIMITS,
    convert,
    did_you_mean,
    metavar,
    text,
    without_none,
)
from fp8dist.train.job_config import JobConfig
from fp8dist.train.torchtitan_keys import UNUSED

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger("fp8dist")

HELP_WIDTH = 120  # characters
DESCRIPTION = """\
Train a Llama, or a mixture of experts, under FSDP2, with float8 where asked:
  torchrun --nproc-per-node 8 -m fp8dist.train \\
    --model.converters quantize.linear.float8 --compile.enable
- A key is --section.key value or --section.key=value; a switch may stand alone.
- The names of a list are comma-separated. none: the value is not set.
- The TOML file of --job.config_file has the same sections and keys.
- Steps are optimizer steps.
"""
SHIPPED_CONFIGS = Path(__file__).parents[2] / "scripts" / "configs"


def validate(config: JobConfig) -> None:
    """Check names, limits and combinations of values; what needs the ranks, the model's
    flavors or the files is checked where those are known.

    Raises:
        ValueError: names the key, what was found and what to do.
    """
    for key, annotation in key_types().items():
        value = _get(config, key)
        convert(key, annotation, value)
        if key in LIMITS and value is not None:
            holds, words = LIMITS[key]
            if not holds(value):
                raise ValueError(f"{key} is {value}; it must be {words}")
    check_combinations(config)


def parse_config(argv: Sequence[str]) -> JobConfig:
    """The validated configuration of a job from its command line (without the program's name).

    The file of `--job.config_file` is read first, then the other flags override it. Keys that
    torchtitan has and this trainer has no use for are named in one warning. `--help` prints the
    flags and exits.

    Raises:
        ValueError: an unknown key, a wrong value, or a file that is missing or no TOML.
    """
    if "--help" in argv or "-h" in argv:
        # On a wider screen tyro sets sections side by side, which breaks the longest keys in two.
        os.environ["COLUMNS"] = str(min(shutil.get_terminal_size().columns, HELP_WIDTH))
        _tyro(JobConfig(), ["--help"])
    flags = _read_flags(argv)
    config, unused = JobConfig(), []
    if file := flags.get("job.config_file"):
        for key, value in _read_toml(Path(file).expanduser()).items():
            if key in UNUSED:
                unused.append(key)
            else:
                _set(config, key, value)
    unused += [key for key in flags if key in UNUSED]
    if unused:
        logger.warning(
            "torchtitan keys without effect in this trainer: %s", ", ".join(dict.fromkeys(unused))
        )
    args = [f"--{key}={value}" for key, value in flags.items() if key not in UNUSED]
    config = _tyro(config, args)
    validate(config)
    return config


@functools.cache
def key_types() -> dict[str, Any]:
    """Every dotted key of `JobConfig` with the type of its values."""

    def walk(section: Any, prefix: str) -> dict[str, Any]:
        keys: dict[str, Any] = {}
        annotations = get_type_hints(section)
        for name in (one.name for one in dataclasses.fields(section)):
            annotation = annotations[name]
            if dataclasses.is_dataclass(annotation):
                keys |= walk(annotation, f"{prefix}{name}.")
            else:
                keys[prefix + name] = annotation
        return keys

    return walk(JobConfig, "")


@functools.cache
def _sections() -> frozenset[str]:
    """Every dotted section, torchtitan's included."""
    keys = [*key_types(), *UNUSED]
    return frozenset(key.rsplit(".", depth)[0] for key in keys for depth in (1, 2, 3))


def _get(config: JobConfig, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def _set(config: JobConfig, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    setattr(functools.reduce(getattr, sections, config), name, value)


def _known(key: str) -> bool:
    return key in key_types() or key in UNUSED


def _unknown(source: str, key: str) -> ValueError:
    """The error for a key that neither this trainer nor torchtitan has."""
    # A key in the wrong section is the likeliest: training.seed for debug.seed, --steps alone.
    name = key.rsplit(".", 1)[-1]
    same_name = [known for known in key_types() if known.rsplit(".", 1)[-1] == name]
    hint = (
        did_you_mean(key, same_name, cutoff=0)
        or did_you_mean(key, key_types(), cutoff=0.7)
        or did_you_mean(key, [*key_types(), *sorted(UNUSED)])
    )
    return ValueError(f"{source}: unknown key {key!r}{hint}")


def _read_toml(file: Path) -> dict[str, Any]:
    """Dotted key -> value of a TOML file, unused keys included."""
    if not file.is_file():
        folder = SHIPPED_CONFIGS if SHIPPED_CONFIGS.is_dir() else file.parent
        shipped = ", ".join(sorted(path.name for path in folder.glob("*.toml"))) or "none"
        raise ValueError(
            f"job.config_file: there is no file {str(file)!r}; those in "
            f"{'scripts/configs' if folder == SHIPPED_CONFIGS else folder}: {shipped}"
        )
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # TOML's and UTF-8's errors are both of this kind
        raise ValueError(f"{file}: not a TOML file: {error}") from None
    values: dict[str, Any] = {}
    _flatten(str(file), tables, "", values)
    return values


def _flatten(file: str, table: dict[str, Any], prefix: str, values: dict[str, Any]) -> None:
    for name, value in table.items():
        key = prefix + name
        if _known(key):
            annotation = key_types().get(key)
            values[key] = convert(f"{file}: {key}", annotation, value) if annotation else value
        elif isinstance(value, dict) and (value or key in _sections()):
            _flatten(file, value, f"{key}.", values)
        elif key in _sections():
            raise ValueError(f"{file}: {key} is {value!r}; expected a section, [{key}]")
        else:
            raise _unknown(file, key)


def _read_flags(argv: Sequence[str]) -> dict[str, str]:
    """Dotted key -> text of each flag, checked, unused keys included; the last of several wins."""
    flags: dict[str, str] = {}
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ValueError(
                f"command line: unexpected {flag!r}; expected --section.key=value (lists are "
                f"comma-separated, without spaces)"
            )
        name, equals, value = flag[2:].partition("=")
        key, negated = _resolve(name.replace("-", "_"))
        following = rest[0] if rest and not rest[0].startswith("--") else None
        switch = without_none(key_types().get(key))[0] is bool
        if negated:
            if equals:
                raise ValueError(f"command line: --{name} takes no value, found {value!r}")
            value = "false"
        elif equals:
            pass
        elif switch and (following is None or following.lower() not in ("true", "false", "none")):
            value = "true"
        elif following is not None:
            value = rest.pop(0)
        elif key not in UNUSED:
            raise ValueError(f"command line: --{key} needs a value")
        if key not in UNUSED:
            # Checked before tyro sees it, so that a wrong value is the same error as in a file.
            convert(f"command line: {key}", key_types()[key], value)
        flags[key] = value
    return flags


def _resolve(name: str) -> tuple[str, bool]:
    """The key a flag names, and whether it is negated: `--no-a.b` and `--a.no-b` are a.b=false."""
    if _known(name):
        return name, False
    *sections, last = name.split(".")
    for positive in (name.removeprefix("no_"), ".".join([*sections, last.removeprefix("no_")])):
        switch = without_none(key_types().get(positive))[0] is bool
        if positive != name and (switch or positive in UNUSED):
            return positive, True
    raise _unknown("command line", name)


def _tyro(default: JobConfig, args: Sequence[str]) -> JobConfig:
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def value_of_a_key(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if info.type not in key_types().values():
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavar(info.type),
            instance_from_str=lambda values: convert("value", info.type, values[0]),
            is_instance=lambda value: True,
            str_from_instance=lambda value: [text(value)],
        )

    return tyro.cli(
        JobConfig,
        prog="python -m fp8dist.train",
        description=DESCRIPTION,
        default=default,
        args=list(args),
        use_underscores=True,
        registry=registry,
        # A switch is an ordinary key whose value `_read_flags` fills in when it is left out.
        config=(tyro.conf.FlagConversionOff,),
    )
