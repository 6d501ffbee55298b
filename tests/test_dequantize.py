"""Plain weights out of every format and dialect that is read: exact, complete, and never Inf in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Ran
from quantized_cases import CASES, LAYER, Case, decode, layer_of, nvfp4, same_bytes, save
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantloom import Pipeline
from quantloom.flow import parts
from quantloom.flow.report import Report
from quantloom.flow.verify import verify
from quantloom.formats.errors import NonFiniteError, PlanError, UsageError
from quantloom.stages.work import Environment

Cli = Callable[..., Ran]
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
PLAIN = {
    "blocks.1.lin.weight": torch.randn(32, 64, dtype=torch.bfloat16), "blocks.0.lin.bias": torch.randn(130),
    "ids": torch.arange(3),
}  # fmt: skip


def dequantize(source: Path, output: Path, dtype: str = "bf16", **options: Any) -> Report:
    return Pipeline(scheduler="sync").read(source).dequantize(dtype, **options).write(output)


def without_bias(case: Case) -> dict[str, torch.Tensor]:
    """What else is in the file; a bias says how many rows a padded weight has."""
    rows = case.weight.shape[0]
    return {name: tensor for name, tensor in PLAIN.items() if name != f"{LAYER}.bias" or tensor.shape[0] == rows}


@pytest.mark.parametrize("name", CASES)
def test_every_format_and_dialect_becomes_the_weights_that_it_means(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    others = without_bias(case)
    source = save(tmp_path / "in", case.stored() | others, case.config).parent
    decoded = decode(layer_of(source), [(0, case.weight.shape[0])])
    for number, (dtype, made) in enumerate(DTYPES.items()):
        output = tmp_path / str(number)
        report = dequantize(source, output, dtype)
        tensors = load_file(output / "model.safetensors")
        assert set(tensors) == {f"{LAYER}.weight", *others}  # no marker, no scale
        assert same_bytes(tensors[f"{LAYER}.weight"], decoded.to(made))
        if not case.tolerance:
            assert same_bytes(tensors[f"{LAYER}.weight"], torch.from_numpy(case.weight).to(made))
        assert all(same_bytes(tensors[key], tensor) for key, tensor in others.items())
        assert sum(report.changed.values()) == 1
        assert not report.layers
        with safe_open(output / "model.safetensors", "pt") as file:
            assert set(file.metadata()) == {"quantloom", "quantloom.checksums"}
        checked = verify(str(output), str(source))
        assert checked.ok
        assert [(layer.name, layer.format) for layer in checked.changed("decoded")] == [(LAYER, "")]
        assert checked.changed("decoded")[0].error < 2.0**-8
    if case.config is not None:
        config = json.loads((tmp_path / "0" / "config.json").read_text())
        assert config == {key: value for key, value in case.config.items() if key != "quantization_config"}


def test_shards_row_ranges_and_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large layers run as row ranges; the weight and its scale may lie in different files."""
    case, folder = CASES["deepseek blocks"](), tmp_path / "in"
    folder.mkdir()
    stored = {f"blocks.{number}.lin{part}": tensor for number in range(3) for part, tensor in case.tensors.items()}
    for number, (name, tensor) in enumerate(stored.items()):
        save_file({name: tensor}, folder / f"model-{number + 1:05d}-of-{len(stored):05d}.safetensors")
    (folder / "config.json").write_text(json.dumps(case.config))
    monkeypatch.setattr(parts, "PART_BYTES", 10_000)
    flow = Pipeline(workers=2).read(folder).dequantize("f32")
    plan = flow.write(tmp_path / "out", shard_size=200_000, compute=False).plan
    assert all(len(layer.parts) == 2 for layer in plan.layers)
    assert verify_all(flow.write(tmp_path / "out", shard_size=200_000).output, folder)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
    for path in (tmp_path / "out").glob("*.safetensors"):
        for tensor in load_file(path).values():
            assert same_bytes(tensor, torch.from_numpy(case.weight))


def verify_all(output: str, source: Path) -> bool:
    checked = verify(output, str(source))
    return checked.ok and len(checked.changed("decoded")) == 3 and not checked.missing


def test_memory_is_planned_in_chunks_whatever_the_weight(tmp_path: Path) -> None:
    codes = torch.zeros(4096, 4096).to(torch.float8_e4m3fn)
    source = save(tmp_path / "in", {f"{LAYER}.weight": codes, f"{LAYER}.weight_scale": torch.ones(())})
    plan = Pipeline().read(source).dequantize("f32").write(tmp_path / "out.safetensors", compute=False).plan
    environment = Environment(chunk_bytes=1 << 20)
    assert plan.layers[0].peak_bytes(environment) < 32 * environment.chunk_bytes < plan.layers[0].nbytes_out


# ---- what no dtype holds ----


