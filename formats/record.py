"""Small frozen values that are made, kept and sent by the hundred thousand."""

from __future__ import annotations

from operator import attrgetter
from typing import Any, ClassVar


class Record:
    """Base of frozen dataclasses with slots that travel to other processes: a record is pickled as its class and its
    values. Dataclasses themselves look all fields up for each object, which took half the time of sending a plan."""

    __slots__ = ()
    __match_args__: ClassVar[tuple[str, ...]]
    """Arguments that make one; there are two or more."""

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), attrgetter(*self.__match_args__)(self)
