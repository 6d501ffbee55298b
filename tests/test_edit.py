"""Editing what a checkpoint says of its layers: marker and header change together, every other byte stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FORMATS, Ran, listing, write_file, write_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantized_cases import CASES, LAYER, Case, layer_of, mxfp8, nvfp4, rotated, save
from safetensors.torch import load_file, save_file

from quantloom import Pipeline
from quantloom.flow.report import Report
from quantloom.formats.comfy import HEADER_KEY
from quantloom.formats.errors import PlanError, UsageError
from quantloom.formats.manifest import KEY
from quantloom.formats.safetensors import read_header

GOLDEN = Path(__file__).parent / "data" / "golden"
COMFY = [name for name in CASES if name.startswith("comfy")]
Raw = dict[str, tuple[str, tuple[int, ...], bytes]]
FPMM = "full_precision_matrix_mult"


def raw(path: Path) -> Raw:
    """dtype, shape and bytes of every tensor of a file, or of all shards of a folder."""
    found: Raw = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        content = file.read_bytes()
        for ref in read_header(file).refs:
            found[ref.name] = ref.dtype, ref.shape, content[ref.start : ref.start + ref.nbytes]
    return found


def markers(path: Path) -> dict[str, dict[str, Any]]:
    ending = ".comfy_quant"
    return {
        name.removesuffix(ending): json.loads(content)
        for name, (_, _, content) in raw(path).items()
        if name.endswith(ending)
    }


def header(path: Path) -> dict[str, dict[str, Any]]:
    """Layers of the header entry."""
    layers: dict[str, dict[str, Any]] = json.loads(read_header(path).metadata[HEADER_KEY])["layers"]
    return layers


def without_markers(path: Path) -> Raw:
    return {name: value for name, value in raw(path).items() if not name.endswith(".comfy_quant")}


def edit(source: Path, output: Path, **options: Any) -> Report:
    return Pipeline(scheduler="sync").read(source).edit(**options).write(output, overwrite=True)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file per format, header entries included, as this package writes them."""
    folder = tmp_path_factory.mktemp("quantized")
    plain = write_file(folder / "plain" / "plain.safetensors")
    for name, options in FORMATS.items():
        Pipeline(scheduler="sync").read(plain).target(preset="none").quantize(**options).write(
            folder / f"{name}.safetensors"
        )
    return folder


# What changes, and what stays.


@pytest.mark.parametrize("name", FORMATS)
def test_every_byte_but_markers_and_header_entry_stays(name: str, quantized: Path, tmp_path: Path) -> None:
    source, output = quantized / f"{name}.safetensors", tmp_path / "out.safetensors"
    report = edit(source, output, add={FPMM: True, "note": "x"}, remove=["orig_dtype"])
    assert without_markers(output) == without_markers(source)
    before, after = markers(source), markers(output)
    assert before
    for layer, entry in before.items():
        expected = {key: value for key, value in entry.items() if key != "orig_dtype"} | {FPMM: True, "note": "x"}
        assert list(after[layer].items()) == list(expected.items()), "keys keep their order, new ones come last"
    assert header(output) == after
    old, new = read_header(source).metadata, read_header(output).metadata
    assert {key: value for key, value in new.items() if key not in (HEADER_KEY, KEY)} == {
        key: value for key, value in old.items() if key not in (HEADER_KEY, KEY)
    }
    assert sum(report.changed.values()) == len(before)


def test_markers_are_written_as_json_dumps_writes_them(quantized: Path, tmp_path: Path) -> None:
    edit(quantized / "mxfp8.safetensors", tmp_path / "out.safetensors", add={FPMM: True}, filter="^odd$")
    _, shape, content = raw(tmp_path / "out.safetensors")["odd.comfy_quant"]
    assert content == (
        b'{"format": "mxfp8", "group_size": 32, "orig_dtype": "torch.float32", "orig_shape": [100, 72], '
        b'"full_precision_matrix_mult": true}'
    )
    assert shape == (len(content),)


