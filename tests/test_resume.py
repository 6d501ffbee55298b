"""A run that was stopped, wherever it was, ends with the bytes of one that was not; what does not fit is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FORMATS, LINEAR, TENSORS, Ran, listing, write_file, write_folder

import quantloom
from quantloom import Pipeline
from quantloom.flow import commit, execute, graph, parts, run_journal, session, sink
from quantloom.flow.cli import main
from quantloom.flow.run_journal import FileLog, lines_of, read_record
from quantloom.formats import fileio
from quantloom.formats.errors import CheckpointError, PlanError, SinkError

STOPPED = 3
"""Receipts after which runs are stopped where a test does not say."""
JOURNAL = ".journal.jsonl"


class Stop(Exception):
    """What stops a run in these tests."""


@pytest.fixture(autouse=True)
def every_layer_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run can be stopped between any two layers."""
    monkeypatch.setattr(graph, "BATCH_BYTES", 1)


def small_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"blocks.0.up.weight": (48, 32), "blocks.0.down.weight": (32, 48), "odd.weight": (40, 24)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return tensors | {"blocks.0.norm.weight": torch.ones(32)}


def stopping(after: int) -> Any:
    """``Session.add`` that stops the run once so many receipts have been counted."""
    real = session.Session.add

    def add(self: session.Session, receipts: Any) -> Any:
        new = real(self, receipts)
        if len(self.receipts) - len(self.resumed) >= after:
            raise Stop
        return new

    return add


def stop(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch, after: int = STOPPED) -> Stop:
    """Runs until so many receipts are there."""
    with monkeypatch.context() as patched:
        patched.setattr(session.Session, "add", stopping(after))
        with pytest.raises(Stop) as caught:
            run()
    return caught.value


def convert(source: Path, output: Path, name: str = "mxfp8", **how: Any) -> Any:
    options = {key: how.pop(key) for key in ("resume", "verify", "on_error") if key in how}
    return Pipeline(scheduler="sync", **options).read(source).stage("quantize", **FORMATS[name]).write(output, **how)


def journal_of(folder: Path) -> Path:
    (found,) = folder.rglob(f"*{JOURNAL}")
    return found


