"""Rounding methods in the pipeline: every format, statistics, biases, activation scales, reports, refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from checkpoints import FORMATS, LINEAR, Ran, make_tensors, write_file
from safetensors import safe_open
from safetensors.torch import load_file

import quantloom
from quantloom import Pipeline
from quantloom.flow import parts, together
from quantloom.flow.budget import make_budget
from quantloom.flow.graph import batches
from quantloom.flow.plan import Plan
from quantloom.flow.report import Report
from quantloom.flow.verify import verify
from quantloom.formats.errors import PlanError, UsageError
from quantloom.formats.layers import group_layers
from quantloom.formats.registry import make_format
from quantloom.formats.source import open_source
from quantloom.stages import matrix, methods
from quantloom.stages.inputs import Inputs
from quantloom.stages.matrix import solve
from quantloom.stages.methods import Problem, Rounded
from quantloom.stages.quality import Measure
from quantloom.stages.reading import Decode, Read
from quantloom.stages.statistics import Moments, Statistics
from quantloom.stages.work import Environment, LayerPlan, Work

Cli = Callable[..., Ran]

LAYERS = ("blocks.0.attn.qkv", "blocks.0.mlp.up", "blocks.0.mlp.down",
          "blocks.1.attn.qkv", "blocks.1.mlp.up", "blocks.1.mlp.down", "odd")  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "learned": {"min_k": 32}, "calibrated": {}, "gradient": {"iterations": 8, "min_k": 32},
}  # fmt: skip


class Inputs128(torch.nn.Module):
    """Calls linear layers of the checkpoint's names and shapes; qkv and up of a block share their input."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = [name.removesuffix(".weight") for name, x in tensors.items() if f"{name}".endswith(".weight")
                      and x.dim() == 2 and "embed" not in name]  # fmt: skip
        for name in self.names:
            rows, columns = tensors[f"{name}.weight"].shape
            self.place(name, torch.nn.Linear(columns, rows))

    def place(self, name: str, layer: torch.nn.Module) -> None:
        *path, last = name.split(".")
        parent: torch.nn.Module = self
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, layer)

    def forward(self, x: torch.Tensor) -> None:
        """``x`` (tokens, 128)."""
        wide = torch.cat((x, x.square()), dim=1)
        for name in self.names:
            layer = self.get_submodule(name)
            layer({128: x, 256: wide, 72: x[:, :72].contiguous()}[layer.in_features])


def tokens(count: int = 512, seed: int = 1) -> torch.Tensor:
    """Correlated inputs with a mean and a few strong channels."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, 128, generator=generator) @ torch.randn(128, 128, generator=generator) * 0.05
    return (torch.randn(count, 16, generator=generator) @ torch.randn(16, 128, generator=generator) + mixed + 0.5) * (
        1 + 3 * (torch.arange(128) % 31 == 0)
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics for the layers of ``make_tensors``."""
    out = tmp_path_factory.mktemp("statistics") / "stats.zarr"
    quantloom.calibrate(Inputs128(make_tensors()), list(tokens().split(128)), out)
    return out


def convert(source: Path, output: Path, **options: Any) -> Report:
    return Pipeline(workers=2).read(source).target(preset="none").quantize(**options).write(output, overwrite=True)


def planned(source: Path, **options: Any) -> Plan:
    pipeline = Pipeline().read(source).target(preset="none").quantize(**options)
    return pipeline.write("unused.safetensors", compute=False).plan


