"""Batches that a model is called with: how they are passed on, which of their tokens count, and their fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..formats.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..stages.collect import Linear

Run = Callable[[Any, Any], Any]
"""Calls a model with a batch; what it gives back is dropped."""

_SAMPLES = 64
"""Of each weight, this many numbers tell one model from another."""


def check_batches(batches: Iterable[Any]) -> None:
    """UsageError for what can be gone through only once."""
    if iter(batches) is batches:
        raise UsageError(
            f"batches is a {type(batches).__name__}, which can be read only once; calibration reads batches several "
            "times: give a list, a DataLoader, or an object whose __iter__ starts anew"
        )


def call_model(model: nn.Module, batch: Any) -> None:
    """Calls a module with a tensor, a tuple or list of arguments, or a mapping of them, on the module's device."""
    first = next(iter(model.parameters()), None)
    arguments = _moved(batch, None if first is None or first.is_meta else first.device)
    if isinstance(arguments, Mapping):
        model(**arguments)
    elif isinstance(arguments, tuple | list):
        model(*arguments)
    else:
        model(arguments)


def attention_mask(batch: Any) -> torch.Tensor | None:
    """Bool (batch, sequence): tokens that are no padding, where a batch says so and not all are."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None or getattr(mask, "dim", int)() != 2:
        return None
    real: torch.Tensor = mask != 0
    return None if bool(real.all()) else real


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The module in evaluation mode and without gradients; every part gets its own mode back."""
    import torch

    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def fingerprint(layers: Mapping[str, Linear], batches: Iterable[Any]) -> tuple[str, int]:
    """sha256 (hex) over names, shapes and some numbers of every weight and over all batches; and how many batches.

    Of values in a batch that are neither tensors nor plain, only the type counts.
    """
    digest = hashlib.sha256()
    for name, layer in layers.items():
        digest.update(f"{name} {layer.shape}".encode())
        if not layer.weight.is_meta:
            flat = layer.weight.detach().reshape(-1)
            _update(digest, flat[:: max(1, flat.numel() // _SAMPLES)].float())
    number = 0
    for number, batch in enumerate(batches, 1):  # noqa: B007
        _update(digest, batch)
    if not number:
        raise UsageError("batches is empty: there is nothing to calibrate with")
    return digest.hexdigest(), number


def _moved(value: Any, device: torch.device | None) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value if device is None else value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_moved(item, device) for item in value)
    return value


def _update(digest: Any, value: Any) -> None:
    import torch

    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            digest.update(repr(key).encode())
            _update(digest, item)
    elif isinstance(value, tuple | list):
        digest.update(f"{len(value)} items".encode())
        for item in value:
            _update(digest, item)
    else:
        plain = value is None or isinstance(value, str | int | float | bool | bytes)
        digest.update((repr(value) if plain else type(value).__name__).encode())
