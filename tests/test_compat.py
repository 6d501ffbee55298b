"""The command line of convert_to_quant: what its flags become, what it writes, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantloom import Pipeline
from quantloom.flow import compat
from quantloom.flow.compat_flags import SECTIONS, all_flags
from quantloom.flow.compat_recipe import Translation, automatic_output, base_name, translate, without_weight
from quantloom.flow.verify import verify
from quantloom.formats.errors import UsageError
from quantloom.stages.presets import load_presets

COMPAT_DOC = Path(__file__).parents[1] / "docs" / "COMPAT.md"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with layers that are kept by name, one that no large block divides, and a bias."""
    generator = torch.Generator().manual_seed(7)
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (64, 256), "final_layer.linear.weight": (32, 256), "norm.weight": (256,),
        "img_in.weight": (128, 64), "blocks.0.thin.weight": (8, 256),
    }  # fmt: skip
    for block in range(2):
        shapes |= {f"blocks.{block}.attn.qkv.weight": (96, 256), f"blocks.{block}.attn.qkv.bias": (96,)}
        shapes |= {f"blocks.{block}.mlp.fc1.weight": (128, 256), f"blocks.{block}.mlp.fc2.weight": (256, 128)}
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    tensors = {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, path, metadata={"origin": "test"})
    return path


@pytest.fixture
def source(model: Path, tmp_path: Path) -> Path:
    """The checkpoint in a folder where automatic names may land."""
    copy = tmp_path / "tiny.safetensors"
    copy.write_bytes(model.read_bytes())
    return copy


def run(*arguments: str | Path) -> int:
    """Exit status of the command."""
    with pytest.raises(SystemExit) as ended:
        compat.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def translated(*arguments: str) -> Translation:
    return translate(compat.parse(["-i", "m.safetensors", *arguments]))


def stage(verb: str, *arguments: str) -> dict[str, Any]:
    recipe = translated(*arguments).recipe
    return next(item.to_dict() for item in recipe.stages if item.verb == verb)


def rule(*arguments: str) -> tuple[str, dict[str, Any]]:
    """Pattern and settings of the only rule."""
    (only,) = stage("target", *arguments)["rules"]
    return only["pattern"], only["settings"]


def same_bytes(left: Path, right: Path) -> bool:
    a, b = load_file(left), load_file(right)
    flat = {name: (t.dtype, t.shape, t.contiguous().reshape(-1).view(torch.uint8)) for name, t in a.items()}
    other = {name: (t.dtype, t.shape, t.contiguous().reshape(-1).view(torch.uint8)) for name, t in b.items()}
    return flat.keys() == other.keys() and all(
        flat[name][:2] == other[name][:2] and torch.equal(flat[name][2], other[name][2]) for name in flat
    )


# ---- flags to recipe ----

FP8, INT8_ROW = {"format": "fp8", "scaling": "tensor"}, {"format": "int8", "scaling": "row"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {**FP8, "rounding": "mse", "full_precision_matmul": False, "input_scale": None, "nonfinite": "refuse"}),
        ("--simple --comfy_quant", {**FP8, "rounding": "nearest"}),
        ("--scaling_mode row", {"format": "fp8", "scaling": "row"}),
        ("--scaling_mode block", {"format": "fp8", "scaling": "block", "block_size": 128}),
        ("--scaling-mode block2d --block_size 64", {"scaling": "block", "block_size": 64}),
        ("--scaling_mode=block3d --group-size=32", {"scaling": "block", "block_size": 32}),
        ("--block_size 64", {**FP8, "block_size": None}),
        ("--int8", {"format": "int8", "scaling": "tensor", "rotate": None}),
        ("--int8 --scaling_mode block", {"format": "int8", "scaling": "block", "block_size": 128}),
        ("--int8 --scaling_mode row --convrot", {**INT8_ROW, "rotate": "hadamard:256"}),
        ("--int8 --convrot", {**INT8_ROW, "rotate": "hadamard:256"}),
        ("--int8 --convrot --convrot_group_size 64", {**INT8_ROW, "rotate": "hadamard:64"}),
        ("--int8 --scaling_mode row --dynamic-convrot", {**INT8_ROW, "rotate": "hadamard"}),
        ("--mxfp8 --scaling_mode row", {"format": "mxfp8", "scaling": None}),
        ("--nvfp4 --simple", {"format": "nvfp4", "scaling": None, "rounding": "nearest"}),
        ("--input_scale -fpmm", {"input_scale": 1.0, "full_precision_matmul": True}),
        ("--full-precision-matrix-mult", {"full_precision_matmul": True}),
        ("--nonfinite keep", {"nonfinite": "keep"}),
        ("--save-quant-metadata --low-memory -lm --verbose-pinned --no-normalize-scales --manual_seed 0", FP8),
        ("--scaling ro --simple", None),
        ("--scaling row --simp", {"scaling": "row", "rounding": "nearest"}),
    ],
)
def test_format_flags(arguments: str, expected: dict[str, Any] | None) -> None:
    if expected is None:
        with pytest.raises(click.UsageError):
            stage("quantize", *arguments.split())
        return
    made = stage("quantize", *arguments.split())
    assert {name: made[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {"preset": "none", "include": None, "exclude": None, "rules": [], "fallback": None, "heuristics": False}),
        ("--flux2", {"preset": "flux2"}),
        ("--visual --t5xxl", {"preset": "t5xxl,visual"}),
        ("--distillation_large", {"preset": "distillation_large"}),
        ("--distillation-small", {"preset": "distillation_small"}),
        ("--exclude-layers final|img_in", {"exclude": "final|img_in"}),
        ("--exclude_layers=a.weight", {"exclude": "a.weight"}),
        ("--heur", {"heuristics": True}),
        ("--flux2 --nvfp4 --fallback mxfp8", {"preset": "flux2", "fallback": {"format": "mxfp8", "rounding": "mse"}}),
        ("--simple --fallback int8", {"fallback": {"format": "int8", "scaling": "tensor", "rounding": "mse"}}),
        (
            "--scaling_mode block --fallback int8 --fallback-block-size 32 --fallback-simple",
            {"fallback": {"format": "int8", "scaling": "block", "block_size": 32, "rounding": "nearest"}},
        ),
    ],
)
def test_filter_flags(arguments: str, expected: dict[str, Any]) -> None:
    made = stage("target", *arguments.split())
    assert {name: made[name] for name in expected} == expected


