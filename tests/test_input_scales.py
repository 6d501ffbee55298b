"""Activation scales: values, what they are made of, that all else stays, bad input, what a client makes of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import FORMATS, Ran, make_tensors, write_file, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantloom import Pipeline, Recipe
from quantloom.flow import compat
from quantloom.flow.report import Report
from quantloom.flow.verify import verify
from quantloom.formats.errors import CheckpointError, PlanError, QuantloomError, UsageError
from quantloom.stages.accumulate import Sums
from quantloom.stages.adapter_inputs import HEADROOM, percentile
from quantloom.stages.layer_names import LayerNames
from quantloom.stages.statistics import Statistics
from quantloom.stages.statistics_store import write_store

Cli = Callable[..., Ran]

QKV, UP, DOWN, ODD = "blocks.0.attn.qkv", "blocks.0.mlp.up", "blocks.0.mlp.down", "odd"
LAYERS = (QKV, UP, DOWN, "blocks.1.attn.qkv", "blocks.1.mlp.up", "blocks.1.mlp.down", ODD)
WIDTHS = {QKV: 128, UP: 128, DOWN: 256, ODD: 72}
LARGEST = {"fp8": 448.0, "fp8 row": 448.0, "fp8_e5m2": 57344.0, "nvfp4": 6 * 448.0}


def inputs(width: int, tokens: int = 300) -> torch.Tensor:
    """Heavy-tailed, of a size of its own for each width."""
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(width)).pow(3) * width


def write_statistics(path: Path, **other: torch.Tensor) -> str:
    """A store for the layers of ``WIDTHS``; ``other``: inputs of more layers."""
    made = []
    for name, x in {**{name: inputs(width) for name, width in WIDTHS.items()}, **other}.items():
        sums = Sums(x.shape[1], hessian=True)
        sums.add(x)
        made.append(([name], sums.estimate()))
    write_store(path, made, {"run": "a run"}, frozenset())
    return str(path)


@pytest.fixture
def statistics(tmp_path: Path) -> str:
    return write_statistics(tmp_path / "stats.zarr")


_MADE: dict[str, bytes] = {}


def quantize(tmp_path: Path, kind: str = "fp8", prefix: str = "", **options: Any) -> Path:
    """The tiny checkpoint, quantized; what needs no file is made once."""
    output = tmp_path / f"{kind}.safetensors"
    output.parent.mkdir(exist_ok=True)
    key = repr((kind, prefix, options))
    if key not in _MADE:
        source = write_file(tmp_path / "original" / f"{kind}.safetensors", make_tensors(prefix=prefix))
        flow = Pipeline(scheduler="sync").read(source).target(preset="none")
        flow.quantize(**{**FORMATS[kind], "rounding": "nearest", **options}).write(output)
        _MADE[key] = output.read_bytes()
    output.write_bytes(_MADE[key])
    return output


def calibrated(source: Path, **options: Any) -> Report:
    output = source.parent / "out.safetensors"
    return Pipeline(scheduler="sync").read(source).input_scales(**options).write(output, overwrite=True)


def scales(path: Path | str) -> dict[str, float]:
    found = {name: x for name, x in load_file(path).items() if name.endswith(".input_scale")}
    assert all(x.dtype == torch.float32 and x.shape == () for x in found.values())
    return {name.removesuffix(".input_scale"): float(x) for name, x in found.items()}


def contents(path: Path | str) -> tuple[dict[str, tuple[str, list[int], bytes]], dict[str, str]]:
    """Every tensor but activation scales as it is stored, and ``__metadata__`` but checksums."""
    raw = Path(path).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    metadata.pop("quantloom.checksums", None)
    data = raw[8 + size :]
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in header.items() if not name.endswith(".input_scale")
    }, metadata  # fmt: skip


def as_bytes(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def written(path: Path, values: dict[str, Any]) -> str:
    path.write_text(json.dumps(values))
    return str(path)


# ---- what a scale is ----


@pytest.mark.parametrize("kind", LARGEST)
def test_the_largest_input_meets_the_largest_code(kind: str, tmp_path: Path, statistics: str) -> None:
    report = calibrated(quantize(tmp_path, kind), statistics=statistics)
    found = scales(report.output)
    assert found.keys() == WIDTHS.keys() - ({DOWN} - found.keys())
    for name in found:
        wanted = float(inputs(WIDTHS[name]).abs().max()) / LARGEST[kind]
        assert found[name] == pytest.approx(wanted, rel=1e-6)
    assert report.changed == {"activation scale added: amax of statistics": len(found)}


def test_a_percentile_of_the_input(tmp_path: Path, statistics: str) -> None:
    report = calibrated(quantize(tmp_path), statistics=statistics, input_scale="p99.9")
    for name, scale in scales(report.output).items():
        x = inputs(WIDTHS[name]).abs().flatten().double()
        assert scale == pytest.approx(float(x.quantile(0.999)) / 448, rel=0.0625)
        assert scale < float(x.max()) / 448


def test_a_percentile_that_clips_much_is_warned_of(tmp_path: Path, statistics: str) -> None:
    source, found = quantize(tmp_path), Statistics.open(statistics)
    (warning,) = calibrated(source, statistics=statistics, input_scale="p90").warnings
    ratios = {name: found.amax(name) / found.percentile(name, 90) for name in WIDTHS}
    worst = max(ratios, key=ratios.__getitem__)
    assert warning.startswith(f"percentiles clip: {worst} has seen inputs {ratios[worst]:.3g} times as large")
    assert not calibrated(source, statistics=statistics).warnings


def test_it_is_made_of_the_input_not_of_output_or_weight(tmp_path: Path, statistics: str) -> None:
    """convert_to_quant takes a percentile of the layer's output, or copies the scale of the weight."""
    output = calibrated(quantize(tmp_path), statistics=statistics).output
    tensors = load_file(output)
    for name, scale in scales(output).items():
        weight = make_tensors()[f"{name}.weight"].float()
        made = float((inputs(WIDTHS[name]) @ weight.T).abs().max()) / 448
        assert abs(math.log(scale / made)) > 0.1
        assert abs(math.log(scale / float(tensors[f"{name}.weight_scale"]))) > 0.1


