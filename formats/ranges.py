"""Ranges of bytes out of remote stores: plain HTTP, S3, and whatever else fsspec has a file system for.

A server is not believed: an answer that is not the range that was asked for, that is compressed or longer than it may
be is refused while it comes in, so that no server makes this process hold more than a block. For HTTP and S3 that is
done here, on the sessions of fsspec and s3fs; other file systems answer through their own ``cat_file``.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

from .errors import UsageError, did_you_mean
from .retries import ATTEMPTS, Refused, StatusError, patiently
from .urls import child, is_http, scheme_of, whole

T = TypeVar("T")

_SECONDS = 120.0
"""A block that takes longer is asked for again."""
_PACKAGES = {
    "http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs",
    "hf": "huggingface_hub", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs",
}  # fmt: skip
_OWN_RETRIES = {"gs": 2, "gcs": 2, "hf": 2}
"""Tries where the library repeats requests itself."""
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
_EMPTY_RANGE = re.compile(r"bytes \*/0")
_USUAL = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
    "merges.txt", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
"""Files that models of the usual libraries have."""
_log = logging.getLogger(__name__)
_TAGS = ("ETag", "etag", "blob_id", "md5Hash", "content_md5", "checksum")
_TIMES = ("LastModified", "last_modified", "updated", "modified", "mtime", "created")


@dataclass(frozen=True)
class Facts:
    """What a store says about one object."""

    size: int
    version: int
    """A number made of its entity tag and time of change: another number, another content."""
    is_folder: bool = False


class Store:
    """A file system of fsspec."""

    def __init__(self, fs: Any, scheme: str) -> None:
        self.fs = fs
        self.attempts = _OWN_RETRIES.get(scheme, ATTEMPTS)

    def look(self, url: str) -> Facts:
        """Facts of an object as they are now; OSError when there is none."""
        path = self.fs._strip_protocol(url)

        def info() -> Facts:
            self.fs.invalidate_cache(path)
            return facts_of(self.fs.info(path))

        return patiently(url, info, self.attempts)

    def entries(self, url: str) -> list[tuple[str, Facts]]:
        """Names in a folder and their facts."""
        path = self.fs._strip_protocol(url)
        found = patiently(url, lambda: self.fs.ls(path, detail=True), self.attempts)
        names = [(str(info["name"]).rstrip("/").rpartition("/")[2], facts_of(info)) for info in found]
        return [(name, facts) for name, facts in names if name]

    def matches(self, url: str) -> list[str]:
        """URLs of what fits a pattern."""
        path = self.fs._strip_protocol(url)
        found = patiently(url, lambda: self.fs.glob(path), self.attempts)
        return [f"{scheme_of(url)}://{str(name).lstrip('/')}" for name in found]

    def fetch(self, url: str, start: int, view: memoryview) -> int:
        """Fills ``view`` with the bytes from ``start`` on; returns how many there were: fewer only at the end."""
        return patiently(url, lambda: self._fetch(url, start, view), self.attempts)

    def _fetch(self, url: str, start: int, view: memoryview) -> int:
        content = self.fs.cat_file(self.fs._strip_protocol(url), start=start, end=start + len(view))
        if len(content) > len(view):
            raise Refused(f"the store sent {len(content)} bytes where {len(view)} were asked for")
        view[: len(content)] = content
        return len(content)

    def _wait(self, call: Callable[[], Awaitable[T]]) -> T:
        """The result of a coroutine on fsspec's event loop."""
        import asyncio

        async def limited() -> T:
            return await asyncio.wait_for(call(), _SECONDS)

        return asyncio.run_coroutine_threadsafe(limited(), self.fs.loop).result()


class S3(Store):
    """s3fs, without the retries of its own and of botocore, which would multiply."""

    def _fetch(self, url: str, start: int, view: memoryview) -> int:
        return self._wait(lambda: self._get(url, start, view))

    async def _get(self, url: str, start: int, view: memoryview) -> int:
        bucket, key, _ = self.fs.split_path(url)
        wanted = f"bytes={start}-{start + len(view) - 1}"
        try:
            answer = await self.fs._call_s3("get_object", Bucket=bucket, Key=key, Range=wanted)
        except OSError as error:
            if "InvalidRange" in repr(error.__cause__) or "416" in str(error) or "not satisfiable" in str(error):
                return 0
            raise
        body = answer["Body"]
        try:
            expected, _ = _expected(str(answer.get("ContentRange", "")), start, len(view))
            return await _received(body.read, view, expected)
        finally:
            body.close()


