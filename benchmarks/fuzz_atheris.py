"""Coverage-guided fuzzing of everything that reads a hostile file, with atheris (pip install atheris; Linux).

    python benchmarks/fuzz_atheris.py header -max_total_time=60
    python benchmarks/fuzz_atheris.py recipe corpus/ -max_total_time=600

Targets: header, manifest, index, recipe, rules, journal (of a run), edit (journal of an edit in place), store
(table of a Zarr store), replacing (what an assembly says of files that it replaces). Options after the target are
libFuzzer's. Anything raised that is no QuantloomError is a crash, and its input is kept.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["quantloom"]):
    from quantloom.flow.assemble_folder import FolderTarget
    from quantloom.flow.recipe import Recipe
    from quantloom.flow.run_journal import FileLog, read_record
    from quantloom.formats import journal, manifest
    from quantloom.formats.checksums import checksum
    from quantloom.formats.errors import QuantloomError
    from quantloom.formats.objects import FolderObjects
    from quantloom.formats.safetensors import read_header
    from quantloom.formats.source import open_source
    from quantloom.formats.store_table import read_table
    from quantloom.stages.rule_files import load_rules

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))


def _written(name: str, content: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(content)
    return path


def _header(content: bytes) -> None:
    read_header(_written("a.safetensors", len(content).to_bytes(8, "little") + content))


def _manifest(content: bytes) -> None:
    manifest.parse({manifest.KEY: content.decode(errors="replace")}, "there")


def _index(content: bytes) -> None:
    open_source(_written("model.safetensors.index.json", content))


def _recipe(content: bytes) -> None:
    Recipe.from_json(content.decode(errors="replace"))


def _rules(content: bytes) -> None:
    for suffix in ("json", "yaml", "toml"):
        with contextlib.suppress(QuantloomError):
            load_rules(_written(f"rules.{suffix}", content))


def _journal(content: bytes) -> None:
    lines = [b"%s %s\n" % (checksum(line).encode(), line) for line in content.splitlines()]
    read_record(FileLog(_written("run.jsonl", b"".join(lines))))


def _edit(content: bytes) -> None:
    journal.read_journal(_written("a.quantloom-edit", content))


def _store(content: bytes) -> None:
    _written("zarr.json", content)
    read_table(FolderObjects(str(FOLDER)))


def _replacing(content: bytes) -> None:
    made = FOLDER / "made"
    made.mkdir(exist_ok=True)
    for name in ("a.part", "b.previous"):
        (made / name).write_bytes(b"x")
    (made / ".quantloom.replacing").write_bytes(content)
    FolderTarget(made, alone=True).recover()


TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": _header, "manifest": _manifest, "index": _index, "recipe": _recipe, "rules": _rules,
    "journal": _journal, "edit": _edit, "store": _store, "replacing": _replacing,
}  # fmt: skip


_DONE = (
    b'{"journal":1}\n{"done":{"name":"a","format":"fp8","nbytes_in":4,"nbytes_out":2,"seconds":0.1,"squared_error":0.5,'
    b'"squared_weight":1.5,"rows":[0,1],"pieces":[["a.weight",0,2,"0123456789abcdef"]]}}\n{"commit":{"a":"why"}}'
)
_EDIT = (
    b'{"version":1,"changes":[{"name":"a","old_size":2,"new_size":2,"patches":'
    b'[{"start":0,"old":"MjM=","new":"eHk="}]}]}'
)
_MANIFEST = (
    b'{"algorithm":"xxh3_64","header":"0123456789abcdef","source":"s","plan":"p","tensors":{"a":"0123456789abcdef",'
    b'"b":[[4,"0123456789abcdef"]]}}'
)
_TABLE = (
    b'{"attributes":{"quantloom_output":{"version":1,"plan":"p","program":"0.1","split":false,"shards":[{"name":'
    b'"a.safetensors","size":9,"head":8,"chunks":2}],"sidecars":[{"name":"c.json","nbytes":2}],"checksums":[2]}},'
    b'"zarr_format":3,"node_type":"group"}'
)
SEEDS = {
    "header": b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[1,0],"data_offsets":[0,0]}}',
    "manifest": _MANIFEST,
    "index": b'{"metadata":{"total_size":0},"weight_map":{"a":"a.safetensors"}}',
    "recipe": Recipe().to_json().encode(),
    "rules": b'{"blocks.*": {"format": "fp8", "scaling": "row"}, "x": {"skip": true}}',
    "journal": _DONE,
    "edit": _EDIT,
    "store": _TABLE,
    "replacing": b'[["a",1,"0123456789abcdef"],["b",1,"0123456789abcdef"]]',
}


def main() -> None:
    """Ends with libFuzzer's own status."""
    name = sys.argv.pop(1)
    target, seeds = TARGETS[name], FOLDER / "seeds"
    seeds.mkdir()
    (seeds / name).write_bytes(SEEDS[name])
    sys.argv.append(str(seeds))

    def one(content: bytes) -> None:
        with contextlib.suppress(QuantloomError):
            target(content)

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