def test_inputs_that_were_always_zero_tell_nothing(tmp_path: Path) -> None:
    store = write_statistics(tmp_path / "zero.zarr", **{"blocks.1.mlp.up": torch.zeros(20, 128)})
    report = calibrated(quantize(tmp_path), statistics=store)
    assert scales(report.output).keys() == WIDTHS.keys()
    assert any("blocks.1.mlp.up" in note for note in report.notes)


def test_as_convert_would_have_stored_them(tmp_path: Path, statistics: str) -> None:
    """One formula: scales stored with the conversion, and afterwards, are equal."""
    later = calibrated(quantize(tmp_path), statistics=statistics, input_scale="p99").output
    at_once = quantize(tmp_path / "once", statistics=statistics, input_scale="p99")
    assert scales(later) == scales(at_once)


# ---- what stays ----


def test_everything_else_is_copied_byte_for_byte(tmp_path: Path) -> None:
    """Markers in any spelling, header entries of any program, layers of other formats, undecodable ones."""
    source = quantize(tmp_path)
    tensors = load_file(source)
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors[f"{UP}.comfy_quant"] = as_bytes(b'{"format":"float8_e4m3fn",  "note": "kept"}')
    tensors["int8.weight"], tensors["int8.weight_scale"] = torch.ones(8, 16, dtype=torch.int8), torch.ones(8, 1)
    tensors["int8.comfy_quant"] = as_bytes(b'{"format": "int8_tensorwise", "per_row": true}')
    tensors["riddle.weight"], tensors["riddle.weight_scale"] = torch.ones(8, dtype=torch.int8), torch.ones(3)
    save_file(tensors, source, metadata={**metadata, "license": "some", "modelspec.title": "x"})
    before = contents(source)
    for options in ({"file": written(tmp_path / "s.json", {UP: 0.5, ODD: 2})}, {"lora": adapter(tmp_path)}):
        assert contents(calibrated(source, **options).output) == before
    assert verify(str(tmp_path / "out.safetensors"), str(source)).ok