def test_only_layers_that_match_change(quantized: Path, tmp_path: Path) -> None:
    source, output = quantized / "int8 rotated.safetensors", tmp_path / "out.safetensors"
    edit(source, output, add={FPMM: True}, filter=r"blocks\.1\.")
    for name, value in raw(source).items():
        assert (raw(output)[name] != value) == (name.endswith(".comfy_quant") and "blocks.1." in name)
    assert header(output) == markers(output)


@pytest.mark.parametrize("name", COMFY)
def test_a_layer_of_any_format_decodes_as_before(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    source = save(tmp_path, case.stored())
    edit(source, tmp_path / "out.safetensors", add={FPMM: True})
    before, after = layer_of(source), layer_of(tmp_path / "out.safetensors")
    assert before.encoding is not None
    assert after.encoding is not None
    assert (after.encoding.format, after.encoding.shape, after.encoding.rotation) == (
        before.encoding.format, before.encoding.shape, before.encoding.rotation,
    )  # fmt: skip
    assert after.marker == {**(case.marker or {}), FPMM: True}
    assert HEADER_KEY not in read_header(tmp_path / "out.safetensors").metadata, "a header entry is not made up"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("expected_*.safetensors")), ids=lambda path: path.stem[9:])
def test_files_of_the_reference_keep_all_but_their_markers(path: Path, tmp_path: Path) -> None:
    """Mislabelled and undecodable layers, too: a key that changes no numbers may be added to them."""
    edit(path, tmp_path / "out.safetensors", add={FPMM: True}, rebuild_header=True)
    assert without_markers(tmp_path / "out.safetensors") == without_markers(path)
    expected = {layer: {**entry, FPMM: True} for layer, entry in markers(path).items()}
    assert markers(tmp_path / "out.safetensors") == header(tmp_path / "out.safetensors") == expected


def test_unknown_keys_nested_params_and_legacy_tensors_survive(tmp_path: Path) -> None:
    case = rotated((33, 128), 64, {"params": {"convrot": True, "convrot_groupsize": 64, "deep": [1, {"a": None}]}})
    assert case.marker is not None
    case.marker["somebody's"] = {"key": [1.5, "ü"]}
    extra = {
        "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn), "blocks.1.lin.scale_weight": torch.tensor(0.5),
        "blocks.1.lin.weight": torch.randn(16, 32).to(torch.float8_e4m3fn), "blocks.1.lin.scale_input": torch.ones(1),
        "text.scaled_fp8": torch.zeros(0), "gone.comfy_quant": torch.tensor([123, 125], dtype=torch.uint8),
        "empty": torch.zeros(0, 3), "scalar": torch.tensor(7),
    }  # fmt: skip
    source = save(tmp_path, case.stored() | extra, config={"quantization_config": {"quant_method": "x"}})
    edit(source, tmp_path / "out.safetensors", add={FPMM: True})
    assert without_markers(tmp_path / "out.safetensors") == without_markers(source)
    assert raw(tmp_path / "out.safetensors")["gone.comfy_quant"][2] == b"{}"
    assert markers(tmp_path / "out.safetensors")[LAYER] == {**case.marker, FPMM: True}


def test_keys_of_nested_params_are_edited_where_they_stand(tmp_path: Path) -> None:
    case = rotated((33, 128), 64, {"params": {"convrot": True, "convrot_groupsize": 64, "old": 1, "note": 1}})
    source = save(tmp_path, case.stored())
    edit(source, tmp_path / "out.safetensors", add={"note": 2}, remove=["old"])
    assert markers(tmp_path / "out.safetensors")[LAYER]["params"] == {
        "convrot": True, "convrot_groupsize": 64, "note": 2,
    }  # fmt: skip


