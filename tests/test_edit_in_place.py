"""Edits of a file where it lies: the bytes that change, all of them or none, whatever stops the program."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Ran, listing, write_file, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_cases import CASES, nvfp4
from safetensors.torch import load_file, save_file
from test_edit import FPMM, edit, header, markers, raw, without_markers

from quantloom import Pipeline
from quantloom.flow.in_place import EditReport, edit_in_place
from quantloom.formats import journal as journals
from quantloom.formats.errors import CheckpointError, PlanError, QuantloomError, SinkError
from quantloom.formats.fileio import Writer
from quantloom.formats.journal import Change, Patch, UnfinishedEdit, read_journal
from quantloom.formats.refit import patches
from quantloom.formats.safetensors import read_header
from quantloom.formats.source import open_source
from quantloom.stages.edit import Edit


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as this package writes it: header entry, markers between codes."""
    folder = tmp_path_factory.mktemp("fp8")
    plain = write_file(folder / "plain.safetensors")
    Pipeline(scheduler="sync").read(plain).quantize("fp8").write(folder / "own.safetensors")
    return folder / "own.safetensors"


@pytest.fixture
def own(fp8: Path, tmp_path: Path) -> Path:
    path = tmp_path / "own.safetensors"
    path.write_bytes(fp8.read_bytes())
    return path


@pytest.fixture
def ending(fp8: Path, tmp_path: Path) -> Path:
    """The same layers as the safetensors library writes them: no header entry, markers at the end."""
    path = tmp_path / "ending.safetensors"
    save_file(load_file(fp8), path, metadata={"format": "pt"})
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    source = write_folder(tmp_path / "plain")
    Pipeline(scheduler="sync").read(source).quantize("fp8").write(folder, shard_size=100_000)
    return folder


def in_place(path: Path, **options: Any) -> EditReport:
    return edit_in_place(str(path), Edit(**options))


def differing(one: bytes, other: bytes) -> int:
    """Bytes that differ, and those that only one has."""
    return sum(a != b for a, b in zip(one, other, strict=False)) + abs(len(one) - len(other))


# What is written.


def test_markers_at_the_end_of_a_file_grow_there(ending: Path) -> None:
    before, tensors = ending.read_bytes(), raw(ending)
    report = in_place(ending, add={FPMM: True})
    (file,) = report.files
    assert not file.anew
    assert file.nbytes < 1200, "seven markers and their places in the header"
    first = min(ref.start for ref in read_header(ending).refs if ref.name.endswith(".comfy_quant"))
    head = min(ref.start for ref in read_header(ending).refs)
    assert ending.read_bytes()[head:first] == before[head:first]
    assert all(entry == {"format": "float8_e4m3fn", FPMM: True} for entry in markers(ending).values())
    assert without_markers(ending) == {name: value for name, value in tensors.items() if "comfy_quant" not in name}
    assert load_file(ending).keys() == tensors.keys(), "the safetensors library reads it"


def test_a_shorter_marker_keeps_its_place(own: Path, tmp_path: Path) -> None:
    edit(own, tmp_path / "more.safetensors", add={FPMM: True, "note": "long enough to leave some room"})
    path = tmp_path / "more.safetensors"
    before = path.read_bytes()
    report = in_place(path, remove=["note"])
    assert not report.files[0].anew
    after = path.read_bytes()
    assert len(after) == len(before)
    assert report.files[0].nbytes >= differing(before, after)
    assert without_markers(path) == without_markers(own)
    assert markers(path) == header(path) == {
        layer: {"format": "float8_e4m3fn", FPMM: True} for layer in markers(own)
    }
    again = in_place(path, add={"note": "there is room now"})
    assert not again.files[0].anew
    assert markers(path) == header(path)


def test_true_becomes_false_without_a_new_file(own: Path, tmp_path: Path) -> None:
    """One letter more: the blanks between tokens make room for it."""
    edit(own, tmp_path / "true.safetensors", add={FPMM: True})
    assert not in_place(tmp_path / "true.safetensors", add={FPMM: False}).files[0].anew
    assert markers(tmp_path / "true.safetensors") == header(tmp_path / "true.safetensors")
    assert all(entry[FPMM] is False for entry in markers(tmp_path / "true.safetensors").values())


