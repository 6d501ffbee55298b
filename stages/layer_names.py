"""Layers of a checkpoint by the names that other files have for them: with or without a prefix, dots or underscores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..formats.comfy import PREFIXES

_PREFIXES = (
    *PREFIXES, "diffusion_model.", "base_model.model.", "transformer.", "text_encoders.", "unet.",
    "lora_unet_", "lora_transformer_", "lora_te_", "lycoris_",
)  # fmt: skip
"""What stands before a layer's name in checkpoints of whole models and in adapters (ComfyUI ``lora.py``, kohya, PEFT,
diffusers)."""


class LayerNames:
    """Names of layers, found by any spelling that means one of them alone."""

    def __init__(self, names: Iterable[str]) -> None:
        self.known = frozenset(names)
        self._spelled: dict[str, str | None] = {}
        for name in self.known:
            for spelling in {each for bare in _bare(name) for each in (bare, bare.replace(".", "_"))}:
                self._spelled[spelling] = None if self._spelled.get(spelling, name) != name else name

    def find(self, name: str) -> str | None:
        """The layer that is meant; None when there is none, or several that might be."""
        if name in self.known:
            return name
        return next((found for bare in _bare(name) if (found := self._spelled.get(bare))), None)


def _bare(name: str) -> Iterator[str]:
    """The name, and what is left of it without one prefix after the other."""
    yield name
    for prefix in _PREFIXES:
        if name.startswith(prefix) and len(name) > len(prefix):
            yield from _bare(name.removeprefix(prefix))