def test_a_folder_keeps_its_configuration_and_all_shards(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in")
    config = {"model_type": "tiny", "quantization_config": {"note": "stays"}}
    (folder / "config.json").write_text(json.dumps(config))
    source = tmp_path / "fp8"
    Pipeline(scheduler="sync").read(folder).quantize("fp8").write(source, shard_size=100_000)
    (source / "config.json").write_text(json.dumps(config))
    Pipeline(scheduler="sync").read(source).edit(add={FPMM: True}).write(tmp_path / "out", shard_size=100_000)
    assert without_markers(tmp_path / "out") == without_markers(source)
    assert all(entry[FPMM] for entry in markers(tmp_path / "out").values())
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


KEYS = ["a", "b", "params", FPMM, "orig_dtype", "per_row"]
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "a": st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    "b": st.recursive(st.integers(), lambda inner: st.lists(inner, max_size=3), max_leaves=5),
    "params": st.dictionaries(st.sampled_from(["x", "y"]), st.integers()),
    FPMM: st.booleans(), "orig_dtype": st.sampled_from(["torch.float16", "torch.bfloat16"]), "per_row": st.just(True),
}  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_edit_is_what_a_dictionary_would_do(data: st.DataObject, quantized: Path, tmp_path: Path) -> None:
    """Random adds and removes, one after the other; markers and header stay one."""
    path = quantized / "int8 rotated.safetensors"
    expected = markers(path)
    for step in range(2):
        added = data.draw(st.sets(st.sampled_from(KEYS), max_size=3))
        add = {key: data.draw(VALUES[key]) for key in sorted(added)}
        remove = data.draw(st.lists(st.sampled_from([key for key in KEYS if key not in add]), min_size=1, unique=True))
        edit(path, tmp_path / f"{step}.safetensors", add=add, remove=remove)
        assert without_markers(tmp_path / f"{step}.safetensors") == without_markers(path)
        path = tmp_path / f"{step}.safetensors"
        expected = {
            layer: {**{key: value for key, value in entry.items() if key not in remove}, **add}
            for layer, entry in expected.items()
        }
        assert markers(path) == header(path) == expected
        assert layer_of(path, "odd").encoding is not None


# Marker and header.


def test_what_only_one_of_both_said_stands_in_both(tmp_path: Path) -> None:
    """A header that lacks per_row, a marker that lacks group_size: what the reference writes."""
    row, mx = CASES["comfy int8 row"](), mxfp8((96, 160), described=False)
    entries = {
        "row": {"format": "int8_tensorwise", FPMM: True},
        "mx": {"format": "mxfp8", "group_size": 32},
        "elsewhere": {"format": "of another file"},
    }
    whole = {"format_version": "1.0", "layers": entries, "made by": "someone"}
    source = save(tmp_path, row.stored("row") | mx.stored("mx"), header=whole)
    report = edit(source, tmp_path / "out.safetensors", add={"note": 1}, filter="row|mx")
    expected = {
        "row": {"format": "int8_tensorwise", "per_row": True, FPMM: True, "note": 1},
        "mx": {"format": "mxfp8", "group_size": 32, "note": 1},
    }
    assert markers(tmp_path / "out.safetensors") == expected
    assert header(tmp_path / "out.safetensors") == {**expected, "elsewhere": {"format": "of another file"}}
    assert json.loads(read_header(tmp_path / "out.safetensors").metadata[HEADER_KEY])["made by"] == "someone"
    assert any("per_row" in note and "group_size" in note for note in report.notes)


def test_a_rebuilt_header_has_the_rotation_and_everything_else_of_the_markers(tmp_path: Path) -> None:
    """The reference keeps format, group_size and full_precision_matrix_mult of them, and loses the rest."""
    turned, four = rotated((33, 128), 16, {"convrot": True, "convrot_groupsize": 16, "per_row": True}), nvfp4((130, 70))
    lost = {"turned": {"format": "int8_tensorwise"}, "four": {"format": "nvfp4", "group_size": 16}}
    source = save(tmp_path, turned.stored("turned") | four.stored("four"), header={"layers": lost})
    assert layer_of(source, "turned").problem, "marker and header disagree about the rotation"
    edit(source, tmp_path / "out.safetensors", rebuild_header=True)
    assert raw(tmp_path / "out.safetensors") == raw(source)
    assert header(tmp_path / "out.safetensors") == markers(source) == {"turned": turned.marker, "four": four.marker}
    assert layer_of(tmp_path / "out.safetensors", "turned").encoding is not None


