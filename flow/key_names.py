"""Layers of a torch module under the names that a checkpoint has for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..formats.errors import CheckpointError, listed
from ..formats.layers import WEIGHT, group_layers
from ..formats.source import open_source
from .sizes import count

if TYPE_CHECKING:
    from torch import nn

    from ..stages.collect import Linear

Named = tuple[dict[str, "Linear"], list[str]]
"""Layers by the checkpoint's names, and notes on those that were left out."""


def named_layers(model: nn.Module, layers: Mapping[str, Linear], checkpoint: str | Path | None) -> Named:
    """Layers that the checkpoint stores, under its names; without a checkpoint all that own their weight.

    Equal names are tried first, then names without and with the model's base prefix (``model.``, ``bert.``). Shapes
    must agree too. Raises CheckpointError when nothing fits.
    """
    if checkpoint is None:
        return _untied(model, layers)
    stored = {layer.name: tuple(layer.weight.shape) for layer in group_layers(open_source(checkpoint))
              if layer.weight.name == layer.name + WEIGHT}  # fmt: skip
    prefix = getattr(model, "base_model_prefix", "")
    found: dict[str, Linear] = {}
    lost: list[str] = []
    for name, layer in layers.items():
        keys = [key for key in _spellings(name, prefix) if stored.get(key) == layer.shape and key not in found]
        if keys:
            found[keys[0]] = layer
        else:
            lost.append(name)
    if not found:
        raise CheckpointError(
            f"{checkpoint}: none of the {len(layers)} linear layers of {type(model).__name__} is in it under its name "
            f"and shape; the model has {next(iter(layers), 'none')!r}, the checkpoint {next(iter(stored), 'none')!r}"
        )
    return found, _note(lost, "the checkpoint stores no weight of this name and shape (tied, or a new head)")


def _spellings(name: str, prefix: str) -> Iterator[str]:
    yield name
    if prefix and name.startswith(f"{prefix}."):
        yield name.removeprefix(f"{prefix}.")
    elif prefix:
        yield f"{prefix}.{name}"


def _untied(model: nn.Module, layers: Mapping[str, Linear]) -> Named:
    """Layers whose weight is theirs alone: checkpoints keep a tied one under its first owner's name."""
    owner: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owner.setdefault(id(weight), name)
    tied = [name for name, layer in layers.items() if owner.get(id(layer.weight), name) != name]
    return {name: layer for name, layer in layers.items() if name not in tied}, _note(tied, "tied to another weight")


def _note(names: list[str], why: str) -> list[str]:
    if not names:
        return []
    return [f"{count(len(names), 'linear layer')} left out, {why}: {listed(names, 8)}"]