def test_a_scale_that_was_there_is_replaced_kept_or_removed(tmp_path: Path) -> None:
    source = quantize(tmp_path, input_scale=3.0)
    file = written(tmp_path / "s.json", {UP: 0.5, ODD: 2})
    report = calibrated(source, file=file)
    assert report.changed == {"activation scale replaced: from a file": 2}
    assert scales(report.output) == {**dict.fromkeys(LAYERS, 3.0), UP: 0.5, ODD: 2.0}
    assert contents(report.output) == contents(source)

    missing = calibrated(quantize(tmp_path / "b"), file=file).output
    more = written(tmp_path / "more.json", {UP: 9, DOWN: 7})
    filled = calibrated(Path(missing).rename(tmp_path / "b" / "some.safetensors"), file=more, only_missing=True)
    assert scales(filled.output) == {UP: 0.5, ODD: 2.0, DOWN: 7.0}
    assert any(UP in note and "not used" in note for note in filled.notes)

    removed = calibrated(source, remove=True, filter="mlp")
    assert scales(removed.output) == {name: 3.0 for name in LAYERS if "mlp" not in name}
    assert removed.changed == {"activation scale removed": 4}
    assert contents(removed.output) == contents(source)


def test_shards_and_configuration_are_kept(tmp_path: Path, statistics: str) -> None:
    folder = write_folder(tmp_path / "in")
    Pipeline(scheduler="sync").read(folder).target(preset="none").quantize("fp8").write(tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text()) | {"quantization_config": {"quant_method": "x"}}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    Pipeline(scheduler="sync").read(tmp_path / "q").input_scales(statistics=statistics).write(
        tmp_path / "out", shard_size=100_000
    )
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "q" / "config.json").read_bytes()
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    before = contents(next((tmp_path / "q").glob("*.safetensors")))
    merged: dict[str, Any] = {}
    for shard in shards:
        tensors, metadata = contents(shard)
        assert metadata == before[1]
        merged |= tensors
    assert merged == before[0]


def test_a_legacy_model_gets_markers_with_its_scales(tmp_path: Path) -> None:
    """``scaled_fp8`` files: scale_input is replaced, as everywhere the model's marker becomes one for each layer."""
    tensors = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn).fill_(0)}
    for name in ("a", "b", "c"):
        codes = torch.randn(16, 16).to(torch.float8_e4m3fn)
        tensors |= {f"{name}.weight": codes, f"{name}.scale_weight": torch.tensor(0.5)}
    tensors |= {"a.scale_input": torch.tensor(4.0), "b.scale_input": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "legacy.safetensors")
    report = calibrated(tmp_path / "legacy.safetensors", file=written(tmp_path / "s.json", {"a": 0.25, "c": 0.75}))
    made = load_file(report.output)
    assert scales(report.output) == {"a": 0.25, "b": 3.0, "c": 0.75}
    assert not any("scaled_fp8" in name or "scale_input" in name for name in made)
    marker = json.loads(bytes(made["a.comfy_quant"].tolist()))
    assert marker == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    assert any("full precision" in note for note in report.notes)
    assert report.changed == {
        "activation scale replaced: from a file": 1, "activation scale added: from a file": 1,
    }  # fmt: skip


def test_layers_without_a_source_are_named(tmp_path: Path, statistics: str, cli: Cli) -> None:
    source = quantize(tmp_path)
    ran = cli("calibrate-activations", source, tmp_path / "o.safetensors", "--statistics", statistics, "--json")
    assert ran.status == 0
    found = json.loads(ran.out)
    assert found["kept"] == {"nothing says its activation scale": 3}
    assert all(name in found["notes"][0] for name in LAYERS if name not in WIDTHS)


# ---- files of scales ----


