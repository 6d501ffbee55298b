"""The quantize stage: which format each targeted layer gets, and the chain of steps that gives it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from ..formats.comfy import LayerOptions, storage
from ..formats.errors import PlanError, UsageError, did_you_mean, shown
from ..formats.format import Format
from ..formats.registry import make_format
from ..formats.rotation import is_power_of_four, rotation_group
from .keeping import keep
from .packing import Pack
from .reading import Decode, Read
from .rotation import Rotate
from .rounding import Round
from .rules import is_scale
from .scaling import Scale
from .stage import Context
from .work import LayerPlan, Step
from .writing import Write

ROUNDINGS = ("mse", "nearest")
NONFINITE = ("refuse", "keep")
PER_LAYER = ("format", "scaling", "block_size", "rotate", "rounding", "full_precision_matmul", "input_scale")
"""Options that a rule may set for single layers."""


@dataclass(frozen=True)
class Quantize:
    """Quantizes the targeted layers. Settings of a layer's rule win over these."""

    verb: ClassVar[str] = "quantize"

    format: str
    """fp8, fp8_e5m2, int8, mxfp8 or nvfp4."""
    scaling: str | None = None
    """tensor, row or block; None: the format's default."""
    block_size: int | None = None
    """Edge of the square blocks of scaling ``block``."""
    rotate: str | None = None
    """``hadamard`` (the largest group that divides) or ``hadamard:256``; INT8 row only."""
    rounding: str = "mse"
    """``mse``: scales of least squared error; ``nearest``: scales from the largest weight."""
    full_precision_matmul: bool = False
    """Mark layers so that the client dequantizes them and multiplies in full precision."""
    input_scale: float | None = None
    """A static activation scale to store with FP8 layers."""
    nonfinite: str = "refuse"
    """What a NaN or Inf weight does: ``refuse`` the conversion, or ``keep`` that layer unquantized."""

    def __post_init__(self) -> None:
        _check_choice("nonfinite", self.nonfinite, NONFINITE)
        _checked_format({name: getattr(self, name) for name in PER_LAYER})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def plan(self, layers: Sequence[LayerPlan], context: Context) -> list[LayerPlan]:
        """Raises PlanError when no layer at all can be quantized; UsageError for a rule's impossible settings."""
        planned = [layer if layer.settings is None else self._plan_layer(layer, context) for layer in layers]
        if not any(layer.format for layer in planned):
            reasons = Counter(layer.reason for layer in planned if layer.reason)
            most = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
            why = most or "it has no linear layers"
            raise PlanError(f"nothing to quantize to {self.format}: {why}. Change the target, format or block size")
        return planned

    def _plan_layer(self, plan: LayerPlan, context: Context) -> LayerPlan:
        assert plan.settings is not None
        chosen = self._merge(plan.settings.overrides)
        fmt = _checked_format(chosen)
        shape = plan.layer.weight.shape
        barred = plan.settings.barred.get(fmt.name)
        reason = barred or fmt.refuse((shape[0], shape[1]))
        if reason:
            return keep(plan.layer, reason)
        return _chain(plan, fmt, chosen, context)

    def _merge(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """This stage's options with a layer's own; another format does not inherit scaling, blocks or rotation."""
        options = {name: getattr(self, name) for name in PER_LAYER}
        if overrides.get("format", self.format) != self.format:
            options.update(scaling=None, block_size=None, rotate=None, input_scale=None)
        elif overrides.get("scaling", self.scaling) != self.scaling:
            options.update(block_size=None, rotate=None)
        return {**options, **overrides}


def _checked_format(options: Mapping[str, Any]) -> Format:
    """The format of these options; UsageError for one that is unknown or that would have no effect."""
    fmt = make_format(options["format"], options["scaling"], options["block_size"])
    _check_choice("rounding", options["rounding"], ROUNDINGS)
    _check_rotation(options["rotate"], fmt)
    scale = options["input_scale"]
    if scale is not None and not is_scale(scale):
        raise UsageError(f"input scale {shown(scale)} must be a positive number that float32 holds")
    if scale is not None and not fmt.name.startswith("fp8"):
        raise UsageError(f"an input scale belongs to FP8 layers, not to {fmt.name}; drop it")
    return fmt


def _chain(plan: LayerPlan, fmt: Format, chosen: Mapping[str, Any], context: Context) -> LayerPlan:
    layer, (rows, columns) = plan.layer, plan.layer.weight.shape
    group = _rotation(chosen["rotate"], columns)
    if chosen["rotate"] and group is None:
        context.notes.append(f"{layer.name}: not rotated, no group of {chosen['rotate']} divides its {columns} columns")
    options = LayerOptions(group, chosen["full_precision_matmul"], chosen["input_scale"], layer.weight.dtype)
    stored = storage(layer.name, (rows, columns), fmt, options)
    arguments = (fmt.name, fmt.scaling, fmt.block_size)
    first: Step = Read(fmt.rows_multiple) if layer.encoding is None else Decode(fmt.rows_multiple)
    steps: list[Step] = [first]
    if group:
        steps.append(Rotate(group))
    steps += [Scale(arguments, chosen["rounding"] == "mse"), Round(arguments), Pack(arguments, stored), Write()]
    words = [fmt.name, *([] if fmt.scaling == "group" else [fmt.scaling])]
    if fmt.scaling == "block":
        words.append(str(fmt.block_size))
    return replace(
        plan, steps=tuple(steps), outputs=stored.specs, constants=stored.constants, entry=dict(stored.marker),
        format=" ".join(words) + (f" rotated {group}" if group else ""), reason="", settings=None,
    )  # fmt: skip


def _check_choice(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"unknown {option} {value!r}{did_you_mean(str(value), known)}")


def _check_rotation(rotate: str | None, fmt: Format) -> None:
    if rotate is None:
        return
    kind, _, size = rotate.partition(":")
    if kind != "hadamard" or not re.fullmatch("[0-9]{1,9}|auto|", size):
        raise UsageError(f"unknown rotation {shown(rotate)}; write hadamard or hadamard:256")
    if size.isdigit() and not is_power_of_four(int(size)):
        raise UsageError(f"rotation group {size} is not a power of four: clients refuse it; use 4, 16, 64, 256 or 1024")
    if fmt.name != "int8" or fmt.scaling != "row":
        has = f"{fmt.name} {fmt.scaling}"
        raise UsageError(f"rotation needs int8 with row scaling, not {has}: no client undoes it there")


def _rotation(rotate: str | None, columns: int) -> int | None:
    """The group that a layer is rotated by (``rotate`` is checked already), or None when none divides its columns."""
    if rotate is None:
        return None
    size = rotate.partition(":")[2]
    if not size.isdigit():
        return rotation_group(columns)
    return int(size) if columns % int(size) == 0 else None