def test_a_header_is_made_where_there_is_none(tmp_path: Path) -> None:
    prefix = "model.diffusion_model."
    tensors: dict[str, torch.Tensor] = {}
    for index in range(3):
        tensors |= CASES["comfy nvfp4"]().stored(f"{prefix}b{index}")
    source = save(tmp_path, tensors)
    edit(source, tmp_path / "out.safetensors", rebuild_header=True)
    assert header(tmp_path / "out.safetensors") == {f"b{index}": nvfp4((130, 70)).marker for index in range(3)}
    assert raw(tmp_path / "out.safetensors") == raw(source)


def test_markers_are_made_from_a_header_alone_with_all_keys(tmp_path: Path) -> None:
    case = rotated((33, 128), 16, {"convrot": True, "convrot_groupsize": 16})
    entry, case.marker = case.marker, None
    source = save(tmp_path, case.stored(), header={"layers": {LAYER: entry}})
    edit(source, tmp_path / "out.safetensors", add={FPMM: True})
    assert markers(tmp_path / "out.safetensors") == header(tmp_path / "out.safetensors") == {
        LAYER: {**(entry or {}), FPMM: True}
    }  # fmt: skip


def test_two_descriptions_of_other_numbers_are_refused_with_the_way_out(tmp_path: Path) -> None:
    case = rotated((33, 128), 16, {"convrot": True, "convrot_groupsize": 16})
    source = save(tmp_path, case.stored(), header={"layers": {LAYER: {"format": "int8_tensorwise"}}})
    with pytest.raises(PlanError, match=r"rotated 16, the header int8_tensorwise.*--rebuild-header"):
        edit(source, tmp_path / "out.safetensors", add={FPMM: True})


def test_an_edit_of_a_contradictory_layer_is_held_to_its_marker(tmp_path: Path) -> None:
    case = rotated((33, 128), 16, {"convrot": True, "convrot_groupsize": 16})
    source = save(tmp_path, case.stored(), header={"layers": {LAYER: {"format": "int8_tensorwise"}}})
    with pytest.raises(PlanError, match="rotated 64 instead of int8 row, rotated 16"):
        edit(source, tmp_path / "out.safetensors", add={"convrot_groupsize": 64}, rebuild_header=True)
    edit(source, tmp_path / "out.safetensors", add={FPMM: True}, rebuild_header=True)
    expected = {LAYER: {**(case.marker or {}), FPMM: True}}
    assert markers(tmp_path / "out.safetensors") == header(tmp_path / "out.safetensors") == expected


