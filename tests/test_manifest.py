"""Checksums within outputs: whatever is not as it was written is found, and where it lies is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FORMATS, Ran, make_tensors, write_file, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantloom import Pipeline
from quantloom.flow import budget, checksums, parts, piece_sums
from quantloom.flow.in_place import edit_in_place
from quantloom.flow.verify import verify
from quantloom.flow.verify_checksums import Finding, verify_checksums
from quantloom.formats.checksums import Piece, checksum
from quantloom.formats.errors import CheckpointError, SinkError, UsageError
from quantloom.formats.heads import layout
from quantloom.formats.manifest import ALGORITHM, KEY, finished_head, parse, reserve, seal
from quantloom.formats.safetensors import read_header
from quantloom.formats.source import open_source
from quantloom.formats.tensors import TensorSpec
from quantloom.stages.edit import Edit


def convert(source: Path, output: Path, name: str = "mxfp8", **how: Any) -> Path:
    Pipeline(scheduler="sync").read(source).stage("quantize", **FORMATS[name]).write(output, **how)
    return output


def small() -> dict[str, torch.Tensor]:
    """A few layers: each test flips bits in all of it."""
    kept = ("blocks.0.attn", "blocks.0.norm", "odd", "causal")
    return {name: tensor[:40] for name, tensor in make_tensors().items() if name.startswith(kept)}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    return convert(write_file(folder / "in.safetensors", small()), folder / "out.safetensors", "nvfp4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with an index, and nothing else."""
    place = tmp_path_factory.mktemp("shards")
    made = convert(write_file(place / "in.safetensors", small()), place / "out", shard_size=6_000)
    assert len(list(made.glob("*.safetensors"))) > 2
    return made


def found(where: Path) -> list[Finding]:
    return list(verify_checksums(str(where)).findings)


def head_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


# -- every output has them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [10_000, 1 << 30])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_in_one_task_or_row_ranges(
    name: str, part: int, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", part)
    made = []
    for chunk in (3000, 1 << 20):
        monkeypatch.setattr(budget, "CPU_CHUNK_BYTES", chunk)
        output = convert(checkpoint, tmp_path / f"{chunk}.safetensors", name)
        check = verify_checksums(str(output))
        assert check.ok, check.findings
        assert check.tensors == len(load_file(output))
        assert check.nbytes == sum(tensor.nbytes for tensor in load_file(output).values())
        assert check.source == open_source(checkpoint).layout
        made.append(output.read_bytes())
    assert made[0] == made[1], "pieces are those of the plan, whatever the chunks"
    values = json.loads(read_header(output).metadata[KEY])
    assert any(isinstance(value, list) for value in values["tensors"].values()) == (part == 10_000)


def test_every_kind_of_output(checkpoint: Path, tmp_path: Path) -> None:
    source = convert(checkpoint, tmp_path / "mxfp8.safetensors")
    scales = tmp_path / "scales.json"
    scales.write_text(json.dumps({"odd": 2.0}))
    fp8 = convert(checkpoint, tmp_path / "fp8.safetensors", "fp8")
    lora: dict[str, Any] = {"rank": 4, "target": "."}
    pipelines = {
        "dequantized": Pipeline().read(source).dequantize("bf16"),
        "hybrid": Pipeline().read(source).hybrid(),
        "migrated": Pipeline().read(fp8).migrate(to="legacy"),
        "scaled": Pipeline().read(fp8).input_scales(file=str(scales)),
        "edited": Pipeline().read(source).edit(add={"note": "x"}),
        "with adapter": Pipeline().read(checkpoint).quantize("fp8").lora(**lora),
        "adapter": Pipeline().read(checkpoint).quantized_as(str(source)).lora(**lora),
    }
    for name, pipeline in pipelines.items():
        pipeline.write(tmp_path / f"{name}.safetensors")
    for path in [*(tmp_path / f"{name}.safetensors" for name in pipelines), tmp_path / "with adapter_lora.safetensors"]:
        check = verify_checksums(str(path))
        assert check.ok, (path, check.findings)
        assert check.tensors == len(load_file(path))
    for name, path in (("dequantized", source), ("scaled", fp8), ("adapter", checkpoint)):
        made = tmp_path / f"{name}.safetensors"
        assert verify_checksums(str(made)).source == open_source(path).layout