def test_what_has_no_room_is_written_anew_and_takes_the_place(own: Path, fp8: Path) -> None:
    own.chmod(0o640)
    mode = own.stat().st_mode  # Windows has fewer bits
    report = in_place(own, add={FPMM: True})
    assert report.files[0].anew
    assert "written anew" in str(report)
    assert without_markers(own) == without_markers(fp8)
    assert markers(own) == header(own)
    assert all(entry[FPMM] for entry in markers(own).values())
    assert own.stat().st_mode == mode
    assert [path.name for path in own.parent.iterdir()] == [own.name]


def test_all_shards_are_edited(shards: Path) -> None:
    before, others = raw(shards), [path for path in shards.iterdir() if path.suffix != ".safetensors"]
    kept = {path: path.read_bytes() for path in others}
    report = in_place(shards, add={FPMM: True})
    assert len(report.files) == len(list(shards.glob("*.safetensors"))) > 1
    assert {name: value for name, value in before.items() if "comfy_quant" not in name} == without_markers(shards)
    entries = markers(shards)
    assert all(entry[FPMM] for entry in entries.values())
    assert all(header(file) == entries for file in shards.glob("*.safetensors"))
    index = shards / "model.safetensors.index.json"
    told = json.loads(index.read_bytes())
    total = sum(tensor.nbytes for file in shards.glob("*.safetensors") for tensor in load_file(file).values())
    assert told == {**json.loads(kept.pop(index)), "metadata": {"total_size": total}}
    assert {path: path.read_bytes() for path in kept} == kept
    assert open_source(shards).refs.keys() == before.keys()


def test_a_shard_that_no_layer_changes_stays_untouched(shards: Path) -> None:
    for file in shards.glob("*.safetensors"):
        save_file(load_file(file), file)
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    report = in_place(shards, add={FPMM: True}, filter="^odd$")
    assert len(report.files) == 1
    changed = [str(path) for path, then in before.items() if path.stat().st_mtime_ns != then]
    assert changed == [report.files[0].path, str(shards / "model.safetensors.index.json")]


def test_markers_from_a_header_alone_come_into_the_file_of_their_weight(tmp_path: Path) -> None:
    case = nvfp4((130, 70))
    entry, case.marker = case.marker, None
    path = tmp_path / "model.safetensors"
    text = json.dumps({"layers": {"blocks.0.lin": entry}})
    save_file(case.stored(), path, metadata={"_quantization_metadata": text})
    before = raw(path)
    assert in_place(path, rebuild_header=True).files[0].anew
    assert without_markers(path) == before
    assert markers(path) == header(path) == {"blocks.0.lin": entry}


def test_nothing_to_change_writes_nothing(own: Path) -> None:
    before = own.stat().st_mtime_ns
    report = in_place(own, add={"format": "float8_e4m3fn"})
    assert report.files == ()
    assert own.stat().st_mtime_ns == before


def test_a_dry_run_says_how(own: Path, ending: Path, cli: Callable[..., Ran]) -> None:
    before = listing(own.parent)
    assert "would be written anew" in cli("edit", own, "--in-place", "--add", f"{FPMM}=true", "--dry-run").out
    assert "would be edited in place" in cli("edit", ending, "--in-place", "--add", f"{FPMM}=true", "--dry-run").out
    assert listing(own.parent) == before


