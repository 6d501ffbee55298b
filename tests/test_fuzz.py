"""Hostile files: whatever headers, indexes, journals, recipes and rules say, there is an answer of quantloom's own.

Nothing else is raised, little memory is taken, nothing outside the output is touched, and a run that continues from a
journal that was tampered with ends with the right bytes, or refuses. QUANTLOOM_FUZZ=5000 looks longer.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import listing, write_file, write_folder
from hostile import RANDOM, VALUES, bounded, changed, damaged, fuzz, stop_after
from hypothesis import given
from hypothesis import strategies as st

from quantloom import Pipeline
from quantloom.flow import sink
from quantloom.flow.receipt_json import read_receipt
from quantloom.flow.recipe import Recipe
from quantloom.flow.run_journal import FileLog, lines_of, read_record
from quantloom.formats import journal, manifest
from quantloom.formats.checksums import checksum
from quantloom.formats.errors import CheckpointError, QuantloomError, UsageError
from quantloom.formats.safetensors import read_header
from quantloom.formats.source import open_source
from quantloom.stages.rule_files import load_rules


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources, an output folder's place, and a file beside it that nobody may touch."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_file(folder / "in" / "tiny.safetensors")
    write_folder(folder / "sharded")
    (folder / "canary").write_text("alive")
    return folder


# -- what is read ------------------------------------------------------------------------------------------------------


def _with_header(path: Path, text: bytes, data: bytes) -> None:
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@fuzz
@given(RANDOM, VALUES, st.booleans())
def test_headers(sandbox: Path, chance: random.Random, hostile: Any, as_bytes: bool) -> None:
    whole = (sandbox / "in" / "tiny.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    path = sandbox / "header.safetensors"
    if as_bytes:
        path.write_bytes(damaged(whole[: 8 + size], chance) + whole[8 + size :])
    else:
        text = json.dumps(changed(json.loads(whole[8 : 8 + size]), chance, hostile)).encode(errors="surrogatepass")
        _with_header(path, text, whole[8 + size :])
    with bounded():
        read_header(path)


@fuzz
@given(RANDOM, VALUES, st.booleans())
def test_indexes(sandbox: Path, chance: random.Random, hostile: Any, as_bytes: bool) -> None:
    index = sandbox / "sharded" / "model.safetensors.index.json"
    whole = index.read_bytes()
    try:
        if as_bytes:
            index.write_bytes(damaged(whole, chance))
        else:
            index.write_bytes(json.dumps(changed(json.loads(whole), chance, hostile)).encode(errors="surrogatepass"))
        with bounded():
            found = open_source(sandbox / "sharded")
            assert all(Path(path).parent == sandbox / "sharded" for path in found.files)
    finally:
        index.write_bytes(whole)


@fuzz
@given(RANDOM, VALUES)
def test_manifests(sandbox: Path, chance: random.Random, hostile: Any) -> None:
    output = sandbox / "manifest" / "out.safetensors"
    if not output.exists():
        Pipeline().read(sandbox / "in").quantize("fp8").write(output)
    entry = read_header(output).metadata[manifest.KEY]
    text = json.dumps(changed(json.loads(entry), chance, hostile)) if chance.random() < 0.7 else str(hostile)
    with bounded():
        manifest.parse({manifest.KEY: text}, "there")
        manifest.amended({manifest.KEY: text}, {"x": "0" * 16}, "there")


@fuzz
@given(RANDOM, VALUES)
def test_recipes(chance: random.Random, hostile: Any) -> None:
    pipeline = Pipeline(memory=1 << 30).read("a.safetensors").target(exclude="x").quantize("fp8", rounding="learned")
    whole = pipeline.lora(rank=8).write("o.safetensors", compute=False).recipe.to_dict()
    text = json.dumps(changed(whole, chance, hostile))
    with bounded():
        recipe = Recipe.from_json(text)
        assert Recipe.from_json(recipe.to_json()) == recipe
    with bounded():
        Recipe.from_json(damaged(text.encode(), chance).decode(errors="replace"))


_RULES = {
    ".json": '{"blocks.*": {"format": "fp8", "scaling": "row"}, "x": {"skip": true}, "re:^a": {"block_size": 64}}',
    ".yaml": "blocks.*: {format: fp8, scaling: row}\nx: &anchor {skip: true}\ny: *anchor\n<<: {z: {format: int8}}\n",
    ".toml": '["blocks.*"]\nformat = "fp8"\nscaling = "row"\n[x]\nskip = true\n',
}


@fuzz
@given(RANDOM, VALUES, st.sampled_from(sorted(_RULES)))
def test_rules(sandbox: Path, chance: random.Random, hostile: Any, suffix: str) -> None:
    path = sandbox / f"rules{suffix}"
    path.write_bytes(damaged(_RULES[suffix].encode(), chance))
    with bounded():
        load_rules(path)
    json_path = sandbox / "rules.json"
    json_path.write_text(json.dumps(changed(json.loads(_RULES[".json"]), chance, hostile)), errors="surrogatepass")
    with bounded():
        load_rules(json_path)


def test_rules_of_many_aliases(sandbox: Path) -> None:
    """A billion laughs in YAML."""
    path = sandbox / "laughs.yaml"
    pairs = zip("abcdefgh", "bcdefghi", strict=True)
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]", *(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in pairs)]
    path.write_text("\n".join(lines))
    with bounded(), pytest.raises(UsageError):
        load_rules(path)


# -- edits in place ----------------------------------------------------------------------------------------------------


@fuzz
@given(RANDOM, VALUES, st.booleans())
def test_journals_of_edits(sandbox: Path, chance: random.Random, hostile: Any, as_bytes: bool) -> None:
    folder = sandbox / "edit"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"0123456789")
    patches = [{"start": 2, "old": "MjM=", "new": "eHk="}, {"start": 9, "old": "OQ==", "new": "eHl6"}]
    changes = [{"name": "a.safetensors", "old_size": 10, "new_size": 12, "patches": patches}]
    whole = {"version": 1, "changes": changes}
    path = folder / f"a.safetensors{journal.ENDING}"
    text = json.dumps(whole if as_bytes else changed(whole, chance, hostile)).encode(errors="surrogatepass")
    path.write_bytes(damaged(text, chance) if as_bytes else text)
    before = {name: value for name, value in listing(sandbox).items() if not name.startswith("edit")}
    with bounded():
        journal.finish(path)
    after = listing(sandbox)
    assert {name: value for name, value in after.items() if not name.startswith("edit")} == before
    assert (folder / "a.safetensors").stat().st_size < 1 << 20


# -- journals of runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(sandbox: Path) -> tuple[Path, bytes, dict[str, str]]:
    """A folder in which a run was killed halfway; its journal; what a whole run makes."""
    convert(sandbox, sandbox / "whole")
    flow = Pipeline(scheduler="sync").read(sandbox / "in").quantize("fp8", scaling="row")
    begun = flow.write(sandbox / "half" / "out.safetensors", compute=False)
    stop_after(begun, 6)
    log = sink.log_of(begun.plan)
    assert len(read_record(log).receipts) == 6  # type: ignore[union-attr]
    return sandbox / "half", log.path.read_bytes(), listing(sandbox / "whole")


def convert(sandbox: Path, folder: Path, **how: Any) -> None:
    flow = Pipeline(scheduler="sync", **how).read(sandbox / "in").quantize("fp8", scaling="row")
    flow.write(folder / "out.safetensors")


def resumed(sandbox: Path, half: tuple[Path, bytes, dict[str, str]], content: bytes, **how: Any) -> None:
    """Continues with another journal: the right bytes, or a refusal; the journal's plan is the one that was begun."""
    template, _, whole = half
    folder = template.with_name("half")  # the journal names no path, the plan does
    kept = template.with_name("kept")
    if not kept.exists():
        shutil.copytree(template, kept)
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)
    (folder / "out.safetensors.journal.jsonl").write_bytes(content)
    before = {name: value for name, value in listing(sandbox).items() if not name.startswith("half")}
    try:
        convert(sandbox, folder, **how)
    except QuantloomError:
        assert not (folder / "out.safetensors").exists()
    else:
        assert listing(folder) == whole
    assert {name: value for name, value in listing(sandbox).items() if not name.startswith("half")} == before


