"""Faults while a run works: what passes is tried again, what does not stops it cleanly, and a layer may be kept."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TENSORS, Ran, child, listing, make_tensors, write_file
from safetensors.torch import load_file

from quantloom import Pipeline
from quantloom.flow import execute, graph, salvage, session
from quantloom.flow.run_journal import FileLog
from quantloom.formats import fileio
from quantloom.formats.errors import NonFiniteError, QuantloomError, SinkError, WorkerError
from quantloom.stages import writing

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
IO_ERROR = OSError(errno.EIO, os.strerror(errno.EIO))
AGAIN = "run the same command again to continue"


@pytest.fixture(autouse=True)
def every_layer_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "BATCH_BYTES", 1)
    monkeypatch.setattr(fileio, "PORTABLE", False)


def convert(source: Path, output: Path, name: str = "fp8", **how: Any) -> Any:
    return Pipeline(scheduler="sync", **how).read(source).quantize(name).write(output)


@pytest.fixture
def wanted(checkpoint: Path, tmp_path: Path) -> bytes:
    convert(checkpoint, tmp_path / "wanted.safetensors")
    return (tmp_path / "wanted.safetensors").read_bytes()


def failing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException, calls: range) -> list[int]:
    """Makes some calls of a function raise; returns a list that grows with every call."""
    real, seen = getattr(owner, name), list[int]()

    def call(*arguments: Any, **options: Any) -> Any:
        seen.append(len(seen))
        if seen[-1] in calls:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, call)
    return seen


# -- what passes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [IO_ERROR, OSError(errno.ESTALE, "stale")])
@pytest.mark.parametrize("times", [1, 2])
def test_read_errors_that_pass(error: OSError, times: int, checkpoint: Path, wanted: bytes, tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    out = tmp_path / "out.safetensors"
    failing(monkeypatch, fileio._PositionalFile, "read_into", error, range(20, 20 + times))
    convert(checkpoint, out)
    assert out.read_bytes() == wanted


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory"), IO_ERROR])
def test_errors_of_a_task_that_pass(error: Exception, checkpoint: Path, wanted: bytes, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    failing(monkeypatch, writing.Write, "run", error, range(3, 5))
    convert(checkpoint, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == wanted


@pytest.mark.parametrize("error", [MemoryError(), IO_ERROR])
def test_errors_that_stay(error: Exception, checkpoint: Path, wanted: bytes, tmp_path: Path,
                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    out = tmp_path / "out.safetensors"
    with monkeypatch.context() as patched:
        failing(patched, writing.Write, "run", error, range(3, 1000))
        with pytest.raises(SinkError) as caught:
            convert(checkpoint, out)
    assert AGAIN in caught.value.__notes__[-1]
    assert not out.exists()
    assert convert(checkpoint, out, resume="require").nbytes_resumed
    assert out.read_bytes() == wanted


@pytest.mark.parametrize("most", [1, 7, 4096])
def test_short_reads_and_writes(most: int, checkpoint: Path, wanted: bytes, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    read, write = os.preadv, os.pwrite
    if most < 100:  # a system call for every byte takes its time
        few = [0]

        def some(size: int) -> int:
            few[0] += 1
            return most if few[0] % 50 else size
    else:
        some = lambda size: most  # noqa: E731
    monkeypatch.setattr(os, "preadv", lambda file, views, at: read(file, [views[0][: some(len(views[0]))]], at))
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[: some(len(data))], at))
    convert(checkpoint, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == wanted


# -- disks -------------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_at_any_write(checkpoint: Path, wanted: bytes, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    with monkeypatch.context() as patched:
        calls = failing(patched, fileio._PositionalFile, "write", NO_SPACE, range(0))
        convert(checkpoint, tmp_path / "counted.safetensors")
    resumed = 0
    for after in range(len(calls)):
        out = tmp_path / str(after) / "out.safetensors"
        with monkeypatch.context() as patched:
            failing(patched, fileio._PositionalFile, "write", NO_SPACE, range(after, 10_000))
            with pytest.raises(SinkError, match="the disk filled up"):
                convert(checkpoint, out)
        assert not out.exists()
        resumed += bool(convert(checkpoint, out).nbytes_resumed)
        assert out.read_bytes() == wanted
        assert [path.name for path in out.parent.iterdir()] == ["out.safetensors"]
    assert resumed >= TENSORS - 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_limit_of_the_system_for_files(checkpoint: Path, wanted: bytes, tmp_path: Path) -> None:
    """A real refusal, by the system: no file may become larger."""
    out = tmp_path / "out.safetensors"
    if (pid := os.fork()) == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(wanted) // 2, len(wanted) // 2))
        try:
            convert(checkpoint, out)
        except SinkError as error:
            os._exit(7 if "File too large" in str(error) else 8)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    convert(checkpoint, out)
    assert out.read_bytes() == wanted


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root mounts a small disk")
def test_a_small_disk(checkpoint: Path, wanted: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check before work is blinded, so that the disk fills up in the middle."""
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={len(wanted) // 2 // 4096 * 4096}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this sandbox mounts nothing")
    try:
        with monkeypatch.context() as patched:
            patched.setattr(execute, "check_output", lambda _: None)
            with pytest.raises(SinkError, match="the disk filled up") as caught:
                convert(checkpoint, disk / "out.safetensors")
            assert any(AGAIN in note for note in caught.value.__notes__)
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        assert convert(checkpoint, disk / "out.safetensors", resume="require").nbytes_resumed
        assert listing(disk) == {"out.safetensors": listing(tmp_path)["wanted.safetensors"]}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("name", ["append", "remove"])
def test_a_journal_that_cannot_be_written(name: str, checkpoint: Path, wanted: bytes, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    for call in range(3 if name == "append" else 2):
        out = tmp_path / str(call) / "out.safetensors"
        with monkeypatch.context() as patched:
            failing(patched, FileLog, name, SinkError("x: cannot write the journal"), range(call, call + 1))
            with pytest.raises(SinkError, match="cannot write the journal"):
                convert(checkpoint, out)
        if not out.exists() or list(out.parent.glob("*.jsonl")):
            convert(checkpoint, out)
        assert listing(out.parent) == {"out.safetensors": listing(tmp_path)["wanted.safetensors"]}


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(0o500)
    with pytest.raises(SinkError, match="Permission denied"):
        convert(checkpoint, tmp_path / "out" / "x.safetensors")


# -- the session -------------------------------------------------------------------------------------------------------


def test_files_are_synced_before_their_lines_are_written(checkpoint: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """And one sync and one append serve all receipts of an interval."""
    calls: list[tuple[str, bytes]] = []
    append = FileLog.append
    real = fileio.sync_file
    from quantloom.flow import part_files

    monkeypatch.setattr(part_files, "sync_file", lambda path: (calls.append(("sync", b"")), real(path)))
    monkeypatch.setattr(FileLog, "append", lambda self, lines: (calls.append(("lines", lines)), append(self, lines))[1])
    convert(checkpoint, tmp_path / "out.safetensors")
    assert [name for name, _ in calls] == ["lines", "sync", "lines", "lines"]
    assert [lines.count(b"\n") for name, lines in calls if name == "lines"] == [1, TENSORS, 1]


def test_lines_follow_each_interval(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "INTERVAL", 0.01)
    monkeypatch.setattr(session, "SHARE", 1)
    real = writing.Write.run
    monkeypatch.setattr(writing.Write, "run", lambda self, work: (time.sleep(0.05), real(self, work))[1])
    seen: list[int] = []
    append = FileLog.append

    def counted(self: FileLog, lines: bytes) -> None:
        seen.append(lines.count(b"\n"))
        append(self, lines)

    monkeypatch.setattr(FileLog, "append", counted)
    convert(checkpoint, tmp_path / "out.safetensors")
    assert sum(seen) == TENSORS + 2
    assert len(seen) > 5


@pytest.mark.parametrize("error", [SinkError("cannot sync to disk"), ZeroDivisionError("a bug")])
def test_what_fails_beside_the_work_stops_it(error: Exception, checkpoint: Path, wanted: bytes, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    out = tmp_path / "out.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(session, "INTERVAL", 0.0)
        real = writing.Write.run
        patched.setattr(writing.Write, "run", lambda self, work: (time.sleep(0.02), real(self, work))[1])
        failing(patched, session, "finished_lines", error, range(1000))
        with pytest.raises(type(error), match=str(error)):
            convert(checkpoint, out)
    assert not out.exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "quantloom-journal"]
    convert(checkpoint, out)
    assert out.read_bytes() == wanted


# -- on_error keep -----------------------------------------------------------------------------------------------------

BAD = "blocks.0.mlp.up"


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """A checkpoint with NaN in one layer."""
    tensors = make_tensors()
    tensors[f"{BAD}.weight"][5, 7] = float("nan")
    return write_file(tmp_path / "in" / "spoilt.safetensors", tensors)


def same_tensors(one: Path, other: Path) -> None:
    found, wanted = load_file(one), load_file(other)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        same = found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        assert torch.equal(*same), name


def without_bad(source: Path, output: Path) -> Any:
    flow = Pipeline().read(source).target(exclude=BAD.replace(".", r"\."))
    return flow.quantize("fp8").write(output)


def test_a_layer_with_nan_is_kept(spoilt: Path, tmp_path: Path, cli: Callable[..., Ran]) -> None:
    without_bad(spoilt, tmp_path / "wanted.safetensors")
    out = tmp_path / "out.safetensors"
    with pytest.raises(NonFiniteError):
        convert(spoilt, tmp_path / "stopped.safetensors")
    ran = cli("convert", spoilt, out, "--format", "fp8", "--on-error", "keep", "--json")
    assert ran.status == 0, ran.err
    said = json.loads(ran.out)
    assert list(said["failed"]) == [BAD]
    assert "NaN" in said["failed"][BAD]
    assert f"1 layer failed and stayed unquantized: {BAD}" in said["warnings"]
    same_tensors(out, tmp_path / "wanted.safetensors")
    assert not list(tmp_path.glob("out*.*.*"))


@pytest.mark.parametrize("error", [ValueError("no convergence"), IO_ERROR, WorkerError("workers died on their task")])
def test_a_layer_that_fails_is_kept(error: Exception, checkpoint: Path, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    without_bad(checkpoint, tmp_path / "wanted.safetensors")
    real = writing.Write.run

    def run(self: Any, work: Any) -> Any:
        if work.plan.layer.name == BAD and work.plan.format:
            raise error
        return real(self, work)

    monkeypatch.setattr(writing.Write, "run", run)
    report = convert(checkpoint, tmp_path / "out.safetensors", on_error="keep")
    assert list(report.failed) == [BAD]
    assert any("failed and stayed unquantized" in text for text in report.found)
    same_tensors(tmp_path / "out.safetensors", tmp_path / "wanted.safetensors")


def test_no_room_for_another_layout(spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out" / "x.safetensors"
    convert(spoilt, tmp_path / "wanted.safetensors", on_error="keep")
    with monkeypatch.context() as patched:
        patched.setattr(salvage.fileio, "free_bytes", lambda _: 1000)
        patched.setattr(execute, "check_output", lambda _: None)
        with pytest.raises(SinkError, match="means to lay the output out again, which needs") as caught:
            convert(spoilt, out, on_error="keep")
    assert f"{TENSORS - 1} of {TENSORS} tensors are finished" in caught.value.__notes__[-1]
    assert convert(spoilt, out, on_error="keep").nbytes_resumed
    assert listing(out.parent) == {"x.safetensors": listing(tmp_path)["wanted.safetensors"]}


def test_every_layer_fails(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = writing.Write.run

    def run(self: Any, work: Any) -> Any:
        if work.plan.format:
            raise ValueError("never")
        return real(self, work)

    monkeypatch.setattr(writing.Write, "run", run)
    with pytest.raises(SinkError, match=r"every layer failed; .*: never and 6 more"):
        convert(checkpoint, tmp_path / "out.safetensors", on_error="keep")


def test_a_layer_that_cannot_even_be_kept(checkpoint: Path, wanted: bytes, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    out = tmp_path / "out" / "x.safetensors"
    with monkeypatch.context() as patched:
        real = writing.Write.run

        def run(self: Any, work: Any) -> Any:
            if work.plan.layer.name == BAD:
                raise IO_ERROR
            return real(self, work)

        patched.setattr(writing.Write, "run", run)
        with pytest.raises(QuantloomError, match="Input/output error") as caught:
            convert(checkpoint, out, on_error="keep")
    assert f"{TENSORS - 1} of {TENSORS} tensors are finished" in caught.value.__notes__[-1]
    assert listing(out.parent).keys() == {"x.safetensors.part", "x.safetensors.journal.jsonl"}
    assert convert(checkpoint, out).nbytes_resumed
    assert out.read_bytes() == wanted


def test_keeping_is_for_what_quantizes(checkpoint: Path, tmp_path: Path, cli: Callable[..., Ran]) -> None:
    convert(checkpoint, tmp_path / "fp8.safetensors")
    ran = cli("dequantize", tmp_path / "fp8.safetensors", tmp_path / "out.safetensors", "--on-error", "keep")
    assert ran.status == 2
    assert "on_error keep leaves layers unquantized, and nothing is quantized here" in ran.err


# -- a commit that goes wrong twice ------------------------------------------------------------------------------------


def test_neither_names_nor_journal_can_be_written(spoilt: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A commit that fails on a disk that takes no line either: the new layout must not be mixed with the old one."""
    from quantloom.flow import commit

    convert(spoilt, tmp_path / "wanted.safetensors", on_error="keep")
    out = tmp_path / "out" / "x.safetensors"
    with monkeypatch.context() as patched:
        failing(patched, commit, "replace", SinkError("in use"), range(100))
        failing(patched, FileLog, "append", SinkError("no space"), range(3, 100))
        with pytest.raises(SinkError, match="no space"):
            convert(spoilt, out, on_error="keep")
    convert(spoilt, out, on_error="keep")
    assert listing(out.parent) == {"x.safetensors": listing(tmp_path)["wanted.safetensors"]}


# -- workers and signals -----------------------------------------------------------------------------------------------

_CLUSTER = """
import os, sys, pathlib
from quantloom import Pipeline
from quantloom.flow import graph
graph.BATCH_BYTES = 1
once = pathlib.Path(sys.argv[3])
def kill_one():
    from quantloom.stages import writing
    real = writing.Write.run
    def run(self, work):
        if not once.exists():
            once.touch()
            os.kill(os.getpid(), 9)
        return real(self, work)
    writing.Write.run = run
if __name__ == "__main__":
    import distributed
    web = dict(dashboard_address="127.0.0.1:0", worker_dashboard_address="127.0.0.1:0", silence_logs=50)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, **web) as cluster:
        with distributed.Client(cluster, set_as_default=False) as client:
            client.run(kill_one)
            Pipeline().read(sys.argv[1]).quantize("fp8").write(sys.argv[2], compute=False).compute(client)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of another kind")
def test_a_worker_is_killed(checkpoint: Path, wanted: bytes, tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    (tmp_path / "run.py").write_text(_CLUSTER)
    out = tmp_path / "out.safetensors"
    ran = child(str(tmp_path / "run.py"), str(checkpoint), str(out), str(tmp_path / "once"))
    assert ran.status == 0, ran.err
    assert (tmp_path / "once").exists()
    assert out.read_bytes() == wanted


def test_keys_of_two_tries_differ(checkpoint: Path, tmp_path: Path) -> None:
    """A scheduler that still has a result under a key would give that back."""
    from quantloom.stages.work import Environment

    plan = Pipeline().read(checkpoint).quantize("fp8").write(tmp_path / "out.safetensors", compute=False).plan
    made = [graph.submission(graph.batches(plan.layers), Environment("run"))[0] for _ in range(2)]
    assert not made[0].keys() & made[1].keys()
