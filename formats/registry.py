"""The formats: one line each. Facts that people and plans need without loading torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from .errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from .format import Format

DEFAULT_BLOCK_SIZE = 128


@dataclass(frozen=True)
class FormatInfo:
    """One registered format."""

    name: str
    factory: str
    """``module:class`` of the Format, below this package (of a format of another package: the module's full name)."""
    scalings: tuple[str, ...]
    """Scalings that it offers, default first."""
    bits: float
    """Bits per weight, scales included, for large tensors."""
    hardware: str
    """Where its matrix products run natively."""
    loaded_by: str
    """Clients that load what is written."""
    group_size: int | None = None
    """Fixed group length, when the format defines one."""


_ALL = (
    FormatInfo("fp8", "scaled:Fp8", ("tensor", "row", "block"), 8.0,
               "NVIDIA Ada, Hopper, Blackwell (SM 8.9+); AMD MI300",
               "ComfyUI (tensor); row and block: with nodes (examples/comfyui)"),
    FormatInfo("fp8_e5m2", "scaled:Fp8E5M2", ("tensor",), 8.0, "NVIDIA Ada, Hopper, Blackwell (SM 8.9+)", "ComfyUI"),
    FormatInfo("int8", "scaled:Int8", ("row", "tensor", "block"), 8.0, "NVIDIA Turing and later (SM 7.5+)",
               "ComfyUI (row, tensor, rotated row); block: with nodes (examples/comfyui)"),
    FormatInfo("mxfp8", "mxfp8:Mxfp8", ("group",), 8.25, "NVIDIA Blackwell (SM 10.0+)", "ComfyUI", 32),
    FormatInfo("hybrid_mxfp8", "hybrid:HybridMxfp8", ("group",), 8.25,
               "as mxfp8: NVIDIA Blackwell (SM 10.0+); as fp8: Ada, Hopper (SM 8.9+)",
               "ComfyUI with nodes (examples/comfyui)", 32),
    FormatInfo("nvfp4", "nvfp4:Nvfp4", ("group",), 4.5, "NVIDIA Blackwell (SM 10.0+)", "ComfyUI", 16),
)  # fmt: skip

FORMATS: dict[str, FormatInfo] = {info.name: info for info in _ALL}

_OWN = frozenset(FORMATS)
"""Formats whose modules lie in this package."""


def register_format(info: FormatInfo) -> None:
    """Adds a format of another package. Each process that converts calls it, workers of a cluster too.

    Raises UsageError for a name that is taken.
    """
    if info.name in FORMATS:
        raise UsageError(f"format {info.name!r}: this name is taken")
    FORMATS[info.name] = info


def format_info(name: str) -> FormatInfo:
    """The registered format of this name; UsageError with the nearest names otherwise."""
    if name not in FORMATS:
        raise UsageError(f"unknown format {name!r}{did_you_mean(name, FORMATS)}")
    return FORMATS[name]


def make_format(name: str, scaling: str | None = None, block_size: int | None = None) -> Format:
    """Builds a format. ``scaling`` None is the format's default; ``block_size`` belongs to block scaling.

    Raises UsageError for an unknown name, a scaling that the format does not offer, and a block size that is below 1 or
    means nothing.
    """
    info = format_info(name)
    chosen = scaling or info.scalings[0]
    if chosen not in info.scalings:
        if info.group_size and scaling in ("block", "row", "tensor"):
            raise UsageError(f"{name} scales groups of {info.group_size} by definition; drop scaling {scaling!r}")
        raise UsageError(f"{name} has no scaling {chosen!r}{did_you_mean(chosen, info.scalings)}")
    size = info.group_size
    if chosen != "block" and block_size not in (None, size):
        hint = "name scaling 'block'" if "block" in info.scalings else "drop it"
        raise UsageError(f"a block size of {block_size} means nothing to {name} with scaling {chosen!r}; {hint}")
    if chosen == "block":
        size = DEFAULT_BLOCK_SIZE if block_size is None else block_size
        if size < 1:
            raise UsageError(f"block size {size} of {name} must be at least 1")
    module, cls = info.factory.split(":")
    holder = import_module(f".{module}" if name in _OWN else module, __package__)
    built: Format = getattr(holder, cls)(name, chosen, size)
    return built