@pytest.mark.parametrize("spelling", [
    lambda name: name, lambda name: f"{name}.input_scale", lambda name: f"model.diffusion_model.{name}",
    lambda name: f"diffusion_model.{name}.input_scale",
])  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_names_with_and_without_the_models_prefix(spelling: Callable[[str], str], prefix: str, tmp_path: Path) -> None:
    source = quantize(tmp_path, prefix=prefix)
    file = written(tmp_path / "s.json", {spelling(UP): 0.5, spelling(ODD): 3})
    assert scales(calibrated(source, file=file).output) == {prefix + UP: 0.5, prefix + ODD: 3.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scales_of_another_checkpoint(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    other = {f"{UP}.input_scale": torch.full(shape, 0.375, dtype=dtype), f"{UP}.weight": torch.randn(3, 3)}
    save_file(other, tmp_path / "other.safetensors")
    report = calibrated(quantize(tmp_path), file=str(tmp_path / "other.safetensors"))
    assert scales(report.output) == {UP: 0.375}


@pytest.mark.parametrize("value", [0, -1.5, 1e-46, 3.5e38, True, None, "0.5", [0.5], {"a": 1}, 10**400])
def test_json_values_that_are_no_scale(value: Any, tmp_path: Path) -> None:
    source, file = quantize(tmp_path), written(tmp_path / "s.json", {UP: 0.5, ODD: value})
    with pytest.raises(UsageError, match=r"not one positive number that float32 holds: odd: "):
        calibrated(source, file=file)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("value", [
    torch.tensor(math.nan), torch.tensor(math.inf), torch.tensor(0.0), torch.tensor(-1.0), torch.ones(2),
    torch.ones((), dtype=torch.int32), torch.ones(0),
])  # fmt: skip
def test_tensors_that_are_no_scale(value: torch.Tensor, tmp_path: Path) -> None:
    save_file({f"{ODD}.input_scale": value, f"{UP}.input_scale": torch.ones(())}, tmp_path / "s.safetensors")
    with pytest.raises(UsageError, match=r"not one positive number that float32 holds: odd: "):
        calibrated(quantize(tmp_path), file=str(tmp_path / "s.safetensors"))


@pytest.mark.parametrize(("text", "words"), [
    ('{"blocks.0.mlp.upp": 1, "embed_tokens.input_scale": 1, "nothing": 2}',
     "2 of 3 scales are for layers that the checkpoint lacks: blocks.0.mlp.upp, nothing; nearest: 'blocks.0.mlp.up'"),
    ('{"odd": 1, "model.diffusion_model.odd": 2}', "gives layers a scale twice: model.diffusion_model.odd"),
    ('{"odd": 1, "odd.input_scale": 2}', "gives layers a scale twice: odd.input_scale"),
    ('{"odd": 1, "odd": 2}', "duplicate key 'odd'"),
    ('{"odd": NaN}', "broken JSON"),
    ('[1]', "must be a JSON object"),
    ('{}', "holds no activation scale"),
    ('{"odd": 1', "broken JSON"),
])  # fmt: skip
def test_files_that_do_not_fit(text: str, words: str, tmp_path: Path) -> None:
    source = quantize(tmp_path)
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(QuantloomError) as refused:
        calibrated(source, file=str(tmp_path / "s.json"))
    assert words in str(refused.value)
    with pytest.raises(QuantloomError) as refused:
        quantize(tmp_path / "again", input_scales=str(tmp_path / "s.json"))
    assert words in str(refused.value)
    assert not list(tmp_path.rglob("out.safetensors*"))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    source = quantize(tmp_path)
    with pytest.raises(UsageError, match="cannot read the activation scales"):
        calibrated(source, file=str(tmp_path / "none.json"))
    with pytest.raises(CheckpointError, match="does not exist"):
        calibrated(source, file=str(tmp_path / "none.safetensors"))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from("ab_."), min_size=1, max_size=6).map("".join))
def test_a_name_means_one_layer_or_none(name: str) -> None:
    """Names are found as they are; with dots as underscores, wherever that leaves no doubt."""
    names = ["a.b", "a_b", "b.a.a", "model.diffusion_model.b.b"]
    found = LayerNames(names).find(name)
    if name in names:
        assert found == name
    elif found is not None:
        bare = found.removeprefix("model.diffusion_model.")
        assert name in (bare, bare.replace(".", "_"))
    assert LayerNames(names).find("lora_unet_b_a_a") == "b.a.a"
    assert LayerNames(["a.b_c", "a_b.c"]).find("a_b_c") is None


# ---- in a conversion ----


