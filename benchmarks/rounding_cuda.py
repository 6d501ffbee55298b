#!/usr/bin/env python3
"""Rounding methods on one NVIDIA GPU: milliseconds and memory per layer, and whole conversions.

    python benchmarks/rounding_cuda.py [--shapes 3072x3072,...] [--formats "nvfp4,mxfp8"] [--reference SITE_PACKAGES]
    python benchmarks/rounding_cuda.py --end-to-end --gb 12 [--formats nvfp4] [--folder /on/the/storage/to/measure]

Layers: medians of several calls, the device synchronised before and after each. Columns of `calibrated` are given H:
its factor, rounding with 0 and with 2 sweeps, and with the product's own sweeps factor, rounding, acceptance and
measuring of errors together (`whole`). Weights and inputs are generated (rounding_cases.py). With --reference, the
folder of packages in which convert-to-quant lies (.../site-packages), its learned rounding is timed in the same run.

End to end: a generated Flux-like checkpoint, statistics of which every layer has its own, as in the real model, and
modulations share theirs. Layers of one width find equal numbers, stored once: reading statistics is as cheap as it can
be. GPU busy is the mean of what nvidia-smi reports. Every row runs in this process, after a small conversion.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cuda import storage_rates
from make_checkpoint import make_checkpoint
from measure import machine, save_json, table
from rounding_cases import Errors, Judge, Layer, as_stored, chosen, decoded_peer, format_of, generated, start_of

from quantloom import Pipeline
from quantloom.formats.format import Format
from quantloom.stages.calibrated import Calibrated
from quantloom.stages.estimates import Estimate
from quantloom.stages.factor import factorise
from quantloom.stages.gradient import Gradient
from quantloom.stages.histogram import count
from quantloom.stages.learned import Learned
from quantloom.stages.matrix import solve, solve_all
from quantloom.stages.methods import Method, Problem
from quantloom.stages.statistics_store import create_store, write_estimate
from quantloom.stages.statistics_table import InputEntry, make_table, write_table

SHAPES = ("3072x3072", "3072x12288", "12288x3072")
FORMATS = ("fp8 tensor", "mxfp8", "nvfp4", "int8 row")
ROUNDINGS = ("nearest", "mse", "learned", "calibrated")
REFERENCE_SHAPES, REFERENCE_FORMATS = ("3072x3072", "3072x12288"), ("fp8 tensor", "nvfp4")
REFERENCE_OPTIMIZERS = ("prodigy", "original")
TOKENS = 8192
WARM, REPEATS = 2, 5


@dataclass(frozen=True)
class Timed:
    """One way to round one layer."""

    shape: str
    format: str
    what: str
    milliseconds: float
    peak: float
    """Largest allocation on the GPU beyond what was there (inputs, weight, H), in 1e6 bytes."""
    errors: Errors | None = None

    def cells(self) -> list[str]:
        errors = str(self.errors) if self.errors else ""
        return [self.shape, self.format, self.what, f"{self.milliseconds:.1f}", f"{self.peak:.0f}", errors]


class Clock:
    """Times calls on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __call__(self, call: Callable[[], Any], repeats: int = REPEATS, warm: int = WARM) -> tuple[float, float, Any]:
        """Median milliseconds, peak in 1e6 bytes beyond what was there, and what the last call gave."""
        for _ in range(warm):
            call()
        self.sync()
        before = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        found, result = [], None
        for _ in range(repeats):
            result = None  # what the last call gave is no memory of this one's
            self.sync()
            began = time.perf_counter()
            result = call()
            self.sync()
            found.append(1e3 * (time.perf_counter() - began))
        peak = torch.cuda.max_memory_allocated(self.device) - before if self.device.type == "cuda" else 0
        return statistics.median(found), peak / 1e6, result


