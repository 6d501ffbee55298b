"""Where activation scales come from: numbers in a file, measured inputs, directions that an adapter points along."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..formats.adapter_reading import down_factors
from ..formats.errors import PlanError, UsageError, listed
from ..formats.source import open_source
from ..formats.tensors import TensorRef
from .adapter_inputs import HEADROOM, channel_energy, percentile
from .evidence import NAMED, Evidence, activation_scale, percent
from .layer_names import LayerNames
from .scale_files import ScaleFile
from .stage import Context
from .work import LayerPlan

if TYPE_CHECKING:
    import torch

Plans = Mapping[str, LayerPlan]
"""Quantized layers by name."""


@dataclass(frozen=True)
class Found:
    """An activation scale."""

    scale: float
    words: str
    """Where it is from, for plans and reports."""
    assumed: bool = False
    """Whether the size of inputs was not measured."""
    clips: float = 1.0
    """How many times as large as what the scale lets through the largest input was."""


class Source(Protocol):
    """What scales come from."""

    @property
    def digest(self) -> str:
        """sha256 (hex): tells sources of different content apart, wherever they lie."""

    def scales(self, takers: Plans, layers: Sequence[LayerPlan], context: Context) -> dict[str, Found]:
        """By name, for those of the ``takers`` that it knows. PlanError when it does not fit the ``layers`` of the
        checkpoint."""


@dataclass(frozen=True)
class Given:
    """A file of scales."""

    file: ScaleFile

    @property
    def digest(self) -> str:
        return self.file.digest

    def scales(self, takers: Plans, layers: Sequence[LayerPlan], context: Context) -> dict[str, Found]:
        """Says which of its numbers are not used."""
        given = self.file.of(layers)
        if idle := [name for name in given if name not in takers]:
            context.notes.append(
                f"{self.file.path}: scales of {len(idle)} layers are not used (no FP8 or NVFP4 with ComfyUI's markers, "
                f"not in the filter, or with a scale already): {listed(idle, NAMED)}"
            )
        return {name: Found(number, "from a file") for name, number in given.items() if name in takers}


@dataclass(frozen=True)
class Measured:
    """Statistics of the layers' inputs."""

    evidence: Evidence
    wanted: str
    """``amax`` or a percentile such as ``p99.9``."""

    @classmethod
    def open(cls, path: str, wanted: str | None) -> Measured:
        """Raises what ``Statistics.open`` raises."""
        return cls(Evidence.open(path), wanted or "amax")

    @property
    def digest(self) -> str:
        return self.evidence.digest

    def scales(self, takers: Plans, layers: Sequence[LayerPlan], context: Context) -> dict[str, Found]:
        """UsageError for a norm prior, which knows no values."""
        self.evidence.check(layers)
        found = {}
        for name, plan in takers.items():
            assert plan.layer.encoding is not None
            fmt = plan.layer.encoding.build()
            scale = self.evidence.input_scale(name, self.wanted, fmt)
            if scale is not None:
                clips = activation_scale(self.evidence.statistics.amax(name), fmt) / scale
                found[name] = Found(scale, f"{self.wanted} of statistics", clips=clips)
        return found


@dataclass(frozen=True)
class AdapterDirections:
    """The down factors of an adapter."""

    path: str
    factors: Mapping[str, TensorRef]
    """(r, n), by the adapter's names of the layers."""
    wanted: str
    """A percentile such as ``p99.9``."""
    rms: float
    """Assumed root mean square of inputs."""

    @classmethod
    def open(cls, path: str, wanted: str | None, rms: float) -> AdapterDirections:
        """UsageError for a file without down factors; CheckpointError for a broken one."""
        factors = down_factors(open_source(path))
        if not factors:
            raise UsageError(f"{path}: holds no down factor (lora_down, lora_A) of a linear layer: is it a LoRA?")
        return cls(path, factors, wanted or "p99.9", rms)

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for name, ref in sorted(self.factors.items()):
            digest.update(name.encode() + b"\0" + channel_energy(ref).numpy().tobytes())
        return digest.hexdigest()

    def scales(self, takers: Plans, layers: Sequence[LayerPlan], context: Context) -> dict[str, Found]:
        """PlanError for factors of another width than their layer's weight, for two of one layer, and when the adapter
        has no layer of the checkpoint at all."""
        shapes = {plan.layer.name: plan.layer.weight.shape for plan in layers if len(plan.layer.weight.shape) == 2}
        names = LayerNames(shapes)
        named = {given: names.find(given) for given in self.factors}
        unknown = [given for given, name in named.items() if name is None]
        if len(unknown) == len(named):
            raise PlanError(f"{self.path}: an adapter of other layers: the checkpoint has no {listed(unknown, NAMED)}")
        times = Counter(named.values())
        if twice := [given for given, name in named.items() if name is not None and times[name] > 1]:
            raise PlanError(f"{self.path}: names a layer of the checkpoint twice: {listed(twice, NAMED)}")
        known = {name: self.factors[given] for given, name in named.items() if name is not None}
        wrong = [f"{name}: {ref.name} has {ref.shape[1]} columns, the weight {shapes[name][1]}"
                 for name, ref in known.items() if ref.shape[1] != shapes[name][1]]  # fmt: skip
        if wrong:
            raise PlanError(f"{self.path}: does not fit the checkpoint: {listed(wrong, NAMED, '; ')}")
        if unknown:
            lacking = f"{len(unknown)} layers that the checkpoint lacks: {listed(unknown, NAMED)}"
            context.notes.append(f"{self.path}: {lacking}")
        return {name: self._found(takers[name], energy) for name, ref in known.items()
                if name in takers and bool((energy := channel_energy(ref)).any())}  # fmt: skip

    def _found(self, plan: LayerPlan, energy: torch.Tensor) -> Found:
        q = percent(self.wanted)
        assert q is not None
        assert plan.layer.encoding is not None
        largest = HEADROOM * percentile(energy, self.rms, q)
        words = f"{HEADROOM:g} times {self.wanted} of an adapter's directions at RMS {self.rms:g}"
        return Found(activation_scale(largest, plan.layer.encoding.build()), words, assumed=True)
