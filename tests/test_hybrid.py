"""Hybrid MXFP8: two ways to decode that agree bit for bit, the legacy form and its measured error, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LINEAR, Ran, listing, make_tensors, without_checksums, write_file
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import quantize
from quantized_cases import marker_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import quantloom
from quantloom import Pipeline, Recipe
from quantloom.flow import parts
from quantloom.flow.report import Report
from quantloom.flow.verify import verify
from quantloom.formats.errors import NonFiniteError, PlanError, UsageError
from quantloom.formats.registry import make_format
from quantloom.formats.swizzle import unswizzle

Tensors = dict[str, torch.Tensor]
Cli = Callable[..., Ran]

GOLDEN = Path(__file__).parent / "data" / "golden"
ROUNDINGS: dict[str, dict[str, Any]] = {
    "nearest": {}, "mse": {}, "learned": {}, "gradient": {"rounding_options": {"iterations": 5}},
}  # fmt: skip


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def power(exponent: torch.Tensor) -> torch.Tensor:
    """2**(e - 127), from the definition."""
    return torch.ldexp(torch.ones(exponent.shape), exponent - 127)


def layers_of(tensors: Tensors) -> list[str]:
    return sorted(name.removesuffix(".weight_scalar") for name in tensors if name.endswith(".weight_scalar"))


def by_groups(tensors: Tensors, layer: str) -> torch.Tensor:
    """Every stored code times 2**(e - 127) of its group, as ComfyUI decodes MXFP8: byte 0 is 0.0."""
    codes = tensors[f"{layer}.weight"].float()
    exponents = unswizzle(tensors[f"{layer}.weight_scale"])[: codes.shape[0], : codes.shape[1] // 32].int()
    scales = torch.where(exponents == 0, 0.0, power(exponents))
    return codes * scales.repeat_interleave(32, 1)


def by_scalar(tensors: Tensors, layer: str) -> torch.Tensor:
    return tensors[f"{layer}.weight"].float() * tensors[f"{layer}.weight_scalar"]


def error(made: torch.Tensor, wanted: torch.Tensor) -> float:
    rows, columns = wanted.shape
    return float((made[:rows, :columns].double() - wanted.double()).norm() / wanted.double().norm())


def extremes() -> Tensors:
    """Layers whose one exponent is at its limits, or that have hardly any weights to share it."""
    normal = torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
    single = torch.zeros(40, 72)
    single[37, 70] = -3.5
    return {
        "zero.weight": torch.zeros(33, 50), "single.weight": single, "outlier.weight": torch.cat(
            (normal, torch.full((1, 96), 3e4))),
        "tiny.weight": normal * 1e-37, "subnormal.weight": normal * 1e-40,
        "huge.weight": normal / normal.abs().max() * 2.0**126.9,
        "wide.weight": normal * torch.logspace(-30, 0, 64)[:, None], "one.weight": torch.full((1, 1), 0.3),
        "boundary.weight": torch.full((2, 32), 448.0), "above.weight": torch.full((2, 32), 448.0 + 2.0**-15),
    }  # fmt: skip


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """The same weights as they are, in MXFP8, and in FP8 with a scale per tensor and per row."""
    found = {"source": write_file(tmp_path / "source.safetensors")}
    options: dict[str, dict[str, Any]] = {"mxfp8": {}, "fp8": {}, "rows": {"scaling": "row"}}
    for name, more in options.items():
        found[name] = tmp_path / f"{name}.safetensors"
        Pipeline().read(found["source"]).quantize("fp8" if name == "rows" else name, **more).write(found[name])
    return found


def made_hybrid(source: Path, output: Path, **options: Any) -> tuple[Tensors, Report]:
    report = Pipeline(scheduler="sync").read(source).hybrid(**options).write(output, overwrite=True)
    return load_file(output), report


# The exact form: both decodes are the same number.


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_both_decodes_are_the_same_bits(rounding: str, tmp_path: Path) -> None:
    source = write_file(tmp_path / "in.safetensors", make_tensors() | extremes())
    pipeline = Pipeline().read(source).target(preset="none")
    pipeline = pipeline.quantize("hybrid_mxfp8", rounding=rounding, **ROUNDINGS[rounding])
    pipeline.write(tmp_path / "out.safetensors")
    made = load_file(tmp_path / "out.safetensors")
    assert len(layers_of(made)) == LINEAR + len(extremes())
    for layer in layers_of(made):
        assert same(by_groups(made, layer), by_scalar(made, layer)), layer
        assert made[f"{layer}.weight_scalar"].shape == ()
        assert made[f"{layer}.weight_scalar"].dtype == torch.float32


def test_calibrated_rounding_keeps_it_exact(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 160), torch.nn.GELU(), torch.nn.Linear(160, 64))
    source, store = tmp_path / "in.safetensors", tmp_path / "stats.zarr"
    save_file(model.state_dict(), source)
    batches = [torch.randn(64, 96) * torch.rand(96).exp() for _ in range(4)]
    quantloom.calibrate(model, batches, out=store, checkpoint=source)
    pipeline = Pipeline().read(source).target(preset="none")
    pipeline = pipeline.quantize("hybrid_mxfp8", rounding="calibrated", statistics=str(store))
    report = pipeline.write(tmp_path / "out.safetensors")
    made = load_file(tmp_path / "out.safetensors")
    assert layers_of(made) == ["0", "2"]
    assert all(same(by_groups(made, layer), by_scalar(made, layer)) for layer in layers_of(made))
    for layer in report.layers:
        assert layer.quality is not None
        assert layer.quality.stored.output is not None
        assert layer.quality.nearest.output is not None
        assert layer.quality.stored.output < layer.quality.nearest.output
    assert verify(report.output, str(source)).ok


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999), rows=st.integers(1, 40), columns=st.integers(1, 100), exponent=st.integers(-140, 124),
    spread=st.integers(0, 60),
)  # fmt: skip
def test_one_exponent_whatever_the_weights(seed: int, rows: int, columns: int, exponent: int, spread: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator).clamp_(-4, 4)
    x = torch.ldexp(x, torch.tensor(exponent) - torch.randint(0, spread + 1, (rows, 1), generator=generator))
    quantized = quantize(make_format("hybrid_mxfp8"), x)
    codes, whole = quantized.codes.float(), quantized.whole
    assert whole is not None
    assert len(quantized.scales.stored.unique()) == 1
    groups = power(quantized.scales.stored.int()).repeat_interleave(32, 1)
    assert same(codes * groups, codes * whole)
    assert codes.abs().max() <= 448
    if x.abs().max() > 448 * 2.0**-126:
        assert codes.abs().max() >= 216  # a smaller exponent would not hold the largest weight (224, rounded down)


def test_bytes_of_the_shared_exponent(tmp_path: Path) -> None:
    """448 fits exponent 0, the next number needs 1; groups of zeros have it too, tile padding has none."""
    source = write_file(tmp_path / "in.safetensors", extremes())
    Pipeline().read(source).target(preset="none").quantize("hybrid_mxfp8").write(tmp_path / "out.safetensors")
    made = load_file(tmp_path / "out.safetensors")
    bytes_of = {layer: set(made[f"{layer}.weight_scale"].unique().tolist()) for layer in layers_of(made)}
    assert bytes_of["boundary"] == {0, 127}
    assert bytes_of["above"] == {0, 128}
    assert bytes_of["zero"] == {0, 127}
    assert float(made["zero.weight_scalar"]) == 1.0
    assert bytes_of["subnormal"] == {0, 1}
    assert float(made["subnormal.weight_scalar"]) == 2.0**-126
    assert bytes_of["huge"] == {0, 246}
    single = unswizzle(made["single.weight_scale"])
    assert (single[:40, :3] == 120).all()
    assert not single[40:].any()
    assert not single[:, 3:].any()
    assert marker_of(made, "single") == {
        "format": "hybrid_mxfp8", "group_size": 32, "orig_dtype": "torch.float32", "orig_shape": [40, 72]
    }  # fmt: skip


def test_error_is_about_that_of_tensor_scaled_fp8(tmp_path: Path) -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    source = write_file(tmp_path / "in.safetensors", {"layer.weight": weight})
    errors = {}
    for name in ("hybrid_mxfp8", "fp8"):
        output = tmp_path / f"{name}.safetensors"
        Pipeline().read(source).quantize(name, rounding="nearest").write(output)
        errors[name] = verify(str(output), str(source)).worst[0].error
    assert errors["hybrid_mxfp8"] == pytest.approx(0.0265, rel=0.02)
    assert errors["hybrid_mxfp8"] == pytest.approx(errors["fp8"], rel=0.03)


def test_comfy_kitchen_decodes_what_the_scalar_decodes(models: dict[str, Path], tmp_path: Path) -> None:
    """Its MXFP8 layout, of the codes and scales in the file, against codes times the scalar."""
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    originals = load_file(models["source"])
    exact = tmp_path / "exact.safetensors"
    Pipeline().read(models["source"]).quantize("hybrid_mxfp8").write(exact)
    for made in (load_file(exact), made_hybrid(models["mxfp8"], tmp_path / "again.safetensors")[0]):
        for layer in layers_of(made):
            shape = tuple(originals[f"{layer}.weight"].shape)
            scale = made[f"{layer}.weight_scale"].view(torch.float8_e8m0fnu)
            layout = "TensorCoreMXFP8Layout"
            params = kitchen.get_layout_class(layout).Params(scale=scale, orig_dtype=torch.float32, orig_shape=shape)
            decoded = kitchen.QuantizedTensor(made[f"{layer}.weight"], layout, params).dequantize()
            assert same(decoded, by_scalar(made, layer)[: shape[0], : shape[1]]), layer
            assert error(decoded, originals[f"{layer}.weight"].float()) < 0.03


# The stage, exact: models that are MXFP8 already.


def test_an_mxfp8_model_made_exact(models: dict[str, Path], tmp_path: Path) -> None:
    before = load_file(models["mxfp8"])
    made, report = made_hybrid(models["mxfp8"], tmp_path / "out.safetensors")
    assert len(report.layers) == LINEAR == len(layers_of(made))
    for layer in report.layers:
        decoded = by_groups(made, layer.name)
        assert same(decoded, by_scalar(made, layer.name))
        assert marker_of(made, layer.name) == {**marker_of(before, layer.name), "format": "hybrid_mxfp8"}
        added = error(decoded, by_groups(before, layer.name))
        assert layer.error == pytest.approx(added, abs=1e-3)  # sampled rows
        assert added < 2e-3  # a shift of exponents costs only weights that become subnormal codes
    assert all(same(made[name], before[name]) for name in before if name.rpartition(".")[0] not in layers_of(made))
    against = verify(report.output, str(models["source"]))
    assert against.ok
    assert all(check.scalar_error == 0.0 for check in against.layers if check.format)
    with safe_open(report.output, "pt") as file:
        header = json.loads(file.metadata()["_quantization_metadata"])
        stages = json.loads(file.metadata()["quantloom"])["recipe"]["stages"]
    assert {entry["format"] for entry in header["layers"].values()} == {"hybrid_mxfp8"}
    assert [stage["stage"] for stage in stages][-2:] == ["quantize", "hybrid"]
    again, _ = made_hybrid(tmp_path / "out.safetensors", tmp_path / "again.safetensors")
    assert all(same(again[name], made[name]) for name in made)


def test_row_ranges_write_the_same_bytes(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_hybrid(models["mxfp8"], tmp_path / "whole.safetensors")
    monkeypatch.setattr(parts, "PART_BYTES", 10_000)
    flow = Pipeline().read(models["mxfp8"]).hybrid().write(tmp_path / "parts.safetensors", compute=False)
    assert any(len(layer.parts) > 1 for layer in flow.plan.layers)
    flow.compute()
    parted, whole = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("parts", "whole"))
    assert without_checksums(parted) == without_checksums(whole)


def test_legacy_files_become_exact(models: dict[str, Path], tmp_path: Path) -> None:
    """A hybrid file whose scalars are wrong is repaired, to what the MXFP8 model gives."""
    made_hybrid(models["mxfp8"], tmp_path / "legacy.safetensors", mode="legacy")
    repaired, _ = made_hybrid(tmp_path / "legacy.safetensors", tmp_path / "repaired.safetensors")
    direct, _ = made_hybrid(models["mxfp8"], tmp_path / "direct.safetensors")
    assert all(same(repaired[name], direct[name]) for name in direct)


def with_companions(model: Path, path: Path) -> tuple[Path, Tensors]:
    """The model with an activation scale, a flag, a nested marker and no header."""
    tensors = load_file(model)
    entry = {**marker_of(tensors, "odd"), "full_precision_matrix_mult": True}
    tensors["odd.comfy_quant"] = torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)
    tensors["odd.input_scale"] = torch.tensor(0.25, dtype=torch.bfloat16)
    save_file(tensors, path)
    return path, tensors


@pytest.mark.parametrize("mode", ["exact", "legacy"])
def test_what_stands_beside_a_weight_stays(mode: str, models: dict[str, Path], tmp_path: Path) -> None:
    source, before = with_companions(models["mxfp8"], tmp_path / "more.safetensors")
    made, _ = made_hybrid(source, tmp_path / "out.safetensors", mode=mode)
    assert same(made["odd.input_scale"], before["odd.input_scale"])
    assert marker_of(made, "odd") == {**marker_of(before, "odd"), "format": "hybrid_mxfp8"}
    assert set(made) == set(before) | {f"{layer}.weight_scalar" for layer in layers_of(made)}


# The legacy form: the reference's bytes, and how wrong they are.


def golden_mxfp8(path: Path) -> Tensors:
    """The MXFP8 model that the reference made its hybrid file of; returns that file."""
    golden = load_file(GOLDEN / "expected_hybrid_mxfp8.safetensors")
    source = {name: stored for name, stored in golden.items() if not name.endswith(".weight_scalar")}
    for layer in layers_of(golden):
        said = {**marker_of(golden, layer), "format": "mxfp8"}
        source[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    save_file(source, path)
    return golden


def test_legacy_is_the_reference_byte_for_byte(tmp_path: Path) -> None:
    golden = golden_mxfp8(tmp_path / "in.safetensors")
    ours = load_file(GOLDEN / "expected_mxfp8_unifiedpath_fp32.safetensors")
    for layer in layers_of(golden):
        if "bf16" in layer:  # of these the reference's two MXFP8 paths make the same
            assert same(golden[f"{layer}.weight"], ours[f"{layer}.weight"])
            assert same(golden[f"{layer}.weight_scale"], ours[f"{layer}.weight_scale"])
    made, _ = made_hybrid(tmp_path / "in.safetensors", tmp_path / "out.safetensors", mode="legacy")
    assert set(made) == set(golden)
    assert all(same(made[name], golden[name]) for name in golden)


def test_the_error_of_the_scalar_is_measured_and_said(tmp_path: Path) -> None:
    """The scalar of the reference is wrong by design; mode exact decodes right both ways."""
    golden = golden_mxfp8(tmp_path / "in.safetensors")
    made, report = made_hybrid(tmp_path / "in.safetensors", tmp_path / "out.safetensors", mode="legacy")
    wrong = report.scalar_errors
    assert wrong["a_bf16_64x128"] == pytest.approx(0.55, abs=0.01)
    assert wrong["f_bf16_outliers_128x256"] == pytest.approx(19.6, abs=0.1)
    assert wrong["g_fp32_zero_64x64"] == wrong["d_fp32_1x32"] == 0.0
    assert list(wrong) == sorted(wrong, key=lambda name: -wrong[name])
    squares = [0.0, 0.0]
    for layer in layers_of(golden):
        groups, scalar = (decode(made, layer).double().nan_to_num(0) for decode in (by_groups, by_scalar))
        distance, norm = float((groups - scalar).norm()), float(groups.norm())
        assert wrong[layer] == pytest.approx(distance / norm if norm else 0.0, rel=1e-5), layer
        squares = [squares[0] + distance**2, squares[1] + norm**2]
    total = (squares[0] / squares[1]) ** 0.5
    (text,) = report.found
    assert f"relative error {total:.3g} over the model" in text
    assert "10 layers" in text
    assert "f_bf16_outliers_128x256 19.6" in text
    assert text in report.summary()
    assert report.to_dict()["warnings"][-1] == text
    assert report.to_dict()["scalar_errors"] == dict(wrong)
    with pytest.raises(NonFiniteError, match="3 of 8192 weights are NaN"):
        Pipeline().read(tmp_path / "in.safetensors").hybrid().write(tmp_path / "exact.safetensors")
    assert not (tmp_path / "exact.safetensors").exists()
    sound = {name: x for name, x in load_file(tmp_path / "in.safetensors").items() if "subnormal" not in name}
    save_file(sound, tmp_path / "sound.safetensors")
    exact, report = made_hybrid(tmp_path / "sound.safetensors", tmp_path / "exact.safetensors")
    assert report.found == ()
    assert all(same(by_groups(exact, layer), by_scalar(exact, layer)) for layer in layers_of(exact))
    usual = [layer for layer in layers_of(golden) if layer[0] in "abdef"]
    assert all(error(by_scalar(exact, layer), by_groups(golden, layer)) < 0.005 for layer in usual)


def test_scalars_from_an_fp8_model(models: dict[str, Path], tmp_path: Path) -> None:
    scales, before = load_file(models["fp8"]), load_file(models["mxfp8"])
    made, report = made_hybrid(models["mxfp8"], tmp_path / "out.safetensors", tensor_scales=str(models["fp8"]))
    for layer in layers_of(made):
        assert same(made[f"{layer}.weight_scalar"], scales[f"{layer}.weight_scale"])
        assert all(same(made[f"{layer}.{part}"], before[f"{layer}.{part}"]) for part in ("weight", "weight_scale"))
    assert any("mode legacy" in note for note in report.notes)
    assert len(report.found) == 1
    rows = load_file(models["rows"])
    made, _ = made_hybrid(models["mxfp8"], tmp_path / "out.safetensors", tensor_scales=str(models["rows"]))
    for layer in layers_of(made):
        assert same(made[f"{layer}.weight_scalar"], rows[f"{layer}.weight_scale"].max())
        assert made[f"{layer}.weight_scalar"].shape == ()


def test_where_scales_lie_does_not_matter(models: dict[str, Path], tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "other.safetensors"
    moved.parent.mkdir()
    moved.write_bytes(models["fp8"].read_bytes())
    for path, output in ((models["fp8"], "a"), (moved, "b"), (models["rows"], "c")):
        made_hybrid(models["mxfp8"], tmp_path / f"{output}.safetensors", tensor_scales=str(path))
    first, second, third = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "abc")
    assert first == second != third


# Hybrid files as inputs, and their verification.


def test_hybrid_layers_survive_as_inputs(models: dict[str, Path], tmp_path: Path) -> None:
    legacy, _ = made_hybrid(models["mxfp8"], tmp_path / "legacy.safetensors", mode="legacy")
    source = Pipeline().read(tmp_path / "legacy.safetensors")
    source.target(exclude="attn").quantize("fp8").write(tmp_path / "mixed.safetensors")
    mixed = load_file(tmp_path / "mixed.safetensors")
    kept = [layer for layer in layers_of(legacy) if "attn" in layer]
    assert layers_of(mixed) == kept
    for layer in kept:
        for part in ("weight", "weight_scale", "weight_scalar", "comfy_quant"):
            assert same(mixed[f"{layer}.{part}"], legacy[f"{layer}.{part}"])
    checked = verify(str(tmp_path / "mixed.safetensors"), str(tmp_path / "legacy.safetensors"))
    assert checked.ok
    source.dequantize(dtype="f32").write(tmp_path / "plain.safetensors")
    plain = load_file(tmp_path / "plain.safetensors")
    assert not layers_of(plain)
    for layer in layers_of(legacy):
        shape = plain[f"{layer}.weight"].shape
        assert same(plain[f"{layer}.weight"], by_groups(legacy, layer)[: shape[0], : shape[1]])


def test_verification_of_scalars(models: dict[str, Path], tmp_path: Path, cli: Cli) -> None:
    made_hybrid(models["mxfp8"], tmp_path / "legacy.safetensors", mode="legacy")
    said = cli("verify", tmp_path / "legacy.safetensors", "--against", models["source"])
    assert said.status == 0
    assert "warning: decoded by .weight_scalar, the weights of 7 layers are wrong" in said.out
    exact = tmp_path / "exact.safetensors"
    Pipeline().read(models["source"]).quantize("hybrid_mxfp8").write(exact)
    tensors = load_file(exact)
    broken = {
        "other": torch.tensor(float(tensors["odd.weight_scalar"]) * 2), "nan": torch.tensor(torch.nan),
        "none": None,
    }  # fmt: skip
    for name, scalar in broken.items():
        others = {key: value for key, value in tensors.items() if key != "odd.weight_scalar"}
        save_file(others | ({} if scalar is None else {"odd.weight_scalar": scalar}), tmp_path / f"{name}.safetensors")
        found = verify(str(tmp_path / f"{name}.safetensors"), str(models["source"]))
        assert len(found.problems) == 1, name
        assert "odd: " in found.problems[0]
        assert ".weight_scalar" in found.problems[0]
    wrong = {**tensors, "odd.weight_scalar": torch.ones(3)}
    save_file(wrong, tmp_path / "shape.safetensors")
    (problem,) = verify(str(tmp_path / "shape.safetensors"), str(models["source"])).problems
    assert ".weight_scalar has shape [3]" in problem


# Doors, and bad input.


def test_command_and_pipeline_make_the_same_file(models: dict[str, Path], tmp_path: Path, cli: Cli) -> None:
    for number, (arguments, options) in enumerate((
        ((), {}), (("--mode", "legacy"), {"mode": "legacy"}),
        (("--tensor-scales", models["fp8"]), {"tensor_scales": str(models["fp8"])}),
    )):  # fmt: skip
        output = tmp_path / f"{number}.safetensors"
        done = cli("hybrid", models["mxfp8"], output, *arguments)
        assert done.status == 0
        assert "warning: mode legacy" in done.err or not arguments
        made_hybrid(models["mxfp8"], tmp_path / "dsl.safetensors", **options)
        assert output.read_bytes() == (tmp_path / "dsl.safetensors").read_bytes()
    pipeline = Pipeline().read(models["mxfp8"]).hybrid(mode="legacy")
    assert Recipe.from_json(pipeline.to_json()) == pipeline.recipe
    dry = cli("hybrid", models["mxfp8"], tmp_path / "dry.safetensors", "--mode", "legacy", "--dry-run")
    assert dry.status == 0
    assert "legacy" in dry.out
    assert not (tmp_path / "dry.safetensors").exists()


def without(model: Path, path: Path, *dropped: str, **changed: torch.Tensor | None) -> Path:
    """The model without the layers that are named, and with tensors of ``odd`` replaced (None: left out)."""
    tensors = {name: x for name, x in load_file(model).items() if name.rpartition(".")[0] not in dropped}
    for part, x in changed.items():
        tensors.pop(f"odd.{part}", None)
        if x is not None:
            tensors[f"odd.{part}"] = x
    save_file(tensors, path)
    return path


def refused(cli: Cli, folder: Path, arguments: tuple[object, ...], status: int = 1) -> str:
    before = listing(folder)
    done = cli("hybrid", *arguments)
    assert done.status == status, done.err
    assert done.out == ""
    assert listing(folder) == before
    lines = [line for line in done.err.splitlines() if line.startswith(("error: ", "usage: "))]
    assert len(lines) == 1, done.err
    return lines[0]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"weight_scale": torch.zeros(128, 8, dtype=torch.uint8)}, ["[128, 8]", "[128, 4]"]),
        ({"weight_scale": torch.zeros(128, 4)}, ["F32", "U8"]),
        ({"weight_scale": None}, ["without .weight_scale"]),
        ({"weight": torch.zeros(128, 96, dtype=torch.int8)}, ["I8", "F8_E4M3"]),
        ({"weight": torch.zeros(100, 72, dtype=torch.float8_e4m3fn)}, ["not padded"]),
    ],
)  # fmt: skip
def test_mxfp8_layers_that_are_broken(
    changed: dict[str, torch.Tensor | None], words: list[str], models: dict[str, Path], tmp_path: Path, cli: Cli
) -> None:
    source = without(models["mxfp8"], tmp_path / "broken.safetensors", **changed)
    for mode in ("exact", "legacy"):
        message = refused(cli, tmp_path, (source, tmp_path / "out.safetensors", "--mode", mode))
        assert "broken.safetensors: 1 MXFP8 layers cannot be decoded: odd" in message
        assert all(word in message for word in words)


def test_models_that_are_not_mxfp8(models: dict[str, Path], tmp_path: Path, cli: Cli) -> None:
    for name in ("source", "fp8"):
        message = refused(cli, tmp_path, (models[name], tmp_path / "out.safetensors"))
        assert f"{name}.safetensors: no layer is MXFP8" in message
        assert "--format hybrid_mxfp8" in message


def test_scales_that_do_not_fit(models: dict[str, Path], tmp_path: Path, cli: Cli) -> None:
    bad = {
        "lacking": without(models["fp8"], tmp_path / "lacking.safetensors", "odd"),
        "zero": without(models["fp8"], tmp_path / "zero.safetensors", weight_scale=torch.tensor(0.0)),
        "kept": tmp_path / "kept.safetensors", "int8": tmp_path / "int8.safetensors",
        "shape": tmp_path / "shape.safetensors",
    }  # fmt: skip
    source = Pipeline().read(models["source"])
    source.target(exclude="odd").quantize("fp8").write(bad["kept"])
    source.quantize("int8", scaling="tensor").write(bad["int8"])
    other = write_file(tmp_path / "other.safetensors", make_tensors() | {"odd.weight": torch.ones(96, 72)})
    Pipeline().read(other).quantize("fp8").write(bad["shape"])
    words = {
        "lacking": "1 of 7 layers: odd (missing)", "kept": "odd (F32)",
        "shape": "odd (of shape [96, 72] there, [100, 72] here)",
        "zero": "odd.weight_scale: a scale of 0.0", "int8": "holds no tensor scales",
    }  # fmt: skip
    for name, path in bad.items():
        message = refused(cli, tmp_path, (models["mxfp8"], tmp_path / "out.safetensors", "--tensor-scales", path))
        assert str(path) in message
        assert words[name] in message
    for path in (models["source"], models["mxfp8"]):
        message = refused(cli, tmp_path, (models["mxfp8"], tmp_path / "out.safetensors", "--tensor-scales", path))
        assert "holds no tensor scales" in message
    refused(cli, tmp_path, (models["mxfp8"], tmp_path / "out.safetensors", "--tensor-scales", tmp_path / "absent"))


def test_usage(models: dict[str, Path], tmp_path: Path, cli: Cli) -> None:
    paths = models["mxfp8"], tmp_path / "out.safetensors"
    scales = ("--tensor-scales", models["fp8"])
    assert "mode legacy" in refused(cli, tmp_path, (*paths, "--mode", "exact", *scales), status=2)
    assert "did you mean 'legacy'" in refused(cli, tmp_path, (*paths, "--mode", "legcy"), status=2)
    with pytest.raises(UsageError, match="mode must be a string"):
        Pipeline().hybrid(mode=1)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="hybrid stands alone"):
        Pipeline().read(paths[0]).quantize("fp8").hybrid().write(paths[1])


def test_what_legacy_cannot_copy(models: dict[str, Path], tmp_path: Path, cli: Cli) -> None:
    """Scales row by row, as compressed-tensors has them, have no place in ComfyUI's file; NaN scales make no scalar."""
    codes = torch.randn(64, 96).to(torch.float8_e4m3fn)
    exponents = torch.randint(100, 130, (64, 3), dtype=torch.uint8)
    source = tmp_path / "row-major.safetensors"
    save_file({"layer.weight": codes, "layer.weight_scale": exponents}, source)
    message = refused(cli, tmp_path, (source, tmp_path / "out.safetensors", "--mode", "legacy"))
    assert "layer" in message
    assert "mode exact" in message
    made, _ = made_hybrid(source, tmp_path / "exact.safetensors")
    decoded = codes.float() * power(exponents.int()).repeat_interleave(32, 1)
    assert same(by_groups(made, "layer"), by_scalar(made, "layer"))
    assert error(by_scalar(made, "layer"), decoded) < 0.02
    (tmp_path / "exact.safetensors").unlink()
    scales = load_file(models["mxfp8"])["odd.weight_scale"]
    scales[0, 0] = 255
    nan = without(models["mxfp8"], tmp_path / "nan.safetensors", weight_scale=scales)
    assert "255" in refused(cli, tmp_path, (nan, tmp_path / "out.safetensors", "--mode", "legacy"))
    assert "NaN or Inf" in refused(cli, tmp_path, (nan, tmp_path / "out.safetensors"))
    with pytest.raises(PlanError, match="hold"):
        Pipeline().read(models["mxfp8"]).hybrid(tensor_scales=str(source)).write(tmp_path / "out.safetensors")