def test_the_command_reports_json(ending: Path, cli: Callable[..., Ran]) -> None:
    ran = cli("edit", ending, "--in-place", "--add", f"{FPMM}=true", "--json")
    assert ran.status == 0, ran.err
    report = json.loads(ran.out)
    assert report["files"][0]["anew"] is False
    assert report["changed"] == {f"marker edited: {FPMM}": 7}


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    edits=st.lists(st.integers(0, 60) | st.none(), min_size=4, max_size=4),
    after=st.sampled_from(["none", "bytes", "floats"]),
)
def test_patches_give_a_file_that_readers_take(
    lengths: list[int], edits: list[int | None], after: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Markers of any length, some of them edited to any other, with and without tensors behind them."""
    path = tmp_path_factory.mktemp("patches") / "m.safetensors"
    tensors = {"a.weight": torch.arange(7.0)}
    entries = [{"format": "x" * length} for length in lengths]
    for number, entry in enumerate(entries):
        tensors[f"l{number}.comfy_quant"] = torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)
    tensors |= {"z": torch.ones(9, dtype=torch.bool)} if after == "bytes" else {}
    save_file(tensors, path)
    if after == "floats":  # a layout that only others write: a wide dtype behind markers
        _put_behind(path, "a.weight")
    made = {f"l{number}": {"format": "y" * new} for number, new in enumerate(edits[: len(lengths)]) if new is not None}
    before, found = raw(path), patches(read_header(path), made, {})
    if found is None:
        return
    content = bytearray(path.read_bytes())
    for patch in found:
        assert content[patch.start : patch.start + len(patch.new)][: len(patch.old)] == patch.old
        content[patch.start : patch.start + len(patch.new)] = patch.new
    path.write_bytes(content)
    expected = {f"l{number}": made.get(f"l{number}", entry) for number, entry in enumerate(entries)}
    assert markers(path) == expected
    assert without_markers(path) == {name: value for name, value in before.items() if "comfy_quant" not in name}
    assert load_file(path).keys() == tensors.keys()


def _put_behind(path: Path, name: str) -> None:
    """Moves a tensor to the end of a file."""
    found = read_header(path)
    refs = [ref for ref in found.refs if ref.name != name] + [ref for ref in found.refs if ref.name == name]
    content, table, position, data = path.read_bytes(), {}, 0, b""
    for ref in refs:
        table[ref.name] = {"dtype": ref.dtype, "shape": ref.shape, "data_offsets": [position, position + ref.nbytes]}
        data += content[ref.start : ref.start + ref.nbytes]
        position += ref.nbytes
    head = json.dumps(table).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)


# All or nothing.

CALLS = ("pwrite", "fsync", "replace", "rename", "unlink", "truncate", "ftruncate")


def killed_at(number: int, action: Callable[[], object], half: bool) -> bool:
    """Runs ``action`` in a child that dies at its n-th call that changes a disk; whether it died.

    With ``half``, a write stops in the middle.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) in (0, 9)
        return os.waitstatus_to_exitcode(status) == 9
    try:
        left = [number]

        def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def count(*args: Any, **options: Any) -> Any:
                if left[0] == 0:
                    if half and name == "pwrite":
                        call(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
                    os._exit(9)
                left[0] -= 1
                return call(*args, **options)

            return count

        for name in CALLS:
            setattr(os, name, wrapped(name, getattr(os, name)))
        action()
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("which", "half"), [("ending", False), ("ending", True), ("own", True), ("shards", True)])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_model(
    which: str, half: bool, request: pytest.FixtureRequest
) -> None:
    """In place, by a new file, and over several files: once for every call that changes the disk."""
    path: Path = request.getfixturevalue(which)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    old = [file.read_bytes() for file in files]
    in_place(path, add={FPMM: True})
    new = [file.read_bytes() for file in files]
    seen = set()
    for number in range(1000):
        for file, content in zip(files, old, strict=True):
            file.write_bytes(content)
        died = killed_at(number, lambda: in_place(path, add={FPMM: True}), half)
        if not died:
            break
        try:
            open_source(path)
        except UnfinishedEdit:
            report = edit_in_place(str(path), None)
            assert report.finished
            seen.add("finished")
            assert [file.read_bytes() for file in files] == new
        content = [file.read_bytes() for file in files]
        assert content in (old, new), number
        seen.add("old" if content == old else "new")
    assert [file.read_bytes() for file in files] == new
    assert seen == {"old", "new", "finished"}
    assert not [file.name for file in files[0].parent.iterdir() if "quantloom" in file.name]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_while_an_edit_is_finished_is_no_harm(ending: Path) -> None:
    old = ending.read_bytes()
    in_place(ending, add={FPMM: True})
    new = ending.read_bytes()
    ending.write_bytes(old)
    killed = (killed_at(number, lambda: in_place(ending, add={FPMM: True}), half=False) for number in range(1000))
    assert any(died and list(ending.parent.glob("*.quantloom-edit")) for died in killed)
    for number in range(1000):
        if not killed_at(number, lambda: edit_in_place(str(ending), None), half=True):
            break
    assert number > 3
    assert ending.read_bytes() == new
    assert open_source(ending)


