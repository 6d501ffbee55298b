"""Already quantized checkpoints, every dialect with every format: decoded exactly, requantized, kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantized_cases import (
    CASES,
    LAYER,
    Case,
    convert,
    decode,
    header_of,
    layer_of,
    marker_of,
    same_bytes,
    save,
    swizzle,
)
from safetensors.torch import load_file, save_file

from quantloom.flow.verify import verify
from quantloom.formats.layers import group_layers
from quantloom.formats.source import open_source
from quantloom.formats.stored import Undecodable, _block_edge, fits
from quantloom.formats.tensors import TensorRef

if TYPE_CHECKING:
    from quantloom.formats.layers import Layer

OTHER = "blocks.1.lin"
PLAIN = {OTHER + ".weight": torch.randn(32, 64, dtype=torch.bfloat16)}
"""A layer to quantize beside the one that is kept: a run that quantizes nothing is refused."""


def form(layer: Layer) -> str:
    """``fp8 block 64``, ``int8 row rotated 16``."""
    assert layer.encoding is not None, layer.problem
    words = [str(word) for word in layer.encoding.format if word is not None]
    return " ".join(words + ([f"rotated {layer.encoding.rotation}"] if layer.encoding.rotation else []))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def test_decodes_to_the_definition_by_any_row_ranges(case: Case, tmp_path: Path) -> None:
    layer = layer_of(save(tmp_path, case.stored(), case.config))
    assert layer.problem is None
    assert form(layer) == case.format
    assert layer.encoding is not None
    assert layer.encoding.dialect == case.dialect
    rows, columns = layer.weight.shape
    assert (rows, columns) == case.weight.shape
    whole, wanted = decode(layer, [(0, rows)]), torch.from_numpy(case.weight)
    if case.tolerance:
        assert (whole - wanted).abs().max() <= case.tolerance * wanted.abs().max()
    else:
        assert torch.equal(whole, wanted)
    for cut in (1, rows // 2, rows - 1):
        assert torch.equal(decode(layer, [(0, cut), (cut, rows)], columns * 7), whole)


@pytest.mark.parametrize("format", ["int8", "nvfp4"])
def test_requantizes_as_if_the_weights_were_plain(case: Case, format: str, tmp_path: Path) -> None:
    quantized = save(tmp_path / "quantized", case.stored(), case.config)
    layer = layer_of(quantized)
    plain = save(tmp_path / "plain", {LAYER + ".weight": decode(layer, [(0, layer.weight.shape[0])])})
    ours = load_file(convert(quantized, tmp_path / "ours.safetensors", format))
    theirs = load_file(convert(plain, tmp_path / "theirs.safetensors", format))
    assert set(ours) == set(theirs)
    assert all(same_bytes(ours[name], theirs[name]) for name in set(ours) - {LAYER + ".comfy_quant"})
    assert verify(str(tmp_path / "ours.safetensors"), str(quantized)).ok


def test_keeps_what_markers_describe_and_decodes_the_rest(case: Case, tmp_path: Path) -> None:
    source = save(tmp_path / "in", case.stored() | PLAIN, case.config)
    output = convert(source, tmp_path / "out.safetensors", exclude=r"blocks\.0\.")
    made, header = load_file(output), header_of(output)
    names = {".scale_weight": ".weight_scale"}
    if case.passes:
        kept = {LAYER + names.get(part, part): tensor for part, tensor in case.tensors.items()}
        assert all(same_bytes(made[name], tensor) for name, tensor in kept.items())
    else:
        dtype = torch.float16 if (case.config or {}).get("torch_dtype") == "float16" else torch.bfloat16
        kept = {LAYER + ".weight": torch.from_numpy(case.weight).to(dtype)}
        assert same_bytes(made[LAYER + ".weight"], kept[LAYER + ".weight"])
    marker = case.marker
    if case.dialect == "legacy" and case.passes:
        marker = {"format": "float8_e5m2" if "e5m2" in case.format else "float8_e4m3fn"}
        marker |= {"full_precision_matrix_mult": True} if "blocks.scaled_fp8" in case.extra else {}
    assert header.get(LAYER) == marker
    assert marker is None or marker_of(made) == marker
    rest = {name for name in made if not name.startswith(OTHER)}
    assert rest == set(kept) | ({LAYER + ".comfy_quant"} if marker else set())
    assert verify(str(output), str(source)).ok


@pytest.mark.parametrize(
    ("name", "label", "decodes_to"),
    [
        ("comfy fp8 row", "float8_e4m3fn_blockwise", "fp8 row"),
        ("comfy fp8 block", "float8_e4m3fn_rowwise", "fp8 block 64"),
        ("comfy int8 block", "int8_tensorwise", "int8 block 32"),
    ],
)
def test_a_wrong_label_is_read_by_its_scales_and_not_passed_on(
    name: str, label: str, decodes_to: str, tmp_path: Path
) -> None:
    case = CASES[name]()
    case.marker = {"format": label, "group_size": 64}
    source = save(tmp_path / "in", case.stored() | PLAIN)
    assert form(layer_of(source)) == decodes_to
    output = convert(source, tmp_path / "out.safetensors", exclude=r"blocks\.0\.")
    made = load_file(output)
    assert torch.equal(made[LAYER + ".weight"], torch.from_numpy(case.weight).bfloat16())
    assert LAYER + ".comfy_quant" not in made
    assert LAYER not in header_of(output)


def test_one_scale_fits_every_label(tmp_path: Path) -> None:
    case = CASES["comfy fp8"]()
    case.marker = {"format": "float8_e4m3fn_rowwise"}
    source = save(tmp_path / "in", case.stored() | PLAIN)
    made = load_file(convert(source, tmp_path / "out.safetensors", exclude=r"blocks\.0\."))
    assert made[LAYER + ".weight"].dtype == torch.float8_e4m3fn


def test_tables_and_tensors_that_stand_alone_are_copied(tmp_path: Path) -> None:
    tensors = {
        "ids.weight": torch.arange(12).view(3, 4),
        "norm.weight": torch.ones(8).to(torch.float8_e4m3fn),
        "conv.weight": torch.randn(2, 2, 3, 3).to(torch.float8_e4m3fn),
        "weight": torch.randn(4, 4),
        "scale_weight": torch.ones(2),
    }
    source = save(tmp_path / "in", tensors | PLAIN)
    assert not any(layer.problem for layer in group_layers(open_source(source)))
    made = load_file(convert(source, tmp_path / "out.safetensors"))
    assert all(same_bytes(made[name], tensor) for name, tensor in tensors.items())


def test_activation_scales_beside_a_float_weight_give_way_to_those_that_are_written(tmp_path: Path) -> None:
    tensors = {LAYER + ".weight": torch.randn(32, 64), LAYER + ".input_scale": torch.ones(())}
    made = load_file(convert(save(tmp_path / "in", tensors), tmp_path / "out.safetensors", "fp8", input_scale=0.5))
    assert made[LAYER + ".input_scale"] == 0.5


def test_a_weight_and_its_scale_may_lie_in_different_shards(tmp_path: Path) -> None:
    case = CASES["deepseek blocks"]()
    for number, (part, tensor) in enumerate(case.tensors.items()):
        save_file({LAYER + part: tensor}, tmp_path / f"model-{number}.safetensors")
    layer = layer_of(tmp_path)
    assert torch.equal(decode(layer, [(0, 130)], 1000), torch.from_numpy(case.weight))


def test_the_dtype_of_a_decoded_layer_is_that_of_the_model(tmp_path: Path) -> None:
    dtypes = {"torch.float32": "F32", "float16": "F16", "bfloat16": "BF16", None: "BF16"}
    for number, (name, wanted) in enumerate(dtypes.items()):
        path = save(tmp_path / str(number), CASES["scaled fp8 without a marker"]().stored(), {"dtype": name})
        assert layer_of(path).weight.dtype == wanted


@given(rows=st.integers(1, 600), columns=st.integers(1, 600), power=st.integers(1, 9), declared=st.booleans())
def test_block_sizes_are_found_or_refused_but_never_guessed_wrong(
    rows: int, columns: int, power: int, declared: bool
) -> None:
    edge, shape = 1 << power, (rows, columns)
    scale = TensorRef("x.weight_scale", "F32", (-(-rows // edge), -(-columns // edge)), "", 0)
    try:
        found = _block_edge(shape, scale, (edge, edge) if declared else None)
    except Undecodable:
        found = 0
    if declared:
        assert found == edge
    elif found:
        likely = [size for size in range(2, 1024) if fits(shape, scale.shape, (size, size))]
        assert edge in likely
        assert found == edge or scale.shape == (1, 1)


def test_the_swizzle_of_these_cases_is_the_documented_one() -> None:
    plain = np.arange(256 * 8, dtype=np.int64).reshape(256, 8).astype(np.uint8)
    assert swizzle(plain).reshape(-1)[512 + 5 * 16 + 2 * 4 + 3] == plain[69, 7]
