"""Adapters for what quantization took: who gets one, what it holds, what it costs, and what is refused."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FORMATS, Ran, listing, make_tensors, without_checksums, write_file
from numerics import one_thread  # noqa: F401  (an autouse fixture)
from safetensors import safe_open
from safetensors.torch import load_file
from test_rounding import decoded, store  # noqa: F401  (a fixture)

from quantloom import Pipeline
from quantloom.flow import budget
from quantloom.flow.adapter import ENTRY
from quantloom.flow.report import Report
from quantloom.flow.survey import automatic_rank
from quantloom.formats.errors import NonFiniteError, PlanError, QuantloomError, UsageError
from quantloom.stages.adapter_targeting import AdapterTarget, block_index, why_not
from quantloom.stages.energies import Energies
from quantloom.stages.low_rank import Weighting, low_rank
from quantloom.stages.statistics import Statistics

SQUARE = (128, 128)
EVERY = "."


def noise(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def moments_of(columns: int) -> torch.Tensor:
    """Second moments whose eigenvalues fall."""
    x = noise(3 * columns, columns, 1) * torch.arange(1, columns + 1) ** -0.8 @ noise(columns, columns, 2)
    return x.T @ x / len(x)


def convert(source: Path, output: Path, lora: dict[str, Any], **options: Any) -> Report:
    run = {name: options.pop(name) for name in ("workers", "scheduler") if name in options}
    pipeline = Pipeline(**run).read(source).target(preset="none").quantize(**{"format": "nvfp4", **options})
    return pipeline.lora(**lora).write(output)


def adapter_of(path: Path) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, Any]]:
    """(up, down) by layer of a ComfyUI adapter whose scale is 1, and its header entry."""
    tensors = load_file(path)
    found = {}
    for key in tensors:
        if key.endswith(".lora_up.weight"):
            base = key.removesuffix(".lora_up.weight")
            up, down = tensors[key], tensors[f"{base}.lora_down.weight"]
            assert float(tensors[f"{base}.alpha"]) == up.shape[1] == down.shape[0]
            found[base.removeprefix("diffusion_model.")] = up, down
    assert len(tensors) == 3 * len(found)
    with safe_open(path, "pt") as file:
        return found, json.loads(file.metadata()[ENTRY])


# -- who gets one ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("blocks.3.attn.q", 3), ("layers.12.mlp", 12), ("double_blocks.0.img_attn.qkv", 0), ("single_blocks.7.lin", 7),
        ("transformer_blocks.4.ff.net.0.proj", 4), ("single_transformer_blocks.5.proj_mlp", 5),
        ("encoder.layer.2.attention.self.query", 2), ("model.layers.9.self_attn.q_proj", 9),
        ("model.diffusion_model.double_blocks.1.x", 1), ("transformer.resblocks.6.mlp.c_fc", 6),
        ("down_blocks.1.attentions.0.transformer_blocks.3.attn1.to_q", 1), ("context_refiner.1.w", 1), ("h.2.mlp", 2),
        ("time_embed.0", None), ("final_layer.adaLN_modulation.1", None), ("img_in", None), ("blocks.x.y", None),
    ],
)  # fmt: skip
def test_block_indices_of_real_names(name: str, index: int | None) -> None:
    assert block_index(name) == index


@pytest.mark.parametrize(
    ("name", "shape", "options", "chosen"),
    [
        # a pattern alone decides
        ("final.linear", (64, 6400), {"pattern": "final"}, True),
        ("blocks.9.attn.q", SQUARE, {"pattern": r"attn\.q$"}, True),
        ("blocks.0.attn.q", SQUARE, {"pattern": r"attn\.q\.weight$"}, True),
        ("blocks.0.attn.q", SQUARE, {"pattern": "mlp", "ar_threshold": 99.0}, False),
        # block and depth
        ("img_in", SQUARE, {}, False),
        ("blocks.0.mlp.fc", SQUARE, {}, True),
        ("blocks.1.attn.q", SQUARE, {}, False),
        ("blocks.1.attn.q", SQUARE, {"depth": 2}, True),
        ("blocks.0.attn.q", SQUARE, {"depth": 0}, False),
        # an aspect ratio that is given
        ("blocks.0.mlp.fc", (128, 640), {"ar_threshold": 5.5}, True),
        ("blocks.0.mlp.fc", (128, 640), {"ar_threshold": 5.0}, False),
        ("blocks.0.attn.q", SQUARE, {"ar_threshold": 1.0}, False),
        ("blocks.1.mlp.fc", SQUARE, {"ar_threshold": 5.0}, False),
        # aspect ratios by rule: below 3, above 4, between
        ("blocks.1.mlp.fc", (383, 128), {"depth": 2}, True),
        ("blocks.1.mlp.fc", (384, 128), {"depth": 2}, False),
        ("blocks.1.mlp.fc", (128, 512), {"depth": 2}, False),
        ("blocks.0.mlp.fc", (128, 512), {"depth": 2}, True),
        ("blocks.0.mlp.fc", (128, 513), {"depth": 2}, False),
        ("blocks.0.attn.q", (513, 128), {"depth": 2}, False),
        ("blocks.1.attn.qkv", (384, 128), {"depth": 2}, True),
        ("blocks.1.self_attention.key", (128, 384), {"depth": 2}, True),
        ("blocks.1.mixer.to_q", (128, 384), {"depth": 2}, True),
        ("blocks.1.mlp.down_proj", (128, 384), {"depth": 2}, True),
    ],
)  # fmt: skip
def test_decision_table(name: str, shape: tuple[int, int], options: dict[str, Any], chosen: bool) -> None:
    reason = why_not(name, shape, AdapterTarget(**options))
    assert (reason is None) == chosen
    assert reason is None or reason


def test_layers_are_chosen_by_the_table(checkpoint: Path, tmp_path: Path) -> None:
    report = convert(checkpoint, tmp_path / "out.safetensors", {"rank": 4})
    chosen = {layer.name for layer in report.layers if layer.gain}
    assert chosen == {"blocks.0.attn.qkv", "blocks.0.mlp.up", "blocks.0.mlp.down"}
    found, about = adapter_of(tmp_path / "out_lora.safetensors")
    assert found.keys() == about["layers"].keys() == chosen


# -- low rank ----------------------------------------------------------------------------------------------------------

SHAPES = [(96, 160), (160, 96), (700, 600), (520, 1040), (50, 33)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [None, "whole", "diagonal"])
def test_an_error_of_the_rank_is_recovered(shape: tuple[int, int], weighted: str | None) -> None:
    rank = 24
    error = noise(shape[0], rank) @ noise(rank, shape[1], 1)
    hessian = moments_of(shape[1])
    weighting = {None: None, "whole": Weighting(hessian), "diagonal": Weighting(hessian.diagonal())}[weighted]
    up, down, _ = low_rank(error, rank, 3, weighting)
    assert up.shape == (shape[0], rank)
    assert down.shape == (rank, shape[1])
    assert float((up @ down - error).norm() / error.norm()) < 2e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_white_noise_is_met_as_well_as_the_exact_decomposition_does(shape: tuple[int, int], weighted: bool) -> None:
    error, rank = noise(*shape), 16
    damped = moments_of(shape[1])
    weighting = Weighting(damped.clone()) if weighted else None
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    root = torch.linalg.cholesky(damped.double()) if weighted else torch.eye(shape[1], dtype=torch.float64)
    exact = torch.linalg.svdvals(error.double() @ root)
    up, down, values = low_rank(error, rank, 3, weighting)
    left = (error - up @ down).double() @ root
    assert float(left.norm()) <= 1.006 * float(exact[rank:].norm())
    assert len(values) >= rank
    assert torch.all(values[:rank] <= exact[:rank] * (1 + 1e-5))
    assert torch.all(values[:rank] >= exact[:rank] * 0.95)


def test_seeds_decide_and_nothing_else() -> None:
    error = noise(600, 700)
    first, again, other = (low_rank(error, 8, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("shape", [(40, 50), (600, 700)], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e15])
def test_errors_of_any_size(shape: tuple[int, int], size: float) -> None:
    error = noise(shape[0], 4) @ noise(4, shape[1], 1) * size
    up, down, _ = low_rank(error, 4, 0)
    assert up.isfinite().all()
    assert down.isfinite().all()
    assert float((up @ down - error).abs().max()) <= 1e-4 * max(size, 1e-30)


def test_weighting_makes_outputs_better_and_weights_worse() -> None:
    error, hessian = noise(200, 300), moments_of(300)

    def errors(weighting: Weighting | None) -> tuple[float, float]:
        up, down, _ = low_rank(error, 12, 0, weighting)
        left = error - up @ down
        return float(left.norm()), float((left @ hessian * left).sum())

    plain, weighted = errors(None), errors(Weighting(hessian))
    assert weighted[1] < 0.8 * plain[1]
    assert plain[0] < weighted[0]


@pytest.mark.parametrize("columns", [96, 1100])
@pytest.mark.parametrize("known", ["whole", "diagonal"])
def test_energies_are_sums_over_rows_however_they_come(columns: int, known: str) -> None:
    """More rows and columns than are summed at a time, in any portions: the same bits."""
    x, hessian = noise(300, columns), moments_of(columns)
    given, matrix = (hessian, hessian) if known == "whole" else (hessian.diagonal(), hessian.diagonal().diag())
    found = []
    for step in (300, 256, 7):
        energies = Energies(columns, given, torch.device("cpu"))
        for start in range(0, len(x), step):
            energies.add(x[start : start + step])
        found.append(energies.total())
    assert found[0] == found[1] == found[2]
    double = x.double()
    assert found[0][0] == pytest.approx(float(double.square().sum()), rel=1e-12)
    assert found[0][1] == pytest.approx(float((double @ matrix.double() * double).sum()), rel=1e-6)


# -- what is written ---------------------------------------------------------------------------------------------------


def check_gains(report: Report, source: Path, output: Path, statistics: Path | None = None) -> None:
    """What header and report say is what the files hold, and the adapter is the best one of its rank."""
    original, made = decoded(source), decoded(output)
    assert report.adapter is not None
    found, about = adapter_of(Path(report.adapter.path))
    with safe_open(output, "pt") as file:
        assert about["base"] == json.loads(file.metadata()["quantloom"])["plan"]
    gains = {layer.name: layer.gain for layer in report.layers if layer.gain}
    assert found.keys() == gains.keys() == about["layers"].keys()
    for name, (up, down) in found.items():
        assert up.is_contiguous() and down.is_contiguous() and up.device.type == "cpu"  # noqa: PT018
        weight, error = original[name].double(), (original[name] - made[name]).double()
        left = error - up.double() @ down.double()
        gain, said = gains[name], about["layers"][name]
        assert gain.before.weight == pytest.approx(float(error.norm() / weight.norm()), rel=1e-4)
        assert gain.after.weight == pytest.approx(float(left.norm() / weight.norm()), rel=1e-4)
        assert said["error"] == pytest.approx([gain.before.weight, gain.after.weight], rel=1e-5)
        root = torch.eye(weight.shape[1], dtype=torch.float64)
        if statistics is None:
            assert said["output_error"] == [None, None]
        else:
            hessian = Statistics.open(statistics).moments(name).hessian.double()
            measured = [math.sqrt(float((x @ hessian * x).sum() / (weight @ hessian * weight).sum()))
                        for x in (error, left)]  # fmt: skip
            assert said["output_error"] == pytest.approx(measured, rel=1e-4)
            if about["method"] != "svd":
                hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
                root = torch.linalg.cholesky(hessian)
        best = torch.linalg.svdvals(error @ root)[gain.rank :].norm()
        assert float((left @ root).norm()) <= 1.006 * float(best) + 1e-9


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    """Odd, padded and rotated layers too: the adapter is of the original basis and shape."""
    output = tmp_path / "out.safetensors"
    report = convert(checkpoint, output, {"rank": 8, "target": EVERY}, **FORMATS[kind])
    assert sum(layer.gain is not None for layer in report.layers) == len(report.layers) >= 6
    check_gains(report, checkpoint, output)
    for layer in report.layers:
        assert layer.gain is not None
        assert layer.gain.after.weight < layer.gain.before.weight


@pytest.mark.parametrize("rounding", ["mse", "nearest", "learned", "calibrated"])
@pytest.mark.parametrize("method", ["auto", "svd", "svdquant"])
def test_every_rounding_with_statistics(
    rounding: str, method: str, checkpoint: Path, store: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    output = tmp_path / "out.safetensors"
    lora = {"rank": 8, "target": EVERY, "method": method}
    report = convert(checkpoint, output, lora, rounding=rounding, statistics=str(store))
    check_gains(report, checkpoint, output, store)
    assert all(layer.gain.after.output < layer.gain.before.output for layer in report.layers)  # type: ignore[union-attr, operator]


def test_rotated_layers_with_statistics(checkpoint: Path, store: Path, tmp_path: Path) -> None:  # noqa: F811
    output = tmp_path / "out.safetensors"
    options = {"format": "int8", "rotate": "hadamard:16", "statistics": str(store)}
    for number, rounding in enumerate(("mse", "calibrated")):
        output = tmp_path / f"{number}.safetensors"
        report = convert(checkpoint, output, {"rank": 8, "target": EVERY}, rounding=rounding, **options)
        assert any("rotated" in layer.format for layer in report.layers)
        check_gains(report, checkpoint, output, store)


def output_error(report: Report) -> float:
    """Mean logarithm of the layers' output errors with the adapter."""
    return sum(math.log(layer.gain.after.output) for layer in report.layers if layer.gain) / len(report.layers)  # type: ignore[arg-type]