def test_numbers_of_layers_win_over_the_general_one(tmp_path: Path, cli: Cli) -> None:
    source = write_file(tmp_path / "in" / "m.safetensors")
    (tmp_path / "rules.json").write_text(json.dumps({"mlp": {"input_scale": 5.0}, "blocks.1.attn": {"format": "int8"}}))
    file = written(tmp_path / "s.json", {UP: 0.25, QKV: 0.75, "blocks.1.attn.qkv": 3, "embed_tokens": 2})
    ran = cli(
        "convert", source, tmp_path / "o.safetensors", "--format", "fp8", "--preset", "none", "--layers",
        tmp_path / "rules.json", "--input-scale", 2, "--input-scales", file,
    )  # fmt: skip
    assert ran.status == 0
    assert scales(tmp_path / "o.safetensors") == {
        QKV: 0.75, UP: 0.25, DOWN: 5.0, "blocks.1.mlp.up": 5.0, "blocks.1.mlp.down": 5.0, ODD: 2.0,
    }  # fmt: skip
    assert "scales of 2 layers are not used" in ran.err
    assert "blocks.1.attn.qkv, embed_tokens" in ran.err.replace("\n", " ")


@settings(max_examples=8, deadline=None)
@given(st.lists(st.floats(2.0**-126, 3e38), min_size=1, max_size=4))
def test_numbers_are_stored_as_float32_has_them(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    folder = tmp_path_factory.mktemp("numbers")
    given_ = dict(zip(WIDTHS, values, strict=False))
    found = scales(quantize(folder, "nvfp4", input_scales=written(folder / "s.json", given_)))
    assert found == {name: float(torch.tensor(value)) for name, value in given_.items()}


def test_recipes_with_files(tmp_path: Path) -> None:
    """They survive JSON; what the file holds decides the digest, not where it lies."""
    source = quantize(tmp_path)
    one, moved = written(tmp_path / "one.json", {UP: 1}), written(tmp_path / "moved.json", {UP: 1.0})
    other = written(tmp_path / "other.json", {UP: 2})

    def flow(file: str) -> Any:
        return Pipeline().read(source).input_scales(file=file).write(tmp_path / "o.safetensors", compute=False)

    assert Recipe.from_json(flow(one).recipe.to_json()) == flow(one).recipe
    assert flow(one).plan.digest == flow(moved).plan.digest != flow(other).plan.digest


# ---- an adapter's directions ----


def adapter(folder: Path, down: torch.Tensor | None = None, key: str = f"diffusion_model.{UP}.lora_down.weight") -> str:
    """A LoRA for one layer, 128 wide unless ``down`` says otherwise."""
    down = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)) if down is None else down
    up = key.replace("down", "up").replace("lora_A", "lora_B").replace("hada_w1_a", "hada_w1_b")
    save_file({key: down, up: torch.ones(256, len(down))}, folder / "lora.safetensors")
    return str(folder / "lora.safetensors")


def test_equal_channels_give_the_percentile_of_a_normal(tmp_path: Path) -> None:
    """All entries +-1: every channel is N(0, rms^2), of which 99.9 % lie within 3.2905 standard deviations."""
    down = torch.ones(3, 128).copysign(torch.randn(3, 128))
    source = quantize(tmp_path)
    report = calibrated(source, lora=adapter(tmp_path, down))
    assert scales(report.output) == {UP: pytest.approx(HEADROOM * 3.290527 / 448, rel=1e-5)}
    assert "suppose how large inputs are" in report.warnings[0]
    report = calibrated(source, lora=adapter(tmp_path, down * 100), lora_rms=5.0, input_scale="p95")
    assert scales(report.output) == {UP: pytest.approx(HEADROOM * 1.959964 * 5 / 448, rel=1e-5)}


