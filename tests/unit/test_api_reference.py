"""What the API reference is built from: every public name says what it is for."""

import ast
import inspect
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

import pytest

import fp8dist

NAMES = [name for name in fp8dist.__all__ if name != "Float8LinearConfig"]  # torchao's
FUNCTIONS = [name for name in NAMES if inspect.isfunction(getattr(fp8dist, name))]


def own_docstring(obj: Any) -> str:
    """Not one that a class has from its base."""
    return (
        inspect.cleandoc(vars(obj).get("__doc__") or "")
        if inspect.isclass(obj)
        else (inspect.getdoc(obj) or "")
    )


def arguments(obj: Callable[..., Any]) -> Iterator[str]:
    for name, parameter in inspect.signature(obj).parameters.items():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            yield name


def explained(docstring: str) -> set[str]:
    """The names that begin an entry of the section Args."""
    _, _, after = docstring.partition("Args:\n")
    section = after.partition("\n\n")[0].splitlines()
    return {line.strip().partition(":")[0] for line in section if ":" in line}


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_a_docstring_of_its_own(name: str) -> None:
    docstring = own_docstring(getattr(fp8dist, name))
    # Dataclasses without one are given their signature.
    assert docstring and not docstring.startswith(f"{name}(")


@pytest.mark.parametrize("name", [*FUNCTIONS, "Float8Config", "float8_module_filter"])
def test_arguments_and_errors_are_explained(name: str) -> None:
    obj = getattr(fp8dist, name)
    docstring = own_docstring(obj)
    assert "Raises:\n    ValueError: " in docstring
    assert set(arguments(obj)) <= explained(docstring)


@pytest.mark.parametrize("name", ["Float8Config", "Float8Linear"])
def test_every_public_member_is_explained(name: str) -> None:
    """Fields are in Args of their class, or have a docstring below them."""
    cls = getattr(fp8dist, name)
    own = {key: value for key, value in vars(cls).items() if not key.startswith("_")}
    properties = [key for key, value in own.items() if isinstance(value, property)]
    assert all(inspect.getdoc(own[key]) for key in properties)
    body = ast.parse(inspect.getsource(cls)).body[0].body
    documented = {
        field.target.id
        for field, below in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
    }
    assert set(inspect.get_annotations(cls)) <= documented | explained(own_docstring(cls))


def test_types_are_public() -> None:
    """Checkers of types read the annotations of a package only if it has this file."""
    assert files("fp8dist").joinpath("py.typed").is_file()