def test_methods_are_ordered_as_promised(checkpoint: Path, store: Path, tmp_path: Path) -> None:  # noqa: F811
    """Output errors: weighted below svd, and with the low-rank part taken out first below that."""
    found = {}
    for method in ("svd", "weighted", "svdquant"):
        lora = {"rank": 16, "target": EVERY, "method": method}
        found[method] = output_error(
            convert(checkpoint, tmp_path / f"{method}.safetensors", lora, statistics=str(store))
        )
    assert found["svdquant"] < found["weighted"] < found["svd"]


def test_svdquant_says_that_the_base_needs_its_adapter(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    report = convert(checkpoint, output, {"rank": 16, "target": "attn", "method": "svdquant"})
    assert any("wrong without its adapter" in warning for warning in report.warnings)
    with safe_open(output, "pt") as file:
        assert json.loads(file.metadata()["quantloom"])["needs_adapter"] == 2
    check_gains(report, checkpoint, output)
    plain = convert(checkpoint, tmp_path / "plain.safetensors", {"rank": 16, "target": "attn", "method": "svd"})
    for layer, other in zip(report.layers, plain.layers, strict=True):
        if layer.gain and other.gain:
            assert layer.gain.before.weight > 2 * other.gain.before.weight
            assert layer.gain.after.weight < other.gain.after.weight


DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: str, checkpoint: Path, tmp_path: Path) -> None:
    """Factors share out their magnitude: half precision costs next to nothing."""
    report = convert(checkpoint, tmp_path / "out.safetensors", {"rank": 8, "target": EVERY, "dtype": dtype})
    found, about = adapter_of(tmp_path / "out_lora.safetensors")
    assert all(part.dtype == DTYPES[dtype] for pair in found.values() for part in pair)
    exact = convert(checkpoint, tmp_path / "exact.safetensors", {"rank": 8, "target": EVERY})
    for layer, other in zip(report.layers, exact.layers, strict=True):
        assert layer.gain.after.weight <= 1.001 * other.gain.after.weight  # type: ignore[union-attr]
    assert about["version"]


