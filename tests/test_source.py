"""Opening checkpoints: every way in, everything that is refused, and what comes along."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantloom.formats import source as source_module
from quantloom.formats.errors import CheckpointError
from quantloom.formats.heads import layout
from quantloom.formats.source import Source, open_source
from quantloom.formats.tensors import TensorSpec


def shard(path: Path, *names: str, metadata: dict[str, str] | None = None) -> Path:
    """A file with one BF16 tensor of 2 x 3 for each name."""
    head, _, size = layout([TensorSpec(name, "BF16", (2, 3)) for name in names], metadata or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + bytes(size - len(head)))
    return path


def index(folder: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> Path:
    path = folder / name
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of two shards with an index, and a stray file that the index does not name."""
    folder = tmp_path / "model"
    shard(folder / "model-00001-of-00002.safetensors", "b", "a", metadata={"format": "pt"})
    shard(folder / "model-00002-of-00002.safetensors", "c")
    shard(folder / "consolidated.safetensors", "a", "b", "c")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index(folder, {"a": first, "b": first, "c": second})
    return folder


def names(source: Source) -> list[str]:
    return [path.name for path in source.files]


def refused(where: Any, *fragments: str) -> str:
    """The message of the refusal, which has to hold every fragment."""
    with pytest.raises(CheckpointError) as caught:
        open_source(where)
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message
    return message