def test_the_directions_count(tmp_path: Path) -> None:
    """All energy in one channel of many that are hardly looked at: that channel's inputs are sqrt(n) long."""
    down = torch.full((2, 128), 1e-6)
    down[:, 7] = 1.0
    wide = scales(calibrated(quantize(tmp_path), lora=adapter(tmp_path, down), input_scale="p99.9").output)[UP]
    assert wide > 1.3 * HEADROOM * 3.29 / 448


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(2, 40), st.floats(50, 99.99), st.floats(0.01, 100), st.integers(0, 1000))
def test_laws_of_the_percentile(rank: int, width: int, q: float, rms: float, seed: int) -> None:
    """It does not change with the adapter's strength, nor when its rows are turned or its channels swapped; it grows
    with q, and in proportion to the root mean square."""
    random = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, width, generator=random, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(rank, rank, generator=random, dtype=torch.float64))[0]

    def found(x: torch.Tensor, rms: float = rms, q: float = q) -> float:
        return percentile(x.square().sum(0), rms, q)

    value = found(down)
    for same in (7 * down, turn @ down, down[:, torch.randperm(width, generator=random)]):
        assert found(same) == pytest.approx(value, rel=1e-9)
    assert found(down, rms=2 * rms) == pytest.approx(2 * value, rel=1e-9)
    assert found(down, q=q / 2) < value
    sigma = down.square().sum(0).sqrt()
    sigma *= rms / sigma.square().mean().sqrt()
    assert torch.erf(value / sigma / math.sqrt(2)).mean() == pytest.approx(q / 100, rel=1e-9)


def test_the_percentile_is_that_of_drawn_inputs() -> None:
    random = torch.Generator().manual_seed(3)
    down = torch.randn(8, 96, generator=random) * torch.rand(96, generator=random).pow(2)
    x = torch.randn(100_000, 8, generator=random) @ down
    x *= 2 / x.square().mean().sqrt()
    drawn = float(x.abs().flatten()[:: 7].quantile(0.999))
    assert percentile(down.double().square().sum(0), 2.0, 99.9) == pytest.approx(drawn, rel=0.02)


@pytest.mark.parametrize("key", [
    f"diffusion_model.{UP}.lora_down.weight", f"{UP}.lora_A.weight", f"base_model.model.{UP}.lora_A.weight",
    f"transformer.{UP}.lora.down.weight", f"lora_unet_{UP.replace('.', '_')}.lora_down.weight",
    f"base_model.model.{UP}.lora_A.default.weight", f"{UP}_lora.down.weight",
])  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_adapters_of_every_dialect(key: str, prefix: str, tmp_path: Path) -> None:
    report = calibrated(quantize(tmp_path, prefix=prefix), lora=adapter(tmp_path, key=key))
    assert scales(report.output).keys() == {prefix + UP}


@pytest.mark.parametrize(("down", "key", "words"), [
    (torch.ones(4, 64), f"{UP}.lora_down.weight", "blocks.0.mlp.up: .* has 64 columns, the weight 128"),
    (torch.ones(4, 128), "other.lora_down.weight", "an adapter of other layers: the checkpoint has no other"),
    (torch.ones(4, 128), f"{UP}.hada_w1_a", "holds no down factor"),
    (torch.full((4, 128), math.nan), f"{UP}.lora_down.weight", "holds NaN or Inf"),
    (torch.zeros(4, 128), f"{UP}.lora_down.weight", "none of 7 layers gets an activation scale from lora"),
    (torch.ones(4, 128, dtype=torch.int8), f"{UP}.lora_down.weight", "is I8: the factors of an adapter must be floats"),
])  # fmt: skip
def test_adapters_that_say_nothing(down: torch.Tensor, key: str, words: str, tmp_path: Path) -> None:
    source = quantize(tmp_path)
    with pytest.raises(QuantloomError, match=words):
        calibrated(source, lora=adapter(tmp_path, down, key))


def test_an_adapter_with_two_names_for_a_layer(tmp_path: Path) -> None:
    """Neither is the one that is meant."""
    keys = (f"{UP}.lora_down.weight", f"diffusion_model.{UP}.lora_down.weight")
    save_file({key: torch.full((4, 128), rank + 1.0) for rank, key in enumerate(keys)}, tmp_path / "two.safetensors")
    with pytest.raises(PlanError, match=r"two\.safetensors: names a layer .* twice: "):
        calibrated(quantize(tmp_path), lora=str(tmp_path / "two.safetensors"))


