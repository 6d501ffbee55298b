"""Hostile stores: whatever tables, headers, lists, journals and chunks of a store say, an error or the right files.

What is forged fits its own lengths and checksums, so that it is looked at for what it says. QUANTLOOM_FUZZ=5000 looks
longer.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import listing, write_folder
from hostile import RANDOM, VALUES, bounded, changed, damaged, fuzz, stop_after
from hypothesis import given
from hypothesis import strategies as st

from quantloom import Flow, Pipeline
from quantloom.flow.assemble import assemble
from quantloom.formats import manifest, output_store, store_table
from quantloom.formats.checksums import checksum
from quantloom.formats.errors import QuantloomError
from quantloom.formats.objects import Objects, objects_at
from quantloom.formats.safetensors import read_header
from quantloom.formats.store_table import Table, read_table


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, a complete store and an unfinished one of it, what both become, and a file that nobody may touch."""
    folder = tmp_path_factory.mktemp("stores")
    write_folder(folder / "in")
    (folder / "in" / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "canary").write_text("alive")
    flow_to(folder / "complete.zarr", folder).compute()
    assemble(str(folder / "complete.zarr"), str(folder / "whole"))
    stop_after(flow_to(folder / "half.zarr", folder), 6)
    return folder


@pytest.fixture(scope="module")
def stores(sandbox: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two stores are kept; runs get a copy, at one place."""
    kept = tmp_path_factory.mktemp("kept")
    for name in ("complete", "half"):
        (sandbox / f"{name}.zarr").rename(kept / name)
    return kept


_WRITTEN = ("out.zarr", "out.zarr.lock", "made")


def flow_to(store: Path, folder: Path, **how: Any) -> Flow:
    flow = Pipeline(scheduler="sync", **how).read(folder / "in").quantize("nvfp4")
    return flow.write(store, shard_size="100KB", compute=False)


def laid(sandbox: Path, kept: Path) -> Path:
    """A copy of a store at the one place where runs find it."""
    store = sandbox / "out.zarr"
    shutil.rmtree(store, ignore_errors=True)
    shutil.rmtree(sandbox / "made", ignore_errors=True)
    return Path(shutil.copytree(kept, store))


def outside(sandbox: Path) -> dict[str, Any]:
    """Everything that no run here may touch."""
    return {name: value for name, value in listing(sandbox).items() if name.split("/")[0] not in _WRITTEN}


# -- forging -----------------------------------------------------------------------------------------------------------


class Forger:
    """The parts of a store's description, to be changed one by one and put together so that lengths fit."""

    def __init__(self, objects: Objects, chance: random.Random, hostile: Any) -> None:
        self.objects, self._chance, self._hostile = objects, chance, hostile
        table = read_table(objects)
        assert table is not None
        self.table: Table = table
        place, self.heads, self.rows = 0, [], []
        for shard in table.shards:
            self.heads.append(self._read(place, shard.head))
            self.rows.append(self._read(place + shard.head, shard.chunks))
            place += shard.head + shard.chunks
        self.sidecars = self._read(place, table.files_bytes - place)

    def _read(self, start: int, nbytes: int) -> bytes:
        return output_store._read_array(self.objects, "files", self.table.files_bytes, start, nbytes)

    def _changed(self, text: bytes | str) -> bytes:
        value = changed(json.loads(text), self._chance, self._hostile)
        return json.dumps(value).encode(errors="surrogatepass")

    def headers(self) -> None:
        """A header says something else."""
        number = self._chance.randrange(len(self.heads))
        self.heads[number] = _head(self._changed(self.heads[number][8:]))

    def manifests(self) -> None:
        """The room for checksums in a header does."""
        number = self._chance.randrange(len(self.heads))
        header = json.loads(self.heads[number][8:])
        entry = self._changed(header["__metadata__"][manifest.KEY]).decode()
        header["__metadata__"][manifest.KEY] = entry
        self.heads[number] = _head(json.dumps(header).encode())

    def lists(self) -> None:
        """The list of a shard's tensors does."""
        number = self._chance.randrange(len(self.rows))
        self.rows[number] = self._changed(self.rows[number])

    def write(self) -> None:
        """Everything, with new lengths in the table."""
        shards = tuple(
            store_table.ShardEntry(shard.name, shard.size, len(head), len(rows))
            for shard, head, rows in zip(self.table.shards, self.heads, self.rows, strict=True)
        )
        content = b"".join(part for pair in zip(self.heads, self.rows, strict=True) for part in pair) + self.sidecars
        output_store._write_array(self.objects, "files", content)
        store_table.write_table(self.objects, output_store.replace(self.table, shards=shards))

    def tables(self) -> None:
        """The table itself does; nothing else is written."""
        document = json.loads(self.objects.read("zarr.json", 1 << 20) or b"")
        entry = document["attributes"][store_table.ENTRY]
        document["attributes"][store_table.ENTRY] = changed(entry, self._chance, self._hostile)
        self.objects.write("zarr.json", json.dumps(document).encode(errors="surrogatepass"))

    def checksums(self) -> None:
        """A list of checksums does; nothing else is written."""
        lengths = self.table.checksums
        assert lengths is not None
        place, texts = 0, []
        for length in lengths:
            texts.append(output_store._read_array(self.objects, "checksums", sum(lengths), place, length))
            place += length
        number = self._chance.randrange(len(texts))
        texts[number] = self._changed(texts[number])
        output_store._write_array(self.objects, "checksums", b"".join(texts))
        store_table.write_table(self.objects, output_store.replace(self.table, checksums=tuple(map(len, texts))))


def _head(text: bytes) -> bytes:
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def forged(objects: Objects, kind: str, chance: random.Random, hostile: Any) -> None:
    forger = Forger(objects, chance, hostile)
    getattr(forger, kind)()
    if kind in ("headers", "manifests", "lists"):
        forger.write()


# -- what must hold ----------------------------------------------------------------------------------------------------


def assembled(sandbox: Path, store: Path, single: bool) -> bool:
    """Makes files of a store: none at all, or all of them whole and beside each other."""
    before, made = outside(sandbox), sandbox / "made"
    done = False
    with bounded():
        assemble(str(store), str(made / "x.safetensors" if single else made))
        done = True
    assert outside(sandbox) == before
    found = sorted(made.rglob("*")) if made.exists() else []
    assert bool(found) == done
    assert all(path.is_file() and path.parent == made for path in found)
    for path in found:
        if path.suffix == ".safetensors":
            read_header(path)
    return done


@fuzz
@given(RANDOM, VALUES, st.sampled_from(["tables", "headers", "manifests", "lists", "checksums"]), st.booleans())
def test_forged_stores(
    sandbox: Path, stores: Path, chance: random.Random, hostile: Any, kind: str, single: bool
) -> None:
    store = laid(sandbox, stores / "complete")
    forged(objects_at(str(store)), kind, chance, hostile)
    assembled(sandbox, store, single)


def harmed(store: Path, chance: random.Random) -> None:
    """A file of the store is changed, gone, empty, another one's, or a folder."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    path, kind = chance.choice(files), chance.random()
    if kind < 0.5:
        path.write_bytes(damaged(path.read_bytes(), chance))
    elif kind < 0.7:
        path.unlink()
    elif kind < 0.8:
        path.write_bytes(b"")
    elif kind < 0.9:
        path.write_bytes(chance.choice(files).read_bytes())
    else:
        path.unlink()
        path.mkdir()


@fuzz
@given(RANDOM)
def test_damaged_stores(sandbox: Path, stores: Path, chance: random.Random) -> None:
    """Damage that fits no checksum is found, or meets what nobody needs: what appears is right."""
    store = laid(sandbox, stores / "complete")
    harmed(store, chance)
    if assembled(sandbox, store, single=False):
        assert listing(sandbox / "made") == listing(sandbox / "whole")


def continued(sandbox: Path, store: Path) -> None:
    """The conversion into a store goes on: it is refused, or the files are right."""
    before = outside(sandbox)
    done = False
    try:
        flow_to(store, sandbox, verify=True).compute()
        done = True
    except QuantloomError:
        pass
    assert outside(sandbox) == before
    if done:
        assert assembled(sandbox, store, single=False)
        assert listing(sandbox / "made") == listing(sandbox / "whole")


def test_stores_that_nobody_harmed(sandbox: Path, stores: Path) -> None:
    """They are complete, and go on: otherwise the other tests would show nothing."""
    assert assembled(sandbox, laid(sandbox, stores / "complete"), single=True)
    store = laid(sandbox, stores / "half")
    assert flow_to(store, sandbox, verify=True).compute().nbytes_resumed > 0
    assert assembled(sandbox, store, single=False)
    assert listing(sandbox / "made") == listing(sandbox / "whole")


@fuzz
@given(RANDOM)
def test_damaged_stores_go_on_right_or_not_at_all(sandbox: Path, stores: Path, chance: random.Random) -> None:
    store = laid(sandbox, stores / "half")
    harmed(store, chance)
    continued(sandbox, store)


@fuzz
@given(RANDOM, VALUES, st.sampled_from(["tables", "headers", "manifests", "lists"]))
def test_forged_stores_go_on_right_or_not_at_all(
    sandbox: Path, stores: Path, chance: random.Random, hostile: Any, kind: str
) -> None:
    store = laid(sandbox, stores / "half")
    forged(objects_at(str(store)), kind, chance, hostile)
    continued(sandbox, store)


@fuzz
@given(RANDOM, VALUES)
def test_forged_journals_of_stores(sandbox: Path, stores: Path, chance: random.Random, hostile: Any) -> None:
    """A line says something else, its checksum right; or the journal has other files, or none."""
    store = laid(sandbox, stores / "half")
    paths = sorted((store / "journal").iterdir())
    path = chance.choice(paths)
    values = [json.loads(line.partition(b" ")[2]) for line in path.read_bytes().splitlines()]
    place = chance.randrange(len(values))
    values[place] = changed(values[place], chance, hostile)
    kind = chance.random()
    if kind < 0.7:
        path.write_bytes(b"".join(_line(value) for value in values))
    elif kind < 0.8:
        path.unlink()
    elif kind < 0.9:
        shutil.copy(path, path.with_name(f"{chance.choice([0, 99_999_999, 10**20])}.jsonl"))
    else:
        path.rename(path.with_name("elsewhere.jsonl"))
    continued(sandbox, store)


def _line(value: Any) -> bytes:
    body = json.dumps(value).encode()
    return b"%s %s\n" % (checksum(body).encode(), body)
