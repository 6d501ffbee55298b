"""Outputs in Zarr stores and what is assembled of them: the same bytes as files, for any layout and order of writes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FORMATS, Ran, listing, make_tensors, write_file
from hypothesis import given, settings
from hypothesis import strategies as st

from quantloom import Flow, Pipeline
from quantloom.flow import commit, graph, parts, zarr_sink
from quantloom.flow.assemble import assemble
from quantloom.flow.commit import check_unchanged
from quantloom.flow.execute import Silent
from quantloom.flow.store_log import StoreLog
from quantloom.formats import output_store, zarr_store
from quantloom.formats.errors import CheckpointError, NonFiniteError, PlanError, QuantloomError, SinkError, UsageError
from quantloom.formats.objects import FolderObjects, objects_at
from quantloom.formats.output_store import OutputStore
from quantloom.formats.source import Source
from quantloom.formats.store_table import ENTRY, read_table, write_table
from quantloom.formats.tensors import Slot, TensorSpec
from quantloom.formats.zarr_store import ArrayWriter, chunk_bytes, read_chunk, write_chunk, writing_bytes
from quantloom.stages.work import Receipt


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny layers are many chunks, in several row ranges, and each is a task."""
    monkeypatch.setattr(parts, "PART_BYTES", 20_000)
    monkeypatch.setattr(graph, "BATCH_BYTES", 1)
    monkeypatch.setattr(zarr_store, "CHUNK_BYTES", 3_000)
    monkeypatch.setattr(output_store, "CHUNK_BYTES", 3_000)


@pytest.fixture
def stored(tmp_path: Path, sharded: Path) -> Path:
    """A complete store in two shards."""
    store = tmp_path / "out.zarr"
    Pipeline().read(sharded).quantize("mxfp8").write(store, shard_size=150_000)
    return store


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", FORMATS)
def test_an_assembled_store_is_what_files_would_have_been(name: str, tmp_path: Path, sharded: Path) -> None:
    quantized = Pipeline(workers=2).read(sharded).quantize(**FORMATS[name])
    for size in (None, 100_000):
        here = tmp_path / str(size)
        quantized.write(here / "out.zarr", shard_size=size)
        quantized.write(here / "direct", shard_size=size)
        quantized.write(here / "direct file" / "x.safetensors", shard_size=size)
        assemble(str(here / "out.zarr"), str(here / "made"))
        assemble(str(here / "out.zarr"), str(here / "made file" / "x.safetensors"))
        assert listing(here / "made") == listing(here / "direct")
        assert listing(here / "made file") == listing(here / "direct file")


@pytest.mark.usefixtures("small_chunks")
def test_shards_that_nobody_asked_for_become_one_file(
    tmp_path: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantloom.formats import shards

    quantized = Pipeline().read(sharded).quantize("nvfp4")
    quantized.write(tmp_path / "x.safetensors")
    monkeypatch.setattr(shards, "DEFAULT_SHARD_BYTES", 60_000)
    quantized.write(tmp_path / "out.zarr")
    assert len(OutputStore(objects_at(str(tmp_path / "out.zarr"))).table.shards) > 2
    assemble(str(tmp_path / "out.zarr"), str(tmp_path / "made" / "x.safetensors"))
    assert (tmp_path / "made" / "x.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


def test_names_are_no_paths_and_empty_tensors_survive(tmp_path: Path) -> None:
    tensors = make_tensors() | {
        "../../outside": torch.ones(3), "a/b\\c:*?": torch.zeros(2, 2), "Ünïcode\n": torch.ones(1),
        "empty": torch.zeros(0, 4), "scalar": torch.tensor(1.5), "empty too": torch.zeros(3, 0).half(),
    }  # fmt: skip
    source = write_file(tmp_path / "in" / "model.safetensors", tensors)
    quantized = Pipeline().read(source).quantize("fp8")
    quantized.write(tmp_path / "a" / "x.safetensors")
    quantized.write(tmp_path / "b" / "out.zarr")
    assemble(str(tmp_path / "b" / "out.zarr"), str(tmp_path / "c" / "x.safetensors"))
    assert listing(tmp_path / "c") == listing(tmp_path / "a")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "a", "b", "c"}
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"out.zarr"}