# Values that a format cannot have.

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("comfy fp8", {"format": "int8_tensorwise"}, "int8_tensorwise has I8 codes and .weight_scale, stored are F8_E4M3"),
    ("comfy fp8", {"format": "float8_e4m3fn_rowwise"}, "float8_e4m3fn_rowwise does not have what is stored"),
    ("comfy fp8 row", {"format": "float8_e4m3fn"}, "a 130 x 70 weight, scales of shape [130]"),
    ("comfy fp8", {"format": "float8_e4m3"}, "unknown format 'float8_e4m3'; did you mean 'float8_e4m3fn'"),
    ("comfy fp8", {"format": None}, "unknown format None"),
    ("comfy fp8", {"format": "mxfp8"}, "a 130 x 70 mxfp8 weight that is not padded to multiples of 32"),
    ("comfy mxfp8", {"format": "hybrid_mxfp8"}, "scales without .weight_scalar"),
    ("comfy mxfp8", {"format": "nvfp4"}, "nvfp4 has U8 codes"),
    ("comfy fp8 block", {"group_size": 128}, "group_size 128 does not fit"),
    ("comfy fp8 block", {"group_size": 63}, "group_size 63 does not fit"),
    ("comfy fp8 block", {"group_size": "64"}, "group_size '64' does not fit"),
    ("comfy mxfp8", {"group_size": 16}, "mxfp8 has groups of 32, not 16"),
    ("comfy nvfp4", {"group_size": 32}, "nvfp4 has groups of 16, not 32"),
    ("comfy fp8", {"group_size": 64}, "float8_e4m3fn has no group_size"),
    ("comfy fp8", {FPMM: "yes"}, "full_precision_matrix_mult must be true or false, not 'yes'"),
    ("comfy fp8", {FPMM: 1}, "full_precision_matrix_mult must be true or false, not 1"),
    ("comfy int8 rotated", {"convrot_groupsize": 8}, "convrot_groupsize 8 is no power of four that divides 128"),
    ("comfy int8 rotated", {"convrot_groupsize": 256}, "convrot_groupsize 256 is no power of four that divides 128"),
    ("comfy int8 rotated", {"convrot_groupsize": 64}, "as int8 row, rotated 64 instead of int8 row, rotated 16"),
    ("comfy int8 rotated", {"convrot": False}, "as int8 row instead of int8 row, rotated 16"),
    ("comfy int8 row", {"convrot": "on"}, "convrot must be true or false"),
    ("comfy int8 row", {"convrot_groupsize": 16}, "convrot_groupsize 16 is no power of four that divides 50"),
    ("comfy fp8", {"convrot": True}, "only int8_tensorwise has convrot, this layer is float8_e4m3fn"),
    ("comfy int8", {"per_row": True}, "per_row true does not fit scales of shape []"),
    ("comfy int8 row", {"per_row": False}, "per_row false does not fit scales of shape [33, 1]"),
    ("comfy mxfp8", {"per_row": True}, "only int8_tensorwise has per_row"),
    ("comfy mxfp8", {"orig_shape": [100, 70]}, "orig_shape [100, 70] does not pad to the stored [160, 96]"),
    ("comfy mxfp8", {"orig_shape": "130, 70"}, "orig_shape must be two positive whole numbers"),
    ("comfy fp8", {"orig_shape": [1, 2]}, "orig_shape [1, 2] is not the stored [130, 70]"),
    ("comfy fp8", {"orig_dtype": "bf16"}, "orig_dtype 'bf16' is none of torch.bfloat16"),
    ("comfy int8 rotated, nested", {"params": 3}, "params must be a JSON object"),
    ("comfy int8 rotated, nested", {"params": {}}, "as int8 row instead of int8 row, rotated 64"),
    ("comfy fp8", {"note": "x" * (1 << 20)}, "1048576 are read"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "add", "reason"), REFUSED, ids=[f"{row[0]}: {row[2]}" for row in REFUSED])
def test_a_value_that_the_format_cannot_have_is_refused(
    name: str, add: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    source = save(tmp_path, CASES[name]().stored())
    before = listing(tmp_path)
    with pytest.raises(PlanError) as refused:
        edit(source, tmp_path / "out.safetensors", add=add)
    assert reason in str(refused.value)
    assert str(source) in str(refused.value)
    assert LAYER in str(refused.value)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "key", "reason"),
    [
        ("comfy fp8", "format", "every client needs the key format"),
        ("comfy fp8 block", "group_size", "float8_e4m3fn_blockwise needs group_size"),
        ("comfy int8 rotated", "convrot", "as int8 row instead of int8 row, rotated 16"),
        ("comfy int8 rotated", "convrot_groupsize", "rotated in groups of None, which is no power of four"),
        ("comfy mxfp8", "orig_shape", "a weight of [160, 96] instead of [130, 70]"),
        ("comfy int8 rotated, nested", "params", "as int8 row instead of int8 row, rotated 64"),
    ],
)
def test_a_key_that_numbers_depend_on_is_not_removed(name: str, key: str, reason: str, tmp_path: Path) -> None:
    source = save(tmp_path, CASES[name]().stored())
    with pytest.raises(PlanError) as refused:
        edit(source, tmp_path / "out.safetensors", remove=[key])
    assert reason in str(refused.value)
    assert not (tmp_path / "out.safetensors").exists()


def _relabelled(name: str, **marker: Any) -> Callable[[], Case]:
    def make() -> Case:
        case = CASES[name]()
        case.marker = marker
        return case

    return make