def test_an_edit_makes_no_checksums_up(checkpoint: Path, tmp_path: Path) -> None:
    made = convert(checkpoint, tmp_path / "made.safetensors")
    with safe_open(made, "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != KEY}
    save_file(load_file(made), tmp_path / "foreign.safetensors", metadata=metadata)
    Pipeline().read(tmp_path / "foreign.safetensors").edit(add={"note": "x"}).write(tmp_path / "copy.safetensors")
    assert KEY not in read_header(tmp_path / "copy.safetensors").metadata


def test_an_edit_in_place_keeps_them_right(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    before = {path.name: path.read_bytes() for path in copy.glob("*.safetensors")}
    edit_in_place(str(copy), Edit(add={"full_precision_matrix_mult": True}, filter="qkv"))
    assert found(copy) == []
    assert any(path.read_bytes() != before[path.name] for path in copy.glob("*.safetensors"))
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    edit_in_place(str(other), Edit(add={"note": "x" * 5000}))  # there is no room: new files
    assert found(other) == []


def test_an_edit_in_place_hides_no_damage(single: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(single, tmp_path / "copy.safetensors"))
    raw = copy.read_bytes()
    copy.write_bytes(raw.replace(b'"author":"someone"', b'"author":"sombody"', 1))
    assert [finding.kind for finding in found(copy)] == ["header"]
    flip(copy, 8 * next(ref.start for ref in read_header(copy).refs if ref.name == "causal"))
    edit_in_place(str(copy), Edit(add={"note": "x"}))
    assert [(finding.kind, finding.tensor) for finding in found(copy)] == [("header", ""), ("tensor", "causal")]


def test_every_byte_has_to_be_written(checkpoint: Path, tmp_path: Path) -> None:
    plan = Pipeline().read(checkpoint).quantize("fp8").write(tmp_path / "out.safetensors", compute=False).plan
    with pytest.raises(SinkError, match=r"0 of .* bytes were written"):
        list(checksums.finished_heads(plan, []))


def test_the_header_keeps_its_length_and_the_room_is_enough() -> None:
    specs = [TensorSpec("a", "U8", (10**6, 3)), TensorSpec('b"\\ü', "F32", (2,))]
    entry = reserve(specs, {"a": 3}, "f" * 64, "e" * 64)
    head, _, _ = layout(specs, {KEY: entry})
    pair = Piece('b"\\ü', 0, 8, "1" * 16)
    for cuts in ([3 * 10**6], [1, 3 * 10**6 - 1], [10**6] * 3):
        pieces = [Piece("a", sum(cuts[:number]), nbytes, "2" * 16) for number, nbytes in enumerate(cuts)]
        made = finished_head(head, {"a": pieces, 'b"\\ü': [pair]}, "x")
        assert len(made) == len(head)
        assert seal(made) == made
        table = json.loads(made[8:])
        assert {name: table[name] for name in ("a", 'b"\\ü')} == {name: json.loads(head[8:])[name] for name in table if
                                                                 name != "__metadata__"}  # fmt: skip
        digits = json.loads(table["__metadata__"][KEY])["header"]
        assert checksum(made.replace(digits.encode(), b"0" * 16)) == digits, "as the docs say it is computed"
    with pytest.raises(SinkError, match="4 pieces of at most 3"):
        finished_head(head, {"a": [Piece("a", n * 750_000, 750_000, "2" * 16) for n in range(4)], 'b"\\ü': [pair]}, "x")


# -- whatever differs is found -----------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_of_a_file(data: st.DataObject, single: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = Path(shutil.copy(single, tmp_path_factory.mktemp("flip") / "out.safetensors"))
    head = 8 * head_bytes(copy)
    bit = data.draw(st.integers(0, head - 1) | st.integers(head, 8 * copy.stat().st_size - 1))
    flip(copy, bit)
    located = found(copy)
    if bit < head:
        assert "header" in {finding.kind for finding in located}
        return
    lies = next(ref for ref in read_header(copy).refs if ref.start <= bit // 8 < ref.start + ref.nbytes)
    assert [(finding.kind, finding.tensor) for finding in located] == [("tensor", lies.name)]
    assert (located[0].start, located[0].stop) == (lies.start, lies.start + lies.nbytes)
    assert located[0].expected != located[0].found
    assert str(copy) in str(located[0])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_of_shards_and_index(
    data: st.DataObject, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path_factory.mktemp("flip") / "out"))
    path = data.draw(st.sampled_from(sorted(path for path in copy.iterdir())))
    bit = data.draw(st.integers(0, 8 * path.stat().st_size - 1))
    flip(path, bit)
    located = found(copy)
    assert any(finding.path == str(path) for finding in located), located
    kinds = {finding.kind for finding in located if finding.path == str(path)}
    assert ("index" if path.suffix == ".json" else "header" if bit < 8 * head_bytes(path) else "tensor") in kinds or (
        bit < 64 and path.suffix != ".json"
    )


def test_every_bit_of_the_index_and_of_the_entry_s_begin(folder: Path, single: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "out"))
    index = next(copy.glob("*.json"))
    for byte in range(0, index.stat().st_size, 5):
        flip(index, 8 * byte + byte % 8)
        assert any(finding.kind == "index" for finding in found(copy)), byte
        flip(index, 8 * byte + byte % 8)
    assert found(copy) == []
    file = Path(shutil.copy(single, tmp_path / "out.safetensors"))
    begin = file.read_bytes().index(KEY.encode())
    for bit in range(8 * begin, 8 * (begin + 90)):
        flip(file, bit)
        assert [finding.kind for finding in found(file)] == ["header"]
        flip(file, bit)


def test_files_that_are_cut_extended_swapped_or_missing(folder: Path, tmp_path: Path) -> None:
    def broken(change: Callable[[list[Path]], object]) -> str:
        copy = Path(shutil.copytree(folder, tmp_path / "out", dirs_exist_ok=True))
        change(sorted(copy.glob("*.safetensors")))
        text = "\n".join(map(str, found(copy)))
        shutil.rmtree(copy)
        return text

    assert "truncated" in broken(lambda files: files[1].write_bytes(files[1].read_bytes()[:-1]))
    assert "trailing" in broken(lambda files: files[1].write_bytes(files[1].read_bytes() + b"\0"))
    assert "does not fit the files" in broken(
        lambda files: (files[0].rename("x"), files[1].rename(files[0]), Path("x").rename(files[1]))
    )
    assert "files are missing: out-" not in (text := broken(lambda files: files[1].unlink()))
    assert "files are missing" in text
    assert "index of the numbered files is missing" in broken(
        lambda files: next(files[0].parent.glob("*.json")).unlink()
    )
    text = broken(lambda files: save_file(load_file(files[0]), files[0]))
    assert "carries no checksums, other files of this output do" in text


def test_a_file_of_another_run(folder: Path, tmp_path: Path) -> None:
    other = convert(folder.parent / "in.safetensors", tmp_path / "other", "hybrid_mxfp8", shard_size=6_000)
    copy = Path(shutil.copytree(folder, tmp_path / "out"))
    names = sorted(path.name for path in copy.glob("*.safetensors"))
    shutil.copy(other / names[-1], copy / names[-1])
    assert any("was written by another run than the other files: plan" in str(finding) for finding in found(copy))


def test_a_header_that_another_program_wrote(single: Path, tmp_path: Path) -> None:
    with safe_open(single, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(single)
    save_file(tensors, tmp_path / "same.safetensors", metadata=metadata)
    located = found(tmp_path / "same.safetensors")
    assert [finding.kind for finding in located] == ["header"]
    assert "rewritten by another program" in str(located[0])
    tensors["renamed"] = tensors.pop("causal")
    tensors["odd.weight"] = tensors["odd.weight"].clone()
    tensors["odd.weight"].view(torch.uint8)[0, 0] ^= 1
    save_file(tensors, tmp_path / "other.safetensors", metadata=metadata)
    header, weight = found(tmp_path / "other.safetensors")
    assert "it lacks 'causal', it has gained 'renamed'" in str(header)
    assert weight.tensor == "odd.weight"


def test_the_row_range_that_differs_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 40_000)
    output = convert(checkpoint, tmp_path / "out.safetensors", "fp8")
    ref = open_source(output).refs["blocks.0.attn.qkv.weight"]
    flip(output, 8 * (ref.start + 200 * 128))
    assert [(finding.start, finding.stop) for finding in found(output)] == [
        (ref.start + 128 * 128, ref.start + 256 * 128)
    ]


def test_a_file_that_cannot_be_read_is_named(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise CheckpointError(f"{single}: cannot read: Input/output error")

    monkeypatch.setattr(piece_sums.Reader, "read_into", fail)
    stored = [piece_sums.Stored(str(single), 0, Piece("a", 0, 10, "0" * 16))]
    assert piece_sums.sum_pieces(stored) == [(stored[0], "", f"{single}: cannot read: Input/output error")]


# -- hostile entries ---------------------------------------------------------------------------------------------------


GOOD = json.loads(reserve([TensorSpec("a", "U8", (4,))], {}, "s", "p"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("0" * 16),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4), max_leaves=8,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from([*GOOD, "tensor"]), value=VALUES, cut=st.integers(0, 300))
def test_nonsense_is_refused(key: str, value: Any, cut: int) -> None:
    broken = {**GOOD, key: value} if key != "tensor" else {**GOOD, "tensors": {"a": value}}
    for text in (json.dumps(broken), json.dumps(broken)[:cut], json.dumps(value)):
        try:
            made = parse({KEY: text}, "file")
        except CheckpointError:
            continue
        assert made is not None
        for pieces in made.tensors.values():
            assert all(len(digits) == 16 and (nbytes is None or nbytes >= 0) for nbytes, digits in pieces)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 50_000, "9" * 10_000, '{"algorithm": "crc32"}', "", "\ud800"], ids=range(6)
)
def test_what_is_deep_long_or_of_another_algorithm(text: str) -> None:
    with pytest.raises(CheckpointError):
        parse({KEY: text}, "file")