@fuzz
@given(RANDOM)
def test_damaged_journals(sandbox: Path, half: Any, chance: random.Random) -> None:
    lines = half[1].splitlines(keepends=True)
    kind = chance.random()
    if kind < 0.2:
        lines = [lines[0], *chance.sample(lines[1:], chance.randint(0, len(lines) - 1))]
    elif kind < 0.3:
        lines = chance.choices(lines, k=len(lines))
    content = b"".join(lines)
    resumed(sandbox, half, damaged(content, chance) if kind > 0.1 else content)


def _forged(content: bytes, chance: random.Random, hostile: Any) -> bytes:
    """Lines with their checksums right, of which one says something else."""
    values = [json.loads(line.partition(b" ")[2]) for line in content.splitlines()]
    place = chance.randrange(len(values))
    made = changed(values[place], chance, hostile)
    values[place] = made if chance.random() < 0.8 else values[place]
    values = [*values, made] if chance.random() < 0.3 else values
    bodies = [json.dumps(value).encode() for value in values]
    return b"".join(b"%s %s\n" % (checksum(body).encode(), body) for body in bodies)


@fuzz
@given(RANDOM, VALUES)
def test_forged_journals(sandbox: Path, half: Any, chance: random.Random, hostile: Any) -> None:
    """Checksums are no signatures: what fits them may be wrong, and what it says of bytes is looked at by --verify."""
    resumed(sandbox, half, _forged(half[1], chance, hostile), verify=True)