def test_every_preset_has_a_flag() -> None:
    for name in load_presets():
        assert stage("target", f"--{name}")["preset"] == name


@pytest.mark.parametrize(
    ("arguments", "pattern", "settings"),
    [
        ("--custom-layers attn --custom-type fp8", "attn", {**FP8, "rounding": "mse"}),
        ("--simple --custom-layers attn --custom-type mxfp8", "attn", {"format": "mxfp8", "rounding": "mse"}),
        ("--custom_layers attn --custom_type nvfp4 --custom_simple", "attn",
         {"format": "nvfp4", "rounding": "nearest"}),
        ("--custom-layers a --custom-type int8 --custom-scaling-mode block --custom-block-size 32", "a",
         {"format": "int8", "scaling": "block", "block_size": 32, "rounding": "mse"}),
        ("--scaling_mode block --block_size 64 --custom-layers a --custom-type int8", "a",
         {"format": "int8", "scaling": "block", "block_size": 64, "rounding": "mse"}),
        ("--custom-layers a --custom-type int8 --custom-convrot --custom-convrot-group-size 16", "a",
         {**INT8_ROW, "rotate": "hadamard:16", "rounding": "mse"}),
        ("--convrot --custom-layers a --custom-type int8 --custom-scaling-mode row", "a",
         {**INT8_ROW, "rotate": "hadamard:256", "rounding": "mse"}),
        ("--custom-layers a --custom-type fp8 --custom-fpmm", "a",
         {**FP8, "rounding": "mse", "full_precision_matmul": True}),
        ("--custom-layers a --custom-type fp8 --custom-heur", "a", {**FP8, "rounding": "mse", "heuristics": True}),
        (r"--custom-layers attn\..*\.weight$ --custom-type fp8", r"attn\..*$", {**FP8, "rounding": "mse"}),
    ],
)  # fmt: skip
def test_custom_layers(arguments: str, pattern: str, settings: dict[str, Any]) -> None:
    assert rule(*arguments.split()) == (pattern, settings)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"qkv\.weight", "qkv$"), (r"qkv.weight$", "qkv$"), ("qkv.*weight$", "qkv.*$"), (r"(a|b)\.weight$", "(a|b)$"),
        (r"a\.weight|b\.weight", "a$|b$"), ("attn", "attn"), (r"x\.weight_gate", r"x\.weight_gate"),
    ],
)  # fmt: skip
def test_patterns_for_full_keys(pattern: str, expected: str) -> None:
    assert without_weight(pattern) == expected


def test_running_flags() -> None:
    arguments = ["--device", "cuda:1", "--memory", "2GB", "--workers", "3", "-o", "x.safetensors", "--overwrite"]
    recipe = translated(*arguments).recipe
    assert (recipe.run.device, recipe.run.memory, recipe.run.workers) == ("cuda:1", 2 * 10**9, 3)
    assert recipe.output is not None
    assert (recipe.output.path, recipe.output.overwrite, recipe.output.dialect) == ("x.safetensors", True, "comfy")
    assert translated().recipe.output == translated("--low_memory").recipe.output