@pytest.mark.parametrize("pieces", [[[3, "0" * 16]], [[2**62, "0" * 16], [2**62, "0" * 16]], [[0, "0" * 16]]])
def test_pieces_that_do_not_make_up_a_tensor(pieces: list[Any], tmp_path: Path) -> None:
    entry = {"algorithm": ALGORITHM, "header": "0" * 16, "source": "", "plan": "", "tensors": {"a": pieces}}
    save_file({"a": torch.zeros(4)}, tmp_path / "a.safetensors", metadata={KEY: json.dumps(entry)})
    kinds = [(finding.kind, finding.tensor) for finding in found(tmp_path / "a.safetensors")]
    assert kinds == [("header", ""), ("tensor", "a")]


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command(cli: Callable[..., Ran], single: Path, tmp_path: Path) -> None:
    ran = cli("verify", single)
    assert ran.status == 0
    assert "every byte is as it was written; checksums of" in ran.out
    copy = Path(shutil.copy(single, tmp_path / "out.safetensors"))
    flip(copy, 8 * copy.stat().st_size - 1)
    ran = cli("verify", copy)
    assert ran.status == 1
    assert "broken:" in ran.out
    assert "BROKEN (1 problem)" in ran.out
    told = json.loads(cli("verify", copy, "--json").out)
    assert not told["ok"]
    assert told["findings"][0]["kind"] == "tensor"
    assert told["gb_per_second"] > 0
    source = single.parent / "in.safetensors"
    ran = cli("verify", copy, "--against", source)
    assert ran.status == 1
    assert "was written" in ran.out


def test_files_without_checksums_and_options_without_a_source(
    cli: Callable[..., Ran], single: Path, checkpoint: Path
) -> None:
    ran = cli("verify", checkpoint)
    assert ran.status == 2
    assert "carries no checksums" in ran.err
    assert "--against SOURCE" in ran.err
    assert cli("verify", single, "--adapter", "x").status == 2
    assert cli("verify", single.parent / "nothing.safetensors").status == 1
    with pytest.raises(UsageError):
        verify_checksums(str(write_folder(checkpoint.parent / "plain")))


def test_another_source_is_noted(single: Path, tmp_path: Path) -> None:
    same, other = single.parent / "in.safetensors", tmp_path / "other.safetensors"
    assert verify(str(single), str(same)).note == ""
    save_file({**load_file(same)}, other, metadata={"format": "another"})
    result = verify(str(single), str(other))
    assert result.ok
    assert open_source(other).layout[:16] in result.note


def test_progress_is_told_to_the_end(single: Path) -> None:
    told: list[tuple[int, int]] = []
    check = verify_checksums(str(single), lambda done, total: told.append((done, total)))
    assert told[-1] == (check.nbytes, check.nbytes)