def test_zarr_itself_reads_the_arrays(stored: Path, tmp_path: Path) -> None:
    import zarr

    assemble(str(stored), str(tmp_path / "x"))
    plain = {}
    for path in (tmp_path / "x").glob("*.safetensors"):
        plain |= _raw(path)
    group = zarr.open_group(stored, mode="r")
    found = 0
    for _key, array in group.members(max_depth=None):
        if isinstance(array, zarr.Array) and "name" in array.attrs:
            assert array[:].tobytes() == plain[str(array.attrs["name"])]
            found += 1
    assert found == len(plain)


def _raw(path: Path) -> dict[str, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    return {
        name: content[8 + length + entry["data_offsets"][0] : 8 + length + entry["data_offsets"][1]]
        for name, entry in table.items() if name != "__metadata__"
    }  # fmt: skip


@given(
    rows=st.integers(1, 3000), width=st.integers(1, 700), ranges=st.integers(2, 5),
    stored=st.sampled_from(["rows", "padded", "blocks of 32", "blocks of 64", "blocks of 128"]),
)  # fmt: skip
def test_row_ranges_never_share_a_chunk(rows: int, width: int, ranges: int, stored: str) -> None:
    step = -(-rows // ranges // 128) * 128 or 128
    cuts = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    if len(cuts) < 2:
        return
    block = int(stored.removeprefix("blocks of ")) if "blocks" in stored else 1
    length = -(-rows // 128) * 128 if stored == "padded" else -(-rows // block)
    spec = TensorSpec("x", "U8", (length, width))
    size = chunk_bytes(spec, cuts)
    for start, _ in cuts[1:]:
        assert start // block * width % size == 0
    assert size <= zarr_store.CHUNK_BYTES


@settings(deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(0, 40), max_size=3), limit=st.integers(1, 90))
def test_bytes_in_any_order_become_whole_chunks(data: st.DataObject, shape: list[int], limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zarr_store, "CHUNK_BYTES", limit)
        objects = Memory()
        patch.setattr(zarr_store, "objects_at", lambda root: objects)
        slot = Slot("x", "BF16", tuple(shape), "/store.zarr/3", 77)
        content = bytes(index * 31 % 251 for index in range(slot.nbytes))
        size = chunk_bytes(slot)
        assert 1 <= size <= max(limit, 1)
        cuts = sorted(data.draw(st.sets(st.integers(0, slot.nbytes), max_size=6)) | {0, slot.nbytes})
        pieces = data.draw(st.permutations(list(itertools.pairwise(cuts))))
        writer = ArrayWriter()
        for start, stop in pieces:
            writer.write(slot, start, memoryview(content[start:stop]))
        writer.finish()
        count = -(-slot.nbytes // size)
        assert set(objects.contents) == {f"3/77/c/{number}" for number in range(count)}
        whole = b"".join(bytes(read_chunk(objects, "3/77", number, size)) for number in range(count))
        assert whole[: slot.nbytes] == content
        assert not any(whole[slot.nbytes :])


class Memory:
    """Objects of a store that is none."""

    root = "memory"

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}

    def read(self, key: str, most: int) -> bytes | None:
        return self.contents.get(key)

    def write(self, key: str, content: bytes | bytearray | memoryview) -> None:
        self.contents[key] = bytes(content)

    def find(self) -> Iterator[str]:
        yield from self.contents

    def remove(self, keys: Any) -> None:
        for key in list(keys):
            self.contents.pop(key, None)

    def free(self) -> int | None:
        return None


def test_a_chunk_that_a_task_leaves_unfinished_is_an_error() -> None:
    writer = ArrayWriter()
    writer.write(Slot("x", "U8", (8,), "/nowhere.zarr/1", 64), 2, memoryview(b"four"))
    with pytest.raises(SinkError, match="chunk 0 has 4 of 8 bytes"):
        writer.finish()


def test_chunks_that_wait_for_bytes_count_as_memory(tmp_path: Path, checkpoint: Path) -> None:
    quantized = Pipeline().read(checkpoint).quantize("mxfp8")
    layers = quantized.write(tmp_path / "out.zarr", compute=False).plan.quantized
    files = quantized.write(tmp_path / "out.safetensors", compute=False).plan.quantized
    for layer, other in zip(layers, files, strict=True):
        assert writing_bytes(layer.slots, layer.parts) >= sum(slot.nbytes for slot in layer.slots)
        assert writing_bytes(other.slots, other.parts) == 0


# What is damaged or lacking


def tensor_chunks(store: Path) -> list[Path]:
    return sorted(path for path in (store / "1").rglob("*") if path.parent.name == "c")


def test_a_changed_chunk_is_named_and_nothing_appears(stored: Path, tmp_path: Path) -> None:
    for path in tensor_chunks(stored)[::4]:
        before = path.read_bytes()
        path.write_bytes(before[:-5] + bytes([before[-5] ^ 1]) + before[-4:])
        with pytest.raises(CheckpointError, match=r"chunk 0 of 1 of tensor '.*' is not what was written"):
            assemble(str(stored), str(tmp_path / "new" / "folder"))
        path.write_bytes(before)
    assert not (tmp_path / "new").exists()
    assemble(str(stored), str(tmp_path / "new"))


def test_a_missing_or_short_chunk_is_named(stored: Path, tmp_path: Path) -> None:
    path = tensor_chunks(stored)[0]
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"has {len(content) - 1} bytes, {len(content)} belong there"):
        assemble(str(stored), str(tmp_path / "made"))
    path.write_bytes(content * 2)
    with pytest.raises(CheckpointError, match="has more than"):
        assemble(str(stored), str(tmp_path / "made"))
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        assemble(str(stored), str(tmp_path / "made"))
    assert not (tmp_path / "made").exists()


def test_a_chunk_of_another_run_is_found_by_what_tasks_reported(stored: Path, tmp_path: Path) -> None:
    shard = OutputStore(objects_at(str(stored))).shard(1)
    tensor = max(shard.tensors, key=lambda tensor: tensor.ref.nbytes)
    write_chunk(objects_at(str(stored)), tensor.array, 0, bytearray(tensor.chunk + 4))
    with pytest.raises(CheckpointError, match=f"{tensor.ref.name}.*have the checksum"):
        assemble(str(stored), str(tmp_path / "made"))
    assert not (tmp_path / "made").exists()


def change(store: Path, **changes: Any) -> None:
    """Changes entries of a store's table; keys with a dot are of its first shard."""
    path = store / "zarr.json"
    document = json.loads(path.read_text())
    values = document["attributes"][ENTRY]
    for key, value in changes.items():
        where = values["shards"][0] if key.startswith("shard_") else values
        where[key.removeprefix("shard_")] = value
    path.write_text(json.dumps(document))


HOSTILE: list[dict[str, Any]] = [
    *({"shard_name": name} for name in (
        "../out.safetensors", "/tmp/out.safetensors", "a/b.safetensors", "a\\b.safetensors", "..", "",
        "con.safetensors", ".safetensors", "x.bin", "a\0.safetensors", 5, None, "x" * 300 + ".safetensors",
        "C:x.safetensors",
    )),
    *({"shard_size": size} for size in (-1, 1 << 80, 0, 100, "5", 1.5, True, 1 << 61)),
    *({"shard_head": size} for size in (0, 1, 7, 8, 1 << 40, 500)),
    *({"shard_chunks": size} for size in (0, 1, 1 << 62)),
    *({"sidecars": files} for files in (
        [{"name": "../x", "nbytes": 1}], [{"name": "model-00001-of-00002.safetensors", "nbytes": 1}], [5], "x", None,
        [{"name": "x.part", "nbytes": 1}], [{"name": "config.json", "nbytes": 1 << 61}], [{"name": "config.json"}],
        [{"name": "model.safetensors.index.json", "nbytes": 4}],
        [{"name": "a", "nbytes": 1}, {"name": "A", "nbytes": 1}],
    )),
    *({"shards": files} for files in ([], None, [[]], {})),
    *({"checksums": sums} for sums in ([], [1], [1, 1], [1 << 61, 1], "x", [-1, 3])),
    {"version": 2}, {"version": None}, {"plan": 5}, {"split": "yes"}, {"program": []},
]  # fmt: skip


@pytest.mark.parametrize("changes", HOSTILE, ids=map(str, range(len(HOSTILE))))
def test_tables_that_lie_are_refused(changes: dict[str, Any], stored: Path, tmp_path: Path) -> None:
    change(stored, **changes)
    before = files_below(tmp_path)
    with pytest.raises((CheckpointError, PlanError)) as refused:
        assemble(str(stored), str(tmp_path / "out" / "made"))
    assert len(str(refused.value)) < 1000
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("text", [
    b"", b"[", b"{}", b"[]", b'{"attributes": 5}', b'{"attributes": {"quantloom_output": 5}}', b"[" * 100_000,
    b'{"attributes": {"quantloom_output": []}}',
])  # fmt: skip
def test_groups_that_are_no_output_are_refused(text: bytes, stored: Path, tmp_path: Path, checkpoint: Path) -> None:
    (stored / "zarr.json").write_bytes(text)
    with pytest.raises(CheckpointError):
        assemble(str(stored), str(tmp_path / "made"))
    with pytest.raises(PlanError, match="write somewhere else"):
        Pipeline().read(checkpoint).quantize("fp8").write(stored, overwrite=True)
    assert (stored / "zarr.json").read_bytes() == text


@pytest.mark.parametrize("key", ["files", "checksums"])
def test_damaged_headers_and_lists_never_write_outside(key: str, tmp_path: Path) -> None:
    """Bytes of the two arrays change, with a CRC that fits."""
    source = write_file(tmp_path / "in" / "m.safetensors", {"a.weight": torch.ones(64, 64), "b": torch.zeros(0)})
    store, made = tmp_path / "out.zarr", tmp_path / "made"
    Pipeline().read(source).quantize("fp8").write(store)
    objects = objects_at(str(store))
    table = read_table(objects)
    assert table is not None
    assert table.checksums is not None
    total = table.files_bytes if key == "files" else sum(table.checksums)
    good = bytes(read_chunk(objects, key, 0, total))
    before = files_below(tmp_path)

    @settings(deadline=None, max_examples=80)
    @given(st.lists(st.tuples(st.integers(0, total - 1), st.sampled_from(b'012789"[]{},:-e/.a \x00\xff')), min_size=1))
    def check(changes: list[tuple[int, int]]) -> None:
        content = bytearray(good)
        for place, value in changes:
            content[place] = value
        write_chunk(objects, key, 0, content + bytes(4))
        try:
            assemble(str(store), str(made / "x.safetensors"), overwrite=True)
        except QuantloomError:
            assert files_below(tmp_path) == before
        else:
            assert files_below(tmp_path) - before == {"made/x.safetensors"}
            (made / "x.safetensors").unlink()
            made.rmdir()

    check()


# Stores that exist


class Broken(Exception):
    """What a task dies of."""


def interrupted(flow: Flow, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """A run that dies once tasks wrote so often."""
    with monkeypatch.context() as patch:
        left, whole = [after], ArrayWriter.write

        def write(self: ArrayWriter, slot: Slot, offset: int, content: memoryview) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Broken("the machine is gone")
            whole(self, slot, offset, content)

        patch.setattr("quantloom.stages.writing.ArrayWriter.write", write)
        with pytest.raises(Broken) as died:
            flow.compute()
        assert "are finished and kept in" in died.value.__notes__[0]


@pytest.fixture
def one_by_one(tmp_path: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> Flow:
    """A conversion into ``out.zarr`` whose layers are tasks."""
    monkeypatch.setattr(graph, "BATCH_BYTES", 1)
    quantized = Pipeline(scheduler="sync").read(sharded).quantize("mxfp8")
    quantized.write(tmp_path / "direct")
    return quantized.write(tmp_path / "out.zarr", compute=False)


def test_a_store_that_is_not_complete_says_so(
    one_by_one: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(one_by_one, monkeypatch, after=20)
    lacking = r"is not complete: [1-9]\d? of [1-9]\d tensors lack bytes; run the conversion into this store again"
    with pytest.raises(CheckpointError, match=lacking):
        assemble(str(tmp_path / "out.zarr"), str(tmp_path / "made"))


@pytest.mark.parametrize("damage", ["none", "lost", "changed"])
def test_finished_layers_are_not_done_again(
    damage: str, one_by_one: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for those whose chunks are lost; of what was changed, only who asks to verify hears before the assembly."""
    store = tmp_path / "out.zarr"
    fresh = Flow(replace(one_by_one.recipe, run=replace(one_by_one.recipe.run, verify=damage == "changed")))
    interrupted(one_by_one, monkeypatch, after=20)
    finished = {key for line in StoreLog(objects_at(str(store))).read().splitlines()[1:]
                for key in [json.loads(line.partition(b" ")[2])["done"]["name"]]}  # fmt: skip
    victim = max((plan for plan in fresh.plan.layers if plan.layer.name in finished), key=lambda plan: plan.nbytes_out)
    slot = max(victim.slots, key=lambda slot: slot.nbytes)
    chunk = store / "1" / str(slot.start) / "c" / "0"
    if damage == "lost":
        chunk.unlink()
    if damage == "changed":
        chunk.write_bytes(bytes(chunk.stat().st_size))
    done: list[Receipt] = []
    watcher = Silent()
    monkeypatch.setattr(watcher, "advance", done.extend)
    report = fresh.compute(progress=watcher)
    redone = damage != "none"
    assert len(done) == len(fresh.plan.layers) - len(finished) + redone
    assert any("an earlier run is continued" in note for note in report.notes)
    assert any(f"{victim.layer.name}: chunk 0 of {slot.name}" in note for note in report.notes) == redone
    assemble(str(store), str(tmp_path / "made"))
    assert listing(tmp_path / "made") == listing(tmp_path / "direct")
    assert not (store / "journal" / "00000001.jsonl").exists()


@pytest.mark.parametrize("what", ["files/c/0", "files/zarr.json", "1/zarr.json", "an array", "a constant"])
@pytest.mark.parametrize("verify", [False, True])
def test_what_describes_a_store_is_written_again(
    verify: bool, what: str, one_by_one: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost; or, for who asks to verify, changed."""
    interrupted(one_by_one, monkeypatch, after=20)
    store = tmp_path / "out.zarr"
    constant = next(
        slot for plan in one_by_one.plan.layers for slot in plan.slots if slot.name in plan.known and slot.nbytes
    )
    array = f"{constant.path.rpartition('/')[2]}/{constant.start}"
    path = store / {"an array": f"{array}/zarr.json", "a constant": f"{array}/c/0"}.get(what, what)
    before = path.read_bytes()
    if verify:
        path.write_bytes(bytes(len(before)))
    else:
        path.unlink()
    Flow(replace(one_by_one.recipe, run=replace(one_by_one.recipe.run, verify=verify))).compute()
    assert path.read_bytes() == before
    assemble(str(store), str(tmp_path / "made"))
    assert listing(tmp_path / "made") == listing(tmp_path / "direct")


def test_verify_finds_a_chunk_of_another_tensor(
    one_by_one: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own checksum is right: what tasks reported is not."""
    interrupted(one_by_one, monkeypatch, after=20)
    chunks = sorted((tmp_path / "out.zarr").glob("1/*/c/*"), key=lambda path: path.stat().st_size)
    one, other = chunks[-2:]
    assert len(one.read_bytes()) == len(other.read_bytes())
    assert one.read_bytes() != other.read_bytes()
    one.write_bytes(other.read_bytes())
    looking = Flow(replace(one_by_one.recipe, run=replace(one_by_one.recipe.run, verify=True)))
    report = looking.compute()
    assert any("was written: done again" in note for note in report.notes)
    assemble(str(tmp_path / "out.zarr"), str(tmp_path / "made"))
    assert listing(tmp_path / "made") == listing(tmp_path / "direct")


def test_what_verify_found_is_not_forgotten(
    one_by_one: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that reads what is finished, and stops before it did the damaged layer again."""
    interrupted(one_by_one, monkeypatch, after=20)
    store = tmp_path / "out.zarr"
    looking = Flow(replace(one_by_one.recipe, run=replace(one_by_one.recipe.run, verify=True)))
    chunk = max((path for path in store.glob("1/*/c/*") if path.is_file()), key=lambda path: path.stat().st_size)
    chunk.write_bytes(bytes(chunk.stat().st_size))
    interrupted(looking, monkeypatch, after=0)
    one_by_one.compute()
    assemble(str(store), str(tmp_path / "made"))
    assert listing(tmp_path / "made") == listing(tmp_path / "direct")


def test_an_unfinished_store_of_another_plan_is_never_replaced(
    one_by_one: Flow, tmp_path: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(one_by_one, monkeypatch, after=20)
    before = listing(tmp_path / "out.zarr")
    words = r"format 'mxfp8' -> 'fp8'.*; convert as that run did to continue it, or delete it"
    with pytest.raises(PlanError, match=words):
        Pipeline().read(sharded).quantize("fp8").write(tmp_path / "out.zarr", overwrite=True)
    assert listing(tmp_path / "out.zarr") == before


def test_a_source_that_changes_leaves_nothing(
    one_by_one: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is finished is of a source that is gone: no later run could go on with it."""

    def changes(source: Source) -> None:
        os.utime(str(source.files[0]), ns=(1, 1))
        check_unchanged(source)

    monkeypatch.setattr(zarr_sink, "check_unchanged", changes)
    with pytest.raises(CheckpointError, match="changed while it was converted"):
        one_by_one.compute()
    assert not (tmp_path / "out.zarr").exists()


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path: Path, sharded: Path) -> None:
    tensors = make_tensors()
    tensors["odd.weight"][0, 0] = float("nan")
    source = write_file(tmp_path / "bad" / "x.safetensors", tensors)
    with pytest.raises(NonFiniteError):
        Pipeline().read(source).quantize("fp8").write(tmp_path / "out.zarr")
    assert not (tmp_path / "out.zarr").exists()
    with pytest.raises(PlanError, match="on-error keep"):
        Pipeline(on_error="keep").read(sharded).quantize("fp8").write(tmp_path / "out.zarr")
    with pytest.raises(PlanError, match="nothing to continue"):
        Pipeline(resume="require").read(sharded).quantize("fp8").write(tmp_path / "out.zarr")


def test_a_store_of_another_plan_is_never_touched(stored: Path, tmp_path: Path, sharded: Path) -> None:
    before = listing(stored)
    with pytest.raises(PlanError, match="store of another plan"):
        Pipeline().read(sharded).quantize("fp8").write(stored)
    with pytest.raises(PlanError, match="exists already and is complete: `quantloom assemble"):
        Pipeline().read(sharded).quantize("mxfp8").write(stored, shard_size=150_000)
    assert listing(stored) == before


def test_overwriting_takes_what_is_ours_and_nothing_else(stored: Path, tmp_path: Path, sharded: Path) -> None:
    (stored / "notes.txt").write_text("mine")
    (stored / "1" / "2" / "3").mkdir(parents=True, exist_ok=True)
    Pipeline().read(sharded).quantize("fp8").write(stored, overwrite=True)
    assert (stored / "notes.txt").read_text() == "mine"
    Pipeline().read(sharded).quantize("fp8").write(tmp_path / "direct")
    assemble(str(stored), str(tmp_path / "made"))
    assert listing(tmp_path / "made") == listing(tmp_path / "direct")


def test_folders_and_files_of_others_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    quantized = Pipeline().read(checkpoint).quantize("fp8")
    (tmp_path / "full.zarr").mkdir()
    (tmp_path / "full.zarr" / "thesis.doc").write_text("mine")
    with pytest.raises(PlanError, match=r"holds thesis.doc, which is no part of a store"):
        quantized.write(tmp_path / "full.zarr", overwrite=True)
    (tmp_path / "file.zarr").write_text("mine")
    with pytest.raises(PlanError, match="is a file"):
        quantized.write(tmp_path / "file.zarr", overwrite=True)
    with pytest.raises(PlanError, match="extract-lora"):
        quantized.lora(rank=4).write(tmp_path / "new.zarr")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "full.zarr", "file.zarr"}


def test_what_exists_is_not_assembled_over(stored: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    assemble(str(stored), str(made))
    before = listing(made)
    with pytest.raises(PlanError, match="exists already; pass --overwrite"):
        assemble(str(stored), str(made))
    assemble(str(stored), str(made), overwrite=True)
    assert listing(made) == before
    (made / "other.safetensors").write_text("mine")
    with pytest.raises(PlanError, match=r"holds other\.safetensors"):
        assemble(str(stored), str(made), overwrite=True)


def test_an_assembly_goes_on_with_files_that_have_no_name(stored: Path, tmp_path: Path) -> None:
    """It was killed while it gave files their names: those are whole, and are left alone."""
    made = tmp_path / "made"
    assemble(str(stored), str(made))
    before = listing(made)
    first, second, *_ = sorted(made.glob("*.safetensors"))
    first.unlink()
    stamp = second.stat().st_mtime_ns
    assemble(str(stored), str(made))
    assert listing(made) == before
    assert second.stat().st_mtime_ns == stamp
    first.unlink()
    content = bytearray(second.read_bytes())
    content[20] ^= 1
    second.write_bytes(content)
    with pytest.raises(PlanError, match=rf"{second.name}: exists already; pass --overwrite"):
        assemble(str(stored), str(made))
    second.unlink()
    second.symlink_to("nowhere")
    with pytest.raises(PlanError, match=rf"{second.name}: exists already; pass --overwrite"):
        assemble(str(stored), str(made))


def replaced_halfway(stored: Path, made: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """An older model in ``made`` of which an assembly that was killed had replaced one file; what it was to become."""
    Pipeline().read(sharded).quantize("mxfp8").write(made, shard_size=100_000)
    again = stored.with_name("again.zarr")
    Pipeline().read(sharded).quantize("mxfp8", rounding="learned").write(again, shard_size=100_000)
    assemble(str(again), str(made.with_name("whole")))
    renamed: list[str] = []

    def die(src: Any, dst: Any) -> None:
        if Path(src).name.endswith(".part") and Path(dst).suffix == ".safetensors":
            renamed.append(Path(dst).name)
            if len(renamed) == 2:
                shutil.copytree(made, made.with_name("killed"))
        replace_file(src, dst)

    replace_file = commit.replace
    with monkeypatch.context() as patch:
        patch.setattr(commit, "replace", die)
        assemble(str(again), str(made), overwrite=True)
    shutil.rmtree(made)
    made.with_name("killed").rename(made)
    assert {path.suffix for path in made.iterdir()} >= {".part", ".previous", ".replacing", ".safetensors"}
    return listing(made.with_name("whole"))


def test_an_assembly_that_was_replacing_files_is_finished(
    stored: Path, tmp_path: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All data was there: the new files get their names, whatever the next assembly is asked to do."""
    made = tmp_path / "made"
    whole = replaced_halfway(stored, made, sharded, monkeypatch)
    with pytest.raises(PlanError, match="exists already"):
        assemble(str(stored.with_name("again.zarr")), str(made))
    assert {name: value for name, value in listing(made).items() if not name.endswith(".lock")} == whole


@pytest.mark.parametrize("harm", ["gone", "changed"])
def test_an_assembly_that_lost_a_part_is_undone(
    harm: str, stored: Path, tmp_path: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old and new files are never left beside each other."""
    made = tmp_path / "made"
    whole = replaced_halfway(stored, made, sharded, monkeypatch)
    part = sorted(made.glob("*.part"))[0]
    if harm == "gone":
        part.unlink()
    else:
        part.write_bytes(bytes(part.stat().st_size))
    with pytest.raises(PlanError, match="exists already"):
        assemble(str(stored.with_name("again.zarr")), str(made))
    old = tmp_path / "old"
    Pipeline().read(sharded).quantize("mxfp8").write(old, shard_size=100_000)
    left = {name: value for name, value in listing(made).items() if not name.endswith((".lock", ".part"))}
    assert left == listing(old)
    assemble(str(stored.with_name("again.zarr")), str(made), overwrite=True)
    assert listing(made) == whole


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes a pipe")
def test_a_pipe_in_the_place_of_a_marker_is_not_waited_for(stored: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    os.mkfifo(made / ".quantloom.replacing")
    with pytest.raises(SinkError, match=r"cannot be read .*not a regular file"):
        assemble(str(stored), str(made))


@pytest.mark.parametrize("text", ["", "{}", "[[1, 2, 3]]", '[["../x", 1, ""]]', '[["a", 1e999, ""]]', "[" * 10_000,
                                  '[["", 1, ""]]', '[["..", 1, ""]]', '[["/x", 1, ""]]', '[["a/../../x", 1, ""]]'])
def test_markers_that_are_none_are_refused(text: str, stored: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    others = [tmp_path / name for name in ("x.part", "x.previous", "made.part", "made.previous")]
    for path in others:
        path.write_text("mine")
    (made / ".quantloom.replacing").write_text(text)
    if text == "{}":  # nothing was being replaced
        assemble(str(stored), str(made))
        return
    with pytest.raises(SinkError, match=r"\.quantloom\.replacing: should say which files .* and remove it"):
        assemble(str(stored), str(made))
    assert [path.read_text() for path in others] == ["mine"] * 4
    assert [path.name for path in made.iterdir() if path.suffix != ".lock"] == [".quantloom.replacing"]


def test_commands(cli: Callable[..., Ran], tmp_path: Path, sharded: Path) -> None:
    store, made = tmp_path / "out.zarr", tmp_path / "made"
    ran = cli("convert", sharded, store, "--format", "nvfp4", "--quiet")
    assert ran.status == 0
    for command in (("inspect", store), ("verify", store, "--against", sharded)):
        ran = cli(*command)
        assert ran.status == 1
        assert "quantloom assemble" in " ".join(ran.err.split())
    ran = cli("assemble", store, made)
    assert ran.status == 0
    assert "all checksums fit" in ran.out
    assert cli("verify", made, "--against", sharded).status == 0
    ran = cli("assemble", store, made, "--overwrite", "--json", "--workers", "1")
    assert json.loads(ran.out)["files"] == ["model.safetensors", "README.md", "config.json", "tokenizer.json"]
    assert cli("assemble", store, tmp_path / "other.zarr").status == 2
    assert cli("assemble", made, tmp_path / "x").status == 2
    assert cli("assemble", store, made, "--workers", "0").status == 2
    report = Pipeline().read(sharded).quantize("fp8").write(tmp_path / "b.zarr")
    assert f"make files of it: quantloom assemble {tmp_path / 'b.zarr'} b" in report.summary()
    assert report.verify_command == f"quantloom verify b --against {sharded}"


def test_dry_runs_look_at_stores(cli: Callable[..., Ran], tmp_path: Path, sharded: Path, stored: Path) -> None:
    ran = cli("plan", sharded, tmp_path / "new.zarr", "--format", "fp8")
    assert "would be refused" not in ran.out
    ran = cli("plan", sharded, stored, "--format", "fp8")
    assert "the run would be refused" in ran.out
    assert not (tmp_path / "new.zarr").exists()


# URLs


def test_urls_that_are_no_store_are_refused() -> None:
    for url in ("s3://bucket/out", "s3://bucket/out.safetensors", "memory://x/y"):
        with pytest.raises(UsageError, match=r"quantloom assemble"):
            Pipeline().read("x").quantize("fp8").write(url)
    for url in ("s3://key:secret@bucket/out.zarr", "s3://bucket/out.zarr?token=secret"):
        with pytest.raises(UsageError) as refused:
            Pipeline().read("x").quantize("fp8").write(url)
        assert "secret" not in str(refused.value)


def test_a_store_in_memory_and_back(tmp_path: Path, sharded: Path) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    quantized = Pipeline().read(sharded).quantize("int8")
    try:
        quantized.write("memory://models/out.zarr")
        quantized.write(tmp_path / "direct")
        assemble("memory://models/out.zarr", str(tmp_path / "made"))
        assemble("memory://models/out.zarr", "memory://models/made")
        there = {name.rpartition("/")[2]: fs.cat_file(name) for name in fs.find("/models/made")}
        assert listing(tmp_path / "made") == listing(tmp_path / "direct")
        assert there == {path.name: path.read_bytes() for path in (tmp_path / "direct").iterdir()}
        with pytest.raises(PlanError, match="another plan"):
            Pipeline().read(sharded).quantize("fp8").write("memory://models/out.zarr")
    finally:
        fs.rm("/models", recursive=True)


def test_writes_are_repeated_when_the_store_is_busy(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    from quantloom.formats import retries

    monkeypatch.setattr(retries, "_FIRST_WAIT", 0.001)
    whole, calls = MemoryFileSystem.pipe_file, Counter[str]()

    def busy(self: Any, path: str, value: bytes, **options: Any) -> Any:
        calls[path] += 1
        if calls[path] % 3:
            raise ConnectionResetError("reset by peer")
        return whole(self, path, value, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", busy)
    try:
        Pipeline(scheduler="sync").read(checkpoint).quantize("fp8").write("memory://busy/out.zarr")
        assemble("memory://busy/out.zarr", str(tmp_path / "made.safetensors"))

        def denied(self: Any, path: str, value: bytes, **options: Any) -> Any:
            raise PermissionError(13, "denied")

        monkeypatch.setattr(MemoryFileSystem, "pipe_file", denied)
        with pytest.raises(SinkError, match="cannot be written"):
            Pipeline(scheduler="sync").read(checkpoint).quantize("fp8").write("memory://busy/other.zarr")
    finally:
        fsspec.filesystem("memory").rm("/busy", recursive=True)


def test_a_folder_that_takes_no_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("a file")
    with pytest.raises(SinkError, match="cannot be written"):
        FolderObjects(str(tmp_path)).write("a/b", b"x")
    assert files_below(tmp_path) == {"a"}


def test_a_table_survives_its_json(stored: Path) -> None:
    objects = objects_at(str(stored))
    table = read_table(objects)
    assert table is not None
    write_table(objects, table)
    assert read_table(objects) == table
