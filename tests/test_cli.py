"""The command line: what it prints where, how it ends, and that a plan keeps its word."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from checkpoints import FORMATS, LINEAR, TENSORS, Ran, child, listing, make_tensors, write_file
from rich.console import Console
from safetensors.torch import load_file, save_file

import quantloom
from quantloom import Pipeline
from quantloom.flow import console, graph, progress
from quantloom.flow.budget import make_budget
from quantloom.flow.cli import cli as group
from quantloom.flow.options import build_recipe
from quantloom.flow.recipe import Recipe
from quantloom.flow.tables import Name
from quantloom.formats.comfy import MARKER
from quantloom.stages.work import Receipt

Cli = Callable[..., Ran]
COMMANDS = tuple(group.commands)


def flags(options: dict[str, Any]) -> list[str]:
    """Options of a stage as they are written on the command line."""
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


# -- help and wrong usage ----------------------------------------------------------------------------------------------


def test_help_of_the_program(cli: Cli) -> None:
    for flag in ("--help", "-h"):
        done = cli(flag)
        assert done.status == 0
        assert done.err == ""
        assert all(re.search(rf"^  {name}  ", done.out, re.MULTILINE) for name in COMMANDS)
        shown = done.out.partition("\nQuantize:\n")[2].partition("Examples:")[0]
        assert len(re.findall(r"^  [a-z-]+  +\S.*[^.]\.$", shown, re.MULTILINE)) == len(COMMANDS)  # none is cut short
    assert cli("--version").out == f"quantloom, version {quantloom.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name: str, cli: Cli) -> None:
    done = cli(name, "--help")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith(f"Usage: quantloom {name}")
    options = [option for option in group.commands[name].params if isinstance(option, click.Option)]
    for option in options:
        assert all(opt in done.out for opt in option.opts)
        assert option.help


@pytest.mark.parametrize("name", ["convert", "plan"])
def test_options_stand_under_headings(name: str, cli: Cli) -> None:
    shown = cli(name, "--help").out.partition("Examples:")[0]
    sections = dict(re.findall(r"^(\w[^\n]*):\n((?:  [^\n]*\n)+)", shown, re.MULTILINE))
    found = {heading: re.findall(r"^  (?:-\w, )?(--[a-z-]+)", text, re.MULTILINE) for heading, text in sections.items()}
    options = [option.opts for option in group.commands[name].params if isinstance(option, click.Option)]
    assert sorted(each for names in found.values() for each in names) == sorted(
        [next(opt for opt in opts if opt.startswith("--")) for opts in options] + ["--help"]
    )
    assert found["Messages"] == ["--quiet", "--verbose", "--json", "--help"]
    assert {each[:7] for each in found["Error-correction LoRA"]} == {"--lora-"}


def test_the_options_that_are_promised() -> None:
    words = (
        "format scaling block-size rotate rounding preset include exclude fallback layers heuristics dialect "
        "shard-size memory workers device scheduler recipe overwrite quiet verbose json nonfinite"
    )
    promised = {f"--{word}" for word in words.split()} | {"-q", "-v"}
    for name in ("convert", "plan"):
        assert promised <= {opt for option in group.commands[name].params for opt in option.opts}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Usage"),
        (["convrt"], "No such command 'convrt'"),
        (["convert"], "Missing argument 'SOURCE'"),
        (["convert", "{in}"], "Missing argument 'DESTINATION'"),
        (["convert", "{in}", "{out}"], "--format is missing; known: fp8, fp8_e5m2, int8, mxfp8, hybrid_mxfp8, nvfp4"),
        (["convert", "{in}", "{out}", "--fromat", "fp8"], "--format"),
        (["convert", "{in}", "{out}", "--format", "fp9"], "unknown format 'fp9'; did you mean 'fp8'"),
        (["convert", "{in}", "{out}", "--format", "fp8", "--scaling", "rwo"], "did you mean 'row'?"),
        (["convert", "{in}", "{out}", "--format", "fp8", "--rounding", "neares"], "did you mean 'nearest'"),
        (["convert", "{in}", "{out}", "--format", "fp8", "--preset", "flux3"], "unknown preset 'flux3'; did you mean"),
        (["convert", "{in}", "{out}", "--format", "fp8", "--fallback", "int9"], "unknown format 'int9'"),
        (["convert", "{in}", "{out}", "--format", "fp8", "--include", "["], "include"),
        (["convert", "{in}", "{out}", "--format", "fp8", "--exclude", "*"], "exclude"),
        (["convert", "{in}", "{out}", "--format", "fp8", "--exclude", "nothing_like_it"], "matches no layer"),
        (["convert", "{in}", "{out}", "--format", "fp8", "--layers", "{tmp}/none.toml"], "none.toml"),
        (["convert", "{in}", "{out}", "--format", "fp8", "--recipe", "{tmp}/none.json"], "none.json"),
        (["convert", "{in}", "{out}", "--format", "fp8", "--dialect", "comfyui"], "did you mean 'comfy'?"),
        (["convert", "{in}", "{out}", "--format", "fp8", "--shard-size", "big"], "--shard-size 'big' is no size"),
        (["convert", "{in}", "{out}", "--format", "fp8", "--shard-size", "0"], "shard size 0"),
        (["convert", "{in}", "{out}", "--format", "fp8", "--memory", ""], "--memory '' is no size"),
        (["convert", "{in}", "{out}", "--format", "fp8", "--workers", "0"], "0 workers"),
        (["convert", "{in}", "{out}", "--format", "fp8", "--workers", "x"], "--workers"),
        (["convert", "{in}", "{out}", "--format", "fp8", "--device", "tpu"], "unknown device 'tpu'"),
        (["convert", "{in}", "{out}", "--format", "fp8", "--device", "cuda:77"], "'cuda:77' is not there"),
        (["convert", "{in}", "{out}", "--format", "fp8", "--scheduler", "dask"], "unknown scheduler 'dask'"),
        (["convert", "{in}", "{out}", "--format", "fp8", "--scaling", "block", "--block-size", "0"], "block size 0"),
        (["convert", "{in}", "{out}", "--format", "fp8", "--rotate", "hadamard"], "rotation needs int8"),
        (["convert", "{in}", "{out}", "--format", "int8", "--rotate", "hadamard:100"], "not a power of four"),
        (["convert", "{in}", "{out}", "--format", "fp8", "--nonfinite", "ignore"], "unknown nonfinite 'ignore'"),
        (["convert", "", "{out}", "--format", "fp8"], "empty"),
        (["verify", "{in}"], "carries no checksums"),
        (["inspect"], "Missing argument 'PATH'"),
        (["formats", "extra"], "unexpected extra argument"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], words: str, cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    before = listing(tmp_path)
    names = {"in": checkpoint, "out": tmp_path / "out.safetensors", "tmp": tmp_path}
    done = cli(*(argument.format(**names) for argument in arguments))
    assert done.status == (1 if words == "empty" else 2)  # an empty path is a path that does not exist
    assert done.out == ""
    assert words in done.err
    assert "Traceback" not in done.err
    assert listing(tmp_path) == before


def test_failed_work_ends_with_1(cli: Cli, tmp_path: Path) -> None:
    done = cli("convert", tmp_path / "none.safetensors", tmp_path / "out", "--format", "fp8")
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1  # one message, unbroken, however long the path
    for command in (["inspect", tmp_path / "none"], ["verify", tmp_path / "none", "--against", tmp_path / "none"]):
        done = cli(*command)
        assert (done.status, done.out) == (1, "")
        assert "does not exist" in done.err


def test_a_mistake_of_our_own_is_not_hidden(cli: Cli, checkpoint: Path, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from quantloom.flow import cli as module

    monkeypatch.setattr(module, "build_recipe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module.cli.main(["plan", str(checkpoint), "--format", "fp8"], standalone_mode=False)


# -- convert -----------------------------------------------------------------------------------------------------------


def test_convert_says_what_it_did(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    done = cli("convert", checkpoint, out, "--format", "nvfp4")
    assert done.status == 0
    assert f"{out}: " in done.out
    assert f"{LINEAR} layers quantized" in done.out
    assert "kept 1 tensor: embedding table" in done.out
    assert "kept 2 tensors: 1-D (norm, scale or bias)" in done.out
    assert "peak memory" in done.out
    assert "B/s" in done.out
    assert "Worst layers by error (of 7):" in done.out
    assert "│ blocks." in done.out
    command = shlex.split(done.out.partition("check it: ")[2])
    assert command[:3] == ["quantloom", "verify", str(out)]
    assert cli(*command[1:]).status == 0
    lines = done.err.splitlines()
    assert lines[0] == "warning: no preset fits these keys; only the rules by name keep layers (see --preset)"
    begun = r"converting 15 tensors \(7 layers to quantize\), [\d.]+ kB, \d tasks? at a time, memory budget [\d.]+ GB"
    assert re.fullmatch(begun, lines[1])
    assert len(lines) == 2


def test_quiet_is_silent(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    assert cli("convert", checkpoint, tmp_path / "out.safetensors", "--format", "fp8", "-q") == Ran(0, "", "")
    assert cli("plan", checkpoint, "--format", "fp8", "--quiet") == Ran(0, "", "")
    done = cli("convert", checkpoint, tmp_path / "out.safetensors", "--format", "fp8", "-q")
    assert (done.status, done.out) == (1, "")
    assert "exists already" in done.err


def test_json_is_one_document_and_nothing_else(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    done = cli("convert", checkpoint, out, "--format", "mxfp8", "--json")
    assert (done.status, done.err) == (0, "")
    report = json.loads(done.out)
    assert report["bytes_out"] == out.stat().st_size
    assert len(report["layers"]) == LINEAR
    for command in (["plan", checkpoint, "--format", "fp8"], ["inspect", out], ["formats"],
                    ["verify", out, "--against", checkpoint]):  # fmt: skip
        done = cli(*command, "--json")
        assert (done.status, done.err) == (0, "")
        assert json.loads(done.out)
    done = cli("convert", checkpoint, out, "--format", "mxfp8", "--json")
    assert (done.status, done.out) == (1, "")


def test_verbosity(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    plain = cli("convert", checkpoint, tmp_path / "a.safetensors", "--format", "fp8")
    loud = cli("convert", checkpoint, tmp_path / "b.safetensors", "--format", "fp8", "-v")
    assert "INFO quantloom.flow.execute: 15 layers, " in loud.err
    assert "INFO" not in plain.err
    assert cli("convert", checkpoint, tmp_path / "c.safetensors", "--format", "fp8", "-vv").status == 0
    again = cli("convert", checkpoint, tmp_path / "d.safetensors", "--format", "fp8")
    assert again.err.count("\n") == plain.err.count("\n") == 2


def test_options_reach_the_output(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text("'blocks\\.1\\.attn' = {format = 'nvfp4'}\n")
    options = (
        rf"--format fp8 --scaling row --rounding nearest --exclude mlp[.]down --fallback int8 --layers {rules} "
        "--shard-size 60KB --preset none --input-scale 0.5 --full-precision-matmul --workers 1 --scheduler sync "
        "--memory 2GB --json"
    )
    done = cli("convert", checkpoint, tmp_path / "o", *options.split())
    assert done.status == 0, done.err
    formats = {layer["name"]: layer["format"] for layer in json.loads(done.out)["layers"]}
    assert formats == {
        "blocks.0.attn.qkv": "fp8 row", "blocks.0.mlp.up": "fp8 row", "blocks.1.mlp.up": "fp8 row", "odd": "fp8 row",
        "blocks.1.attn.qkv": "nvfp4", "blocks.0.mlp.down": "int8 row", "blocks.1.mlp.down": "int8 row",
    }  # fmt: skip
    files = sorted((tmp_path / "o").glob("*.safetensors"))
    assert len(files) > 1
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert float(tensors["odd.input_scale"]) == 0.5
    assert b'"full_precision_matrix_mult": true' in bytes(tensors[f"odd{MARKER}"].tolist())


def test_a_recipe_file_and_options_that_win(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    base = Pipeline(workers=1, memory="2GB").target(exclude="odd").quantize("fp8", scaling="block", block_size=64)
    recipe.write_text(base.to_json())

    def formats(*arguments: str) -> set[str]:
        done = cli("plan", checkpoint, "--recipe", recipe, "--json", *arguments)
        assert done.status == 0, done.err
        return set(json.loads(done.out)["formats"])

    assert formats() == {"fp8 block 64"}
    assert formats("--block-size", "32") == {"fp8 block 32"}
    assert formats("--scaling", "row") == {"fp8 row"}
    assert formats("--format", "mxfp8") == {"mxfp8"}  # blocks of FP8 mean nothing there
    done = json.loads(cli("plan", checkpoint, "--recipe", recipe, "--json").out)
    assert (done["workers"], done["memory_budget_bytes"]) == (1, 2 * 10**9)
    assert sum(layer["format"] is not None for layer in done["layers"]) == LINEAR - 1
    done = json.loads(cli("plan", checkpoint, "--recipe", recipe, "--exclude", "mlp", "--memory", "3GB", "--json").out)
    assert done["memory_budget_bytes"] == 3 * 10**9
    assert {layer["name"] for layer in done["layers"] if layer["kept_because"] == "exclude 'mlp'"} == {
        f"blocks.{block}.mlp.{part}" for block in (0, 1) for part in ("up", "down")
    }


# -- plan --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("folder", [False, True])
def test_a_plan_shows_what_convert_then_does(name: str, folder: bool, cli: Cli, sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / ("out" if folder else "out.safetensors")
    options = [*flags(FORMATS[name]), *(["--shard-size", "100KB"] if folder else [])]
    before = listing(tmp_path)
    planned = json.loads(cli("plan", sharded, out, *options, "--json").out)
    assert listing(tmp_path) == before
    done = json.loads(cli("convert", sharded, out, *options, "--json").out)
    assert {file["path"]: file["bytes"] for file in planned["files"]} == {
        str(path): path.stat().st_size for path in ([out] if not folder else out.glob("*.safetensors"))
    }
    assert planned["bytes_out"] == done["bytes_out"]
    assert planned["bytes_in"] == done["bytes_in"]
    assert planned["kept"] == done["kept"]
    shown = {layer["name"]: (layer["format"], layer["bytes_in"], layer["bytes_out"]) for layer in planned["layers"]}
    for layer in done["layers"]:
        assert shown[layer["name"]] == (layer["format"], layer["bytes_in"], layer["bytes_out"])
    assert sum(form is not None for form, _, _ in shown.values()) == len(done["layers"])
    assert planned["formats"] == {form: sum(layer["format"] == form for layer in done["layers"])
                                  for form in {layer["format"] for layer in done["layers"]}}  # fmt: skip


def test_a_plan_for_people(cli: Cli, checkpoint: Path) -> None:
    done = cli("plan", checkpoint, "--format", "fp8", "--scaling", "block", "--memory", "2GB")
    assert (done.status, done.err) == (0, "")
    assert "fp8 block 128" in done.out
    assert "kept: block size 128 does not divide 100 x 72" in done.out
    assert "384x128" in done.out
    assert re.search(r"quantize +6 layers to fp8 block 128, rounding mse: 589.82 kB -> 229.77 kB", done.out), done.out
    assert re.search(r"keep +1 tensor: embedding table", done.out)
    assert "estimate" in done.out
    assert re.search(r"memory   at most [\d.]+ MB \(.* for the process, \d+ x .* for tasks\); budget 2.00 GB", done.out)
    assert "quantized.safetensors" in done.out
    assert re.search(r"1 file, 15 tensors, ", done.out)
    assert "biases" not in done.out
    assert "blocks.0.norm" not in done.out
    loud = cli("plan", checkpoint, "--format", "fp8", "-v")
    assert re.search(r"blocks.0.norm +128 +kept: 1-D \(norm", loud.out), loud.out


@pytest.mark.parametrize("width", [80, 120])
def test_a_plan_fits_a_terminal(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"double_blocks.{number}.some_long_attention_block.modulation_projection" for number in (7, 18)]
    tensors = {f"{name}.weight": make_tensors()["odd.weight"] for name in names}
    source = write_file(tmp_path / "in.safetensors", tensors)
    flow = Pipeline().read(source).quantize("fp8").write(tmp_path / "out.safetensors", compute=False)
    why = "a reason of several words that does not fit; and more"
    kept = replace(flow.plan.layers[0], format="", reason=why)
    terminal = Console(file=io.StringIO(), width=width)
    monkeypatch.setattr(console, "stdout", lambda: terminal)
    console.print_plan(replace(flow.plan, layers=(kept, *flow.plan.layers[1:])), make_budget(flow.plan.layers,
                       flow.plan.recipe.run, ""))  # fmt: skip
    assert isinstance(terminal.file, io.StringIO)
    table, _, totals = terminal.file.getvalue().partition("source ")
    assert max(map(len, table.splitlines())) <= width
    pieces = {line.split()[0] for line in table.splitlines()[2:]}
    whole = {piece for name in names for piece in name.split(".")}
    assert {piece for text in pieces for piece in text.split(".") if piece} - {"fp8"} <= whole, table
    assert "kept: a reason of" in table
    assert "and more" not in table
    assert f"keep         1 tensor: {why}" in totals


def test_a_plan_says_when_convert_would_refuse(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"precious")
    done = cli("plan", checkpoint, out, "--format", "fp8")
    assert done.status == 0
    assert f"warning  the run would be refused: {out}: exists already; pass --overwrite" in done.out
    assert "the run would be refused" not in cli("plan", checkpoint, out, "--format", "fp8", "--overwrite").out
    assert "the run would be refused" not in cli("plan", checkpoint, "--format", "fp8").out
    assert out.read_bytes() == b"precious"


def test_a_plan_without_a_name_for_the_output(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_file(Path("quantized.safetensors"))
    done = cli("plan", "quantized.safetensors", "--format", "fp8")
    assert done.status == 0, done.err


def test_tables_are_whole_where_nobody_sees_the_margin(cli: Cli, tmp_path: Path) -> None:
    """In a pipe a name stays in one piece, to be searched for; on a terminal it is folded, never cut."""
    name = "transformer." + "very_long_name." * 12 + "projection"
    write_file(tmp_path / "in.safetensors", {f"{name}.weight": make_tensors()["odd.weight"]})
    done = cli("plan", tmp_path / "in.safetensors", "--format", "int8")
    assert name in done.out
    narrow = Console(width=60, file=io.StringIO(), force_terminal=False)
    table = console.make_table("layer", ">shape", "becomes")
    table.add_row(Name(name), "100 x 72", "kept: because it is so")
    narrow.print(table)
    assert isinstance(narrow.file, io.StringIO)
    text = narrow.file.getvalue()
    assert "…" not in text
    assert "100 x 72" in text
    assert max(map(len, text.splitlines())) <= 60


# -- progress ----------------------------------------------------------------------------------------------------------


def test_progress_without_a_terminal_is_honest(cli: Cli, checkpoint: Path, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    monkeypatch.setattr(graph, "BATCH_BYTES", 1)
    monkeypatch.setattr(graph, "MOST_BATCHES", 10**9)
    done = cli("convert", checkpoint, tmp_path / "out.safetensors", "--format", "fp8")
    assert "\x1b" not in done.err
    assert "\r" not in done.err
    pattern = r" *(\d+)%, [\d.]+/[\d.]+ kB, \d+(?:\.\d\d)? [kMG]?B/s, ([\d:]+ left|syncing), "
    pattern += r"[\d.]+ [MG]B / [\d.]+ GB, (\d)/7 layers"
    found = [re.fullmatch(pattern, line) for line in done.err.splitlines()[2:]]
    assert len(found) == TENSORS
    assert all(found), done.err
    steps = [(int(match[1]), int(match[3])) for match in found if match]
    assert steps == sorted(steps)
    assert steps[-1] == (100, LINEAR)
    assert [match[2] == "syncing" for match in found if match] == [False] * (TENSORS - 1) + [True]


@pytest.mark.parametrize("width", [80, 140])
def test_progress_on_a_terminal(width: int, checkpoint: Path, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(graph, "BATCH_BYTES", 1)
    terminal = Console(file=io.StringIO(), force_terminal=True, width=width)
    display = console.Display(terminal)
    flow = Pipeline().read(checkpoint).quantize("fp8").write(tmp_path / "out.safetensors", compute=False)
    flow.compute(progress=display)
    assert isinstance(terminal.file, io.StringIO)
    shown = terminal.file.getvalue()
    assert "B/s" in shown
    assert "-:-- left" in shown
    assert f"{LINEAR}/{LINEAR} layers" in shown
    assert re.search(r" syncing +\d+ MB / [\d.]+ [GT]B  7/7 layers", shown), shown
    assert "…" not in shown
    assert display.bytes == flow.plan.nbytes_in


def test_the_longest_progress_fits_80_columns(checkpoint: Path, tmp_path: Path) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    flow = Pipeline().read(checkpoint).quantize("fp8").write(tmp_path / "out.safetensors", compute=False)
    display = progress.Display(terminal)
    display.start(flow.plan, replace(make_budget(flow.plan.layers, flow.recipe.run, ""), limit=128 * 10**9))
    display.total_bytes, display.total_layers, display.layers = 912 * 10**9, 1234, 1111
    display.began -= 3000
    display.advance([Receipt(flow.plan.quantized[0].layer.name, "fp8", 300 * 10**9, 1, 1.0)])
    display.stop()
    assert isinstance(terminal.file, io.StringIO)
    shown = terminal.file.getvalue()
    line = r" 33%  300/912 GB  0.10 GB/s  1:4\d:\d\d left  [\d.]+ [MG]B / 128 GB  1112/1234 layers"
    assert re.search(line, shown), shown


def test_a_name_with_brackets_is_not_markup(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "a [bold] name"
    write_file(folder / "in[red].safetensors", {"layers[0].x.weight": make_tensors()["odd.weight"]})
    done = cli("convert", folder / "in[red].safetensors", folder / "out[/].safetensors", "--format", "fp8")
    assert done.status == 0, done.err
    assert "out[/].safetensors" in done.out
    assert "layers[0].x" in done.out
    assert "in[red].safetensors" in done.out
    source, output = folder / "in[red].safetensors", folder / "out[/].safetensors"
    for command in (["plan", source, "--format", "fp8"], ["inspect", output, "--layers"],
                    ["verify", output, "--against", source]):  # fmt: skip
        done = cli(*command)
        assert done.status == 0, done.err
        assert "layers[0].x" in done.out
    done = cli("inspect", folder / "none[red].safetensors")
    assert "none[red].safetensors" in done.err


# -- verify and inspect ------------------------------------------------------------------------------------------------


Converted = Callable[[str], Path]


@pytest.fixture
def converted(checkpoint: Path, tmp_path: Path) -> Converted:
    def make(name: str) -> Path:
        path = tmp_path / "out.safetensors"
        Pipeline().read(checkpoint).stage("quantize", **FORMATS[name]).write(path)
        return path

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_verify_finds_a_sound_file_sound(name: str, cli: Cli, converted: Converted, checkpoint: Path) -> None:
    done = cli("verify", converted(name), "--against", checkpoint)
    assert (done.status, done.err) == (0, "")
    layers = LINEAR - ("block" in name)
    assert f"sound; {layers} quantized layers, {TENSORS - layers} tensors kept as they were" in done.out
    assert "blocks.0.attn.qkv" in done.out


def flip(path: Path, name: str, index: int, mask: int) -> None:
    """Flips bits of one byte of a tensor."""
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    begin, end = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    raw[8 + length + begin + index % (end - begin)] ^= mask
    path.write_bytes(raw)


EXPONENTS = {
    "fp8": [("weight", 0x40), ("weight", 0x08), ("weight_scale", 0x01)],
    "fp8 row": [("weight", 0x40), ("weight_scale", 0x01)],
    "fp8 block": [("weight", 0x40), ("weight_scale", 0x01)],
    "fp8_e5m2": [("weight", 0x40), ("weight", 0x04), ("weight_scale", 0x01)],
    "int8": [("weight", 0x40), ("weight_scale", 0x01)],
    "int8 tensor": [("weight", 0x40), ("weight_scale", 0x01)],
    "int8 block": [("weight", 0x40), ("weight_scale", 0x01)],
    "int8 rotated": [("weight_scale", 0x01)],
    "mxfp8": [("weight", 0x40), ("weight_scale", 0x01), ("weight_scale", 0x80)],
    "nvfp4": [("weight_scale", 0x08), ("weight_scale", 0x40), ("weight_scale_2", 0x01)],
}
"""Format -> (tensor, exponent bit of its top byte)."""


@pytest.mark.parametrize("name", EXPONENTS)
def test_verify_finds_one_flipped_exponent(name: str, cli: Cli, converted: Converted, checkpoint: Path) -> None:
    path = converted(name)
    sound = path.read_bytes()
    for tensor, mask in EXPONENTS[name]:
        width = load_file(path)[f"blocks.0.attn.qkv.{tensor}"].element_size()
        for element in (0, 7, 100):
            path.write_bytes(sound)
            flip(path, f"blocks.0.attn.qkv.{tensor}", element * width + width - 1, mask)
            done = cli("verify", path, "--against", checkpoint)
            assert done.status == 1, (tensor, mask, element)
            assert "broken: blocks.0.attn.qkv: " in done.out
            assert f"tensor 'blocks.0.attn.qkv.{tensor}'" in done.out
            assert "BROKEN (2 problems)" in done.out, "by its checksum, and by its numbers"


def test_verify_names_the_weight(cli: Cli, converted: Converted, checkpoint: Path) -> None:
    path = converted("fp8")
    flip(path, "blocks.0.attn.qkv.weight", 5 * 128 + 17, 0x40)
    done = cli("verify", path, "--against", checkpoint, "--json")
    assert done.status == 1
    result = json.loads(done.out)
    assert result["ok"] is False
    words = r"weight \[5, 17\] is \S+, the source has \S+: further off than fp8 can be"
    assert [bool(re.search(words, problem)) for problem in result["problems"]].count(True) == 1


def test_verify_finds_kept_bytes_that_differ(cli: Cli, converted: Converted, checkpoint: Path) -> None:
    path = converted("fp8")
    flip(path, "embed_tokens.weight", 3, 1)
    done = cli("verify", path, "--against", checkpoint)
    assert done.status == 1
    assert "broken: embed_tokens: kept, but its bytes differ" in done.out


def test_verify_finds_what_is_missing_or_cut_off(cli: Cli, converted: Converted, checkpoint: Path,
                                                 tmp_path: Path) -> None:  # fmt: skip
    path = converted("mxfp8")
    tensors = load_file(path)
    fewer = {name: tensor for name, tensor in tensors.items() if name != "blocks.1.norm.weight"}
    save_file(fewer, tmp_path / "fewer.safetensors")
    done = cli("verify", tmp_path / "fewer.safetensors", "--against", checkpoint)
    assert done.status == 1
    assert "broken: blocks.1.norm: missing from the output" in done.out
    save_file({**tensors, "extra.bias": tensors["blocks.0.norm.weight"] + 1}, tmp_path / "more.safetensors")
    done = cli("verify", tmp_path / "more.safetensors", "--against", checkpoint)
    assert done.status == 0
    assert "warning: extra.bias: not in the source" in done.out
    path.write_bytes(path.read_bytes()[:-1000])
    done = cli("verify", path, "--against", checkpoint)
    assert (done.status, done.out) == (1, "")
    assert "out.safetensors: tensor " in done.err
    assert "beyond the file's" in done.err


def test_verify_against_another_model(cli: Cli, converted: Converted, tmp_path: Path) -> None:
    other = write_file(tmp_path / "other.safetensors", {"else.weight": make_tensors()["odd.weight"]})
    done = cli("verify", converted("mxfp8"), "--against", other)
    assert done.status == 1
    assert "note: the files were made from" in done.out
    assert "broken: no tensor name in common: is SOURCE the checkpoint that OUTPUT was made from?" in done.out
    assert "BROKEN (1 problem)" in done.out


def test_verify_accepts_outliers_in_int8(cli: Cli, tmp_path: Path) -> None:
    """One large weight makes every step coarse: that is the format, not damage."""
    tensors = make_tensors()
    tensors["odd.weight"][3, 5] = 40.0
    source = write_file(tmp_path / "in.safetensors", tensors)
    Pipeline().read(source).quantize("int8", scaling="tensor").write(tmp_path / "out.safetensors")
    done = cli("verify", tmp_path / "out.safetensors", "--against", source, "--json")
    assert done.status == 0, done.out
    assert max(layer["error"] for layer in json.loads(done.out)["layers"]) > 0.005


def test_verify_against_several_files(cli: Cli, sharded: Path, tmp_path: Path) -> None:
    files = sorted(sharded.glob("*.safetensors"))
    report = Pipeline().read(files).quantize("fp8").write(tmp_path / "out.safetensors")
    done = cli(*shlex.split(report.verify_command)[1:])
    assert done.status == 0, done.err


def test_the_verify_command_of_shards_beside_each_other(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    report = Pipeline().read(checkpoint).quantize("fp8").write(out, shard_size="100KB")
    words = shlex.split(report.verify_command)
    assert words[2] == report.index == f"{out}.index.json"
    assert Path(words[2]).is_file()
    assert str(report).startswith(f"{words[2]}: ")
    done = cli(*words[1:])
    assert (done.status, done.err) == (0, "")


def test_verify_and_inspect_folders(cli: Cli, sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("convert", sharded, out, "--format", "mxfp8", "--shard-size", "100KB", "-q").status == 0
    done = cli("verify", out, "--against", sharded, "--json")
    assert done.status == 0
    assert len(json.loads(done.out)["layers"]) == TENSORS
    found = json.loads(cli("inspect", out, "--json").out)
    assert found["formats"]["mxfp8"]["layers"] == LINEAR
    assert len(found["files"]) > 1


def test_verify_against_a_quantized_source(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    middle, out = tmp_path / "middle.safetensors", tmp_path / "out.safetensors"
    assert cli("convert", checkpoint, middle, *flags(FORMATS["fp8 block"]), "-q").status == 0
    assert cli("convert", middle, out, "--format", "nvfp4", "--exclude", "mlp", "-q").status == 0
    done = cli("verify", out, "--against", middle)
    assert done.status == 0, done.out
    assert cli("verify", out, "--against", checkpoint).status == 0
    assert cli("verify", checkpoint, "--against", middle).status == 1  # the source of it all is not what it decodes to


def test_inspect(cli: Cli, converted: Converted, checkpoint: Path) -> None:
    done = cli("inspect", checkpoint)
    assert (done.status, done.err) == (0, "")
    assert re.search(r"1 file, 15 tensors, [\d.]+ kB", done.out)
    assert "metadata author: someone" in done.out
    path = converted("fp8 block")
    done = cli("inspect", path, "--layers")
    assert re.search(r"fp8 block 64 .* 6 ", done.out)
    assert "1 file, 6 quantized layers, 9 other tensors, " in done.out
    assert "dialect comfy: 6 quantized layers" in done.out
    assert re.search(r"blocks.0.attn.qkv .*384x128 .*fp8 block 64", done.out)
    found = json.loads(cli("inspect", path, "--json").out)
    assert found["formats"]["fp8 block 64"]["layers"] == 6
    assert found["dialects"] == {"comfy": 6}
    assert len(found["layers"]) == TENSORS
    assert "quantloom" in found["metadata"]


def test_formats(cli: Cli) -> None:
    done = cli("formats")
    assert done.status == 0
    shown = re.findall(r"^(\w+)  +\S", done.out, re.MULTILINE)
    assert {"fp8", "fp8_e5m2", "int8", "mxfp8", "nvfp4"} <= set(shown)
    found = json.loads(cli("formats", "--json").out)
    assert {info["name"]: info["bits"] for info in found}["nvfp4"] == 4.5


# -- start-up ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import quantloom",
        "from quantloom.flow.cli import cli; cli.main(['--help'], standalone_mode=False)",
        "from quantloom.flow.cli import cli; cli.main(['convert', '--help'], standalone_mode=False)",
        "from quantloom.flow.cli import cli; cli.main(['formats', '--json'], standalone_mode=False)",
    ],
)
def test_torch_is_not_loaded_before_it_is_needed(code: str) -> None:
    heavy = "{'torch', 'numpy', 'distributed', 'safetensors'} & set(sys.modules)"
    done = child("-c", f"import sys\n{code}\nprint({heavy}, file=sys.stderr)")
    assert done.status == 0, done.err
    assert done.err == "set()\n"


def test_the_module_runs_as_a_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["quantloom", "--version"])
    monkeypatch.delitem(sys.modules, "quantloom.flow.cli")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("quantloom.flow.cli", run_name="__main__")
    assert not ended.value.code
    assert quantloom.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("words", [["inspect", "{in}", "--json"], ["formats"]], ids=["long", "short"])
def test_a_reader_that_goes_away_is_no_error_message(words: list[str], checkpoint: Path) -> None:
    arguments = [word.format(**{"in": checkpoint}) for word in words]
    script = f"""