class Http(Store):
    """Plain HTTP: one request tells size and version, as signatures of URLs may hold for GET only."""

    def look(self, url: str) -> Facts:
        one = memoryview(bytearray(1))
        headers, total = patiently(url, lambda: self._wait(lambda: self._get(url, 0, one)))[1:]
        return Facts(total, _version(headers.get("ETag"), headers.get("Last-Modified")))

    def entries(self, url: str) -> list[tuple[str, Facts]]:
        """Nothing lists a folder: what usually lies beside the weights is asked for by name."""
        found = []
        for name in _USUAL:
            try:
                found.append((name, self.look(child(url, name))))
            except OSError as error:
                _log.debug("%s has no %s: %s", url, name, error.strerror)
        return found

    def matches(self, url: str) -> list[str]:
        raise Refused("HTTP has no patterns: give the URL of a .safetensors file or of its .safetensors.index.json")

    def _fetch(self, url: str, start: int, view: memoryview) -> int:
        return self._wait(lambda: self._get(url, start, view))[0]

    async def _get(self, url: str, start: int, view: memoryview) -> tuple[int, Any, int]:
        """Bytes received, headers, bytes of the whole file."""
        session = await self.fs.set_session()
        address = self.fs.encode_url(quote(whole(url), safe="%/:=&?~#+!$,;'@()*[]"))
        headers = {"Range": f"bytes={start}-{start + len(view) - 1}", "Accept-Encoding": "identity"}
        async with session.get(address, headers=headers) as response:
            given = response.headers
            if response.status == 200:
                response.close()
                raise Refused("the server ignores byte ranges and would send the whole file: download it first")
            if response.status == 416:
                return 0, given, 0 if _EMPTY_RANGE.fullmatch(given.get("Content-Range", "")) else start
            if response.status != 206:
                raise StatusError(response.status)
            if given.get("Content-Encoding", "identity") != "identity":
                raise Refused("the server compresses ranges, which then are none of the file")
            expected, total = _expected(given.get("Content-Range", ""), start, len(view))
            return await _received(response.content.read, view, expected), given, total


def _expected(content_range: str, start: int, length: int) -> tuple[int, int]:
    """How many bytes an answer brings, and how many the object has, by its ``Content-Range``."""
    found = _CONTENT_RANGE.fullmatch(content_range)
    if found is None:
        raise Refused(f"the server does not say which range it sends and of how many bytes: {content_range[:80]!r}")
    first, last, total = map(int, found.groups())
    if first != start or last != min(start + length, total) - 1:
        raise Refused(f"the server sent {content_range[:80]!r} where {length} bytes from {start} on were asked for")
    return last - first + 1, total


async def _received(read: Callable[[int], Awaitable[bytes]], view: memoryview, expected: int) -> int:
    """Puts a body into ``view`` as it comes; one byte more than expected is refused, fewer are a broken connection."""
    got = 0
    while part := await read(1 << 18):
        if got + len(part) > expected:
            raise Refused(f"the server sent more than the {expected} bytes that it announced")
        view[got : got + len(part)] = part
        got += len(part)
    if got < expected:
        raise ConnectionResetError(f"the connection ended after {got} of {expected} bytes")
    return got


def facts_of(info: Any) -> Facts:
    """What fsspec says about an object, whatever its file system calls it."""
    is_folder, size = info.get("type") == "directory", info.get("size")
    if not is_folder and (not isinstance(size, int) or size < 0):
        raise Refused("the store does not say how many bytes it has")
    tags = [next((info[key] for key in keys if info.get(key)), None) for keys in (_TAGS, _TIMES)]
    return Facts(size or 0, _version(*tags), is_folder)


def _version(*tags: object) -> int:
    return int(hashlib.sha256(repr([tag if tag is None else str(tag) for tag in tags]).encode()).hexdigest()[:15], 16)


_stores: dict[str, Store] = {}
_lock = threading.Lock()


def store_of(url: str) -> Store:
    """The store of a URL; UsageError that names the package to install, or protocols that are known."""
    scheme = scheme_of(url)
    place = url.partition("://")[2].partition("/")[0] if scheme not in _PACKAGES else ""  # host and options may differ
    with _lock:
        key = f"{scheme}://{place}"
        if key not in _stores:
            _stores[key] = _open(url, scheme)
        return _stores[key]


def _open(url: str, scheme: str) -> Store:
    try:
        import fsspec
        from fsspec.core import url_to_fs
    except ImportError:
        raise UsageError(f"{scheme}:// URLs need fsspec: pip install 'quantloom[remote]'") from None
    if scheme not in fsspec.available_protocols():
        raise UsageError(f"{scheme}://...: unknown protocol{did_you_mean(scheme, sorted(_PACKAGES))}")
    options: dict[str, Any] = {}
    if is_http(url):
        options = {"encoded": True, "client_kwargs": {"trust_env": True}, "skip_instance_cache": True}
    elif scheme in ("s3", "s3a"):
        options = {"config_kwargs": {"retries": {"max_attempts": 0, "mode": "standard"}}, "skip_instance_cache": True}
    try:
        fs, _ = url_to_fs(url, **options)
    except ImportError:
        package = _PACKAGES.get(scheme, "the package of its file system")
        raise UsageError(f"{scheme}:// URLs need {package}: pip install 'quantloom[remote]' {package}") from None
    if is_http(url):
        return Http(fs, scheme)
    if scheme in ("s3", "s3a"):
        fs.retries = 1
        return S3(fs, scheme)
    return Store(fs, scheme)
