"""Positional I/O in both modes: whole buffers, faults with their reasons, threads, sparse files, renames."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from typing import TYPE_CHECKING, Any

import pytest

from quantloom.formats import fileio, places
from quantloom.formats.errors import CheckpointError, SinkError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DATA = bytes(range(256)) * 40

pytestmark = pytest.mark.skipif(os.name == "nt", reason="faults are injected into POSIX calls")


@pytest.fixture(params=["positional", "portable"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(fileio, "PORTABLE", request.param == "portable")
    return request.param


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(DATA)
    return path


def limit_reads(monkeypatch: pytest.MonkeyPatch, allow: Callable[[int], int]) -> None:
    """Every read, in either mode, first asks ``allow(wanted bytes)`` how many it may give; it may raise."""
    preadv = os.preadv

    class Limited(FileIO):
        def readinto(self, buffer: Any, /) -> int | None:
            return super().readinto(memoryview(buffer)[: allow(len(buffer))])

    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][: allow(len(views[0]))]], at))
    monkeypatch.setattr(fileio, "FileIO", Limited)


def limit_writes(monkeypatch: pytest.MonkeyPatch, allow: Callable[[int], int]) -> None:
    pwrite = os.pwrite

    class Limited(FileIO):
        def write(self, buffer: Any, /) -> int | None:
            return super().write(memoryview(buffer)[: allow(len(buffer))])

    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[: allow(len(view))], at))
    monkeypatch.setattr(fileio, "FileIO", Limited)


def failing(code: int) -> Callable[[int], int]:
    def allow(_: int) -> int:
        raise OSError(code, os.strerror(code))

    return allow


def recording(calls: list[int], most: int) -> Callable[[int], int]:
    def allow(wanted: int) -> int:
        calls.append(wanted)
        return min(wanted, most)

    return allow


def read(path: Path, offset: int, count: int) -> bytes:
    buffer = bytearray(count)
    with fileio.Reader(path) as reader:
        reader.read_into(memoryview(buffer), offset)
    return bytes(buffer)


@pytest.mark.usefixtures("mode")
class TestReader:
    @pytest.mark.parametrize(("offset", "count"), [(0, len(DATA)), (1, 1), (257, 1000), (len(DATA) - 1, 1), (5, 0)])
    def test_reads_the_bytes_asked_for(self, file: Path, offset: int, count: int) -> None:
        assert read(file, offset, count) == DATA[offset : offset + count]

    def test_size_is_the_files(self, file: Path) -> None:
        with fileio.Reader(file) as reader:
            assert reader.size == len(DATA)

    def test_fills_buffers_of_any_item_type_and_shape(self, file: Path) -> None:
        buffer = bytearray(64)
        with fileio.Reader(file) as reader:
            reader.read_into(memoryview(buffer).cast("d"), 8)
            assert buffer == DATA[8:72]
            reader.read_into(memoryview(buffer).cast("B", shape=[4, 16]), 16)
            assert buffer == DATA[16:80]

    def test_touches_nothing_beside_the_buffer(self, file: Path) -> None:
        buffer = bytearray(b"\xee" * 30)
        with fileio.Reader(file) as reader:
            reader.read_into(memoryview(buffer)[10:20], 0)
        assert buffer == b"\xee" * 10 + DATA[:10] + b"\xee" * 10

    def test_short_reads_are_continued(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []
        limit_reads(monkeypatch, recording(calls, 7))
        assert read(file, 3, 100) == DATA[3:103]
        assert calls[:3] == [100, 93, 86]

    def test_one_call_never_asks_for_more_than_the_system_takes(
        self, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[int] = []
        monkeypatch.setattr(fileio, "_MAX_CALL", 64)
        limit_reads(monkeypatch, recording(calls, 1 << 30))
        assert read(file, 0, 150) == DATA[:150]
        assert calls == [64, 64, 22]

    def test_truncated_file_names_offset_wanted_and_got(self, file: Path) -> None:
        with pytest.raises(CheckpointError, match=r"data\.bin: .*truncated: wanted 20 bytes at offset 10230, got 10"):
            read(file, len(DATA) - 10, 20)

    def test_offset_beyond_the_end(self, file: Path) -> None:
        with pytest.raises(CheckpointError, match="wanted 1 bytes at offset 99999, got 0"):
            read(file, 99999, 1)

    def test_file_that_shrinks_while_open(self, file: Path) -> None:
        with fileio.Reader(file) as reader:
            os.truncate(file, 100)
            with pytest.raises(CheckpointError, match="truncated"):
                reader.read_into(memoryview(bytearray(200)), 0)

    def test_device_error_names_file_and_reason(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        limit_reads(monkeypatch, failing(errno.EIO))
        with pytest.raises(CheckpointError, match=r"data\.bin: cannot read 8 bytes at offset 16: Input/output error"):
            read(file, 16, 8)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"nowhere\.bin: cannot open for reading: No such file"):
            fileio.Reader(tmp_path / "nowhere.bin")

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="it is a folder"):
            fileio.Reader(tmp_path)

    def test_pipe_is_refused_and_does_not_block(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(CheckpointError, match="not a regular file"):
            fileio.Reader(tmp_path / "pipe")

    def test_path_with_nul(self) -> None:
        with pytest.raises(CheckpointError, match="cannot open for reading"):
            fileio.Reader("a\0b")

    def test_no_permission(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Tests may run as root, whom no mode bit stops.
        def refuse(*_: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(fileio, "FileIO", refuse)
        with pytest.raises(CheckpointError, match=r"data\.bin: cannot open for reading: Permission denied"):
            fileio.Reader(file)

    def test_threads_share_one_reader(self, file: Path) -> None:
        def check(number: int) -> bool:
            offset, buffer = number * 37 % 10000, bytearray(64)
            reader.read_into(memoryview(buffer), offset)
            return buffer == DATA[offset : offset + 64]

        with fileio.Reader(file) as reader, ThreadPoolExecutor(8) as pool:
            assert all(pool.map(check, range(2000)))


@pytest.mark.usefixtures("mode")
class TestWriter:
    def test_writes_in_any_order_and_leaves_the_rest(self, file: Path) -> None:
        with fileio.Writer(file) as writer:
            writer.write(b"later", 500)
            writer.write(bytearray(b"first"), 2)
            writer.write(memoryview(b""), 7)
            writer.sync()
        expected = bytearray(DATA)
        expected[500:505], expected[2:7] = b"later", b"first"
        assert file.read_bytes() == expected

    def test_takes_buffers_of_any_item_type(self, file: Path) -> None:
        with fileio.Writer(file) as writer:
            writer.write(memoryview(bytes(range(16))).cast("I"), 100)
        assert file.read_bytes()[100:116] == bytes(range(16))

    def test_short_writes_are_continued(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        limit_writes(monkeypatch, lambda wanted: min(wanted, 5))
        with fileio.Writer(file) as writer:
            writer.write(b"abcdefghijklmnopqrstuvwxyz", 9)
        assert file.read_bytes() == DATA[:9] + b"abcdefghijklmnopqrstuvwxyz" + DATA[35:]

    def test_full_disk_is_said_plainly(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        room = [6, 0]
        limit_writes(monkeypatch, lambda _: room.pop(0) or failing(errno.ENOSPC)(0))
        with fileio.Writer(file) as writer, pytest.raises(SinkError) as caught:
            writer.write(b"x" * 10, 40)
        assert str(caught.value) == (
            f"{file}: cannot write 10 bytes at offset 40: No space left on device; "
            "the disk filled up (4 more bytes were wanted): free space and run again"
        )

    def test_device_error_has_no_disk_hint(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        limit_writes(monkeypatch, failing(errno.EIO))
        with (
            fileio.Writer(file) as writer,
            pytest.raises(SinkError, match=r"data\.bin: cannot write 3 bytes at offset 0: Input/output error$"),
        ):
            writer.write(b"abc", 0)

    def test_file_system_with_a_size_limit(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        limit_writes(monkeypatch, failing(errno.EFBIG))
        with fileio.Writer(file) as writer, pytest.raises(SinkError, match="smaller shards"):
            writer.write(b"abc", 0)

    def test_writes_that_take_nothing_do_not_spin(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        limit_writes(monkeypatch, lambda _: 0)
        with fileio.Writer(file) as writer, pytest.raises(SinkError, match="took no byte"):
            writer.write(b"abc", 0)

    def test_never_creates(self, tmp_path: Path) -> None:
        with pytest.raises(SinkError, match=r"new\.part: cannot open for writing: No such file"):
            fileio.Writer(tmp_path / "new.part")
        assert list(tmp_path.iterdir()) == []

    def test_failing_sync(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "fsync", failing(errno.EIO))
        with fileio.Writer(file) as writer, pytest.raises(SinkError, match=r"data\.bin: cannot sync to disk: Input"):
            writer.sync()

    def test_threads_share_one_writer(self, tmp_path: Path) -> None:
        path = tmp_path / "out.part"
        fileio.create_sparse(path, 64 * 500, b"")
        with fileio.Writer(path) as writer, ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: writer.write(i.to_bytes(4, "big") * 16, i * 64), reversed(range(500))))
        assert path.read_bytes() == b"".join(i.to_bytes(4, "big") * 16 for i in range(500))


@pytest.mark.usefixtures("mode")
class TestCreateSparse:
    def test_size_head_and_zeros(self, tmp_path: Path) -> None:
        path = tmp_path / "a.part"
        fileio.create_sparse(path, 1000, b"head")
        assert path.read_bytes() == b"head" + bytes(996)

    def test_takes_no_blocks_for_what_is_not_written(self, tmp_path: Path) -> None:
        path = tmp_path / "a.part"
        fileio.create_sparse(path, 1 << 32, b"head")
        assert path.stat().st_size == 1 << 32
        assert path.stat().st_blocks * 512 < 1 << 20

    def test_old_content_is_gone(self, file: Path) -> None:
        fileio.create_sparse(file, 20, b"ab")
        assert file.read_bytes() == b"ab" + bytes(18)

    def test_no_link_is_followed_and_no_pipe_is_opened(self, file: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(file)
        (tmp_path / "dangling").symlink_to(tmp_path / "none")
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "folder").mkdir()
        for name in ("link", "dangling", "pipe", "folder"):
            with pytest.raises(SinkError, match=f"{name}: stands in the way and is not a regular file"):
                fileio.create_sparse(tmp_path / name, 20, b"ab")
            assert os.path.lexists(tmp_path / name)
        assert file.read_bytes() == DATA
        assert not (tmp_path / "none").exists()

    def test_another_name_of_an_old_file_keeps_its_content(self, file: Path, tmp_path: Path) -> None:
        os.link(file, tmp_path / "other")
        fileio.create_sparse(file, 20, b"ab")
        assert (tmp_path / "other").read_bytes() == DATA

    def test_head_may_be_the_whole_file_and_no_more(self, tmp_path: Path) -> None:
        fileio.create_sparse(tmp_path / "a", 4, b"head")
        with pytest.raises(ValueError, match="5 bytes in a file of 4"):
            fileio.create_sparse(tmp_path / "b", 4, b"heads")
        assert (tmp_path / "a").read_bytes() == b"head"
        assert not (tmp_path / "b").exists()

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(SinkError, match="cannot create: No such file"):
            fileio.create_sparse(tmp_path / "none" / "a.part", 10, b"")

    def test_failure_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        limit_writes(monkeypatch, failing(errno.ENOSPC))
        with pytest.raises(SinkError, match="the disk filled up"):
            fileio.create_sparse(tmp_path / "a.part", 100, b"head")
        assert list(tmp_path.iterdir()) == []

    def test_size_that_the_file_system_refuses(self, tmp_path: Path) -> None:
        with pytest.raises(SinkError, match=r"a\.part: cannot create with \d+ bytes"):
            fileio.create_sparse(tmp_path / "a.part", 1 << 62, b"")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("mode")
class TestNames:
    def test_replace_overwrites_in_one_step(self, tmp_path: Path) -> None:
        (tmp_path / "new").write_text("new")
        (tmp_path / "old").write_text("old")
        fileio.replace(tmp_path / "new", tmp_path / "old")
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("old", "new")]

    def test_replace_without_a_source(self, tmp_path: Path) -> None:
        with pytest.raises(SinkError, match=r"b: cannot take the place of .*a: No such file"):
            fileio.replace(tmp_path / "a", tmp_path / "b")

    def test_sync_file(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fileio.sync_file(file)
        assert file.read_bytes() == DATA
        with pytest.raises(SinkError, match="No such file"):
            fileio.sync_file(file.with_name("none"))
        monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
        with pytest.raises(SinkError, match="the disk filled up: free space"):
            fileio.sync_file(file)

    def test_free_bytes_of_a_folder_that_is_not_there_yet(self, tmp_path: Path) -> None:
        free = shutil.disk_usage(tmp_path).free
        assert abs(fileio.free_bytes(tmp_path) - free) < 1 << 30
        assert abs(fileio.free_bytes(tmp_path / "not" / "yet") - free) < 1 << 30

    def test_free_bytes_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: failing(errno.EIO)(0))
        with pytest.raises(SinkError, match="cannot tell the free space: Input/output error"):
            fileio.free_bytes(tmp_path)

    def test_same_file_through_links_and_spellings(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = file.parent
        (folder / "soft").symlink_to(file)
        (folder / "hard").hardlink_to(file)
        (folder / "copy").write_bytes(DATA)
        monkeypatch.chdir(folder)
        assert places.same_file(file, folder / "soft")
        assert places.same_file(file, folder / "hard")
        assert places.same_file("data.bin", str(file))
        assert not places.same_file(file, folder / "copy")

    def test_same_file_before_it_exists(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "link").symlink_to(tmp_path)
        assert places.same_file("new", tmp_path / "link" / "new")
        assert not places.same_file("new", tmp_path / "other")


class TestSyncDir:
    def test_syncs_the_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        synced: list[bool] = []
        monkeypatch.setattr(fileio, "PORTABLE", False)
        monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino == tmp_path.stat().st_ino))
        fileio.sync_dir(tmp_path)
        assert synced == [True]

    def test_is_nothing_where_there_is_no_such_call(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "fsync", failing(errno.EIO))
        monkeypatch.setattr(fileio, "PORTABLE", True)
        fileio.sync_dir(tmp_path)

    @pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
    def test_file_systems_without_it_are_forgiven(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        monkeypatch.setattr(fileio, "PORTABLE", False)
        monkeypatch.setattr(os, "fsync", failing(code))
        fileio.sync_dir(tmp_path)

    def test_real_failures_are_not(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fileio, "PORTABLE", False)
        monkeypatch.setattr(os, "fsync", failing(errno.EIO))
        with pytest.raises(SinkError, match="cannot sync the folder: Input/output error"):
            fileio.sync_dir(tmp_path)


@pytest.mark.parametrize(("value", "forced"), [("1", True), ("0", False), (None, False)])
def test_environment_forces_the_portable_mode(
    monkeypatch: pytest.MonkeyPatch, value: str | None, forced: bool
) -> None:
    monkeypatch.delenv("QUANTLOOM_PORTABLE_IO", raising=False)
    if value is not None:
        monkeypatch.setenv("QUANTLOOM_PORTABLE_IO", value)
    spec = importlib.util.spec_from_file_location("quantloom.formats._fresh_fileio", fileio.__file__)
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert forced is fresh.PORTABLE
    assert spec.name not in sys.modules


def test_systems_without_preadv_are_portable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")
    spec = importlib.util.spec_from_file_location("quantloom.formats._fresh_fileio", fileio.__file__)
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert fresh.PORTABLE is True


def test_modes_use_different_calls(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The switch is real: without os.preadv only the portable mode reads."""
    monkeypatch.setattr(os, "preadv", lambda *_: failing(errno.EIO)(0))
    monkeypatch.setattr(fileio, "PORTABLE", True)
    assert read(file, 0, 4) == DATA[:4]
    monkeypatch.setattr(fileio, "PORTABLE", False)
    with pytest.raises(CheckpointError, match="Input/output error"):
        read(file, 0, 4)