@pytest.mark.parametrize(
    ("make", "add"),
    [
        (_relabelled("comfy fp8 row", format="float8_e4m3fn_blockwise"), {"format": "float8_e4m3fn_rowwise"}),
        (CASES["comfy hybrid mxfp8"], {"format": "mxfp8"}),
        (_relabelled("comfy hybrid mxfp8", format="mxfp8", orig_shape=[130, 70]), {"format": "hybrid_mxfp8"}),
        (CASES["comfy fp8 block without group_size"], {"group_size": 64}),
        (CASES["comfy int8 rotated by the default group"], {"convrot_groupsize": 256}),
        (_relabelled("comfy mxfp8", format="mxfp8"), {"orig_shape": [130, 70]}),
        (_relabelled("comfy int8 row", format="no such format"), {"format": "int8_tensorwise", "per_row": True}),
        (CASES["comfy int8 row"], {"convrot": False}),
    ],
)  # fmt: skip
def test_descriptions_that_fit_better_are_taken(make: Callable[[], Case], add: dict[str, Any], tmp_path: Path) -> None:
    """Wrong labels of others are put right; what is stored decides."""
    case = make()
    edit(save(tmp_path, case.stored()), tmp_path / "out.safetensors", add=add)
    layer = layer_of(tmp_path / "out.safetensors")
    assert layer.encoding is not None
    assert layer.weight.shape == case.weight.shape
    assert markers(tmp_path / "out.safetensors")[LAYER] == {**(case.marker or {}), **add}


# What is said, and wrong usage.


def test_unknown_and_missing_keys_are_warned_of(quantized: Path, tmp_path: Path) -> None:
    source = quantized / "fp8.safetensors"
    report = edit(source, tmp_path / "out.safetensors", add={"full_precison_matrix_mult": True}, remove=["grop_size"])
    assert any("did you mean 'full_precision_matrix_mult'" in text for text in report.warnings)
    assert any("no layer has the key 'grop_size'" in text for text in report.warnings)


