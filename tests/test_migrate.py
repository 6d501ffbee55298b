"""Migrations between ``scaled_fp8`` files and ComfyUI's markers: codes and scales are copied, names are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Ran
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_cases import (
    CASES,
    LAYER,
    Case,
    decode,
    deepseek,
    header_of,
    layer_of,
    marker_of,
    marker_tensor,
    same_bytes,
    save,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantloom import Pipeline
from quantloom.flow import compat
from quantloom.flow.inspect import inspect
from quantloom.flow.report import Report
from quantloom.flow.verify import verify
from quantloom.formats.errors import CheckpointError, NonFiniteError, PlanError, UsageError

Tensors = dict[str, torch.Tensor]
Cli = Callable[..., Ran]
PLAIN: Tensors = {"blocks.1.lin.weight": torch.randn(32, 64), "norm.weight": torch.ones(64, dtype=torch.bfloat16)}
MARK: Tensors = {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}


def migrate(source: Path, output: Path, to: str = "comfy", **options: Any) -> Report:
    return Pipeline(scheduler="sync").read(source).migrate(to, **options).write(output)


def fp8(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=random) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)


def int8(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(1))


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) / 100 + 0.001


def legacy(weight: torch.Tensor, scale: torch.Tensor, layer: str = LAYER, **more: torch.Tensor) -> Tensors:
    return {f"{layer}.weight": weight, f"{layer}.scale_weight": scale} | {
        f"{layer}.{part}": tensor for part, tensor in more.items()
    }


def equal(one: Tensors, other: Tensors) -> bool:
    return set(one) == set(other) and all(same_bytes(one[name], other[name]) for name in one)


def weights_of(path: Path, layer: str = LAYER) -> torch.Tensor:
    found = layer_of(path, layer)
    return decode(found, [(0, found.weight.shape[0])])


# ---- to comfy ----

FORMS: dict[str, tuple[torch.Tensor, torch.Tensor, dict[str, Any], tuple[int, ...]]] = {
    "tensor": (fp8(48, 80), scales(), {"format": "float8_e4m3fn"}, ()),
    "tensor of one number": (fp8(48, 80), scales(1), {"format": "float8_e4m3fn"}, (1,)),
    "e5m2": (fp8(48, 80).to(torch.float8_e5m2), scales(), {"format": "float8_e5m2"}, ()),
    "row": (fp8(48, 80), scales(48), {"format": "float8_e4m3fn_rowwise"}, (48,)),
    "row in a column": (fp8(48, 80), scales(48, 1), {"format": "float8_e4m3fn_rowwise"}, (48,)),
    "row of a wide layer": (fp8(4, 256), scales(4), {"format": "float8_e4m3fn_rowwise"}, (4,)),
    "block": (fp8(48, 80), scales(3, 5), {"format": "float8_e4m3fn_blockwise", "group_size": 16}, (3, 5)),
    "flat block": (fp8(48, 80), scales(15), {"format": "float8_e4m3fn_blockwise", "group_size": 16}, (3, 5)),
    "int8 tensor": (int8(48, 80), scales(), {"format": "int8_tensorwise"}, ()),
    "int8 row": (int8(96, 64), scales(96, 1), {"format": "int8_tensorwise", "per_row": True}, (96, 1)),
    "int8 flat row": (int8(96, 64), scales(96), {"format": "int8_tensorwise", "per_row": True}, (96, 1)),
    "int8 block": (int8(48, 80), scales(3, 5), {"format": "int8_blockwise", "group_size": 16}, (3, 5)),
}
"""Codes, stored scales -> marker, and the shape of the scales."""


@pytest.mark.parametrize("name", FORMS)
def test_the_marker_follows_from_the_shape_of_the_scales(name: str, tmp_path: Path) -> None:
    """Row scales have as many numbers as the weight has rows, whatever its columns; nothing is decoded or padded."""
    weight, scale, marker, shape = FORMS[name]
    source = save(tmp_path / "in", legacy(weight, scale) | MARK | PLAIN)
    report = migrate(source, tmp_path / "out.safetensors")
    made = load_file(tmp_path / "out.safetensors")
    wanted = PLAIN | {f"{LAYER}.weight": weight, f"{LAYER}.weight_scale": scale.reshape(shape)}
    wanted[f"{LAYER}.comfy_quant"] = marker_tensor(marker)
    if marker["format"] == "int8_blockwise":
        wanted[f"{LAYER}.input_scale"] = torch.tensor(1.0)
    assert equal(made, wanted)
    assert header_of(tmp_path / "out.safetensors") == {LAYER: marker}
    assert sum(report.changed.values()) == 1
    assert torch.equal(weights_of(tmp_path / "out.safetensors"), weights_of(source))
    checked = verify(str(tmp_path / "out.safetensors"), str(source))
    assert checked.ok
    assert [layer.error for layer in checked.worst] == [0.0]


@pytest.mark.parametrize("name", ["int8 row", "int8 tensor", "row"])
def test_scales_that_lost_their_markers_get_them(name: str, tmp_path: Path) -> None:
    weight, scale, marker, shape = FORMS[name]
    source = save(tmp_path / "in", {f"{LAYER}.weight": weight, f"{LAYER}.weight_scale": scale})
    migrate(source, tmp_path / "out.safetensors")
    made = load_file(tmp_path / "out.safetensors")
    assert marker_of(made) == marker
    assert same_bytes(made[f"{LAYER}.weight_scale"], scale.reshape(shape))


def test_what_comfyui_makes_of_a_legacy_file_is_what_is_written(tmp_path: Path) -> None:
    """By its rules: scales renamed, every layer float8_e4m3fn, two numbers in the marker mean full precision."""
    tensors = legacy(fp8(48, 80), scales(), scale_input=torch.tensor([0.25])) | legacy(fp8(16, 16), scales(), "b.c")
    tensors |= {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn), f"{LAYER}.bias": torch.ones(48)}
    read = {}
    for name, tensor in tensors.items():
        if name.endswith(".scale_weight"):
            entry = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
            read[name.replace(".scale_weight", ".comfy_quant")] = marker_tensor(entry)
        if name != "scaled_fp8":
            read[name.replace(".scale_weight", ".weight_scale").replace(".scale_input", ".input_scale")] = tensor
    migrate(save(tmp_path / "in", tensors), tmp_path / "out.safetensors")
    assert equal(load_file(tmp_path / "out.safetensors"), read)


def test_blocks_of_deepseek_and_compressed_tensors_are_relabelled_where_they_fit(tmp_path: Path) -> None:
    tensors = {f"{LAYER}.weight": fp8(256, 384), f"{LAYER}.weight_scale_inv": scales(2, 3).bfloat16()}
    source = save(tmp_path / "in", tensors, deepseek(128)).parent
    migrate(source, tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert marker_of(made) == {"format": "float8_e4m3fn_blockwise", "group_size": 128}
    assert same_bytes(made[f"{LAYER}.weight_scale"], tensors[f"{LAYER}.weight_scale_inv"].float())
    assert torch.equal(weights_of(tmp_path / "out"), weights_of(source))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"torch_dtype": "float16"}


@pytest.mark.parametrize(
    ("name", "label", "wanted"),
    [
        ("comfy fp8 row", "float8_e4m3fn_blockwise", {"format": "float8_e4m3fn_rowwise"}),
        ("comfy fp8", "float8_e4m3fn_rowwise", {"format": "float8_e4m3fn"}),
        ("comfy int8 block", "int8_tensorwise", {"format": "int8_blockwise", "group_size": 32}),
        ("comfy fp8 block without group_size", "float8_e4m3fn_blockwise",
         {"format": "float8_e4m3fn_blockwise", "group_size": 64}),
    ],
)  # fmt: skip
def test_labels_that_do_not_fit_the_scales_are_put_right(
    name: str, label: str, wanted: dict[str, Any], tmp_path: Path
) -> None:
    case = CASES[name]()
    case.marker = {"format": label, "note": "stays"}
    source = save(tmp_path / "in", case.stored())
    migrate(source, tmp_path / "out.safetensors")
    assert marker_of(load_file(tmp_path / "out.safetensors")) == wanted | {"note": "stays"}
    assert torch.equal(weights_of(tmp_path / "out.safetensors"), weights_of(source))


def test_nested_parameters_are_lifted_and_the_header_says_what_markers_say(tmp_path: Path) -> None:
    case = CASES["comfy int8 rotated, nested"]()
    source = save(tmp_path / "in", case.stored(), header={"format_version": "1.0", "layers": {LAYER: case.marker}})
    migrate(source, tmp_path / "out.safetensors")
    wanted = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    assert marker_of(load_file(tmp_path / "out.safetensors")) == wanted
    assert header_of(tmp_path / "out.safetensors") == {LAYER: wanted}
    assert verify(str(tmp_path / "out.safetensors"), str(source)).ok


def test_a_correct_int8_file_stays_and_its_header_is_the_marker(tmp_path: Path) -> None:
    """Rows of a layer that is not square, once taken for blocks of one row in the header."""
    case = Case({".weight": int8(96, 64), ".weight_scale": scales(96, 1)}, np.zeros(0), "int8 row", "comfy",
                {"format": "int8_tensorwise", "per_row": True})  # fmt: skip
    source = save(tmp_path / "in", case.stored())
    migrate(source, tmp_path / "out.safetensors")
    assert equal(load_file(tmp_path / "out.safetensors"), load_file(source))
    assert header_of(tmp_path / "out.safetensors") == {LAYER: case.marker}


def test_formats_that_only_clients_know_stay_as_they_are(tmp_path: Path) -> None:
    unknown = {"other.weight": int8(32, 32), "other.comfy_quant": marker_tensor({"format": "convrot_w4a4"})}
    unknown["other.weight_scale"] = scales(32, 2)
    migrate(save(tmp_path / "in", legacy(fp8(48, 80), scales()) | MARK | unknown), tmp_path / "out.safetensors")
    made = load_file(tmp_path / "out.safetensors")
    assert all(same_bytes(made[name], tensor) for name, tensor in unknown.items())


# ---- to legacy, and round trips ----


def test_comfy_to_legacy_and_back_gives_the_same_bytes(tmp_path: Path) -> None:
    entry = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    tensors = PLAIN | {"extra": torch.arange(3)}
    for number in range(2):
        name = f"blocks.{number}.q"
        tensors |= {f"{name}.weight": fp8(48, 80, seed=number), f"{name}.weight_scale": scales()}
        tensors |= {f"{name}.comfy_quant": marker_tensor(entry), f"{name}.input_scale": torch.tensor(0.5 + number)}
    source, old, back = save(tmp_path / "in", tensors), tmp_path / "old.safetensors", tmp_path / "back.safetensors"
    migrate(source, old, "legacy")
    made = load_file(old)
    assert same_bytes(made["scaled_fp8"], torch.zeros(2).to(torch.float8_e4m3fn))
    assert {name.rpartition(".")[2] for name in made if ".q." in name} == {"weight", "scale_weight", "scale_input"}
    with safe_open(old, "pt") as file:
        assert "_quantization_metadata" not in file.metadata()
    assert inspect(str(old)).dialects == {"legacy": 2}
    migrate(old, back)
    assert equal(load_file(back), tensors)
    assert all(verify(str(path), str(source)).ok for path in (old, back))


def test_a_legacy_marker_stands_below_the_prefix_of_the_model(tmp_path: Path) -> None:
    prefix = "model.diffusion_model."
    tensors = {f"{prefix}norm{number}.weight": torch.ones(8) for number in range(6)}
    for part in ("weight", "weight_scale", "comfy_quant"):
        tensors[f"{prefix}q.{part}"] = {
            "weight": fp8(16, 16), "weight_scale": scales(), "comfy_quant": marker_tensor({"format": "float8_e4m3fn"}),
        }[part]  # fmt: skip
    source = save(tmp_path / "in", tensors)
    migrate(source, tmp_path / "old.safetensors", "legacy")
    assert f"{prefix}scaled_fp8" in load_file(tmp_path / "old.safetensors")
    migrate(tmp_path / "old.safetensors", tmp_path / "back.safetensors")
    assert equal(load_file(tmp_path / "back.safetensors"), tensors)
    outside = legacy(fp8(16, 16), scales(), "text.q")
    with pytest.raises(PlanError, match=r"model\.safetensors: .*text\.q: lies outside of 'model\.diffusion_model\.'"):
        migrate(save(tmp_path / "both", tensors | outside), tmp_path / "no.safetensors", "legacy")


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4),
    full_precision=st.booleans(), inputs=st.lists(st.booleans(), min_size=4, max_size=4), dims=st.integers(0, 2),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_legacy_to_comfy_and_back_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int]], full_precision: bool, inputs: list[bool],
    dims: int,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("round")
    tensors = {"scaled_fp8": torch.zeros(2 * full_precision).to(torch.float8_e4m3fn)}
    for number, shape in enumerate(sizes):
        more = {"scale_input": scales(*[1] * dims)} if inputs[number] else {}
        tensors |= legacy(fp8(*shape, seed=number), scales(*[1] * dims), f"blocks.{number}.q", **more)
    source = save(folder, tensors)
    migrate(source, folder / "new.safetensors")
    migrate(folder / "new.safetensors", folder / "old.safetensors", "legacy")
    assert equal(load_file(folder / "old.safetensors"), tensors)
    assert not any(name.endswith(("scale_weight", "scaled_fp8")) for name in load_file(folder / "new.safetensors"))


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("plain", "legacy fp8 with"))])
def test_every_case_is_migrated_exactly_or_refused_by_name(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    source = save(tmp_path / "in", case.stored() | PLAIN, case.config)
    for to in ("comfy", "legacy"):
        output = tmp_path / f"{to}.safetensors"
        try:
            migrate(source, output, to)
        except PlanError as refused:
            assert LAYER in str(refused) or "nothing to migrate" in str(refused)  # noqa: PT017
            assert not output.exists()
            continue
        assert torch.equal(weights_of(output), weights_of(source))
        stored = {tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in load_file(output).values()}
        assert case.tensors[".weight"].reshape(-1).view(torch.uint8).numpy().tobytes() in stored


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("comfy fp8 row", "fp8 row, and scaled_fp8 files hold FP8 E4M3 with one scale"),
        ("comfy fp8_e5m2", "fp8_e5m2 tensor, and"),
        ("comfy nvfp4", "nvfp4, and"),
        ("comfy int8 rotated", "int8 row rotated 16, and"),
    ],
)
def test_what_legacy_cannot_say_is_refused_with_the_ways_out(name: str, words: str, tmp_path: Path) -> None:
    source = save(tmp_path / "in", CASES[name]().stored())
    with pytest.raises(PlanError, match="quantloom dequantize") as refused:
        migrate(source, tmp_path / "out.safetensors", "legacy")
    assert f"{LAYER}: {words}" in str(refused.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_one_word_for_all_layers_is_asked_for_where_they_disagree(tmp_path: Path) -> None:
    tensors = {}
    for number, more in enumerate(({}, {"full_precision_matrix_mult": True})):
        marker = marker_tensor({"format": "float8_e4m3fn"} | more)
        tensors |= {f"{number}.weight": fp8(8, 8), f"{number}.weight_scale": scales(), f"{number}.comfy_quant": marker}
    source = save(tmp_path / "in", tensors)
    with pytest.raises(PlanError, match="--no-full-precision-matmul"):
        migrate(source, tmp_path / "out.safetensors", "legacy")
    migrate(source, tmp_path / "out.safetensors", "legacy", full_precision_matmul=False)
    assert load_file(tmp_path / "out.safetensors")["scaled_fp8"].numel() == 0


def test_words_that_legacy_has_no_place_for_are_named(tmp_path: Path) -> None:
    case = CASES["comfy fp8"]()
    case.marker = {"format": "float8_e4m3fn", "input_scale_calibrated": True}
    report = migrate(save(tmp_path / "in", case.stored()), tmp_path / "out.safetensors", "legacy")
    assert any("input_scale_calibrated" in warning for warning in report.warnings)


# ---- options ----


@pytest.mark.parametrize("to", ["comfy", "legacy", "same"])
def test_missing_activation_scales_are_added_and_others_kept(to: str, tmp_path: Path) -> None:
    """Never a copy of the weight's scale, and only beside FP8."""
    tensors = legacy(fp8(8, 8), scales(), "a") | legacy(fp8(8, 8), scales(), "b", scale_input=torch.tensor(0.5)) | MARK
    if to != "legacy":
        tensors |= legacy(int8(8, 8), scales(), "c")
    source = save(tmp_path / "in", tensors)
    report = migrate(source, tmp_path / "out.safetensors", to, input_scale=0.25)
    if to != "comfy":
        assert report.changed == {"activation scale added": 1}
    made = load_file(tmp_path / "out.safetensors")
    part = "input_scale" if to == "comfy" else "scale_input"
    assert {name: float(tensor) for name, tensor in made.items() if name.endswith(part)} == {
        f"a.{part}": 0.25, f"b.{part}": 0.5,
    }  # fmt: skip
    assert verify(str(tmp_path / "out.safetensors"), str(source)).ok


