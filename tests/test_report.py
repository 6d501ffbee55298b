"""The report of a run: a value for programs, people and notebooks, and an error estimate that can be trusted."""

from __future__ import annotations

import io
import json
import shlex
from dataclasses import FrozenInstanceError, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from checkpoints import FORMATS, LINEAR, make_tensors, write_file
from rich.console import Console
from rich.table import Table

from quantloom import Pipeline
from quantloom.flow import parts
from quantloom.flow.budget import peak_memory
from quantloom.flow.layer_report import LayerReport
from quantloom.flow.report import Report
from quantloom.flow.tables import short_size, shortened
from quantloom.flow.verify import verify


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_file(tmp_path_factory.mktemp("source") / "tiny.safetensors")


@pytest.fixture(scope="module")
def report(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    output = tmp_path_factory.mktemp("output") / "out put.safetensors"
    return Pipeline().read(source).quantize("nvfp4").write(output)


def shown(report: Report, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(report)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_value(report: Report, source: Path) -> None:
    assert report.source == (str(source),)
    assert len(report.layers) == LINEAR
    assert report.nbytes_out == Path(report.output).stat().st_size
    assert report.nbytes_in == sum(tensor.nbytes for tensor in make_tensors().values())
    assert report.ratio == report.nbytes_out / report.nbytes_in
    assert report.kept == {"1-D (norm, scale or bias)": 2, "4-D convolution": 1, "embedding table": 1}
    assert report.seconds > 0
    assert report.peak_bytes > 50_000_000
    assert report.warnings == ("no preset fits these keys; only the rules by name keep layers (see --preset)",)
    errors = [layer.error for layer in report.worst]
    assert errors == sorted(errors, reverse=True)
    assert all(0.05 < error < 0.15 for error in errors)
    with pytest.raises(FrozenInstanceError):
        report.output = "x"  # type: ignore[misc]


def test_json(report: Report) -> None:
    value = json.loads(report.to_json())
    assert value == report.to_dict()
    words = "source output bytes_in bytes_out ratio seconds peak_memory_bytes layers changed kept notes warnings verify"
    assert set(value) == {*words.split(), "distributed", "resumed_bytes", "failed"}
    assert all(layer["error_sampled"] is True and layer["rounding"] == "mse" for layer in value["layers"])
    assert value["distributed"] is False
    layer = value["layers"][0]
    assert set(layer) == {*["name", "format", "rounding", "bytes_in", "bytes_out", "error", "error_sampled", "seconds"]}
    assert layer["format"] == "nvfp4"
    assert sum(layer["bytes_in"] for layer in value["layers"]) < value["bytes_in"]


def test_the_verify_command_is_exact(report: Report, source: Path) -> None:
    words = shlex.split(report.verify_command)
    assert words == ["quantloom", "verify", report.output, "--against", str(source)]
    assert " " in report.output  # so that the quoting matters
    several = replace(report, source=("a b", "c"))
    assert shlex.split(several.verify_command)[3:] == ["--against", "a b", "--against", "c"]


def test_the_table(report: Report) -> None:
    table = report.table()
    assert isinstance(table, Table)
    assert table.row_count == LINEAR
    assert report.table(2).row_count == 2
    headings = [column.header for column in table.columns]
    assert headings == ["layer", "format", "error (sampled)", "before", "after", "time"]


def test_short_forms(report: Report) -> None:
    assert str(report) == report.summary()
    assert len(repr(report)) < len(report.output) + len(report.source[0]) + 100
    assert repr(report).startswith("Report(")
    assert "7 layers quantized" in repr(report)
    assert "errors are measured on a sample of rows" in str(report)
    assert "<th>error (sampled)</th>" in report._repr_html_()
    assert ", peak memory of the client " in str(replace(report, distributed=True))
    assert ", peak memory " in str(report)
    assert "client" not in str(report)


def test_a_soft_wrapped_report_is_not_cut(report: Report) -> None:
    console = Console(width=60, file=io.StringIO())
    console.print(report, soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    assert report.summary() in console.file.getvalue()


def test_short_sizes() -> None:
    shown = [short_size(size) for size in (0, 999, 1000, 9949, 9951, 999_499, 999_500, 12e9, 5e12, 2e15)]
    assert shown == ["0 B", "999 B", "1.0 kB", "9.9 kB", "10 kB", "999 kB", "1.0 MB", "12 GB", "5.0 TB", "2000 TB"]


def test_shortened_reasons() -> None:
    assert shortened("output head", 20) == "output head"
    assert shortened("output head; and why", 20) == "output head"
    assert shortened("ComfyUI reads this layer's shape", 20) == "ComfyUI reads this…"
    assert shortened("1-D (norm, scale or bias)", 11) == "1-D (norm…"
    assert shortened("x" * 30, 20) == "x" * 19 + "…"


@pytest.mark.parametrize("width", [70, 80, 200])
def test_on_a_console(width: int, report: Report) -> None:
    lines = shown(report, width).splitlines()
    assert max(map(len, lines)) <= width
    assert "Worst layers by error (of 7):" in lines
    text = "".join(lines).replace(" ", "")  # lines break anywhere, but nothing is lost
    assert "…" not in text
    kept = ("kept 1 tensor: embedding table", "kept 2 tensors: 1-D (norm, scale or bias)")
    wanted = (f"{report.output}: 638.80 kB -> ", "7 layers quantized", "peak memory", *kept)
    for words in (*wanted, f"check it: {report.verify_command}"):
        assert words.replace(" ", "") in text


def test_names_are_no_markup(report: Report) -> None:
    odd = replace(report, output="[/red]", layers=(LayerReport("a[0].[bold]b", "fp8", 10, 5, 0.1, 1.0),))
    text = shown(odd, 120)
    assert "a[0].[bold]b" in text
    assert "[/red]: " in text


def test_a_run_without_a_single_weight_byte_of_time(report: Report) -> None:
    assert ", 0 B/s, " in replace(report, seconds=0.0).summary()
    assert replace(report, nbytes_in=0).ratio == 1.0


def test_in_a_notebook(report: Report) -> None:
    class Balanced(HTMLParser):
        stack: list[str] = []  # noqa: RUF012
        seen: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.stack.append(tag)
            self.seen.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.stack.pop() == tag

    odd = replace(report, layers=(*report.layers, LayerReport("<script>&", "fp8", 10, 5, 0.1, 1.0)))
    text = odd._repr_html_()
    parser = Balanced()
    parser.feed(text)
    assert parser.stack == []
    assert parser.seen.count("tr") == LINEAR + 2
    assert "<script>" not in text
    assert "&lt;script&gt;&amp;" in text


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("split", [False, True])
def test_the_estimated_error_is_close_to_the_true_one(name: str, split: bool, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The report looks at a sample of rows while it writes; verify reads every weight back."""
    if split:
        monkeypatch.setattr(parts, "PART_BYTES", 100_000)
    generator = torch.Generator().manual_seed(5)
    tensors = {f"blocks.{number}.weight": torch.randn(640, 256, generator=generator) * 0.02 for number in range(2)}
    source = write_file(tmp_path / "in.safetensors", tensors)
    report = Pipeline().read(source).stage("quantize", **FORMATS[name]).write(tmp_path / "out.safetensors")
    result = verify(str(tmp_path / "out.safetensors"), str(source))
    assert result.ok, result.problems
    true = {layer.name: layer.error for layer in result.worst}
    assert len(true) == len(report.layers) == 2
    for layer in report.layers:
        assert layer.error == pytest.approx(true[layer.name], rel=0.03)


def test_zero_weights_have_no_error(tmp_path: Path) -> None:
    source = write_file(tmp_path / "in.safetensors", {"a.weight": torch.zeros(64, 64), "b.weight": torch.ones(64, 64)})
    for name, options in FORMATS.items():
        report = Pipeline().read(source).stage("quantize", **options).write(tmp_path / f"{name}.safetensors")
        assert {layer.name: layer.error for layer in report.layers}["a"] == 0.0
        result = verify(str(tmp_path / f"{name}.safetensors"), str(source))
        assert result.ok, (name, result.problems)
        assert json.loads(report.to_json())["layers"][0]["error"] == 0.0


def test_verification_as_a_value(report: Report, source: Path) -> None:
    result = verify(report.output, str(source))
    value = result.to_dict()
    assert value["ok"] is True
    assert value["problems"] == value["missing"] == value["unknown"] == []
    assert json.loads(json.dumps(value)) == value
    assert [layer.name for layer in result.worst] == sorted(
        (layer.name for layer in result.worst), key=lambda name: -{x.name: x.error for x in result.layers}[name]
    )


def test_peak_memory_is_in_bytes() -> None:
    assert 20_000_000 < peak_memory() < 10**12
