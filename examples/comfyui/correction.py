"""An error-correction LoRA beside quantized layers: y = W'x + strength * scale * up(down(x)).

The weight is never touched. Added to it, a correction smaller than a step of its codes would be rounded away again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from comfy_kitchen.tensor import QuantizedTensor

DIFFUSION, ENCODERS = "diffusion_model.", "text_encoders."
UP, DOWN, ALPHA = ".lora_up.weight", ".lora_down.weight", ".alpha"
SHOWN = 5
"""So many names of a list are printed."""


@dataclass(frozen=True)
class Correction:
    """Factors for one layer (N, K)."""

    up: torch.Tensor
    """(N, r)."""
    down: torch.Tensor
    """(r, K)."""
    scale: float
    """alpha / r, and 1 without an alpha."""


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds."""

    layers: Mapping[str, Correction]
    """By name, with ``diffusion_model.`` or ``text_encoders.``."""
    foreign: tuple[str, ...]
    """Keys that belong to no such layer."""


@dataclass(frozen=True)
class Placed:
    """Corrections that have a layer in a model."""

    layers: Mapping[str, Correction]
    """By the path of the module."""
    absent: tuple[str, ...]
    """Layers of the file for which the model has no linear layer."""
    unquantized: tuple[str, ...]
    """Layers that have nothing to correct: their weight is not quantized."""


def some(names: Iterable[str]) -> str:
    """The first names of a list, and how many there are more."""
    names = sorted(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def read_adapter(tensors: Mapping[str, torch.Tensor], file: str) -> AdapterFile:
    """The layers of a file in the dialect of ComfyUI: ``<layer>.lora_up.weight``, ``.lora_down.weight``, ``.alpha``.

    Raises ValueError for a factor without the other, and for factors that do not fit together.
    """
    bases = {key.removesuffix(end) for key in tensors for end in (UP, DOWN) if key.endswith(end)}
    own = {base for base in bases if base.startswith((DIFFUSION, ENCODERS))}
    foreign = {key for key in tensors if not any(key == base + end for base in own for end in (UP, DOWN, ALPHA))}
    layers = {}
    for base in sorted(own):
        up, down = tensors.get(base + UP), tensors.get(base + DOWN)
        if up is None or down is None:
            raise ValueError(f"{file}: {base} has no {DOWN[1:] if down is None else UP[1:]}. The file is incomplete.")
        alpha = tensors.get(base + ALPHA, torch.tensor(float(len(down))))
        if up.dim() != 2 or down.dim() != 2 or up.shape[1] != len(down) or not len(down) or alpha.numel() != 1:
            shapes = f"up {tuple(up.shape)}, down {tuple(down.shape)}, alpha {tuple(alpha.shape)}"
            raise ValueError(f"{file}: {base} has {shapes}; (N, r), (r, K) and one number belong together")
        layers[base] = Correction(up, down, float(alpha) / len(down))
    return AdapterFile(layers, tuple(sorted(foreign)))


def place(layers: Mapping[str, Correction], model: torch.nn.Module, file: str) -> Placed:
    """Finds the module of each layer, by its path in ``model``.

    Raises one ValueError that lists every layer whose shape is not that of its correction.
    """
    modules = dict(model.named_modules())
    found = {path: each for path, each in layers.items() if hasattr(modules.get(path), "in_features")}
    wrong = []
    for path, each in found.items():
        wanted = (modules[path].out_features, modules[path].in_features)
        given = (len(each.up), each.down.shape[1])
        if given != wanted:
            wrong.append(f"{path} is {wanted[0]} x {wanted[1]}, and its correction {given[0]} x {given[1]}")
    if wrong:
        raise ValueError(f"{file} was made for another model: {some(wrong)}")
    plain = [path for path in found if not isinstance(getattr(modules[path], "weight", None), QuantizedTensor)]
    return Placed(found, tuple(sorted(set(layers) - set(found))), tuple(plain))


class Branch:
    """up(down(x)), with copies of the factors on each device and in each dtype that they were needed in."""

    def __init__(self, correction: Correction, strength: float) -> None:
        self.correction, self.strength = correction, strength
        self.copies: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        where = x.device, x.dtype
        if where not in self.copies:
            up = self.correction.up.to(x.device, torch.float32) * (self.strength * self.correction.scale)
            self.copies[where] = up.to(x.dtype), self.correction.down.to(x.device, x.dtype)
        up, down = self.copies[where]
        return torch.nn.functional.linear(torch.nn.functional.linear(x, down), up)


@dataclass
class _Station:
    """Branches beside one module, however many adapters they come from, and what must be undone after the last."""

    branches: dict[int, tuple[Branch, int]] = field(default_factory=dict)
    """With the id of the patcher that put each in."""
    handles: list[Any] = field(default_factory=list)
    full_precision: bool | None = None

    def open(self, module: Any) -> None:
        """Hooks do not depend on the order in which adapters come and go, as a replaced ``forward`` would.

        ComfyUI's fused INT8 path (``comfy.ops.linear_input_act``) reads the weight without calling the module, and
        with it its hooks, unless the module says that it multiplies in full precision. So it says so, except while
        it runs.
        """
        self.handles.append(module.register_forward_hook(self._add, with_kwargs=True))
        self.full_precision = getattr(module, "_full_precision_mm", None)
        if self.full_precision is not None:
            module._full_precision_mm = True
            self.handles.append(module.register_forward_pre_hook(self._enter))
            self.handles.append(module.register_forward_hook(self._leave, always_call=True))

    def close(self, module: Any) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self.full_precision is not None:
            module._full_precision_mm = self.full_precision

    def _add(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: torch.Tensor) -> torch.Tensor:
        x = args[0] if args else kwargs["input"]
        for branch, _ in self.branches.values():
            y = y + branch(x).to(y.dtype)
        return y

    def _enter(self, module: Any, _: tuple[Any, ...]) -> None:
        module._full_precision_mm = self.full_precision

    def _leave(self, module: Any, *_: Any) -> None:
        module._full_precision_mm = True


_STATIONS: WeakKeyDictionary[torch.nn.Module, _Station] = WeakKeyDictionary()


class Beside:
    """One adapter at one strength. ``inject`` and ``eject`` are what ComfyUI's model patcher calls, in any order.

    Clones of a patcher share this object, and believe that they put it in when the one that they were cloned from had.
    So only the one that did so last takes it out: others may be thrown away while the model runs.
    """

    def __init__(self, layers: Mapping[str, Correction], strength: float) -> None:
        self.branches = {path: Branch(each, strength) for path, each in layers.items()}

    def inject(self, patcher: Any) -> None:
        for path, branch in self.branches.items():
            module = patcher.model.get_submodule(path)
            station = _STATIONS.setdefault(module, _Station())
            if not station.branches:
                station.open(module)
            station.branches[id(self)] = branch, id(patcher)

    def eject(self, patcher: Any) -> None:
        for path, branch in self.branches.items():
            module = patcher.model.get_submodule(path)
            station = _STATIONS.get(module)
            if station is None or station.branches.get(id(self), (None, None))[1] != id(patcher):
                continue
            del station.branches[id(self)]
            branch.copies.clear()
            if not station.branches:
                station.close(module)
                del _STATIONS[module]