LEFTOVERS: Tensors = {
    "gone.weight_scale": scales(), "gone.comfy_quant": marker_tensor({"format": "float8_e4m3fn"}),
    "plain.weight": torch.randn(8, 8, dtype=torch.bfloat16), "plain.scale_weight": scales(),
    "plain.scale_input": scales(),
}  # fmt: skip


@pytest.mark.parametrize("to", ["comfy", "same"])
def test_leftovers_are_removed_when_asked_and_listed(to: str, tmp_path: Path) -> None:
    source = save(tmp_path / "in", legacy(fp8(8, 8), scales()) | MARK | LEFTOVERS)
    report = migrate(source, tmp_path / "out.safetensors", to, clean=True)
    made = load_file(tmp_path / "out.safetensors")
    left = {"gone.weight_scale", "gone.comfy_quant", "plain.scale_weight", "plain.scale_input"}
    assert not left & set(made)
    assert same_bytes(made["plain.weight"], LEFTOVERS["plain.weight"])
    assert "4 leftovers removed" in report.notes[0]
    assert all(name in report.notes[0] for name in left)
    assert verify(str(tmp_path / "out.safetensors"), str(source)).ok


def test_leftovers_stay_with_a_warning_otherwise(tmp_path: Path) -> None:
    source = save(tmp_path / "in", legacy(fp8(8, 8), scales()) | MARK | LEFTOVERS)
    report = migrate(source, tmp_path / "out.safetensors")
    made = load_file(tmp_path / "out.safetensors")
    assert all(same_bytes(made[name], tensor) for name, tensor in LEFTOVERS.items())
    assert any("4 scales or markers belong to no quantized weight" in warning for warning in report.warnings)
    assert "gone" not in header_of(tmp_path / "out.safetensors")


