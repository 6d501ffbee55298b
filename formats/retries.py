"""Which errors of a remote store pass, and how long to wait for that; all others become one OSError with clean words.

Libraries name an object by its whole URL in their errors, signature included, so that neither their text nor the error
itself is passed on where it may hold one.
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from .errors import QuantloomError
from .urls import shown_url

T = TypeVar("T")

ATTEMPTS = 6
"""Tries in all: with the waits between them a store may be away for about fifteen seconds."""
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 8.0
_log = logging.getLogger(__name__)

_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
_KINDS: dict[int, type[OSError]] = {401: PermissionError, 403: PermissionError, 404: FileNotFoundError,
                                    410: FileNotFoundError}  # fmt: skip
_WORDS = {
    401: "access is refused: the store wants credentials, which come from the environment",
    403: "access is refused: the credentials of the environment do not allow it, or the URL has expired",
    404: "does not exist", 410: "does not exist any more",
}  # fmt: skip
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_NO_STORE = (QuantloomError, MemoryError, TypeError, AttributeError, NameError, AssertionError)
"""What no store has to do with."""
_PASSING_NAMES = {
    "ClientConnectionError", "ClientPayloadError", "ServerTimeoutError", "ClientOSError",  # aiohttp
    "HTTPClientError", "IncompleteReadError", "ResponseStreamingError", "FSTimeoutError",  # botocore, fsspec
    "ConnectionError", "Timeout", "ChunkedEncodingError", "TransportError", "TransferEncodingError",  # requests, httpx
}  # fmt: skip
_FINAL_NAMES = {"InvalidURL", "TooManyRedirects", "ClientConnectorCertificateError", "SSLError"}
_FINAL_ERRNO = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.ENOSPC}


class StatusError(OSError):
    """A server's answer that is not the bytes that were asked for."""

    def __init__(self, status: int, words: str = "") -> None:
        super().__init__(errno.EIO, words or f"the server answers {status}")
        self.status = status


class Refused(OSError):
    """A server that does something that no retry mends."""

    def __init__(self, words: str) -> None:
        super().__init__(errno.EINVAL, words)


def patiently(what: str, call: Callable[[], T], attempts: int = ATTEMPTS) -> T:
    """The result of ``call``, repeated while its error is one that passes, with waits that double and vary.

    Raises OSError (FileNotFoundError, PermissionError where it is that) whose ``strerror`` is safe to show.
    """
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except Exception as error:
            if isinstance(error, _NO_STORE):
                raise
            if attempt == attempts or not passes(error):
                failure = _clean(what, error, attempt)
                break
            wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
            level = logging.WARNING if attempt > 2 else logging.INFO
            _log.log(level, "%s: %s; try %d of %d in %.1f s", what, _words(error), attempt + 1, attempts, wait)
        time.sleep(wait)
    raise failure  # out here, where the library's error is no part of it


def passes(error: BaseException) -> bool:
    """Whether an error may be gone at the next try: throttling, a server's own failure, a broken connection."""
    if isinstance(error, Refused | QuantloomError):
        return False
    if (status := status_of(error)) is not None:
        return status in _TRANSIENT_STATUS
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, _FINAL) or names & _FINAL_NAMES:
        return False
    if isinstance(error, OSError):
        return error.errno not in _FINAL_ERRNO
    return bool(names & _PASSING_NAMES)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error, or what caused it, tells of; None when it tells of none."""
    for each in _causes(error):
        if type(each).__module__.startswith("aiohttp"):
            continue  # what it numbers are its own troubles; answers of servers are StatusErrors here
        response = getattr(each, "response", None)
        if isinstance(response, dict):  # botocore
            response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        found = [getattr(each, "status", None), getattr(each, "code", None), response,
                 getattr(response, "status_code", None)]  # fmt: skip
        for value in found:
            if isinstance(value, int) and 400 <= value < 600:
                return value
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__ or seen.__context__


def _clean(what: str, error: BaseException, attempts: int) -> OSError:
    status = status_of(error)
    kind = _KINDS.get(status or 0, OSError)
    for each in _FINAL:
        if isinstance(error, each):
            kind = each
    number = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES}.get(kind, errno.EIO)
    again = f" (tried {attempts} times)" if attempts > 1 else ""
    return kind(number, _words(error) + again, what)


def _words(error: BaseException) -> str:
    status = status_of(error)
    if isinstance(error, FileNotFoundError):
        status = 404
    if status in _WORDS:
        return _WORDS[status]
    if isinstance(error, StatusError | Refused):
        return str(error.strerror)
    text = shown_url(str(getattr(error, "strerror", None) or error)).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:300]}".rstrip(": ")
