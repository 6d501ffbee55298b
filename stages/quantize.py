"""The quantize stage: which format, rounding and statistics each targeted layer gets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from ..formats.errors import PlanError, UsageError, did_you_mean, listed, shown
from ..formats.format import Format
from ..formats.registry import make_format
from ..formats.rotation import is_power_of_four, rotation_group
from ..formats.tensors import FLOAT_DTYPES, TensorRef
from .chain import Choice, quantized
from .evidence import NAMED, TAKE_INPUT_SCALES, Evidence, check_input_scale
from .keeping import keep
from .methods import ROUNDINGS, make_method
from .scale_files import ScaleFile
from .stage import Context
from .work import LayerPlan

NONFINITE = ("refuse", "keep")
KEEP = "keep"
PER_LAYER = (
    "format", "scaling", "block_size", "rotate", "rounding", "rounding_options", "full_precision_matmul", "input_scale",
)  # fmt: skip
"""Options that a rule may set for single layers."""


@dataclass(frozen=True)
class Quantize:
    """Quantizes the targeted layers. Settings of a layer's rule win over these."""

    verb: ClassVar[str] = "quantize"

    format: str
    """fp8, fp8_e5m2, int8, mxfp8, hybrid_mxfp8 or nvfp4."""
    scaling: str | None = None
    """tensor, row or block; None: the format's default."""
    block_size: int | None = None
    """Edge of the square blocks of scaling ``block``."""
    rotate: str | None = None
    """``hadamard`` (the largest group that divides) or ``hadamard:256``; INT8 row only."""
    rounding: str = "mse"
    """``mse``: scales of least squared error; ``nearest``: scales from the largest weight; ``learned``, ``calibrated``
    and ``gradient``: methods that look at a whole matrix (docs/ROUNDING.md)."""
    rounding_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Options of such a method, such as ``{"damping": 0.1}``."""
    statistics: str | None = None
    """Statistics of the layers' inputs, as ``quantloom calibrate`` writes them."""
    without_statistics: str = "mse"
    """What a layer that the statistics lack gets instead of ``calibrated``: another rounding, or ``keep``."""
    bias_correction: bool = False
    """Add (W - W') E[x] to biases; needs statistics."""
    full_precision_matmul: bool = False
    """Mark layers so that the client dequantizes them and multiplies in full precision."""
    input_scale: float | str | None = None
    """A static activation scale to store with FP8 and NVFP4 layers: a number, or from the statistics ``amax`` or a
    percentile such as ``p99.9``."""
    input_scales: str | None = None
    """A file of such scales by layer, JSON or ``.input_scale`` tensors; they win over ``input_scale``."""
    nonfinite: str = "refuse"
    """What a NaN or Inf weight does: ``refuse`` the conversion, or ``keep`` that layer unquantized."""

    def __post_init__(self) -> None:
        if not isinstance(self.rounding_options, Mapping):
            raise UsageError(f"rounding_options must map names to values, is {shown(self.rounding_options)}")
        _check_choice("nonfinite", self.nonfinite, NONFINITE)
        _check_choice("without_statistics", self.without_statistics, (*ROUNDINGS, KEEP))
        if self.without_statistics == "calibrated":
            raise UsageError("without_statistics: calibrated needs them itself; name mse, nearest, learned or keep")
        if self.bias_correction and self.statistics is None:
            raise UsageError("bias correction needs the mean of each layer's input: name statistics, or drop it")
        self.checked_format({name: getattr(self, name) for name in PER_LAYER})

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rounding_options": dict(self.rounding_options)}

    def identity(self) -> dict[str, Any]:
        """The options as digests and output files have them: statistics by their content, wherever they lie."""
        values = self.to_dict()
        if self.statistics is not None:
            values["statistics"] = Evidence.open(self.statistics).digest
        if self.input_scales is not None:
            values["input_scales"] = ScaleFile.open(self.input_scales).digest
        return values

    def plan(self, layers: Sequence[LayerPlan], context: Context) -> list[LayerPlan]:
        """Raises PlanError when no layer at all can be quantized, or statistics or a file of activation scales do not
        fit the checkpoint; UsageError for a rule's impossible settings."""
        evidence = None
        if self.statistics is not None:
            evidence = Evidence.open(self.statistics)
            evidence.check(layers)
        numbers = {} if self.input_scales is None else ScaleFile.open(self.input_scales).of(layers)
        planner = _Planner(self, evidence, numbers, context, {plan.layer.name: plan for plan in layers})
        planned = [plan if plan.settings is None else planner.plan(plan) for plan in layers]
        if not any(layer.format for layer in planned):
            reasons = Counter(layer.reason for layer in planned if layer.reason)
            most = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
            why = most or "it has no linear layers"
            raise PlanError(f"nothing to quantize to {self.format}: {why}. Change the target, format or block size")
        planner.announce()
        if idle := [name for name in numbers if name not in planner.scaled]:
            context.notes.append(
                f"{self.input_scales}: scales of {len(idle)} layers are not used, which do not become FP8 or NVFP4: "
                f"{listed(idle, NAMED)}"
            )
        return [plan for plan in planned if plan.layer.name not in planner.corrected]

    def merged(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """These options with a layer's own; another format does not inherit scaling, blocks or rotation."""
        options = {name: getattr(self, name) for name in PER_LAYER}
        if overrides.get("format", self.format) != self.format:
            options.update(scaling=None, block_size=None, rotate=None, input_scale=None)
        elif overrides.get("scaling", self.scaling) != self.scaling:
            options.update(block_size=None, rotate=None)
        if overrides.get("rounding", self.rounding) != self.rounding:
            options.update(rounding_options={})
        return {**options, **overrides}

    def checked_format(self, options: Mapping[str, Any]) -> Format:
        """The format of a layer's options; UsageError for one that is unknown or that would have no effect."""
        fmt = make_format(options["format"], options["scaling"], options["block_size"])
        method = make_method(options["rounding"], options["rounding_options"])
        if method is not None and method.needs_moments and self.statistics is None:
            raise UsageError(
                f"rounding {method.name} needs statistics of the layers' inputs: make them with `quantloom "
                "calibrate MODEL --random-tokens --out stats.zarr` and name them with --statistics stats.zarr"
            )
        _check_rotation(options["rotate"], fmt)
        check_input_scale(options["input_scale"], fmt, self.statistics)
        return fmt


class _Planner:
    """One pass over the layers."""

    def __init__(
        self, stage: Quantize, evidence: Evidence | None, numbers: Mapping[str, float], context: Context,
        layers: Mapping[str, LayerPlan],
    ) -> None:  # fmt: skip
        self.stage, self.evidence, self.numbers, self.context, self.layers = stage, evidence, numbers, context, layers
        self.corrected: set[str] = set()
        """Biases that are written with their weights."""
        self.missing: list[str] = []
        """Layers without statistics."""
        self.scaled: set[str] = set()
        """Layers with an activation scale of their own."""
        self._options: dict[str, tuple[dict[str, Any], Format]] = {}
        self._choices: dict[str, Choice] = {}
        """What layers share whose settings of their own are the same."""

    def plan(self, plan: LayerPlan) -> LayerPlan:
        """The chain of a targeted layer, or why it is kept."""
        assert plan.settings is not None
        own, name = repr(plan.settings.overrides), plan.layer.name
        if own not in self._options:
            merged = self.stage.merged(plan.settings.overrides)
            self._options[own] = merged, self.stage.checked_format(merged)
        chosen, fmt = self._options[own]
        rows, columns = plan.layer.weight.shape
        reason = plan.settings.barred.get(fmt.name) or fmt.refuse((rows, columns))
        if self.evidence is not None and name not in self.evidence and not reason:
            self.missing.append(name)
            if chosen["rounding"] == "calibrated":
                reason = "no statistics of its inputs" if self.stage.without_statistics == KEEP else None
                chosen = {**chosen, "rounding": self.stage.without_statistics, "rounding_options": {}}
        if reason:
            return keep(plan.layer, reason)
        if self.evidence is not None or name in self.numbers or chosen["rotate"]:
            return quantized(plan, self._choice(plan, fmt, chosen))
        if own not in self._choices:
            self._choices[own] = self._choice(plan, fmt, chosen)
        return quantized(plan, self._choices[own])

    def _choice(self, plan: LayerPlan, fmt: Format, chosen: Mapping[str, Any]) -> Choice:
        name, columns, rotate = plan.layer.name, plan.layer.weight.shape[1], chosen["rotate"]
        rotation = _rotation(rotate, columns)
        if rotate and rotation is None:
            self.context.notes.append(f"{name}: not rotated, no group of {rotate} divides its {columns} columns")
        bias, inputs, scale = None, None, chosen["input_scale"]
        if self.evidence is not None:
            bias = self._bias(plan, self.evidence) if self.stage.bias_correction and name in self.evidence else None
            inputs = self.evidence.inputs(name, rotation, centred=bias is not None)
            scale = self.evidence.input_scale(name, scale, fmt)
        if name in self.numbers and fmt.name in TAKE_INPUT_SCALES:
            scale = self.numbers[name]
            self.scaled.add(name)
        return Choice(
            fmt, chosen["rounding"], chosen["rounding_options"], rotation, chosen["full_precision_matmul"], scale,
            inputs, bias,
        )  # fmt: skip

    def _bias(self, plan: LayerPlan, evidence: Evidence) -> TensorRef | None:
        """The layer's bias, when it has one to correct; UsageError when its mean input was never measured."""
        bias = self.layers.get(f"{plan.layer.name}.bias")
        if bias is None or bias.layer.weight.shape != plan.layer.weight.shape[:1] or bias.layer.encoding is not None:
            return None
        if bias.layer.weight.dtype not in FLOAT_DTYPES:
            return None
        evidence.check_mean(plan.layer.name)
        self.corrected.add(bias.layer.name)
        return bias.layer.tensors[0]

    def announce(self) -> None:
        """Says which layers had to do without statistics."""
        if self.missing:
            other = "kept" if self.stage.without_statistics == KEEP else f"rounded by {self.stage.without_statistics}"
            what = f"{other} instead of calibrated" if self.stage.rounding == "calibrated" else "without them"
            names = listed(self.missing, NAMED)
            self.context.notes.append(f"no statistics for {len(self.missing)} layers, {what}: {names}")


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
