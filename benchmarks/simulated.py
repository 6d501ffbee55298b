"""The simulation beside real runs: the same plan, predicted for this machine's storage and then run.

    python benchmarks/simulated.py --gb 0.5 --workers 1,2                       # CPU, processes of a local Dask cluster
    python benchmarks/simulated.py --gb 12 --device h100 --cases "nvfp4 learned" --workers 1
    python benchmarks/simulated.py --gb 0.5 --costs                             # CPU seconds a GB, for flow/costs.py

Storage rates are measured first, in the same folder, as a run uses them: reading what is in the page cache, writing and
syncing. What is predicted and what took place both leave out the start of the processes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from make_checkpoint import make_checkpoint

from quantloom import Flow, Pipeline
from quantloom.flow.budget import make_budget
from quantloom.flow.costs import DEVICES, weight_gb
from quantloom.flow.simulate import Cluster, simulate

CASES = "fp8 nearest,fp8 mse,fp8:row nearest,fp8:row mse,fp8:block nearest,int8 mse,mxfp8 mse,nvfp4 nearest,nvfp4 mse"


def make_flow(source: Path, out: Path, case: str, workers: int, device: str) -> Flow:
    what, rounding = case.split()
    name, _, scaling = what.partition(":")
    on = "cpu" if device == "cpu" else "cuda"
    pipeline = Pipeline(workers=workers if on == "cpu" else None, device=on,
                        scheduler="sync" if workers == 1 and on == "cpu" else "threads")  # fmt: skip
    stage = pipeline.read(source).quantize(name, scaling=scaling or None, rounding=rounding)
    return stage.write(out, compute=False, overwrite=True)


def storage_rates(folder: Path, source: Path) -> tuple[float, float]:
    """Bytes a second: reading a file twice, the second time counts; writing 256 MB and syncing them."""
    files, buffer = sorted(source.glob("*.safetensors")), bytearray(1 << 20)
    read = 0.0
    for _ in range(2):
        began, size = time.perf_counter(), 0
        for path in files:
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    size += count
        read = size / (time.perf_counter() - began)
    began = time.perf_counter()
    with (folder / "probe").open("wb", buffering=0) as file:
        for _ in range(256):
            file.write(buffer)
        os.fsync(file.fileno())
    written = (256 << 20) / (time.perf_counter() - began)
    (folder / "probe").unlink()
    return read, written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.5)
    parser.add_argument("--arch", default="flux")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--workers", default="1,2", help="numbers, with commas")
    parser.add_argument("--cases", default=CASES, help="FORMAT[:SCALING] ROUNDING, with commas")
    parser.add_argument("--folder", help="where the checkpoint and the outputs go for a while")
    parser.add_argument("--costs", action="store_true", help="CPU seconds a GB of what is quantized, nothing else")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="quantloom-simulated-", dir=args.folder))
    rows = []
    try:
        make_checkpoint(folder / "model", args.arch, args.gb)
        read, write = storage_rates(folder, folder / "model")
        print(f"read {read / 1e9:.2f} GB/s, write and sync {write / 1e9:.2f} GB/s", file=sys.stderr)
        print("| case | workers | predicted s | measured s | error | CPU s/GB |\n|---|---|---|---|---|---|")
        for case in args.cases.split(","):
            for workers in [1] if args.costs else map(int, args.workers.split(",")):
                flow = make_flow(folder / "model", folder / "out", case, workers, args.device)
                budget = make_budget(flow.plan.layers, flow.recipe.run, "")
                cluster = Cluster((workers,), DEVICES[args.device], read, write, "threads")
                expected = simulate(flow.plan.layers, budget, cluster).outcomes[0].seconds - cluster.device.start
                began, cpu = time.perf_counter(), time.process_time()
                flow.compute()
                seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
                cost = cpu / sum(weight_gb(layer) for layer in flow.plan.layers)
                row = {"case": case, "workers": workers, "predicted": expected, "measured": seconds, "cost": cost}
                rows.append(row)
                error = f"{expected / seconds - 1:+.0%}"
                print(f"| {case} | {workers} | {expected:.2f} | {seconds:.2f} | {error} | {cost:.2f} |", flush=True)
    finally:
        shutil.rmtree(folder)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