@pytest.mark.parametrize("which", ["ending", "own", "shards"])
def test_a_failing_disk_leaves_everything_as_it_was(
    which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write fails once, as on a full disk."""
    path: Path = request.getfixturevalue(which)
    folder = path if path.is_dir() else path.parent
    before = listing(folder)
    write, left = Writer.write, [0]

    def fail(self: Writer, buffer: Any, offset: int) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise SinkError("the disk filled up")
        write(self, buffer, offset)

    monkeypatch.setattr(Writer, "write", fail)
    for number in range(1000):
        left[0] = number
        try:
            in_place(path, add={FPMM: True})
            break
        except SinkError:
            assert listing(folder) == before, number
    assert number > 3


def test_a_stop_between_two_new_files_says_how_to_go_on(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old file that was replaced is gone: there is no way back, so that the edit is finished later."""
    replace, done = journals.replace, []

    def stop(source: Path, target: Path) -> None:
        if len(done) == 2:  # the journal and one file
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(journals, "replace", stop)
        with pytest.raises(SinkError, match=r"stopped half way.*quantloom edit --in-place"):
            in_place(shards, add={FPMM: True})
    with pytest.raises(UnfinishedEdit):
        open_source(shards)
    edit_in_place(str(shards), None)
    assert all(entry[FPMM] for entry in markers(shards).values())
    assert all(header(file) == markers(shards) for file in shards.glob("*.safetensors"))


# An unfinished edit.


@pytest.fixture
def unfinished(ending: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file between old and new, with its journal."""
    with monkeypatch.context() as patched:
        patched.setattr(journals, "_take_back", lambda *_: None)
        patched.setattr(journals, "replace", _then_fail(journals.replace))
        with pytest.raises(SinkError, match="power"):
            in_place(ending, add={FPMM: True})
    (change,) = read_journal(ending.with_name(ending.name + ".quantloom-edit"))
    with Writer(ending) as writer:
        writer.write(change.patches[-1].new, change.patches[-1].start)
    return ending


def _then_fail(call: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def fail(source: Path, target: Path) -> None:
        call(source, target)
        raise SinkError("the power went")

    return fail


def test_nobody_reads_a_model_between_old_and_new(unfinished: Path, cli: Callable[..., Ran]) -> None:
    for arguments in (["inspect", unfinished], ["plan", unfinished, "--format", "fp8"],
                      ["edit", unfinished, unfinished.with_name("o.safetensors"), "--add", "a=1"],
                      ["edit", unfinished, "--in-place", "--add", "a=1", "--dry-run"]):  # fmt: skip
        ran = cli(*arguments)
        assert ran.status == 1
        text = " ".join(ran.err.split())
        assert "an edit in place is not finished" in text
        assert "quantloom edit --in-place" in text
    link = unfinished.with_name("sub") / "link.safetensors"
    link.parent.mkdir()
    link.symlink_to(unfinished)
    with pytest.raises(UnfinishedEdit):
        open_source(link)


def test_other_models_of_the_folder_are_read(unfinished: Path, own: Path) -> None:
    assert open_source(own)


def test_the_command_finishes_and_goes_on(unfinished: Path, cli: Callable[..., Ran]) -> None:
    ran = cli("edit", unfinished, "--in-place", "--add", "note=1")
    assert ran.status == 0, ran.err
    assert "finished the interrupted edit of ending.safetensors" in ran.out
    assert all(entry == {"format": "float8_e4m3fn", FPMM: True, "note": 1} for entry in markers(unfinished).values())
    assert cli("inspect", unfinished).status == 0


def test_a_file_that_was_replaced_meanwhile_is_left_alone(unfinished: Path, own: Path, cli: Callable[..., Ran]) -> None:
    unfinished.write_bytes(own.read_bytes())
    ran = cli("edit", unfinished, "--in-place")
    assert ran.status == 1
    assert "was replaced since" in " ".join(ran.err.split())
    assert unfinished.read_bytes() == own.read_bytes()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"version": 2, "changes": []}', b'{"version": 1, "changes": [{}]}',
     b'{"version": 1, "changes": [{"name": "../x", "old_size": 1, "new_size": 1, "patches": []}]}',
     b'{"version": 1, "changes": [{"name": "", "old_size": 1, "new_size": 1, "patches": []}]}',
     b'{"version": 1, "changes": [{"name": "a\\u0000b", "old_size": 1, "new_size": 1, "patches": []}]}',
     b'{"version": 1, "changes": [{"name": "x", "old_size": 1e999, "new_size": 1, "patches": []}]}',
     b'{"version": 1, "changes": [{"name": "x", "old_size": 1, "new_size": 1, "patches": '
     b'[{"start": -1, "old": "AA==", "new": "AA=="}]}]}',
     b'{"version": 1, "changes": [{"name": "x", "old_size": 1, "new_size": 1000001, "patches": '
     b'[{"start": 1000000, "old": "", "new": "AA=="}]}]}'],
)  # fmt: skip
def test_a_broken_journal_is_named(content: bytes, own: Path) -> None:
    own.with_name("x.safetensors.quantloom-edit").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors\.quantloom-edit: is no journal"):
        open_source(own)


def test_journals_survive_being_written(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"0123456789")
    change = Change("m", 10, 12, (Patch(2, b"23", b"\0\xff"), Patch(9, b"9", b"abc")))
    journals.carry_out(tmp_path / "j.quantloom-edit", [change])
    assert (tmp_path / "m").read_bytes() == b"01\0\xff45678abc"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


# Places that are refused.


def test_links_are_not_edited_through(own: Path) -> None:
    link = own.with_name("link.safetensors")
    link.symlink_to(own)
    before = own.read_bytes()
    with pytest.raises(PlanError, match="is a link to"):
        in_place(link, add={FPMM: True})
    assert own.read_bytes() == before


def test_files_of_several_folders_are_refused(own: Path, tmp_path: Path) -> None:
    other = tmp_path / "sub" / "other.safetensors"
    other.parent.mkdir()
    save_file({"x": torch.ones(1)}, other)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {**dict.fromkeys(load_file(own), own.name), "x": "sub/other.safetensors"}})
    )
    with pytest.raises(PlanError, match="several folders"):
        in_place(tmp_path, add={FPMM: True})


def test_shards_that_describe_layers_apart_are_refused(tmp_path: Path) -> None:
    for number in range(2):
        case = CASES["comfy fp8"]()
        text = json.dumps({"layers": {f"b{number}": case.marker}})
        file = tmp_path / f"model-{number}.safetensors"
        save_file(case.stored(f"b{number}"), file, metadata={"_quantization_metadata": text})
    before = listing(tmp_path)
    with pytest.raises(PlanError, match="entries of its files differ"):
        in_place(tmp_path, add={FPMM: True})
    assert listing(tmp_path) == before


def test_a_second_run_is_kept_out(own: Path) -> None:
    from filelock import FileLock

    with FileLock(f"{own}.lock"), pytest.raises(SinkError, match="another run is writing"):
        in_place(own, add={FPMM: True})


def test_a_small_disk_is_said_before_anything_is_written(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantloom.flow.in_place.free_bytes", lambda _: 1000)
    before = listing(own.parent)
    with pytest.raises(PlanError, match=r"only 1\.00 kB are free"):
        in_place(own, add={FPMM: True})
    assert listing(own.parent) == before


def test_what_may_not_be_written_is_refused(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(own, own.with_name("true.safetensors"), add={FPMM: True})

    class Refused(Writer):
        def __init__(self, path: str | Path) -> None:
            raise SinkError(f"{path}: cannot open for writing: Permission denied")

    monkeypatch.setattr(journals, "Writer", Refused)
    before = listing(own.parent)
    with pytest.raises(QuantloomError, match="Permission denied"):
        in_place(own.with_name("true.safetensors"), remove=[FPMM])
    assert listing(own.parent) == before
