"""What runs on a GPU instead of eager operations gives what they give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import write_file

from quantloom import Pipeline
from quantloom.formats.format import Format, Stats
from quantloom.formats.registry import make_format
from quantloom.stages import cascade, flips, scale_search
from quantloom.stages.calibrated import Calibrated
from quantloom.stages.learned import Learned
from quantloom.stages.matrix import solve
from quantloom.stages.methods import Method, Problem
from quantloom.stages.products import Operand, precise, rough
from quantloom.stages.statistics import Moments

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

FORMATS = [("fp8", "tensor", None), ("fp8", "row", None), ("fp8", "block", 64), ("int8", "row", None),
           ("int8", "tensor", None), ("mxfp8", None, None), ("nvfp4", None, None)]  # fmt: skip


def problem(fmt: Format, shape: tuple[int, int], device: str) -> Problem:
    """Correlated inputs, a weight with outliers, and searched scales; the same numbers on every device."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    weight[:, ::31] *= 4
    x = torch.randn(1024, columns, generator=generator) * torch.arange(1, columns + 1) ** -0.5
    x = x @ torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    weight, x = (torch.nn.functional.pad(each, (0, fmt.columns(columns) - columns)) for each in (weight, x))
    amax = fmt.amax(weight)
    whole = fmt.whole(Stats(weight.abs().max(), weight.flatten()), True) if fmt.needs_stats else None
    scales = fmt.scales(amax, whole) if fmt.scaling == "tensor" else fmt.search(weight, amax, whole)
    for name in ("stored", "multiplier", "inverse"):
        value = getattr(scales, name)
        setattr(scales, name, None if value is None else value.to(device))
    moments = Moments((x.T @ x / 1024).to(device), x.mean(0).to(device), 1024)
    return Problem("layer", weight.to(device), fmt, scales, None if whole is None else whole.to(device), moments)


@pytest.mark.parametrize("shape", [(192, 256), (128, 320), (64, 64)], ids=str)
@pytest.mark.parametrize("kind", FORMATS, ids=str)
@pytest.mark.parametrize("method", [Learned(min_k=32), Calibrated()], ids=["learned", "calibrated"])
def test_a_gpu_finds_what_a_cpu_finds(
    method: Method, kind: tuple[str, str, int | None], shape: tuple[int, int]
) -> None:
    fmt = make_format(*kind)
    found, quality = solve(method, problem(fmt, shape, "cuda"))
    expected, wanted = solve(method, problem(fmt, shape, "cpu"))
    assert torch.equal(fmt.snap_(found.values.clone(), found.scales), found.values)
    assert not quality.kept_start
    assert quality.stored.weight == pytest.approx(wanted.stored.weight, rel=0.01)
    assert quality.stored.output == pytest.approx(wanted.stored.output, rel=0.03)
    assert (found.values.cpu() == expected.values).float().mean() > (0.9 if isinstance(method, Learned) else 0.6)


@pytest.mark.parametrize("kind", FORMATS, ids=str)
def test_kernels_are_what_eager_operations_are(
    kind: tuple[str, str, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = problem(make_format(*kind), (192, 256), "cuda")
    fused = [solve(method, task)[0].values for method in (Learned(min_k=32), Calibrated())]
    for module in (cascade, flips, scale_search):
        monkeypatch.setattr(module, "kernels_for", lambda *_: None)
    eager = [solve(method, task)[0].values for method in (Learned(min_k=32), Calibrated())]
    for one, other in zip(fused, eager, strict=True):
        assert (one == other).float().mean() > 0.95


def test_products_in_pieces() -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    a, b = (torch.randn(2560, 2560, generator=generator, device="cuda") for _ in range(2))
    exact = a.double() @ b.double()
    assert float((precise(a, b) - exact).norm() / exact.norm()) < 2**-15
    assert float((rough(a, b) - exact).norm() / exact.norm()) < 2**-7
    operand, out = Operand(b.shape, b.device), a.clone()
    operand.put(slice(0, 1280), b[:1280])
    operand.subtract_from_(out, a[:, :1280])
    wanted = a.double() - a[:, :1280].double() @ b[:1280].double()
    assert float((out - wanted).norm() / wanted.norm()) < 2**-14


@pytest.mark.parametrize("rounding", ["learned", "gradient"])
def test_the_order_of_work_leaves_no_trace(rounding: str, tmp_path: Path) -> None:
    tensors = {f"layer{number}.weight": torch.randn(256, 384) for number in range(8)}
    source = write_file(tmp_path / "in.safetensors", tensors)
    options = {"iterations": 4} if rounding == "gradient" else {}
    outputs = []
    for workers in (1, 4, 4):
        outputs.append(tmp_path / f"{len(outputs)}.safetensors")
        pipeline = Pipeline(device="cuda", workers=workers).read(source).target(preset="none")
        pipeline.quantize("nvfp4", rounding=rounding, rounding_options=options).write(outputs[-1])
    assert len({output.read_bytes() for output in outputs}) == 1
