"""The roundings for people: when to use which, and the options of their methods, read from the methods themselves."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..stages.methods import BY_ROWS, ROUNDINGS, method_class, rounding_info


@dataclass(frozen=True)
class Option:
    """One option of a method."""

    name: str
    default: Any
    help: str


@dataclass(frozen=True)
class Rounding:
    """One rounding."""

    name: str
    help: str
    options: tuple[Option, ...]


def describe_roundings() -> list[Rounding]:
    """All registered ones."""
    return [
        Rounding(name, rounding_info(name).help, () if name in BY_ROWS else _options(method_class(name)))
        for name in ROUNDINGS
    ]


def _options(cls: type[Any]) -> tuple[Option, ...]:
    """Fields of a method with the sentences below them."""
    helps = _field_docs(cls)
    return tuple(Option(item.name, item.default, helps.get(item.name, "")) for item in fields(cls))


def _field_docs(cls: type[Any]) -> Mapping[str, str]:
    """The string that follows each field in the source of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            text = ast.literal_eval(after.value)
            found[field.target.id] = " ".join(text.split())
    return found