def test_a_marker_beside_a_plain_weight_is_a_leftover(tmp_path: Path) -> None:
    extra = {"plain.weight": torch.ones(8, 8), "plain.comfy_quant": marker_tensor({"format": "nvfp4"})}
    source = save(tmp_path / "in", legacy(fp8(8, 8), scales()) | MARK | extra)
    migrate(source, tmp_path / "out.safetensors", clean=True)
    assert "plain.comfy_quant" not in load_file(tmp_path / "out.safetensors")
    assert set(header_of(tmp_path / "out.safetensors")) == {LAYER}


def test_an_activation_scale_of_many_numbers_is_refused_or_cleaned(tmp_path: Path) -> None:
    """A copy of row scales, which the loaders of both forms stumble over."""
    source = save(tmp_path / "in", legacy(fp8(48, 80), scales(48), scale_input=scales(48)) | MARK)
    with pytest.raises(PlanError, match=r"\.scale_input has 48 numbers, and clients read one; --clean"):
        migrate(source, tmp_path / "out.safetensors")
    migrate(source, tmp_path / "out.safetensors", clean=True)
    assert not any("input" in name for name in load_file(tmp_path / "out.safetensors"))


def test_both_names_of_a_scale_are_refused_or_cleaned(tmp_path: Path) -> None:
    source = save(tmp_path / "in", legacy(fp8(8, 8), scales(), weight_scale=scales(1)) | MARK)
    with pytest.raises(PlanError, match=r"\.weight_scale is taken by what another tensor is renamed to"):
        migrate(source, tmp_path / "out.safetensors")
    migrate(source, tmp_path / "out.safetensors", clean=True)
    assert load_file(tmp_path / "out.safetensors")[f"{LAYER}.weight_scale"].shape == ()


