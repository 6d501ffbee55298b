"""Descriptions of layers that strangers wrote: what cannot be written again or steers a terminal goes no further."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import Ran, listing
from quantized_cases import marker_tensor
from safetensors.torch import save_file

Cli = Callable[..., Ran]
NAME = "blocks.0.lin"


def save(folder: Path, marker: bytes, name: str = NAME, weight: torch.Tensor | None = None) -> Path:
    """An FP8 layer with this marker."""
    codes = torch.ones(16, 16) if weight is None else weight
    described = torch.frombuffer(bytearray(marker), dtype=torch.uint8)
    tensors = {"weight": codes.to(torch.float8_e4m3fn), "weight_scale": torch.ones(()), "comfy_quant": described}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"{name}.{part}": tensor for part, tensor in tensors.items()}, folder / "in.safetensors")
    return folder / "in.safetensors"


VERBS = {
    "edit": ("--add", "note=1"), "edit --in-place": ("--add", "note=1"), "dequantize": (),
    "migrate": ("--to", "same", "--input-scale", "1"),
}  # fmt: skip


def run(cli: Cli, verb: str, source: Path, *options: str) -> Ran:
    command, *flags = verb.split()
    output = () if flags else (source.with_name("out.safetensors"),)
    return cli(command, source, *output, *flags, *(options or VERBS[verb]))


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("value", "words"),
    [("1e999", "'1e999' is too large a number"), ("[" * 900 + "]" * 900, "nested deeper than 64 levels")],
)
def test_markers_that_could_not_be_written_again(value: str, words: str, verb: str, tmp_path: Path, cli: Cli) -> None:
    source = save(tmp_path, f'{{"format": "float8_e4m3fn", "x": {value}}}'.encode())
    before = listing(tmp_path)
    ran = run(cli, verb, source)
    assert ran.status == 1
    assert f"{source}: {NAME}.comfy_quant" in ran.err
    assert words in ran.err
    assert listing(tmp_path) == before


def test_an_edit_adds_no_value_that_could_not_be_read(tmp_path: Path, cli: Cli) -> None:
    source = save(tmp_path, b'{"format": "float8_e4m3fn"}')
    ran = run(cli, "edit", source, "--add", f"x={'[' * 900 + ']' * 900}")
    assert (ran.status, len(listing(tmp_path))) == (2, 1)
    assert "nested deeper than 64 levels" in ran.err


@pytest.mark.parametrize("shape", [(256,), (4, 8, 8)])
@pytest.mark.parametrize("added", ["group_size=32", "format=mxfp8", "orig_shape=[16,16]", "per_row=true"])
def test_keys_of_a_matrix_beside_what_is_none(added: str, shape: tuple[int, ...], tmp_path: Path, cli: Cli) -> None:
    source = save(tmp_path, b'{"format": "float8_e4m3fn"}', weight=torch.ones(shape))
    ran = run(cli, "edit", source, "--add", added)
    assert (ran.status, len(listing(tmp_path))) == (1, 1)
    assert f"describes a matrix, stored is a weight of shape {list(shape)}" in ran.err


@pytest.mark.parametrize("verb", ["edit", "edit --in-place"])
def test_names_and_keys_cannot_steer_the_terminal(verb: str, tmp_path: Path, cli: Cli) -> None:
    """Neither in warnings and notes nor in reports."""
    odd = "a\x1b[31m\nerror: forged"
    marker = bytes(marker_tensor({"format": "float8_e4m3fn", odd: 1}).tolist())
    source = save(tmp_path, marker, odd)
    ran = run(cli, verb, source, "--remove", f"{odd},lacking")
    assert ran.status == 0
    assert "\\x1b[31m" in ran.out + ran.err
    assert "\x1b" not in ran.out + ran.err
    assert not any(line.startswith("error: forged") for line in (ran.out + ran.err).splitlines())


def test_a_header_that_is_nested_too_deep(tmp_path: Path, cli: Cli) -> None:
    deep = "[" * 900 + "]" * 900
    entry = json.dumps({"layers": {NAME: {"format": "float8_e4m3fn", "x": 0}}}).replace("0", deep)
    tensors = {f"{NAME}.weight": torch.ones(16, 16).to(torch.float8_e4m3fn), f"{NAME}.weight_scale": torch.ones(())}
    save_file(tensors, tmp_path / "in.safetensors", {"_quantization_metadata": entry})
    ran = run(cli, "migrate", tmp_path / "in.safetensors")
    assert ran.status == 1
    assert "header entry _quantization_metadata is nested deeper than 64 levels" in ran.err
