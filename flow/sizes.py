"""Sizes as people write and read them."""

from __future__ import annotations

import re

from ..formats.errors import UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(value: str | int | None, what: str) -> int | None:
    """Bytes of ``8GB``, ``500MiB``, ``2.5G`` or a number; UsageError otherwise."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]I?)?B?\s*", str(value), re.IGNORECASE)
    if not match:
        raise UsageError(f"{what} {value!r} is no size; write for example 8GB or 500MiB")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def show_size(count: float) -> str:
    """``1.23 GB``, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def show_rate(rate: float) -> str:
    """``1.23 GB/s``; what is slower than a hundredth of that, such as learned rounding on CPUs, as ``4.56 MB/s``."""
    return f"{rate / 1e9:.2f} GB/s" if rate >= 1e7 else f"{show_size(rate)}/s"


def show_seconds(seconds: float) -> str:
    """``850 ms``, ``12.3 s``, ``4 min 05 s``, ``2 h 10 min``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min {int(seconds % 60):02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def count(number: int, noun: str, width: int = 0) -> str:
    """``1 layer``, ``2 layers``; the number at least ``width`` columns wide."""
    return f"{number:{width}d} {noun}" if number == 1 else f"{number:{width}d} {noun}s"