# -- layers ------------------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A layer on the device, in one format."""

    layer: Layer
    format: str
    judge: Judge
    clock: Clock

    def timed(self, what: str, call: Callable[[], Any], values: Callable[[Any], torch.Tensor] | None = None,
              **repeats: int) -> Timed:  # fmt: skip
        """Times a call; ``values`` turns what it gave into stored weights."""
        milliseconds, peak, result = self.clock(call, **repeats)
        errors = self.judge.errors(values(result)) if values else None
        return Timed(self.layer.name, self.format, what, milliseconds, peak, errors)

    def rows(self, slow: bool) -> Iterator[Timed]:
        """Every method; ``slow``: gradient too."""
        fmt, weight = format_of(self.format), self.layer.weight
        for what, search in (("nearest", False), ("mse", True)):
            yield self.timed(what, lambda search=search: _plain(fmt, weight, search), lambda values: values)
        scales, whole = start_of(fmt, weight, True)
        problem = Problem(self.layer.name, weight, fmt, scales, whole)
        start = fmt.snap_(weight.clone(), scales)

        def stored(rounded: Any) -> torch.Tensor:
            return as_stored(fmt, rounded.values, rounded.scales)

        learned = Learned()
        yield self.timed("learned: subspaces", lambda: learned.solver(problem))
        yield self.timed("learned: subspaces and rounds", lambda: learned.solver(problem).solve(start), stored)
        yield self.timed("learned: whole", lambda: solve(learned, problem)[0])
        yield from self.calibrated(replace(problem, moments=self.layer.moments()), start, stored)
        if slow:
            gradient: Method = Gradient()
            yield self.timed("gradient: whole", lambda: solve(gradient, problem)[0], stored, repeats=1, warm=0)

    def calibrated(
        self, problem: Problem, start: torch.Tensor, stored: Callable[[Any], torch.Tensor]
    ) -> Iterator[Timed]:
        """The method in its parts."""
        method, quick, thorough = Calibrated(), Calibrated(sweeps=0), Calibrated(sweeps=2)
        moments, group = problem.moments, problem.format.block_size or 1
        assert moments is not None

        def fresh() -> Problem:
            """Without the factor that a run before has left."""
            return replace(problem, moments=replace(moments, made={}))

        yield self.timed("calibrated: factor", lambda: factorise(moments.hessian, 0.05, group))
        yield self.timed("calibrated: rounding, 0 sweeps", lambda: quick.solver(problem).solve(start), stored)
        yield self.timed("calibrated: rounding, 2 sweeps", lambda: thorough.solver(problem).solve(start), stored)
        yield self.timed("calibrated: factor and 2 sweeps", lambda: thorough.solver(fresh()).solve(start))
        yield self.timed("calibrated: whole", lambda: solve(method, fresh())[0], stored)

        def three() -> list[Problem]:
            """Layers that share their inputs, such as q, k and v."""
            return [replace(each, name=name) for name, each in zip("qkv", [fresh()] * 3, strict=True)]

        def together() -> Any:
            return thorough.solve_together([thorough.solver(each) for each in three()])

        yield self.timed("calibrated: three layers in one, factor and 2 sweeps", together)
        yield self.timed("calibrated: three layers in one, whole", lambda: solve_all(method, three()))


def _plain(fmt: Format, weight: torch.Tensor, search: bool) -> torch.Tensor:
    return as_stored(fmt, weight, start_of(fmt, weight, search)[0])


def layer_rows(args: argparse.Namespace, device: torch.device) -> Iterator[Timed]:
    """All shapes and formats, and the reference beside them."""
    clock = Clock(device)
    for shape in args.shapes.split(","):
        rows, columns = (int(size) for size in shape.split("x"))
        layer = Layer(shape, *generated(rows, columns, 2 * args.tokens, device))
        judge = Judge(layer)
        for format in chosen(args.formats, FORMATS):
            yield from Subject(layer, format, judge, clock).rows(args.gradient)
            wanted = shape in REFERENCE_SHAPES and format in REFERENCE_FORMATS
            if args.reference and (wanted or device.type == "cpu"):
                yield from reference_rows(Subject(layer, format, judge, clock))
        del layer, judge


