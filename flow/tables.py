"""Parts of tables that stay readable in 80 columns: short sizes, and names that break at their dots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..formats.errors import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.measure import Measurement


def short_size(count: float) -> str:
    """``271 MB``, ``1.5 GB``, ``12 GB``: at most three digits, in decimal units."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while abs(count) >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.1f} {units[0]}" if abs(count) < 9.95 and units[0] != "B" else f"{count:.0f} {units[0]}"


def shortened(text: str, most: int) -> str:
    """At most ``most`` characters: the part before a semicolon, and of that whole words."""
    text = text.partition(";")[0]
    if len(text) <= most:
        return text
    words = text[:most].rpartition(" ")[0] or text[: most - 1]
    return words.rstrip(" ,(") + "…"


def broken_name(name: str, width: int) -> list[str]:
    """Lines of a tensor's name, broken behind dots as far as ``width`` allows."""
    lines = [""]
    for piece in name.replace(".", ".\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return lines


class Name:
    """A tensor's name as a cell."""

    def __init__(self, name: str) -> None:
        self.name = printable(name)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        yield Text("\n".join(broken_name(self.name, options.max_width)), overflow="fold", no_wrap=False)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        least = max(map(len, self.name.split("."))) + 1
        return Measurement(min(least, options.max_width), min(len(self.name), options.max_width))