def test_an_edit_that_changes_nothing_says_so_and_copies(quantized: Path, tmp_path: Path) -> None:
    source = quantized / "int8.safetensors"
    report = edit(source, tmp_path / "out.safetensors", add={"per_row": True})
    assert report.changed == {}
    assert any("nothing changes" in note for note in report.notes)
    assert "no layer changed" in report.summary()
    assert raw(tmp_path / "out.safetensors") == raw(source)
    before, after = (read_header(path).metadata for path in (source, tmp_path / "out.safetensors"))
    assert before.pop(KEY) != after.pop(KEY), "the plan is another one"
    assert before == after


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "nothing to do"),
        ({"filter": "a"}, "nothing to do"),
        ({"filter": "a", "rebuild_header": True}, "nothing to do"),
        ({"add": {"a": 1}, "filter": "("}, "no regular expression"),
        ({"add": {"a": 1}, "remove": ["a"]}, "'a' is to be added and removed"),
        ({"add": {"a": float("nan")}}, "cannot be written as JSON"),
        ({"add": {"a": {1, 2}}}, "cannot be written as JSON"),
        ({"add": {"a": "\ud800"}}, "cannot be written as JSON"),
        ({"add": {"": 1}}, "'' is no key"),
        ({"add": {" a": 1}}, "' a' is no key"),
        ({"add": "a=1"}, "must be a mapping"),
        ({"remove": "a,b"}, "must be a list of keys"),
        ({"remove": [""]}, "'' is no key"),
        ({"add": {"a": 1}, "filter": 3}, "filter must be a string"),
        ({"ad": {"a": 1}}, "did you mean 'add'"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as refused:
        Pipeline().edit(**options)
    assert words in str(refused.value)


def test_it_stands_alone(quantized: Path, tmp_path: Path) -> None:
    pipeline = Pipeline().read(quantized / "fp8.safetensors").quantize("int8").edit(add={"a": 1})
    with pytest.raises(UsageError, match="edit stands alone: leave quantize out"):
        pipeline.write(tmp_path / "out.safetensors")


def test_the_recipe_says_everything() -> None:
    pipeline = Pipeline().edit(add={"a": [1, "b"]}, remove=("c",), filter="x", rebuild_header=True)
    assert Pipeline.from_recipe(pipeline.to_json()) == pipeline


def test_no_marker_and_no_match(quantized: Path, tmp_path: Path) -> None:
    plain = quantized / "plain" / "plain.safetensors"
    with pytest.raises(PlanError, match=r"plain\.safetensors: no layer has a \.comfy_quant marker"):
        edit(plain, tmp_path / "out.safetensors", add={"a": 1})
    with pytest.raises(PlanError, match=r"filter 'nowhere' matches no layer.*blocks\.0\.mlp\.down"):
        edit(quantized / "fp8.safetensors", tmp_path / "out.safetensors", add={"a": 1}, filter="nowhere")
    assert not list(tmp_path.iterdir())


# The command.


def test_the_command_edits(quantized: Path, tmp_path: Path, cli: Callable[..., Ran]) -> None:
    source, output = quantized / "nvfp4.safetensors", tmp_path / "out.safetensors"
    added = ["--add", f"{FPMM}=true", "--add", "a=x=y, z", "--add", "b=1.5", "--add", "c=[1, 2]", "--add", "d=NaN"]
    ran = cli("edit", source, output, *added, "--remove", "orig_dtype, orig_shape", "--filter", "qkv")
    assert ran.status == 0, ran.err
    assert "2 layers changed" in ran.out
    entry = markers(output)["blocks.0.attn.qkv"]
    assert entry == {
        "format": "nvfp4", "group_size": 16, FPMM: True, "a": "x=y, z", "b": 1.5, "c": [1, 2], "d": "NaN",
    }  # fmt: skip
    verified = cli("verify", output, "--against", source)
    assert verified.status == 0, verified.out


def test_a_dry_run_writes_nothing(quantized: Path, tmp_path: Path, cli: Callable[..., Ran]) -> None:
    ran = cli("edit", quantized / "fp8.safetensors", tmp_path / "out.safetensors", "--add", "a=1", "--dry-run")
    assert ran.status == 0, ran.err
    assert "7 layers: marker edited: a" in " ".join(ran.out.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["out.safetensors", "--add", "a"], 2, "'a' is not KEY=VALUE"),
        (["out.safetensors", "--add", "=1"], 2, "'=1' is not KEY=VALUE"),
        (["out.safetensors", "--add", "a="], 2, "'a=' is not KEY=VALUE"),
        (["out.safetensors", "--add", "a=1", "--add", "a=2"], 2, "names a key twice"),
        (["out.safetensors", "--remove", "a,,b"], 2, "'' is no key"),
        (["out.safetensors"], 2, "nothing to do"),
        (["--add", "a=1"], 2, "Missing argument 'OUTPUT'"),
        (["out.safetensors", "--add", "a=1", "--in-place"], 2, "leave OUTPUT out"),
        (["--add", "a=1", "--in-place", "--memory", "1GB"], 2, "--memory means nothing"),
        (["--in-place"], 2, "nothing to do"),
        (["out.safetensors", "--add", "format=mxfp8"], 1, "needs F8_E8M0 or U8"),
        (["--add", "format=mxfp8", "--in-place"], 1, "needs F8_E8M0 or U8"),
    ],
)
def test_bad_command_lines_get_one_message_and_no_output(
    arguments: list[str], status: int, words: str, quantized: Path, tmp_path: Path, cli: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.safetensors").write_bytes((quantized / "fp8.safetensors").read_bytes())
    before = listing(tmp_path)
    ran = cli("edit", "in.safetensors", *arguments)
    assert ran.status == status
    assert words in " ".join(ran.err.split())
    assert listing(tmp_path) == before


def test_nothing_is_decoded(quantized: Path, tmp_path: Path) -> None:
    """Codes that mean nothing go through: NaN, infinite scales, scales of a shape that fits nothing."""
    tensors = load_file(quantized / "fp8.safetensors")
    tensors["odd.weight"] = torch.full((100, 72), float("nan")).to(torch.float8_e4m3fn)
    tensors["odd.weight_scale"] = torch.full((7, 3), float("inf"))
    save_file(tensors, tmp_path / "in.safetensors")
    edit(tmp_path / "in.safetensors", tmp_path / "out.safetensors", add={FPMM: True})
    assert without_markers(tmp_path / "out.safetensors") == without_markers(tmp_path / "in.safetensors")
