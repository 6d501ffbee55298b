"""The chain of steps that turns one layer into a format, and what is stored for it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..formats.comfy import LayerOptions, Storage, storage
from ..formats.format import Format
from ..formats.layers import Layer
from ..formats.tensors import TensorRef, TensorSpec
from .bias import CorrectBias, Project
from .inputs import Inputs
from .matrix import Solve
from .methods import BY_ROWS, make_method
from .packing import Pack
from .reading import reader
from .rotation import Rotate
from .rounding import Round
from .scaling import Scale
from .work import LayerPlan, Step
from .writing import Write


@dataclass(frozen=True)
class Choice:
    """Everything that was decided for one layer."""

    format: Format
    rounding: str
    """A name of ``methods.ROUNDINGS``."""
    rounding_options: Mapping[str, Any]
    rotation: int | None = None
    """Order of the Hadamard matrix, when rows are rotated."""
    full_precision_matmul: bool = False
    input_scale: float | None = None
    """A static activation scale to store."""
    inputs: Inputs | None = None
    """Statistics of the layer's inputs, where there are any."""
    bias: TensorRef | None = None
    """The bias that is to be corrected."""

    _chains: dict[Hashable, Chain] = field(default_factory=dict, init=False, compare=False, repr=False)

    def chain(self, layer: Layer) -> Chain:
        """What the layer shares with others of its kind."""
        kind = layer.weight.shape, layer.weight.dtype, layer.encoding is None
        if (found := self._chains.get(kind)) is None:
            found = self._chains[kind] = _chain(self, layer)
        return found

    @cached_property
    def words(self) -> str:
        """The format in words: ``fp8 block 128``, ``int8 row rotated 256``."""
        fmt = self.format
        words = [fmt.name, *([] if fmt.scaling == "group" else [fmt.scaling])]
        if fmt.scaling == "block":
            words.append(str(fmt.block_size))
        return " ".join(words) + (f" rotated {self.rotation}" if self.rotation else "")


@dataclass(frozen=True, slots=True)
class Chain:
    """What all layers share that have one shape, one dtype and one choice."""

    steps: tuple[Step, ...]
    """From the first read to the write."""
    storage: Storage
    """Names in it follow the layer's."""
    entry: dict[str, object]


_WRITE = Write()


def quantized(plan: LayerPlan, choice: Choice) -> LayerPlan:
    """The layer with the chain of the choice and the tensors that it stores."""
    layer = plan.layer
    chain = choice.chain(layer)
    steps, outputs = chain.steps, tuple(_named(layer, spec) for spec in chain.storage.specs)
    known = outputs[len(outputs) - len(chain.storage.constants) :]
    constants = tuple((spec, content) for spec, (_, content) in zip(known, chain.storage.constants, strict=True))
    if choice.bias is not None and choice.inputs is not None:
        correction = CorrectBias(_arguments(choice.format), choice.bias, choice.inputs)
        steps, outputs = (*steps[:-1], correction, _WRITE), (*outputs, choice.bias)
        layer = replace(layer, tensors=(*layer.tensors, choice.bias))
    by_rows = choice.rounding in BY_ROWS
    return LayerPlan(
        layer, steps, outputs, choice.words, choice.rounding, constants=constants, entry=chain.entry,
        affinity="" if by_rows or choice.inputs is None else choice.inputs.shared, inputs=choice.inputs,
    )  # fmt: skip


def _named(layer: Layer, spec: TensorSpec) -> TensorSpec:
    """The spec under its full name; that of the weight is there already, and is not kept twice."""
    name, weight = layer.name + spec.name, layer.weight.name
    return TensorSpec(weight if name == weight else name, spec.dtype, spec.shape)


def _arguments(fmt: Format) -> tuple[str, str, int | None]:
    return fmt.name, fmt.scaling, fmt.block_size


def _chain(choice: Choice, layer: Layer) -> Chain:
    fmt = choice.format
    rows, columns = layer.weight.shape
    options = LayerOptions(
        choice.rotation, choice.full_precision_matmul, choice.input_scale, layer.weight.dtype,
    )  # fmt: skip
    stored = storage("", (rows, columns), fmt, options)
    arguments = _arguments(fmt)
    steps: list[Step] = [reader(layer, fmt.rows_multiple)]
    if choice.bias is not None and choice.inputs is not None:
        steps.append(Project(choice.inputs))
    if choice.rotation:
        steps.append(Rotate(choice.rotation))
    method = make_method(choice.rounding, choice.rounding_options)
    steps.append(Scale(arguments, choice.rounding != "nearest"))
    steps.append(Round(arguments) if method is None else Solve(arguments, method, choice.inputs))
    steps += [Pack(arguments, stored), _WRITE]
    return Chain(tuple(steps), stored, dict(stored.marker))