def test_an_adapter_that_its_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = write_file(tmp_path / "in.safetensors", {"blocks.0.weight": noise(128, 128) * 1e14})
    with pytest.raises(NonFiniteError, match=r"blocks\.0.*F16.*BF16"):
        convert(source, tmp_path / "out.safetensors", {"rank": 4, "dtype": "F16"})
    assert list(listing(tmp_path)) == ["in.safetensors"]


@pytest.mark.parametrize("dialect", ["peft", "peft-ranks", "diffusers"])
def test_other_dialects_hold_the_same_numbers(dialect: str, checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "a.safetensors", {"rank": 8, "target": "attn"})
    found, _ = adapter_of(tmp_path / "a_lora.safetensors")
    report = convert(checkpoint, tmp_path / "b.safetensors", {"rank": 8, "target": "attn", "dialect": dialect})
    assert report.adapter is not None
    tensors = load_file(report.adapter.shard.path)
    assert len(tensors) == 2 * len(found)
    for name, (up, down) in found.items():
        key = next(key for key in tensors if name in key).rpartition(".lora_")[0]
        assert torch.equal(tensors[f"{key}.lora_B.weight"], up)
        assert torch.equal(tensors[f"{key}.lora_A.weight"], down)
    folder = Path(report.adapter.path)
    if dialect == "diffusers":
        assert folder == tmp_path / "b_lora.safetensors"
    else:
        assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8


