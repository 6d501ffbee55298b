"""The chain of steps that turns one layer into a format, and what is stored for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..formats.comfy import LayerOptions, storage
from ..formats.format import Format
from ..formats.tensors import TensorRef
from .bias import CorrectBias, Project
from .inputs import Inputs
from .matrix import Solve
from .methods import make_method
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

    @property
    def words(self) -> str:
        """The format in words: ``fp8 block 128``, ``int8 row rotated 256``."""
        fmt = self.format
        words = [fmt.name, *([] if fmt.scaling == "group" else [fmt.scaling])]
        if fmt.scaling == "block":
            words.append(str(fmt.block_size))
        return " ".join(words) + (f" rotated {self.rotation}" if self.rotation else "")


def quantized(plan: LayerPlan, choice: Choice) -> LayerPlan:
    """The layer with the chain of the choice and the tensors that it stores."""
    layer, fmt = plan.layer, choice.format
    rows, columns = layer.weight.shape
    options = LayerOptions(
        choice.rotation, choice.full_precision_matmul, choice.input_scale, layer.weight.dtype,
    )  # fmt: skip
    stored = storage(layer.name, (rows, columns), fmt, options)
    arguments = (fmt.name, fmt.scaling, fmt.block_size)
    steps: list[Step] = [reader(layer, fmt.rows_multiple)]
    if choice.bias is not None and choice.inputs is not None:
        steps.append(Project(choice.inputs))
    if choice.rotation:
        steps.append(Rotate(choice.rotation))
    method = make_method(choice.rounding, choice.rounding_options)
    steps.append(Scale(arguments, choice.rounding != "nearest"))
    steps.append(Round(arguments) if method is None else Solve(arguments, method, choice.inputs))
    steps.append(Pack(arguments, stored))
    outputs = stored.specs
    if choice.bias is not None and choice.inputs is not None:
        steps.append(CorrectBias(arguments, choice.bias, choice.inputs))
        outputs, layer = (*outputs, choice.bias), replace(layer, tensors=(*layer.tensors, choice.bias))
    return replace(
        plan, layer=layer, steps=(*steps, Write()), outputs=outputs, constants=stored.constants,
        entry=dict(stored.marker), format=choice.words, reason="", settings=None, rounding=choice.rounding,
        affinity="" if method is None or choice.inputs is None else choice.inputs.shared,
        inputs=choice.inputs,
    )  # fmt: skip