def test_the_best_source_wins(tmp_path: Path, statistics: str) -> None:
    keys = {name: torch.ones(2, WIDTHS.get(name, 128)) for name in (QKV, UP, ODD, "blocks.1.mlp.up")}
    save_file({f"{name}.lora_down.weight": down for name, down in keys.items()}, tmp_path / "l.safetensors")
    file = written(tmp_path / "s.json", {ODD: 42})
    sources = {"lora": str(tmp_path / "l.safetensors"), "statistics": statistics, "file": file}
    report = calibrated(quantize(tmp_path), **sources, input_scale="p99")
    assert dict(report.changed) == {
        "activation scale added: p99 of statistics": 3, "activation scale added: from a file": 1,
        "activation scale added: 16 times p99 of an adapter's directions at RMS 1": 1,
    }  # fmt: skip
    assert scales(report.output)[ODD] == 42
    assert "1 activation scales suppose" in report.warnings[0]


# ---- what means nothing ----


@pytest.mark.parametrize(("options", "words"), [
    ({}, "nothing says how large inputs are"),
    ({"file": "s", "remove": True}, "remove sets no scale: leave file out"),
    ({"remove": True, "only_missing": True}, "leave only_missing out"),
    ({"statistics": "s", "input_scale": "max"}, "must be amax, or a percentile"),
    ({"statistics": "s", "input_scale": "p101"}, "must be amax, or a percentile"),
    ({"file": "s", "input_scale": "amax"}, "is taken of statistics or an adapter"),
    ({"lora": "s", "input_scale": "amax"}, "an adapter's directions have no amax"),
    ({"lora": "s", "input_scale": "p100"}, "an adapter's directions have no p100"),
    ({"lora": "s", "lora_rms": 0.0}, "lora_rms 0.0 must be a positive number"),
    ({"lora": "s", "lora_rms": math.nan}, "lora_rms nan must be a positive number"),
    ({"file": "s", "filter": "("}, "not a regular expression"),
    ({"file": 3}, "file must be a string"),
])  # fmt: skip
def test_options_that_cannot_mean_anything(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Pipeline().input_scales(**options)


@pytest.mark.parametrize(("kind", "options", "words"), [
    ("int8", {}, "no layer takes an activation scale"),
    ("mxfp8", {}, "no layer takes an activation scale"),
    ("fp8", {"filter": "mlpp"}, "matches no FP8 or NVFP4 layer; nearest: "),
    ("fp8", {"remove": True, "file": None}, "nothing to remove"),
])  # fmt: skip
def test_models_that_take_none(kind: str, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    source, file = quantize(tmp_path, kind), written(tmp_path / "s.json", {UP: 1})
    with pytest.raises(QuantloomError, match=words):
        calibrated(source, **{"file": file, **options})
    assert not (tmp_path / "out.safetensors").exists()


def test_nothing_is_missing(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="every layer has an activation scale already"):
        calibrated(quantize(tmp_path, input_scale=1.0), file=written(tmp_path / "s.json", {UP: 1}), only_missing=True)


def test_it_stands_alone(tmp_path: Path) -> None:
    source = write_file(tmp_path / "m.safetensors")
    flow = Pipeline().read(source).quantize("fp8").input_scales(file="s.json")
    with pytest.raises(UsageError, match="stands alone"):
        flow.write(tmp_path / "o.safetensors")


def test_statistics_of_another_model(tmp_path: Path) -> None:
    store = write_statistics(tmp_path / "s.zarr", **{"blocks.9.up": torch.ones(3, 8)})
    with pytest.raises(PlanError, match=r"do not fit the checkpoint: .*blocks\.9\.up"):
        calibrated(quantize(tmp_path), statistics=store)


# ---- the compatible command ----


def convert_to_quant(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        compat.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_actcal_makes_no_scale_of_random_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = quantize(tmp_path)
    assert convert_to_quant("-i", source, "--actcal", "--actcal-samples", 64, "--actcal-seed", 42) == 2
    said = capsys.readouterr().err
    assert "--statistics STORE" in " ".join(said.split())
    assert not (tmp_path / "fp8_calibrated.safetensors").exists()


def test_actcal(tmp_path: Path, statistics: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Statistics of inputs; metadata stays, which the original loses."""
    source = quantize(tmp_path)
    flags: tuple[object, ...] = ("--actcal-samples", 8, "--actcal_device", "cpu")
    assert convert_to_quant("-i", source, "--actcal", "--statistics", statistics, *flags) == 0
    assert "without effect beside --actcal: --actcal-samples, --actcal-device" in capsys.readouterr().err
    made = tmp_path / "fp8_calibrated.safetensors"
    assert scales(made) == scales(calibrated(source, statistics=statistics).output)
    assert contents(made) == contents(source)
    assert "_quantization_metadata" in contents(made)[1]
    flags = ("-o", tmp_path / "p.safetensors", "--actcal-percentile", 99.0)
    assert convert_to_quant("-i", source, "--actcal", "--statistics", statistics, *flags) == 0
    assert scales(tmp_path / "p.safetensors") == scales(
        calibrated(source, statistics=statistics, input_scale="p99").output
    )


def test_actcal_with_an_adapter_or_numbers(tmp_path: Path) -> None:
    source, lora = quantize(tmp_path), adapter(tmp_path)
    file = written(tmp_path / "s.json", {ODD: 6})
    output = tmp_path / "o.safetensors"
    flags = ("--actcal-lora", lora, "--actcal-percentile", 99, "--input-scales", file)
    assert convert_to_quant("-i", source, "-o", output, "--actcal", *flags) == 0
    lone = scales(calibrated(source, lora=lora, input_scale="p99").output)
    assert scales(output) == {**lone, ODD: 6.0}
    assert convert_to_quant("-i", source, "-o", tmp_path / "p", "--actcal", "--actcal-lora", lora,
                            "--actcal-percentile", 100) == 2  # fmt: skip


@pytest.mark.parametrize("format_", ["--nvfp4", "--comfy_quant"])
def test_input_scales_with_a_conversion(format_: str, tmp_path: Path) -> None:
    source, file = write_file(tmp_path / "in" / "m.safetensors"), written(tmp_path / "s.json", {UP: 0.5, ODD: 6})
    output = tmp_path / "o.safetensors"
    assert convert_to_quant("-i", source, "-o", output, format_, "--simple", "--input_scales", file) == 0
    assert scales(output) == {UP: 0.5, ODD: 6.0}


# ---- clients ----


@pytest.mark.parametrize("magnitude", [1e-3, 5e3])
def test_comfy_kitchen_multiplies_better_with_the_right_scale(magnitude: float, tmp_path: Path) -> None:
    """FP8 times FP8 as ComfyUI does it: without a scale it assumes 1.0, which loses small inputs, clips large ones."""
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    x = inputs(128) / 128 * magnitude
    store = write_statistics(tmp_path / "x.zarr", **{UP: x})
    tensors = load_file(calibrated(quantize(tmp_path), statistics=store).output)
    layout = kitchen.get_layout_class("TensorCoreFP8Layout")
    params = layout.Params(scale=tensors[f"{UP}.weight_scale"], orig_dtype=torch.float32, orig_shape=(256, 128))
    weight = kitchen.QuantizedTensor(tensors[f"{UP}.weight"], "TensorCoreFP8Layout", params)
    wanted = F.linear(x, weight.dequantize())

    def error(scale: torch.Tensor) -> float:
        quantized = kitchen.QuantizedTensor.from_float(x, "TensorCoreFP8Layout", scale=scale)
        return float((F.linear(quantized, weight) - wanted).norm() / wanted.norm())

    right, assumed = error(tensors[f"{UP}.input_scale"]), error(torch.tensor(1.0))
    assert right < 0.03
    assert assumed > 2 * right


def test_comfy_kitchen_reads_the_scale_of_nvfp4(tmp_path: Path) -> None:
    """The static scale is what the client finds by itself when it looks at the very same inputs."""
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    x, store = inputs(128), write_statistics(tmp_path / "x.zarr")
    tensors = load_file(calibrated(quantize(tmp_path, "nvfp4"), statistics=store).output)
    own = kitchen.QuantizedTensor.from_float(x, "TensorCoreNVFP4Layout")
    static = kitchen.QuantizedTensor.from_float(x, "TensorCoreNVFP4Layout", scale=tensors[f"{UP}.input_scale"])
    assert float(tensors[f"{UP}.input_scale"]) == pytest.approx(float(own._params.scale), rel=1e-6)
    assert torch.equal(own.dequantize(), static.dequantize())
