"""The arrays of a statistics store, in Zarr v3: written and read block of rows by block of rows, merged from others.

    <store>/zarr.json                                  the table
    <store>/<layer>/<generation>/hessian    float32    (n, n), in chunks of whole rows
                                 diagonal   float64    (n,): E[x^2]
                                 mean       float64    (n,): E[x]
                                 histogram  int64      (bins,) of |x|

``<layer>`` is the first layer that gets the input, by its key in the checkpoint. Every write makes a new generation,
the table then names it, and only then the old one goes: at any moment the store is what the table says.
"""

from __future__ import annotations

import os
import shutil
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

from ..formats.errors import CheckpointError, PlanError, UsageError
from .estimates import Estimate, merged
from .statistics_arrays import RowBlocks, open_array
from .statistics_table import METADATA, InputEntry, Table, make_table, write_table

if TYPE_CHECKING:
    from .statistics import Statistics

BLOCK_BYTES = 16 << 20
"""Of H, this much is one chunk, and is in memory beside the matrix when it is written, read or merged."""


def row_blocks(width: int) -> Iterator[tuple[int, int]]:
    """Row ranges of an (n, n) float32 matrix, one chunk each."""
    step = _block_rows(width)
    for start in range(0, width, step):
        yield start, min(start + step, width)


def read_estimate(root: Path, entry: InputEntry) -> Estimate:
    """An input as it is stored. Raises CheckpointError when arrays are missing or have another shape than the table,
    and, when its last row is read, that what was read is not what was written."""
    n = entry.width
    small = [
        np.ascontiguousarray(open_array(root / entry.where / name, shape)[:])
        for name, shape in (("mean", (n,)), ("diagonal", (n,)), ("histogram", None))
    ]
    checksum = xxhash.xxh3_64()
    for array in small:
        checksum.update(array.data)
    if not entry.hessian:
        _check_sum(root, entry, checksum.intdigest())
    hessian = RowBlocks(root / entry.where / "hessian", n) if entry.hessian else None
    read = {0: checksum}

    def rows(start: int, stop: int) -> torch.Tensor:
        assert hessian is not None
        values = hessian.rows(start, stop)
        if start in read:  # in order from the first row on
            read[stop] = read.pop(start)
            read[stop].update(values.data)
            if stop == n:
                _check_sum(root, entry, read.pop(stop).intdigest())
        return torch.from_numpy(values)

    mean, diagonal, histogram = (torch.from_numpy(array) for array in small)
    return Estimate(entry.tokens, mean, diagonal, rows if entry.hessian else None, histogram, entry.amax)


def write_estimate(root: Path, key: str, estimate: Estimate, runs: tuple[str, ...]) -> InputEntry:
    """Writes a new generation of an input's arrays and gives the entry that names it; the table is not touched."""
    import zarr

    where = f"{_folder(key)}/{len(runs)}"
    _remove(root, where)  # of a run that was killed before the table named it
    group = zarr.open_group(root, mode="r+")
    checksum = xxhash.xxh3_64()

    def create(name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str, missing: float) -> Any:
        # A lost chunk reads as NaN, which is noticed, and not as zeros.
        return group.create_array(f"{where}/{name}", shape=shape, chunks=chunks, dtype=dtype, fill_value=missing,
                                  compressors=None, config={"write_empty_chunks": True})  # fmt: skip

    n = estimate.width
    small = (("mean", "float64", estimate.mean), ("diagonal", "float64", estimate.diagonal),
             ("histogram", "int64", estimate.histogram))  # fmt: skip
    for name, dtype, tensor in small:
        values = tensor.contiguous().numpy()
        checksum.update(values.data)
        create(name, values.shape, values.shape, dtype, 0 if dtype == "int64" else float("nan"))[:] = values
    if estimate.rows is not None:
        array = create("hessian", (n, n), (_block_rows(n), n), "float32", float("nan"))
        for start, stop in row_blocks(n):
            values = estimate.rows(start, stop).contiguous().numpy()
            checksum.update(values.data)
            array[start:stop] = values
    _sync(root / where)
    return InputEntry(n, estimate.rows is not None, estimate.tokens, estimate.amax, where, runs, checksum.intdigest())