def test_kept_tensors_are_cast_where_a_filter_matches(tmp_path: Path) -> None:
    kept = {"norm.weight": torch.randn(64), "norm.bias": torch.randn(64, dtype=torch.float64), "ids": torch.arange(3)}
    kept |= {"half": torch.randn(3, 4, 5).half(), "other": torch.randn(7), "q.weight": fp8(8, 8)}
    source = save(tmp_path / "in", legacy(fp8(8, 8), scales()) | MARK | kept)
    report = migrate(source, tmp_path / "out.safetensors", cast="bf16", cast_filter="norm|half|ids|q")
    made = load_file(tmp_path / "out.safetensors")
    for name in ("norm.weight", "norm.bias", "half"):
        assert same_bytes(made[name], kept[name].bfloat16())
    assert all(same_bytes(made[name], kept[name]) for name in ("ids", "other", "q.weight"))
    assert made[f"{LAYER}.weight_scale"].dtype == torch.float32
    assert report.changed["cast from F64 to BF16"] == 1
    checked = verify(str(tmp_path / "out.safetensors"), str(source))
    assert checked.ok
    assert len(checked.changed("cast")) == 3


def test_a_cast_alone_is_a_migration_and_says_where_a_number_does_not_fit(tmp_path: Path) -> None:
    source = save(tmp_path / "in", {"a": torch.tensor([1.0, 7e4]), "b": torch.tensor([float("inf"), 1.0])})
    with pytest.raises(NonFiniteError, match=r"a: number 1 is 70000, but the largest that float16 holds is 65504"):
        migrate(source, tmp_path / "out.safetensors", cast="f16")
    assert list(tmp_path.glob("*.safetensors*")) == []
    migrate(source, tmp_path / "out.safetensors", cast="f16", cast_filter="b")
    assert load_file(tmp_path / "out.safetensors")["b"].tolist() == [float("inf"), 1.0]