# ---- names ----


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("", "learned_fp8_tensor"),
        ("--simple", "simple_fp8_tensor"),
        ("--simple --scaling_mode row --flux2", "simple_fp8mixed_row"),
        ("--scaling_mode block2d", "learned_fp8_block2d"),
        ("--int8 --simple", "simple_int8_tensorwise"),
        ("--int8 --scaling_mode row --wan", "learned_int8mixed_rowwise"),
        ("--int8 --scaling_mode block --simple", "simple_int8_bs128"),
        ("--int8 --scaling_mode block --block_size 64 --simple", "simple_int8_bs64"),
        ("--int8 --convrot --simple", "simple_int8_rowwise"),
        ("--custom-layers a --custom-type int8 --simple", "simple_fp8mixed_tensor"),
        ("--fallback int8 --simple", "simple_fp8_tensor"),
        ("--nvfp4", "learned_nvfp4"),
        ("--mxfp8 --simple --qwen", "simple_mxfp8mixed"),
        ("--mxfp8 --fallback fp8", "mxfp8_mixed"),
        ("--nvfp4 --custom-layers a --custom-type fp8", "nvfp4_mixed"),
    ],
)
def test_automatic_names(arguments: str, name: str) -> None:
    options = compat.parse(["-i", "models/a.b.safetensors", *arguments.split()])
    assert automatic_output(options) == f"models/a.b_{name}.safetensors"


def test_base_names(tmp_path: Path) -> None:
    (tmp_path / "flux.1-dev").mkdir()
    assert base_name(f"{tmp_path}/flux.1-dev/") == f"{tmp_path}/flux.1-dev"
    assert base_name("m/model.safetensors.index.json") == "m/model"
    with pytest.raises(UsageError, match="--output"):
        base_name("m/model-*.safetensors")


# ---- notes and refusals ----


def test_learned_rounding_becomes_mse_with_one_note() -> None:
    (note,) = translated("--num_iter", "500", "--lr", "0.5", "--optimizer", "adamw", "-esloss", "0").notes
    assert "rounding mse" in note
    assert all(flag in note for flag in ("--num-iter", "--lr", "--optimizer", "--early-stop-loss"))
    assert translated("--simple").notes == ()
    assert "--top-p" in translated("--simple", "--top_p", "0.3").notes[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--block_size 64", "--block-size (needs --scaling-mode block)"),
        ("--nvfp4 --scaling_mode row", "--scaling-mode"),
        ("--mxfp8 --input_scale", "--input-scale"),
        ("--custom-simple", "--custom-simple (needs --custom-layers)"),
        ("--lora-rank 16", "--lora-rank (needs --extract-lora)"),
        ("--fallback-simple", "--fallback-simple (needs --fallback)"),
        ("--fullmatch", "--fullmatch (needs --layer-config)"),
    ],
)
def test_what_has_no_effect_is_said(arguments: str, words: str) -> None:
    assert words in " ".join(translated("--simple", *arguments.split()).notes)


