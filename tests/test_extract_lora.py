"""Adapters for models that are quantized already, by anyone; and whether an adapter belongs to a model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FORMATS, Ran, listing, make_tensors, write_file
from numerics import one_thread  # noqa: F401  (an autouse fixture)
from quantized_cases import CASES, LAYER, save
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_lora import adapter_of
from test_rounding import store  # noqa: F401  (a fixture)

from quantloom import Pipeline
from quantloom.flow import budget
from quantloom.flow.report import Report
from quantloom.flow.verify import verify
from quantloom.formats.errors import CheckpointError, NonFiniteError, PlanError, QuantloomError, UsageError
from quantloom.formats.source import open_source
from quantloom.stages.origin import Origin

RANK_8: dict[str, Any] = {"rank": 8, "target": "."}


def extract(original: Path, quantized: Path, adapter: Path, lora: dict[str, Any] = RANK_8, **options: Any) -> Report:
    statistics = options.pop("statistics", None)
    pipeline = Pipeline(**options).read(original).quantized_as(str(quantized), statistics=statistics)
    return pipeline.lora(**lora).write(adapter)


@pytest.fixture
def quantized(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint in NVFP4."""
    output = tmp_path / "nvfp4" / "tiny.safetensors"
    Pipeline().read(checkpoint).target(preset="none").quantize("nvfp4").write(output)
    return output