def test_a_weight_beyond_f16_is_refused_and_fits_bf16(tmp_path: Path) -> None:
    tensors = {f"{LAYER}.weight": torch.tensor([[1.0, -448.0, 2.0]]).to(torch.float8_e4m3fn)}
    tensors |= {f"{LAYER}.weight_scale": torch.tensor(200.0)}
    source = save(tmp_path / "in", tensors)
    with pytest.raises(NonFiniteError) as refused:
        dequantize(source, tmp_path / "out.safetensors", "f16")
    assert f"{LAYER}.weight: number 1 is -89600, but the largest that float16 holds is 65504" in str(refused.value)
    assert list(tmp_path.glob("out*")) == []
    dequantize(source, tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")[f"{LAYER}.weight"][0, 1] == torch.tensor(-89600.0).bfloat16()


@pytest.mark.parametrize("broken", ["code", "scale"])
def test_codes_and_scales_that_are_no_numbers_are_refused_or_kept(broken: str, tmp_path: Path) -> None:
    codes = torch.zeros(40, 8)
    codes[33, 5] = float("nan") if broken == "code" else 1.0
    tensors = {f"{LAYER}.weight": codes.to(torch.float8_e4m3fn)}
    tensors[f"{LAYER}.weight_scale"] = torch.ones(40)
    if broken == "scale":
        tensors[f"{LAYER}.weight_scale"][33] = float("inf")
    source = save(tmp_path / "in", tensors)
    where = r"\[33, 5\]" if broken == "code" else r"\[33, 0\]"  # Inf times a zero
    with pytest.raises(NonFiniteError, match=rf"weight {where} decodes to NaN or Inf.*--nonfinite keep"):
        dequantize(source, tmp_path / "out.safetensors")
    dequantize(source, tmp_path / "out.safetensors", nonfinite="keep")
    made = load_file(tmp_path / "out.safetensors")[f"{LAYER}.weight"]
    assert not made[33, 5].isfinite()
    assert made[:33].isfinite().all()


# ---- what is refused, and what is left out ----


def test_layers_that_cannot_be_decoded_are_listed(tmp_path: Path) -> None:
    tensors = {f"{name}{part}": tensor for name in "ab" for part, tensor in nvfp4((32, 64)).tensors.items()}
    source = save(tmp_path / "in", tensors | CASES["comfy fp8"]().stored())
    with pytest.raises(PlanError) as refused:
        dequantize(source, tmp_path / "out.safetensors")
    assert "2 layers cannot be decoded: a: " in str(refused.value)
    assert "; b: " in str(refused.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_nothing_quantized_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no layer is quantized"):
        dequantize(save(tmp_path / "in", PLAIN), tmp_path / "out.safetensors")


def test_leftover_scales_are_left_out(tmp_path: Path) -> None:
    extra = {"gone.weight_scale": torch.ones(()), "blocks.1.lin.input_scale": torch.ones(())}
    source = save(tmp_path / "in", CASES["legacy fp8"]().stored() | PLAIN | extra)
    report = dequantize(source, tmp_path / "out.safetensors")
    assert set(load_file(tmp_path / "out.safetensors")) == {f"{LAYER}.weight", *PLAIN}
    assert any("gone.weight_scale" in note for note in report.notes)
    assert verify(str(tmp_path / "out.safetensors"), str(source)).ok


@pytest.mark.parametrize("options", [{"dtype": "fp16"}, {"nonfinite": "kep"}])
def test_options_that_cannot_mean_anything(options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="did you mean"):
        Pipeline().dequantize(**options)


def test_it_stands_alone(tmp_path: Path) -> None:
    flow = Pipeline().read(tmp_path).quantize("fp8").dequantize().write(tmp_path / "out.safetensors", compute=False)
    with pytest.raises(UsageError, match="dequantize stands alone: leave quantize out"):
        _ = flow.plan


# ---- commands and clients ----


def test_the_command_and_what_verify_says(cli: Cli, tmp_path: Path) -> None:
    source = save(tmp_path / "in", CASES["comfy mxfp8"]().stored() | PLAIN)
    output = tmp_path / "out.safetensors"
    done = cli("dequantize", source, output, "--dtype", "f16")
    assert done.status == 0
    assert "1 layer: decoded from comfy mxfp8 to F16" in done.out
    checked = cli("verify", output, "--against", source)
    assert checked.status == 0
    assert "sound; 1 layer decoded (relative error at most 3e-11), 3 tensors kept as they were" in checked.out
    tensors = load_file(output)
    tensors[f"{LAYER}.weight"][7, 7] += 1
    save_file(tensors, output)
    assert cli("verify", output, "--against", source).status == 1


def test_transformers_computes_the_same_logits(tmp_path: Path) -> None:
    """A tiny Llama as compressed-tensors stores FP8 of channels: the library's own decoding, and the plain weights."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    model, folder = transformers.LlamaForCausalLM(config), tmp_path / "quantized"
    model.save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "proj" not in name:
            tensors[name] = tensor
            continue
        scale = tensor.abs().amax(1, keepdim=True) / 448
        tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
        tensors[name + "_scale"] = scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    declared = json.loads((folder / "config.json").read_text())
    declared["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(declared))
    dequantize(folder, tmp_path / "plain", "f32")
    tokens = torch.tensor([[1, 5, 9, 33, 2]])
    logits = []
    for path in (folder, tmp_path / "plain"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(loaded(tokens).logits)
    assert np.isfinite(logits[0].numpy()).all()
    assert torch.allclose(*logits, rtol=0, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(model.eval()(tokens).logits, logits[0], atol=1e-5)  # it was quantized