def test_a_forged_claim(sandbox: Path, half: Any) -> None:
    """A layer that is said to be finished and is not is found by --verify."""
    values = [json.loads(line.partition(b" ")[2]) for line in half[1].splitlines()]
    with_lie = [*values[:-1], {"done": {**values[-1]["done"], "pieces": [
        [name, start, nbytes, "0" * 16] for name, start, nbytes, _ in values[-1]["done"]["pieces"]]}}]  # fmt: skip
    resumed(sandbox, half, lines_of(with_lie), verify=True)


@pytest.mark.parametrize("kept", [{}, {"odd": "failed: x"}, {"nothing": "y"}], ids=str)
def test_a_forged_commit(kept: dict[str, str], sandbox: Path, half: Any) -> None:
    """Parts that are said to be complete and are not get no names: their heads would hold checksums."""
    resumed(sandbox, half, half[1] + lines_of([{"commit": kept}]))
    assert not (half[0] / "out.safetensors").exists()


@pytest.mark.parametrize("change", [
    {"nbytes_in": 10**400}, {"nbytes_out": -1}, {"seconds": "x"}, {"seconds": True}, {"name": None}, {"format": 1},
    {"rows": [0]}, {"rows": [0.5, 1]}, {"pieces": [["a", 0, 1, "z"]]}, {"pieces": [["a", 0, 2**63, "0" * 16]]},
    {"quality": {"stored": {"weight": "x"}}}, {"squared_error": 10**400}, {"squared_weight": -1}, {"more": 1},
], ids=str)  # fmt: skip
def test_receipts_that_are_none(change: dict[str, Any], half: Any) -> None:
    receipt = json.loads(half[1].splitlines()[1].partition(b" ")[2])["done"]
    assert read_receipt(receipt)
    with pytest.raises((ValueError, TypeError, KeyError, OverflowError)):
        read_receipt({**receipt, **change})


def test_a_journal_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(CheckpointError, match="stands where a journal belongs"):
        FileLog(tmp_path / "x").read()
