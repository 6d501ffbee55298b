"""What holds for every stage that works on a model that is quantized already: streaming, all or nothing, one path.

That a tensor may be larger than the memory they get is shown in ``test_memory``.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Ran, listing, without_checksums, write_folder

from quantloom import Pipeline
from quantloom.flow import budget, commit, parts
from quantloom.formats import fileio
from quantloom.formats.errors import SinkError
from quantloom.stages.stage import VERBS, stage_class

STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "dequantize": ("nvfp4", {"dtype": "f32"}),
    "migrate": ("fp8", {"to": "legacy"}),
    "edit": ("fp8", {"add": {"full_precision_matrix_mult": True}}),
    "input_scales": ("nvfp4", {"file": "scales.json"}),
    "hybrid": ("mxfp8", {}),
    "hybrid legacy": ("mxfp8", {"mode": "legacy"}),
}
"""verb, and what tells its modes apart -> format of a model that it works on, and its options."""


def verb_of(name: str) -> str:
    return name.split()[0]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in shards in each of the formats, and a file of scales."""
    folder = tmp_path_factory.mktemp("models")
    plain = write_folder(folder / "plain")
    for kind in {kind for kind, _ in STAGES.values()}:
        Pipeline(scheduler="sync").read(plain).quantize(kind).write(folder / kind, shard_size=100_000)
    (folder / "scales.json").write_text(json.dumps({"blocks.0.mlp.up": 0.5, "odd": 2}))
    return folder


def run(name: str, models: Path, output: Path, **run: Any) -> None:
    kind, options = STAGES[name]
    pipeline = Pipeline(**run).read(models / kind).stage(verb_of(name), **options)
    pipeline.write(output, shard_size=None if output.suffix else 60_000)


@pytest.fixture(autouse=True)
def _beside_the_scales(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)


def test_every_stage_that_stands_alone_is_here() -> None:
    assert {verb_of(name) for name in STAGES} == {verb for verb in VERBS if getattr(stage_class(verb), "alone", False)}


@pytest.mark.parametrize("name", STAGES)
def test_chunks_ranges_and_workers_change_no_byte(
    name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, plain = [], []
    for number, (chunk, part, workers) in enumerate(((1 << 24, 1 << 30, 1), (1 << 12, 1 << 30, 3), (1 << 13, 8192, 2))):
        monkeypatch.setattr(budget, "CPU_CHUNK_BYTES", chunk)
        monkeypatch.setattr(parts, "PART_BYTES", part)
        run(name, models, tmp_path / str(number), workers=workers)
        found.append(listing(tmp_path / str(number)))
        files = sorted((tmp_path / str(number)).glob("*.safetensors"))
        plain.append([without_checksums(path.read_bytes()) for path in files])
    assert len(found[0]) > 4
    assert found[0] == found[1]
    assert plain[0] == plain[2]


@pytest.mark.parametrize("name", STAGES)
def test_a_failure_at_any_moment_leaves_nothing_under_a_final_name(
    name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write fails once, as on a full disk, and then the moment when files get their names."""
    write, left = fileio._PositionalFile.write, [0]

    def fail(self: Any, *args: Any) -> int:
        left[0] -= 1
        if left[0] == -1:
            raise OSError(errno.ENOSPC, "full")
        return write(self, *args)

    monkeypatch.setattr(fileio, "PORTABLE", False)
    monkeypatch.setattr(fileio._PositionalFile, "write", fail)
    monkeypatch.setattr(budget, "CPU_CHUNK_BYTES", 1 << 14)
    before = listing(models)
    output, words = tmp_path / "deep" / "out.safetensors", ""
    for number in range(0, 1000, 7):
        left[0] = number
        try:
            run(name, models, output, scheduler="sync")
            break
        except SinkError as error:
            words = str(error)
        assert "the disk filled up" in words
        files = [path for path, digest in listing(tmp_path).items() if digest]
        assert all(path.endswith((".part", ".journal.jsonl")) for path in files), files
        shutil.rmtree(output.parent, ignore_errors=True)
    assert number > 14
    assert list(listing(tmp_path)) == ["deep", str(Path("deep/out.safetensors"))]

    def no_names(*_: Any) -> None:
        raise SinkError("cannot take the place")

    left[0] = -1
    monkeypatch.setattr(commit, "replace", no_names)
    with pytest.raises(SinkError, match="cannot take the place"):
        run(name, models, tmp_path / "folder", scheduler="sync")
    left = [path.name for path in (tmp_path / "folder").glob("*")]
    assert all(name.endswith((".part", ".journal.jsonl")) for name in left), left
    assert listing(models) == before


COMMANDS = {"input_scales": "calibrate-activations"}
"""verb -> its command, where it has another name."""
FLAGS = {
    "dequantize": ["--dtype", "f32"], "migrate": ["--to", "legacy"],
    "edit": ["--add", "full_precision_matrix_mult=true"],
    "input_scales": ["--input-scales", "scales.json"], "hybrid": [], "hybrid legacy": ["--mode", "legacy"],
}  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_command_and_pipeline_write_the_same_bytes(
    name: str, models: Path, tmp_path: Path, cli: Callable[..., Ran]
) -> None:
    verb, (kind, _) = verb_of(name), STAGES[name]
    command = (COMMANDS.get(verb, verb), models / kind, tmp_path / "cli", *FLAGS[name], "--shard-size", "60kB")
    shown = cli(*command, "--dry-run", "--json")
    assert shown.status == 0
    assert json.loads(shown.out)["layers"]
    assert not (tmp_path / "cli").exists()
    done = cli(*command, "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["output"] == str(tmp_path / "cli")
    run(name, models, tmp_path / "python")
    assert listing(tmp_path / "cli") == listing(tmp_path / "python")
    again = cli(*command)
    assert (again.status, again.out) == (1, "")
    assert "exists already" in again.err