def test_nothing_is_said_where_nothing_differs() -> None:
    commands = ("--input_scale", "--fallback mxfp8 --fallback-simple", "--int8 --scaling_mode block --block_size 64")
    for arguments in commands:
        assert translated("--simple", *arguments.split()).notes == ()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--extract-lora --lora-rank 0", ["rank 0"]),
        ("--extract-lora --lora-target (", ["adapter target"]),
        ("--actcal --actcal-samples 8", ["--actcal", "--statistics", "--input-scales", "--actcal-lora"]),
        ("--edit-quant", ["--add-keys", "--remove-keys", "--save-quant-metadata"]),
        ("--edit-quant --add-keys a", ["--add-keys 'a'", "expected 'key': value"]),
        ("--edit-quant --add-keys 'a':1,", ["expected 'key': value"]),
        ("--edit-quant --add-keys a:1,a:2", ["'a' is named twice"]),
        ("--edit-quant --add-keys 'a:1", ["expected 'key': value"]),
        ("--edit-quant --remove-keys a,,b", ["--remove-keys", "expected a key"]),
        ("--edit-quant --remove-keys a --quant-filter (", ["filter", "regular expression"]),
        ("--int8 --nvfp4", ["--int8", "--nvfp4"]),
        ("--convrot", ["--convrot", "--scaling-mode row"]),
        ("--int8 --scaling_mode tensor --convrot", ["--scaling-mode row"]),
        ("--int8 --convrot --convrot-group-size 48", ["48", "power of four"]),
        ("--custom-layers a", ["--custom-type"]),
        ("--custom-layers a --custom-type fp8 --custom-convrot", ["--custom-convrot", "int8"]),
        ("--custom-layers a( --custom-type fp8", ["a(", "position"]),
        ("--exclude-layers [", ["exclude", "["]),
        ("--scaling_mode block --block_size 0", ["block size 0"]),
        ("--device tpu", ["tpu"]),
    ],
)  # fmt: skip
def test_refused_in_one_message(arguments: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as refused:
        translated(*arguments.split())
    assert all(word in str(refused.value) for word in words)


@pytest.mark.parametrize(
    ("flag", "near"),
    [("--simpel", "--simple"), ("--scalingmode", "--scaling-mode"), ("--fluxx2", "--flux2"), ("--qwn", "--qwen")],
)
def test_unknown_flag(flag: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-i", "m.safetensors", flag) == 2
    message = capsys.readouterr().err
    assert flag in message
    assert near in message
    assert "did you mean" in message.lower()


REFERENCE = """
--input= --output= --comfy_quant --simple --full_precision_matrix_mult --heur --device= --verbose=NORMAL
--manual_seed=-1 --use_speed
--save-quant-metadata --verbose-pinned --low-memory --int8 --nvfp4 --mxfp8 --scaling_mode=row --block_size=1
--group_size=1 --convrot --convrot-group-size=1 --dynamic-convrot --input_scale --input-scales= --no-normalize-scales
--exclude-layers= --custom-layers= --custom-type=fp8 --custom-block-size=1 --custom-scaling-mode=row --custom-simple
--custom-heur --custom-full-precision-mm --custom-fpmm --custom-convrot --custom-convrot-group-size=1 --fallback=fp8
--fallback-block-size=1 --fallback-simple --layer-config= --fullmatch --optimizer=prodigy --num_iter=1 --lr=1
--lr_schedule=plateau --top_p=1 --min_k=1 --max_k=1 --full_matrix --calib_samples=1 --calib_cpu --lr_gamma=1
--lr_patience=1 --lr_factor=1 --lr_min=1e-8 --lr_cooldown=0 --lr_threshold=0 --lr-threshold-mode=rel
--lr_adaptive_mode=simple-reset --lr-shape-influence=1 --early-stop-loss=1 --early-stop-lr=1 --early-stop-stall=1
--scale-optimization=fixed --scale-refinement=1 --extract-lora --lora-rank=1 --lora-target= --lora-depth=1
--lora-ar-threshold=0 --lora-output= --lora-save-path= --convert-fp8-scaled --hp-filter= --full-precision-mm
--convert-int8-scaled
--legacy_input_add --cleanup-fp8-scaled --scaled-fp8-marker=0 --make-hybrid-mxfp8 --tensor-scales= --edit-quant
--remove-keys= --add-keys= --quant-filter= --actcal --actcal-samples=1 --actcal-percentile=99.9 --actcal-lora=
--actcal-seed=1 --actcal-device= --dry-run=analyze
"""


@pytest.mark.parametrize("spelling", [str, lambda flag: flag.replace("-", "_")], ids=["as it is", "underscores"])
def test_every_flag_of_the_reference_is_known(spelling: Any) -> None:
    for flag in REFERENCE.split():
        name, equals, value = flag.partition("=")
        written = "--" + spelling(name.removeprefix("--")) + (f"={value or 'x'}" if equals else "")
        options = compat.parse(["-i", "m", written])
        assert len(options) == (1 if name == "--input" else 2), written


def test_the_documentation_lists_every_flag() -> None:
    text = COMPAT_DOC.read_text().replace("_", "-")
    assert [flag.long for flag in all_flags().values() if flag.long not in text] == []


# ---- layer configuration ----


def config(tmp_path: Path, content: Any) -> str:
    path = tmp_path / "layers.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    ("entry", "settings", "arguments"),
    [
        ({"format": "float8_e4m3fn"}, FP8, "--scaling_mode row"),
        ({"format": "float8_e4m3fn", "scaling_mode": "row"}, {"format": "fp8", "scaling": "row"}, ""),
        ({"format": "float8_e4m3fn_rowwise"}, {"format": "fp8", "scaling": "row"}, ""),
        ({"format": "float8_e4m3fn_blockwise"}, {"format": "fp8", "scaling": "block", "block_size": 128}, ""),
        ({"format": "float8_e4m3fn_blockwise"}, {"format": "fp8", "scaling": "block", "block_size": 64},
         "--scaling_mode block --block_size 64"),
        ({"format": "float8_e4m3fn_block3d", "block_size": 32},
         {"format": "fp8", "scaling": "block", "block_size": 32}, ""),
        ({"format": "int8_blockwise", "block_size": 64}, {"format": "int8", "scaling": "block", "block_size": 64}, ""),
        ({"format": "int8_tensorwise"}, {"format": "int8", "scaling": "tensor"}, ""),
        ({"format": "int8_tensorwise"}, INT8_ROW, "--int8 --scaling_mode row"),
        ({"format": "int8_tensorwise", "scaling_mode": "row"}, INT8_ROW, ""),
        ({"format": "int8_tensorwise"}, {**INT8_ROW, "rotate": "hadamard:256"}, "--int8 --convrot"),
        ({"format": "nvfp4", "simple": True, "_note": 1}, {"format": "nvfp4", "rounding": "nearest"}, ""),
        ({"format": "hybrid_mxfp8"}, {"format": "hybrid_mxfp8"}, "--scaling_mode row"),
        ({"format": "mxfp8", "full_precision_matrix_mult": True},
         {"format": "mxfp8", "full_precision_matmul": True}, ""),
        ({"skip": True}, {"skip": True}, ""),
    ],
)  # fmt: skip
def test_layer_config_entries(tmp_path: Path, entry: Any, settings: Any, arguments: str) -> None:
    path = config(tmp_path, {"attn": entry})
    assert rule("--layer-config", path, *arguments.split()) == ("attn", settings)


def test_layer_config_special_keys(tmp_path: Path) -> None:
    content = {"_default": {"format": "mxfp8"}, "_exclusions": ["img"], "_remark": 1, "a": {"format": "nvfp4"}}
    path = config(tmp_path, content)
    made = translated("--simple", "--layer_config", path, "--fullmatch", "--int8", "-fpmm")
    target, quantize = (item.to_dict() for item in made.recipe.stages)
    assert [(item["pattern"], item["settings"]) for item in target["rules"]] == [
        ("^(?:img)$", {"skip": True}), ("^(?:a)$", {"format": "nvfp4"}),
    ]  # fmt: skip
    assert (quantize["format"], quantize["rounding"], quantize["full_precision_matmul"]) == ("mxfp8", "nearest", True)
    assert any("_default" in note for note in made.notes)
    path = config(tmp_path, {"_default": {"skip": True}, "a": {"format": "nvfp4"}})
    assert [item["pattern"] for item in stage("target", "--layer-config", path)["rules"]] == ["a", ".*"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", ["JSON object"]), ("{", ["layers.json"]), ('{"a": {"skip": true}, "a": {"skip": true}}', ["twice"]),
        ({"attn": {"format": ""}}, ["'attn'", "no format"]),
        ({"_default": {"format": ""}}, ["'_default'", "no format"]),
        ({"attn": {"format": "float8_e4m3"}}, ["float8_e4m3", "did you mean"]), ({"attn": 3}, ["'attn'", "object"]),
        ({"attn": {"format": "hybrid_mxfp8", "scaling_mode": "row"}}, ["row"]), ({"a(": {"skip": True}}, ["position"]),
        ({"attn": {"format": "mxfp8", "scale_mode": "row"}}, ["scale_mode", "did you mean 'scaling_mode'"]),
        ({"attn": {"format": "float8_e4m3fn_rowwise", "scaling_mode": "block"}}, ["float8_e4m3fn_rowwise", "block"]),
        ({"attn": {"format": "float8_e4m3fn", "scaling_mode": "rows"}}, ["did you mean 'row'"]),
        ({"attn": {"format": "int8_blockwise", "block_size": "64"}}, ["block_size", "'64'"]),
        ({"_exclusions": "img"}, ["list"]),
    ],
)  # fmt: skip
def test_bad_layer_config(tmp_path: Path, content: Any, words: list[str]) -> None:
    path = config(tmp_path, content)
    with pytest.raises(UsageError) as refused:
        translated("--layer-config", path)
    assert all(word in str(refused.value) for word in [*words, path])
    with pytest.raises(UsageError, match="No such file"):
        translated("--layer-config", path + ".missing")


# ---- the whole command ----


@pytest.mark.parametrize(
    ("arguments", "target", "quantize"),
    [
        ("--simple", {}, {"format": "fp8", "rounding": "nearest"}),
        ("--scaling_mode row --comfy_quant", {}, {"format": "fp8", "scaling": "row"}),
        ("--int8 --scaling_mode row --convrot --convrot-group-size 64 --simple", {},
         {"format": "int8", "scaling": "row", "rotate": "hadamard:64", "rounding": "nearest"}),
        ("--mxfp8 --exclude-layers img_in", {"exclude": "img_in"}, {"format": "mxfp8"}),
        ("--nvfp4 --simple --flux2 --fallback fp8 --fallback-simple", {"preset": "flux2", "fallback": "fp8"},
         {"format": "nvfp4", "rounding": "nearest"}),
        ("--nvfp4 --custom-layers fc1.weight --custom-type int8 --custom-scaling-mode row",
         {"rules": {"fc1$": {"format": "int8", "scaling": "row", "rounding": "mse"}}}, {"format": "nvfp4"}),
    ],
)  # fmt: skip
def test_same_bytes_as_the_pipeline(
    source: Path, tmp_path: Path, arguments: str, target: dict[str, Any], quantize: dict[str, Any]
) -> None:
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    assert run("-i", source, "-o", ours, *arguments.split()) == 0
    pipeline = Pipeline(workers=1).read(source).target(**{"preset": "none", **target})
    pipeline.quantize(**quantize).write(theirs)
    assert same_bytes(ours, theirs)
    with safe_open(ours, "pt") as file:
        assert {"origin", "_quantization_metadata", "quantloom"} <= file.metadata().keys()


def test_a_filled_in_template_gives_every_layer_its_format(source: Path, tmp_path: Path) -> None:
    assert run("-i", source, "--dry_run", "create-template") == 0
    path = tmp_path / "tiny_layer_config_template.json"
    template = json.loads(path.read_text())
    assert list(template)[:2] == ["_default", "_exclusions"]
    assert template["blocks.0.attn.qkv"] == {"format": "", "_shape": [96, 256]}
    assert not {"norm", "blocks.0.thin"} & template.keys()
    assert run("-i", source, "--layer-config", path) == 2, "not filled in"
    wanted = {
        "blocks.0.attn.qkv": "nvfp4", "blocks.1.attn.qkv": "int8_tensorwise", "blocks.0.mlp.fc1": "mxfp8",
        "blocks.1.mlp.fc1": "float8_e4m3fn_rowwise", "embed_tokens": "float8_e4m3fn",
    }  # fmt: skip
    for name, entry in template.items():
        if not name.startswith("_"):
            entry |= {"format": wanted[name]} if name in wanted else {"skip": True}
    template["_default"] = {"format": "float8_e4m3fn"}
    path.write_text(json.dumps(template))
    assert run("-i", source, "--layer-config", path, "--fullmatch", "-o", tmp_path / "out.safetensors") == 0
    tensors = load_file(tmp_path / "out.safetensors")
    found = {name.removesuffix(".comfy_quant"): json.loads(bytes(tensor.tolist()))["format"]
             for name, tensor in tensors.items() if name.endswith(".comfy_quant")}  # fmt: skip
    assert found == {**wanted, "blocks.0.thin": "float8_e4m3fn"}
    assert tensors["blocks.1.mlp.fc1.weight_scale"].shape == (128,)


def test_a_template_that_was_filled_in_is_not_lost(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny_layer_config_template.json"
    path.write_text("work of hours")
    assert run("-i", source, "--dry-run", "create-template") == 1
    assert path.read_text() == "work of hours"
    assert run("-i", source, "--dry-run", "create-template", "--overwrite") == 0
    assert json.loads(path.read_text())


@pytest.mark.parametrize("arguments", [("--dry-run",), ("--dry_run", "analyze"), ("--dry-run=analyze",)])
def test_analyze_writes_nothing(source: Path, tmp_path: Path, arguments: tuple[str, ...], capsys: Any) -> None:
    assert run(*arguments, "-i", source, "--nvfp4", "--simple") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name]
    shown = capsys.readouterr().out
    assert "blocks.0.attn.qkv" in shown
    assert "tiny_simple_nvfp4.safetensors" in shown


def test_automatic_output_is_written(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-i", source, "--int8", "--simple", "--verbose", "MINIMAL") == 0
    assert (tmp_path / "tiny_simple_int8_tensorwise.safetensors").is_file()
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


LORA = {"rank": 32, "target": None, "depth": 1, "ar_threshold": 0.0, "method": "auto", "output": None}


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ("", {}),
        ("--lora_rank 16 --lora_target attn", {"rank": 16, "target": "attn"}),
        ("--lora-depth 3 --lora-ar-threshold 2.5", {"depth": 3, "ar_threshold": 2.5}),
        ("--lora-output x.safetensors", {"output": "x.safetensors"}),
        ("--lora-save-path y.safetensors --lora-target=", {"output": "y.safetensors"}),
    ],
)
def test_flags_of_an_adapter(arguments: str, options: dict[str, Any]) -> None:
    found = stage("lora", "--extract-lora", *arguments.split())
    assert {name: found[name] for name in LORA} == {**LORA, **options}


