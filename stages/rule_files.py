"""Files of per-layer rules: JSON, YAML or TOML, one mapping of pattern to settings. Equal keys are errors."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..formats.errors import UsageError, shown
from .rules import Rule


def load_rules(path: str | Path) -> tuple[Rule, ...]:
    """The rules of a JSON, YAML or TOML file, in file order. UsageError names the file, and the line where known."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"layer file {file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"layer file {file}: not UTF-8 text (byte {error.start})") from None
    except ValueError as error:  # a NUL, or what is no Unicode
        raise UsageError(f"layer file {shown(str(file))}: {error}") from None
    data = _parse(file, text)
    if not isinstance(data, Mapping):
        raise UsageError(f"layer file {file}: holds {_kind(data)}, not a mapping of pattern to settings")
    rules = []
    for order, (pattern, settings) in enumerate(data.items()):
        if not isinstance(pattern, str):
            raise UsageError(f"layer file {file}: {shown(pattern)} is no pattern; quote it")
        if not isinstance(settings, Mapping):
            raise UsageError(
                f"layer file {file}: {shown(pattern)} has {_kind(settings)} instead of settings such as {{format: fp8}}"
            )
        try:
            rules.append(Rule(pattern, dict(settings), order))
        except UsageError as error:
            raise UsageError(f"layer file {file}: {error}") from None
    if not rules:
        raise UsageError(f"layer file {file}: holds no rule")
    return tuple(rules)


def _kind(value: object) -> str:
    return {list: "a list", str: "text", type(None): "nothing"}.get(type(value), type(value).__name__)


def _parse(file: Path, text: str) -> object:
    suffix = file.suffix.lower()
    try:
        if suffix == ".json":
            return json.loads(text, object_pairs_hook=no_duplicates)
        if suffix in (".yaml", ".yml"):
            return yaml.load(text, Loader=_yaml_loader())
        if suffix == ".toml":
            return tomllib.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"layer file {file}, line {error.lineno}, column {error.colno}: {error.msg}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"layer file {file}: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"layer file {file}{place}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"layer file {file}: {error}") from None
    raise UsageError(f"layer file {file}: the name must end in .json, .yaml, .yml or .toml")


def no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object of these pairs; ValueError for a key that is given twice."""
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{shown(key)} is given twice")
        found[key] = value
    return found


@cache
def _yaml_loader() -> type[yaml.SafeLoader]:
    """PyYAML keeps the last of two equal keys without a word; a rule must not vanish."""

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        problem = f"{shown(key.value)} is given twice"
                        raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    return Loader