def test_a_padded_adapter_ends_in_zeros(checkpoint: Path, store: Path, tmp_path: Path) -> None:  # noqa: F811
    """PEFT's one rank, where layers have several."""
    lora = {"rank": "auto", "target": EVERY, "dialect": "peft", "output": str(tmp_path / "adapter")}
    report = convert(checkpoint, tmp_path / "out.safetensors", lora, statistics=str(store))
    assert report.adapter is not None
    ranks = report.adapter.ranks
    assert len(set(ranks.values())) > 1, ranks
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    for name, rank in ranks.items():
        up = next(x for key, x in tensors.items() if name in key and "lora_B" in key)
        down = next(x for key, x in tensors.items() if name in key and "lora_A" in key)
        assert up.shape[1] == down.shape[0] == max(ranks.values())
        assert up[:, :rank].any(0).all()
        assert not up[:, rank:].any()
        assert not down[rank:].any()


# -- however it runs, the same bytes -----------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in listing(folder).items() if digest}


def test_chunks_change_no_byte(checkpoint: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    found = []
    for size in (1 << 12, 1 << 14, 1 << 24):
        monkeypatch.setattr(budget, "CPU_CHUNK_BYTES", size)
        folder = tmp_path / str(size)
        for kind in ("nvfp4", "mxfp8", "fp8 block", "int8 rotated"):
            options = {**FORMATS[kind], "statistics": str(store)}
            convert(checkpoint, folder / f"{kind}.safetensors", {"rank": 8, "target": EVERY}, **options)
        lora = {"rank": 8, "target": EVERY, "method": "svdquant"}
        convert(checkpoint, folder / "svdquant.safetensors", lora)
        found.append(files_of(folder))
    assert len(found[0]) == 10
    assert found[0] == found[1] == found[2]


def test_a_layer_in_row_ranges_stays_whole(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantloom.flow import parts

    convert(checkpoint, tmp_path / "a/out.safetensors", {"rank": 8})
    monkeypatch.setattr(parts, "PART_BYTES", 10_000)
    convert(checkpoint, tmp_path / "b/out.safetensors", {"rank": 8})
    made = [[without_checksums(path.read_bytes()) for path in sorted((tmp_path / name).iterdir())] for name in "ab"]
    assert made[0] == made[1]
    assert len(made[0]) == 2


@pytest.mark.parametrize("lora", [{"rank": 8}, {"rank": "auto", "target": EVERY}, {"budget": "3%", "rank": 4}], ids=str)
def test_workers_and_schedulers_change_no_byte(
    lora: dict[str, Any], checkpoint: Path, store: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    runs: list[dict[str, Any]] = [{"workers": 1}, {"workers": 3}, {"scheduler": "sync"}]
    found = []
    for number, run in enumerate(runs):
        convert(checkpoint, tmp_path / f"{number}/out.safetensors", lora, statistics=str(store), **run)
        found.append(files_of(tmp_path / str(number)))
    assert len(found[0]) == 2
    assert found[0] == found[1] == found[2]


def test_the_model_is_the_same_as_without_an_adapter(checkpoint: Path, tmp_path: Path) -> None:
    """All but the header, which names the stage."""
    convert(checkpoint, tmp_path / "a.safetensors", {"rank": 8, "target": EVERY})
    Pipeline().read(checkpoint).target(preset="none").quantize("nvfp4").write(tmp_path / "b.safetensors")
    first, second = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert first.keys() == second.keys()
    for name, x in first.items():
        assert torch.equal(x.reshape(-1).view(torch.uint8), second[name].reshape(-1).view(torch.uint8))


# -- ranks that are chosen ---------------------------------------------------------------------------------------------


def test_automatic_ranks() -> None:
    white = torch.linalg.svdvals(noise(512, 512)).square()
    assert automatic_rank((white / white.sum()).tolist()[:128], (512, 512)) == 0
    steep = [0.6 * 0.5**index for index in range(128)]
    assert automatic_rank(steep, (512, 512)) == 8
    assert automatic_rank([0.005] * 128, (4096, 4096)) == 128
    assert automatic_rank([0.0] * 128, (512, 512)) == 0
    assert automatic_rank([0.2] * 5, (5, 4000)) in (0, 5)


def low_rank_errors(tmp_path: Path) -> Path:
    """Two layers alike, but of one the error has a few strong directions: outlier rows share their scale."""
    spiky = noise(256, 256) * 0.02
    spiky[:, :8] += noise(256, 8, 1) * torch.tensor([40.0] + [0.02] * 7)
    spiky[:6] *= 200
    return write_file(tmp_path / "in.safetensors", {"blocks.0.plain.weight": noise(256, 256, 3) * 0.02,
                                                    "blocks.0.spiky.weight": spiky})  # fmt: skip


def test_the_survey_gives_adapters_to_those_that_gain(tmp_path: Path) -> None:
    source = low_rank_errors(tmp_path)
    plan = (
        Pipeline().read(source).target(preset="none").quantize("fp8", rounding="nearest").lora(rank="auto")
        .write(tmp_path / "out.safetensors", compute=False).plan
    )  # fmt: skip
    assert plan.adapter is not None
    assert set(plan.adapter.ranks) == {"blocks.0.spiky"}
    assert plan.adapter.ranks["blocks.0.spiky"] % 8 == 0
    assert any("survey: 2 layers" in note for note in plan.notes)
    assert any("no adapter for 1 of 2 layers" in note for note in plan.notes)
    assert os.listdir(tmp_path) == ["in.safetensors"]


def test_no_layer_gains(tmp_path: Path) -> None:
    source = write_file(tmp_path / "in.safetensors", {"blocks.0.weight": noise(512, 512)})
    report = convert(source, tmp_path / "out.safetensors", {"rank": "auto"}, format="int8", rounding="nearest")
    assert report.adapter is None
    assert any("no adapter is written" in warning for warning in report.warnings)
    assert sorted(os.listdir(tmp_path)) == ["in.safetensors", "out.safetensors"]


def test_a_budget_is_kept_and_goes_where_it_helps_most(tmp_path: Path) -> None:
    source = low_rank_errors(tmp_path)
    one = 4 * 8 * (256 + 256)
    for budget_, rank, ranks in (
        (one, 8, {"blocks.0.spiky": 8}), (2 * one, 8, {"blocks.0.spiky": 8, "blocks.0.plain": 8}),
        (2 * one - 1, 8, {"blocks.0.spiky": 8}), ("6.3%", "auto", None),
    ):  # fmt: skip
        lora = {"rank": rank, "budget": budget_}
        output = tmp_path / f"{budget_}-{rank}.safetensors"
        report = convert(source, output, lora, format="fp8", rounding="nearest")
        assert report.adapter is not None
        limit = budget_ if isinstance(budget_, int) else 0.063 * 2 * 256 * 256 * 4
        found, _ = adapter_of(Path(report.adapter.path))
        assert sum(part.nbytes for pair in found.values() for part in pair) <= limit
        assert ranks is None or dict(report.adapter.ranks) == ranks


def test_a_share_of_the_source(checkpoint: Path, tmp_path: Path) -> None:
    report = convert(checkpoint, tmp_path / "out.safetensors", {"rank": "auto", "budget": "5%"})
    found, _ = adapter_of(tmp_path / "out_lora.safetensors")
    held = sum(part.nbytes for pair in found.values() for part in pair)
    assert 0.04 * report.nbytes_in < held <= 0.05 * report.nbytes_in


# -- plan, report, command line ----------------------------------------------------------------------------------------


def test_the_plan_shows_layers_ranks_and_bytes(cli: Callable[..., Ran], checkpoint: Path, tmp_path: Path) -> None:
    arguments = [checkpoint, tmp_path / "out.safetensors", "--format", "nvfp4", "--preset", "none", "--lora-rank", 8]
    shown = cli("plan", *arguments)
    assert shown.status == 0
    assert "rank 8, 16 kB" in shown.out
    assert "3 layers at rank 8" in shown.out
    plan = json.loads(cli("plan", *arguments, "--json").out)
    assert plan["adapter"]["layers"]["blocks.0.attn.qkv"] == 8
    held = {layer["name"]: layer["adapter"] for layer in plan["layers"] if "adapter" in layer}
    assert held["blocks.0.attn.qkv"] == {"rank": 8, "method": "svd", "bytes": 4 * 8 * (384 + 128) + 4}
    assert os.listdir(tmp_path) == ["in"]


def test_every_option_of_the_command_line(cli: Callable[..., Ran], checkpoint: Path, tmp_path: Path) -> None:
    output, adapter = tmp_path / "out.safetensors", tmp_path / "else/where.safetensors"
    ran = cli(
        "convert", checkpoint, output, "--format", "nvfp4", "--preset", "none", "--lora-rank", "4", "--lora-target",
        "mlp", "--lora-depth", "3", "--lora-ar-threshold", "2.5", "--lora-method", "svd", "--lora-budget", "1MB",
        "--lora-dtype", "BF16", "--lora-dialect", "diffusers", "--lora-save-path", adapter, "--json",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    report = json.loads(ran.out)
    assert report["adapter"]["path"] == str(adapter)
    assert set(report["adapter"]["layers"]) == {f"blocks.{b}.mlp.{side}" for b in (0, 1) for side in ("up", "down")}
    assert {x.dtype for x in load_file(adapter).values()} == {torch.bfloat16}
    layer = next(layer for layer in report["layers"] if "adapter" in layer)
    assert layer["adapter"]["rank"] == 4
    assert layer["adapter"]["error"][1] < layer["adapter"]["error"][0]
    assert layer["adapter"]["output_error"] == [None, None]


def test_the_report_is_plain_about_what_an_adapter_brings(
    cli: Callable[..., Ran], checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "o.safetensors"
    ran = cli("convert", checkpoint, output, "--format", "fp8", "--preset", "none", "--lora-rank", 1)
    assert ran.status == 0
    assert "less than 3% on" in ran.out
    assert "ComfyUI merges a LoRA" in ran.out
    assert " -> " in ran.out


def test_recipes_carry_the_stage(checkpoint: Path, tmp_path: Path) -> None:
    pipeline = Pipeline().read(checkpoint).quantize("nvfp4").lora(rank=8, budget="50MB", output="x_lora.safetensors")
    assert Pipeline.from_recipe(pipeline.to_json()) == pipeline
    first, second = (
        pipeline.lora(rank=8, output=str(tmp_path / name)).write(tmp_path / "o.safetensors", compute=False).plan.digest
        for name in ("a.safetensors", "b.safetensors")
    )
    assert first == second
    other = pipeline.lora(rank=9).write(tmp_path / "o.safetensors", compute=False).plan.digest
    assert other != first


# -- bad input and failure ---------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], type[QuantloomError], str]] = {
    "rank 0": ({"rank": 0}, UsageError, "rank 0"),
    "rank below 0": ({"rank": -3}, UsageError, "rank -3"),
    "rank true": ({"rank": True}, UsageError, "rank must be a whole number or a string"),
    "rank of a word": ({"rank": "many"}, UsageError, "many"),
    "rank above the dimensions": ({"rank": 73, "target": "odd"}, UsageError, "73.*odd.*100x72.*72"),
    "rank above all dimensions": ({"rank": 500}, PlanError, "edge shorter than rank 500"),
    "target without a match": ({"target": "nothing"}, UsageError, "nothing.*matches no layer.*nearest"),
    "target of kept layers": ({"target": "norm"}, PlanError, "not quantized|does not match"),
    "target that is no pattern": ({"target": "("}, UsageError, "adapter target"),
    "depth 0": ({"depth": 0}, PlanError, "no layer gets an adapter.*block 0"),
    "depth below 0": ({"depth": -1}, UsageError, "depth -1"),
    "aspect ratio": ({"ar_threshold": -1.0}, UsageError, "aspect ratio -1"),
    "budget 0": ({"budget": 0}, UsageError, "budget of 0"),
    "budget of no bytes": ({"budget": "0 MB"}, UsageError, "budget of 0"),
    "budget of a word": ({"budget": "much"}, UsageError, "much"),
    "budget below one adapter": ({"budget": "1kB"}, PlanError, "holds no adapter.*rank 32"),
    "budget in one rank": ({"budget": "1MB", "rank": "auto", "dialect": "peft"}, UsageError, "peft-ranks"),
    "method": ({"method": "magic"}, UsageError, "magic"),
    "dtype": ({"dtype": "F8"}, UsageError, "F8"),
    "dialect": ({"dialect": "confy"}, UsageError, "did you mean 'comfy'"),
    "weighted without statistics": ({"method": "weighted"}, UsageError, "quantloom calibrate"),
    "empty path": ({"output": ""}, UsageError, "path of the adapter is empty"),
    "a file as folder": ({"dialect": "peft", "output": "x.safetensors"}, PlanError, "is a folder"),
    "a folder as file": ({"output": "x"}, PlanError, "file that ends in"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, checkpoint: Path, tmp_path: Path) -> None:
    lora, kind, words = BAD[case]
    before = listing(tmp_path)
    with pytest.raises(kind, match=words):
        convert(checkpoint, tmp_path / "out.safetensors", lora)
    assert listing(tmp_path) == before


def test_places_that_an_adapter_must_not_take(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    existing = write_file(tmp_path / "there.safetensors")
    before = listing(tmp_path)
    for place in (checkpoint, output, existing, tmp_path / "in/../out.safetensors"):
        with pytest.raises(PlanError, match=r"replace|exists already"):
            convert(checkpoint, output, {"rank": 4, "output": str(place)})
    with pytest.raises(PlanError, match="part of the model"):
        convert(checkpoint, tmp_path / "folder", {"rank": 4, "output": str(tmp_path / "folder/lora.safetensors")})
    assert listing(tmp_path) == before


def test_bias_correction_and_an_adapter_exclude_each_other(
    checkpoint: Path, store: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    with pytest.raises(PlanError, match="twice"):
        convert(checkpoint, tmp_path / "o.safetensors", {"rank": 4}, statistics=str(store), bias_correction=True)
    report = convert(checkpoint, tmp_path / "o.safetensors", {"rank": 4, "target": "mlp"}, statistics=str(store),
                     bias_correction=True)  # fmt: skip
    assert report.adapter is not None


@pytest.mark.parametrize("dialect", ["comfy", "peft"])
def test_a_failure_leaves_nothing(dialect: str, tmp_path: Path) -> None:
    tensors = make_tensors()
    tensors["blocks.1.mlp.down.weight"][5, 7] = float("nan")
    source = write_file(tmp_path / "in.safetensors", tensors)
    before = listing(tmp_path)
    lora = {"rank": 8, "target": "mlp", "dialect": dialect}
    if dialect == "comfy":
        lora["output"] = str(tmp_path / "new/deep/lora.safetensors")
    for method in ("svd", "svdquant"):
        with pytest.raises(NonFiniteError, match=r"blocks\.1\.mlp\.down.*\[5, 7\]"):
            convert(source, tmp_path / "out/model", {**lora, "method": method})
        assert listing(tmp_path) == before
    report = convert(source, tmp_path / "kept.safetensors", {**lora, "rank": "auto"}, nonfinite="keep")
    assert "blocks.1.mlp.down" not in {layer.name for layer in report.layers}


def test_a_failure_of_the_second_file_brings_back_the_first(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model and adapter are replaced together, or neither is."""
    from quantloom.flow import commit

    output = tmp_path / "out.safetensors"
    convert(checkpoint, output, {"rank": 4})
    before = listing(tmp_path)
    real = commit.replace

    def broken(src: Path, dst: Path) -> None:
        if Path(dst) == output and str(src).endswith(".part"):
            raise OSError(5, "I/O error")
        real(src, dst)

    monkeypatch.setattr(commit, "replace", broken)
    pipeline = Pipeline().read(checkpoint).target(preset="none").quantize("fp8").lora(rank=8)
    with pytest.raises(QuantloomError):
        pipeline.write(output, overwrite=True)
    left = listing(tmp_path)
    assert before.items() <= left.items()
    assert all(name.endswith((".part", ".journal.jsonl")) for name in left.keys() - before.keys())
    monkeypatch.setattr(commit, "replace", real)
    pipeline.write(output, overwrite=True)
    assert listing(tmp_path).keys() == before.keys()
    assert listing(tmp_path) != before


def test_memory_that_an_adapter_needs_is_counted(checkpoint: Path, tmp_path: Path) -> None:
    def peak(lora: dict[str, Any] | None) -> dict[str, int]:
        pipeline = Pipeline().read(checkpoint).target(preset="none").quantize("nvfp4")
        pipeline = pipeline.lora(**lora) if lora else pipeline
        layers = pipeline.write(tmp_path / "o.safetensors", compute=False).plan.layers
        environment = budget.make_budget(layers, pipeline.recipe.run, "").environment
        return {layer.layer.name: layer.peak_bytes(environment) for layer in layers}

    with_adapter, without = peak({"rank": 8}), peak(None)
    for name, size in without.items():
        chosen = name in ("blocks.0.attn.qkv", "blocks.0.mlp.up", "blocks.0.mlp.down")
        assert with_adapter[name] - size >= (4 * 256 * 128 if chosen else 0)
        assert chosen or with_adapter[name] == size