@pytest.mark.parametrize("kind", ["", "--simple", "--int8 --scaling_mode row --convrot", "--nvfp4", "--mxfp8 --simple"])
def test_model_and_adapter_are_written(kind: str, source: Path, tmp_path: Path) -> None:
    """convert_to_quant itself writes no adapter beside FP8 and INT8."""
    output = tmp_path / "out.safetensors"
    adapter_flags = ("--extract-lora", "--lora-target", "attn", "--lora-rank", "16")
    assert run("-i", source, "-o", output, *kind.split(), *adapter_flags) == 0
    adapter = load_file(tmp_path / "out_lora.safetensors")
    keys = {f"diffusion_model.blocks.{block}.attn.qkv" for block in (0, 1)}
    parts = ("lora_up.weight", "lora_down.weight", "alpha")
    assert set(adapter) == {f"{key}.{part}" for key in keys for part in parts}
    assert all(adapter[f"{key}.lora_up.weight"].shape[1] == 16 for key in keys)
    assert all(x.dtype == torch.float32 and x.is_contiguous() for x in adapter.values())
    assert verify(str(output), str(source), adapter=str(tmp_path / "out_lora.safetensors")).ok


def test_the_automatic_name_of_an_adapter(source: Path, tmp_path: Path) -> None:
    flags = ("--nvfp4", "--simple", "--extract-lora", "--lora-target")
    assert run("-i", source, *flags, "attn", "--verbose", "MINIMAL") == 0
    assert (tmp_path / "tiny_simple_nvfp4_lora.safetensors").is_file()
    assert run("-i", source, *flags, "atn", "--overwrite") == 2, "a pattern that finds nothing"


