"""Command lines and TOML as the tests of the configuration give them to it."""

import shlex
from pathlib import Path

import pytest

from fp8dist.train.config import JobConfig, parse_config

FLOAT8_TOML = """
[model]
converters = ["quantize.linear.float8"]
[quantize.linear.float8]
enable_fsdp_float8_all_gather = true
precompute_float8_dynamic_scale_for_fsdp = true
filter_fqns = ["output", "auto_filter_small_kn"]
[compile]
enable = true
components = ["model", "loss"]
"""

FLOAT8 = "quantize.linear.float8"
MX = "quantize.linear.mx"
GROUPED_FLOAT8, GROUPED_MX = "quantize.grouped_mm.float8", "quantize.grouped_mm.mx"


def parse(line: str) -> JobConfig:
    """What a shell hands over for this command line, parsed."""
    return parse_config(shlex.split(line))


def parse_toml(tmp_path: Path, toml: str, line: str = "") -> JobConfig:
    file = tmp_path / "job.toml"
    file.write_text(toml)
    return parse(f"--job.config_file {file} {line}")


def refusal(line: str) -> str:
    with pytest.raises(ValueError) as caught:
        parse(line)
    return str(caught.value)


def toml_refusal(tmp_path: Path, toml: str) -> str:
    with pytest.raises(ValueError) as caught:
        parse_toml(tmp_path, toml)
    return str(caught.value)