def test_layers_that_must_be_in_high_precision(tmp_path: Path) -> None:
    source = save(tmp_path / "in", legacy(fp8(8, 8), scales()) | MARK | PLAIN)
    with pytest.raises(PlanError, match=f"1 layers that are to be in high precision are quantized: {LAYER}"):
        migrate(source, tmp_path / "out.safetensors", high_precision="lin")
    with pytest.raises(UsageError, match="matches no layer"):
        migrate(source, tmp_path / "out.safetensors", high_precision="liin")
    migrate(source, tmp_path / "out.safetensors", high_precision=r"blocks\.1|norm")


@pytest.mark.parametrize("wanted", [True, False])
def test_full_precision_is_asked_for_or_not(wanted: bool, tmp_path: Path) -> None:
    mark = {"scaled_fp8": torch.zeros(0 if wanted else 2)}
    source = save(tmp_path / "in", legacy(fp8(8, 8), scales()) | mark)
    migrate(source, tmp_path / "new.safetensors", full_precision_matmul=wanted)
    marker = marker_of(load_file(tmp_path / "new.safetensors"))
    assert marker == {"format": "float8_e4m3fn"} | ({"full_precision_matrix_mult": True} if wanted else {})
    migrate(source, tmp_path / "old.safetensors", "legacy", full_precision_matmul=wanted)
    made = load_file(tmp_path / "old.safetensors")["scaled_fp8"]
    assert same_bytes(made, torch.zeros(2 if wanted else 0).to(torch.float8_e4m3fn))