def test_exit_status(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert run("-i", source, "--scaling_mode", "rows") == 2
    assert run("-i", source, "--edit-quant") == 2
    assert run("-i", source, "--exclude-layers", "atn_qkv") == 2, "a pattern that finds nothing"
    assert run("-i", tmp_path / "missing.safetensors") == 1
    assert run("-i", source, "-o", source, "--overwrite") == 1
    output = tmp_path / "out.safetensors"
    assert run("-i", source, "-o", output) == 0
    before = output.read_bytes()
    assert run("-i", source, "-o", output, "--simple") == 1
    assert output.read_bytes() == before
    assert run("-i", source, "-o", output, "--simple", "--overwrite") == 0
    assert output.read_bytes() != before
    assert "Traceback" not in capsys.readouterr().err


def test_help_screens(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert "--simple" in shown
    assert "--lora-rank" not in shown
    for section, (long, short, _) in SECTIONS.items():
        if not long:
            continue
        assert long in shown
        screens = []
        for flag in (long, short, "--" + long.removeprefix("--").replace("-", "_")):
            assert run(flag) == 0
            screens.append(capsys.readouterr().out)
        assert screens[0] == screens[1] == screens[2]
        expected = [flag.long for flag in all_flags().values() if flag.section == section]
        assert expected
        assert all(flag in screens[0] for flag in expected)


def test_an_activation_scale_goes_to_fp8_layers_alone() -> None:
    assert stage("quantize", "--int8", "--input_scale")["input_scale"] is None
    assert stage("quantize", "--input_scale")["input_scale"] == 1.0
    command = ("--int8", "--input_scale", "--custom-layers", "mlp", "--custom-type", "fp8", "--fallback", "fp8")
    assert rule(*command)[1]["input_scale"] == 1.0
    assert stage("target", *command)["fallback"]["input_scale"] == 1.0


# ---- editing ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("'a': 'b'", {"a": "b"}),
        ("'a':true,'b':False, 'c': TRUE", {"a": True, "b": False, "c": True}),
        ("'a': 64, 'b': -1.5e-3, 'c': +2", {"a": 64, "b": -0.0015, "c": 2}),
        ("'format': float8_e4m3fn_rowwise", {"format": "float8_e4m3fn_rowwise"}),
        ("a: two words , b: x:y", {"a": "two words", "b": "x:y"}),
        ("'a, b': 'c: d, e', \"f\": \"it's\"", {"a, b": "c: d, e", "f": "it's"}),
        ("'a': 'true', 'b': '64', 'c': ''", {"a": "true", "b": "64", "c": ""}),
        (r"'a': 'it\'s'", {"a": "it's"}),
        ("'orig_shape': [100, 72], 'e': []", {"orig_shape": [100, 72], "e": []}),
        ("'a': nan, 'b': null", {"a": "nan", "b": "null"}),
    ],
)
def test_the_grammar_of_added_keys(text: str, expected: dict[str, Any]) -> None:
    made = stage("edit", "--edit-quant", "--add-keys", text)
    assert made == {"add": expected, "remove": [], "filter": None, "rebuild_header": False}
    assert [type(value) for value in made["add"].values()] == [type(value) for value in expected.values()]


