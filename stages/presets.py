"""Presets: which layers of a known model stay unquantized, and how its keys tell it apart. The data is presets.toml."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_LATER_INDEX = re.compile(r"\.(?:[3-9]|\d\d+)(?=\.)")
"""Block and expert numbers above 2: they tell no model apart, and folding them leaves few distinct keys to search."""


@dataclass(frozen=True)
class Preset:
    """What is known about one family of models."""

    name: str
    category: str
    """text, diffusion, image or video."""
    title: str
    """The models that it is for, in words."""
    keep: tuple[str, ...]
    """Plain substrings of the full key; a layer that holds one stays unquantized."""
    remove: tuple[str, ...] = ()
    """Beginnings of keys, below the model's prefix, that are dropped from the output."""
    detect: tuple[str, ...] = ()
    """Patterns that are each found in some key; empty: chosen by name only."""
    absent: tuple[str, ...] = ()
    """Patterns that are found in no key."""

    def keeps(self, key: str) -> str | None:
        """The substring by which ``key`` (with ``.weight``) stays unquantized."""
        return next((part for part in self.keep if part in key), None)

    def fits(self, keys: Iterable[str]) -> bool:
        """Whether the keys are those of such a model; a prefix such as ``model.diffusion_model.`` does not matter."""
        return _fits(self, _distinct(keys))

    def removed(self, keys: Sequence[str]) -> list[str]:
        """The keys that the preset drops.

        ``remove`` counts only at the start of a name below the model's own prefix, so that the ``decoder`` of a VAE in
        the same file is not taken for the one of the text encoder.
        """
        if not self.remove:
            return []
        found = (_compile(self.detect[0]).search(key) for key in keys) if self.detect else ()
        prefixes = {match.string[: match.end(1)] for match in found if match}
        starts = tuple(f"{prefix}{part}." for prefix in prefixes or {""} for part in self.remove)
        return [key for key in keys if key.startswith(starts)]


@cache
def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.MULTILINE)


def _fits(preset: Preset, text: str) -> bool:
    found = bool(preset.detect) and all(_compile(pattern).search(text) for pattern in preset.detect)
    return found and not any(_compile(pattern).search(text) for pattern in preset.absent)


def _distinct(keys: Iterable[str]) -> str:
    """One line per distinct key: detection is then a few searches even for a checkpoint of 100,000 tensors."""
    return "\n".join(dict.fromkeys(_LATER_INDEX.sub(".9", "\n".join(keys)).split("\n")))


@cache
def load_presets() -> dict[str, Preset]:
    """Every preset by name, in order of priority; the file is read at the first call."""
    data: dict[str, Any] = tomllib.loads(Path(__file__).with_name("presets.toml").read_text(encoding="utf-8"))
    base = data["base"]["keep"]
    return {
        name: Preset(
            name=name,
            category=entry["category"],
            title=entry["title"],
            keep=tuple(dict.fromkeys([*(base if entry.get("base") else ()), *entry["keep"]])),
            remove=tuple(entry.get("remove", ())),
            detect=tuple(entry.get("detect", ())),
            absent=tuple(entry.get("absent", ())),
        )
        for name, entry in data["presets"].items()
    }


def find_preset(name: str) -> Preset:
    """The preset of this name; several names joined by commas keep what any of them keeps.

    Raises UsageError with the nearest names.
    """
    presets = load_presets()
    chosen = []
    for part in (part.strip() for part in name.split(",")):
        if part not in presets:
            hint = did_you_mean(part, [*presets, "auto", "none"])
            raise UsageError(f"unknown preset {part!r}{hint}")
        chosen.append(presets[part])
    return chosen[0] if len(chosen) == 1 else _join(chosen)


def _join(presets: Sequence[Preset]) -> Preset:
    """One preset for several; it detects by the one that removes keys, whose prefix ``removed`` needs."""
    return Preset(
        name=",".join(preset.name for preset in presets),
        category=presets[0].category,
        title="; ".join(preset.title for preset in presets),
        keep=tuple(dict.fromkeys(part for preset in presets for part in preset.keep)),
        remove=tuple(dict.fromkeys(part for preset in presets for part in preset.remove)),
        detect=next((preset.detect for preset in presets if preset.remove), ()),
    )


def detect_preset(keys: Iterable[str]) -> Preset | None:
    """The first preset whose keys these are (full keys, ``.weight`` included), or None."""
    text = _distinct(keys)
    return next((preset for preset in load_presets().values() if _fits(preset, text)), None)
