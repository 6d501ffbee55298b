"""The output on disk: what lies where, and that a failure at any moment leaves things as they were."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FORMATS, Ran, child, environment, listing, make_tensors, write_file, write_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import quantloom
from quantloom import Pipeline
from quantloom.flow import commit, graph, output_checks, parts, sink
from quantloom.formats import fileio
from quantloom.formats.comfy import HEADER_KEY, MARKER
from quantloom.formats.errors import CheckpointError, PlanError, QuantloomError, SinkError
from quantloom.formats.safetensors import read_header
from quantloom.formats.tensors import DTYPE_BITS
from quantloom.stages import writing

Source = Path | list[Path]


def convert(source: Any, output: Path, name: str = "mxfp8", scheduler: str = "threads", **how: Any) -> Any:
    return Pipeline(scheduler=scheduler).read(source).stage("quantize", **FORMATS[name]).write(output, **how)


def same_bytes(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def header_of(path: Path) -> dict[str, str]:
    """Without checksums, which each file has of its own tensors."""
    with safe_open(path, "pt") as file:
        return {key: value for key, value in file.metadata().items() if key != "quantloom.checksums"}


# -- what lies where ---------------------------------------------------------------------------------------------------


def test_a_file_and_a_folder(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "new" / "out.safetensors")
    convert(checkpoint, tmp_path / "folder")
    assert list(listing(tmp_path / "new")) == ["out.safetensors"]
    assert list(listing(tmp_path / "folder")) == ["tiny.safetensors"]
    assert same_bytes(tmp_path / "new" / "out.safetensors", tmp_path / "folder" / "tiny.safetensors")


@pytest.mark.parametrize("limit", [1, 60_000, 150_000])
@pytest.mark.parametrize("single", [False, True])
def test_shards_and_index(limit: int, single: bool, sharded: Path, tmp_path: Path) -> None:
    convert(sharded, tmp_path / "whole.safetensors", "nvfp4")
    output = tmp_path / "out" / "split.safetensors" if single else tmp_path / "out"
    convert(sharded, output, "nvfp4", shard_size=limit)
    stem = "split" if single else "model"
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    wanted = [f"{stem}-{number + 1:05d}-of-{len(files):05d}.safetensors" for number in range(len(files))]
    assert [path.name for path in files] == wanted
    index = json.loads((tmp_path / "out" / f"{stem}.safetensors.index.json").read_text())
    found = {path.name: load_file(path) for path in files}
    assert {name: file for file, tensors in found.items() for name in tensors} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in found.values() for t in tensors.values())
    whole = load_file(tmp_path / "whole.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    for name, tensor in whole.items():
        split = found[index["weight_map"][name]][name]
        assert tensor.shape == split.shape
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), split.reshape(-1).view(torch.uint8)), name
    for tensors in found.values():
        layers = {name.rpartition(".")[0] for name in tensors if name.endswith(MARKER)}
        assert all(f"{layer}.weight" in tensors and f"{layer}.weight_scale" in tensors for layer in layers)
        layer_count = len({name.removesuffix(".weight") for name in tensors if ".weight_" not in name} - layers)
        assert sum(t.nbytes for t in tensors.values()) <= limit or layer_count <= 2
    assert len(files) > 1
    assert header_of(files[0]) == header_of(files[-1])


@pytest.mark.parametrize("name", FORMATS)
def test_every_tensor_is_aligned_and_there_are_no_holes(name: str, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    convert(checkpoint, path, name)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    table.pop("__metadata__")
    position = 0
    for info in sorted(table.values(), key=lambda info: info["data_offsets"]):
        begin, end = info["data_offsets"]
        assert begin == position
        assert (8 + length + begin) % max(1, DTYPE_BITS[info["dtype"]] // 8) == 0
        position = end
    assert 8 + length + position == len(raw)
    assert (8 + length) % 64 == 0
    assert set(load_file(path)) == set(table)


def test_kept_tensors_keep_their_bytes(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "out.safetensors")
    before, after = load_file(checkpoint), load_file(tmp_path / "out.safetensors")
    kept = [name for name in before if f"{name.removesuffix('.weight')}{MARKER}" not in after]
    assert len(kept) == len(before) - 7
    for name in kept:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name])


def test_sidecars_come_along(sharded: Path, tmp_path: Path) -> None:
    convert(sharded, tmp_path / "out")
    assert list(listing(tmp_path / "out")) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    for name in ("README.md", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (sharded / name).read_bytes()
    convert(sharded, tmp_path / "alone" / "out.safetensors")
    assert list(listing(tmp_path / "alone")) == ["out.safetensors"]


def test_a_quantization_that_is_gone_is_not_declared(sharded: Path, tmp_path: Path) -> None:
    config = {"model_type": "tiny", "name": "Ünïcode", "quantization_config": {"quant_method": "fp8"}}
    (sharded / "config.json").write_text(json.dumps(config))
    convert(sharded, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "tiny", "name": "Ünïcode"}


def test_the_name_that_clients_look_for_is_kept(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", stem="diffusion_pytorch_model")
    convert(folder, tmp_path / "one")
    convert(folder, tmp_path / "many", shard_size=100_000)
    assert (tmp_path / "one" / "diffusion_pytorch_model.safetensors").is_file()
    names = {path.name for path in (tmp_path / "many").glob("*.safetensors*")}
    assert "diffusion_pytorch_model.safetensors.index.json" in names
    assert all(name.startswith("diffusion_pytorch_model") for name in names)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_header_and_markers_say_the_same(prefix: str, tmp_path: Path) -> None:
    source = write_file(tmp_path / "in.safetensors", make_tensors(prefix=prefix), author="someone", quantloom="old")
    plan = Pipeline().read(source).quantize("nvfp4").write(tmp_path / "out.safetensors", compute=False)
    plan.compute()
    tensors, header = load_file(tmp_path / "out.safetensors"), header_of(tmp_path / "out.safetensors")
    assert header["author"] == "someone"
    entry = json.loads(header[HEADER_KEY])
    markers = {
        name.removesuffix(MARKER): json.loads(bytes(tensor.tolist()))
        for name, tensor in tensors.items() if name.endswith(MARKER)
    }  # fmt: skip
    assert len(markers) == 7
    assert all(name.startswith(prefix) for name in markers)
    assert entry == {"format_version": "1.0",
                     "layers": {name.removeprefix(prefix): marker for name, marker in markers.items()}}  # fmt: skip
    own = json.loads(header["quantloom"])
    assert own["version"] == quantloom.__version__
    assert own["plan"] == plan.plan.digest
    assert own["recipe"]["stages"][-1]["format"] == "nvfp4"


# -- refusals before work ----------------------------------------------------------------------------------------------


def refused(tmp_path: Path, source: Source, output: Path, words: str, **how: Any) -> None:
    """The conversion is refused with these words, and nothing on disk changes."""
    before = listing(tmp_path)
    with pytest.raises(QuantloomError) as caught:
        convert(source, output, **how)
    assert words in str(caught.value)
    assert listing(tmp_path) == before


def test_an_existing_file_is_not_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out.safetensors").write_bytes(b"precious")
    refused(tmp_path, checkpoint, tmp_path / "out.safetensors", "out.safetensors: exists already; pass --overwrite")
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    refused(tmp_path, checkpoint, tmp_path / "dangling.safetensors", "exists already")


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00009.safetensors", "config.json",
                                  "model.safetensors.index.json"])  # fmt: skip
def test_an_existing_output_folder_is_not_overwritten(name: str, sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"precious")
    refused(tmp_path, sharded, tmp_path / "out", f"{name}: exists already")
    refused(tmp_path, sharded, tmp_path / "out", f"{name}: exists already", shard_size=100_000)


def test_a_folder_with_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_file(tmp_path / "out" / "vae.safetensors", {"a": torch.zeros(2)})
    for how in ({}, {"overwrite": True}):
        refused(tmp_path, checkpoint, tmp_path / "out", "holds vae.safetensors", **how)
    convert(checkpoint, tmp_path / "out" / "named.safetensors")  # a file beside it is another matter


@pytest.mark.parametrize("link", ["same", "symlink", "hardlink", "spelling"])
def test_input_and_output_may_not_be_the_same_file(link: str, checkpoint: Path, tmp_path: Path) -> None:
    output = checkpoint.parent / "other.safetensors"
    if link == "same":
        output = checkpoint
    elif link == "symlink":
        output.symlink_to(checkpoint)
    elif link == "hardlink":
        os.link(checkpoint, output)
    else:
        (checkpoint.parent / "sub").mkdir()
        output = checkpoint.parent / "sub" / ".." / checkpoint.name
    refused(tmp_path, checkpoint, output, "input and output are the same file", overwrite=True)


@pytest.mark.parametrize("link", [False, True])
def test_input_and_output_may_not_be_the_same_folder(link: bool, sharded: Path, tmp_path: Path) -> None:
    output = tmp_path / "link" if link else sharded
    if link:
        output.symlink_to(sharded)
    for source in (sharded, sharded / "model.safetensors.index.json", sorted(sharded.glob("*.safetensors"))):
        refused(tmp_path, source, output, "input and output are the same folder", overwrite=True)


def test_shards_may_not_replace_the_input_either(tmp_path: Path) -> None:
    """``x.safetensors`` in shards is ``x-00001-of-00003.safetensors``, which can be the source."""
    folder = write_folder(tmp_path / "in", stem="x", shards=3)
    files = sorted(folder.glob("*.safetensors"))
    flow = Pipeline().read(files).quantize("nvfp4")
    for limit in range(80_000, 400_000, 10_000):
        plan = flow.write(folder / "other.safetensors", shard_size=limit, compute=False).plan
        if len(plan.shards) == 3:
            break
    how = {"shard_size": limit, "overwrite": True, "name": "nvfp4"}
    refused(tmp_path, files, folder / "x.safetensors", "are the same file", **how)


def test_an_index_in_a_parent_folder_protects_it(tmp_path: Path) -> None:
    inner = write_folder(tmp_path / "in" / "weights")
    index = json.loads((inner / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: f"weights/{file}" for name, file in index["weight_map"].items()}
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, tmp_path / "in", tmp_path / "in", "are the same folder", overwrite=True)


def test_a_file_where_a_folder_should_be_and_the_reverse(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "out" / "tiny.safetensors").mkdir(parents=True)
    for how in ({}, {"overwrite": True}):
        refused(tmp_path, checkpoint, tmp_path / "file", "file: is a file", **how)
        refused(tmp_path, checkpoint, tmp_path / "folder.safetensors", "is a folder", **how)
        refused(tmp_path, checkpoint, tmp_path / "out", "is a folder where a file of the output belongs", **how)
        refused(tmp_path, checkpoint, tmp_path / "file" / "out.safetensors", str(tmp_path / "file"), **how)


def test_a_disk_that_is_too_small(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_checks, "free_bytes", lambda folder: 100_000)
    refused(tmp_path, checkpoint, tmp_path / "new" / "out.safetensors", "only 100.00 kB are free there")


def test_sidecars_count_for_the_disk(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = Pipeline().read(sharded).quantize("mxfp8").write(tmp_path / "out", compute=False)
    (sharded / "tokenizer.model").write_bytes(bytes(3_000_000))
    monkeypatch.setattr(output_checks, "free_bytes", lambda folder: flow.plan.nbytes_out + 2_500_000)
    refused(tmp_path, sharded, tmp_path / "out", "are free there")


def test_an_unwritable_folder(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path, checkpoint, Path("/proc/nowhere/out.safetensors"), "/proc/nowhere")

    def denied(path: str, mode: str = "r", **_: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    flow = Pipeline().read(checkpoint).quantize("fp8").write(tmp_path / "locked" / "out.safetensors", compute=False)
    _ = flow.plan
    monkeypatch.setattr(fileio, "FileIO", denied)
    with pytest.raises(SinkError, match=r"out.safetensors.part: cannot create: Permission denied"):
        flow.compute()
    assert not (tmp_path / "locked").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(tmp_path, checkpoint, tmp_path / "locked" / "out.safetensors", "Permission denied")
    refused(tmp_path, checkpoint, tmp_path / "locked" / "new", "Permission denied")


# -- replacing ---------------------------------------------------------------------------------------------------------


def test_overwrite_replaces_a_file(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "out.safetensors", "fp8")
    convert(checkpoint, tmp_path / "wanted.safetensors", "nvfp4")
    convert(checkpoint, tmp_path / "out.safetensors", "nvfp4", overwrite=True)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "wanted.safetensors").read_bytes()


@pytest.mark.parametrize(("first", "second"), [(60_000, None), (None, 60_000), (60_000, 150_000), (150_000, 60_000)])
def test_overwrite_leaves_no_stale_shards(first: int | None, second: int | None, sharded: Path, tmp_path: Path) -> None:
    convert(sharded, tmp_path / "out", "fp8", shard_size=first)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    convert(sharded, tmp_path / "wanted", "nvfp4", shard_size=second)
    convert(sharded, tmp_path / "out", "nvfp4", shard_size=second, overwrite=True)
    found = listing(tmp_path / "out")
    assert found.pop("notes.txt")
    assert found == listing(tmp_path / "wanted")


def test_overwrite_of_shards_beside_other_files(sharded: Path, tmp_path: Path) -> None:
    output = tmp_path / "models" / "x.safetensors"
    convert(sharded, output, "fp8", shard_size=60_000)
    write_file(output.with_name("x-large.safetensors"), {"a": torch.zeros(2)})
    convert(sharded, output, "nvfp4", shard_size=150_000, overwrite=True)
    index = json.loads(output.with_name("x.safetensors.index.json").read_text())
    wanted = {"x.safetensors.index.json", "x-large.safetensors", *index["weight_map"].values()}
    assert set(listing(output.parent)) == wanted


def test_a_new_file_beside_its_own_sharded_source(tmp_path: Path) -> None:
    """Overwriting ``x.safetensors`` must not take its source ``x-00001-of-00003.safetensors`` for stale shards."""
    folder = write_folder(tmp_path / "in", stem="x")
    before = listing(folder)
    index = folder / "x.safetensors.index.json"
    convert(index, folder / "x.safetensors", overwrite=True)
    convert(index, folder / "x.safetensors", overwrite=True)
    assert {**before, "x.safetensors": ""} == {**listing(folder), "x.safetensors": ""}


def test_a_broken_old_index_does_not_matter(sharded: Path, tmp_path: Path) -> None:
    for number, text in enumerate(("", "[]", '{"weight_map": 5}', '{"weight_map": {"a": "../../escape.safetensors"}}')):
        out = tmp_path / f"out{number}"
        out.mkdir()
        (out / "model.safetensors.index.json").write_text(text)
        (tmp_path / "escape.safetensors").write_bytes(b"precious")
        convert(sharded, out, overwrite=True)
        assert "model.safetensors.index.json" not in listing(out)
        assert (tmp_path / "escape.safetensors").read_bytes() == b"precious"


# -- failures during the run -------------------------------------------------------------------------------------------


class Failing:
    """Raises at the n-th call, and passes others on."""

    def __init__(self, real: Callable[..., Any], after: int, error: BaseException) -> None:
        self.real, self.left, self.error = real, after, error

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.real(*args, **options)


def fail(monkeypatch: pytest.MonkeyPatch, what: str, after: int, error: BaseException) -> None:
    """Makes a call of the system or of a stage raise from the n-th time on."""
    owner: Any
    owner, name = {
        "write": (fileio._PositionalFile, "write"), "read": (fileio._PositionalFile, "read_into"),
        "sync": (fileio._PositionalFile, "sync"), "rename": (commit, "replace"), "task": (writing.Write, "run"),
        "receipt": (graph, "make_receipt"),
    }[what]  # fmt: skip
    failing = Failing(getattr(owner, name), after, error)
    # A function binds to the object that it is called on; an instance of a class would not.
    monkeypatch.setattr(owner, name, lambda *args, **options: failing(*args, **options))


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
IO_ERROR = OSError(errno.EIO, os.strerror(errno.EIO))

FAILURES: dict[str, tuple[str, int, BaseException, type[BaseException], str]] = {
    "disk full at first": ("write", 0, NO_SPACE, SinkError, "the disk filled up"),
    "disk full later": ("write", 15, NO_SPACE, SinkError, "the disk filled up"),
    "device gone on write": ("write", 12, IO_ERROR, SinkError, "Input/output error"),
    "device gone on read": ("read", 9, IO_ERROR, QuantloomError, "cannot read"),
    "sync fails": ("sync", 0, IO_ERROR, SinkError, "cannot sync"),
    "rename fails": ("rename", 0, SinkError("out: cannot take the place"), SinkError, "cannot take the place"),
    "worker's own mistake": ("task", 3, ZeroDivisionError("a bug"), ZeroDivisionError, "a bug"),
    "no memory": ("task", 3, MemoryError(), SinkError, "out of memory: MemoryError; lower --memory or --workers"),
    "no memory for torch": ("task", 2, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), SinkError,
                            "lower --memory"),
    "a file system's error": ("task", 2, OSError(errno.ESTALE, "Stale file handle", "/mnt/x"), SinkError,
                              "/mnt/x: Stale file handle"),
    "interrupt": ("task", 3, KeyboardInterrupt(), KeyboardInterrupt, ""),
}  # fmt: skip


@pytest.fixture(params=["threads", "sync"])
def scheduler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(fileio, "PORTABLE", False)
    monkeypatch.setattr(graph, "BATCH_BYTES", 1)
    return request.param  # type: ignore[no-any-return]


def unfinished(files: dict[str, str]) -> set[str]:
    """What an unfinished run leaves."""
    return {name for name in files if name.endswith((".part", ".journal.jsonl"))}


@pytest.mark.parametrize("name", FAILURES)
def test_what_was_finished_before_a_failure_is_kept(name: str, scheduler: str, sharded: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Nothing is left but parts and journal, or nothing at all; the same command then makes what it always makes."""
    what, after, error, kind, words = FAILURES[name]
    outputs = "deep/new/out.safetensors", "folder"
    for output in outputs:
        convert(sharded, tmp_path / "wanted" / output)
    wanted, before = listing(tmp_path / "wanted"), listing(tmp_path)
    finished: set[str] = set()
    for output in outputs:
        with monkeypatch.context() as broken:
            broken.setattr(fileio, "PORTABLE", False)
            fail(broken, what, after, error)
            with pytest.raises(kind) as caught:
                convert(sharded, tmp_path / "made" / output, scheduler=scheduler)
        assert words in str(caught.value)
        left = {path: digest for path, digest in listing(tmp_path).items() if path not in before and digest}
        assert left.keys() - unfinished(left) == finished
        notes = " ".join(getattr(caught.value, "__notes__", ()))
        assert ("run the same command again to continue" in notes) == bool(unfinished(left))
        report = convert(sharded, tmp_path / "made" / output, scheduler=scheduler)
        assert bool(report.nbytes_resumed) == bool(unfinished(left))
        finished = {path for path, digest in listing(tmp_path).items() if path not in before and digest}
    assert listing(tmp_path / "made") == wanted


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("split", [None, 100_000])
def test_a_failed_overwrite_leaves_the_old_output(name: str, split: int | None, sharded: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(fileio, "PORTABLE", False)
    convert(sharded, tmp_path / "out", "fp8", shard_size=60_000)
    convert(sharded, tmp_path / "out.safetensors", "fp8")
    what, after, error, kind, _ = FAILURES[name]
    before = listing(tmp_path)
    fail(monkeypatch, what, after, error)
    with pytest.raises(kind):
        convert(sharded, tmp_path / "out", "nvfp4", shard_size=split, overwrite=True)
    with pytest.raises(kind):
        convert(sharded, tmp_path / "out.safetensors", "nvfp4", overwrite=True)
    left = listing(tmp_path)
    assert before.items() <= left.items()
    assert left.keys() - before.keys() == unfinished(left)


@pytest.mark.parametrize("after", range(16))
def test_a_rename_that_fails_in_the_middle_is_undone(after: int, sharded: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Windows refuses to rename over a file that someone has open."""
    convert(sharded, tmp_path / "out", "fp8", shard_size=150_000)
    before = listing(tmp_path)
    real, calls = fileio.replace, 0

    def once(src: Path, dst: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == after + 1:
            raise SinkError(f"{dst}: cannot take the place of {src}: in use")
        real(src, dst)

    monkeypatch.setattr(commit, "replace", once)
    try:
        convert(sharded, tmp_path / "out", "nvfp4", shard_size=100_000, overwrite=True)
    except SinkError:
        left = listing(tmp_path)
        assert before.items() <= left.items()
        assert left.keys() - before.keys() == unfinished(left)
    else:
        assert calls <= after
        assert not [name for name in listing(tmp_path) if name.endswith((".part", ".previous"))]


def test_an_empty_folder_of_the_user_stays(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    fail(monkeypatch, "task", 0, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        convert(checkpoint, tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()


def test_parts_of_a_killed_run_are_written_over(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "wanted.safetensors")
    (tmp_path / "out.safetensors.part").write_bytes(bytes(10_000_000))
    convert(checkpoint, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "wanted.safetensors").read_bytes()
    assert not (tmp_path / "out.safetensors.part").exists()


def test_a_source_that_shrinks_during_the_run(checkpoint: Path, tmp_path: Path) -> None:
    flow = Pipeline().read(checkpoint).quantize("fp8").write(tmp_path / "out.safetensors", compute=False)
    _ = flow.plan
    with checkpoint.open("r+b") as file:
        file.truncate(checkpoint.stat().st_size // 2)
    with pytest.raises(QuantloomError, match=r"tiny.safetensors: file is truncated"):
        flow.compute()
    assert not list(tmp_path.glob("out*"))


def test_a_sidecar_that_vanishes(sharded: Path, tmp_path: Path) -> None:
    flow = Pipeline().read(sharded).quantize("fp8").write(tmp_path / "out", compute=False)
    _ = flow.plan
    (sharded / "tokenizer.json").unlink()
    with pytest.raises(QuantloomError, match=r"tokenizer.json"):
        flow.compute()
    assert not (tmp_path / "out").exists()


def test_a_cluster_s_failure_is_cleaned_up_too(checkpoint: Path, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 1, "processes": False, "dashboard_address": "127.0.0.1:0", "silence_logs": 50}
    flow = Pipeline().read(checkpoint).quantize("fp8").write(tmp_path / "out.safetensors", compute=False)
    _ = flow.plan
    with checkpoint.open("r+b") as file:
        file.truncate(checkpoint.stat().st_size // 2)
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        with pytest.raises(QuantloomError, match=r"tiny.safetensors: file is truncated"):
            flow.compute(client)
        assert not list(tmp_path.glob("out*"))
        other = write_file(tmp_path / "sound.safetensors")
        Pipeline().read(other).quantize("fp8").write(tmp_path / "out.safetensors", compute=False).compute(client)
    assert load_file(tmp_path / "out.safetensors")


# -- others at the same place ------------------------------------------------------------------------------------------


def during(monkeypatch: pytest.MonkeyPatch, do: Callable[[], object]) -> None:
    """Does something once, in the middle of the run."""
    real, left = writing.Write.run, [do]

    def run(self: Any, work: Any) -> Any:
        if left:
            left.pop()()
        return real(self, work)

    monkeypatch.setattr(writing.Write, "run", run)


@pytest.mark.parametrize("name", ["out.safetensors", "out"])
def test_a_second_run_into_the_same_output(name: str, checkpoint: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    convert(checkpoint, tmp_path / "wanted" / name)
    said: list[str] = []

    def second() -> None:
        before = listing(tmp_path)
        with pytest.raises(SinkError) as caught:
            convert(checkpoint, tmp_path / name, "fp8", scheduler="sync")
        said.append(str(caught.value))
        assert listing(tmp_path) == before

    during(monkeypatch, second)
    convert(checkpoint, tmp_path / name, scheduler="sync")
    assert "another run is writing this output" in said[0]
    found = listing(tmp_path)
    assert not [path for path in found if path.endswith((".lock", ".part"))]
    assert {path: found[path] for path in found if path.startswith("out")} == {
        path: digest for path, digest in listing(tmp_path / "wanted").items() if path.startswith("out")
    }


def test_a_lock_file_of_a_killed_run_does_not_matter(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out.safetensors.lock").touch()
    convert(checkpoint, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors.lock").exists()


def test_a_link_in_the_place_of_lock_or_part(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    for ending, words in ((".lock", "stands where the lock"), (".part", "is not a regular file")):
        link = tmp_path / f"out.safetensors{ending}"
        link.symlink_to(tmp_path / "precious")
        refused(tmp_path, checkpoint, tmp_path / "out.safetensors", words)
        link.unlink()


def test_an_output_that_appears_during_the_run(checkpoint: Path, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    output = tmp_path / "out.safetensors"
    during(monkeypatch, lambda: output.write_bytes(b"precious"))
    with pytest.raises(SinkError, match="appeared while the conversion ran"):
        convert(checkpoint, output)
    assert output.read_bytes() == b"precious"
    left = listing(tmp_path)
    assert left.keys() - unfinished(left) == {"in", "in/tiny.safetensors", "out.safetensors"}
    output.unlink()
    convert(checkpoint, output)
    assert set(listing(tmp_path)) == {"in", "in/tiny.safetensors", "out.safetensors"}


@pytest.mark.parametrize("change", ["time", "size", "gone"])
def test_a_source_that_changes_during_the_run(change: str, checkpoint: Path, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (tmp_path / "out").mkdir()
    convert(checkpoint, tmp_path / "out", "fp8")
    before = listing(tmp_path / "out")

    def touch() -> None:
        if change == "time":
            os.utime(checkpoint, ns=(1, 1_000_000_001))
        else:
            with checkpoint.open("ab") as file:
                file.write(b"x")

    if change == "gone":
        real = fileio.sync_file
        monkeypatch.setattr(sink, "sync_file", lambda path: (real(path), checkpoint.unlink(missing_ok=True)))
    else:
        during(monkeypatch, touch)
    words = "cannot be looked at any more" if change == "gone" else "changed while it was converted .*convert again"
    with pytest.raises(CheckpointError, match=words):
        convert(checkpoint, tmp_path / "out", "nvfp4", overwrite=True)
    assert listing(tmp_path / "out") == before


@pytest.mark.parametrize("single", [False, True])
def test_parts_of_a_killed_run_in_other_shards_go(single: bool, sharded: Path, tmp_path: Path) -> None:
    out, stem = tmp_path / "out", "x" if single else "model"
    out.mkdir()
    left = [f"{stem}-00002-of-00009.safetensors.part", f"{stem}.safetensors.index.json.part"]
    left += [] if single else ["config.json.part"]
    others = ["other.safetensors.part", f"{stem}-large.safetensors.part", "notes.part"]
    for name in left + others:
        (out / name).write_bytes(b"x")
    convert(sharded, out / "x.safetensors" if single else out)
    assert not set(left) & set(listing(out))
    assert set(others) <= set(listing(out))


def test_an_interrupted_commit_is_not_written_over(sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(sharded, out, "fp8")
    (out / "model.safetensors").rename(out / "model.safetensors.previous")
    for how in ({}, {"overwrite": True}):
        refused(tmp_path, sharded, out, "model.safetensors is missing); rename it back to model.safetensors", **how)
    shutil.copy(out / "model.safetensors.previous", out / "model.safetensors")
    refused(tmp_path, sharded, out, "a new one is there already", overwrite=True)
    (out / "model.safetensors.previous").unlink()
    convert(sharded, out, "nvfp4", overwrite=True)


def test_a_previous_that_appears_during_the_run(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    convert(sharded, out, "fp8")
    during(monkeypatch, lambda: (out / "config.json.previous").write_text("precious"))
    before = listing(out)
    with pytest.raises(SinkError, match=r"config.json.previous: appeared meanwhile"):
        convert(sharded, out, "nvfp4", overwrite=True)
    left = listing(out)
    assert left.keys() - before.keys() - unfinished(left) == {"config.json.previous"}
    assert before.items() <= left.items()


@pytest.mark.skipif(os.name == "nt", reason="no such limit")
def test_more_shards_than_descriptors(tmp_path: Path) -> None:
    tensors = {f"blocks.{number}.up.weight": torch.ones(32, 32) for number in range(150)}
    source = write_file(tmp_path / "in.safetensors", tensors)
    script = """
import resource, sys
from quantloom import Pipeline
def convert(source, target):
    flow = Pipeline(scheduler="sync").read(source).quantize("fp8").write(target, shard_size=1, compute=False)
    plan = flow.plan
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    flow.compute()
convert(sys.argv[1], sys.argv[2])
from quantloom.formats.markers import read_markers
from quantloom.formats.source import open_source
print(len(read_markers(open_source(sys.argv[2])).layers))
"""
    done = child("-c", script, str(source), str(tmp_path / "out"))
    assert done == Ran(0, "150\n", done.err), done.err


def test_an_output_folder_that_is_a_dangling_link(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    for output in (tmp_path / "out", tmp_path / "out" / "x.safetensors"):
        refused(tmp_path, checkpoint, output, f"out: is a link to {tmp_path / 'nowhere'}, which does not exist")


def test_a_file_within_a_source_folder_without_index(checkpoint: Path, tmp_path: Path) -> None:
    folder = checkpoint.parent
    for how in ({}, {"shard_size": 60_000}):
        refused(tmp_path, folder, folder / "out.safetensors", "lies in the source folder, which has no index", **how)
    convert(folder, folder / "sub")
    convert(checkpoint, folder / "out.safetensors")


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------

_SLOW = """
import sys, time
from quantloom.stages import writing
real = writing.Write.run
def slow(self, work):
    time.sleep(0.2)
    return real(self, work)
writing.Write.run = slow
from quantloom.flow import graph
graph.BATCH_BYTES = 1
from quantloom.flow.cli import main
main(sys.argv[1:])
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of another kind")
@pytest.mark.parametrize(("scheduler", "number"), [("threads", signal.SIGINT), ("sync", signal.SIGINT),
                                                   ("threads", signal.SIGTERM)])  # fmt: skip
def test_ctrl_c(scheduler: str, number: int, sharded: Path, tmp_path: Path) -> None:
    before = listing(tmp_path)
    command = [sys.executable, "-c", _SLOW, "convert", str(sharded), str(tmp_path / "out"), "--format", "fp8",
               "--scheduler", scheduler]  # fmt: skip
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        part = tmp_path / "out" / "model.safetensors.part"
        deadline = time.monotonic() + 60
        while not part.exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        run.send_signal(number)
        out, err = run.communicate(timeout=30)
    assert run.returncode == 1
    assert out == ""
    last = err.strip().splitlines()[-1]
    left = listing(tmp_path)
    assert {path for path in left.keys() - before.keys() if path != "out"} == unfinished(left)
    if not unfinished(left):
        assert last == "stopped: what had been written was removed, and nothing was left under the name of the output"
    else:
        kept = r"stopped: [1-9]\d* of 15 tensors are finished and kept beside .*/model.safetensors.journal.jsonl: "
        assert re.fullmatch(kept + "run the same command again to continue, or delete that file to start over", last)
    assert "Traceback" not in err


# -- without positional calls ------------------------------------------------------------------------------------------


def test_the_portable_fallback_writes_the_same_bytes(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 20_000)
    script = """
import sys
from quantloom import Pipeline
from quantloom.flow import graph, parts
from quantloom.formats import fileio
assert fileio.PORTABLE
graph.BATCH_BYTES, parts.PART_BYTES = 1, 20_000  # as below: checksums are those of the row ranges
for name in ("fp8", "int8", "mxfp8", "nvfp4"):
    Pipeline(workers=4).read(sys.argv[1]).quantize(name).write(f"{sys.argv[2]}/{name}", shard_size=100_000)
"""
    done = child("-c", script, str(sharded), str(tmp_path / "portable"), QUANTLOOM_PORTABLE_IO="1")
    assert done == Ran(0, "", done.err), done.err
    for name in ("fp8", "int8", "mxfp8", "nvfp4"):
        Pipeline().read(sharded).quantize(name).write(tmp_path / "usual" / name, shard_size=100_000)
    assert listing(tmp_path / "portable") == listing(tmp_path / "usual")
    assert len(listing(tmp_path / "usual")) > 20


def test_the_fallback_in_this_process_and_an_interrupt(sharded: Path, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(fileio, "PORTABLE", True)
    convert(sharded, tmp_path / "a")
    monkeypatch.undo()
    convert(sharded, tmp_path / "b")
    assert listing(tmp_path / "a") == listing(tmp_path / "b")
    monkeypatch.setattr(fileio, "PORTABLE", True)
    fail(monkeypatch, "task", 0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        convert(sharded, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_written_files_read_back_as_headers(checkpoint: Path, tmp_path: Path) -> None:
    """Our own, stricter reader accepts what is written too, and so does a copy made by safetensors."""
    convert(checkpoint, tmp_path / "out.safetensors")
    assert len(read_header(tmp_path / "out.safetensors").refs) == len(load_file(tmp_path / "out.safetensors"))
    tensors = load_file(tmp_path / "out.safetensors")
    save_file(tensors, tmp_path / "copy.safetensors", metadata=header_of(tmp_path / "out.safetensors"))
    shutil.copy(tmp_path / "copy.safetensors", tmp_path / "again.safetensors")
    result = Pipeline().read(tmp_path / "again.safetensors").quantize("fp8").write(tmp_path / "fp8.safetensors")
    assert len(result.layers) == 7


def test_refusal_types() -> None:
    assert issubclass(PlanError, QuantloomError)
    assert issubclass(SinkError, QuantloomError)
