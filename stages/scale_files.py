"""Files of activation scales: a number per layer, from JSON or from the ``.input_scale`` tensors of a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..formats.errors import PlanError, UsageError, listed, shown
from ..formats.safetensors import parse_json
from ..formats.source import open_source
from ..formats.tensors import FLOAT_DTYPES, TensorRef
from .evidence import NAMED
from .layer_names import LayerNames
from .reading import read_whole
from .rules import is_scale, nearest_names
from .work import LayerPlan

INPUT_SCALE = ".input_scale"


@dataclass(frozen=True)
class ScaleFile:
    """Activation scales by layer, as a file gives them."""

    path: str
    numbers: Mapping[str, float]
    """By the file's own names, without ``.input_scale``."""

    @classmethod
    def open(cls, path: str) -> ScaleFile:
        """Reads ``{layer: number}`` from a .json file, or every ``.input_scale`` of a checkpoint; other tensors of it
        are not looked at.

        Raises UsageError, with the list, for values that are not one positive number that float32 holds, and for a
        file without any; CheckpointError for a broken file.
        """
        given = _from_json(path) if path.endswith(".json") and not path.endswith(".index.json") else _from_tensors(path)
        if not given:
            raise UsageError(f"{path}: holds no activation scale: neither {{layer: number}} nor {INPUT_SCALE} tensors")
        numbers = {name: number for name, value in given.items() if (number := _number(value)) is not None}
        if wrong := [f"{name}: {shown(value)}" for name, value in given.items() if name not in numbers]:
            raise UsageError(
                f"{path}: activation scales that are not one positive number that float32 holds: "
                f"{listed(wrong, NAMED, '; ')}"
            )
        return cls(path, numbers)

    @property
    def digest(self) -> str:
        """sha256 (hex) over names and numbers."""
        return hashlib.sha256(json.dumps(sorted(self.numbers.items())).encode()).hexdigest()

    def of(self, layers: Iterable[LayerPlan]) -> dict[str, float]:
        """The scales by the names of these layers. PlanError, with the list, for names that mean no matrix among them
        or that mean one twice."""
        names = LayerNames(plan.layer.name for plan in layers if len(plan.layer.weight.shape) == 2)
        found: dict[str, float] = {}
        unknown, twice = [], []
        for given, number in self.numbers.items():
            name = names.find(given)
            if name is None:
                unknown.append(given)
            elif name in found:
                twice.append(given)
            else:
                found[name] = number
        if unknown:
            near = nearest_names(unknown[0], sorted(names.known))
            raise PlanError(
                f"{self.path}: {len(unknown)} of {len(self.numbers)} scales are for layers that the checkpoint lacks: "
                f"{listed(unknown, NAMED)}{near}"
            )
        if twice:
            raise PlanError(f"{self.path}: gives layers a scale twice: {listed(twice, NAMED)}")
        return found


def _from_json(path: str) -> dict[str, object]:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot read the activation scales: {error.strerror or error}") from error
    values = parse_json(content, path)
    if not isinstance(values, dict):
        raise UsageError(f"{path}: must be a JSON object {{layer: number}}, is {type(values).__name__}")
    bare = {name.removesuffix(INPUT_SCALE): value for name, value in values.items()}
    if len(bare) < len(values):
        twice = [name for name in values if name.endswith(INPUT_SCALE) and name.removesuffix(INPUT_SCALE) in values]
        raise UsageError(f"{path}: gives layers a scale twice: {listed(twice, NAMED)}")
    return bare


def _from_tensors(path: str) -> dict[str, object]:
    refs = open_source(path).refs
    return {name.removesuffix(INPUT_SCALE): _value(ref) for name, ref in refs.items() if name.endswith(INPUT_SCALE)}


def _value(ref: TensorRef) -> object:
    """The stored number; words for what is none."""
    if ref.numel != 1 or ref.dtype not in FLOAT_DTYPES:
        return f"{ref.dtype} of shape {list(ref.shape)}"
    return float(read_whole(ref)[0])


def _number(value: object) -> float | None:
    """The scale, or None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not is_scale(value):
        return None
    return float(value)