import os, sys
from quantloom.flow.cli import main
read, write = os.pipe()
os.close(read)
os.dup2(write, 1)
main({arguments!r})
"""
    done = child("-c", script)
    assert "Traceback" not in done.err
    assert "Exception ignored" not in done.err


def test_recipes_of_both_doors_are_equal(checkpoint: Path) -> None:
    from quantloom.flow.options import build_recipe

    options = {"format_": "int8", "rotate": "hadamard:64", "exclude": "odd", "memory": "1GB", "workers": 2}
    recipe = build_recipe((str(checkpoint),), "out.safetensors", options)
    pipeline = Pipeline(memory="1GB", workers=2).read(checkpoint).target(exclude="odd")
    pipeline = pipeline.quantize("int8", rotate="hadamard:64")
    assert recipe == pipeline.write("out.safetensors", compute=False).recipe
    assert Recipe.from_json(recipe.to_json()) == recipe


# -- options that are given several times, and switches ----------------------------------------------------------------


def test_patterns_add_up(checkpoint: Path, cli: Cli) -> None:
    def quantized(*arguments: str) -> set[str]:
        done = cli("plan", checkpoint, "--format", "fp8", "--json", *arguments)
        assert done.status == 0, done.err
        return {layer["name"] for layer in json.loads(done.out)["layers"] if layer["format"]}

    every = quantized()
    assert quantized("--exclude", "mlp", "--exclude", "qkv") == {n for n in every if "mlp" not in n and "qkv" not in n}
    assert quantized("--include", "mlp", "--include", "qkv") == {
        name for name in every if "mlp" in name or "qkv" in name
    }


def test_a_recipe_of_another_command(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(Pipeline().hybrid().recipe.to_json())
    done = cli("convert", checkpoint, tmp_path / "o", "--recipe", tmp_path / "recipe.json", "--format", "fp8")
    assert done.status == 2
    assert "holds the stage hybrid, which has a command of its own" in done.err


def test_switches_of_a_recipe_can_be_turned_off(tmp_path: Path) -> None:
    recipe = Pipeline().target(heuristics=True).quantize("fp8", full_precision_matmul=True)
    written = recipe.write("old", overwrite=True, compute=False).recipe
    (tmp_path / "recipe.json").write_text(written.to_json())
    base = {"recipe_file": str(tmp_path / "recipe.json")}

    def switches(**options: object) -> tuple[bool, ...]:
        made = build_recipe(("m",), "o", {**base, **options}).to_dict()
        target, quantize = made["stages"]
        return target["heuristics"], quantize["full_precision_matmul"], made["output"]["overwrite"]

    assert switches() == (True, True, True)
    assert switches(heuristics=False, full_precision_matmul=False, overwrite=False) == (False, False, False)
    for command in ("convert", "plan"):
        names = {name for option in group.commands[command].params for name in option.secondary_opts}
        assert {"--no-heuristics", "--no-full-precision-matmul", "--no-overwrite"} <= names


# -- signals -----------------------------------------------------------------------------------------------------------

_SIGNALLED = """
import os, signal, sys, click
from quantloom.flow.entry import run_command
@click.command()
def command():
    try:
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
        print("went on")
    finally:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            os.kill(os.getpid(), getattr(signal, name))
        print("tidy")
if sys.argv[2] == "ignored":
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
run_command(command, "x", [])
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of another kind")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_stop_once_and_ignored_ones_stay_ignored(name: str) -> None:
    done = child("-c", _SIGNALLED, name, "kept")
    assert (done.status, done.out.strip()) == (1, "tidy"), done.err
    assert "Traceback" not in done.err
    assert child("-c", _SIGNALLED, name, "ignored") == Ran(0, "went on\ntidy\n", "")
