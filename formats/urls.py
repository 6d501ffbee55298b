"""URLs as text: which paths are some, what of them may be shown, and their parts. Nothing here opens one.

Whoever has the query of a signed URL has the file, so that a query never stands in the text that is carried around:
``hide`` puts a digest in its place and keeps it in this process. The text is what plans, messages, recipes and reports
hold; where a `Url` is pickled for a worker, the query travels with it.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from .errors import UsageError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)(?:::[A-Za-z][A-Za-z0-9+.:-]*)?://")
_COLLAPSED = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/[^/]")
_HIDDEN = re.compile(r"hidden=[0-9a-f]{8}")
_SHOWN_QUERY = re.compile(r"(://[^\s'\"?]*)\?[^\s'\"]*")
_SHOWN_USER = re.compile(r"://[^\s/@'\"]*@")
_HTTP = ("http", "https")
_LOCAL = ("file", "local")
_MAX_NAME = 200

_queries: dict[str, str] = {}
"""What stands behind the ``?`` of every URL that this process was given, by the text that is shown."""


class Url(str):
    """A URL without its query, which goes along when it is pickled."""

    def __new__(cls, text: str, query: str) -> Url:
        _queries[text] = query
        return super().__new__(cls, text)

    def __reduce__(self) -> tuple[Any, ...]:
        return Url, (str.__str__(self), _queries[self])


def is_url(path: object) -> bool:
    """Whether a path is a URL and not a name in the file system (one letter is a drive)."""
    return _URL.match(str(path)) is not None


def lost_slash(path: str) -> str:
    """A hint for what looks like a URL that went through ``Path``; else nothing."""
    return "; a URL keeps its two slashes only as text, not as Path" if _COLLAPSED.match(path) else ""


def scheme_of(url: str) -> str:
    """Its protocol, in small letters."""
    return url.partition("://")[0].lower()


def is_http(url: str) -> bool:
    return scheme_of(url) in _HTTP


def hide(path: str) -> str:
    """A path as it may be carried around and shown: of a URL without what follows its ``?``.

    Raises UsageError, which repeats nothing that may be secret, for a URL with a password, with a query that means
    nothing to its protocol, or of a kind that is fetched as a whole.
    """
    found = _URL.match(path)
    if found is None:
        return path
    scheme = found[1].lower()
    if "::" in path.partition("?")[0]:
        raise UsageError(f"{scheme}::...: chained URLs are fetched as a whole; give the URL of the file itself")
    if scheme in _LOCAL:
        raise UsageError(f"{shown_url(path)}: names a file of this machine: give its path without {scheme}://")
    rest = path[found.end() :]
    user = rest.partition("?")[0].partition("/")[0].rpartition("@")[0]
    if user and (scheme in _HTTP or ":" in user) and scheme != "github":
        raise UsageError(
            f"{scheme}://...: holds a user name or password; credentials come from the environment only (for {scheme} "
            f"{'~/.netrc' if scheme in _HTTP else 'what its library reads'}): take out what stands before the @"
        )
    base, mark, query = rest.partition("?")
    if not mark or (scheme not in _HTTP and "=" not in query):  # elsewhere ? is a character, or part of a pattern
        return path
    text = f"{scheme}://{base}"
    if scheme not in _HTTP:
        raise UsageError(f"{text}?...: a {scheme} URL takes no query; credentials come from the environment")
    if _HIDDEN.fullmatch(query):
        if path not in _queries:
            raise UsageError(f"{path}: what follows the ? is left out of everything that is shown: give the whole URL")
        return Url(path, _queries[path])
    return Url(f"{text}?hidden={hashlib.sha256(query.encode()).hexdigest()[:8]}", query)


def whole(url: str) -> str:
    """The URL with its query, to be sent and never to be shown; UsageError for a query that ``hide`` never saw."""
    base, mark, _ = url.partition("?")
    if not mark or not is_http(url):
        return url
    if url not in _queries:
        raise UsageError(f"{base}?...: a URL with a query can only be the checkpoint that a command reads")
    return f"{base}?{_queries[url]}"


def beside(url: str, name: str) -> str:
    """The URL of another file in the same folder; it is asked for with the same query."""
    return child(parent(url), name)


def child(folder: str, name: str) -> str:
    base, mark, _ = folder.partition("?") if is_http(folder) else (folder, "", "")
    text = f"{base.rstrip('/')}/{name}"
    return hide(f"{text}?{_queries[folder]}") if mark else text


def parent(url: str) -> str:
    """The folder that holds it; a bucket or host is its own."""
    base, mark, _ = url.partition("?") if is_http(url) else (url, "", "")
    scheme, _, rest = base.partition("://")
    folder = rest.rstrip("/").rpartition("/")[0]
    text = f"{scheme}://{folder or rest}"
    return hide(f"{text}?{_queries[url]}") if mark else text


def name_of(url: str) -> str:
    """Its last part, without a query."""
    base = url.partition("?")[0] if is_http(url) else url
    return base.rstrip("/").rpartition("/")[2][:_MAX_NAME]


def shown_url(text: str) -> str:
    """A text of a library or a user with everything cut out that stands in a URL's query or before its host."""
    return _SHOWN_USER.sub("://", _SHOWN_QUERY.sub(r"\1?...", text))