MALFORMED = ["", ",", "a", "a:", ":1", "'a' 1", "'a': 1,", "'a: 1", "'a': 'b' c", "a: [1, [2]]", "{}"]


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_added_keys(text: str) -> None:
    with pytest.raises(UsageError, match="--add-keys"):
        translated("--edit-quant", "--add-keys", text)


def test_flags_of_an_edit() -> None:
    made = stage(
        "edit", "--edit_quant", "--remove_keys", "a, 'b,c'", "--quant_filter", "mlp", "--save-quant-metadata"
    )
    assert made == {"add": {}, "remove": ["a", "b,c"], "filter": "mlp", "rebuild_header": True}
    rebuilt = stage("edit", "--edit-quant", "--save-quant-metadata", "--quant-filter", "mlp")
    assert rebuilt == {"add": {}, "remove": [], "filter": None, "rebuild_header": True}
    assert "--int8" in translated("--edit-quant", "--remove-keys", "a", "--int8").notes[0]
    assert automatic_output({"input": "m/x.safetensors", "edit_quant": True}) == "m/x_edited.safetensors"


def test_an_edit_through_the_command(source: Path) -> None:
    assert run("-i", source, "-o", source.with_name("q.safetensors"), "--int8", "--convrot", "--simple") == 0
    added = "'full_precision_matrix_mult': true, 'note': 'a, b: c'"
    edited = ("--edit-quant", "--add-keys", added, "--remove-keys", "per_row", "--quant-filter", "attn")
    assert run("-i", source.with_name("q.safetensors"), *edited, "--save-quant-metadata") == 0
    before, after = load_file(source.with_name("q.safetensors")), load_file(source.with_name("q_edited.safetensors"))
    for name, tensor in before.items():
        assert torch.equal(after[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)) != (
            "attn" in name and name.endswith(".comfy_quant")
        )
    entry = json.loads(bytes(after["blocks.0.attn.qkv.comfy_quant"].tolist()))
    assert entry == {
        "format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256, "full_precision_matrix_mult": True,
        "note": "a, b: c",
    }  # fmt: skip
    with safe_open(source.with_name("q_edited.safetensors"), "pt") as file:
        layers = json.loads(file.metadata()["_quantization_metadata"])["layers"]
    assert layers["blocks.0.attn.qkv"] == entry
    assert layers["blocks.1.mlp.fc1"]["per_row"] is True