# -- the same adapter by both doors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_the_file_is_that_of_a_conversion(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    """Byte for byte, the digest of the model among them: there is one mechanism."""
    model = tmp_path / "out.safetensors"
    report = Pipeline().read(checkpoint).target(preset="none").quantize(**FORMATS[kind]).lora(**RANK_8).write(model)
    again = extract(checkpoint, model, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out_lora.safetensors").read_bytes()
    gains = [{layer.name: layer.gain for layer in made.layers} for made in (report, again)]
    assert gains[0] == gains[1]
    assert all(layer.format == other.format for layer, other in zip(report.layers, again.layers, strict=True))


@pytest.mark.parametrize("lora", [RANK_8, {"rank": "auto", "budget": "4%"}, {"method": "svd", **RANK_8}], ids=str)
def test_with_statistics(lora: dict[str, Any], checkpoint: Path, store: Path, tmp_path: Path) -> None:  # noqa: F811
    model = tmp_path / "out.safetensors"
    pipeline = Pipeline().read(checkpoint).target(preset="none").quantize("nvfp4", statistics=str(store))
    pipeline.lora(**lora).write(model)
    report = extract(checkpoint, model, tmp_path / "again.safetensors", lora, statistics=str(store))
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out_lora.safetensors").read_bytes()
    assert all(layer.gain is not None and layer.gain.after.output is not None for layer in report.layers)


def test_chunks_workers_and_schedulers_change_no_byte(
    checkpoint: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = set()
    runs: list[dict[str, Any]] = [{"workers": 1}, {"workers": 3}, {"scheduler": "sync"}]
    for number, run in enumerate(runs):
        monkeypatch.setattr(budget, "CPU_CHUNK_BYTES", 1 << (12 + 4 * number))
        adapter = tmp_path / f"{number}.safetensors"
        extract(checkpoint, quantized, adapter, **run)
        found.add(adapter.read_bytes())
    assert len(found) == 1


def test_shards_and_folders(sharded: Path, tmp_path: Path) -> None:
    """Nothing of a model is written into the folder of an adapter."""
    Pipeline().read(sharded).target(preset="none").quantize("fp8").write(tmp_path / "model", shard_size="200kB")
    extract(sharded, tmp_path / "model", tmp_path / "adapter", {**RANK_8, "dialect": "peft"})
    names = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    again = [tmp_path / "model", tmp_path / "adapter"]
    assert verify(str(again[0]), str(sharded), adapter=str(again[1])).ok
    pipeline = Pipeline().read(sharded).quantized_as(str(again[0])).lora(**{**RANK_8, "rank": 4, "dialect": "peft"})
    with pytest.raises(PlanError, match="exists already"):
        pipeline.write(again[1])
    pipeline.write(again[1], overwrite=True)
    assert json.loads((again[1] / "adapter_config.json").read_text())["r"] == 4
    assert sorted(path.name for path in again[1].iterdir()) == names


# -- models of other programs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_dialect_that_is_read(name: str, tmp_path: Path) -> None:
    """An error of rank 3 on top of what the codes mean is found to the last bits."""
    case = CASES[name]()
    model = save(tmp_path / "model", {**case.stored(), "norm.weight": torch.ones(4)}, case.config)
    weight = torch.from_numpy(case.weight)
    rows, columns = weight.shape
    random = torch.Generator().manual_seed(0)
    part = torch.randn(rows, 3, generator=random) @ torch.randn(3, columns, generator=random)
    error = part * 0.05 * weight.norm() / part.norm()
    original = write_file(tmp_path / "original.safetensors", {f"{LAYER}.weight": weight + error,
                                                              "norm.weight": torch.ones(4)})  # fmt: skip
    report = extract(original, model, tmp_path / "lora.safetensors", {"rank": 3, "target": "."})
    found, about = adapter_of(tmp_path / "lora.safetensors")
    up, down = found[LAYER]
    assert float((up @ down - error).norm() / error.norm()) < 1e-5
    assert about["base"] == Origin.of(open_source(model)).digest
    assert report.layers[0].gain is not None
    assert report.layers[0].gain.before.weight == pytest.approx(float(error.norm() / (weight + error).norm()), rel=1e-4)


def test_an_original_that_is_quantized_itself(checkpoint: Path, tmp_path: Path) -> None:
    """FP8 beside NVFP4 made of it."""
    first, second = tmp_path / "fp8.safetensors", tmp_path / "nvfp4.safetensors"
    Pipeline().read(checkpoint).target(preset="none").quantize("fp8", scaling="row").write(first)
    Pipeline().read(first).target(preset="none").quantize("nvfp4").lora(**RANK_8).write(second)
    extract(first, second, tmp_path / "lora.safetensors")
    assert (tmp_path / "lora.safetensors").read_bytes() == (tmp_path / "nvfp4_lora.safetensors").read_bytes()


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_the_command(cli: Callable[..., Ran], checkpoint: Path, quantized: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "lora.safetensors"
    options = ["--target", ".", "--rank", 8, "--dtype", "BF16", "--method", "svd", "--workers", 1]
    before = listing(tmp_path)
    planned = cli("extract-lora", checkpoint, quantized, adapter, *options, "--dry-run")
    assert planned.status == 0
    assert "rank 8, 8.2 kB" in planned.out
    assert "7 layers at rank 8" in planned.out
    assert f"base     {quantized}  (7 layers nvfp4)" in planned.out
    plan = json.loads(cli("extract-lora", checkpoint, quantized, adapter, *options, "--dry-run", "--json").out)
    assert plan["quantized"] == str(quantized)
    assert plan["files"] == []
    assert plan["adapter"]["layers"] == dict.fromkeys((layer["name"] for layer in plan["layers"]), 8)
    assert listing(tmp_path) == before
    ran = cli("extract-lora", checkpoint, quantized, adapter, *options)
    assert ran.status == 0, ran.err
    assert f"for 7 layers of {quantized}" in ran.out
    assert "ComfyUI merges a LoRA" in ran.out
    assert plan["adapter"]["bytes"] == adapter.stat().st_size
    assert {x.dtype for key, x in load_file(adapter).items() if "lora" in key} == {torch.bfloat16}
    command = ran.out.partition("check it: quantloom ")[2].split("\n")[0].split()
    checked = cli(*command)
    assert checked.status == 0
    assert " -> " in checked.out
    report = json.loads(cli("extract-lora", checkpoint, quantized, adapter, *options, "--overwrite", "--json").out)
    assert report["bytes_out"] == adapter.stat().st_size
    assert report["quantized"] == str(quantized)


def test_recipes(cli: Callable[..., Ran], checkpoint: Path, quantized: Path, tmp_path: Path) -> None:
    pipeline = Pipeline().read(checkpoint).quantized_as(str(quantized)).lora(rank=4, target="mlp")
    assert Pipeline.from_recipe(pipeline.to_json()) == pipeline
    flow = pipeline.write(tmp_path / "a.safetensors", compute=False)
    assert [step.name for step in flow.plan.layers[0].steps] == ["decode", "adapter", "write"]
    assert flow.visualize(tmp_path / "graph.svg").read_text().count("decode") == 1
    (tmp_path / "recipe.json").write_text(pipeline.to_json())
    ran = cli("extract-lora", checkpoint, quantized, tmp_path / "b.safetensors", "--recipe", tmp_path / "recipe.json")
    assert ran.status == 0, ran.err
    flow.compute()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_memory_is_bounded_and_declared(checkpoint: Path, quantized: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(memory="100MB").read(checkpoint).quantized_as(str(quantized)).lora(**RANK_8)
    with pytest.raises(PlanError, match="raise --memory"):
        pipeline.write(tmp_path / "a.safetensors")
    layers = pipeline.write(tmp_path / "a.safetensors", compute=False).plan.layers
    environment = budget.make_budget(layers, Pipeline().recipe.run, "").environment
    for layer in layers:
        rows, columns = layer.layer.weight.shape
        assert layer.peak_bytes(environment) > 4 * rows * columns


# -- bad input ---------------------------------------------------------------------------------------------------------


BAD: dict[str, tuple[dict[str, Any], type[QuantloomError], str]] = {
    "svdquant": ({"method": "svdquant"}, UsageError, "before it quantizes.*--lora-method svdquant"),
    "weighted without statistics": ({"method": "weighted"}, UsageError, "quantloom calibrate"),
    "rank 0": ({"rank": 0}, UsageError, "rank 0"),
    "rank above the dimensions": ({"rank": 73, "target": "odd"}, UsageError, "73.*odd"),
    "target without a match": ({"target": "nothing"}, UsageError, "matches no layer"),
    "target of kept layers": ({"target": "norm"}, PlanError, "does not match 'norm'"),
    "budget 0": ({"budget": 0}, UsageError, "budget of 0"),
    "a path of its own": ({"output": "x.safetensors"}, UsageError, "with .write"),
    "nothing gained": ({"rank": "auto", "target": r"mlp\.down"}, PlanError, "too little on every layer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case: str, checkpoint: Path, quantized: Path, tmp_path: Path) -> None:
    lora, kind, words = BAD[case]
    before = listing(tmp_path)
    with pytest.raises(kind, match=words):
        extract(checkpoint, quantized, tmp_path / "lora.safetensors", lora)
    assert listing(tmp_path) == before


def test_models_that_do_not_fit(checkpoint: Path, quantized: Path, tmp_path: Path) -> None:
    tensors = make_tensors()
    other = write_file(tmp_path / "other.safetensors", {f"x.{name}": tensor for name, tensor in tensors.items()})
    narrow = write_file(tmp_path / "narrow.safetensors", {**tensors, "odd.weight": torch.ones(100, 64)})
    numbers = torch.ones(100, 72, dtype=torch.int32)
    table = write_file(tmp_path / "table.safetensors", {**tensors, "odd.weight": numbers})
    adapter = tmp_path / "lora.safetensors"
    before = listing(tmp_path)
    for original, model, words in (
        (checkpoint, checkpoint, "original and the quantized model at once"),
        (checkpoint, other, "holds no quantized layer"),
        (other, quantized, "7 of 7 quantized layers are not in the original: blocks"),
        (narrow, quantized, r"odd has shape \[100, 72\], the original \[100, 64\]"),
        (checkpoint, tmp_path / "gone.safetensors", "does not exist"),
    ):
        with pytest.raises(QuantloomError, match=words):
            extract(original, model, adapter)
    with pytest.raises(UsageError, match="drop quantize"):
        Pipeline().read(checkpoint).quantize("fp8").quantized_as(str(quantized)).lora(rank=4).write(adapter)
    with pytest.raises(UsageError, match=r"make an adapter.*\.lora"):
        Pipeline().read(checkpoint).quantized_as(str(quantized)).write(adapter)
    for place in (checkpoint, quantized):
        with pytest.raises(PlanError, match="would replace"):
            extract(checkpoint, quantized, place)
    assert listing(tmp_path) == before
    report = extract(table, quantized, adapter)
    assert any("odd: the original is stored as I32" in warning for warning in report.warnings)
    assert "odd" not in {layer.name for layer in report.layers}


def test_layers_that_cannot_be_decoded_or_are_corrected(checkpoint: Path, store: Path, tmp_path: Path) -> None:  # noqa: F811
    model = tmp_path / "model.safetensors"
    pipeline = Pipeline().read(checkpoint).target(preset="none")
    pipeline.quantize("nvfp4", statistics=str(store), bias_correction=True).write(model)
    report = extract(checkpoint, model, tmp_path / "lora.safetensors")
    assert any("2 quantized layers: blocks.0.attn.qkv: its bias was corrected" in text for text in report.warnings)
    others = {f"blocks.{block}.mlp.{side}" for block in (0, 1) for side in ("up", "down")}
    assert {layer.name for layer in report.layers} == {"odd", *others}
    tensors = load_file(model)
    broken = {name: x for name, x in tensors.items() if name.startswith("odd") and not name.endswith("weight_scale_2")}
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(PlanError, match=r"no layer can have an adapter, the first is odd: .*cannot be decoded"):
        extract(checkpoint, tmp_path / "broken.safetensors", tmp_path / "x.safetensors")


def test_weights_that_are_not_finite(checkpoint: Path, quantized: Path, tmp_path: Path) -> None:
    tensors = make_tensors()
    tensors["blocks.1.mlp.down.weight"][5, 7] = float("nan")
    spoiled = write_file(tmp_path / "spoiled.safetensors", tensors)
    before = listing(tmp_path)
    for rank in (8, "auto"):
        with pytest.raises(NonFiniteError, match=r"blocks\.1\.mlp\.down.*\[5, 7\]"):
            extract(spoiled, quantized, tmp_path / "lora.safetensors", {"rank": rank, "target": "."})
    assert listing(tmp_path) == before


# -- an adapter and the model it was made for --------------------------------------------------------------------------


def test_verify_measures_with_the_adapter(checkpoint: Path, store: Path, tmp_path: Path) -> None:  # noqa: F811
    model, adapter = tmp_path / "out.safetensors", tmp_path / "out_lora.safetensors"
    pipeline = Pipeline().read(checkpoint).target(preset="none").quantize("nvfp4", statistics=str(store))
    report = pipeline.lora(rank=8).write(model)
    checked = verify(str(model), str(checkpoint), statistics=str(store), adapter=str(adapter))
    assert checked.ok, checked.problems
    found = {layer.name: layer.gain for layer in checked.layers if layer.gain}
    told = {layer.name: layer.gain for layer in report.layers if layer.gain}
    assert found.keys() == told.keys()
    for name, gain in found.items():
        for mine, other in ((gain.before, told[name].before), (gain.after, told[name].after)):  # type: ignore[union-attr]
            assert (mine.weight, mine.output) == pytest.approx((other.weight, other.output), rel=1e-4)
    assert checked.to_dict()["layers"]


@pytest.mark.parametrize("dialect", ["comfy", "peft", "peft-ranks", "diffusers"])
def test_an_adapter_of_another_model(dialect: str, checkpoint: Path, quantized: Path, tmp_path: Path) -> None:
    adapter = tmp_path / ("lora" if dialect.startswith("peft") else "lora.safetensors")
    extract(checkpoint, quantized, adapter, {**RANK_8, "dialect": dialect})
    assert verify(str(quantized), str(checkpoint), adapter=str(adapter)).ok
    other = tmp_path / "other.safetensors"
    Pipeline().read(checkpoint).target(preset="none").quantize("nvfp4", rounding="nearest").write(other)
    with pytest.raises(PlanError, match=r"belongs to the model [0-9a-f]{16}\.\.\., but .*other.*extract-lora"):
        verify(str(other), str(checkpoint), adapter=str(adapter))


def test_a_model_of_another_program_is_known_by_its_headers(checkpoint: Path, quantized: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    tensors = load_file(quantized)
    save_file(tensors, first)
    save_file({**tensors, "more": torch.ones(1)}, second)
    extract(checkpoint, first, tmp_path / "lora.safetensors")
    assert verify(str(first), str(checkpoint), adapter=str(tmp_path / "lora.safetensors")).ok
    for other in (second, quantized):
        with pytest.raises(PlanError, match="belongs to the model"):
            verify(str(other), str(checkpoint), adapter=str(tmp_path / "lora.safetensors"))


def test_an_adapter_of_another_finetune_with_equal_headers(tmp_path: Path) -> None:
    """Headers cannot tell such models apart: what the adapter tells of its errors does."""
    models = []
    for seed in (1, 5):  # one entry of metadata: safetensors orders several at random
        source = write_file(tmp_path / f"{seed}.safetensors", make_tensors(seed=seed), format="pt")
        models.append((source, tmp_path / f"quantized{seed}.safetensors"))
        Pipeline().read(source).target(preset="none").quantize("nvfp4").write(models[-1][1])
    extract(*models[0], tmp_path / "lora.safetensors", {"rank": 1, "target": "."})
    tuned, model = models[1]
    checked = verify(str(model), str(tuned), adapter=str(tmp_path / "lora.safetensors"))
    assert not checked.ok
    assert len(checked.problems) == 7
    assert "it was made for other weights" in checked.problems[0]


def test_svdquant_is_checked_with_its_adapter_only(cli: Callable[..., Ran], checkpoint: Path, tmp_path: Path) -> None:
    model, adapter = tmp_path / "out.safetensors", tmp_path / "out_lora.safetensors"
    pipeline = Pipeline().read(checkpoint).target(preset="none").quantize("nvfp4")
    report = pipeline.lora(rank=8, target=".", method="svdquant").write(model)
    with pytest.raises(PlanError, match=r"7 layers of it mean nothing without their adapter.*--adapter"):
        verify(str(model), str(checkpoint))
    assert report.verify_command.endswith(f"--adapter {adapter}")
    assert verify(str(model), str(checkpoint), adapter=str(adapter)).ok
    tensors = load_file(adapter)
    with safe_open(adapter, "pt") as file:
        metadata = file.metadata()
    tensors["diffusion_model.odd.lora_up.weight"].neg_()
    save_file(tensors, adapter, metadata)
    ran = cli("verify", model, "--against", checkpoint, "--adapter", adapter)
    assert ran.status == 1
    assert "broken: odd" in ran.out


def test_files_that_are_no_adapter(checkpoint: Path, quantized: Path, tmp_path: Path) -> None:
    adapter, changed = tmp_path / "lora.safetensors", tmp_path / "changed.safetensors"
    extract(checkpoint, quantized, adapter)
    tensors = load_file(adapter)
    with safe_open(adapter, "pt") as file:
        metadata = file.metadata()
    up, down, alpha = (f"diffusion_model.odd.{part}" for part in ("lora_up.weight", "lora_down.weight", "alpha"))
    about = json.loads(metadata["quantloom_adapter"])

    def saying(**values: Any) -> dict[str, str]:
        return {**metadata, "quantloom_adapter": json.dumps({**about, **values})}

    layers = about["layers"]
    for parts, header, kind, words in (
        (tensors, {}, CheckpointError, "no adapter of quantloom"),
        (tensors, saying(layers=[1]), CheckpointError, "no adapter of quantloom"),
        (tensors, saying(dialect="other"), CheckpointError, "unknown dialect 'other'"),
        (tensors, saying(layers={**layers, "gone": layers["odd"]}), PlanError, "lacks layers of the adapter: gone"),
        (tensors, saying(layers={"odd": {"rank": math.inf}}), CheckpointError, "no adapter of quantloom"),
        (tensors, saying(layers={"odd": layers["odd"] | {"rank": -1}}), CheckpointError, r"odd \(rank -1, weight"),
        (tensors, saying(layers={"conv": layers["odd"]}), CheckpointError, r"conv \(rank 8, weight"),
        ({key: x for key, x in tensors.items() if key != down}, metadata, CheckpointError, "lora_down.* is missing"),
        ({**tensors, down: torch.ones(8, 70)}, metadata, CheckpointError, "no adapter of rank 8.*100x72"),
        ({**tensors, up: tensors[up].to(torch.int8)}, metadata, CheckpointError, "I8"),
        ({**tensors, alpha: torch.tensor(4.0)}, metadata, CheckpointError, "alpha is 4.0, not the rank 8"),
    ):  # fmt: skip
        save_file(parts, changed, header)
        with pytest.raises(kind, match=words):
            verify(str(quantized), str(checkpoint), adapter=str(changed))
    with pytest.raises(CheckpointError, match="does not exist"):
        verify(str(quantized), str(checkpoint), adapter=str(tmp_path / "none.safetensors"))


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("kind", ["fp8 block", "int8 rotated", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("method", ["svd", "weighted", "svdquant"])
def test_a_gpu_brings_as_much(kind: str, method: str, checkpoint: Path, store: Path, tmp_path: Path) -> None:  # noqa: F811
    """By both doors: errors as on a CPU, to what float32 products differ by."""
    lora, found = {**RANK_8, "method": method}, []
    for device in ("cpu", "cuda"):
        model = tmp_path / f"{device}.safetensors"
        pipeline = Pipeline(device=device).read(checkpoint).target(preset="none")
        reports = [pipeline.quantize(**FORMATS[kind], statistics=str(store)).lora(**lora).write(model)]
        if method != "svdquant":
            again = tmp_path / f"{device}-again.safetensors"
            reports.append(extract(checkpoint, model, again, lora, device=device, statistics=str(store)))
        assert verify(str(model), str(checkpoint), adapter=str(tmp_path / f"{device}_lora.safetensors")).ok
        found += [[layer.gain.after.output for layer in report.layers if layer.gain] for report in reports]
    assert len({len(values) for values in found}) == 1
    assert len(found[0]) >= 5
    for values in found[1:]:
        assert values == pytest.approx(found[0], rel=0.05 if method == "svdquant" else 1e-3)