def reference_rows(subject: Subject) -> Iterator[Timed]:
    """convert-to-quant's learned rounding, one run for each optimiser."""
    from rounding_peer import convert

    weight, format = subject.layer.weight, subject.format
    for optimizer in REFERENCE_OPTIMIZERS:
        convert(weight[:128, :128].contiguous(), format, optimizer, num_iter=2)  # imports, first calls

        def values(stored: dict[str, torch.Tensor]) -> torch.Tensor:
            return decoded_peer(stored, format, (weight.shape[0], weight.shape[1]))

        what = f"convert-to-quant, {optimizer}"
        try:
            yield subject.timed(what, lambda optimizer=optimizer: convert(weight.clone(), format, optimizer), values,
                                repeats=1, warm=0)  # fmt: skip
        except Exception as error:  # whatever it fails with is the result
            print(f"{what}, {subject.layer.name}, {format}: {type(error).__name__}: {error}", flush=True)


# -- whole conversions -------------------------------------------------------------------------------------------------


class Busy:
    """How busy the GPU is while the context lasts, by nvidia-smi."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.samples = device, list[float]()

    def __enter__(self) -> Busy:
        self.process = None
        if self.device.type == "cuda" and shutil.which("nvidia-smi"):
            index = str(self.device.index or 0)
            query = ["nvidia-smi", "-i", index, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits",
                     "-lms", "100"]  # fmt: skip
            self.process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            self.thread = threading.Thread(target=self._read, daemon=True)
            self.thread.start()
        return self

    def _read(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip().isdigit():
                self.samples.append(float(line))

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.thread.join()

    @property
    def share(self) -> float | None:
        """Percent, or None where nobody knows."""
        return statistics.fmean(self.samples) if self.samples else None


def make_statistics(source: Path, out: Path, device: torch.device) -> int:
    """A store with random second moments for every layer that is quantized by default; the number of its inputs.

    Modulations share an input, all others have their own. Arrays are written once for each width.
    """
    plan = Pipeline().read(source).quantize("fp8").write(out.with_suffix(".none.safetensors"), compute=False).plan
    widths = {layer.layer.name: layer.layer.weight.shape[1] for layer in plan.quantized}
    groups: dict[str, list[str]] = {}
    for name in widths:
        groups.setdefault("modulation" if name.endswith(("mod.lin", "modulation.lin")) else name, []).append(name)
    run = "0" * 64
    create_store(out, make_table([]))
    written: dict[int, InputEntry] = {}
    entries = []
    for names in groups.values():
        width = widths[names[0]]
        if width not in written:
            written[width] = write_estimate(out, f"width {width}", random_moments(width, device), (run,))
        entries.append((names, written[width]))
    write_table(out, replace(make_table(entries), runs={run: "random moments"}))
    return len(entries)


def random_moments(width: int, device: torch.device, tokens: int = 4096) -> Estimate:
    """Of inputs whose spectrum falls, in random directions, with some strong channels; of full rank by white noise."""
    generator = torch.Generator(device).manual_seed(width)
    basis = torch.randn(256, width, generator=generator, device=device)
    fall = torch.arange(1, 257, device=device) ** -0.5
    x = (torch.randn(tokens, 256, generator=generator, device=device) * fall) @ basis
    x += torch.randn(tokens, width, generator=generator, device=device)
    x[:, torch.randperm(width, generator=generator, device=device)[: max(1, width // 256)]] *= 8
    hessian = (x.T @ x / tokens).cpu()
    diagonal, mean = hessian.diagonal().double(), x.mean(0).double().cpu()
    amax = float(x.abs().max())
    return Estimate(tokens, mean, diagonal, lambda start, stop: hessian[start:stop], count(x.cpu()), amax)


@dataclass(frozen=True)
class Conversion:
    """One whole conversion."""

    format: str
    rounding: str
    seconds: float
    ratio: float
    """To the first rounding of the format."""
    gb_per_second: float
    busy: float | None
    peak: float
    """Largest allocation on the GPU, in 1e6 bytes."""

    def cells(self) -> list[str]:
        busy = "-" if self.busy is None else f"{self.busy:.0f} %"
        rate = f"{self.gb_per_second:.2f}"
        return [self.format, self.rounding, f"{self.seconds:.2f}", f"{self.ratio:.2f}x", rate, busy, f"{self.peak:.0f}"]


def convert(source: Path, output: Path, format: str, rounding: str, store: Path, run: dict[str, Any]) -> float:
    """Wall seconds."""
    fmt = format_of(format)
    scaling = None if fmt.scaling == "group" else fmt.scaling
    given = {"statistics": str(store)} if rounding == "calibrated" else {}
    pipeline = Pipeline(**run).read(source).quantize(fmt.name, scaling=scaling, rounding=rounding, **given)
    began = time.perf_counter()
    pipeline.write(output, overwrite=True)
    return time.perf_counter() - began


def conversions(args: argparse.Namespace, device: torch.device) -> Iterator[Conversion]:
    """All roundings in turn on one checkpoint."""
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        sources = []
        for kind, gb in (("small", min(0.05, args.gb)), ("large", args.gb)):
            make_checkpoint(str(folder / kind), "flux", gb, 1, "bf16", 0)
            sources.append(folder / kind / "model.safetensors")
            inputs = make_statistics(sources[-1], folder / f"{kind}.zarr", device)
        small, large = sources
        size = large.stat().st_size / 1e9
        read, write = storage_rates(large, folder)
        print(f"{size:.2f} GB, {inputs} inputs; one thread reads {read:.2f} GB/s, writes and syncs {write:.2f} GB/s")
        output, run = folder / "out.safetensors", {"device": str(device), "workers": args.workers}
        for format in chosen(args.formats, FORMATS):
            first = 0.0
            for rounding in args.roundings.split(","):
                convert(small, output, format, rounding, folder / "small.zarr", run)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats(device)
                with Busy(device) as busy:
                    seconds = convert(large, output, format, rounding, folder / "large.zarr", run)
                first = first or seconds
                peak = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else 0.0
                yield Conversion(format, rounding, seconds, seconds / first, size / seconds, busy.share, peak)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rounding methods on a GPU.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--tokens", type=int, default=TOKENS, help="inputs that H is made of, and as many that judge")
    parser.add_argument("--gradient", action="store_true", help="time gradient rounding too, one run each")
    parser.add_argument("--reference", help="site-packages with convert-to-quant")
    parser.add_argument("--end-to-end", action="store_true", help="whole conversions instead of layers")
    parser.add_argument("--gb", type=float, default=12)
    parser.add_argument("--roundings", default=",".join(ROUNDINGS),
                        help="of whole conversions; the first is the yardstick")  # fmt: skip
    parser.add_argument("--workers", type=int, help="tasks at a time of whole conversions; default: the product's")
    parser.add_argument("--folder", help="where to generate and write; default: the system's temporary folder")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args(argv)
    if args.reference:
        sys.path.append(args.reference)  # last: torch stays ours
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    rows: list[Timed] | list[Conversion]
    if args.end_to_end:
        heads = ["format", "rounding", "s", "to the first", "GB/s", "GPU busy", "peak GPU MB"]
        rows = _collected(conversions(args, device))
    else:
        heads = ["shape", "format", "what", "ms", "GPU MB", "F / P / O"]
        rows = _collected(layer_rows(args, device))
    print("\n" + table(heads, [row.cells() for row in rows]))
    save_json(args.json, {"machine": {**machine(), "device": name}, "rows": [asdict(row) for row in rows]})
    return 0


def _collected(rows: Iterator[Any]) -> list[Any]:
    """All of them, shown as they come: what a run that is cut off has found is not lost."""
    found = []
    for row in rows:
        print("  " + ", ".join(row.cells()), file=sys.stderr, flush=True)
        found.append(row)
    return found


if __name__ == "__main__":
    sys.exit(main())