def test_a_refused_edit_leaves_no_output(source: Path) -> None:
    assert run("-i", source, "--edit-quant", "--add-keys", "'a': 1") == 1
    assert run("-i", source, "--edit-quant", "--add-keys", "'a'") == 2
    assert [path.name for path in source.parent.iterdir()] == [source.name]


# ---- utility modes ----


def test_hybrid_as_the_reference_writes_it(source: Path, tmp_path: Path, capsys: Any) -> None:
    mxfp8, fp8 = tmp_path / "m.safetensors", tmp_path / "f.safetensors"
    Pipeline().read(source).quantize("mxfp8").write(mxfp8)
    Pipeline().read(source).quantize("fp8").write(fp8)
    assert run("-i", mxfp8, "--make-hybrid-mxfp8") == 0
    said = capsys.readouterr()
    assert "quantloom hybrid" in said.err
    assert "decoded by .weight_scalar" in said.out
    Pipeline().read(mxfp8).hybrid(mode="legacy").write(tmp_path / "ours.safetensors")
    assert same_bytes(tmp_path / "m_hybrid.safetensors", tmp_path / "ours.safetensors")
    assert run("-i", mxfp8, "-o", tmp_path / "s.safetensors", "--make_hybrid_mxfp8", "--tensor_scales", fp8) == 0
    Pipeline().read(mxfp8).hybrid(tensor_scales=str(fp8)).write(tmp_path / "ours.safetensors", overwrite=True)
    made, scales = load_file(tmp_path / "s.safetensors"), load_file(fp8)
    scalars = [name for name in made if name.endswith(".weight_scalar")]
    assert scalars
    assert all(torch.equal(made[name], scales[name.replace("scalar", "scale")]) for name in scalars)


def test_flags_beside_the_hybrid_mode() -> None:
    made = translated("--make-hybrid-mxfp8", "--mxfp8", "--simple", "--low-memory", "--flux2")
    assert [item.verb for item in made.recipe.stages] == ["hybrid"]
    words = ("without effect", "--mxfp8", "--simple", "--flux2")
    assert any(all(word in note for word in words) for note in made.notes)
    assert not any("--low-memory" in note for note in made.notes)
    assert "--tensor-scales (needs --make-hybrid-mxfp8)" in translated("--simple", "--tensor-scales", "f").notes[0]