def decoded(path: Path) -> dict[str, torch.Tensor]:
    """Float32 weights of every matrix of a checkpoint."""
    found = {}
    for layer in group_layers(open_source(path)):
        if len(layer.weight.shape) == 2 and layer.weight.dtype in ("F32", "F16", "BF16"):
            work = Work(LayerPlan(layer, (), ()), (0, layer.weight.shape[0]), Environment())
            step = Decode() if layer.encoding else Read()
            found[layer.name] = torch.cat([chunk.x.float().clone() for chunk in step.run(work).chunks()])
    return found


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_every_format(
    kind: str, method: str, checkpoint: Path, store: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.safetensors"
    options = {**FORMATS[kind], "statistics": str(store), "rounding_options": METHODS[method]}
    report = convert(checkpoint, output, rounding=method, **options)
    assert report.layers
    assert verify(str(output), str(checkpoint)).ok
    original, made = decoded(checkpoint), decoded(output)
    for layer in report.layers:
        assert layer.quality is not None
        stored, nearest = layer.quality.stored, layer.quality.nearest
        moments = Statistics.open(store).moments(layer.name)
        w, e = original[layer.name], made[layer.name] - original[layer.name]
        assert stored.weight == pytest.approx(float(e.norm() / w.norm()), rel=1e-4)
        output_error = math.sqrt(float((e @ moments.hessian * e).sum() / (w @ moments.hessian * w).sum()))
        assert stored.output == pytest.approx(output_error, rel=1e-3)
        assert layer.rounding == method
        if method == "calibrated":
            assert stored.output < 0.95 * nearest.output  # type: ignore[operator]
        else:
            assert stored.projected < nearest.projected  # type: ignore[operator]
    words = "output error" if method == "calibrated" else "projected error"
    assert words in report.summary()
    assert f"({report.worst[0].quality.nearest.weight:.5f})" in render(report)  # type: ignore[union-attr]


def render(report: Report) -> str:
    from io import StringIO

    from rich.console import Console

    text = StringIO()
    Console(file=text, width=300).print(report)
    return text.getvalue()


@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_workers_writes_the_same_bytes(
    method: str, checkpoint: Path, store: Path, tmp_path: Path
) -> None:
    outputs = []
    for number, run in enumerate(({"workers": 1}, {"workers": 4}, {"scheduler": "sync"})):
        outputs.append(tmp_path / f"{number}.safetensors")
        flow = Pipeline(**run).read(checkpoint).quantize(  # type: ignore[arg-type]
            "nvfp4", rounding=method, rounding_options=METHODS[method], statistics=str(store)
        )
        flow.write(outputs[-1])
    assert len({output.read_bytes() for output in outputs}) == 1


def test_a_cluster_writes_the_same_bytes(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / "threads.safetensors", tmp_path / "distributed.safetensors"]
    for output in outputs:
        pipeline = Pipeline(workers=2, scheduler=output.stem).read(checkpoint)
        report = pipeline.quantize("fp8", rounding="calibrated", statistics=str(store)).write(output)
        assert all(layer.quality for layer in report.layers)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_statistics_count_by_content_not_by_place(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    import shutil

    moved = tmp_path / "elsewhere" / "moved.zarr"
    shutil.copytree(store, moved)
    other = tmp_path / "other.zarr"
    quantloom.calibrate(Inputs128(make_tensors()), list(tokens(seed=2).split(128)), other)
    digests = [planned(checkpoint, format="fp8", rounding="calibrated", statistics=str(each)).digest
               for each in (store, moved, other)]  # fmt: skip
    assert digests[0] == digests[1] != digests[2]
    convert(checkpoint, tmp_path / "out.safetensors", format="fp8", rounding="calibrated", statistics=str(moved))
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert "elsewhere" not in json.dumps(file.metadata())


def test_layers_that_share_an_input_run_together(
    checkpoint: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(checkpoint, format="fp8", rounding="calibrated", statistics=str(store))
    by_name = {layer.layer.name: layer for layer in plan.quantized}
    assert by_name["blocks.0.attn.qkv"].affinity == by_name["blocks.0.mlp.up"].affinity != ""
    assert by_name["blocks.0.mlp.down"].affinity != by_name["blocks.0.mlp.up"].affinity
    monkeypatch.setattr("quantloom.flow.graph.BATCH_BYTES", 1)
    groups = [[layer.layer.name for layer in batch] for batch in batches(plan.layers)]
    together = [group for group in groups if "blocks.0.attn.qkv" in group]
    affinity = by_name["blocks.0.mlp.up"].affinity
    assert set(together[0]) == {name for name, layer in by_name.items() if layer.affinity == affinity}


def test_the_factor_is_made_once_for_layers_that_share_an_input(
    checkpoint: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantloom.stages import calibrated

    made = []
    real = calibrated.factorise
    monkeypatch.setattr(calibrated, "factorise", lambda *args: (made.append(1), real(*args))[1])
    output = tmp_path / "out.safetensors"
    report = convert(checkpoint, output, format="fp8", rounding="calibrated", statistics=str(store))
    inputs = {Statistics.open(store).input_of(layer.name) for layer in report.layers}
    assert len(made) == len(inputs) < len(report.layers)


@pytest.mark.parametrize("kind", FORMATS)
def test_layers_that_share_an_input_are_solved_in_one(
    kind: str, checkpoint: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantloom.stages.calibrated import Calibrated

    solved: list[int] = []
    real = Calibrated.solve_together
    monkeypatch.setattr(Calibrated, "solve_together", lambda *args: (solved.append(len(args[1])), real(*args))[1])
    options = {**FORMATS[kind], "rounding": "calibrated", "statistics": str(store)}
    plan = planned(checkpoint, **options)
    groups = {layer.together for layer in plan.quantized if layer.together}
    assert groups
    for group in groups:
        members = [layer for layer in plan.quantized if layer.together == group]
        assert group == tuple((layer.layer.name, layer.rows) for layer in members)
        assert len({(layer.affinity, layer.layer.weight.shape[1], layer.format) for layer in members}) == 1
        alone = replace(members[0], together=()).peak_bytes(Environment())
        assert members[0].peak_bytes(Environment()) > alone, "they lie in memory together"
    report = convert(checkpoint, tmp_path / "one.safetensors", **options)
    assert sorted(solved) == sorted(len(group) for group in groups)
    monkeypatch.setitem(together._MOST, "cpu", 0)
    assert not any(layer.together for layer in planned(checkpoint, **options).quantized)
    each = convert(checkpoint, tmp_path / "each.safetensors", **options)
    for one, other in zip(report.layers, each.layers, strict=True):
        assert one.name == other.name
        assert one.quality is not None
        assert other.quality is not None
        assert one.quality.stored.output == pytest.approx(other.quality.stored.output, rel=0.03)


def test_a_group_that_a_device_is_busy_with_is_not_larger(
    checkpoint: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"format": "int8", "scaling": "row", "rounding": "calibrated", "statistics": str(store)}
    sizes = {layer.layer.name: math.prod(layer.layer.weight.shape) for layer in planned(checkpoint, **options).layers}
    monkeypatch.setitem(together._MOST, "cpu", 2 * max(sizes.values()))
    groups = {layer.together for layer in planned(checkpoint, **options).quantized if layer.together}
    assert groups
    assert all(sum(sizes[name] for name, _ in group) <= 2 * max(sizes.values()) for group in groups)


def test_a_whole_matrix_is_never_split(checkpoint: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 1 << 14)
    assert any(layer.parts for layer in planned(checkpoint, format="fp8").layers)
    assert not any(layer.parts for layer in planned(checkpoint, format="fp8", rounding="learned").quantized)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_does_not_fit_is_refused_before_work(method: str, tmp_path: Path) -> None:
    tensors = {"a.weight": torch.zeros(2048, 2048).bfloat16(), "b.weight": torch.ones(64, 64)}
    source = write_file(tmp_path / "in.safetensors", tensors)
    recipe = {"format": "fp8", "rounding": method}
    if method == "calibrated":
        layer = torch.nn.Module()
        layer.a = torch.nn.Linear(2048, 8)
        layer.forward = lambda x: layer.a(x)  # type: ignore[method-assign]
        quantloom.calibrate(layer, [torch.randn(4, 2048)], tmp_path / "s.zarr")
        recipe["statistics"] = str(tmp_path / "s.zarr")
    plan = planned(source, **recipe)
    by_name = {layer.layer.name: layer for layer in plan.quantized}
    need = by_name["a"].peak_bytes(Environment())
    assert need > 16 * 2048 * 2048
    with pytest.raises(PlanError, match=r"^a needs .* do not fit in the memory budget"):
        make_budget(plan.layers, replace(plan.recipe.run, memory=400_000_000), "")


@dataclass(frozen=True)
class Fake:
    """A method that does as it is told."""

    name: ClassVar[str] = "fake"
    needs_moments: ClassVar[bool] = False
    outcome: str = "worse"

    def solver(self, problem: Problem) -> FakeSolver:
        if self.outcome == "memory" and problem.split < 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return FakeSolver(problem, self.outcome)

    def operations(self, shape: tuple[int, int]) -> float:
        return 0.0

    def memory(self, shape: tuple[int, int], device: str) -> int:
        return 0


class FakeSolver:
    projection: ClassVar[None] = None

    def __init__(self, problem: Problem, outcome: str) -> None:
        self.problem, self.outcome = problem, outcome

    def loss(self, values: torch.Tensor) -> float:
        return float((values - self.problem.weight).norm())

    def solve(self, start: torch.Tensor) -> Rounded:
        found = {"worse": start * 0, "nan": start * torch.nan}.get(self.outcome, start)
        return Rounded(found, self.problem.scales)


def problem() -> Problem:
    fmt = make_format("fp8", "row")
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    return Problem("layer", weight, fmt, fmt.scales(fmt.amax(weight), None))


@pytest.mark.parametrize("outcome", ["worse", "nan"])
def test_what_is_worse_than_the_start_is_not_kept(outcome: str) -> None:
    task = problem()
    found, quality = solve(Fake(outcome), task)
    assert torch.equal(found.values, task.format.snap_(task.weight.clone(), task.scales))
    assert quality.kept_start


def test_the_report_names_layers_that_kept_their_start(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantloom.stages.chain.make_method", lambda name, options: Fake())
    report = convert(checkpoint, tmp_path / "out.safetensors", format="fp8", rounding="learned")
    line = next(line for line in report.summary().splitlines() if "kept" in line and "started" in line)
    assert all(name in line for name in LAYERS)
    assert all(layer["kept_start"] for layer in report.to_dict()["layers"])


def test_running_out_of_memory_splits_the_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(matrix, "_WAIT_SECONDS", 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr("quantloom.stages.chain.make_method", lambda name, options: Fake("memory"))
    report = convert(checkpoint, tmp_path / "out.safetensors", format="fp8", rounding="learned")
    assert not any(layer["kept_start"] for layer in report.to_dict()["layers"])
    assert sum("split in 4" in message for message in caplog.messages) == len(LAYERS)
    monkeypatch.setattr(matrix, "_MOST_SPLIT", 2)
    with pytest.raises(quantloom.QuantloomError, match="CUDA out of memory; lower"):
        convert(checkpoint, tmp_path / "none.safetensors", format="fp8", rounding="learned")


def test_running_out_of_memory_while_statistics_load_is_survived(
    checkpoint: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "_WAIT_SECONDS", 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    options = {"format": "nvfp4", "rounding": "calibrated", "statistics": str(store), "bias_correction": True}
    convert(checkpoint, tmp_path / "calm.safetensors", **options)
    load, failed = Inputs.moments, set[str]()

    def crowded(self: Inputs, columns: int, device: torch.device) -> Moments:
        if self.layer not in failed:
            failed.add(self.layer)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load(self, columns, device)

    monkeypatch.setattr(Inputs, "moments", crowded)
    convert(checkpoint, tmp_path / "crowded.safetensors", **options)
    assert failed
    assert (tmp_path / "calm.safetensors").read_bytes() == (tmp_path / "crowded.safetensors").read_bytes()


def test_splitting_changes_nothing_but_the_last_bits() -> None:
    from quantloom.stages.calibrated import Calibrated

    x = tokens()
    fmt = make_format("nvfp4")
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    whole = weight.abs().max() / (6 * 256)
    moments = Moments(x.T @ x / 512, x.mean(0), 512)
    task = Problem("a", weight, fmt, fmt.search(weight, fmt.amax(weight), whole), whole, moments)
    at_once, split = (solve(Calibrated(), replace(task, split=split))[1].stored.output for split in (1, 1 << 20))
    assert split == pytest.approx(at_once, rel=0.02)


def test_statistics_that_do_not_fit_are_refused_with_the_list(checkpoint: Path, tmp_path: Path) -> None:
    tensors = make_tensors()
    other = {name: x for name, x in tensors.items() if name.startswith("blocks.0")}
    other = {name.replace("blocks.0", "block.0"): x for name, x in other.items()}
    other["odd.weight"] = torch.zeros(100, 128)
    quantloom.calibrate(Inputs128(other), [tokens(64)], tmp_path / "s.zarr")
    with pytest.raises(PlanError, match="do not fit the checkpoint") as caught:
        planned(checkpoint, format="fp8", rounding="calibrated", statistics=str(tmp_path / "s.zarr"))
    message = str(caught.value)
    assert "block.0.attn.qkv" in message
    assert "odd" in message
    assert "128" in message
    assert "72" in message


def test_statistics_of_another_model_are_refused_in_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    other = {name.replace("blocks.", "layers."): x for name, x in make_tensors().items() if name.startswith("blocks.0")}
    quantloom.calibrate(Inputs128(other), [tokens(64)], tmp_path / "s.zarr")
    with pytest.raises(PlanError, match=r"none of their \d+ layers is there; they name 'layers\.0.*'"):
        planned(checkpoint, format="fp8", rounding="calibrated", statistics=str(tmp_path / "s.zarr"))


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    """Statistics of the first block alone."""
    tensors = {name: x for name, x in make_tensors().items() if name.startswith("blocks.0")}
    quantloom.calibrate(Inputs128(tensors), [tokens(256)], tmp_path / "partial.zarr")
    return tmp_path / "partial.zarr"


@pytest.mark.parametrize(
    ("instead", "words"), [("mse", "rounded by mse"), ("learned", "rounded by learned"), ("keep", "kept")]
)
def test_layers_without_statistics_fall_back_and_are_named(
    instead: str, words: str, checkpoint: Path, partial: Path, tmp_path: Path
) -> None:
    report = convert(
        checkpoint, tmp_path / "out.safetensors", format="fp8", rounding="calibrated", statistics=str(partial),
        without_statistics=instead,
    )  # fmt: skip
    note = next(note for note in report.notes if "no statistics" in note)
    assert words in note
    assert all(name in note for name in LAYERS if not name.startswith("blocks.0"))
    assert "blocks.0.mlp.up" not in note
    roundings = {layer.name: layer.rounding for layer in report.layers}
    assert roundings["blocks.0.mlp.up"] == "calibrated"
    assert roundings.get("blocks.1.mlp.up") == (None if instead == "keep" else instead)
    if instead == "keep":
        assert report.kept["no statistics of its inputs"] == LINEAR - 3


def test_bias_correction_adds_what_the_mean_output_lost(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    for rounding, kind in (("nearest", "nvfp4"), ("calibrated", "nvfp4"), ("mse", "int8 rotated"), ("mse", "fp8 block"),
                           ("calibrated", "int8 rotated")):  # fmt: skip
        convert(checkpoint, output, rounding=rounding, **FORMATS[kind], statistics=str(store), bias_correction=True)
        before, after = load_file(checkpoint), load_file(output)
        original, made = decoded(checkpoint), decoded(output)
        name = "blocks.0.attn.qkv"
        mean = Statistics.open(store).moments(name).mean
        wanted = before[f"{name}.bias"].float() + (original[name] - made[name]) @ mean
        assert after[f"{name}.bias"].dtype == torch.bfloat16
        assert torch.allclose(after[f"{name}.bias"].float(), wanted, atol=2e-3, rtol=1e-2)
        assert not torch.equal(after[f"{name}.bias"], before[f"{name}.bias"])
        assert verify(str(output), str(checkpoint)).ok
        assert set(after) >= {f"blocks.{block}.attn.qkv.bias" for block in (0, 1)}


def test_bias_correction_lowers_the_output_error(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    x, name = tokens(2048, seed=9), "blocks.0.attn.qkv"
    errors = {}
    for rounding in ("nearest", "calibrated"):
        for correction in (False, True):
            output = tmp_path / "out.safetensors"
            options = {"rounding": rounding, "statistics": str(store), "bias_correction": correction}
            convert(checkpoint, output, format="nvfp4", **options)
            bias = load_file(output)[f"{name}.bias"].float() - load_file(checkpoint)[f"{name}.bias"].float()
            error = decoded(output)[name] - decoded(checkpoint)[name]
            errors[rounding, correction] = float((x @ error.T + bias).norm())
    assert errors["nearest", True] < errors["nearest", False]
    assert errors["calibrated", True] < errors["nearest", True]
    assert errors["calibrated", True] < 1.1 * errors["calibrated", False]


def test_a_broken_corrected_bias_is_found(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    convert(checkpoint, output, format="fp8", statistics=str(store), bias_correction=True)
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    from safetensors.torch import save_file

    tensors = load_file(output)
    tensors["blocks.0.attn.qkv.bias"][3] = torch.inf
    save_file(tensors, output, metadata)
    assert any("not finite" in problem for problem in verify(str(output), str(checkpoint)).problems)


@pytest.mark.parametrize(
    ("kind", "largest"), [("fp8", 448.0), ("fp8 row", 448.0), ("fp8_e5m2", 57344.0), ("nvfp4", 2688.0)]
)
def test_activation_scales_come_from_the_statistics(
    kind: str, largest: float, checkpoint: Path, store: Path, tmp_path: Path
) -> None:
    output, statistics = tmp_path / "out.safetensors", Statistics.open(store)
    for wanted in ("amax", "p99"):
        convert(checkpoint, output, **FORMATS[kind], statistics=str(store), input_scale=wanted)
        found = load_file(output)
        for name in LAYERS:
            if f"{name}.weight_scale" not in found:
                continue
            value = statistics.amax(name) if wanted == "amax" else statistics.percentile(name, 99)
            assert float(found[f"{name}.input_scale"]) == pytest.approx(value / largest, rel=1e-6)
    assert statistics.amax("blocks.0.mlp.up") == pytest.approx(float(tokens().abs().max()), rel=1e-6)


@pytest.mark.parametrize(("options", "words"), [
    ({"rounding": "calibrated"}, "calibrated needs statistics"),
    ({"bias_correction": True}, "bias correction needs the mean"),
    ({"input_scale": "amax"}, "comes from statistics"),
    ({"input_scale": "max"}, "must be a positive number that float32 holds, amax, or a percentile"),
    ({"input_scale": "p101"}, "percentile"),
    ({"format": "int8", "input_scale": 0.5}, "belongs to FP8 and NVFP4"),
    ({"rounding": "learned", "rounding_options": {"rank": 3}}, "rounding learned has no option 'rank'"),
    ({"rounding": "learned", "rounding_options": {"top_p": "much"}}, "top_p must be a number"),
    ({"rounding": "learned", "rounding_options": [1]}, "rounding_options must map"),
    ({"rounding": "mse", "rounding_options": {"damping": 1}}, "rounding mse has no options"),
    ({"without_statistics": "calibrated"}, "without_statistics"),
    ({"without_statistics": "maybe"}, "unknown without_statistics"),
    ({"rounding": "lerned"}, "did you mean 'learned'"),
])  # fmt: skip
def test_options_that_cannot_mean_anything(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Pipeline().quantize(**{"format": "fp8", **options})


def test_a_store_that_is_none_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(quantloom.QuantloomError, match=r"nothing\.zarr"):
        planned(checkpoint, format="fp8", rounding="calibrated", statistics=str(tmp_path / "nothing.zarr"))


def test_rules_choose_roundings_of_their_own(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    rules = {r"attn": {"rounding": "learned", "rounding_options": {"rounds": 2}}, "odd": {"rounding": "nearest"}}
    report = (
        Pipeline().read(checkpoint).target(rules=rules).quantize("fp8", rounding="calibrated", statistics=str(store))
        .write(tmp_path / "out.safetensors")
    )  # fmt: skip
    found = {layer.name: layer.rounding for layer in report.layers}
    assert found == {
        **dict.fromkeys(LAYERS, "calibrated"), "blocks.0.attn.qkv": "learned", "blocks.1.attn.qkv": "learned",
        "odd": "nearest",
    }  # fmt: skip
    assert verify(str(tmp_path / "out.safetensors"), str(checkpoint)).ok


def test_the_command_line(cli: Cli, checkpoint: Path, store: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    options = ["-O", "damping=0.1", "-O", "sweeps=1", "--bias-correction", "--input-scale", "p99.9", "--preset", "none"]
    done = cli("convert", checkpoint, output, "--format", "nvfp4", "--rounding", "calibrated", "--statistics", store,
               *options)  # fmt: skip
    assert done.status == 0, done.err
    assert "output error" in done.out
    with safe_open(output, "pt") as file:
        stage = json.loads(file.metadata()["quantloom"])["recipe"]["stages"][-1]
    assert stage["rounding_options"] == {"damping": 0.1, "sweeps": 1}
    assert stage["statistics"] == Statistics.open(store).digest
    checked = cli("verify", output, "--against", checkpoint, "--statistics", store)
    assert checked.status == 0, checked.err + checked.out
    assert all(words in checked.out for words in ("output (nearest)", "projected (nearest)", "error (nearest)"))
    shown = cli("plan", checkpoint, "--format", "nvfp4", "--rounding", "calibrated", "--statistics", store)
    assert "rounding calibrated" in shown.out
    wrong = cli("convert", checkpoint, output, "--format", "nvfp4", "-O", "damping")
    assert wrong.status == 2
    assert "NAME=VALUE" in wrong.err


def test_roundings_are_listed_with_their_options(cli: Cli) -> None:
    done = cli("roundings", "--json")
    listed = json.loads(done.out)
    assert [each["name"] for each in listed] == list(methods.ROUNDINGS)
    for each in listed:
        assert each["help"]
        assert all(option["help"] for option in each["options"]), each["name"]
        names = [option["name"] for option in each["options"]]
        if names:
            assert names == [item.name for item in fields(methods.method_class(each["name"]))]
    assert "damping" in cli("roundings").out


def test_statistics_turn_with_the_weight(store: Path) -> None:
    name, device = "blocks.0.mlp.up", torch.device("cpu")
    plain = Statistics.open(store).moments(name)
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    from quantloom.formats.rotation import rotate_

    inputs = Inputs(Statistics.open(store), name, "x", rotation=64)
    turned = inputs.moments(128, device)
    rotated = rotate_(weight.clone(), 64)
    energies = [float(Measure(*each, None).energy or 0) for each in ((weight, plain), (rotated, turned))]
    assert energies[0] == pytest.approx(energies[1], rel=1e-5)
    assert torch.allclose(rotated @ turned.mean, weight @ plain.mean, atol=1e-4)
    padded = replace(inputs, rotation=None).moments(144, device)
    assert padded.hessian.shape == (144, 144)
    assert torch.equal(padded.hessian[:128, :128], plain.hessian)
    assert not padded.hessian[128:].any()
    centred = replace(inputs, rotation=None, centred=True).moments(128, device)
    x = tokens()
    assert torch.allclose(centred.hessian, torch.cov(x.T, correction=0), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["nvfp4", "fp8 row", "int8", "mxfp8"])
def test_verify_finds_what_breaks_a_calibrated_row(
    kind: str, checkpoint: Path, store: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    output, name = tmp_path / "out.safetensors", "blocks.0.attn.qkv"
    convert(checkpoint, output, **FORMATS[kind], rounding="calibrated", statistics=str(store))
    assert verify(str(output), str(checkpoint)).ok
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    for change in (lambda codes: codes * 0, lambda codes: codes.roll(1)):
        tensors = load_file(output)
        codes = tensors[f"{name}.weight"].view(torch.uint8)
        codes[7] = change(codes[7])
        save_file(tensors, tmp_path / "broken.safetensors", metadata)
        problems = verify(str(tmp_path / "broken.safetensors"), str(checkpoint)).problems
        assert [problem for problem in problems if "row 7" in problem]


def test_verify_with_statistics_finds_a_wrong_bias(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    output = tmp_path / "out.safetensors"
    convert(checkpoint, output, format="nvfp4", rounding="mse", statistics=str(store), bias_correction=True)
    checked = verify(str(output), str(checkpoint), statistics=str(store))
    assert checked.ok
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(output)
    tensors["blocks.0.attn.qkv.bias"][3] += 0.5
    save_file(tensors, output, metadata)
    problems = verify(str(output), str(checkpoint), statistics=str(store)).problems
    assert any("its bias [3] is" in problem for problem in problems)


def test_other_statistics_judge_a_corrected_bias_by_its_outputs(
    checkpoint: Path, store: Path, tmp_path: Path
) -> None:
    output, other, name = tmp_path / "out.safetensors", tmp_path / "other.zarr", "blocks.0.attn.qkv"
    x = tokens(256, seed=7)
    quantloom.calibrate(Inputs128(make_tensors()), [x], other)
    convert(checkpoint, output, format="nvfp4", rounding="calibrated", statistics=str(store), bias_correction=True)
    checked = verify(str(output), str(checkpoint), statistics=str(other))
    assert checked.ok
    quality = next(layer.quality for layer in checked.layers if layer.name == name)
    assert quality is not None
    original = decoded(checkpoint)[name]
    wrong = x @ (decoded(output)[name] - original).T + load_file(output)[f"{name}.bias"].float()
    wrong -= load_file(checkpoint)[f"{name}.bias"].float()
    wanted = wrong.norm() / ((x - x.mean(0)) @ original.T).norm()
    assert quality.stored.output == pytest.approx(float(wanted), rel=1e-3)


def test_a_store_that_changes_between_plan_and_run_is_noticed(checkpoint: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    quantloom.calibrate(Inputs128(make_tensors()), [tokens(64)], store)
    options = {"rounding": "calibrated", "statistics": str(store)}
    flow = Pipeline().read(checkpoint).quantize("fp8", **options).write(tmp_path / "a.safetensors", compute=False)
    before = flow.plan.digest
    quantloom.calibrate(Inputs128(make_tensors()), [tokens(64, seed=5)], store)
    with pytest.raises(quantloom.QuantloomError, match=r"s\.zarr"):
        flow.compute()
    assert not (tmp_path / "a.safetensors").exists()
    again = Pipeline().read(checkpoint).quantize("fp8", **options).write(tmp_path / "a.safetensors", compute=False)
    assert again.plan.digest != before
    again.compute()


def test_a_long_computation_stops_when_it_is_asked_to(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    from quantloom.stages.cancelling import Cancelled, cancel, cancellable, forget

    fmt = make_format("nvfp4")
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    whole = weight.abs().max() / (6 * 256)
    task = Problem("a", weight, fmt, fmt.search(weight, fmt.amax(weight), whole), whole,
                   Statistics.open(store).moments("blocks.0.mlp.up"))  # fmt: skip
    cancel("run")
    try:
        for name, options in METHODS.items():
            method = methods.make_method(name, options)
            assert method is not None
            with pytest.raises(Cancelled), cancellable("run"):
                solve(method, task)
    finally:
        forget("run")


@pytest.mark.parametrize("correction", [False, True])
def test_report_and_verify_agree(correction: bool, checkpoint: Path, store: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    options = {"rounding": "calibrated", "statistics": str(store), "bias_correction": correction}
    report = convert(checkpoint, output, format="nvfp4", **options)
    checked = {layer.name: layer for layer in verify(str(output), str(checkpoint), statistics=str(store)).layers}
    for layer in report.layers:
        quality = checked[layer.name].quality
        assert quality is not None
        assert layer.quality is not None
        assert quality.stored.weight == pytest.approx(layer.quality.stored.weight, rel=1e-4)
        if not correction or layer.name.endswith("qkv"):
            assert quality.stored.output == pytest.approx(layer.quality.stored.output, rel=1e-3)
            assert quality.nearest.output == pytest.approx(layer.quality.nearest.output, rel=1e-3)