def test_shards_in_and_out_and_any_chunk_size(tmp_path: Path) -> None:
    """The weight and its scale in different files."""
    tensors = MARK | {"norm": torch.randn(5000)}
    for number in range(3):
        tensors |= legacy(fp8(64, 96, seed=number), scales().bfloat16(), f"blocks.{number}.q")
    folder = tmp_path / "in"
    folder.mkdir()
    for number, name in enumerate(tensors):
        save_file({name: tensors[name]}, folder / f"model-{number + 1:05d}-of-{len(tensors):05d}.safetensors")
    flow = Pipeline(workers=2).read(folder).migrate(cast="f16")
    flow.write(tmp_path / "out", shard_size=10_000)
    flow.write(tmp_path / "one.safetensors")
    made = {}
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        made |= load_file(path)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert equal(made, load_file(tmp_path / "one.safetensors"))
    assert same_bytes(made["norm"], tensors["norm"].half())
    assert same_bytes(made["blocks.0.q.weight_scale"], scales().bfloat16().float())


# ---- refused ----

BAD: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "nothing quantized": (PLAIN, {}, "nothing to migrate: no layer is quantized with scales"),
    "legacy already": (legacy(fp8(8, 8), scales()) | MARK, {"to": "legacy"}, "have this form already"),
    "a missing scale": (MARK | {f"{LAYER}.weight": fp8(8, 8), f"{LAYER}.scale_input": scales()}, {},
                        f"{LAYER}: quantized in a way that cannot be decoded: F8_E4M3 weight with .scale_input"),
    "too many row scales": (legacy(fp8(48, 80), scales(49)) | MARK, {}, "[49] for a 48 x 80 weight"),
    "scales of columns": (legacy(int8(96, 64), scales(64)) | MARK, {}, "[64] for a 96 x 64 weight"),
    "blocks in three dimensions": (legacy(fp8(48, 80), scales(48, 5, 1)) | MARK, {}, "[48, 5, 1] for a 48 x 80"),
    "blocks that are not square": (legacy(fp8(48, 80), scales(2, 5)) | MARK, {}, "fits no square blocks"),
    "a convolution": (legacy(fp8(8, 8, 3, 3), scales()) | MARK, {}, "F8_E4M3 weight of shape [8, 8, 3, 3]"),
    "a cast filter that matches nothing": (legacy(fp8(8, 8), scales()) | MARK | PLAIN,
                                           {"cast": "f16", "cast_filter": "nrom"}, "'nrom' matches no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_message_and_no_output(name: str, tmp_path: Path) -> None:
    tensors, options, words = BAD[name]
    with pytest.raises((PlanError, UsageError)) as refused:
        migrate(save(tmp_path / "in", tensors), tmp_path / "out" / "x.safetensors", **options)
    assert words in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_malformed_marker_is_refused(tmp_path: Path) -> None:
    tensors = {f"{LAYER}.weight": fp8(8, 8), f"{LAYER}.comfy_quant": torch.tensor(list(b"{"), dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match=f"{LAYER}.comfy_quant"):
        migrate(save(tmp_path / "in", tensors), tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "comfi"}, "did you mean 'comfy'"), ({"cast": "f8"}, "unknown dtype 'f8'"),
        ({"cast_filter": "a"}, "needs a dtype"), ({"input_scale": 0.0}, "input scale 0.0 must be a positive number"),
        ({"input_scale": float("nan")}, "must be a positive number"), ({"high_precision": "("}, "("),
        ({"clean": 1}, "clean must be true or false"),
    ],
)  # fmt: skip
def test_options_that_cannot_mean_anything(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as refused:
        Pipeline().migrate(**options)
    assert words in str(refused.value)


# ---- commands ----


def test_the_command(cli: Cli, tmp_path: Path) -> None:
    source = save(tmp_path / "in", legacy(fp8(8, 8), scales()) | MARK | LEFTOVERS)
    output = tmp_path / "out.safetensors"
    shown = cli("migrate", source, output, "--clean", "--dry-run")
    assert shown.status == 0
    row = next(line for line in shown.out.splitlines() if line.startswith(LAYER))
    assert row.split()[1:7] == ["8x8", "legacy", "fp8", "tensor", "to", "float8_e4m3fn"]
    assert not output.exists()
    done = cli("migrate", source, output, "--clean", "--input-scale", "1.0", "--json")
    assert done.status == 0
    assert json.loads(done.out)["changed"]["legacy fp8 tensor to float8_e4m3fn, activation scale added"] == 1
    checked = cli("verify", output, "--against", source)
    assert "sound; 1 quantized layer, 1 tensor kept as they were" in checked.out
    again = cli("migrate", output, tmp_path / "again.safetensors", "--to", "same")
    assert (again.status, again.err.count("\n")) == (1, 1)
    assert f"{output}: nothing to migrate" in again.err


def ctq(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        compat.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


MODEL = legacy(fp8(48, 80), scales()) | LEFTOVERS | {"scaled_fp8": torch.zeros(1).to(torch.float8_e4m3fn)}


@pytest.mark.parametrize(
    ("arguments", "ending", "marker", "mark", "inputs"),
    [
        ("--convert_fp8_scaled", "fp8mixed", {"format": "float8_e4m3fn"}, None, False),
        ("--convert-fp8-scaled --full-precision-mm --input_scale --hp-filter plain", "fp8mixed",
         {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}, None, True),
        ("--convert-int8-scaled", "int8_comfy", {"format": "float8_e4m3fn"}, None, False),
        ("--legacy_input_add", "with_input_scale", None, 0, True),
        ("--cleanup-fp8-scaled", "cleaned", None, 0, False),
        ("--cleanup-fp8-scaled --scaled-fp8-marker 2 --input-scale", "cleaned", None, 2, True),
    ],
)  # fmt: skip
def test_modes_of_convert_to_quant(
    arguments: str, ending: str, marker: dict[str, Any] | None, mark: int | None, inputs: bool, tmp_path: Path
) -> None:
    source = save(tmp_path / "in", MODEL)
    assert ctq("-i", source, *arguments.split()) == 0
    made = load_file(source.parent / f"model_{ending}.safetensors")
    assert same_bytes(made[f"{LAYER}.weight"], MODEL[f"{LAYER}.weight"])
    if mark is None:
        assert marker_of(made) == marker
        assert not any("scale_weight" in name or "scaled_fp8" in name for name in made)
    else:
        assert same_bytes(made["scaled_fp8"], torch.zeros(mark).to(torch.float8_e4m3fn))
        assert same_bytes(made[f"{LAYER}.scale_weight"], MODEL[f"{LAYER}.scale_weight"])
    added = made.get(f"{LAYER}.input_scale" if mark is None else f"{LAYER}.scale_input")
    assert added == 1.0 if inputs else added is None
    assert ("plain.scale_weight" in made) == (ending == "with_input_scale")


def test_modes_say_what_does_not_fit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "in", MODEL)
    assert ctq("-i", source, "--convert-fp8-scaled", "--hp-filter", "lin") == 1
    assert "are to be in high precision are quantized" in capfd.readouterr().err
    assert ctq("-i", source, "--convert-fp8-scaled", "--cleanup-fp8-scaled") == 2
    assert "are two runs" in capfd.readouterr().err
    assert ctq("-i", source, "--convert-fp8-scaled", "--int8", "--dry-run") == 0
    assert "without effect beside --convert-fp8-scaled: --int8" in capfd.readouterr().err
    plain = save(tmp_path / "plain", PLAIN)
    assert ctq("-i", plain, "--convert-int8-scaled") == 1
    assert "no layer is quantized with scales" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*.safetensors")) == ["model.safetensors"] * 2
