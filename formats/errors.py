"""The one family of exceptions. Every message names file, tensor, the numbers that disagree and the way out."""

from __future__ import annotations

import difflib
import errno
import re
import reprlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

_ODD = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069]")
"""Characters that move a terminal's cursor, change its colours or reorder its text."""


_QUERY = re.compile(r"(https?://[^\s'\"?]*)\?(?!hidden=)[^\s'\"]*")
"""What may be a signature: ``urls.hide`` takes it out of the URL of a checkpoint, and this out of any other."""


def printable(text: str) -> str:
    """``text`` with characters that would steer a terminal written as codes: names come from strangers' files."""
    return _ODD.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class QuantloomError(Exception):
    """Base of every error that quantloom raises on purpose. Its message is one line, safe to print."""

    transient: bool = False
    """Whether the same work may go well another time: a device or a network hiccuped."""

    def __str__(self) -> str:
        return printable(_QUERY.sub(r"\1?...", super().__str__()))


class UsageError(QuantloomError):
    """An option, name, pattern or recipe that cannot mean anything (exit status 2)."""


class CheckpointError(QuantloomError):
    """An input checkpoint that is broken, unreadable or not a checkpoint."""


class PlanError(QuantloomError):
    """A conversion refused before any work: budget, disk space, existing output, nothing to do."""


class NonFiniteError(QuantloomError):
    """NaN or Inf in a weight that was to be quantized."""


class SinkError(QuantloomError):
    """Output that could not be written; nothing was left under a final name."""


class WorkerError(QuantloomError):
    """Worker processes died on a task, again and again."""


_HICCUPS = {
    getattr(errno, name) for name in (
        "EIO", "EINTR", "EAGAIN", "EBUSY", "ESTALE", "ETIMEDOUT", "ECONNRESET", "ECONNABORTED", "ENETDOWN",
        "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH", "EREMOTEIO",
    ) if hasattr(errno, name)
}  # fmt: skip


def is_transient(error: BaseException) -> bool:
    """Whether the same work may go well another time: memory was short, or a device or a network hiccuped."""
    if isinstance(error, QuantloomError):
        return error.transient
    return memory_problem(error) is not None or (isinstance(error, OSError) and error.errno in _HICCUPS)


Known = TypeVar("Known", bound=QuantloomError)


def because(error: Known, cause: BaseException) -> Known:
    """The error, transient if its cause is."""
    error.transient = is_transient(cause)
    return error


def memory_problem(error: BaseException) -> str | None:
    """The first line of what Python, torch or CUDA say when memory runs out; None for any other error."""
    text = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return f"out of memory: {text.splitlines()[0]}"
    return None


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxlong = 2, 8, 4, 160, 40


def shown(value: object) -> str:
    """A value in a message: quoted, and short however long or deep an attacker made it."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no number of more than some thousand digits
        return f"a huge {type(value).__name__}"


def listed(names: Sequence[str], most: int = 8, between: str = ", ") -> str:
    """The first names of a message, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint such as ``; did you mean 'mxfp8'?``, or the list of known words when none is near."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if near:
        return "; did you mean " + " or ".join(repr(name) for name in near) + "?"
    return "; known: " + ", ".join(names)