# -- the same bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("split", [None, 60_000])
def test_a_stopped_run_goes_on(name: str, split: int | None, sharded: Path, tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    convert(sharded, tmp_path / "wanted", name, shard_size=split)
    for after in (1, 4, 9):
        out = tmp_path / f"out{after}"
        stop(lambda out=out: convert(sharded, out, name, shard_size=split), monkeypatch, after)
        report = convert(sharded, out, name, shard_size=split, resume="require")
        assert 0 < report.nbytes_resumed < report.nbytes_in
        assert len(report.layers) >= LINEAR - 1
        assert listing(out) == listing(tmp_path / "wanted")


def test_it_may_be_stopped_again_and_again(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(checkpoint, tmp_path / "wanted.safetensors")
    out = tmp_path / "out" / "wanted.safetensors"
    for number in range(TENSORS - 1):
        stop(lambda: convert(checkpoint, out), monkeypatch, 1)
        assert len(read_record(FileLog(journal_of(out.parent))).receipts) == number + 1  # type: ignore[union-attr]
    report = convert(checkpoint, out)
    assert listing(out.parent) == {"wanted.safetensors": listing(tmp_path)["wanted.safetensors"]}
    assert report.nbytes_resumed < report.nbytes_in


def test_row_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 20_000)
    source = write_file(tmp_path / "in" / "in.safetensors")
    for name in ("fp8", "nvfp4", "int8"):
        convert(source, tmp_path / "wanted" / f"{name}.safetensors", name)
        for after in (2, 5, 12):
            out = tmp_path / f"out{after}" / f"{name}.safetensors"
            stop(lambda out=out, name=name: convert(source, out, name), monkeypatch, after)
            convert(source, out, name)
            assert out.read_bytes() == (tmp_path / "wanted" / out.name).read_bytes()


def lora(source: Path, out: Path) -> Any:
    return Pipeline(scheduler="sync").read(source).quantize("fp8").lora(rank=8).write(out / "x.safetensors")


def extract_lora(source: Path, out: Path) -> Any:
    flow = Pipeline(scheduler="sync").read(source).quantized_as(str(source.with_name("fp8.safetensors")))
    return flow.lora(rank=8).write(out / "a.safetensors")


def dequantize(source: Path, out: Path) -> Any:
    flow = Pipeline(scheduler="sync").read(source.with_name("fp8.safetensors"))
    return flow.dequantize().write(out / "x.safetensors")


def migrate(source: Path, out: Path) -> Any:
    flow = Pipeline(scheduler="sync").read(source.with_name("fp8.safetensors"))
    return flow.migrate("legacy").write(out / "x.safetensors")


def hybrid(source: Path, out: Path) -> Any:
    return Pipeline(scheduler="sync").read(source.with_name("mxfp8.safetensors")).hybrid().write(out / "x.safetensors")


def edit(source: Path, out: Path) -> Any:
    flow = Pipeline(scheduler="sync").read(source.with_name("fp8.safetensors"))
    return flow.edit(add={"full_precision_matrix_mult": True}).write(out / "x.safetensors")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A source, with quantized models of it beside it."""
    source = write_file(tmp_path / "in" / "in.safetensors")
    for name in ("fp8", "mxfp8"):
        convert(source, tmp_path / "in" / f"{name}.safetensors", name)
    return source


@pytest.mark.parametrize("run", [lora, extract_lora, dequantize, migrate, hybrid, edit])
def test_every_kind_of_recipe(run: Callable[[Path, Path], Any], made: Path, tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    run(made, tmp_path / "wanted")
    for after in (1, 2):
        stop(lambda after=after: run(made, tmp_path / f"out{after}"), monkeypatch, after)
        report = run(made, tmp_path / f"out{after}")
        assert report.nbytes_resumed
        found = listing(tmp_path / f"out{after}")
        assert found.keys() == listing(tmp_path / "wanted").keys()
        for name, digest in listing(tmp_path / "wanted").items():
            assert found[name] == digest, name


def unwritten(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Breaks the commit."""
    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr(sink, "exchange", broken)


def test_an_adapter_whose_commit_failed_is_not_made_again(made: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Its header has errors then that the plan does not know."""
    lora(made, tmp_path / "wanted")
    with monkeypatch.context() as patched:
        unwritten(patched, SinkError("no"))
        with pytest.raises(SinkError, match="no"):
            lora(made, tmp_path / "out")
    report = lora(made, tmp_path / "out")
    assert report.nbytes_resumed == report.nbytes_in
    assert listing(tmp_path / "out") == listing(tmp_path / "wanted")


# -- the journal, cut or damaged anywhere ------------------------------------------------------------------------------


class Stopped:
    """A run that was stopped, to be continued from many states of its folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.source = write_file(folder / "in" / "in.safetensors", small_tensors())
        self.folder, self.out = folder, folder / "out" / "x.safetensors"
        convert(self.source, folder / "wanted.safetensors")
        self.wanted = (folder / "wanted.safetensors").read_bytes()
        stop(self.run, monkeypatch)
        shutil.copytree(self.out.parent, folder / "saved")
        self.journal, self.part = journal_of(self.out.parent), Path(f"{self.out}.part")
        self.lines = self.journal.read_bytes()

    def run(self, **how: Any) -> Any:
        return convert(self.source, self.out, **how)

    def back(self) -> None:
        shutil.rmtree(self.out.parent)
        shutil.copytree(self.folder / "saved", self.out.parent)

    def finishes(self, **how: Any) -> Any:
        report = self.run(**how)
        assert listing(self.out.parent) == {"x.safetensors": listing(self.folder)["wanted.safetensors"]}
        return report

    def refuses(self, words: str, **how: Any) -> None:
        """In every mode, without changing anything."""
        before = listing(self.out.parent)
        for mode in ("auto", "never", "require"):
            with pytest.raises((PlanError, CheckpointError), match=words):
                self.run(**how, resume=mode)
            assert listing(self.out.parent) == before


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stopped:
    return Stopped(tmp_path, monkeypatch)


def test_a_journal_cut_at_every_byte(stopped: Stopped, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_journal.os, "fsync", lambda _: None)
    ends = [place for place, byte in enumerate(stopped.lines) if byte == ord("\n")]
    for length in range(len(stopped.lines)):
        stopped.journal.write_bytes(stopped.lines[:length])
        record = read_record(FileLog(stopped.journal))
        assert (0 if record is None else len(record.receipts) + 1) == sum(end <= length for end in ends), length
    near = {end + step for end in ends for step in (-1, 0, 1)} - {len(stopped.lines)}
    for length in sorted({*range(0, len(stopped.lines), 29), *near}):
        stopped.back()
        stopped.journal.write_bytes(stopped.lines[:length])
        report = stopped.finishes()
        whole = sum(end <= length for end in ends) - 1
        assert bool(report.nbytes_resumed) == (whole > 0)


def test_a_journal_with_any_byte_changed(stopped: Stopped) -> None:
    """Either the run ends as it should, or it is refused with everything left as it was."""
    first = stopped.lines.index(b"\n")
    places = [*range(0, first, 97), *range(first, len(stopped.lines), 13)]
    for place in places:
        stopped.back()
        raw = bytearray(stopped.lines)
        raw[place] ^= 0x55
        stopped.journal.write_bytes(raw)
        if place < first:
            stopped.refuses("first line is damaged")
        elif place > first:
            assert stopped.finishes().notes


def test_lines_of_other_things_and_blank_lines(stopped: Stopped) -> None:
    odd: list[Any] = [{}, {"done": 5}, {"done": {"name": [1], "rows": [0, 1], "pieces": []}}, {"commit": 7}]
    odd += [{"again": 7}, {"done": {"name": "x", "rows": ["a", 1], "pieces": [], "nbytes_in": float("inf")}}]
    odd += [{"again": [{}]}]
    stopped.journal.write_bytes(stopped.lines + b"\n\n" + lines_of(odd) + b"[1]\n\0\0\0\0")
    report = stopped.finishes()
    assert any("8 lines cut short or damaged" in note or "9 lines cut short" in note for note in report.notes)
    stopped.back()
    stopped.journal.write_bytes(b"\n\n\n")
    assert stopped.finishes().nbytes_resumed == 0


def test_other_journals_are_refused(stopped: Stopped, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped.journal.write_bytes(lines_of([{"journal": 99}]) + stopped.lines)
    stopped.refuses("a journal of version 99")
    stopped.journal.write_bytes(b"someone's notes\nof two lines\n")
    stopped.refuses("first line is damaged")
    monkeypatch.setattr(run_journal, "_MOST_BYTES", 1000)
    stopped.journal.write_bytes(bytes(1001))
    stopped.refuses("is none: move it away")
    stopped.journal.unlink()
    link = lambda: stopped.journal.symlink_to(stopped.source)  # noqa: E731
    for make in (stopped.journal.mkdir, link, lambda: os.mkfifo(stopped.journal)):
        make()
        stopped.refuses("is none: move it away")
        (stopped.journal.rmdir if stopped.journal.is_dir() else stopped.journal.unlink)()


def test_there_is_nothing_to_continue(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="there is nothing to continue"):
        convert(checkpoint, tmp_path / "out.safetensors", resume="require")
    assert not list(tmp_path.glob("out*"))


# -- parts that are not what they were ---------------------------------------------------------------------------------


def spoil(path: Path, how: str) -> None:
    size = path.stat().st_size
    if how == "missing":
        path.unlink()
    elif how == "longer":
        os.truncate(path, size + 1)
    elif how == "shorter":
        os.truncate(path, size - 1)
    else:  # as after a power cut, or left by another run: of the right size, and not what was written
        path.write_bytes(bytes(size))


@pytest.mark.parametrize("how", ["missing", "longer", "shorter", "zeros"])
def test_a_part_that_is_lost(how: str, stopped: Stopped, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers are done again, even when the run that found out is stopped before it comes to them."""
    spoil(stopped.part, how)
    with monkeypatch.context() as patched:
        patched.setattr(execute, "left_over", lambda *_: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            stopped.run()
    report = stopped.finishes()
    assert report.nbytes_resumed == 0


def test_a_lost_part_by_a_path_with_dots(stopped: Stopped) -> None:
    spoil(stopped.part, "missing")
    stopped.out = stopped.out.parent / ".." / stopped.out.parent.name / stopped.out.name
    assert any("x.safetensors.part is missing: its layers are done again" in note for note in stopped.finishes().notes)


def test_one_of_several_parts_is_lost(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(sharded, tmp_path / "wanted", shard_size=60_000)
    stop(lambda: convert(sharded, tmp_path / "out", shard_size=60_000), monkeypatch, 10)
    lost = sorted((tmp_path / "out").glob("*.safetensors.part"))
    for path, how in zip(lost, ("missing", "zeros", "longer"), strict=False):
        spoil(path, how)
    report = convert(sharded, tmp_path / "out", shard_size=60_000)
    assert listing(tmp_path / "out") == listing(tmp_path / "wanted")
    assert 0 < report.nbytes_resumed < report.nbytes_in
    assert sum("its layers are done again" in note for note in report.notes) == 3


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_a_part_that_is_no_file(kind: str, stopped: Stopped) -> None:
    precious = stopped.folder / "precious"
    precious.write_bytes(stopped.part.read_bytes())
    stopped.part.unlink()
    {"link": lambda: stopped.part.symlink_to(precious), "folder": stopped.part.mkdir,
     "pipe": lambda: os.mkfifo(stopped.part)}[kind]()  # fmt: skip
    before = precious.read_bytes()
    with pytest.raises(SinkError, match="is not a regular file: remove it"):
        stopped.run()
    assert precious.read_bytes() == before
    (stopped.part.rmdir if kind == "folder" else stopped.part.unlink)()
    assert stopped.finishes().nbytes_resumed == 0


def test_verify_finds_a_flipped_byte(stopped: Stopped) -> None:
    record = read_record(FileLog(stopped.journal))
    assert record is not None
    weight = next(piece for receipt in record.receipts for piece in receipt.pieces if piece.nbytes > 1000)
    raw = bytearray(stopped.part.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    begin = json.loads(raw[8 : 8 + length])[weight.name]["data_offsets"][0] + 8 + length
    raw[begin + 500] ^= 1
    stopped.part.write_bytes(raw)
    shutil.copy(stopped.part, stopped.folder / "saved" / stopped.part.name)
    stopped.run()  # without it the byte is not looked at
    assert stopped.out.read_bytes() != stopped.wanted
    stopped.back()
    notes = stopped.finishes(verify=True).notes
    assert any(note.startswith(f"{weight.name}: bytes {begin} to {begin + weight.nbytes} of ") for note in notes)


def test_what_verify_found_is_not_forgotten(stopped: Stopped, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = bytearray(stopped.part.read_bytes())
    length = 8 + int.from_bytes(raw[:8], "little")
    raw[length:] = bytes(len(raw) - length)
    stopped.part.write_bytes(raw)
    with monkeypatch.context() as patched:
        patched.setattr(execute, "left_over", lambda *_: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            stopped.run(verify=True)
    stopped.finishes()


def test_parts_that_wait_from_another_run_are_never_taken(stopped: Stopped, monkeypatch: pytest.MonkeyPatch) -> None:
    """``.part.before`` of a run that was killed while it laid its output out again; its journal was deleted."""
    stopped.journal.unlink()
    before = Path(f"{stopped.part}.before")
    stopped.part.rename(before)
    before.write_bytes(bytes(before.stat().st_size))
    stop(stopped.run, monkeypatch)
    stopped.finishes()


# -- another conversion ------------------------------------------------------------------------------------------------


def changed_source(stopped: Stopped, what: str) -> str:
    if what == "size":
        write_file(stopped.source, {**small_tensors(), "more.weight": torch.ones(8, 8)})
        return "in.safetensors has .* bytes, had"
    status = stopped.source.stat()
    if what == "header":
        raw = stopped.source.read_bytes().replace(b"someone", b"anybody")
        stopped.source.write_bytes(raw)
        os.utime(stopped.source, ns=(status.st_atime_ns, status.st_mtime_ns))
        return "headers of the source changed"
    os.utime(stopped.source, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    return "was written meanwhile"


@pytest.mark.parametrize("what", ["size", "mtime", "header"])
def test_a_changed_source(what: str, stopped: Stopped) -> None:
    stopped.refuses(changed_source(stopped, what))


def test_another_conversion(stopped: Stopped, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped.refuses("quantize format 'mxfp8' -> 'fp8'", name="fp8")
    stopped.refuses("shard size None -> 1000000", shard_size=1_000_000)
    with monkeypatch.context() as patched:
        patched.setattr(run_journal, "__version__", "99.0")
        stopped.refuses("quantloom '.*' -> 99.0")
    stopped.finishes()


def test_never_starts_over(stopped: Stopped) -> None:
    assert stopped.finishes(resume="never").nbytes_resumed == 0


# -- who is told -------------------------------------------------------------------------------------------------------


def test_people_and_programs_are_told(stopped: Stopped, cli: Callable[..., Ran],
                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    arguments = "convert", stopped.source, stopped.out, "--format", "mxfp8"
    shutil.rmtree(stopped.out.parent)
    stop(lambda: main([str(word) for word in arguments]), monkeypatch)
    shutil.rmtree(stopped.folder / "saved")
    shutil.copytree(stopped.out.parent, stopped.folder / "saved")
    plan = cli("plan", *arguments[1:])
    assert "an earlier run would be continued: 3 of 4 tensors are finished" in plan.out
    assert cli(*arguments[:2], stopped.folder / "other.safetensors", *arguments[3:]).status == 0
    ran = cli(*arguments, "--json", "--resume", "require")
    assert ran.status == 0, ran.err
    said = json.loads(ran.out)
    assert said["resumed_bytes"] > 0
    assert said["failed"] == {}
    assert stopped.out.read_bytes() == (stopped.folder / "other.safetensors").read_bytes()
    stopped.back()
    ran = cli(*arguments)
    assert "note: an earlier run is continued: 3 of 4 tensors are finished" in ran.err
    assert "continued an earlier run, which had converted" in ran.out
    stopped.back()
    assert "the run would be refused" in cli("plan", *arguments[1:-1], "fp8").out
    refused = cli(*arguments[:-1], "fp8")
    assert refused.status == 1
    assert "a run that was stopped left 3 finished layers here, but of another conversion" in refused.err
    assert cli(*arguments, "--resume", "perhaps").status == 2


# -- killed between the steps of a commit ------------------------------------------------------------------------------

def dies(after: int, run: Callable[[], object]) -> bool:
    """Runs in a process of its own that is gone before the n-th step of those that change names or the journal; False
    where it came to its end."""
    if (child := os.fork()) == 0:
        left = [after]

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return real(*arguments, **options)

            return call

        try:
            commit.replace = fileio.replace = dying(fileio.replace)  # type: ignore[assignment]
            FileLog.append, FileLog.remove = dying(FileLog.append), dying(FileLog.remove)  # type: ignore[method-assign]
            Path.unlink = dying(Path.unlink)  # type: ignore[method-assign]
            run()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


SHAPES = {
    "file": ("x.safetensors", 0, False), "folder": ("", 4_000, False), "over a file": ("x.safetensors", 0, True),
    "over shards": ("", 4_000, True), "shards over shards beside each other": ("x.safetensors", 4_000, True),
}  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("shape", SHAPES)
def test_killed_at_any_step_of_a_commit(shape: str, tmp_path: Path) -> None:
    """The next run makes the output whole, with nothing beside it; nobody who looks in between sees a mixture."""
    name, split, overwrite = SHAPES[shape]
    source = write_folder(tmp_path / "in", small_tensors(), shards=1)
    (tmp_path / "old").mkdir()
    if overwrite:
        convert(source, tmp_path / "old" / name, "fp8", shard_size=2_000 if split else None)
    convert(source, tmp_path / "wanted" / name, "nvfp4", shard_size=split or None)
    wanted, old = listing(tmp_path / "wanted"), listing(tmp_path / "old")
    index = "x.safetensors.index.json" if name else "model.safetensors.index.json"
    out, steps = tmp_path / "out", 0
    while True:
        shutil.copytree(tmp_path / "old", out)
        if not dies(steps, lambda: convert(source, out / name, "nvfp4", shard_size=split or None, overwrite=overwrite)):
            break
        left = listing(out)
        if split and left.get(index) == wanted[index]:
            assert wanted.items() <= left.items(), steps
        elif not split:
            assert old.items() <= left.items() or wanted.items() <= left.items(), steps
        if {path: digest for path, digest in left.items() if not path.endswith(".lock")} != wanted:
            convert(source, out / name, "nvfp4", shard_size=split or None, overwrite=overwrite)
            assert listing(out) == wanted, steps
        shutil.rmtree(out)
        steps += 1
    assert listing(out) == wanted
    assert steps >= 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("what", ["cut", "gone", "source"])
def test_what_changed_since_a_kill_in_the_commit(what: str, tmp_path: Path) -> None:
    """Is said, and nothing gets a name that was not written for it."""
    source = write_folder(tmp_path / "in", small_tensors(), shards=1)
    out = tmp_path / "out"
    run = lambda: convert(source, out, shard_size=4_000)  # noqa: E731
    assert dies(5, run)  # two lines of the journal and all receipts before, then two of the renames
    (waiting, *_) = sorted(out.glob("*.safetensors.part"))
    if what == "source":
        (file,) = source.glob("*.safetensors")
        os.utime(file, ns=(1, 1))
        words = "stopped while its files got their names is of another conversion.*rename its"
    elif what == "gone":
        waiting.unlink()
        words = "is gone, and .* too: .* delete its journal"
    else:
        os.truncate(waiting, 100)
        words = "has 100 bytes instead of .* not whole"
    before = listing(out)
    with pytest.raises((SinkError, PlanError), match=words):
        run()
    assert listing(out).keys() <= before.keys() | {path.removesuffix(".part") for path in before}
    assert journal_of(out)


@pytest.mark.parametrize("name", ["mxfp8", "lora"])
def test_finished_heads_are_no_reason_to_begin_again(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped before its journal speaks of a commit may have written the heads with checksums."""
    flow = Pipeline().read(checkpoint).quantize("mxfp8")
    flow = flow.lora(rank=4) if name == "lora" else flow
    flow.write(tmp_path / "wanted" / "out.safetensors")
    out = tmp_path / "out" / "out.safetensors"

    def stops(path: Path) -> None:
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(sink, "_check_sources", stops)
        with pytest.raises(Stop):
            flow.write(out)
    report = flow.write(out)
    assert not [note for note in report.notes if "done again" in note]
    assert report.nbytes_resumed == sum(layer.layer.nbytes for layer in flow.write(out, compute=False).plan.layers)
    assert listing(out.parent) == listing(tmp_path / "wanted")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_killed_while_failed_layers_are_kept(tmp_path: Path) -> None:
    tensors = small_tensors()
    tensors["blocks.0.up.weight"][3, 4] = float("nan")
    source = write_file(tmp_path / "in.safetensors", tensors)
    wanted = convert(source, tmp_path / "wanted" / "x.safetensors", "fp8", on_error="keep")
    out, steps = tmp_path / "out" / "x.safetensors", 0
    while dies(steps, lambda: convert(source, out, "fp8", on_error="keep")):
        if any(path.endswith(JOURNAL) for path in listing(out.parent)) or not out.exists():
            report = convert(source, out, "fp8", on_error="keep")
            assert listing(out.parent) == listing(tmp_path / "wanted"), steps
            assert report.failed.keys() == wanted.failed.keys(), steps
        shutil.rmtree(out.parent)
        steps += 1
    assert listing(out.parent) == listing(tmp_path / "wanted")
    assert steps >= 7


# -- rounding with statistics ------------------------------------------------------------------------------------------


class Two(torch.nn.Module):
    """Layers that share an input, whose rounding is solved in one, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.q, self.k, self.v = (torch.nn.Linear(64, 64, bias=False) for _ in range(3))
        self.o = torch.nn.Linear(64, 32, bias=False)  # smaller: it comes after them

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.q(x) + self.k(x) + self.v(x))  # type: ignore[no-any-return]


def test_layers_that_are_solved_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are finished, or none; and statistics that changed meanwhile are another conversion."""
    model, store = Two(), tmp_path / "stats.zarr"
    inputs = torch.randn(4, 128, 64, generator=torch.Generator().manual_seed(5))
    quantloom.calibrate(model, list(inputs), store)
    source = write_file(tmp_path / "in" / "in.safetensors", dict(model.state_dict()))

    def run(output: Path, **how: Any) -> Any:
        flow = Pipeline(scheduler="sync", **how).read(source)
        options = {"rounding": "calibrated", "statistics": str(store)}
        return flow.quantize("fp8", scaling="row", **options).write(output)

    run(tmp_path / "wanted.safetensors")
    out = tmp_path / "out" / "wanted.safetensors"
    stop(lambda: run(out), monkeypatch, 1)
    journal = journal_of(out.parent)
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    saved = out.parent.rename(tmp_path / "saved")
    for lost in range(1, 4):
        shutil.copytree(saved, out.parent)
        journal.write_bytes(b"".join(line for number, line in enumerate(lines) if number != lost))
        report = run(out)
        assert report.nbytes_resumed == 0
        assert listing(out.parent) == {"wanted.safetensors": listing(tmp_path)["wanted.safetensors"]}
        shutil.rmtree(out.parent)
    shutil.copytree(saved, out.parent)
    shutil.rmtree(store)
    quantloom.calibrate(model, list(inputs + 0.5), store)
    with pytest.raises(PlanError, match=r"quantize statistics '.*' -> "):
        run(out)
    assert listing(out.parent) == listing(saved)