def is_store(root: Path) -> bool:
    """Whether a Zarr group has the name, of statistics or not."""
    return (root / METADATA).is_file()


def check_free(root: Path) -> None:
    """PlanError when something that is no store has the name."""
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise PlanError(f"{root}: exists and is no statistics store; choose another name")


def create_store(root: Path, table: Table) -> None:
    """A store with a table and no data. Raises PlanError when something else has the name."""
    check_free(root)
    root.mkdir(parents=True, exist_ok=True)
    write_table(root, table)


def commit(root: Path, table: Table, entries: dict[str, InputEntry]) -> Table:
    """Makes new generations the valid ones, and removes those that they replace."""
    new = table.with_inputs(entries)
    write_table(root, new)
    for key, entry in entries.items():
        old = table.inputs[key].where
        if old and old != entry.where:
            _remove(root, old)
    return new


def _remove(root: Path, where: str) -> None:
    """Removes a folder of the store; nothing that is not strictly inside it, whatever the name says."""
    folder = root / where
    if root.resolve() not in folder.resolve().parents:
        raise CheckpointError(f"{root}: {where!r} lies outside the store")
    shutil.rmtree(folder, ignore_errors=True)


def merge_stores(stores: Sequence[Statistics], out: Path) -> None:
    """A new store of all layers of all stores, weighted by tokens; layers share an input if they do everywhere.

    Raises UsageError when a run is in two of them (it would count twice) or a layer's widths disagree, PlanError when
    ``out`` exists.
    """
    if out.exists():
        raise PlanError(f"{out}: exists; choose another name for the merged statistics")
    runs: dict[str, str] = {}
    for store in stores:
        if twice := runs.keys() & store.table.runs.keys():
            words = store.table.runs[min(twice)]
            raise UsageError(f"{store.path}: its run ({words}) is in another of the stores too and would count twice")
        runs |= store.table.runs
    groups = _shared(stores)
    for names in groups:
        _check_width(names[0], stores)
    estimates = (merged([read_estimate(Path(store.path), _entry(store, names[0])) for store in stores
                         if names[0] in store]) for names in groups)  # fmt: skip
    write_store(out, zip(groups, estimates, strict=True), runs, _transposed(stores))


def write_store(
    out: Path, estimates: Iterable[tuple[list[str], Estimate]], runs: dict[str, str], transposed: frozenset[str]
) -> None:
    """A new store of (layers that share an input, what is known of it); it gets its name when it is complete."""
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        create_store(part, make_table([]))
        written = [(names, write_estimate(part, names[0], estimate, tuple(runs))) for names, estimate in estimates]
        write_table(part, replace(make_table(written, transposed), runs=runs))
        part.replace(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _shared(stores: Sequence[Statistics]) -> list[list[str]]:
    """Layers grouped by what they share in every store."""
    names = dict.fromkeys(name for store in stores for name in store.names)
    groups: dict[tuple[str | None, ...], list[str]] = {}
    for name in names:
        key = tuple(store.input_of(name) if name in store else None for store in stores)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _check_width(name: str, stores: Sequence[Statistics]) -> None:
    widths = {store.width(name): store.path for store in stores if name in store}
    if len(widths) > 1:
        said = ", ".join(f"{width} in {path}" for width, path in widths.items())
        raise UsageError(f"layer {name!r} has inputs of different widths: {said}; these are of different models")


def _transposed(stores: Sequence[Statistics]) -> frozenset[str]:
    return frozenset(name for store in stores for name in store.names if store.transposed(name))


def _entry(store: Statistics, name: str) -> InputEntry:
    return store.table.inputs[store.table.layers[name].input]


def _check_sum(root: Path, entry: InputEntry, checksum: int) -> None:
    if checksum != entry.checksum:
        raise CheckpointError(f"{root}: {entry.where} is not what calibration wrote (checksum); calibrate again")


def _block_rows(width: int) -> int:
    return min(width, max(1, BLOCK_BYTES // (4 * width)))


def _folder(key: str) -> str:
    """A layer's name as one plain folder name."""
    quoted = urllib.parse.quote(key, safe=" ")
    taken = quoted[:1] in ("_", ".") or quoted.lower().startswith("zarr.json")
    return f"%{ord(quoted[0]):02X}{quoted[1:]}" if taken else quoted


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
