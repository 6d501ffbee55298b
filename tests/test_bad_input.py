"""Bad input, end to end through the command line: one clear message, the right status, nothing written or lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FORMATS, Ran, listing, make_tensors, write_file, write_folder
from safetensors.torch import load_file, save_file

from quantloom.flow import budget, output_checks
from quantloom.formats import fileio

Cli = Callable[..., Ran]


class Bench:
    """A folder to break things in, and the check that a conversion refuses them."""

    def __init__(self, folder: Path, cli: Cli) -> None:
        self.folder, self.cli = folder, cli

    def file(self, table: object, data: bytes = b"", name: str = "in.safetensors") -> Path:
        """A file with this header (JSON value, text or bytes) and data."""
        raw = table if isinstance(table, bytes) else (table if isinstance(table, str) else json.dumps(table)).encode()
        path = self.folder / name
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
        return path

    def refused(self, source: object, *words: str, status: int = 1, options: tuple[object, ...] = ()) -> str:
        """Convert, plan, into a file and a folder: the same message, and the folder as it was."""
        before = listing(self.folder)
        common = ["--format", "fp8"] if "--format" not in options else []
        messages = []
        for output in ("out.safetensors", "new/folder"):
            done = self.cli("convert", source, self.folder / output, *common, *options)
            messages.append(done.err.replace(output, "OUT"))
            assert done.status == status, done.err
            assert done.out == ""
            assert listing(self.folder) == before
        lines = [line for line in messages[0].splitlines() if line.startswith(("error: ", "usage: "))]
        assert len(lines) == 1, messages[0]
        assert "Traceback" not in messages[0]
        for word in words:
            assert word in lines[0]
        return lines[0]

    def plan_refuses(self, source: object, *words: str) -> None:
        done = self.cli("plan", source, "--format", "fp8")
        assert (done.status, done.out) == (1, "")
        assert all(word in done.err for word in words)


@pytest.fixture
def bench(tmp_path: Path, cli: Cli) -> Bench:
    folder = tmp_path / "bench"
    folder.mkdir()
    return Bench(folder, cli)


def entry(dtype: str = "F32", shape: object = (2, 2), begin: object = 0, end: object = 16) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


# -- headers -----------------------------------------------------------------------------------------------------------


def test_header_length_beyond_the_file(bench: Bench) -> None:
    path = bench.folder / "in.safetensors"
    path.write_bytes((5000).to_bytes(8, "little") + b"{}")
    bench.refused(path, "in.safetensors: header length 5000 runs past the end of the file (2 bytes follow it)")
    bench.plan_refuses(path, "header length 5000")


def test_header_length_over_the_limit(bench: Bench) -> None:
    path = bench.folder / "in.safetensors"
    path.write_bytes((150_000_000).to_bytes(8, "little") + b"{}")
    bench.refused(path, "in.safetensors: header length 150000000 exceeds 100000000")


@pytest.mark.parametrize(("text", "words"), [
    ('{"a":', "broken JSON"),
    ('{"a": 1} x', "broken JSON"),
    ('["a"]', "does not begin with '{'"),
    (b'{"\xff": 1}', "broken JSON"),
    ('{"a": NaN}', "NaN is not JSON"),
    ('{"a": ' + '{"b":' * 100_000, "nested too deep"),
    ('{"a.weight": {}, "a.weight": {}}', "duplicate key 'a.weight'"),
    ('{"a": {"dtype": "F32", "dtype": "F16", "shape": [2, 2], "data_offsets": [0, 16]}}', "duplicate key 'dtype'"),
    ('{"__metadata__": {"a": 1}}', "__metadata__ key 'a' holds 1, not a string"),
    ('{"a.weight": 5}', "tensor 'a.weight': entry is 5, not an object"),
])  # fmt: skip
def test_broken_json(text: str | bytes, words: str, bench: Bench) -> None:
    bench.refused(bench.file(text, bytes(16)), "in.safetensors", words)


@pytest.mark.parametrize(("table", "words"), [
    ({"a": entry(), "b": entry(begin=8, end=24)},
     ("tensor 'b' overlaps 'a'", "begins at byte", "where")),
    ({"a": entry(), "b": entry(begin=20, end=36)}, ("tensor 'b' leaves a hole after 'a'",)),
    ({"a": entry(begin=4, end=20)}, ("tensor 'a' leaves a hole after 'header'",)),
    ({"a": entry(), "b": entry(begin=16, end=32), "c": entry(begin=32, end=48)},
     ("tensor 'c' ends at byte", "beyond the file's", "truncated")),
    ({"a": entry()}, ("20 trailing bytes",)),
    ({"a": entry(end=12), "b": entry(begin=12, end=36)}, ("'a'", "takes 16 bytes, but data_offsets [0, 12] hold 12")),
    ({"a": entry(shape=(3, 2))}, ("'a'", "takes 24 bytes, but data_offsets [0, 16] hold 16")),
    ({"a": entry(dtype="F33")}, ("'a'", "unknown dtype 'F33'; did you mean 'F32'")),
    ({"a": entry(dtype="QINT")}, ("'a'", "unknown dtype 'QINT'")),
    ({"a": entry(begin=16, end=0)}, ("'a'", "begin <= end")),
    ({"a": entry(begin=-16, end=0)}, ("'a'", "data_offsets")),
    ({"a": entry(shape=(2, -2))}, ("'a'", "shape [2, -2] is not a list of non-negative integers")),
    ({"a": entry(shape=(2, 2.0))}, ("'a'", "shape")),
    ({"a": entry(shape="x")}, ("'a'", "shape")),
    ({"a": {"dtype": "F32", "shape": [2, 2]}}, ("'a'", "entry lacks data_offsets")),
    ({"a": entry(shape=(2**40, 2**40))}, ("'a'", "more than 2**63 elements")),
    ({"a": entry(dtype="F4", shape=(3, 1), end=1)}, ("'a'", "12 bits")),
])  # fmt: skip
def test_offsets_shapes_and_dtypes(table: object, words: tuple[str, ...], bench: Bench) -> None:
    bench.refused(bench.file(table, bytes(36)), "in.safetensors: ", *words)


def test_a_truncated_file(bench: Bench) -> None:
    path = write_file(bench.folder / "in.safetensors")
    whole = path.stat().st_size
    for size in (0, 7, 8, 100, whole // 2, whole - 1):
        with path.open("r+b") as file:
            file.truncate(size)
        bench.refused(path, "in.safetensors: ")
        write_file(path)


# -- folders and indexes -----------------------------------------------------------------------------------------------


FIRST = "model-00001-of-00003.safetensors"


@pytest.fixture
def folder(bench: Bench) -> Path:
    return write_folder(bench.folder / "model")


def change_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    return path


def test_a_truncated_shard(bench: Bench, folder: Path) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 10)
    bench.refused(folder, "model-00002-of-00003.safetensors: tensor ", "beyond the file's", "truncated")


def test_a_missing_shard(bench: Bench, folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()
    bench.refused(folder, "1 of 3 shards are missing, the first is model-00002-of-00003.safetensors")
    bench.plan_refuses(folder, "1 of 3 shards are missing")


def test_a_key_that_its_shard_lacks(bench: Bench, folder: Path) -> None:
    change_index(folder, lambda index: index["weight_map"].update({"ghost.weight": FIRST}))
    bench.refused(folder, f"tensor 'ghost.weight' is missing from shard {FIRST}: no shard has it")


def test_a_key_that_another_shard_has(bench: Bench, folder: Path) -> None:
    names = ("odd.weight", "conv.weight")
    change_index(folder, lambda index: index["weight_map"].update(dict.fromkeys(names, FIRST)))
    bench.refused(folder, f"is missing from shard {FIRST}: it is in ")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "a/../../secret.safetensors",
                                  "C:\\secret.safetensors", "..\\secret.safetensors", ""])  # fmt: skip
def test_an_index_that_leaves_the_folder(name: str, bench: Bench, folder: Path) -> None:
    write_file(bench.folder / "secret.safetensors", {"a.weight": torch.zeros(4, 4)})
    change_index(folder, lambda index: index["weight_map"].update({"a.weight": name}))
    bench.refused(folder, f"shard name {name!r} is not a plain path inside the folder")


@pytest.mark.parametrize(("text", "words"), [
    ("{", "broken JSON"), ("[]", "no 'weight_map' object"), ('{"weight_map": {}}', "names no tensor"),
    ('{"weight_map": {"a": 1}}', "a shard that is not a string"),
    ('{"weight_map": {"a": "x", "a": "y"}}', "duplicate key 'a'"),
])  # fmt: skip
def test_a_broken_index(text: str, words: str, bench: Bench, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    bench.refused(folder, "model.safetensors.index.json: ", words)


def test_a_tensor_in_two_files(bench: Bench, folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-copy.safetensors").write_bytes((folder / FIRST).read_bytes())
    bench.refused(folder, "is in two files", f"{FIRST} and ", "model-copy.safetensors")


def test_no_safetensors_at_all(bench: Bench) -> None:
    empty = bench.folder / "empty"
    empty.mkdir()
    bench.refused(empty, "empty: no safetensors file in this folder; found nothing")
    (empty / "notes.txt").write_text("")
    bench.refused(empty, "found notes.txt")
    (empty / "pytorch_model.bin").write_bytes(b"PK\3\4")
    bench.refused(empty, "found pytorch_model.bin, which is a pickle, which can run code; convert it to safetensors")
    bench.refused(bench.folder / "none", "none: does not exist")
    bench.refused(bench.folder / "*.safetensors", "no safetensors file matches this pattern")


@pytest.mark.parametrize(("start", "words"), [
    (b"PK\3\4" + bytes(60), "is a pickle, which can run code"), (b"\x80\x02}q\x00" + bytes(60), "is a pickle"),
    (b"GGUF" + bytes(60), "is a GGUF file"), (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    (b"<!DOCTYPE html><html></html>", "is a web page"), (b'{"weight_map": {}}', "is a JSON file"),
])  # fmt: skip
def test_files_of_another_kind(start: bytes, words: str, bench: Bench) -> None:
    path = bench.folder / "model.safetensors"
    path.write_bytes(start)
    bench.refused(path, f"model.safetensors: {words}")


def test_two_tensors_of_one_layer_s_name(bench: Bench) -> None:
    path = write_file(bench.folder / "in.safetensors", {"a": torch.zeros(4, 4), "a.weight": torch.ones(64, 64)})
    bench.refused(path, "in.safetensors: tensors 'a' and 'a.weight' share the name of a layer")


# -- numbers -----------------------------------------------------------------------------------------------------------


def broken_weights(path: Path, value: float, dtype: torch.dtype = torch.float32) -> Path:
    tensors = make_tensors()
    weight = tensors["blocks.1.mlp.down.weight"].to(dtype)
    weight[77, 5] = value
    weight[77, 9] = value
    weight[100, 200] = value
    return write_file(path, {**tensors, "blocks.1.mlp.down.weight": weight})


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers(name: str, value: float, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "CPU_CHUNK_BYTES", 10_000)
    path = broken_weights(bench.folder / "in.safetensors", value)
    options = tuple(word for key, text in FORMATS[name].items() for word in (f"--{key.replace('_', '-')}", text))
    wanted = "3 of 32768 weights are NaN or Inf, the first at [77, 5]"
    bench.refused(path, f"in.safetensors: blocks.1.mlp.down.weight: {wanted}", "--nonfinite keep", options=options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_that_are_no_numbers_in_every_dtype(dtype: torch.dtype, bench: Bench) -> None:
    path = broken_weights(bench.folder / "in.safetensors", float("inf"), dtype)
    bench.refused(path, "3 of 32768 weights are NaN or Inf, the first at [77, 5]")


def test_weights_beyond_float32(bench: Bench) -> None:
    path = broken_weights(bench.folder / "in.safetensors", 1e300, torch.float64)
    bench.refused(path, "3 of 32768 weights are NaN or Inf, the first at [77, 5]")


@pytest.mark.parametrize("name", ["fp8", "int8 rotated", "nvfp4"])
def test_keeping_what_is_no_number(name: str, bench: Bench, cli: Cli) -> None:
    path = broken_weights(bench.folder / "in.safetensors", float("nan"))
    out = bench.folder / "out.safetensors"
    options = [word for key, text in FORMATS[name].items() for word in (f"--{key.replace('_', '-')}", text)]
    done = cli("convert", path, out, *options, "--nonfinite", "keep")
    assert done.status == 0, done.err
    assert "kept 1 tensor: 3 weights are NaN or Inf, the first at [77, 5]" in done.out
    assert "6 layers quantized" in done.out
    after = load_file(out)
    kept = [tensors["blocks.1.mlp.down.weight"].view(torch.int32) for tensors in (load_file(path), after)]
    assert torch.equal(*kept)
    assert "blocks.1.mlp.down.comfy_quant" not in after
    assert "blocks.0.mlp.down.comfy_quant" in after
    assert cli("verify", out, "--against", path).status == 0


def test_keeping_everything_is_not_a_conversion(bench: Bench) -> None:
    path = write_file(bench.folder / "in.safetensors", {"a.weight": torch.full((64, 64), float("nan"))})
    bench.refused(path, "nothing is left to quantize: all 1 layers hold NaN or Inf", options=("--nonfinite", "keep"))


def test_kept_tensors_may_hold_anything(bench: Bench, cli: Cli) -> None:
    tensors = make_tensors()
    tensors["embed_tokens.weight"][3, 3] = float("nan")
    path = write_file(bench.folder / "in.safetensors", tensors)
    assert cli("convert", path, bench.folder / "out.safetensors", "--format", "fp8").status == 0


# -- wrong words: exit status 2 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "words"), [
    (("--format", "mxpf8"), "unknown format 'mxpf8'; did you mean 'mxfp8'"),
    (("--preset", "flux22"), "unknown preset 'flux22'; did you mean 'flux2'"),
    (("--scaling", "column"), "no scaling 'column'"),
    (("--include", "(unclosed"), "include: '(unclosed' is not a regular expression"),
    (("--exclude", "[z-a]"), "exclude: '[z-a]' is not a regular expression"),
    (("--include", "blocks.7"), "include 'blocks.7' matches no layer"),
    (("--memory", "lots"), "--memory 'lots' is no size"),
])  # fmt: skip
def test_wrong_words(options: tuple[str, ...], words: str, bench: Bench) -> None:
    path = write_file(bench.folder / "in.safetensors")
    assert bench.refused(path, words, status=2, options=options).startswith("usage: ")


def test_a_rule_that_matches_nothing_names_the_nearest_layers(bench: Bench) -> None:
    path = write_file(bench.folder / "in.safetensors")
    rules = bench.folder / "rules.yaml"
    rules.write_text("blocks.0.mpl.up: {format: nvfp4}\n")
    bench.refused(path, "'blocks.0.mpl.up'", "blocks.0.mlp.up", status=2, options=("--layers", rules))
    rules.write_text("'blocks(': {skip: true}\n")
    bench.refused(path, "'blocks('", status=2, options=("--layers", rules))
    rules.write_text("blocks: [1, 2\n")
    bench.refused(path, "rules.yaml", status=2, options=("--layers", rules))


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_a_block_size_that_fits_nothing(bench: Bench) -> None:
    path = write_file(bench.folder / "in.safetensors")
    options = ("--scaling", "block", "--block-size", "96")
    bench.refused(path, "nothing to quantize to fp8: ", "block size 96 does not divide 384 x 128", options=options)


def test_nothing_to_quantize(bench: Bench) -> None:
    path = write_file(bench.folder / "in.safetensors", {"norm.weight": torch.ones(64), "x": torch.arange(3)})
    bench.refused(path, "nothing to quantize to fp8: 1 x 1-D (norm, scale or bias)")
    path = write_file(bench.folder / "in2.safetensors", {"x": torch.arange(3)})
    bench.refused(path, "nothing to quantize to fp8: it has no linear layers")


def test_a_budget_that_is_too_small(bench: Bench) -> None:
    path = write_file(bench.folder / "in.safetensors")
    message = bench.refused(path, "needs ", " at a time", "do not fit in the memory budget of 1.00 MB; raise --memory",
                            options=("--memory", "1MB"))  # fmt: skip
    assert any(name.removesuffix(".weight") in message for name in make_tensors())


def test_a_disk_that_is_too_small(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_file(bench.folder / "in.safetensors")
    monkeypatch.setattr(output_checks, "free_bytes", lambda folder: 12_345)
    bench.refused(path, "the output needs 1.", " MB, but only 12.35 kB are free there")


def test_a_disk_that_fills_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_file(bench.folder / "in.safetensors")
    taken = 0
    real = os.pwrite

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        nonlocal taken
        taken += len(data)
        if taken % 400_000 > 100_000:
            raise OSError(28, os.strerror(28))
        return real(descriptor, data, offset)

    monkeypatch.setattr(fileio, "PORTABLE", False)
    monkeypatch.setattr(os, "pwrite", pwrite)
    bench.refused(path, ".part: cannot write ", "the disk filled up", "free space and run again")


def test_paths_that_cannot_be_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.refused(bench.folder / ("x" * 300), "File name too long")
    loop = bench.folder / "loop.safetensors"
    loop.symlink_to(loop)
    bench.refused(loop, "loop.safetensors")
    os.mkfifo(bench.folder / "pipe.safetensors")
    done = bench.cli("convert", bench.folder / "pipe.safetensors", bench.folder / "out", "--format", "fp8")
    assert done.status == 1
    assert "pipe.safetensors: cannot be read as a file: it is not a regular file" in done.err


def test_a_path_without_permission(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_file(bench.folder / "in.safetensors")
    real = FileIO

    def locked(name: str, mode: str = "r") -> Any:
        if str(name).endswith("in.safetensors"):
            raise PermissionError(13, os.strerror(13), name)
        return real(name, mode)

    monkeypatch.setattr(fileio, "FileIO", locked)
    bench.refused(path, "in.safetensors: cannot open for reading: Permission denied")


def test_a_path_that_cannot_be_written(bench: Bench) -> None:
    path = write_file(bench.folder / "in.safetensors")
    before = listing(bench.folder)
    for output in ("/proc/none/out.safetensors", path / "out.safetensors", bench.folder / ("y" * 300 + ".safetensors")):
        done = bench.cli("convert", path, output, "--format", "fp8")
        assert (done.status, done.out) == (1, "")
        assert done.err.splitlines()[-1].startswith("error: ")
        assert str(Path(output).parent) in done.err
        assert "Traceback" not in done.err
    assert listing(bench.folder) == before


# -- checkpoints that are quantized already ----------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.update({"odd.comfy_quant": torch.tensor(list(b"{not json"), dtype=torch.uint8)}), "odd.comfy_quant"),
    (lambda t: t.update({"odd.comfy_quant": torch.tensor(list(b"[1]"), dtype=torch.uint8)}), "odd.comfy_quant"),
])  # fmt: skip
def test_broken_markers(change: Callable[[dict[str, torch.Tensor]], None], words: str, bench: Bench, cli: Cli) -> None:
    path = write_file(bench.folder / "in.safetensors")
    assert cli("convert", path, bench.folder / "middle.safetensors", "--format", "fp8", "-q").status == 0
    tensors = load_file(bench.folder / "middle.safetensors")
    change(tensors)
    save_file(tensors, bench.folder / "broken.safetensors")
    bench.refused(bench.folder / "broken.safetensors", "broken.safetensors", words)


def test_names_cannot_steer_the_terminal(tmp_path: Path, cli: Callable[..., Ran]) -> None:
    name = "a.\x1b[31mred\x1b]0;title\x07\nerror: forged"
    source = write_file(tmp_path / "in.safetensors", {f"{name}.weight": torch.full((64, 64), torch.nan)})
    ran = cli("convert", source, tmp_path / "out.safetensors", "--format", "fp8")
    assert ran.status == 1
    assert "\x1b" not in ran.err
    assert r"\x1b[31mred" in ran.err
    assert not any(line.startswith("error: forged") for line in ran.err.splitlines())
    good = write_file(tmp_path / "good.safetensors", {f"{name}.weight": torch.ones(64, 64)})
    for command in (("plan", good, "--format", "fp8"), ("inspect", good, "--layers")):
        ran = cli(*command)
        assert ran.status == 0
        assert "\x1b" not in ran.out + ran.err
