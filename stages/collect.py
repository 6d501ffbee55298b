"""Watches the linear layers of a torch module while it runs, and sums their inputs up.

The first batch shows which layers get the very same tensor (q, k and v; gate and up): these share one set of sums,
and every later batch is held to it. Each pass over the batches then sums up as many inputs as memory allows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..formats.errors import NonFiniteError, UsageError
from .accumulate import Sums

Heard = Callable[[str, torch.Tensor], None]
"""Called with a layer's name and its input, (..., n), before the layer runs."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of a module."""

    module: nn.Module
    weight: torch.Tensor
    width: int
    """Length n of its input."""
    transposed: bool
    """Whether its weight is (inputs, outputs): transformers' ``Conv1D``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its weight, as the module keeps it."""
        return tuple(self.weight.shape)


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """Linear layers of a module by name, in its own order."""
    found: dict[str, Linear] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = Linear(module, module.weight, module.in_features, False)
        elif type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int):
            weight = module.weight
            if isinstance(weight, torch.Tensor) and weight.dim() == 2:
                found[name] = Linear(module, weight, weight.shape[0], True)
    return found


@contextmanager
def listening(layers: Mapping[str, Linear], heard: Heard) -> Iterator[None]:
    """Calls ``heard`` before any of the layers runs, until the context ends."""

    def hook(name: str) -> Any:
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
            if x is None:
                raise UsageError(f"layer {name!r} was called without a tensor")
            heard(name, x)  # itself: who shares it is told by the object

        return before

    handles = [layer.module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Same:
    """Tells whether two calls get the same tensor: the same object, alive since, not written to in between."""

    def __init__(self, x: torch.Tensor) -> None:
        self._x = weakref.ref(x)
        self._version = _version(x)

    def __call__(self, x: torch.Tensor) -> bool:
        return self._x() is x and self._version == _version(x)


def _version(x: torch.Tensor) -> int:
    return 0 if x.is_inference() else x._version


class Sharing:
    """Finds, over one batch, which layers get the same tensors."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, Same]] = {}
        self.calls: dict[str, list[int]] = {}
        """Layer -> numbers of the tensors that it got."""
        self._tensors = 0

    def __call__(self, name: str, x: torch.Tensor) -> None:
        number, same = self._seen.get(id(x), (0, None))
        if same is None or not same(x):
            number, self._tensors = self._tensors, self._tensors + 1
            self._seen[id(x)] = number, Same(x)
        self.calls.setdefault(name, []).append(number)

    def groups(self, layers: Sequence[str], share: bool = True) -> list[list[str]]:
        """Layers by input, in the order of their first calls; those that were not called stand alone, at the end."""
        groups: dict[Any, list[str]] = {}
        for name, calls in self.calls.items():
            groups.setdefault(tuple(calls) if share else name, []).append(name)
        return [*groups.values(), *([name] for name in layers if name not in self.calls)]


class Collector:
    """Sums up the inputs of some groups of layers, batch after batch."""

    def __init__(self, groups: Mapping[str, Sequence[str]], layers: Mapping[str, Linear], whole: Mapping[str, bool]):
        """``groups``: first layer -> all that share its input; ``whole``: whether all of H is summed up."""
        self.sums = {leader: Sums(layers[leader].width, whole[leader]) for leader in groups}
        self.layers = {name: layers[name] for names in groups.values() for name in names}
        self._leader = {name: leader for leader, names in groups.items() for name in names}
        self.begin(None)

    def begin(self, mask: torch.Tensor | None) -> None:
        """Before a batch; ``mask`` (batch, sequence) is zero at tokens that do not count."""
        self._mask = mask
        self._given: dict[str, list[Same]] = {leader: [] for leader in self.sums}
        self._calls = dict.fromkeys(self.layers, 0)

    def __call__(self, name: str, x: torch.Tensor) -> None:
        leader, call = self._leader[name], self._calls[name]
        self._calls[name] = call + 1
        if name == leader:
            self._given[leader].append(Same(x))
            self.sums[leader].add(self._counted(name, x))
        elif call >= len(self._given[leader]) or not self._given[leader][call](x):
            raise UsageError(_parted(name, leader))

    def end(self) -> None:
        """After a batch. Raises NonFiniteError for the first layer whose input is no number."""
        for name, sums in self.sums.items():
            if not sums.finite():
                found = sums.largest()
                what = f"holds {found}" if found != found or found == float("inf") else f"reaches {found:.3g}"
                raise NonFiniteError(
                    f"the input of layer {name!r} {what}; its statistics would be worthless. Run the model in bfloat16 "
                    "or float32 instead of float16, and look at the batches"
                )
        for name, leader in self._leader.items():
            if self._calls[name] != self._calls[leader]:
                raise UsageError(_parted(name, leader))

    def _counted(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The tokens (t, n) of an input (..., n) that count."""
        width = self.layers[name].width
        if x.shape[-1] != width:
            raise UsageError(f"layer {name!r} takes {width} channels, but was called with a tensor {tuple(x.shape)}")
        mask = self._mask
        if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
            return x[mask.to(x.device)]
        return x.reshape(-1, width)


def _parted(name: str, leader: str) -> str:
    return (
        f"layer {name!r} got the same input as {leader!r} in the first batch, but not in a later one; "
        "call quantloom.calibrate with share=False, which keeps statistics of every layer apart"
    )