class TestWaysIn:
    def test_one_file(self, tmp_path: Path) -> None:
        path = shard(tmp_path / "m.safetensors", "x", "y", metadata={"k": "v"})
        source = open_source(path)
        assert list(source.refs) == ["x", "y"]
        assert source.refs["y"].path == str(path)
        assert (source.files, source.root, source.sidecars) == ((path,), tmp_path, ())
        assert source.metadata == {"k": "v"}
        assert source.nbytes == 24
        assert open_source(str(path)) == source

    def test_one_file_of_another_suffix(self, tmp_path: Path) -> None:
        assert list(open_source(shard(tmp_path / "flux1-dev.sft", "x")).refs) == ["x"]

    def test_one_file_through_a_link_keeps_the_links_name(self, tmp_path: Path) -> None:
        shard(tmp_path / "blobs" / "0a1b", "x")
        link = tmp_path / "m.safetensors"
        link.symlink_to(tmp_path / "blobs" / "0a1b")
        assert open_source(link).files == (link,)

    def test_folder_with_an_index_reads_only_what_it_names(self, sharded: Path) -> None:
        source = open_source(sharded)
        assert names(source) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        assert list(source.refs) == ["b", "a", "c"]
        assert source.root == sharded

    def test_index_itself(self, sharded: Path) -> None:
        assert open_source(sharded / "model.safetensors.index.json") == open_source(sharded)

    def test_index_whose_shards_lie_in_sub_folders_and_behind_links(self, tmp_path: Path) -> None:
        shard(tmp_path / "blobs" / "0a", "x")
        folder = tmp_path / "snapshot"
        shard(folder / "parts" / "2.safetensors", "y")
        (folder / "1.safetensors").symlink_to(tmp_path / "blobs" / "0a")
        index(folder, {"x": "1.safetensors", "y": "parts/2.safetensors"})
        assert names(open_source(folder)) == ["1.safetensors", "2.safetensors"]

    def test_model_index_wins_over_other_indexes(self, sharded: Path) -> None:
        index(sharded, {"nothing": "none.safetensors"}, "diffusion.fp16.safetensors.index.json")
        assert list(open_source(sharded).refs) == ["b", "a", "c"]

    def test_one_index_of_any_name(self, tmp_path: Path) -> None:
        shard(tmp_path / "d.safetensors", "x")
        shard(tmp_path / "stray.safetensors", "x")
        index(tmp_path, {"x": "d.safetensors"}, "diffusion_pytorch_model.safetensors.index.json")
        assert names(open_source(tmp_path)) == ["d.safetensors"]

    def test_several_indexes_without_a_model_index_mean_all_files(self, tmp_path: Path) -> None:
        shard(tmp_path / "a.safetensors", "x")
        shard(tmp_path / "b.safetensors", "y")
        index(tmp_path, {"x": "a.safetensors"}, "a.safetensors.index.json")
        index(tmp_path, {"y": "b.safetensors"}, "b.safetensors.index.json")
        assert names(open_source(tmp_path)) == ["a.safetensors", "b.safetensors"]

    def test_folder_without_an_index(self, tmp_path: Path) -> None:
        shard(tmp_path / "b.safetensors", "x")
        shard(tmp_path / "a.safetensors", "z", "y")
        shard(tmp_path / "vae" / "c.safetensors", "not read")
        (tmp_path / "._a.safetensors").write_bytes(b"macOS was here")
        (tmp_path / "d.safetensors").mkdir()
        source = open_source(tmp_path)
        assert names(source) == ["a.safetensors", "b.safetensors"]
        assert list(source.refs) == ["z", "y", "x"]

    def test_adapters_count_only_where_there_is_nothing_else(self, tmp_path: Path) -> None:
        shard(tmp_path / "adapter_model.safetensors", "lora")
        assert list(open_source(tmp_path).refs) == ["lora"]
        shard(tmp_path / "model.safetensors", "x")
        assert list(open_source(tmp_path).refs) == ["x"]

    def test_glob(self, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = open_source(f"{sharded}/model-*")
        assert list(source.refs) == ["b", "a", "c"]
        assert (source.root, source.sidecars) == (sharded, ())
        monkeypatch.chdir(sharded.parent)
        assert names(open_source("mod*/model-0000[12]-of-?????.safetensors")) == names(source)
        assert names(open_source(Path("**/consolidated*"))) == ["consolidated.safetensors"]

    def test_file_with_brackets_in_its_name_is_no_pattern(self, tmp_path: Path) -> None:
        path = shard(tmp_path / "model [v1].safetensors", "x")
        assert open_source(path).files == (path,)

    def test_list_in_any_order_and_each_file_once(self, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(sharded)
        files = [sharded / "model-00002-of-00002.safetensors", str(sharded / "model-00001-of-00002.safetensors")]
        source = open_source(files)
        assert list(source.refs) == ["b", "a", "c"]
        assert source.root == sharded
        again = open_source([*files, sharded / ".." / "model" / "model-00002-of-00002.safetensors"])
        assert len(again.files) == 2
        assert open_source(tuple(files)) == source

    def test_file_without_tensors(self, tmp_path: Path) -> None:
        source = open_source(shard(tmp_path / "m.safetensors"))
        assert (source.refs, source.nbytes) == ({}, 0)


class TestWhatComesAlong:
    def test_sidecars(self, sharded: Path) -> None:
        wanted = ["LICENSE.md", "chat_template.jinja", "config.json", "generation_config.json", "merges.txt",
                  "modeling_x.py", "tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "vocab.txt"]  # fmt: skip
        unwanted = ["pytorch_model.bin", "tokenizer.bin", "x.pt", "x.pth", "x.ckpt", "x.gguf", "x.onnx", "x.h5",
                    "x.msgpack", ".hidden.json", "pytorch_model.bin.index.json", "picture.png"]  # fmt: skip
        for name in wanted + unwanted:
            (sharded / name).write_text("{}")
        (sharded / "folder.json").mkdir()
        shard(sharded / "sub" / "more.json", "x")
        source = open_source(sharded)
        assert [path.name for path in source.sidecars] == wanted
        assert {path.parent for path in source.sidecars} == {sharded}
        assert open_source(sharded / "model.safetensors.index.json").sidecars == source.sidecars

    def test_large_files_stay_behind(self, sharded: Path) -> None:
        for name, size in (("small.json", 64_000_000), ("large.json", 64_000_001)):
            (sharded / name).touch()
            os.truncate(sharded / name, size)
        assert [path.name for path in open_source(sharded).sidecars] == ["small.json"]

    def test_config_beside_the_weights(self, sharded: Path) -> None:
        assert open_source(sharded).config is None
        (sharded / "config.json").write_text('{"model_type": "llama", "eps": NaN}')
        one = sharded / "consolidated.safetensors"
        for where in (sharded, one, f"{sharded}/cons*", [one]):
            config = open_source(where).config
            assert config is not None
            assert config["model_type"] == "llama"

    @pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe\xfa", b"[" * 100_000, b""])
    def test_config_that_is_no_object_is_no_config(self, sharded: Path, content: bytes) -> None:
        (sharded / "config.json").write_bytes(content)
        assert open_source(sharded).config is None

    def test_metadata_is_merged_and_the_first_file_is_believed(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        shard(tmp_path / "1.safetensors", "x", metadata={"format": "pt", "a": "1"})
        shard(tmp_path / "2.safetensors", "y", metadata={"format": "pt", "b": "2"})
        assert open_source(tmp_path).metadata == {"format": "pt", "a": "1", "b": "2"}
        assert not caplog.records
        shard(tmp_path / "3.safetensors", "z", metadata={"format": "mlx"})
        assert open_source(tmp_path).metadata["format"] == "pt"
        assert "3.safetensors: __metadata__ disagrees" in caplog.text


class TestStamps:
    def test_every_file_with_size_and_time(self, sharded: Path) -> None:
        source = open_source(sharded)
        stats = [(path, path.stat()) for path in source.files]
        assert source.stamps == tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats)

    def test_only_a_folder_without_index_takes_all(self, sharded: Path, tmp_path: Path) -> None:
        assert not open_source(sharded).takes_all
        assert not open_source(shard(tmp_path / "plain" / "m.safetensors", "x")).takes_all
        assert open_source(tmp_path / "plain").takes_all


class TestFingerprint:
    def test_is_the_same_for_the_same_files(self, sharded: Path) -> None:
        prints = {open_source(sharded).fingerprint, open_source(str(sharded)).fingerprint}
        assert len(prints) == 1
        assert len(prints.pop()) == 64

    def test_survives_a_move(self, sharded: Path) -> None:
        before = open_source(sharded).fingerprint
        assert open_source(sharded.rename(sharded.with_name("moved"))).fingerprint == before

    def test_changes_with_name_size_time_and_header(self, tmp_path: Path) -> None:
        path = shard(tmp_path / "m.safetensors", "x")
        os.utime(path, ns=(10, 1_000_000_000))
        seen = [open_source(path).fingerprint]
        os.utime(path, ns=(10, 1_000_000_001))
        seen.append(open_source(path).fingerprint)
        shard(path, "y")
        os.utime(path, ns=(10, 1_000_000_000))
        seen.append(open_source(path).fingerprint)
        shard(path, "x", "y")
        os.utime(path, ns=(10, 1_000_000_000))
        seen.append(open_source(path).fingerprint)
        path = path.rename(tmp_path / "n.safetensors")
        seen.append(open_source(path).fingerprint)
        assert len(set(seen)) == 5


class TestNothingFound:
    def test_path_that_does_not_exist_names_its_neighbours(self, tmp_path: Path) -> None:
        shard(tmp_path / "flux-dev.safetensors", "x")
        refused(tmp_path / "flux_dev.safetensor", "does not exist; did you mean 'flux-dev.safetensors'?")
        refused(tmp_path / "zzz", "does not exist; known: flux-dev.safetensors")
        refused([tmp_path / "flux-dev.safetensor"], "does not exist; did you mean 'flux-dev.safetensors'?")

    def test_parent_that_does_not_exist_or_is_empty(self, tmp_path: Path) -> None:
        refused(tmp_path / "no" / "m.safetensors", f"does not exist, and neither does the folder {tmp_path / 'no'}")
        refused(tmp_path / "m.safetensors", f"does not exist; the folder {tmp_path} is empty")

    def test_hint_stays_short_in_a_crowded_folder(self, tmp_path: Path) -> None:
        for number in range(200):
            (tmp_path / f"{number:010d}").touch()
        assert refused(tmp_path / "model").endswith("model: does not exist")

    def test_empty_folder(self, tmp_path: Path) -> None:
        refused(tmp_path, str(tmp_path), "no safetensors file in this folder; found nothing")

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
    def test_folder_of_pickles(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).touch()
        (tmp_path / "config.json").touch()
        refused(tmp_path, f"found {name}, which is a pickle, which can run code; convert it to safetensors first")

    def test_folder_of_gguf(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").touch()
        refused(tmp_path, "found m.gguf, which is a GGUF file")

    def test_folder_of_other_things(self, tmp_path: Path) -> None:
        for number in range(7):
            (tmp_path / f"{number}.txt").touch()
        refused(tmp_path, "found 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 2 more")

    def test_pipeline_folder_names_the_parts(self, tmp_path: Path) -> None:
        shard(tmp_path / "transformer" / "m.safetensors", "x")
        shard(tmp_path / "vae" / "m.safetensors", "x")
        refused(tmp_path, "sub-folders that hold some: transformer, vae")

    def test_pattern_without_a_match(self, tmp_path: Path) -> None:
        refused(f"{tmp_path}/*.safetensors", "no safetensors file matches this pattern; found nothing")
        (tmp_path / "pytorch_model.bin").touch()
        refused(f"{tmp_path}/*", "found pytorch_model.bin, which is a pickle")

    def test_empty_arguments(self) -> None:
        refused("", "path of the checkpoint is empty")
        refused([], "list of checkpoint files is empty")

    def test_folder_in_a_list(self, sharded: Path) -> None:
        refused([sharded], str(sharded), "is a folder; a list holds files only")

    def test_files_of_another_kind(self, tmp_path: Path) -> None:
        (tmp_path / "m.bin").write_bytes(b"PK\x03\x04" + bytes(99))
        refused(tmp_path / "m.bin", "m.bin: is a pickle, which can run code; convert it to safetensors first")
        (tmp_path / "m.safetensors").write_bytes(b"GGUF\x03\0\0\0" + bytes(99))
        refused(tmp_path, "m.safetensors: is a GGUF file")
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        refused(tmp_path / "config.json", "config.json: is a JSON file")

    @pytest.mark.parametrize("where", ["a\0b", "\0/m.safetensors", "n" * 5000, "*\0"])
    def test_names_that_no_system_takes(self, where: str) -> None:
        refused(where)
        refused([where])


class TestTwoFiles:
    def test_same_tensor_in_both_names_both(self, tmp_path: Path) -> None:
        first, second = shard(tmp_path / "a.safetensors", "x", "w"), shard(tmp_path / "b.safetensors", "w")
        refused(tmp_path, f"tensor 'w' is in two files, {first} and {second}")
        refused([first, second], "give one file, the index, or a pattern")

    def test_broken_link_is_refused_and_not_skipped(self, tmp_path: Path) -> None:
        shard(tmp_path / "1.safetensors", "x")
        (tmp_path / "2.safetensors").symlink_to(tmp_path / "gone")
        refused(tmp_path, "2.safetensors: cannot open for reading: No such file")
        refused(tmp_path / "2.safetensors", "No such file")

    def test_damage_in_any_shard_is_found(self, tmp_path: Path) -> None:
        for number in range(20):
            shard(tmp_path / f"{number:02d}.safetensors", f"x{number}")
        os.truncate(tmp_path / "13.safetensors", 100)
        refused(tmp_path, "13.safetensors: ")

    def test_headers_are_read_concurrently(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for number in range(160):
            shard(tmp_path / f"{number:03d}.safetensors", f"x{number}")
        together = threading.Barrier(8, timeout=10)
        read_header = source_module.read_header

        def waiting(path: Path) -> Any:
            together.wait()
            return read_header(path)

        monkeypatch.setattr(source_module, "read_header", waiting)
        assert list(open_source(tmp_path).refs) == [f"x{number}" for number in range(160)]


class TestIndex:
    def test_missing_shards(self, sharded: Path) -> None:
        (sharded / "model-00002-of-00002.safetensors").unlink()
        message = refused(sharded, "model.safetensors.index.json: 1 of 2 shards are missing")
        assert "the first is model-00002-of-00002.safetensors" in message

    def test_shard_that_is_a_broken_link(self, sharded: Path) -> None:
        path = sharded / "model-00002-of-00002.safetensors"
        path.unlink()
        path.symlink_to(sharded / "gone")
        refused(sharded, "1 of 2 shards are missing")

    def test_tensor_missing_from_every_shard(self, sharded: Path) -> None:
        shard(sharded / "model-00001-of-00002.safetensors", "a")
        refused(sharded, "tensor 'b' is missing from shard model-00001-of-00002.safetensors: no shard has it")

    def test_tensor_in_another_shard_than_the_index_says(self, sharded: Path) -> None:
        shard(sharded / "model-00001-of-00002.safetensors", "a")
        shard(sharded / "model-00002-of-00002.safetensors", "b", "c")
        refused(
            sharded,
            "tensor 'b' is missing from shard model-00001-of-00002.safetensors",
            "it is in model-00002-of-00002.safetensors",
        )

    def test_tensor_that_the_index_lacks_is_read_with_a_warning(
        self, sharded: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        shard(sharded / "model-00002-of-00002.safetensors", "c", "extra")
        with caplog.at_level(logging.WARNING, "quantloom"):
            source = open_source(sharded)
        assert "extra" in source.refs
        assert "index.json lacks 1 tensors of its shards, 'extra' first" in caplog.text

    @pytest.mark.parametrize(
        "name",
        ["/etc/passwd", "../secret.safetensors", "a/../../b.safetensors", "..", "C:\\a.safetensors", "C:a.safetensors",
         "a\\b.safetensors", "\\\\host\\share\\a", "//host/share/a", "", ".", "./", "a\0b"],
    )  # fmt: skip
    def test_shard_names_that_leave_the_folder(self, tmp_path: Path, name: str) -> None:
        shard(tmp_path / "secret.safetensors", "x")
        folder = tmp_path / "model"
        folder.mkdir()
        index(folder, {"x": name})
        refused(folder, "model.safetensors.index.json: shard name", "is not a plain path inside the folder")

    def test_shard_that_is_a_pickle(self, tmp_path: Path) -> None:
        (tmp_path / "m.bin").write_bytes(b"\x80\x02}q\x00.aaaaaa")
        path = index(tmp_path, {"x": "m.bin"}, "pytorch_model.bin.index.json")
        refused(path, "m.bin: is a pickle")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"{", "broken JSON"),
            (b"", "broken JSON"),
            (b"\xff\xfe", "broken JSON"),
            (b"[" * 100_000, "broken JSON: nested too deep"),
            (b"[]", "index has no 'weight_map' object"),
            (b"{}", "index has no 'weight_map' object"),
            (b'{"weight_map": ["a"]}', "index has no 'weight_map' object"),
            (b'{"weight_map": {}}', "'weight_map' names no tensor"),
            (b'{"weight_map": {"w": 3}}', "gives tensor 'w' a shard that is not a string"),
            (b'{"weight_map": {"w": null}}', "gives tensor 'w' a shard that is not a string"),
            (b'{"weight_map": {"": 3}}', "gives tensor '' a shard that is not a string"),
            (b'{"weight_map": {"w": "a", "w": "b"}}', "broken JSON: duplicate key 'w'"),
            (b'{"weight_map": {"w": "\\udc00"}}', "broken JSON"),
        ],
    )
    def test_broken_index(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "model.safetensors.index.json"
        path.write_bytes(content)
        refused(tmp_path, f"{path}: ", message)

    def test_huge_index_is_not_read(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors.index.json"
        path.touch()
        os.truncate(path, 100_000_001)
        refused(tmp_path, "index of 100000001 bytes; at most 100000000 are read")

    def test_shard_name_that_is_too_long(self, tmp_path: Path) -> None:
        index(tmp_path, {"x": "n" * 5000})
        refused(tmp_path)


class TestUnreadable:
    def test_folder_that_may_not_be_listed(self, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Tests may run as root, whom no mode bit stops.
        def forbid(self: Path) -> Any:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

        monkeypatch.setattr(Path, "iterdir", forbid)
        refused(sharded, f"{sharded}: cannot be read: Permission denied")

    def test_device_error_names_the_shard(self, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("quantloom.formats.fileio.PORTABLE", False)

        def fail(*_: object) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "preadv", fail, raising=False)
        refused(sharded / "consolidated.safetensors", "consolidated.safetensors: cannot read", "Input/output error")

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
    def test_mode_bits(self, sharded: Path) -> None:
        (sharded / "consolidated.safetensors").chmod(0)
        refused(sharded / "consolidated.safetensors", "Permission denied")


def test_a_relative_folder_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of tensors are absolute: workers may stand in another folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    names = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    for name in names:
        save_file({f"{name[6:11]}.weight": torch.ones(2, 2)}, folder / name)
    index = {"weight_map": {f"{name[6:11]}.weight": name for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.chdir(tmp_path)
    source = open_source("model")
    assert {ref.path for ref in source.refs.values()} == {str(folder / name) for name in names}
